"""The tests' own machinery: what it promises other tests."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import gevent
import pytest

from tests import support

MANAGE = """
import http.server, sys
print("arguments", *sys.argv[1:])
host, port = sys.argv[2].split(":")
http.server.HTTPServer((host, int(port)), http.server.BaseHTTPRequestHandler).serve_forever()
"""

SUITE = """
import gevent
import pytest

from tests import support

@pytest.fixture
def nothing():
    return support.require("redis", None, "no server")

def test_one(nothing): pass
def test_two(nothing): pass
def test_three(): support.require("chromium", "")
def test_four(): assert support.require("node", "/bin/node") == "/bin/node"
def test_five(): pytest.skip("another reason")
@pytest.mark.xfail(strict=True, raises=ValueError)
def test_six(): support.require("rediss", None)
"""


def pytest_in(folder: Path, source: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a suite with this conftest, in a process of its own."""
    (folder / "test_suite.py").write_text(source)
    (folder / "conftest.py").write_text("from tests.conftest import *")
    options = ("-c", support.ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, folder],
        cwd=support.ROOT,
        env={**os.environ, "SOCKETIO_TEST_REQUIRE": "", **env},
        capture_output=True,
        text=True,
    )


def test_skips_are_counted_by_what_is_missing(tmp_path: Path) -> None:
    run = pytest_in(tmp_path, SUITE)
    assert run.returncode == 0, run.stdout
    assert "\n2 tests skipped for want of redis\n" in run.stdout
    assert "\n1 test skipped for want of chromium\n" in run.stdout
    assert re.search("1 passed, 4 skipped, 1 xfailed", run.stdout)


def test_a_required_thing_that_is_missing_fails(tmp_path: Path) -> None:
    run = pytest_in(tmp_path, SUITE, SOCKETIO_TEST_REQUIRE="redis,node")
    assert run.returncode == 1
    assert "for want of redis (no server), which SOCKETIO_TEST_REQUIRE names" in run.stdout
    assert "1 test skipped for want of chromium" in run.stdout
    assert "for want of redis\n" not in run.stdout


def test_a_requirement_that_nothing_knows_is_refused(tmp_path: Path) -> None:
    run = pytest_in(tmp_path, SUITE, SOCKETIO_TEST_REQUIRE="chromuim")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "SOCKETIO_TEST_REQUIRE names chromuim; there is only chromium, faketime" in run.stderr


def test_an_error_in_a_greenlet_fails_the_test(tmp_path: Path) -> None:
    source = """
import gevent
def test_dies(): gevent.spawn(lambda: 1 / 0).join()
def test_meant(greenlet_errors):
    gevent.spawn(lambda: 1 / 0).join()
    greenlet_errors.clear()
"""
    run = pytest_in(tmp_path, source)
    assert "2 passed, 1 error" in run.stdout
    assert re.search(r"^ERROR .*::test_dies\b", run.stdout, re.MULTILINE)


def test_the_alarm_reaches_a_test_that_waits_or_spins(tmp_path: Path) -> None:
    source = """
import gevent, pytest
@pytest.mark.timeout(4)
def test_waits(): gevent.sleep(30)
@pytest.mark.timeout(4)
def test_spins(greenlet_errors):
    def spin():
        while True: pass
    try:
        gevent.spawn(spin).join()
    finally:
        greenlet_errors.clear()
"""
    assert "2 failed" in pytest_in(tmp_path, source).stdout


def test_the_process_is_patched_and_django_is_ready() -> None:
    from django.apps import apps
    from gevent.monkey import is_module_patched

    assert all(map(is_module_patched, ("socket", "ssl", "threading", "time", "select")))
    assert apps.is_installed("django_socketio")


def test_every_greenlet_sees_the_database() -> None:
    from django.contrib.auth.models import User
    from django.db import connection

    def count() -> int:
        try:
            return User.objects.count()
        finally:
            connection.close()

    User.objects.create(username="somebody")
    try:
        counts = [greenlet.get() for greenlet in [gevent.spawn(count) for _ in range(3)]]
        assert counts == [1, 1, 1]
    finally:
        User.objects.all().delete()


def test_wait_until_returns_what_it_waited_for() -> None:
    numbers = itertools.count()
    assert support.wait_until(lambda: (n := next(numbers)) > 2 and n) == 3
    with pytest.raises(AssertionError, match=r"not within 0\.1 s: a miracle"):
        support.wait_until(lambda: False, timeout=0.1, what="a miracle")


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", support.free_port()))


def test_node_runs(node: str) -> None:
    answer = subprocess.run([node, "--print", "6 * 7"], capture_output=True, text=True, check=True)
    assert answer.stdout == "42\n"


def test_a_command_that_cannot_run_is_not_found(tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert not support._runs(str(shim))
    assert not support._runs(str(tmp_path / "nothing"))


def test_a_server_lives_as_long_as_its_block(tmp_path: Path) -> None:
    manage = tmp_path / "manage.py"
    manage.write_text(MANAGE)
    with support.Server(manage, "--nostatic", env={"LANG": "C"}) as server:
        expected = f"arguments runserver_socketio {server.address} --noreload --nostatic\n"
        assert server.output.startswith(expected)
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(server.url)
    assert server.wait() == -signal.SIGTERM
    assert "GET / HTTP/1.1" in server.output
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
