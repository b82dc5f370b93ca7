"""
Many clients that take their time, on both fronts: each is closed at its deadline.

Meanwhile a good client is served, and afterwards nothing is left of the others.
"""

import itertools
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import gevent
import pytest

from django_socketio.engine import pywsgi
from tests.support import UNIT, wait_until

from . import served as single, workers
from .clients import PATH, Answer, Http, WebSocket, request
from .resources import KEPT_GREENLETS, Resources
from .served import Served, echo, lanes

AT_ONCE = 1000
PATIENCE = 8 * UNIT
"""Every deadline of the fronts and of the engine."""

POST = request("POST", "/page", headers={"Content-Length": "100000"})
CHUNKED = request("POST", "/page", headers={"Transfer-Encoding": "chunked"})
LARGE = b"x" * 8_000_000


@pytest.fixture(params=[single.Served, workers.Served], ids=["pywsgi", "gunicorn"])
def serve(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Served]]:
    """Return a function that serves on either front, with short deadlines."""
    for name in ("IDLE_TIMEOUT", "BODY_TIMEOUT", "SEND_TIMEOUT"):
        monkeypatch.setattr(pywsgi, name, PATIENCE)

    def start(**options: object) -> Served:
        options = {"ping_timeout": PATIENCE, "upgrade_timeout": PATIENCE, **options}
        served: Served = stack.enter_context(request.param(**options))
        served.server.keepalive = served.server.head_timeout = PATIENCE
        served.app.answer = echo
        serving = served.server.application

        def answer(environ, start_response):  # type: ignore[no-untyped-def]
            if environ["PATH_INFO"] != "/large":
                return serving(environ, start_response)
            start_response("200 OK", [("Content-Length", str(len(LARGE)))])
            return [LARGE]

        served.server.application = answer
        return served

    with ExitStack() as stack:
        yield start


class GoodClient:
    """Asks, polls and sends events without a pause, and keeps how long each took."""

    def __init__(self, served: Served) -> None:
        self._address, self._context = served.address, served.context
        self._target = f"{PATH}polling&sid="
        answer = self._ask("GET", f"{PATH}polling")
        self._target += answer.body.split(b'"')[3].decode()
        self._websocket = served.websocket()
        self.times: list[float] = []
        self.connections = 1  # that the front has in its hands
        self._stopped = False
        self._greenlet = gevent.spawn(self._run)

    def _ask(self, method: str, target: str, body: bytes | None = None) -> Answer:
        """Ask over a new connection: one that is kept a busy machine may keep for too long."""
        client = Http(self._address, context=self._context)
        try:
            return client.request(method, target, body).answer()
        finally:
            client.close()

    def _run(self) -> None:
        for number in itertools.count():
            if self._stopped:
                return
            began = time.monotonic()
            assert self._ask("GET", "/page").status == 200
            self._websocket.send(f"4{number}")
            assert self._websocket.receive() == f"4{number}"
            assert self._ask("POST", self._target, f"4{number}".encode()).body == b"ok"
            assert self._ask("GET", self._target).packets == [f"4{number}"]
            self.times.append(time.monotonic() - began)
            gevent.sleep(UNIT / 10)

    def check(self) -> None:
        """Check that it has been served all the time, and is."""
        if self._greenlet.dead:
            self._greenlet.get()
        rounds = len(self.times)
        wait_until(lambda: len(self.times) > rounds + 1 or self._greenlet.dead, what="two rounds")

    def stop(self) -> None:
        self.check()
        self._stopped = True
        self._greenlet.get()
        self._ask("POST", self._target, b"1")
        self._ask("GET", self._target)
        self._websocket.close()

    @property
    def p99(self) -> float:
        return sorted(self.times)[int(len(self.times) * 0.99)]


@dataclass(frozen=True)
class Kind:
    """What a slow client says at first, and what now and then; how it reads, and its number."""

    start: bytes = b""
    drip: bytes = b""
    answers: int = 0
    half_closed: bool = False
    receive_buffer: int | None = None
    at_once: int = AT_ONCE

    def begin(self, served: Served) -> Http:
        client = Http(served.address, receive_buffer=self.receive_buffer)
        client.send(self.start)
        for _ in range(self.answers):
            assert client.answer().status == 200
        if self.half_closed:
            client.sock.shutdown(socket.SHUT_WR)
        return client


