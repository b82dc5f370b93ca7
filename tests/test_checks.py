"""The system checks, as `manage.py check` runs them."""

from collections.abc import Callable
from typing import Any

import pytest
from django.core.checks import CheckMessage, Error, Warning, run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.test import override_settings

from django_socketio.backends.memory import MemoryBackend
from tests.test_conf import INVALID, cases
from tests.test_runtime import INVALID_BACKENDS

urlpatterns: list[Any] = []


class Complaining(MemoryBackend):
    def check(self) -> list[str]:
        return ["The first thing.", "The second thing."]


def found(**settings: Any) -> list[CheckMessage]:
    with override_settings(**settings):
        return [message for message in run_checks() if (message.id or "").startswith("socketio.")]


def test_a_project_in_order_has_nothing_to_hear() -> None:
    assert found() == []
    assert found(SOCKETIO_PING_INTERVAL=0.5, SOCKETIO_MAX_PAYLOAD=1e6) == []


@pytest.mark.parametrize(("name", "value"), cases(INVALID), ids=repr)
def test_each_setting_has_a_check(name: str, value: Any) -> None:
    setting = f"SOCKETIO_{name}"
    messages = found(**{setting: value})
    assert messages
    for message in messages:
        assert type(message) is Error
        assert message.obj == setting
        assert message.msg.startswith(setting)
    assert "socketio.E001" in {message.id for message in messages}


def test_a_setting_that_does_not_exist_is_an_error() -> None:
    (message,) = found(SOCKETIO_PORTS=1)
    assert (type(message), message.id, message.obj) == (Error, "socketio.E001", "SOCKETIO_PORTS")


@pytest.mark.parametrize(("value", "named"), INVALID_BACKENDS)
def test_the_backend_has_a_check(value: Any, named: str) -> None:
    messages = [message for message in found(SOCKETIO_BACKEND=value) if named in message.msg]
    assert messages
    assert all(type(message) is Error and message.obj == "SOCKETIO_BACKEND" for message in messages)


def test_the_backend_is_asked_about_itself() -> None:
    messages = found(SOCKETIO_BACKEND=f"{__name__}.Complaining")
    assert [message.msg for message in messages] == ["The first thing.", "The second thing."]


def test_a_missing_url_conf_is_a_warning_that_names_the_fix() -> None:
    (message,) = found(ROOT_URLCONF=__name__)
    assert (type(message), message.id) == (Warning, "socketio.W001")
    assert 'path("", include("django_socketio.urls"))' in message.msg


@pytest.mark.parametrize("value", [["*"], ["https://a.example", "*"], None, ["https://a.example"]])
def test_a_star_among_the_origins_is_a_warning_before_deploying(value: Any) -> None:
    with override_settings(SOCKETIO_ALLOWED_ORIGINS=value):
        messages = run_checks(include_deployment_checks=True)
    ours = [message for message in messages if (message.id or "").startswith("socketio.")]
    assert found(SOCKETIO_ALLOWED_ORIGINS=value) == []  # for development it is fine
    assert [type(message) for message in ours] == [Warning] * ("*" in (value or ()))
    for message in ours:
        assert (message.id, message.obj) == ("socketio.W002", "SOCKETIO_ALLOWED_ORIGINS")
        assert "\n" not in message.msg and "Name the origins" in message.msg


@pytest.mark.parametrize("run", [lambda: call_command("check")], ids=["manage.py check"])
def test_the_command_shows_it(run: Callable[[], None]) -> None:
    run()
    with override_settings(SOCKETIO_PORT="x"):
        with pytest.raises(SystemCheckError, match="SOCKETIO_PORT must be a port number"):
            run()
