"""File descriptors, and what there is of memory: a process that has little goes on."""

import http.client
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import gevent
import pytest

from django_socketio import descriptors
from tests import clients
from tests.support import ROOT, UNIT, Server, wait_until

pytestmark = pytest.mark.timeout(300)

SETTINGS = """
SECRET_KEY = "only for the tests"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "{name}_urls"
INSTALLED_APPS = ["django_socketio", "{name}_app"]
SOCKETIO_MESSAGE_LOG_FORMAT = None
SOCKETIO_CONNECT_TIMEOUT = 3600
SOCKETIO_MAX_HEAD = 4096
SOCKETIO_HEAD_TIMEOUT = {timeout}
"""
URLS = """
from django.http import HttpResponse
from django.urls import include, path

def memory(request):
    raise MemoryError

def large(request):
    return HttpResponse(bytes(int(request.GET["size"])))

urlpatterns = [
    path("", include("django_socketio.urls")), path("memory/", memory), path("large/", large)
]
"""
EVENTS = """
import resource
from django_socketio import runtime
from django_socketio.events import on_event

@on_event("fence")
def fence(request, socket, context):
    return ()

@on_event("allocate")
def allocate(request, socket, context, size):
    return len(bytes(size))

@on_event("counters")
def counters(request, socket, context):
    return dict(runtime.get_dispatcher().engine.counters)

@on_event("limit")
def limit(request, socket, context, megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
"""


# How many there are


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """Return a function that pretends that these are the limits, and returns what is set."""

    def pretend(soft: int, hard: int, error: Exception | None = None) -> list[tuple[int, int]]:
        wanted: list[tuple[int, int]] = []

        def setrlimit(which: int, values: tuple[int, int]) -> None:
            wanted.append(values)
            if error is not None:
                raise error

        monkeypatch.setattr(descriptors, "getrlimit", lambda which: (soft, hard))
        monkeypatch.setattr(descriptors, "setrlimit", setrlimit)
        return wanted

    return pretend


INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (1024, 1_048_576, [(21_024, 1_048_576)], 20_000),
        (1024, INFINITY, [(21_024, INFINITY)], 20_000),
        (1024, 1_073_741_816, [(21_024, 1_073_741_816)], 20_000),  # never all of that
        (1024, 4096, [(4096, 4096)], 3072),
        (65_536, 65_536, [], 20_000),
        (INFINITY, INFINITY, [], 20_000),
        (1024, 1024, [], 768),
        (256, 256, [], 192),
        (21_023, 21_023, [], 19_999),
    ],
)
def test_the_limit_is_raised_as_far_as_is_needed(
    limits: Callable[..., list[tuple[int, int]]],
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    raised: list[tuple[int, int]],
    room: int,
) -> None:
    wanted = limits(soft, hard)
    assert descriptors.make_room(20_000) == room
    assert wanted == raised
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (room < 20_000)
    if lines:
        assert "SOCKETIO_MAX_CONNECTIONS = 20000" in lines[0] and f"takes {room}" in lines[0]


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), PermissionError()])
def test_where_it_cannot_be_raised_there_is_what_there_is(
    limits: Callable[..., Any], error: Exception
) -> None:
    limits(1024, 1_048_576, error)
    assert descriptors.make_room(20_000) == 768
    assert descriptors.make_room(500) == 500


# A server with few of them


