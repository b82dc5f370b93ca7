"""`manage.py runserver_socketio`, as people run it: in processes of its own."""

import errno
import http.client
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import django
import gevent
import pytest
from django.conf import settings
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.management import CommandError, call_command
from django.test import override_settings

import django_socketio
from django_socketio.management.commands import runserver_socketio
from tests import clients
from tests.support import ROOT, UNIT, free_port, require, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])

#: Three interpreters in a row start Django, on a machine that may be busy.
START = 600 * UNIT

MANAGE = """
{first}
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")
if __name__ == "__main__":
    from django.core.management import execute_from_command_line
    execute_from_command_line(sys.argv)
"""
SETTINGS = """
import os
SECRET_KEY = "x"
DEBUG = bool(os.environ.get("SITE_DEBUG"))
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "site_urls"
INSTALLED_APPS = ["django.contrib.staticfiles", "django_socketio", "chat"]
STATIC_URL = "/static/"
USE_TZ = True
SOCKETIO_HOST = os.environ.get("SITE_HOST", "127.0.0.1")
SOCKETIO_PORT = int(os.environ.get("SITE_PORT", "9000"))
"""
URLS = """
from django.http import HttpResponse
from django.urls import include, path
from chat import views
urlpatterns = [
    path("", include("django_socketio.urls")),
    path("view/", views.view),
    path("slow/", views.slow),
]
"""
VIEWS = """
from django.http import HttpResponse
def view(request):
    return HttpResponse("{answer}")
def slow(request):
    import time
    from chat.events import note
    note("slow")
    time.sleep(0.2)
    return HttpResponse("{answer}")
"""
EVENTS = """
import os, time
from django_socketio.events import on_connect, on_disconnect, on_event, on_finish

def note(line):
    with open(os.environ["SITE_NOTES"], "a") as notes:
        notes.write(line + "\\n")

@on_connect
def connect(request, socket, context):
    note("connect " + request.scheme)

@on_event("version")
def version(request, socket, context):
    return "{answer}"

@on_event("sleep")
def sleep(request, socket, context, seconds):
    note("sleep")
    time.sleep(seconds)
    note("slept")

@on_disconnect
def disconnect(request, socket, context):
    time.sleep(0.01)
    note("disconnect")

@on_finish
def finish(request, socket, context):
    note("finish " + socket.disconnect_reason)
"""


class Project:
    """A Django project in a folder of its own."""

    def __init__(self, folder: Path, first: str = "") -> None:
        self.folder = folder
        self.notes_file = folder / "notes.txt"
        (folder / "chat" / "static" / "chat").mkdir(parents=True)
        self.write("manage.py", MANAGE.format(first=first))
        self.write("site_settings.py", SETTINGS)
        self.write("site_urls.py", URLS)
        self.write("chat/__init__.py", "")
        self.write("chat/static/chat/page.css", "/* the page's style */")
        self.write("chat/views.py", VIEWS.format(answer="one"))
        self.write("chat/events.py", EVENTS.format(answer="one"))

    def write(self, name: str, source: str) -> None:
        """Write a file, and have its time differ from that of the version before."""
        path = self.folder / name
        before = path.stat().st_mtime if path.exists() else 0
        path.write_text(source)
        if before and path.stat().st_mtime <= before + 1:
            os.utime(path, (before + 2, before + 2))

    @property
    def notes(self) -> list[str]:
        return self.notes_file.read_text().splitlines() if self.notes_file.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


