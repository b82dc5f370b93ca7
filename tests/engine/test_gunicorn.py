"""The front of a worker: what any front owes the engine, and what is gunicorn's about it."""

import inspect
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from types import ModuleType
from typing import Any

import gevent
import pytest

from django_socketio.engine import FRONT, pywsgi
from tests.support import UNIT, wait_until

from . import (
    test_deflate,
    test_handshake,
    test_leaks,
    test_polling,
    test_pywsgi,
    test_tls,
    test_upgrade,
)
from .clients import PATH, Poller, WebSocket, chunked, request, text
from .served import echo
from .test_handshake import UPGRADE
from .test_pywsgi import AMBIGUOUS, SECOND
from .workers import Served

LAST = {"Connection": "close"}
UNTIL_400 = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Return a function that serves an engine, with these changes to its configuration."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Served(**options))


# What any front owes the engine. Left out is where gunicorn does as well, but otherwise.


def once_more(module: ModuleType, *without: str) -> None:
    """Have the tests of a module here too, with its fixtures, but served by this front."""
    for name, value in vars(module).items():
        if isinstance(value, type(serve)):
            globals()[name] = value
        elif name.startswith("test_") and inspect.isfunction(value) and name not in without:
            about = module.__name__.rpartition(".test_")[2]
            globals()[name.replace("test_", f"test_{about}_", 1)] = value


once_more(test_deflate)
once_more(test_leaks)
once_more(test_tls)
once_more(test_upgrade)
once_more(test_handshake, "test_a_websocket_handshake_needs_http_1_1")
once_more(test_polling, "test_chunks_that_are_none")
once_more(
    test_pywsgi,
    "test_connection_close",
    "test_keep_alive_in_http_1_0",
    "test_an_ambiguous_request",
    "test_a_connection_that_says_no_more",
    "test_no_header_splits_an_answer",
    "test_what_is_logged",
    "test_what_was_released_is_not_logged",
    "test_a_body_that_is_read_already_is_not_released",  # gunicorn reads ahead
)


# What could be read in two ways


@pytest.mark.parametrize("before", [b"", request("GET", "/before")], ids=["", "on a used one"])
@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_an_ambiguous_request(served: Served, data: bytes, before: bytes) -> None:
    client = served.http().send(before + data + SECOND)
    if before:
        assert client.answer().status == 200
    answer = client.answer()
    assert answer.status == (431 if b"X-99:" in data else 400)
    assert answer.headers["connection"] == "close"
    assert client.gone()
    assert served.app.requests == [("GET", "/before", b"")] * bool(before)


LENIENT = {
    "permit_obsolete_folding": True,
    "strip_header_spaces": True,
    "casefold_http_method": True,
    "permit_unconventional_http_method": True,
    "permit_unconventional_http_version": True,
    "header_map": "dangerous",
    "limit_request_fields": 30_000,
    "limit_request_line": 0,
    "limit_request_field_size": 1_000_000,
}


@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_no_setting_of_gunicorns_makes_it_lenient(
    serve: Callable[..., Served], data: bytes
) -> None:
    served = serve(gunicorn=LENIENT)
    client = served.http().send(data + SECOND)
    assert client.answer().status in (400, 431)
    assert client.gone()
    assert served.app.requests == []


def test_an_underscore_never_passes_for_a_dash(serve: Callable[..., Served]) -> None:
    served = serve(gunicorn=LENIENT)
    seen: list[Any] = []
    served.app.allow = lambda environ: seen.append(environ.get("HTTP_X_AUTH")) or []
    served.http().get(f"{PATH}polling", {"X_Auth": "forged", "X-Auth": "real"})
    assert seen == ["real"]


def test_a_head_over_the_limit_of_both_fronts(serve: Callable[..., Served]) -> None:
    """5.4 MB were a request once."""
    served = serve(gunicorn=LENIENT)
    client = served.http().send(b"GET /page HTTP/1.1\r\nHost: x\r\n")
    with closing(client):
        sent = 0
        try:
            for number in range(90):
                client.send(b"X-%d: %b\r\n" % (number, b"x" * 60_000))
                sent += 1
                gevent.sleep(0)
        except ConnectionError:
            pass
        assert sent < 90
    assert served.http().get("/page").status == 200
    assert len(served.app.requests) == 1