@pytest.fixture(params=["pywsgi", "gunicorn"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Limited"]:
    name = f"limited_{os.getpid()}"
    (tmp_path / f"{name}_settings.py").write_text(SETTINGS.format(name=name, timeout=100 * UNIT))
    (tmp_path / f"{name}_urls.py").write_text(URLS)
    (tmp_path / f"{name}_app").mkdir()
    (tmp_path / f"{name}_app" / "__init__.py").touch()
    (tmp_path / f"{name}_app" / "events.py").write_text(EVENTS)
    workers = ["--workers", "1"] if request.param == "gunicorn" else []
    env = {
        "DJANGO_SETTINGS_MODULE": f"{name}_settings",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    with Limited(workers, env) as server:
        yield server


class Limited(Server):
    """A server that may open 256 files, which it cannot raise."""

    def __init__(self, workers: list[str], env: dict[str, str]) -> None:
        super().__init__("unused", env=env)
        self.command = [
            *("prlimit", "--nofile=256:256", sys.executable, "-m", "django"),
            *("runserver_socketio", self.address, "--noreload", *workers),
        ]
        self.forked = bool(workers)
        self.clients = ExitStack()

    def stop(self, grace: float = 400 * UNIT) -> None:
        self.clients.close()
        super().stop(grace)

    @property
    def worker(self) -> int:
        """The process that serves."""
        if not self.forked:
            return self.pid
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0])

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.worker}/fd"))

    @property
    def cpu(self) -> float:
        """Seconds of CPU time of the process that serves."""
        fields = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def connect(self, transport: str = "websocket") -> clients.Client:
        kind = clients.TRANSPORTS[transport]
        return self.clients.enter_context(clients.Connection(kind(self.address))).connect()


@contextmanager
def crowd(address: str, number: int) -> Iterator[list[Any]]:
    """Have so many connections that ask to be upgraded; yield their answers' first lines."""
    with ExitStack() as stack:
        socks = []
        for _ in range(number):
            sock = stack.enter_context(clients.open_socket(address))
            sock.sendall(HANDSHAKE)
            socks.append(sock)
        yield socks


HANDSHAKE = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def status(sock: Any) -> int:
    sock.settimeout(clients.TIMEOUT)
    return int(sock.recv(65536).split()[1])


def test_more_connections_than_descriptors(served: Limited) -> None:
    """Row 19 of the faults: what cannot be taken is refused, and then all is well again."""
    good = served.connect()
    base = served.descriptors
    with crowd(served.address, 400) as socks:
        answers = [status(sock) for sock in socks]
        assert set(answers) == {101, 503}
        assert answers.count(101) == 191  # and the good one
        assert good.call("fence") == []
        before = served.cpu
        gevent.sleep(20 * UNIT)
        assert served.cpu - before < 5 * UNIT
    wait_until(lambda: served.descriptors <= base, what="the descriptors")
    other = served.connect()
    assert other.call("fence") == good.call("fence") == []
    (counters,) = other.call("counters")
    assert counters["over limit: MAX_CONNECTIONS"] == answers.count(503)
    assert "so it takes 192 connections" in served.output


def test_no_descriptors_at_all(served: Limited) -> None:
    """Other requests have them, which no limit of sessions counts."""
    good = served.connect()
    base = served.descriptors
    with ExitStack() as stack:
        socks = [stack.enter_context(clients.open_socket(served.address)) for _ in range(400)]
        for sock in socks:
            sock.sendall(b"GET /nothing HTTP/1.1\r\n")
        wait_until(lambda: "Nothing is accepted" in served.output, what="the last of them")
        assert good.call("fence") == []
        before, lines = served.cpu, served.output.count("Nothing is accepted")
        gevent.sleep(20 * UNIT)
        assert served.cpu - before < 5 * UNIT
        assert served.output.count("Nothing is accepted") - lines <= 20 * UNIT / 0.25 + 2
        assert good.call("fence") == []
    wait_until(lambda: served.descriptors <= base, what="the descriptors")
    other = served.connect("polling")
    assert other.call("fence") == []
    (counters,) = other.call("counters")
    assert counters["over limit: descriptors"] >= 1
    assert "Traceback" not in served.output


def test_the_front_knows_its_settings(served: Limited) -> None:
    """Heads of 4096 bytes, whichever parser reads them."""
    for size, expected in ((3900, 404), (4100, 431)):
        with clients.open_socket(served.address) as sock:
            head = b"GET /nothing HTTP/1.1\r\nHost: x\r\nX-Padding: "
            sock.sendall(head + b"x" * (size - len(head)) + b"\r\n\r\n")
            assert status(sock) == expected
    client = served.connect()
    (counters,) = client.call("counters")
    assert counters["over limit: MAX_HEAD"] == 1


