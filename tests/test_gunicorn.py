"""Workers of `gunicorn -k django_socketio.gunicorn.SocketIOWorker`: how they live and end."""

import http.client
import inspect
import json
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gevent
import pytest

from django_socketio.engine.gunicorn import GunicornServer
from django_socketio.gunicorn import Roster, SocketIOWorker
from tests import clients, test_front
from tests.arbiter import (
    Gunicorn,
    Project,
    connected,
    gone,
    kill,
    one_of_each,
    replaced,
)
from tests.clients import PATH, UPGRADE, WebSocket
from tests.engine.clients import Http, chunked, request, text
from tests.engine.conftest import certificate as certificate
from tests.engine.workers import Worker
from tests.services import Redis
from tests.sites import Site
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(400)

__all__ = ["certificate"]

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
LAST = {"Connection": "close"}
REASON = "server shutting down"

Serve = Callable[..., Gunicorn]


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


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts gunicorn with a project and options of its own."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(Gunicorn(*arguments))


def get(server: Gunicorn, target: str = "/view/") -> bytes:
    return clients.request(server.address, target=target).body


# A Django site behind this front, too: what its views return arrives


class GunicornSite(Site):
    def _start(self) -> None:
        super()._start()
        self.server.stop(timeout=1)
        self.server: Any = GunicornServer(("127.0.0.1", 0), self.server.application, Worker())
        self.server.start()


@pytest.fixture
def site() -> Iterator[Site]:
    with GunicornSite(ROOT_URLCONF=test_front.__name__) as site:
        yield site


connect, forget = test_front.connect, test_front.forget


def once_more(module: ModuleType, *without: str) -> None:
    """Have the tests of a module here too, with the fixtures of this one."""
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and name not in without:
            globals()[name.replace("test_", "test_front_", 1)] = test


once_more(
    test_front,
    "test_a_stream_that_fails_is_seen_to_be_cut",
    "test_a_view_takes_no_chunks",
    "test_a_view_that_calls_for_the_end_ends_nothing",
    "test_head_is_the_head_of_a_get_and_no_more",
)


@pytest.mark.parametrize("target", ["/broken/", "/leaving/"])
def test_a_stream_that_fails_is_seen_to_be_cut(
    site: Site, connect: Callable[[], Http], caplog: pytest.LogCaptureFixture, target: str
) -> None:
    client = connect().request("GET", target).request("GET", "/page/")
    assert client.rest().endswith(b"\r\n\r\n4\r\none \r\n")
    assert "a secret" in caplog.text
    test_front.alive(site)