@pytest.mark.parametrize(
    "body",
    [b"x\r\n", b"-1\r\n", b"6 \r\n4hello", b"0x6\r\n", b"6;" + b"x" * 20_000, b"6\r\n4helloXY"]
    + [b"6\r\n4hellox", b"6\n4hello\n0\n\n", b"f" * 17 + b"\r\n"],
)
def test_chunks_that_are_none(served: Served, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    """Some of these gunicorn takes for the beginning of something, but not for long."""
    monkeypatch.setattr(pywsgi, "BODY_TIMEOUT", 4 * UNIT)
    client = served.poller()
    head = request("POST", client.target, headers={"Transfer-Encoding": "chunked"})
    client.posting.send(head + body)
    assert client.posting.answer().status in (400, 413)
    assert client.posting.gone()
    served.wait_closed("parse error")
    assert served.app.messages == []


# Bodies and connections


def test_expect_100_continue_and_nobody_reads(served: Served) -> None:
    """What comes next is the body or another request, and nobody can tell."""
    client = served.http()
    headers = {"Expect": "100-continue", "Content-Length": str(len(SECOND))}
    client.send(request("POST", "/unread", headers=headers))
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    client.send(SECOND)
    assert client.gone()
    assert len(served.app.requests) == 1


@pytest.mark.parametrize(
    ("version", "headers", "stays"),
    [
        ("1.1", {}, True),
        ("1.1", {"Connection": "close"}, False),
        ("1.1", {"Connection": "TE, close"}, False),
        ("1.0", {}, False),
        ("1.0", {"Connection": "keep-alive"}, True),
    ],
)
def test_keeping_alive(served: Served, version: str, headers: dict[str, str], stays: bool) -> None:
    data = request("GET", "/page", headers=headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    client = served.http().send(data)
    head = client._read_until(b"\r\n\r\n")
    assert (b"\r\nConnection: keep-alive\r\n" in head) is stays
    assert (b"\r\nConnection: close\r\n" in head) is not stays
    client._unread = b""
    if stays:
        assert client.get("/page").status == 200
    else:
        assert client.gone()


def test_a_connection_that_says_no_more(serve: Callable[..., Served]) -> None:
    served = serve(gunicorn={"keepalive": 1})
    client = served.http()
    client.get("/page")
    answered = time.monotonic()
    assert client.gone()
    assert time.monotonic() - answered > 0.9


def test_without_keep_alive(serve: Callable[..., Served]) -> None:
    client = serve(gunicorn={"keepalive": 0}).http()
    assert client.get("/page").headers["connection"] == "close"
    assert client.gone()


def test_a_server_that_ends_keeps_no_connection(served: Served) -> None:
    client = served.http()
    assert client.get("/page").headers["connection"] == "keep-alive"
    served.server.close()
    assert client.get("/page").headers["connection"] == "close"
    assert client.gone()


def test_cookies_are_joined_as_cookies(served: Served) -> None:
    seen: list[Any] = []
    served.app.allow = lambda environ: seen.append(environ["HTTP_COOKIE"]) or []
    head = request("GET", f"{PATH}polling").removesuffix(b"\r\n")
    served.http().send(head + b"Cookie: a=1\r\nCookie: b=2\r\n\r\n").answer()
    assert seen == ["a=1; b=2"]


def test_the_host_of_an_absolute_target_counts(served: Served) -> None:
    """RFC 9112, 3.2.2: an origin server ignores the Host header then."""
    seen: list[Any] = []
    served.app.allow = lambda environ: seen.append(environ["HTTP_HOST"]) or []
    served.http().get(f"http://example.org:80{PATH}polling", {"Host": "forged"})
    assert seen == ["example.org:80"]


def test_no_header_splits_an_answer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.app.allow = lambda environ: [("X-Origin", "a\r\nSet-Cookie: b")]
    for transport in ("polling", "websocket"):
        answer = served.http().get(PATH + transport, UPGRADE)
        assert answer.status == 500
        assert "set-cookie" not in answer.headers
    served.errors.clear()


def test_nothing_of_the_connection_stays_with_its_session(served: Served) -> None:
    """Handlers keep the environ for as long as their socket lives."""
    environs: list[dict[str, Any]] = []
    served.app.allow = lambda environ: environs.append(environ) or []
    served.websocket()
    (environ,) = environs
    assert not {FRONT, "gunicorn.socket", "wsgi.early_hints"} & environ.keys()


@pytest.mark.parametrize("level", ["debug", "info"])
def test_what_is_logged(
    serve: Callable[..., Served], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Polls would drown the rest, unless somebody wants to know everything."""
    served = serve(gunicorn={"accesslog": "-", "loglevel": level})
    served.worker.log.access_log.addHandler(caplog.handler)
    try:
        client = served.http()
        client.get("/page?x=%25s")
        client.get(f"{PATH}polling")
        client.get(f"{PATH}polling&sid=secret")
        client.get(f"{PATH}websocket", UPGRADE)
    finally:
        served.worker.log.access_log.removeHandler(caplog.handler)
        served.worker.log.access_log.handlers.clear()
    lines = [record.getMessage() for record in caplog.records if record.name == "gunicorn.access"]
    assert '"GET /page?x=%25s HTTP/1.1" 200 0' in lines[0]
    assert [" 400 " in line for line in lines] == [False, *[False] * (level == "debug"), True]


# How many at once


def test_polls_and_websockets_take_no_place(serve: Callable[..., Served]) -> None:
    """Two may be served at a time, and that is two requests that the server works on."""
    served = serve(gunicorn={"worker_connections": 2})
    pollers = [served.poller() for _ in range(5)]
    for poller in pollers:
        poller.start_get()
        served.wait_polled(poller)
    for _ in range(5):
        served.websocket()
    assert served.http().get("/page").status == 200
    for poller in pollers:
        assert poller.post("6").body == b"ok"
        served.session(poller).send(test_tls.message("later"))
        assert poller.end_get() == ["4later"]


def test_no_more_are_accepted_than_can_be_served(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(gunicorn={"worker_connections": 2})
    slow = [served.http(), served.http()]
    for client in slow:
        client.send(request("POST", "/page", b"hello")[:-1])
    wait_until(lambda: served.server.full(), what="two requests")
    late = served.http().request("GET", "/page")
    late.sock.settimeout(4 * UNIT)
    with pytest.raises(TimeoutError):
        late.answer()
    slow[0].send(b"o")
    assert slow[0].answer().body == b"hello"
    assert late.answer().status == 200
    slow[1].send(b"o")
    assert slow[1].answer().body == b"hello"


# Giving a connection up, and taking one over


class Passing:
    """An application that gives each request to `/there` up, and keeps what it got for it."""

    def __init__(self, served: Served) -> None:
        self.given: list[Any] = []
        self._serve = served.serve
        served.server.application = self

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/there":
            return self._serve(environ, start_response)
        self.given.append(environ[FRONT].release())
        start_response("200 OK", [("Content-Length", "5")])
        return [b"never"]


@pytest.mark.parametrize(
    "data",
    [
        request("GET", "/there"),
        request("GET", "/there", headers={"Cookie": "a=\xe4; b", "x-lower": "  two  blanks "}),
        b"\r\n" + request("GET", "/there"),
        request("POST", "/there", b"hello"),
        request("POST", "/there", b"hello")[:-3],
        request("POST", "/there", headers={"Transfer-Encoding": "chunked"}) + chunked(b"hello"),
        request("GET", "/there") + request("GET", "/next"),
        request("GET", "/there", headers=UPGRADE) + text("4hello"),
        request("POST", "/there", headers={"Expect": "100-continue", "Content-Length": "5"}),
    ],
)
@pytest.mark.parametrize("before", [b"", request("POST", "/page", b"x")], ids=["", "on a used one"])
def test_giving_up_a_connection(served: Served, data: bytes, before: bytes) -> None:
    """All that was read comes with it, to the letter, and the client hears nothing."""
    passing = Passing(served)
    client = served.http().send(before + data)
    if before:
        assert client.answer().body == b"x"
    wait_until(lambda: passing.given, what="the request")
    ((sock, read),) = passing.given
    with closing(sock):
        assert read == data
        assert not sock.getblocking()
        wait_until(lambda: not served.server.connections)
        sock.send(b"only this")
        assert client.receive() == b"only this"


def test_what_cannot_be_given_up(serve: Callable[..., Served], certificate: dict[str, str]) -> None:
    """TLS that ends here: then the application answers as if it had not asked."""
    served = serve(tls=certificate)
    passing = Passing(served)
    assert served.http().get("/there").body == b"never"
    assert passing.given == [None]


def test_a_body_that_was_read_cannot_be_given_up(served: Served) -> None:
    given: list[Any] = []

    def late(environ: dict[str, Any], start_response: Any) -> Any:
        environ["wsgi.input"].read()
        given.append(environ[FRONT].release())
        return served.serve(environ, start_response)

    served.server.application = late
    client = served.http().send(request("POST", "/unread", b"hello")[:-2])
    gevent.sleep(UNIT)
    assert client.send(b"lo").answer().status == 200
    assert given == [None]


@pytest.fixture
def two(serve: Callable[..., Served]) -> tuple[Served, Served]:
    """Return two workers: one passes requests to `/there` on to the other."""
    first, second = serve(), serve()
    serving = first.serve

    def pass_on(environ: dict[str, Any], start_response: Any) -> Any:
        if "there" not in environ["PATH_INFO"] and "sid=" not in environ["QUERY_STRING"]:
            return serving(environ, start_response)
        second.server.adopt(*environ[FRONT].release())
        return []

    first.server.application = pass_on
    return first, second


@pytest.mark.parametrize("before", [False, True], ids=["", "on a used one"])
def test_taking_a_connection_over(two: tuple[Served, Served], before: bool) -> None:
    """From then on it is the other's."""
    first, second = two
    client = first.http()
    if before:
        assert client.get("/here").status == 200
    assert client.post("/there", b"x" * 50_000).body == b"x" * 50_000
    assert client.get("/here").status == 200
    paths = [path for _, path, _ in second.app.requests]
    assert paths == ["/there", "/here"]
    assert len(first.app.requests) == before
    client.request("GET", "/last", headers=LAST)
    assert client.rest().startswith(b"HTTP/1.1 200 OK\r\n")


def test_taking_over_what_is_pipelined(two: tuple[Served, Served]) -> None:
    first, second = two
    data = request("POST", "/there", b"hello") + request("GET", "/next")
    client = first.http().send(data)
    assert [client.answer().body, client.answer().body] == [b"hello", b""]
    assert [path for _, path, _ in second.app.requests] == ["/there", "/next"]


def test_taking_a_session_over(two: tuple[Served, Served]) -> None:
    """Polling and an upgrade that come to the wrong worker, with a message in the same segment."""
    first, second = two
    second.app.answer = echo
    poller = second._add(Poller(second.address))
    there = first.http()
    assert there.post(poller.target, b"4hello").body == b"ok"
    assert there.get(poller.target).packets == ["4hello"]
    websocket = first._add(WebSocket(first.address, sid=poller.sid))
    websocket.send("2probe")
    assert websocket.receive() == "3probe"
    websocket.send("5", "4upgraded")
    assert websocket.receive() == "4upgraded"
    wait_until(lambda: not first.server.connections, what="nothing left at the first")


def test_taking_over_from_a_client_that_has_gone(served: Served) -> None:
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, ours, theirs, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        gevent.sleep(UNIT)
        served.server.adopt(accepted, request("GET", "/page"))
        wait_until(lambda: accepted.fileno() == -1, what="its end")
    assert served.http().get("/page").status == 200


# Behind a proxy that speaks of itself


V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([10, 0, 0, 9, 10, 0, 0, 1]) + b"\x04\xd2\0\x50"


@pytest.mark.parametrize("preface", [b"PROXY TCP4 10.0.0.9 10.0.0.1 1234 80\r\n", V2])
def test_the_proxy_protocol(serve: Callable[..., Served], preface: bytes) -> None:
    served = serve(gunicorn={"proxy_protocol": "auto", "proxy_allow_ips": "127.0.0.1"})
    passing = Passing(served)
    seen: list[str] = []
    served.app.allow = lambda environ: seen.append(environ["REMOTE_ADDR"]) or []
    client = served.http().send(preface + request("GET", f"{PATH}polling"))
    assert client.answer().packets
    assert client.get(f"{PATH}polling").packets
    assert seen == ["10.0.0.9"] * 2
    client.send(request("GET", "/there"))
    wait_until(lambda: passing.given, what="the request")
    ((sock, read),) = passing.given
    sock.close()
    assert read == preface + request("GET", "/there")  # whoever takes it over has to know, too