# A server with little memory


def get(server: Server, target: str) -> int:
    connection = http.client.HTTPConnection(server.address, timeout=clients.TIMEOUT)
    try:
        connection.request("GET", target)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_request_and_a_handler_that_find_no_memory(served: Limited) -> None:
    """Row 18 of the faults: that of one is not the end of all."""
    good = served.connect()
    assert get(served, "/memory/") == 500
    good.call("limit", 256)  # the C library takes 64 of it for a second attempt
    client = served.connect()
    client.request("allocate", 2**30)  # fails, as any handler may
    assert client.call("fence") == []
    assert get(served, f"/large/?size={2**30}") == 500
    assert client.call("allocate", 1000) == [1000]
    assert good.call("fence") == []
    served.signal(signal.SIGTERM)
    assert served.wait() == 0


def test_attacks_where_memory_is_short(served: Limited) -> None:
    """Row 18 again: what hostile clients have us keep fits into little, for many of them."""
    good = served.connect()
    good.call("limit", 128)
    attacks = [attack for attack in ATTACKS for _ in range(10)]
    greenlets = [gevent.spawn(run, served, attack) for attack in attacks]
    try:
        while not all(greenlet.ready() for greenlet in greenlets):
            assert good.call("fence") == []
            gevent.sleep(UNIT)
    finally:
        gevent.killall(greenlets)
    assert [greenlet.exception for greenlet in greenlets] == [None] * len(greenlets)
    assert good.call("fence") == []
    assert served.connect("polling").call("fence") == []
    assert "MemoryError" not in served.output


def run(server: Limited, attack: Callable[[Any], Iterator[bytes]]) -> None:
    """Send what the attack says until the server has had enough, or there is no more."""
    with clients.open_socket(server.address) as sock:
        sock.sendall(HANDSHAKE)
        sock.settimeout(20 * UNIT)
        with suppress(OSError):
            for data in attack(sock):
                sock.sendall(data)
                gevent.sleep(0)


def masked(head: bytes, data: bytes) -> bytes:
    """Return a frame whose mask changes nothing."""
    size = len(data)
    if size < 126:
        length = bytes([0x80 | size])
    else:
        length = b"\xff" + size.to_bytes(8)
    return head + length + bytes(4) + data


def fragments(sock: Any) -> Iterator[bytes]:
    yield masked(b"\x01", b"4")
    for _ in range(100):
        yield masked(b"\x00", b"") * 10_000


def large_fragments(sock: Any) -> Iterator[bytes]:
    yield masked(b"\x02", b"x")
    for _ in range(1000):
        yield masked(b"\x00", b"x" * 100_000)


def announced(sock: Any) -> Iterator[bytes]:
    yield b"\x82\xff" + (2**63 - 1).to_bytes(8) + bytes(4)
    for _ in range(1000):
        yield b"x" * 100_000


def attachments(sock: Any) -> Iterator[bytes]:
    yield masked(b"\x81", b"40")
    places = ",".join(f'{{"_placeholder":true,"num":{n}}}' for n in range(10))
    yield masked(b"\x81", f'4510-["message",{places}]'.encode())
    for _ in range(10):
        yield masked(b"\x82", b"x" * 900_000)


def pings(sock: Any) -> Iterator[bytes]:
    for _ in range(100):
        yield masked(b"\x89", b"x") * 10_000


def pongs(sock: Any) -> Iterator[bytes]:
    for _ in range(100):
        yield masked(b"\x81", b"3") * 10_000


def events(sock: Any) -> Iterator[bytes]:
    yield masked(b"\x81", b"40")
    for _ in range(100):
        yield masked(b"\x81", b'42["nobody hears this"]') * 1000


def brackets(sock: Any) -> Iterator[bytes]:
    yield masked(b"\x81", b"40")
    for _ in range(3):
        yield masked(b"\x81", b'42["x",' + b"[" * 400_000 + b"]" * 400_000 + b"]")


ATTACKS = [
    fragments,
    large_fragments,
    announced,
    attachments,
    pings,
    pongs,
    events,
    brackets,
]
