"""The HTTP front over a real socket: one reading of each request, deadlines, and no leftovers."""

import logging
import socket
import struct
import time
from _socket import socket as RawSocket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import gevent
import pytest
from gevent.socket import wait_read

from django_socketio.engine import FRONT, pywsgi
from tests.support import UNIT, wait_until

from .clients import PATH, Http, chunked, request
from .served import Served
from .test_handshake import UNKNOWN_SID, UPGRADE

SECOND = request("GET", "/smuggled")


def test_keep_alive(served: Served) -> None:
    client = served.http()
    for number in range(5):
        assert client.get("/page").body == b""
        assert client.post("/page", b"%d" % number).body == b"%d" % number
    assert len(served.app.requests) == 10


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    client = served.http()
    bodies = [b"one", b"", b"three" * 5_000, b"four"]
    client.send(b"".join(request("POST", "/page", body) for body in bodies))
    client.send(request("GET", "/end"))
    assert [client.answer().body for _ in (*bodies, b"")] == [*bodies, b""]
    assert served.app.requests[-1] == ("GET", "/end", b"")


def test_requests_in_pieces(served: Served) -> None:
    client = served.http()
    data = request("POST", "/page", b"hello") * 2 + request("GET", "/end")
    client.send_in_pieces(data, 1)
    assert [client.answer().body for _ in range(3)] == [b"hello", b"hello", b""]


def test_a_body_that_nobody_reads_is_no_request(served: Served) -> None:
    client = served.http()
    client.send(request("POST", "/unread", SECOND) + request("GET", "/end"))
    assert [client.answer().status for _ in range(2)] == [200, 200]
    assert served.app.requests == [("POST", "/unread", None), ("GET", "/end", b"")]