def test_a_view_that_calls_for_the_end_ends_nothing(
    site: Site, connect: Callable[[], Http], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    answer = client.get("/leave/")
    assert (answer.status, answer.headers["connection"]) == (500, "close")
    assert b"secret" not in answer.body
    assert client.gone()
    test_front.alive(site)
    (record,) = [each for each in caplog.records if each.name == "django_socketio.engine.gunicorn"]
    assert record.exc_info is not None and record.exc_info[0] is SystemExit


@pytest.mark.parametrize("target", ["/page/", "/pieces/", "/large/", "/none/"])
def test_head_has_no_body(connect: Callable[[], Http], target: str) -> None:
    client = connect().request("HEAD", target).request("GET", "/page/?number=2", headers=LAST)
    head, next_head, body = client.rest().split(b"\r\n\r\n")
    assert next_head.startswith(b"HTTP/1.1 200 ") and body == b"page 2"


def test_a_view_takes_no_chunks(connect: Callable[[], Http]) -> None:
    """Django reads by Content-Length, and would take the body for empty."""
    head = request("POST", "/form/", headers={"Transfer-Encoding": "chunked"})
    client = connect().send(head + chunked(b"GET /page/ HTTP/1.1\r\n\r\n"))
    assert client.answer().status == 411
    assert client.request("GET", "/page/", headers=LAST).rest().endswith(b"\r\n\r\npage ")


# Workers


@TRANSPORTS
def test_echo_and_broadcast(serve: Serve, shared: Project, transport: str) -> None:
    server = serve(shared, "-w", "2")
    with one_of_each(server.address, server.workers, transport=transport) as found:
        here, there = found.values()
        assert here.call("echo", {"binary": b"\0\xff"}) == [{"binary": b"\0\xff"}]
        here.emit("tell", "hello")
        assert there.event() == ["message", "hello"]
        there.emit("tell", "and back")
        assert here.event() == ["message", "and back"]


def test_any_worker_will_do_for_a_client(serve: Serve, shared: Project) -> None:
    """A request for another worker's session goes there, and so does an upgrade."""
    server = serve(shared, "-w", "2")
    for _ in range(10):
        with connected(server.address, transport="polling") as client:
            for number in range(3):
                assert client.call("echo", number) == [number]
                client.connection.transport.drop()  # the next requests have new connections
            query = {"sid": client.connection.sid}
            client.connection.upgrade(WebSocket(server.address, query=query))
            assert client.call("echo", "upgraded") == ["upgraded"]


def test_a_message_in_the_segment_of_the_handshake(serve: Serve, project: Project) -> None:
    server = serve(project)
    with closing(Http(("127.0.0.1", server.port))) as client:
        target = f"{PATH}?EIO=4&transport=websocket"
        client.send(request("GET", target, headers=dict(UPGRADE)) + text("40") + text('420["pid"]'))
        assert b"430[" in client._read_until(b"430[")


@pytest.mark.parametrize("size", [0, 100_000, 5_000_000])
def test_a_post_of_any_size(serve: Serve, project: Project, size: int) -> None:
    server = serve(project, "--limit-request-line", "100")
    body = bytes(size)
    answer = clients.request(server.address, "POST", "/upload/", body=body)
    expected = 200 if size <= 2_500_000 else 400  # DATA_UPLOAD_MAX_MEMORY_SIZE
    assert answer.status == expected
    if expected == 200:
        assert answer.body == str(size).encode()


def test_tls(serve: Serve, project: Project, certificate: dict[str, str]) -> None:
    files = ("--certfile", certificate["certfile"], "--keyfile", certificate["keyfile"])
    tls = ssl.create_default_context(cafile=certificate["certfile"])
    tls.check_hostname = False
    server = serve(project, *files)
    for transport in ("websocket", "polling"):
        with connected(server.address, transport=transport, tls=tls) as client:
            assert client.call("echo", "x" * 100_000) == ["x" * 100_000]
    assert project.notes[0] == "connect https"
    assert server.end() == 0


def test_a_unix_socket(serve: Serve, project: Project) -> None:
    path = str(Path(tempfile.mkdtemp(prefix="django-socketio-")) / "socket")
    server = serve(project, "-b", f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(clients.TIMEOUT)
        sock.connect(path)
        sock.sendall(request("GET", "/view/", headers=LAST))
        assert sock.makefile("rb").read().endswith(b"one\r\n0\r\n\r\n")
        assert server.end() == 0
    assert not os.path.exists(path)
    os.rmdir(os.path.dirname(path))


# Before the fork

LOOK = """
import json, sys
def pre_fork(server, worker):
    from gevent._hub_local import get_hub_if_exists
    from gevent.monkey import saved
    ours = [name for name in sys.modules if name.split(".")[0] in ("django", "django_socketio")]
    project = [name for name in sys.modules if name.split(".")[0] in ("chat", "site_settings")]
    with open({path!r}, "w") as file:
        json.dump([ours, project, get_hub_if_exists() is not None, sorted(saved)], file)
"""


def test_the_arbiter_has_no_hub_and_no_project(
    serve: Serve, project: Project, tmp_path: Path
) -> None:
    look, seen = tmp_path / "look.py", tmp_path / "seen.json"
    look.write_text(LOOK.format(path=str(seen)))
    server = serve(project, "-c", str(look))
    assert get(server) == b"one"
    ours, project_modules, hub, patched = json.loads(seen.read_text())
    assert sorted(ours) == ["django_socketio", "django_socketio.gunicorn"]
    assert (project_modules, hub, patched) == ([], False, [])


def test_what_gevent_has_patched_is_what_views_see(serve: Serve, project: Project) -> None:
    """`time.sleep()` in a view, or a handler, holds up its own client only."""
    server = serve(project, "--graceful-timeout", "3")
    slow = [gevent.spawn(get, server, "/slow/") for _ in range(5)]
    with connected(server.address) as sleeper, connected(server.address) as other:
        sleeper.emit("sleep", 1000)
        wait_until(lambda: project.notes.count("slow") == 5 and "sleep" in project.notes)
        assert other.call("version") == ["one"]
        assert [each.get() for each in slow] == [b"one"] * 5


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["-w", "2"], 3, "SOCKETIO_BACKEND is MemoryBackend, which carries messages inside one"),
        (["--preload"], 1, "SocketIOWorker cannot serve with preload_app"),
        (["--protocol", "uwsgi"], 1, "SocketIOWorker speaks HTTP only"),
    ],
)
def test_what_cannot_work_is_refused(
    project: Project, options: list[str], status: int, sentence: str
) -> None:
    server = Gunicorn(project, *options)
    ended = subprocess.run(server.command, env=server.env, capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stderr.count(sentence) == 1
    assert "Traceback" not in ended.stderr


def test_http_2_is_refused() -> None:
    cfg = SimpleNamespace(preload_app=False, http_protocols=["h2", "h1"], protocol="http")
    with pytest.raises(RuntimeError, match="^SocketIOWorker speaks HTTP/1.1 only"):
        SocketIOWorker.check_config(cfg, None)


def test_a_setting_that_is_wrong_is_told_and_ends_the_arbiter(project: Project) -> None:
    project.write("site_urls.py", "urlpatterns = []")
    server = Gunicorn(project)
    ended = subprocess.run(server.command, env=server.env, capture_output=True, text=True)
    assert ended.returncode == 3
    assert "The URL conf has no Socket.IO: add path" in ended.stderr
    assert "Traceback" not in ended.stderr


# The end


def test_sigterm_ends_everything_cleanly(serve: Serve, shared: Project) -> None:
    """And well before the arbiter would lose its patience."""
    server = serve(shared, "-w", "2", "--graceful-timeout", "60")
    pids = server.workers
    with one_of_each(server.address, pids) as found:
        polling = clients.connect(server.address, transport="polling")
        answer = gevent.spawn(get, server, "/slow/")
        wait_until(lambda: "slow" in shared.notes)
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 20
        assert answer.get() == b"one"
        assert {client.connection.wait_for_end().code for client in found.values()} == {1012}
        polling.connection.drop()
    assert shared.finished.count(REASON) == 3
    assert "Traceback" not in server.output and "timeout" not in server.output.lower()
    gone(pids)


def test_a_poll_that_waits_is_closed_by_a_packet(serve: Serve, project: Project) -> None:
    server = serve(project)
    client = clients.connect(server.address, transport="polling")
    transport = client.connection.transport
    assert isinstance(transport, clients.Polling)
    target = f"{PATH}?EIO=4&transport=polling&sid={client.connection.sid}"
    transport._polls.request("GET", target)
    server.signal(signal.SIGTERM)
    assert transport._polls.getresponse().read() == b"1"
    assert server.wait() == 0
    transport.drop()


def test_a_worker_that_ends_refuses_handshakes(serve: Serve, project: Project) -> None:
    """It runs its last handlers; whoever is connected to it by HTTP is told to go elsewhere."""
    server = serve(project)
    with ExitStack() as stack:
        client = stack.enter_context(connected(server.address))
        kept = [stack.enter_context(closing(http_to(server))) for _ in range(3)]
        for connection in kept:
            connection.request("GET", "/view/")
            connection.getresponse().read()
        client.emit("sleep", 40 * UNIT)
        wait_until(lambda: "sleep" in project.notes)
        server.signal(signal.SIGTERM)
        wait_until(lambda: refuses(server.address))
        for connection, target, status in zip(
            kept,
            [f"{PATH}?EIO=4&transport=polling", f"{PATH}health", "/view/"],
            [503, 503, 200],
            strict=True,
        ):
            connection.request("GET", target)
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Connection")) == (status, "close")
            if target.endswith("polling"):
                assert answer.getheader("Retry-After") == "1"
            elif status == 503:
                assert json.load(answer)["reason"] == "stopping"
        assert client.connection.wait_for_end().code == 1012
        assert server.wait(600 * UNIT) == 0
    assert project.notes[-4:] == ["sleep", "slept", "disconnect", f"finish {REASON}"]


@pytest.mark.parametrize("how", ["sleep", "block"])
def test_a_handler_that_hangs_is_given_up_in_time(serve: Serve, project: Project, how: str) -> None:
    """Before the arbiter kills the worker, and with it those who did not hang."""
    server = serve(project, "--graceful-timeout", "4")
    with connected(server.address) as hanging, connected(server.address):
        hanging.emit(how, 1000)
        wait_until(lambda: "sleep" in project.notes)
        assert server.end() == 0
    assert project.finished == [REASON]
    assert "SIGKILL" not in server.output
    line = f"no time for the end of 1 handlers (1 '{how}'), and for 1 that waited (1 on_finish)"
    assert line in server.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_end_runs_the_handlers_too(
    serve: Serve, project: Project, number: signal.Signals
) -> None:
    server = serve(project, "--graceful-timeout", "60")
    with connected(server.address) as hanging, connected(server.address):
        hanging.emit("sleep", 1000)
        wait_until(lambda: "sleep" in project.notes)
        started = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - started < 20
    assert project.finished == [REASON]
    assert "Traceback" not in server.output


def test_workers_do_not_outlive_their_arbiter(serve: Serve, shared: Project) -> None:
    server = serve(shared, "-w", "2")
    pids = server.workers
    with one_of_each(server.address, pids) as found:
        kill(server.pid)
        for client in found.values():
            client.connection.wait_for_end()
    gone(pids)
    assert shared.finished.count(REASON) == 2


# Other workers in their places


def test_sighup_has_new_workers_with_new_code(serve: Serve, shared: Project) -> None:
    """And somebody answers all the time."""
    server = serve(shared, "-w", "2")
    before = server.workers
    answers: list[bytes] = []

    def ask() -> None:
        while b"two" not in answers or len(answers) < 20:
            answers.append(get(server))

    with one_of_each(server.address, before) as found:
        shared.answer("two")
        asking = gevent.spawn(ask)
        server.signal(signal.SIGHUP)
        for client in found.values():
            assert client.connection.wait_for_end().code == 1012
        asking.get()
    gone(before)
    assert set(answers) == {b"one", b"two"} or set(answers) == {b"two"}
    with one_of_each(server.address, server.workers) as found:
        assert [client.call("version") for client in found.values()] == [["two"]] * 2
    assert shared.finished.count(REASON) == 2
    assert server.end() == 0
    assert "Traceback" not in server.output


def test_a_terminal_that_hangs_up_tells_the_arbiter_only(serve: Serve, shared: Project) -> None:
    """The signal goes to the whole group; a worker has it from the arbiter."""
    server = serve(shared, "-w", "2")
    before = server.workers
    with one_of_each(server.address, before) as found:
        for pid in before:
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGINT)
        for client in found.values():
            assert client.call("version") == ["one"]
    assert server.workers == before


