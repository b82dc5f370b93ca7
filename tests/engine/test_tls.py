"""Everything over TLS: what OpenSSL holds back from the loop must not be forgotten."""

import hashlib
import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

import gevent
import pytest
from websockets.frames import Opcode

from django_socketio.engine import server
from tests.support import UNIT, wait_until

from .clients import Http, frame, request, text
from .served import Served, echo, message
from .test_upgrade import probe


@pytest.fixture
def secure(serve: Callable[..., Served], certificate: dict[str, str]) -> Served:
    served = serve(tls=certificate, max_buffer=10_000_000, max_payload=3_000_000)
    served.app.answer = echo
    return served


def test_polling(secure: Served) -> None:
    client = secure.poller()
    assert client.post("4hello", b"binary").body == b"ok"
    assert client.get() == ["4hello", b"binary"]
    client.start_get()
    secure.wait_polled(client).send(message("later"))
    assert client.end_get() == ["4later"]


def test_large_payloads(secure: Served) -> None:
    client = secure.poller()
    data = random.Random(1).randbytes(2_000_000)
    assert client.post(data).body == b"ok"
    assert client.get() == [data]


def test_messages(secure: Served) -> None:
    client = secure.websocket()
    for sent in ("4hello", b"binary", "4", b"", "4\U0001f600"):
        client.send(sent)
        assert client.receive() == sent


def test_large_messages_both_ways(secure: Served) -> None:
    client = secure.websocket()
    for size in (16_000, 17_000, 100_000, 2_900_000):
        data = random.Random(size).randbytes(size)
        client.send(data)
        received = client.receive()
        assert isinstance(received, bytes)
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


def test_many_messages_in_one_record(secure: Served) -> None:
    """More than one read takes: what is decrypted already makes no descriptor readable."""
    client = secure.websocket()
    sent: list[str | bytes] = [f"4{number:>700}" for number in range(200)]
    client.send(*sent)
    assert [client.receive() for _ in sent] == sent


def test_a_message_behind_the_request(secure: Served) -> None:
    client = secure.websocket(behind=text("4first") + text("4second"))
    assert [client.receive(), client.receive()] == ["4first", "4second"]


def test_more_records_behind_the_request(secure: Served) -> None:
    """They may be in OpenSSL's hands when the socket changes into the engine's."""
    for _ in range(10):
        client = secure.websocket(behind=text("4" + "x" * 40_000) + text("4last"))
        assert [client.receive(), client.receive()] == ["4" + "x" * 40_000, "4last"]


def test_segments_of_one_byte(secure: Served) -> None:
    client = secure.websocket()
    client.http.send_in_pieces(text("4hello") + frame(Opcode.BINARY, b"there"))
    assert [client.receive(), client.receive()] == ["4hello", b"there"]


def test_a_slow_reader_gets_all(secure: Served) -> None:
    client = secure.websocket(receive_buffer=65_536)
    session = secure.session(client)
    blobs = [random.Random(seed).randbytes(900_000) for seed in range(10)]
    for blob in blobs:
        session.send(message(blob))
        gevent.sleep(0)
    client.send_raw(frame(Opcode.PING, b"between"))
    received, pongs = [], 0
    while len(received) < len(blobs) or not pongs:
        item = client.receive_frame()
        if item.opcode is Opcode.PONG:
            pongs += 1
        else:
            received.append(bytes(item.data))
    assert received == blobs


def test_a_client_that_never_reads(secure: Served) -> None:
    client = secure.websocket(receive_buffer=4096)
    session = secure.session(client)
    while not secure.app.closed:
        session.send(message(b"x" * 100_000))
        gevent.sleep(0)
        assert session.transport.waiting <= 10_000_000
    secure.wait_closed("slow consumer")


def test_closing_both_ways(secure: Served) -> None:
    client = secure.websocket()
    secure.session(client).close()
    assert client.closed() == 1000
    client = secure.websocket()
    client.send_raw(frame(Opcode.CLOSE, b"\x03\xe9"))
    assert client.closed() == 1001
    wait_until(lambda: secure.app.reasons == ["forced close", "transport close"])


def test_a_failure_can_be_read(secure: Served) -> None:
    client = secure.websocket(answers=False)
    client.send_raw(text("4x", mask=False), text("4" + "x" * 50_000))
    secure.wait_closed("parse error")
    client.send_raw(text("4" + "x" * 50_000))
    assert client.closed() == 1002


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_websocket_that_just_goes(secure: Served, how: str) -> None:
    client = secure.websocket()
    getattr(client, how)()
    wait_until(lambda: secure.app.closed, what="the end of the session")
    assert secure.app.reasons[0] in ("transport close", "transport error")


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_hangs_up_on_its_get(secure: Served, how: str) -> None:
    client = secure.poller()
    client.start_get()
    secure.wait_polled(client)
    getattr(client.getting, how)()
    secure.wait_closed("transport close")


def test_a_client_that_takes_its_leave_of_tls(
    secure: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last record, which nobody reads while a GET waits, hides the end of the connection."""
    monkeypatch.setattr(server, "_GLANCE", 2 * UNIT)
    client = secure.poller()
    client.start_get()
    secure.wait_polled(client)
    client.getting.sock.settimeout(0.0)
    with suppress(ssl.SSLError, OSError):
        client.getting.sock.unwrap()
    gevent.sleep(UNIT)  # as a record of its own
    client.getting.close()
    secure.wait_closed("transport close")
    wait_until(lambda: secure.server.connections == 1, what="the end of the connection")


def test_pausing(secure: Served) -> None:
    client = secure.websocket()
    session = secure.session(client)
    session.pause()
    client.send(*(f"4{number:>700}" for number in range(100)))
    assert secure.poller().post("4other").body == b"ok"
    assert secure.app.messages == ["other"]
    session.resume()
    wait_until(lambda: len(secure.app.messages) == 101, what="all messages")


def test_an_upgrade(secure: Served) -> None:
    poller = secure.poller()
    session = secure.session(poller)
    client = probe(secure, poller)
    session.send(message("queued"))
    client.send("5", "4hello")
    assert [client.receive(), client.receive()] == ["4queued", "4hello"]


FATAL_ALERT = b"\x15\x03\x01\x00\x02\x02\x28"


def test_a_failed_handshake_costs_nobody_else(secure: Served) -> None:
    other = secure.websocket()
    for data in (b"", b"\x16\x03\x01", request("GET", "/"), bytes(100), FATAL_ALERT):
        for how in ("close", "reset"):
            client = Http(secure.address)
            client.send(data)
            getattr(client, how)()
            other.send("4still here")
            assert other.receive() == "4still here"
    distrustful = ssl.create_default_context()
    distrustful.check_hostname = False
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        Http(secure.address, context=distrustful)
    assert secure.websocket().handshake


def test_a_handshake_that_stalls(secure: Served) -> None:
    secure.server.head_timeout = 4 * UNIT
    client = socket.create_connection(secure.address, timeout=200 * UNIT)
    try:
        client.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert client.recv(100) == b""
    finally:
        client.close()
