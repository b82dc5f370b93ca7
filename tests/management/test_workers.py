"""`manage.py runserver_socketio --workers N`, as people run it: in processes of its own."""

import importlib.metadata
import json
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent
import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings

from django_socketio.management import workers
from tests import clients
from tests.arbiter import Project, connected, gone, one_of_each, replaced, workers_of
from tests.services import Redis
from tests.support import ROOT, UNIT, free_port, wait_until

from . import test_runserver_socketio as single
from .test_runserver_socketio import START, certificate, get, has_ipv6

__all__ = ["certificate"]

pytestmark = pytest.mark.timeout(400)

REASON = "server shutting down"


class Running(single.Running):
    """The command with `--workers`."""

    def __init__(self, project: Project, number: int, *arguments: str, **options: Any) -> None:
        self._number = number
        super().__init__(project, *arguments, "--workers", str(number), **options)

    def reported(self, times: int = 1) -> str:
        plural = "s" if self._number > 1 else ""
        pattern = (
            rf"^Serving on https?://(\S+)/ with {self._number} worker{plural} \(Ctrl-C stops\)$"
        )

        def found() -> list[str]:
            assert self.process.poll() is None, self.output
            return re.findall(pattern, self.output, re.MULTILINE)

        (address,) = wait_until(found, START, "the report")
        wait_until(lambda: len(self.workers) == self._number, START, "the workers")
        return address

    @property
    def workers(self) -> set[int]:
        return workers_of(self.process.pid)

    def error(self) -> str:
        """Return the sentence of a command that cannot run."""
        assert self.status() == 2, self.output
        return super().error()


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Return a project for one worker."""
    return Project(tmp_path / "project")


@pytest.fixture
def shared(tmp_path: Path, redis: Redis) -> Project:
    """Return a project for several workers."""
    return Project(tmp_path / "project", redis.url)


@pytest.fixture(autouse=True)
def no_arbiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no command in this process become an arbiter: it would be the end of all tests."""
    monkeypatch.setattr(workers, "execute", lambda *arguments: pytest.fail("it would have served"))


# Starting


def test_two_workers(shared: Project) -> None:
    with Running(shared, 2, "127.0.0.1:0") as running:
        address = running.reported()
        with one_of_each(address, running.workers) as found:
            here, there = found.values()
            here.emit("tell", "hello")
            assert there.event() == ["message", "hello"]
        assert get(address, "/view/").body == b"one"
        for name in ("gevent", "websockets", "gunicorn"):
            assert f"{name} {importlib.metadata.version(name)}" in running.output
        assert "Settings site_settings" in running.output
        assert re.search(
            r"backend django_socketio\.backends\.redis[.\w]*\.RedisBackend", running.output
        )
        running.said('"GET /view/ HTTP/1.1" 200')
        assert "transport=polling" not in running.output
        assert running.end(signal.SIGTERM) == 0


def test_several_workers_need_a_backend_that_crosses_processes(project: Project) -> None:
    with Running(project, 2, "127.0.0.1:0") as running:
        assert running.error() == (
            "SOCKETIO_BACKEND is MemoryBackend, which carries messages inside one process only:"
            " 2 workers would not hear each other. Set it to a backend that crosses processes,"
            " such as redis://…, or start one worker."
        )


def test_one_worker_does_not(project: Project) -> None:
    with Running(project, 1, "127.0.0.1:0") as running, connected(running.reported()) as client:
        assert client.call("version") == ["one"]


@pytest.mark.parametrize("number", ["0", "-1", "two", "", "1.5", "٢", "99999"])
def test_a_number_of_workers_is_one(number: str) -> None:
    with pytest.raises(CommandError, match="is no number of workers"):
        call_command("runserver_socketio", f"--workers={number}")


def test_gunicorn_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(workers, "version", version)
    with pytest.raises(CommandError, match=r'pip install "django-socketio\[workers\]"') as raised:
        call_command("runserver_socketio", "--workers=2")
    assert raised.value.returncode == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"SOCKETIO_BACKEND": "pigeon://"}, "SOCKETIO_BACKEND: pigeon:// is none of"),
        ({"SOCKETIO_PNG_INTERVAL": 5}, "did you mean SOCKETIO_PING_INTERVAL"),
        ({"ALLOWED_HOSTS": []}, "You must set settings.ALLOWED_HOSTS"),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], sentence: str) -> None:
    with override_settings(**settings), pytest.raises(CommandError, match=sentence):
        call_command("runserver_socketio", "127.0.0.1:0", "--workers=1")