def test_a_worker_that_is_killed_is_replaced(serve: Serve, shared: Project) -> None:
    server = serve(shared, "-w", "2")
    before = server.workers
    with one_of_each(server.address, before) as found:
        victim, other = found
        kill(victim)
        found[victim].connection.wait_for_end()
        assert found[other].call("version") == ["one"]
        after = replaced(server.pid, before, 2)
        assert other in after and victim not in after
        with one_of_each(server.address, after) as found_then:
            found[other].emit("tell", "hello")
            assert all(client.event() == ["message", "hello"] for client in found_then.values())
    assert server.end() == 0


@pytest.mark.parametrize("where", ["handler", "view"])
def test_a_worker_that_hangs_is_named_and_replaced(
    serve: Serve, shared: Project, where: str
) -> None:
    """A busy loop stops the hub, and so the heart; the others go on."""
    server = serve(shared, "-w", "2", "-t", "2")
    before = server.workers
    with one_of_each(server.address, before) as found:
        if where == "handler":
            victim, other = found
            found[victim].emit("spin")
        else:
            with closing(http_to(server)) as spinning:
                spinning.request("GET", "/spin/")
                gevent.sleep(UNIT)
            wait_until(lambda: "WORKER TIMEOUT" in server.output, 1200 * UNIT)
            (victim,) = [pid for pid in before if f"WORKER TIMEOUT (pid:{pid})" in server.output]
            (other,) = before - {victim}
        for number in range(5):
            assert found[other].call("echo", number) == [number]
        after = replaced(server.pid, before, 2)
        assert other in after and victim not in after
        assert found[other].call("version") == ["one"]
        found[victim].connection.wait_for_end()
    assert f"chat/{'events' if where == 'handler' else 'views'}.py" in server.output
    assert "in spin" in server.output
    # What hung was ended, and then the worker as any other: its clients were told.
    assert f"(pid:{victim}) exited with code 1" in server.output
    assert REASON in shared.finished
    assert server.end() == 0