def test_empty_lines_before_a_request(served: Served) -> None:
    """RFC 9112, 2.2: some clients send one behind a body."""
    data = request("POST", "/page", b"body") + b"\r\n" + request("GET", "/page")
    for size in (1_000, len(request("POST", "/page", b"body")), 1):
        client = served.http().send_in_pieces(data, size)
        assert [client.answer().status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_connection_close(served: Served, version: str) -> None:
    headers = {"Connection": "close"} if version == "1.1" else {}
    data = request("GET", "/page", headers=headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    client = served.http().send(data + SECOND)
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert client.gone()
    assert len(served.app.requests) == 1


def test_keep_alive_in_http_1_0(served: Served) -> None:
    data = request("GET", "/page", headers={"Connection": "keep-alive"})
    client = served.http()
    for _ in range(3):
        answer = client.send(data.replace(b"HTTP/1.1", b"HTTP/1.0")).answer()
        assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")


def test_an_absolute_target(served: Served) -> None:
    client = served.http()
    assert client.get("http://localhost:80/page?x=y").status == 200
    assert client.get(f"http://localhost{PATH}polling").packets[0][0] == "0"
    assert served.app.requests == [("GET", "/page", b"")]


# Bodies


def test_expect_100_continue(served: Served) -> None:
    """RFC 9110, 10.1.1."""
    client = served.http()
    headers = {"Expect": "100-continue", "Content-Length": "5"}
    client.send(request("POST", "/page", headers=headers))
    assert client.answer().status == 100
    assert client.send(b"hello").answer().body == b"hello"
    assert client.get("/page").status == 200


def test_expect_100_continue_of_a_session(served: Served) -> None:
    poller = served.poller()
    headers = {"Expect": "100-continue", "Content-Length": "6"}
    poller.posting.send(request("POST", poller.target, headers=headers))
    assert poller.posting.answer().status == 100
    assert poller.posting.send(b"4hello").answer().body == b"ok"
    assert served.app.messages == ["hello"]


@pytest.mark.parametrize("target", ["/unread", f"{PATH}polling&sid=unknown"])
def test_expect_100_continue_and_nobody_reads(served: Served, target: str) -> None:
    """gevent#2075: no 100 behind the answer, and what follows is either body or nothing."""
    client = served.http()
    headers = {"Expect": "100-continue", "Content-Length": str(len(SECOND))}
    client.send(request("POST", target, headers=headers) + SECOND + request("GET", "/end"))
    assert client.answer().status in (200, 400)
    assert b" 100 " not in client.send(request("GET", "/x", headers={"Connection": "close"})).rest()
    assert "/smuggled" not in {path for _, path, _ in served.app.requests}


def test_expect_100_continue_over_max_payload(served: Served) -> None:
    """The answer comes instead of the 100, so that the client need not send at all."""
    poller = served.poller()
    headers = {"Expect": "100-continue", "Content-Length": "1000000"}
    poller.posting.send(request("POST", poller.target, headers=headers))
    assert poller.posting.answer().status == 413
    assert poller.posting.gone()


def test_a_chunked_body(served: Served) -> None:
    """Its end is where the next request begins."""
    client = served.http()
    head = request("POST", "/page", headers={"Transfer-Encoding": "Chunked"})
    client.send_in_pieces(head + chunked(b"one ", b"two ", b"x" * 20_000), 999)
    assert client.answer().body == b"one two " + b"x" * 20_000
    client.send(head + chunked(b"one") + head + chunked(b"two") + request("GET", "/end"))
    assert [client.answer().body for _ in range(3)] == [b"one", b"two", b""]
    assert len(served.app.requests) == 4


def test_chunk_extensions_and_trailers(served: Served) -> None:
    client = served.http()
    head = request("POST", "/page", headers={"Transfer-Encoding": "chunked"})
    client.send(head + b'5;name="value"\r\nhello\r\n0\r\nX-Sum: x\r\n\r\n' + request("GET", "/end"))
    assert client.answer().body == b"hello"
    assert client.answer().status == 200
    assert served.app.requests == [("POST", "/page", b"hello"), ("GET", "/end", b"")]


def test_chunks_that_nobody_reads_are_no_request(served: Served) -> None:
    client = served.http()
    head = request("POST", "/unread", headers={"Transfer-Encoding": "chunked"})
    client.send(head + chunked(SECOND, SECOND) + request("GET", "/end"))
    assert [client.answer().status for _ in range(2)] == [200, 200]
    assert served.app.requests == [("POST", "/unread", None), ("GET", "/end", b"")]


@pytest.mark.parametrize("kind", ["counted", "chunked"])
@pytest.mark.parametrize("size", [60_000, 100_000, 3_000_000])
def test_a_large_body_that_nobody_reads(served: Served, kind: str, size: int) -> None:
    """Its client gets the answer; so much is read for the sake of the connection, and no more."""
    client = served.http()
    if kind == "counted":
        client.request("POST", "/unread", bytes(size))
    else:
        head = request("POST", "/unread", headers={"Transfer-Encoding": "chunked"})
        client.send(head + chunked(*[bytes(1000)] * (size // 1000)))
    assert client.answer().status == 200
    client.request("GET", "/page")
    if size < 65_536:
        assert client.answer().status == 200
    else:
        assert client.gone()
        assert len(served.app.requests) == 1


def test_nobody_lingers_for_ever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pywsgi, "BODY_TIMEOUT", 4 * UNIT)
    client = served.http()
    client.send(request("POST", "/unread", headers={"Content-Length": "100000000"}))
    assert client.answer().status == 200
    with pytest.raises(ConnectionError):
        while True:
            client.send(bytes(100))
            gevent.sleep(UNIT / 10)


def test_a_malformed_body_that_a_view_reads(served: Served) -> None:
    """It is the client's fault, and no error of the server's."""
    client = served.http().send(POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n" + SECOND)
    assert client.answer().status == 400
    assert client.gone()
    assert served.app.requests == []


@pytest.mark.parametrize("trailer", [b"Evil : x\r\n", b" folded\r\n", b"no colon\r\n"])
def test_odd_trailers_are_no_request(served: Served, trailer: bytes) -> None:
    """CVE-2023-41419."""
    client = served.http()
    head = request("POST", "/page", headers={"Transfer-Encoding": "chunked"})
    client.send(head + b"5\r\nhello\r\n0\r\n" + trailer + b"\r\n" + SECOND)
    assert client.answer().status == 400
    assert client.gone()
    assert served.app.requests == []


def test_an_upgrade_with_a_body(served: Served) -> None:
    served.app.answer = lambda session, data: None
    headers = {**UPGRADE, "Content-Length": "5"}
    client = served.http().send(request("GET", f"{PATH}websocket", headers=headers) + b"hello")
    assert client.answer().status == 101
    wait_until(lambda: served.app.opened, what="the session")
    assert served.app.closed == []


# What could be read in two ways. Each row gets exactly one 400, and a closed connection.

POST = b"POST /page HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /page HTTP/1.1\r\nHost: x\r\n"
BODY = b"\r\n5\r\nhello\r\n0\r\n\r\n"

AMBIGUOUS = {
    "gzip, chunked and a length": (
        POST + b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 4\r\n" + BODY
    ),
    "length and chunked": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n" + BODY,
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n" + BODY,
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 30\r\n\r\nhello",
    "twice the same length": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "lengths in a list": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "1_0": POST + b"Content-Length: 1_0\r\n\r\nhellohello",
    "+5": POST + b"Content-Length: +5\r\n\r\nhello",
    "-5": POST + b"Content-Length: -5\r\n\r\nhello",
    "0x5": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "an empty length": POST + b"Content-Length: \r\n\r\nhello",
    "digits of another script": POST + b"Content-Length: \xb2\r\n\r\nhello",
    "many digits": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\nhello",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a tab before the colon": POST + b"Transfer-Encoding\t: chunked\r\n" + BODY,
    "chunked and identity": (
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + BODY
    ),
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n" + BODY,
    "identity": POST + b"Transfer-Encoding: identity\r\n" + BODY,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n" + BODY,
    "an empty encoding": POST + b"Transfer-Encoding: \r\n" + BODY,
    "chunked in HTTP/1.0": (
        POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n" + BODY
    ),
    "a bare CR in a value": GET + b"X: a\rContent-Length: 5\r\n\r\n",
    "a bare LF in a value": GET + b"X: a\nContent-Length: 5\r\n\r\n",
    "bare LF everywhere": b"GET /page HTTP/1.1\nHost: x\n\n\r\n\r\n",
    "a vertical tab": GET + b"X: a\x0bContent-Length: 5\r\n\r\n",
    "a file separator": GET + b"X: a\x1cContent-Length: 5\r\n\r\n",
    "a NEL": GET + b"X: a\x85Content-Length: 5\r\n\r\n",
    "a NUL": GET + b"X: a\x00b\r\n\r\n",
    "a NUL in a name": GET + b"X\x00: a\r\n\r\n",
    "a folded line": GET + b"X: a\r\n b\r\n\r\n",
    "a folded line with a tab": GET + b"X: a\r\n\tContent-Length: 5\r\n\r\n",
    "a line without a colon": GET + b"nothing\r\n\r\n",
    "a header without a name": GET + b": a\r\n\r\n",
    "a name in quotes": GET + b'"X": a\r\n\r\n',
    "HTTP/0.9": b"GET /page\r\n\r\n",
    "HTTP/2.0": b"GET /page HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/1.2": b"GET /page HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/01.1": b"GET /page HTTP/01.1\r\nHost: x\r\n\r\n",
    "no Host": b"GET /page HTTP/1.1\r\n\r\n",
    "two Hosts": GET + b"Host: y\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "two blanks": b"GET  /page HTTP/1.1\r\nHost: x\r\n\r\n",
    "a blank in the target": b"GET /pa ge HTTP/1.1\r\nHost: x\r\n\r\n",
    "a blank at the end": b"GET /page HTTP/1.1 \r\nHost: x\r\n\r\n",
    "a tab in the target": b"GET /pa\tge HTTP/1.1\r\nHost: x\r\n\r\n",
    "a letter in the target": b"GET /p\xe4ge HTTP/1.1\r\nHost: x\r\n\r\n",
    "a relative target": b"GET page HTTP/1.1\r\nHost: x\r\n\r\n",
    "another scheme": b"GET file:///etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "a method that is none": b"G(T /page HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "101 headers": GET + b"".join(b"X-%d: y\r\n" % number for number in range(100)) + b"\r\n",
}


@pytest.mark.parametrize("before", [b"", request("GET", "/before")], ids=["", "on a used one"])
@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_an_ambiguous_request(served: Served, data: bytes, before: bytes) -> None:
    client = served.http().send(before + data + SECOND)
    if before:
        assert client.answer().status == 200
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert client.gone()
    assert served.app.requests == [("GET", "/before", b"")] * bool(before)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /page\r\n",
        b"GET /page HTTP/1.1\nHost: x\n\n",
        b"GET /page HTTP/1.1\r\nHost: x\n\n",
        GET + b"X: a\n",
        b"\x16\x03\x01\x02\x00\r\n",
    ],
)
def test_what_can_never_become_a_request_is_refused_at_once(served: Served, data: bytes) -> None:
    client = served.http().send(data)
    assert client.answer().status == 400
    assert client.gone()
    assert served.app.requests == []


def test_an_underscore_is_no_dash(served: Served) -> None:
    """CVE-2015-0219: nothing passes for a header that it is not."""
    headers = {"Content_Length": "5", "Transfer_Encoding": "chunked"}
    client = served.http()
    assert client.get("/page", headers).status == 200
    assert client.get("/page").status == 200


# Heads


def test_a_head_that_is_too_large(served: Served) -> None:
    client = served.http()
    answer = client.get("/page", {"X": "x" * 20_000})
    assert (answer.status, answer.headers["connection"]) == (431, "close")
    assert client.gone()
    assert served.app.requests == []


def test_a_head_without_an_end(served: Served) -> None:
    """Not one byte more is kept than the limit and a read."""
    client = served.http().send(GET)
    client.send(b"X: " + b"x" * 20_000)
    assert client.answer().status == 431
    assert client.gone()


def test_a_target_without_an_end(served: Served) -> None:
    client = served.http().send(b"GET /" + b"x" * 20_000)
    assert client.answer().status == 431
    assert client.gone()


def test_a_head_may_be_large(served: Served) -> None:
    client = served.http()
    for _ in range(2):
        assert client.get("/page", {f"X-{i}": "x" * 150 for i in range(90)}).status == 200


@pytest.mark.parametrize("before", [False, True], ids=["", "on a used one"])
def test_a_slow_head(served: Served, before: bool) -> None:
    """A byte now and then does not move the deadline, and good clients notice nothing."""
    served.server.head_timeout = 6 * UNIT
    clients = [served.http() for _ in range(20)]
    if before:
        for client in clients:
            assert client.get("/page").status == 200

    def drip(client: Http) -> bool:
        """Send a byte now and then, and tell whether all could be sent."""
        with suppress(ConnectionError):
            for byte in GET * 5:
                client.send(bytes([byte]))
                gevent.sleep(UNIT)
            return True
        return False

    drips = [gevent.spawn(drip, client) for client in clients]
    wait_until(lambda: served.server.connections == 20, what="all connections")
    while served.server.connections:
        assert served.websocket().handshake
        gevent.sleep(UNIT)
    assert [drip.get() for drip in drips] == [False] * 20
    assert len(served.app.requests) == 20 * before


def test_a_connection_that_says_nothing(served: Served) -> None:
    served.server.head_timeout = 3 * UNIT
    assert served.http().gone()


def test_a_connection_that_says_no_more(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an answer it may rest for a while longer."""
    served.server.head_timeout = 2 * UNIT
    monkeypatch.setattr(pywsgi, "IDLE_TIMEOUT", 8 * UNIT)
    client = served.http()
    client.get("/page")
    answered = time.monotonic()
    assert client.gone()
    assert time.monotonic() - answered >= 7 * UNIT


def test_a_request_after_a_rest(served: Served) -> None:
    served.server.head_timeout = 2 * UNIT
    client = served.http()
    client.get("/page")
    until = time.monotonic() + 4 * UNIT
    wait_until(lambda: time.monotonic() > until)
    assert client.get("/page").status == 200


# Answers


def test_a_slow_reader_of_a_large_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it reads, it has as much time as it needs."""
    monkeypatch.setattr(pywsgi, "SEND_TIMEOUT", 4 * UNIT)
    size = 3_000_000
    client = served.http(receive_buffer=65_536)
    client.request("POST", "/page", bytes(size))
    received = 0
    started = time.monotonic()
    while received < size:
        received += len(client.receive())
        if received > size / 10:
            until = time.monotonic() + UNIT / 10
            wait_until(lambda until=until: time.monotonic() > until)  # type: ignore[misc]
    assert time.monotonic() - started > 4 * UNIT


def test_head_and_body_do_not_wait_for_each_other(served: Served) -> None:
    """Nagle's algorithm would hold the body back for the client's delayed ACK: 40 ms a poll."""
    client = served.http()
    started = time.monotonic()
    for _ in range(30):
        assert client.get(f"{PATH}polling&sid=unknown").error == UNKNOWN_SID
    assert time.monotonic() - started < 12 * UNIT


@pytest.mark.parametrize("target", ["/stream", "/engine.io/", f"{PATH}polling", "/page"])
def test_head_has_no_body(served: Served, target: str) -> None:
    """RFC 9110, 9.3.2: or the next answer begins in the middle of this one."""
    client = served.http()
    client.request("HEAD", target).request("HEAD", target).request("GET", "/end", headers=LAST)
    heads = client.rest().split(b"\r\n\r\n")
    assert [head[:9] for head in heads] == [b"HTTP/1.1 "] * 3 + [b""]


LAST = {"Connection": "close"}


def test_an_answer_in_pieces(served: Served) -> None:
    client = served.http().request("GET", "/stream").request("GET", "/stream", headers=LAST)
    for answer in client.rest().split(b"HTTP/1.1 200 OK")[1:]:
        assert answer.endswith(b"\r\n\r\n3\r\nin \r\n6\r\npieces\r\n0\r\n\r\n")


def test_a_101_has_no_length(served: Served) -> None:
    """RFC 9110, 8.6: whoever has put it there."""
    served.app.allow = lambda environ: [("Content-Length", "0"), ("X-Other", "stays")]
    answer = served.http().get(f"{PATH}websocket", UPGRADE)
    assert (answer.status, answer.headers["x-other"]) == (101, "stays")
    assert "content-length" not in answer.headers


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_no_header_splits_an_answer(
    served: Served, transport: str, greenlet_errors: list[BaseException]
) -> None:
    """gevent#775."""
    served.app.allow = lambda environ: [("X-Origin", "a\r\nSet-Cookie: b")]
    answer = served.http().get(PATH + transport, UPGRADE)
    assert answer.status == 500
    assert "set-cookie" not in answer.headers
    assert [type(error) for error in greenlet_errors] == [ValueError]
    greenlet_errors.clear()


def test_a_client_that_hangs_up_before_its_answer(served: Served) -> None:
    client, other = served.http(), served.http()
    client.request("POST", "/page", b"x" * 50_000)
    client.reset()
    assert other.get("/page").status == 200


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_what_is_logged(served: Served, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """What the engine answers well it counts itself; polls would drown the rest."""
    with caplog.at_level(level, logger="django_socketio"):
        served.http().send(b"nonsense\r\n\r\n").answer()
        client = served.http()
        client.get("/page?x=%25s")
        client.get(f"{PATH}polling")
        client.get(f"{PATH}polling&sid=secret")
        client.send(b"nonsense\r\n\r\n").answer()
        wait_until(lambda: len(served.app.requests) == 1)
    levels = {record.levelname for record in caplog.records}
    wanted = {"DEBUG": {"DEBUG", "INFO"}, "INFO": {"INFO"}, "WARNING": set()}
    assert levels == wanted[logging.getLevelName(level)]
    if level == logging.INFO:
        assert caplog.text.count("Refused a request from ('127.0.0.1'") == 2
        assert "transport=polling HTTP" not in caplog.text
        assert '"GET /page?x=%25s HTTP/1.1" 200' in caplog.text


def test_nothing_is_made_of_a_connection_that_never_speaks(serve: Callable[..., Served]) -> None:
    served = serve()
    for _ in range(50):
        client = served.http()
        client.close()
        served.clients.remove(client)
    assert served.http().get("/page").status == 200
    wait_until(lambda: served.server.connections == 1, what="the end of the others")


# Connections that are passed on


class Giver:
    """An application that gives up every connection at `/given`, and serves the others."""

    def __init__(self, served: Served) -> None:
        self.given: list[tuple[Any, bytes]] = []
        self._serve = served.server.application
        served.server.application = self.serve

    def serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/given":
            answer: Iterable[bytes] = self._serve(environ, start_response)
            return answer
        given = environ[FRONT].release()
        if given is None:
            start_response("200 OK", [("Content-Length", "4")])
            return [b"kept"]
        self.given.append(given)
        return []


@pytest.fixture
def giver(served: Served) -> Iterator[Giver]:
    giver = Giver(served)
    yield giver
    for sock, _ in giver.given:
        sock.close()


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("pieces", [1, 1000], ids=["at once", "bytewise"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_a_request_is_released_whole(
    served: Served, giver: Giver, method: str, pieces: int, before: int
) -> None:
    """All that was read from its head on, and the socket that has the rest."""
    client = served.http()
    for _ in range(before):
        assert client.get("/page").status == 200
    body = b"body" if method == "POST" else None
    data = request(method, "/given", body) + request("GET", "/behind")
    client.send_in_pieces(data, -(-len(data) // pieces))
    wait_until(lambda: giver.given)
    ((sock, received),) = giver.given
    assert not sock.getblocking()
    while len(received) < len(data):
        wait_read(sock.fileno())
        received += sock.recv(65536)
    assert received == data
    assert served.server.drain(0)
    sock.send(b"an answer of somebody else")
    assert client.receive() == b"an answer of somebody else"
    assert len(served.app.requests) == before


def test_what_is_released_is_closed_by_nobody_else(served: Served, giver: Giver) -> None:
    client = served.http().request("GET", "/given")
    wait_until(lambda: giver.given and not served.server.connections, what="the handler's end")
    ((sock, _),) = giver.given
    client.send(b"more")
    wait_read(sock.fileno())
    assert sock.recv(100) == b"more"
    sock.close()
    assert client.gone()


def test_a_body_that_came_in_part_is_released(served: Served, giver: Giver) -> None:
    client = served.http().send(request("POST", "/given", b"0123456789")[:-5])
    wait_until(lambda: giver.given)
    ((sock, received),) = giver.given
    assert received.endswith(b"\r\n\r\n01234")
    client.send(b"56789")
    wait_read(sock.fileno())
    assert sock.recv(100) == b"56789"


def test_no_100_continue_goes_before_a_release(served: Served, giver: Giver) -> None:
    headers = {"Expect": "100-continue", "Content-Length": "5"}
    client = served.http().send(request("POST", "/given", headers=headers))
    wait_until(lambda: giver.given)
    giver.given.pop()[0].close()
    assert client.rest() == b""


@pytest.mark.parametrize(("size", "given"), [(3, True), (8, False)])
def test_a_body_that_is_read_already_is_not_released(
    served: Served, giver: Giver, size: int, given: bool
) -> None:
    """What came with the head may be read, for it is kept."""

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["wsgi.input"].read(size)
        return giver.serve(environ, start_response)

    served.server.application = serve
    data = request("POST", "/given", b"0123456789")
    client = served.http().send(data[:-5])
    if given:
        wait_until(lambda: giver.given)
        assert giver.given[0][1] == data[:-5]
    else:
        wait_until(lambda: served.server._requests)
        assert client.send(data[-5:]).answer().body == b"kept"
        assert client.get("/page").status == 200


def test_tls_is_not_released(serve: Callable[..., Served], certificate: dict[str, str]) -> None:
    served = serve(tls=certificate)
    giver = Giver(served)
    client = served.http()
    assert client.get("/given").body == b"kept"
    assert client.get("/page").status == 200
    assert not giver.given


def test_what_was_released_is_not_logged(
    served: Served, giver: Giver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="django_socketio"):
        client = served.http()
        client.get("/page")
        client.request("GET", "/given")
        wait_until(lambda: not served.server.connections, what="the handler's end")
    assert ["/given" in record.getMessage() for record in caplog.records] == [False]


def test_a_released_connection_is_adopted(serve: Callable[..., Served]) -> None:
    """As if it had come to the other server in the first place."""
    here, there = serve(), serve()
    giver = Giver(here)
    client = here.http()
    client.get("/page")
    client.send(request("POST", "/given", b"hello")[:-2])
    wait_until(lambda: giver.given)
    there.server.adopt(*giver.given.pop())
    assert client.send(b"lo").answer().body == b"hello"
    for number in range(3):
        assert client.post("/page", b"%d" % number).body == b"%d" % number
    assert len(there.app.requests) == 4 and len(here.app.requests) == 1
    websocket = client.get(f"{PATH}websocket", UPGRADE)
    assert websocket.status == 101 and len(there.engine.sessions) == 1


@pytest.mark.parametrize("data", [b"", b"GET /page HT", b"\r\n"])
def test_an_adopted_connection_may_begin_anywhere(served: Served, data: bytes) -> None:
    client, server_side = socket.socketpair()
    with client, server_side:
        served.server.adopt(RawSocket(fileno=server_side.detach()), data)
        whole = request("GET", "/page", headers={"Connection": "close"})
        client.sendall(whole[len(data.lstrip()) :])
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_an_adopted_connection_whose_client_has_gone(served: Served) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        accepted = listener.accept()[0]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock = RawSocket(fileno=accepted.detach())
    served.server.adopt(sock, request("GET", "/page"))
    assert sock.fileno() == -1
    assert served.http().get("/end").status == 200
    assert served.app.requests == [("GET", "/end", b"")]


def test_what_was_adopted_a_moment_ago_is_answered_before_the_end(served: Served) -> None:
    client, server_side = socket.socketpair()
    with client, server_side:
        served.server.adopt(RawSocket(fileno=server_side.detach()), request("GET", "/page"))
        assert served.server.drain(20 * UNIT)
        assert served.app.requests == [("GET", "/page", b"")]
        client.settimeout(0)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
