from gevent import monkey

monkey.patch_all()

import os

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"

from collections.abc import Iterator
from typing import Any

import django
import gevent
import hypothesis
import pytest
from django.db import connection
from django.db.backends.signals import connection_created
from django.test.utils import (
    setup_databases,
    setup_test_environment,
    teardown_databases,
    teardown_test_environment,
)

from tests import support

django.setup()

from django.contrib.auth.models import User

from tests.sites import Site, no_handlers

# The machine's pace is no property of the code. What CI adds (its seed) stays.
hypothesis.settings.register_profile("tests", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("tests")

# The failure that the alarm of pytest-timeout raises may meet any greenlet: it belongs to the
# main one, which runs the test.
gevent.hub.Hub.SYSTEM_ERROR = (*gevent.hub.Hub.SYSTEM_ERROR, pytest.fail.Exception)


def pytest_configure(config: pytest.Config) -> None:
    if unknown := support.REQUIRED - support.OPTIONAL:
        raise pytest.UsageError(
            f"SOCKETIO_TEST_REQUIRE names {', '.join(sorted(unknown))}; "
            f"there is only {', '.join(sorted(support.OPTIONAL))}"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    for line in support.wants(report.longrepr[2] for report in reports):
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session", autouse=True)
def django_project() -> Iterator[None]:
    """Set up Django's test environment and an empty, migrated database."""
    setup_test_environment()
    databases = setup_databases(verbosity=0, interactive=False)
    yield
    teardown_databases(databases, verbosity=0)
    teardown_test_environment()


@pytest.fixture(autouse=True)
def greenlet_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Fail a test in which a greenlet or a callback of the hub died, for else nobody would know.

    A test that means it to die clears this list.
    """
    errors: list[BaseException] = []
    hub = gevent.get_hub()
    print_exception = hub.print_exception

    def record(context: Any, kind: Any, error: BaseException, trace: Any) -> None:
        print_exception(context, kind, error, trace)
        errors.append(error)

    monkeypatch.setattr(hub, "print_exception", record)
    yield errors
    if errors:
        # Plain exceptions: pytest would not go on with the teardown of other fixtures otherwise.
        plain = [e if isinstance(e, Exception) else AssertionError(repr(e)) for e in errors]
        raise ExceptionGroup("in a greenlet or the hub", plain)


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Serve the project in this process; `tests.sites.settings` marks a test with settings."""
    with Site(**getattr(request, "param", {})) as site:
        yield site


@pytest.fixture
def handlers() -> Iterator[None]:
    """Forget the handlers that a test binds."""
    with no_handlers():
        yield


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Return the database connections that greenlets make during a test."""
    made: list[Any] = []

    def note(connection: Any, **kwargs: Any) -> None:
        made.append(connection)

    connection.close()
    connection_created.connect(note)
    yield made
    connection_created.disconnect(note)
    User.objects.all().delete()
    connection.close()


@pytest.fixture(scope="session")
def node() -> str:
    """Return the path of Node.js."""
    return support.require("node", support.node_binary())


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of Chromium; start it with `support.CHROMIUM_ARGUMENTS`."""
    return support.require("chromium", support.chromium_binary())