KINDS = {
    "nothing": Kind(),
    "a head, byte by byte": Kind(b"GET /page HTTP/1.1\r\nX: ", b"x"),
    "the lines of a head": Kind(b"GET /page HTTP/1.1\r\n", b"X: y\r\n"),
    "empty lines": Kind(b"", b"\r\n"),
    "half a head": Kind(b"GET /page HT"),
    "half a head, and half closed": Kind(b"GET /page HT", half_closed=True),
    "a body, byte by byte": Kind(POST, b"x"),
    "half a body": Kind(POST + b"x" * 1000),
    "half a body, and half closed": Kind(POST + b"x" * 1000, half_closed=True),
    "a body that nobody reads": Kind(POST.replace(b"/page", b"/unread"), b"x", answers=1),
    "a chunk, byte by byte": Kind(CHUNKED + b"fffff\r\n", b"x"),
    "small chunks": Kind(CHUNKED, b"1\r\nx\r\n"),
    "an extension without an end": Kind(CHUNKED + b"1;", b"x"),
    "a trailer without an end": Kind(CHUNKED + b"0\r\nX: ", b"x"),
    "trailers without an end": Kind(CHUNKED + b"0\r\n", b"X: y\r\n"),
    "nothing more": Kind(request("GET", "/page"), answers=1),
    "the next head, byte by byte": Kind(request("GET", "/page") + b"G", b"E", answers=1),
    # What the kernel takes of an answer is a few megabytes each.
    "an answer that is never read": Kind(
        request("GET", "/large"), receive_buffer=4096, at_once=AT_ONCE // 10
    ),
}


class Slow:
    """Clients of one kind, all at once."""

    def __init__(self, served: Served, kind: Kind) -> None:
        self._kind = kind
        self.clients = [kind.begin(served) for _ in range(kind.at_once)]
        self._greenlet = gevent.spawn(self._drip)

    def _drip(self) -> None:
        while self._kind.drip:
            gevent.sleep(PATIENCE / 5)
            for client in self.clients:
                with suppress(OSError):
                    client.sock.sendall(self._kind.drip)

    def close(self) -> None:
        self._greenlet.kill()
        for client in self.clients:
            client.close()


@pytest.mark.timeout(4000 * UNIT)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_slow_clients(serve: Callable[..., Served], kind: Kind, record_property: object) -> None:
    served = serve()
    before = Resources.now()
    good = GoodClient(served)
    slow = Slow(served, kind)
    wait_until(lambda: good.times, what="a first round of the good client")
    wait_until(
        lambda: served.server.connections <= good.connections, timeout=20 * PATIENCE, what="the end"
    )
    good.check()
    for client in slow.clients:
        if kind.receive_buffer is None:  # else there is much to read first
            gone(client)
    slow.close()
    good.stop()
    record_property("p99", good.p99)  # type: ignore[operator]
    check_resources(served, before)


def gone(client: Http) -> None:
    """Check that the server has closed, whatever it has said before."""
    client.sock.settimeout(100 * UNIT)
    with suppress(ConnectionError):
        while client.sock.recv(1_000_000):
            pass


def check_resources(served: Served, before: Resources) -> None:
    wait_until(lambda: not served.engine.sessions, what="the end of all sessions")
    wait_until(lambda: not served.server.connections, what="the end of all connections")
    wait_until(lambda: not lanes(served), what="the end of all deadlines")
    # Of a connection that has ended, the greenlet may still have its last step before it.
    wait_until(lambda: _excess(before, Resources.now()) == (0, 0, 0), what="all resources")


def _excess(before: Resources, after: Resources) -> tuple[int, int, int]:
    """Return how many descriptors, greenlets and watchers there are too many."""
    return (
        max(after.descriptors - before.descriptors, 0),
        max(after.greenlets - before.greenlets - KEPT_GREENLETS, 0),
        max(after.watchers - before.watchers - 1, 0),  # a timer of somebody else's
    )


# Slow in the protocol


def never_polls(served: Served) -> list[Http]:
    client = Http(served.address)
    assert client.get(f"{PATH}polling").packets
    return [client]


def never_pongs(served: Served) -> list[Http]:
    return [WebSocket(served.address).http]