def test_a_worker_that_hangs_for_good_is_killed(serve: Serve, project: Project) -> None:
    project.write("chat/views.py", f"{STUBBORN}\nview = slow = pid = upload = spin")
    server = serve(project, "-t", "2")
    (before,) = server.workers
    with closing(http_to(server)) as spinning:
        spinning.request("GET", "/spin/")
        after = replaced(server.pid, {before}, 1)
    assert before not in after
    assert "was sent SIGKILL" in server.output


STUBBORN = """
def spin(request):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""


def test_max_requests(serve: Serve, shared: Project) -> None:
    """A worker of that age ends as all do, and its clients find another."""
    server = serve(shared, "-w", "2", "--max-requests", "300")
    before = server.workers
    with one_of_each(server.address, before) as found:
        while server.workers & before:
            assert get(server) == b"one"
        for client in found.values():
            assert client.connection.wait_for_end().code == 1012
    assert shared.finished.count(REASON) == 2
    with one_of_each(server.address, replaced(server.pid, before, 2)) as found:
        assert len(found) == 2
    assert "Autorestarting" in server.output
    assert server.end() == 0


def test_more_and_fewer_workers(serve: Serve, shared: Project) -> None:
    server = serve(shared, "-w", "1")
    before = server.workers
    server.signal(signal.SIGTTIN)
    more = replaced(server.pid, before, 2)
    with one_of_each(server.address, more) as found:
        server.signal(signal.SIGTTOU)
        wait_until(lambda: len(server.workers) == 1, 600 * UNIT)
        (gone_one,) = more - server.workers
        assert found[gone_one].connection.wait_for_end().code == 1012
        (other,) = server.workers
        assert found[other].call("version") == ["one"]


def test_a_slow_head_costs_nobody_else(serve: Serve, project: Project) -> None:
    """Hundreds that never say what they want, and one that does."""
    server = serve(project, "--worker-connections", "10")
    with ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(clients.open_socket(server.address))
            sock.sendall(b"GET /view/ HTTP/1.1\r\nHo")
        assert get(server) == b"one"
        with connected(server.address) as client:
            assert client.call("version") == ["one"]


def refuses(address: str) -> bool:
    try:
        clients.open_socket(address).close()
    except ConnectionRefusedError:
        return True
    return False


def http_to(server: Gunicorn) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.address, timeout=clients.TIMEOUT)


# Who serves, in memory that all share


def test_a_worker_waits_for_younger_ones_that_begin() -> None:
    roster = Roster()
    assert not roster.awaits_younger(1)
    for age in (1, 2, 3):
        roster.enlist(age)
    assert roster.awaits_younger(1) and roster.awaits_younger(2)
    assert not roster.awaits_younger(3)
    roster.begin(3)
    roster.serve(3)
    assert roster.awaits_younger(1) and not roster.awaits_younger(2)
    roster.begin(2)
    assert roster.awaits_younger(1)
    roster.serve(2)
    assert not roster.awaits_younger(1)


def test_a_worker_does_not_wait_for_the_dead() -> None:
    roster = Roster()
    roster.enlist(2)
    child = os.fork()
    if not child:
        roster.begin(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert not roster.awaits_younger(1)


def test_the_places_of_old_workers_are_used_again() -> None:
    roster = Roster()
    for age in range(1, 2001):
        roster.enlist(age)
        assert age == 1 or roster.awaits_younger(age - 1)
        roster.begin(age)
        roster.serve(age)
        assert not roster.awaits_younger(max(1, age - 100))


def test_old_workers_serve_until_new_ones_do(serve: Serve, project: Project) -> None:
    """Those may take a while, or come to nothing."""
    server = serve(project, "-w", "1")
    (before,) = server.workers
    settings = (project.folder / "site_settings.py").read_text()
    project.write("slow_start.py", "import time\ntime.sleep(3)\n")
    project.write("site_settings.py", f"import slow_start\n{settings}")
    with connected(server.address) as client:
        server.signal(signal.SIGHUP)
        started = time.monotonic()
        while before in server.workers and time.monotonic() - started < 2.5:
            assert client.call("version") == ["one"]
            assert get(server) == b"one"
            gevent.sleep(UNIT)
        assert client.connection.wait_for_end().code == 1012
    gone({before})
    assert get(server) == b"one"
    assert server.end() == 0