class Running:
    """The command in a process; it is ended with the block, if it has not ended."""

    def __init__(
        self,
        project: Project,
        *arguments: str,
        command: tuple[str, ...] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        command = command or (sys.executable, str(project.folder / "manage.py"))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DJANGO_")}
        inherited.pop("SOCKETIO_PATCHING", None)
        self._log = project.folder.parent / f"output-{time.monotonic_ns()}.txt"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "runserver_socketio", *arguments],
                cwd=cwd or project.folder,
                env={
                    **inherited,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "SITE_NOTES": str(project.notes_file),
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:  # it, and what it has started
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def reported(self, times: int = 1) -> str:
        """Return the address that the server says it serves, when it says so for the nth time."""
        pattern = r"^Serving on https?://(\S+)/ \(Ctrl-C stops\)$"

        def found() -> list[str]:
            found = re.findall(pattern, self.output, re.MULTILINE)
            assert self.process.poll() is None or len(found) >= times, self.output
            return found if len(found) >= times else []

        return wait_until(found, START, f"report number {times}")[-1]

    def said(self, text: str) -> None:
        wait_until(lambda: text in self.output, START, f"{text!r}")

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the process and return its status."""
        self.process.send_signal(number)
        return self.status()

    def status(self) -> int:
        return self.process.wait(START)

    def error(self) -> str:
        """Return the sentence of a command that cannot run."""
        assert self.status() > 0, self.output
        *before, line = self.output.splitlines()
        assert before in ([], ["System check identified no issues (0 silenced)."]), self.output
        assert line.startswith("CommandError: ")
        return line.removeprefix("CommandError: ")


def get(address: str, target: str) -> clients.Answer:
    return clients.request(address, target=target)


# Starting


def test_the_report_says_what_is_served_and_by_what(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        address = running.reported()
        assert get(address, "/view/").body == b"one"
        with closing(clients.connect(address)) as client:
            assert client.call("version") == ["one"]
        versions = {
            "django-socketio": django_socketio.__version__,
            "Django": django.get_version(),
            "gevent": importlib.metadata.version("gevent"),
            "websockets": importlib.metadata.version("websockets"),
            "Python": platform.python_version(),
        }
        for name, version in versions.items():
            assert f"{name} {version}" in running.output
        assert "Settings site_settings" in running.output
        assert "backend django_socketio.backends.memory.MemoryBackend" in running.output
        assert f"Serving on http://{address}/" in running.output
        assert not address.endswith(":0")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("{port}", "127.0.0.1:{port}"),
        ("127.0.0.1:{port}", "127.0.0.1:{port}"),
        ("localhost:{port}", "127.0.0.1:{port}"),
        ("0.0.0.0:{port}", "0.0.0.0:{port}"),
        ("[::1]:{port}", "[::1]:{port}"),
        ("", "127.0.0.1:{port}"),
    ],
)
def test_forms_of_the_address(project: Project, form: str, shown: str) -> None:
    if "::1" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    addrport = [form.format(port=port)] if form else []
    env = {} if form else {"SITE_PORT": str(port)}
    with Running(project, *addrport, "--noreload", env=env) as running:
        address = running.reported()
        assert address in (shown.format(port=port), f"[::1]:{port}")
        with closing(clients.connect(address.replace("0.0.0.0", "127.0.0.1"))) as client:
            assert client.call("version") == ["one"]


def test_the_host_of_the_settings_is_the_ports(project: Project) -> None:
    port = free_port()
    env = {"SITE_HOST": "127.0.0.2"}
    with Running(project, str(port), "--noreload", env=env) as running:
        assert running.reported() == f"127.0.0.2:{port}"


@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_a_port_that_is_taken_is_one_sentence(project: Project, options: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        with Running(project, address, *options) as running:
            assert running.error() == f"{address} is taken by another process."


def test_a_foreign_address_is_one_sentence(project: Project) -> None:
    with Running(project, "192.0.2.1:9000", "--noreload") as running:
        assert running.error() == "192.0.2.1:9000 is no address of this machine."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "x"), "127.0.0.1:80 .* ports below 1024 need privileges"),
        (OSError(errno.EADDRINUSE, "x"), "127.0.0.1:80 is taken by another process"),
        (socket.gaierror(socket.EAI_NONAME, "unknown name"), "127.0.0.1:80 .* unknown name"),
    ],
)
def test_what_keeps_a_server_from_listening(
    monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str
) -> None:
    def listen(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(socket, "create_server", listen)
    with pytest.raises(CommandError, match=f"^{sentence}") as raised:
        call_command("runserver_socketio", "80", "--noreload")
    assert raised.value.returncode != 0


@pytest.mark.parametrize(
    "addrport",
    ["nonsense", "127.0.0.1", "127.0.0.1:", ":9000", "127.0.0.1:65536", "127.0.0.1:http", "::1:80"]
    + ["[::1]", "[::1:80", "a b:80", "-:-", "127.0.0.1:80:80", "127.0.0.1:+80", "80 ", "host:٨٠"],
)
def test_a_bad_address_is_one_sentence(addrport: str) -> None:
    with pytest.raises(CommandError) as raised:
        call_command("runserver_socketio", "--noreload", "--", addrport)
    assert str(raised.value) == f'"{addrport}" is no port and no address:port pair.'


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"SOCKETIO_PORT": "x"}, "SOCKETIO_PORT must be a port number"),
        ({"SOCKETIO_HOST": 5}, "SOCKETIO_HOST must be a string"),
        ({"SOCKETIO_BACKEND": "pigeon://"}, "SOCKETIO_BACKEND: pigeon:// is none of memory://"),
        ({"SOCKETIO_PNG_INTERVAL": 5}, "did you mean SOCKETIO_PING_INTERVAL"),
        ({"ALLOWED_HOSTS": []}, "You must set settings.ALLOWED_HOSTS"),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], sentence: str) -> None:
    with override_settings(**settings), pytest.raises(CommandError, match=sentence):
        call_command("runserver_socketio", "127.0.0.1:0", "--noreload")


@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_no_allowed_hosts_is_one_sentence(project: Project, options: list[str]) -> None:
    project.write("site_settings.py", SETTINGS.replace('["*"]', "[]"))
    with Running(project, "127.0.0.1:0", *options) as running:
        assert running.error() == "You must set settings.ALLOWED_HOSTS if DEBUG is False."
        assert running.status() == 2


def test_a_missing_url_conf_is_told(project: Project) -> None:
    project.write("site_urls.py", "urlpatterns = []")
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        assert running.status() == 1
        last = running.output.splitlines()[-1]
        assert 'CommandError: The URL conf has no Socket.IO: add path("", include(' in last
        assert "Traceback" not in running.output


# How it is started


def serves(running: Running) -> None:
    with closing(clients.connect(running.reported())) as client:
        assert client.call("version") == ["one"]


def test_from_another_directory(project: Project, tmp_path: Path) -> None:
    manage = os.path.relpath(project.folder / "manage.py", tmp_path)
    command = (sys.executable, manage)
    with Running(project, "127.0.0.1:0", "--noreload", command=command, cwd=tmp_path) as running:
        serves(running)


@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_as_a_module(project: Project, options: list[str]) -> None:
    command = (sys.executable, "-m", "django")
    arguments = ("127.0.0.1:0", *options, "--settings=site_settings")
    with Running(project, *arguments, command=command) as running:
        serves(running)


def test_by_a_script_that_may_be_executed(project: Project) -> None:
    manage = project.folder / "manage.py"
    project.write("manage.py", f"#!{sys.executable}{manage.read_text()}")
    manage.chmod(0o755)
    with Running(project, "127.0.0.1:0", "--noreload", command=("./manage.py",)) as running:
        serves(running)


def test_by_a_manage_py_that_patches_itself(tmp_path: Path) -> None:
    first = "from gevent.monkey import patch_all; patch_all(); print('patched once')"
    project = Project(tmp_path / "project", first)
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        serves(running)
        assert running.output.count("patched once") == 1


def test_the_interpreters_options_stay(project: Project) -> None:
    show = "import sys; print('options', sys.warnoptions, sys._xoptions.get('utf8'))\n"
    project.write("chat/views.py", show + VIEWS.format(answer="one"))
    manage = str(project.folder / "manage.py")
    command = (sys.executable, "-X", "utf8", "-W", "error::ResourceWarning", manage)
    with Running(project, "127.0.0.1:0", "--noreload", command=command) as running:
        serves(running)
        get(running.reported(), "/view/")
        assert "options ['error::ResourceWarning'] True" in running.output


def test_what_gevent_has_patched_is_what_handlers_see(project: Project) -> None:
    """`time.sleep()` in a handler holds up its own client only."""
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        address = running.reported()
        with closing(clients.connect(address)) as slow, closing(clients.connect(address)) as other:
            slow.emit("sleep", 1000)
            wait_until(lambda: "sleep" in project.notes)
            assert other.call("version") == ["one"]


# Ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_a_signal_ends_it_cleanly(
    project: Project, number: signal.Signals, options: list[str]
) -> None:
    with Running(project, "127.0.0.1:0", *options) as running:
        address = running.reported()
        websocket = clients.connect(address)
        polling = clients.connect(address, transport="polling")
        assert running.end(number) == 0
        gently = number == signal.SIGTERM and options  # for a developer there is no drain
        assert websocket.connection.wait_for_end().code == (1012 if gently else 1001)
        for client in (websocket, polling):
            client.connection.drop()
        finished = [line for line in project.notes if line.startswith("finish")]
        assert finished == ["finish server shutting down"] * 2
        assert "Traceback" not in running.output
        with pytest.raises(ConnectionRefusedError):
            clients.open_socket(address)


def test_a_poll_that_waits_is_closed_by_a_packet(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        client = clients.connect(running.reported(), transport="polling")
        transport = client.connection.transport
        assert isinstance(transport, clients.Polling)
        transport._polls.request(
            "GET", f"{clients.PATH}?EIO=4&transport=polling&sid={client.connection.sid}"
        )
        running.process.send_signal(signal.SIGTERM)
        assert transport._polls.getresponse().read() == b"1"
        assert running.status() == 0
        transport.drop()


def test_ctrl_c_reaches_all_its_processes(project: Project) -> None:
    """A terminal sends the signal to the whole group."""
    with Running(project, "127.0.0.1:0") as running:
        client = clients.connect(running.reported())
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.status() == 0
        client.connection.wait_for_end()
        client.connection.drop()
        assert project.notes[-1] == "finish server shutting down"
        assert "Traceback" not in running.output


def test_handlers_that_run_may_end(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        client = clients.connect(running.reported())
        client.emit("sleep", 4 * UNIT)
        wait_until(lambda: "sleep" in project.notes)
        assert running.end(signal.SIGTERM) == 0
        client.connection.drop()
    reason = "server shutting down"
    assert project.notes[1:] == ["sleep", "slept", "disconnect", f"finish {reason}"]


def test_requests_that_were_begun_are_answered(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        address = running.reported()
        answer = gevent.spawn(get, address, "/slow/")
        wait_until(lambda: "slow" in project.notes)
        assert running.end(signal.SIGTERM) == 0
        assert answer.get().body == b"one"


def test_a_second_sigterm_has_it_hurry(project: Project) -> None:
    """And says what it has not waited for. One that comes with the first is the first."""
    project.write("site_settings.py", f"{SETTINGS}\nSOCKETIO_DRAIN = 100")
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        hanging, other = (clients.connect(running.reported()) for _ in range(2))
        hanging.emit("sleep", 1000)
        wait_until(lambda: "sleep" in project.notes)
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGTERM)
        assert other.connection.wait_for_end().code == 1012
        with pytest.raises(TimeoutError):
            hanging.event(timeout=1.5)
        started = time.monotonic()
        assert running.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 50
        assert hanging.connection.wait_for_end().code == 1012
        running.said("There was no time for the end of 1 handlers (1 'sleep')")
        for client in (hanging, other):
            client.connection.drop()


def test_a_sigterm_that_nobody_hurries_has_its_time(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        hanging = clients.connect(running.reported())
        hanging.emit("sleep", 1000)
        wait_until(lambda: "sleep" in project.notes)
        started = time.monotonic()
        assert running.end(signal.SIGTERM) == 0
        assert 5 < time.monotonic() - started < 50
        hanging.connection.drop()


def test_a_second_ctrl_c_ends_it_at_once(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        client = clients.connect(running.reported())
        client.emit("sleep", 1000)
        wait_until(lambda: "sleep" in project.notes)
        running.process.send_signal(signal.SIGINT)
        client.connection.wait_for_end()  # the first is under way
        started = time.monotonic()
        assert running.end(signal.SIGINT) == 130
        assert time.monotonic() - started < 40 * UNIT
        client.connection.drop()


# Reloading


@pytest.fixture
def reloading(project: Project) -> Iterator[Running]:
    with Running(project, str(free_port())) as running:
        running.reported()
        yield running


def test_a_change_ends_every_socket_and_serves_the_new_code(
    project: Project, reloading: Running
) -> None:
    address = reloading.reported()
    client = clients.connect(address)
    assert client.call("version") == ["one"]
    project.write("chat/events.py", EVENTS.format(answer="two"))
    client.connection.wait_for_end()
    client.connection.drop()
    assert reloading.reported(times=2) == address
    # The handlers of the old code ended before those of the new one began.
    assert project.notes == ["connect http", "disconnect", "finish server shutting down"]
    with closing(clients.connect(address)) as client:
        assert client.call("version") == ["two"]
    assert reloading.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("module", "source"),
    [("chat/events.py", EVENTS), ("chat/views.py", VIEWS)],
    ids=["in events", "in views"],
)
def test_it_comes_back_after_an_error(
    project: Project, reloading: Running, module: str, source: str
) -> None:
    address = reloading.reported()
    project.write(module, "def broken(:\n")
    reloading.said("SyntaxError")
    reloading.said("tried again after a change")
    assert reloading.process.poll() is None
    project.write(module, source.format(answer="two"))
    assert reloading.reported(times=2) == address
    if module == "chat/events.py":
        with closing(clients.connect(address)) as client:
            assert client.call("version") == ["two"]
    else:
        assert get(address, "/view/").body == b"two"


def test_a_signal_ends_one_that_waits_for_a_change(project: Project, reloading: Running) -> None:
    project.write("chat/events.py", "def broken(:\n")
    reloading.said("tried again after a change")
    assert reloading.end(signal.SIGINT) == 0


def test_without_reloading_a_change_means_nothing(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--noreload") as running:
        address = running.reported()
        with closing(clients.connect(address)) as client:
            project.write("chat/events.py", "def broken(:\n")
            # Longer than the reloader's look at the files takes, once a second.
            with pytest.raises(TimeoutError):
                client.event(timeout=max(1.5, 20 * UNIT))
            assert client.call("version") == ["one"]


# Static files


@pytest.mark.parametrize(
    ("debug", "options", "served"),
    [("1", [], True), ("1", ["--nostatic"], False), ("", ["--insecure"], True)],
)
def test_static_files_are_served(
    project: Project, debug: str, options: list[str], served: bool
) -> None:
    env = {"SITE_DEBUG": debug}
    with Running(project, "127.0.0.1:0", "--noreload", *options, env=env) as running:
        address = running.reported()
        answer = get(address, "/static/chat/page.css")
        assert (answer.body == b"/* the page's style */") is served
        assert (get(address, "/static/django_socketio/socketio.js").status == 200) is served
        for outside in ("/static/../site_settings.py", "/static/%2e%2e/site_settings.py"):
            answer = get(address, outside)
            assert answer.status != 200 and b"SECRET" not in answer.body


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("nostatic", [True, False])
@pytest.mark.parametrize("insecure", [True, False])
@pytest.mark.parametrize("app", [True, False])
def test_static_files_are_served_when_djangos_runserver_does(
    debug: bool, nostatic: bool, insecure: bool, app: bool
) -> None:
    options = {"nostatic": nostatic, "insecure": insecure}
    installed = [name for name in settings.INSTALLED_APPS if app or "staticfiles" not in name]
    with override_settings(DEBUG=debug, INSTALLED_APPS=installed):
        application = runserver_socketio.Command()._wsgi_application(options)
    serves = isinstance(application, StaticFilesHandler)
    assert serves is (app and not nostatic and (debug or insecure))


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the files of a certificate for 127.0.0.1, and of its key."""
    openssl = require("openssl", shutil.which("openssl"))
    folder = tmp_path_factory.mktemp("certificate")
    files = str(folder / "cert.pem"), str(folder / "key.pem")
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    options += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    options += ["-out", files[0], "-keyout", files[1]]
    subprocess.run([openssl, "req", "-x509", *options], check=True, capture_output=True)
    return files


@pytest.mark.parametrize("together", [False, True], ids=["two files", "one file"])
def test_tls(
    project: Project, certificate: tuple[str, str], tmp_path: Path, together: bool
) -> None:
    certfile, keyfile = certificate
    options = ["--certfile", certfile, "--keyfile", keyfile]
    if together:
        both = tmp_path / "both.pem"
        both.write_text("".join(Path(path).read_text() for path in certificate))
        options = ["--certfile", str(both)]
    tls = ssl.create_default_context(cafile=certfile)
    with Running(project, "127.0.0.1:0", "--noreload", *options) as running:
        address = running.reported()
        assert f"Serving on https://{address}/" in running.output
        for transport in ("websocket", "polling"):
            with closing(clients.connect(address, transport=transport, tls=tls)) as client:
                assert client.call("version") == ["one"]
        assert clients.request(address, target="/view/", tls=tls).body == b"one"
        with pytest.raises((OSError, http.client.HTTPException)):
            get(address, "/view/")  # without TLS
        assert running.end(signal.SIGTERM) == 0
        assert project.notes[0] == "connect https"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (lambda cert, key: ["--certfile", "no-such.pem"], "no-such.pem cannot be used"),
        (lambda cert, key: ["--certfile", cert, "--keyfile", "no-key.pem"], "no-key.pem"),
        (lambda cert, key: ["--certfile", __file__], f"{__file__} cannot be used"),
        (lambda cert, key: ["--certfile", cert], "cert.pem cannot be used"),
        (lambda cert, key: ["--certfile", key, "--keyfile", cert], "cert.pem cannot be used"),
        (lambda cert, key: ["--keyfile", key], "--keyfile needs --certfile"),
    ],
    ids=["no certificate", "no key file", "no PEM", "no key in it", "swapped", "a key alone"],
)
def test_a_certificate_that_cannot_be_used_is_one_sentence(
    certificate: tuple[str, str], files: Callable[..., list[str]], sentence: str
) -> None:
    with pytest.raises(CommandError) as raised:
        call_command("runserver_socketio", "127.0.0.1:0", "--noreload", *files(*certificate))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value) and raised.value.returncode != 0


def test_a_missing_certificate_ends_the_command(project: Project) -> None:
    with Running(project, "127.0.0.1:0", "--certfile", "no-such.pem") as running:
        assert running.error().startswith("no-such.pem cannot be used for TLS: ")