def polls_and_never_pongs(served: Served) -> list[Http]:
    client = Http(served.address)
    sid = client.get(f"{PATH}polling").body.split(b'"')[3].decode()
    return [client.request("GET", f"{PATH}polling&sid={sid}")]


def _upgrade(served: Served) -> tuple[Http, WebSocket]:
    client = Http(served.address)
    sid = client.get(f"{PATH}polling").body.split(b'"')[3].decode()
    return client, WebSocket(served.address, sid=sid)


def never_probes(served: Served) -> list[Http]:
    polling, websocket = _upgrade(served)
    return [polling, websocket.http]


def never_upgrades(served: Served) -> list[Http]:
    polling, websocket = _upgrade(served)
    websocket.send("2probe")
    assert websocket.receive() == "3probe"
    return [polling, websocket.http]


def stops_in_a_frame(served: Served) -> list[Http]:
    client = WebSocket(served.address)
    client.send_raw(b"\x81\xfe\x00\xff1234only a part")
    return [client.http]


SLEEPERS = [
    never_polls,
    never_pongs,
    polls_and_never_pongs,
    never_probes,
    never_upgrades,
    stops_in_a_frame,
]


@pytest.mark.timeout(4000 * UNIT)
@pytest.mark.parametrize("begin", SLEEPERS)
def test_sleepers(serve: Callable[..., Served], begin: Callable[[Served], list[Http]]) -> None:
    """Those who have a session and do nothing with it end with the heartbeat, or the upgrade."""
    served = serve(ping_interval=4 * PATIENCE, upgrade_timeout=4 * PATIENCE)
    before = Resources.now()
    clients = [client for _ in range(AT_ONCE // 2) for client in begin(served)]
    good = served.http()
    while served.engine.sessions or served.server.connections > 1:
        assert good.get("/page").status == 200
        gevent.sleep(UNIT)
    assert served.app.reasons == ["ping timeout"] * (AT_ONCE // 2)
    for client in clients:
        gone(client)
        client.close()
    good.close()
    check_resources(served, before)


# Slow under TLS


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a part"])
@pytest.mark.parametrize("drip", [b"", b"\x00"], ids=["", "byte by byte"])
def test_a_tls_handshake_without_an_end(
    serve: Callable[..., Served], certificate: dict[str, str], hello: bytes, drip: bytes
) -> None:
    served = serve(tls=certificate)
    before = Resources.now()
    good = GoodClient(served)
    slow = Slow(served, Kind(hello, drip, at_once=AT_ONCE // 3))
    for client in slow.clients:
        gone(client)
    slow.close()
    good.stop()
    check_resources(served, before)


@pytest.mark.parametrize("start", [b"", CHUNKED, POST], ids=["head", "chunks", "body"])
def test_a_tls_record_byte_by_byte(
    serve: Callable[..., Served], certificate: dict[str, str], start: bytes
) -> None:
    """Each byte makes a wait of its own, and none of them a byte of the request."""
    served = serve(tls=certificate)
    before = Resources.now()
    clients = [Records(served) for _ in range(AT_ONCE // 10)]
    for client in clients:
        client.send(start)
    drips = [gevent.spawn(client.drip, b"x" * 8000) for client in clients]
    wait_until(lambda: not served.server.connections, timeout=20 * PATIENCE, what="the end")
    gevent.joinall(drips)
    assert not any(drip.get() for drip in drips)
    check_resources(served, before)


class Records:
    """TLS whose records are sent by hand."""

    def __init__(self, served: Served) -> None:
        assert served.context is not None
        self._sock = socket.create_connection(served.address, timeout=100 * UNIT)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = served.context.wrap_bio(self._in, self._out)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._sock.sendall(self._out.read())
                self._in.write(self._sock.recv(65536))
            else:
                break

    def send(self, data: bytes) -> None:
        self._tls.write(data)
        self._sock.sendall(self._out.read())

    def drip(self, data: bytes) -> bool:
        """Send it byte by byte, and close; tell whether all could be sent."""
        self._tls.write(data)
        with self._sock, suppress(OSError):
            for byte in self._out.read():
                self._sock.sendall(bytes([byte]))
                gevent.sleep(PATIENCE / 5)
            return True
        return False