def test_a_missing_url_conf_is_told(project: Project) -> None:
    project.write("site_urls.py", "urlpatterns = []")
    with Running(project, 1, "127.0.0.1:0") as running:
        assert running.status() == 2
        assert 'CommandError: The URL conf has no Socket.IO: add path("", ' in running.output


def test_settings_that_are_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    with pytest.raises(CommandError, match="--workers needs settings in a module"):
        call_command("runserver_socketio", "127.0.0.1:0", "--workers=1")


@pytest.mark.parametrize(
    ("form", "shown"),
    [("{port}", "127.0.0.1:{port}"), ("[::1]:{port}", "[::1]:{port}"), ("", "127.0.0.2:{port}")],
)
def test_forms_of_the_address(project: Project, form: str, shown: str) -> None:
    if "::1" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    arguments = [form.format(port=port)] if form else []
    env = {} if form else {"SITE_PORT": str(port), "SITE_HOST": "127.0.0.2"}
    with Running(project, 1, *arguments, env=env) as running:
        assert running.reported() == shown.format(port=port)
        with connected(running.reported()) as client:
            assert client.call("version") == ["one"]


def test_a_port_that_is_taken_is_one_sentence(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        with Running(project, 1, address) as running:
            assert running.error() == f"{address} is taken by another process."


def test_as_a_module(project: Project) -> None:
    command = (sys.executable, "-m", "django")
    with Running(project, 1, "127.0.0.1:0", "--settings=site_settings", command=command) as running:
        with connected(running.reported()) as client:
            assert client.call("version") == ["one"]


def test_from_another_directory_with_options_of_the_interpreter(
    project: Project, tmp_path: Path
) -> None:
    show = "import sys; print('options', sys.warnoptions, sys._xoptions.get('utf8'), flush=True)\n"
    project.write("chat/__init__.py", show)
    manage = os.path.relpath(project.folder / "manage.py", tmp_path)
    command = (sys.executable, "-X", "utf8", "-W", "error::ResourceWarning", manage)
    with Running(project, 1, "127.0.0.1:0", command=command, cwd=tmp_path) as running:
        with connected(running.reported()) as client:
            assert client.call("version") == ["one"]
        lines = [line for line in running.output.splitlines() if line.startswith("options")]
        assert lines == ["options ['error::ResourceWarning'] True"] * 2  # the command, the worker


def test_by_a_manage_py_that_patches_itself(tmp_path: Path) -> None:
    first = "from gevent.monkey import patch_all; patch_all(); print('patched once')"
    project = Project(tmp_path / "project", first=first)
    with Running(project, 1, "127.0.0.1:0") as running, connected(running.reported()) as client:
        assert client.call("version") == ["one"]


LOOK = """
import json, os, sys
def look():
    from gevent._hub_local import get_hub_if_exists
    from gevent.monkey import saved
    if "gunicorn.arbiter" not in sys.modules:
        return
    ours = [name for name in sys.modules if name.split(".")[0] in ("django", "django_socketio")]
    project = [name for name in sys.modules if name.split(".")[0] in ("chat", "site_settings")]
    with open(os.environ["SEEN"], "w") as file:
        json.dump([os.getpid(), ours, project, get_hub_if_exists() is not None, len(saved)], file)
os.register_at_fork(before=look)
"""


def test_the_arbiter_has_no_hub_and_no_project(project: Project, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(LOOK)
    seen = tmp_path / "seen.json"
    env = {"PYTHONPATH": f"{tmp_path / 'early'}:{ROOT}", "SEEN": str(seen)}
    with Running(project, 1, "127.0.0.1:0", env=env) as running:
        running.reported()
        pid, ours, modules, hub, patched = json.loads(seen.read_text())
        assert pid == running.process.pid
        assert sorted(ours) == ["django_socketio", "django_socketio.gunicorn"]
        assert (modules, hub, patched) == ([], False, 0)


def test_no_configuration_of_gunicorns_is_read(project: Project) -> None:
    """It is for who starts gunicorn; here it could only be there by chance."""
    project.write("gunicorn.conf.py", "raise SystemExit('read')")
    env = {"GUNICORN_CMD_ARGS": "--preload"}
    with Running(project, 1, "127.0.0.1:0", env=env) as running:
        with connected(running.reported()) as client:
            assert client.call("version") == ["one"]


def test_what_a_client_says_of_the_scheme_is_not_believed(project: Project) -> None:
    with Running(project, 1, "127.0.0.1:0") as running:
        headers = {"X-Forwarded-Proto": "https"}
        with connected(running.reported(), headers=headers) as client:
            assert client.call("version") == ["one"]
    assert project.notes[0] == "connect http"


def test_the_log_of_the_package_is_shown(project: Project) -> None:
    with Running(project, 1, "127.0.0.1:0") as running:
        address = running.reported()
        assert get(address, f"{clients.PATH}?EIO=4&transport=pigeon").status == 400
        running.said("Refused GET from 127.0.0.1: Transport unknown")


# Static files and TLS


@pytest.mark.parametrize(
    ("debug", "options", "served"),
    [("1", [], True), ("1", ["--nostatic"], False), ("", [], False), ("", ["--insecure"], True)],
)
def test_static_files_are_served(
    project: Project, debug: str, options: list[str], served: bool
) -> None:
    with Running(project, 1, "127.0.0.1:0", *options, env={"SITE_DEBUG": debug}) as running:
        answer = get(running.reported(), "/static/chat/page.css")
        assert (answer.body == b"/* the page's style */") is served


def test_tls(project: Project, certificate: tuple[str, str]) -> None:
    certfile, keyfile = certificate
    tls = ssl.create_default_context(cafile=certfile)
    files = ("--certfile", certfile, "--keyfile", keyfile)
    with Running(project, 1, "127.0.0.1:0", *files) as running:
        address = running.reported()
        assert f"Serving on https://{address}/" in running.output
        for transport in ("websocket", "polling"):
            with connected(address, transport=transport, tls=tls) as client:
                assert client.call("echo", "x" * 100_000) == ["x" * 100_000]
        assert project.notes[0] == "connect https"
        assert running.end(signal.SIGTERM) == 0


def test_a_certificate_that_cannot_be_used_is_one_sentence(project: Project) -> None:
    with Running(project, 1, "127.0.0.1:0", "--certfile", "no-such.pem") as running:
        assert running.error().startswith("no-such.pem cannot be used for TLS: ")


# Ending, and going on with other code


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
def test_a_signal_ends_it_cleanly(shared: Project, how: str) -> None:
    with Running(shared, 2, "127.0.0.1:0") as running:
        address, pids = running.reported(), running.workers
        with one_of_each(address, pids) as found:
            answer = gevent.spawn(get, address, "/slow/")
            wait_until(lambda: "slow" in shared.notes)
            if how == "Ctrl-C":  # a terminal sends the signal to the whole group
                os.killpg(running.process.pid, signal.SIGINT)
                assert running.status() == 0
            else:
                assert running.end(signal.Signals[how]) == 0
            assert answer.get().body == b"one"
            for client in found.values():
                assert client.connection.wait_for_end().code == (1012 if how == "SIGTERM" else 1001)
        gone(pids)
        assert shared.finished.count(REASON) == 2
        assert "Traceback" not in running.output
        with pytest.raises(ConnectionRefusedError):
            clients.open_socket(address)


def test_sighup_has_new_workers_with_new_code(shared: Project) -> None:
    with Running(shared, 2, "127.0.0.1:0") as running:
        address, before = running.reported(), running.workers
        with one_of_each(address, before) as found:
            shared.answer("two")
            running.process.send_signal(signal.SIGHUP)
            for client in found.values():
                assert client.connection.wait_for_end().code == 1012
        gone(before)
        after = replaced(running.process.pid, before, 2)
        with one_of_each(address, after) as found:
            assert [client.call("version") for client in found.values()] == [["two"]] * 2
        assert get(address, "/view/").body == b"two"
        assert running.end(signal.SIGTERM) == 0


def test_a_change_of_the_code_alone_means_nothing(project: Project) -> None:
    with Running(project, 1, "127.0.0.1:0") as running:
        address = running.reported()
        with closing(clients.connect(address)) as client:
            project.write("chat/events.py", "def broken(:\n")
            with pytest.raises(TimeoutError):
                client.event(timeout=max(1.5, 20 * UNIT))
            assert client.call("version") == ["one"]
