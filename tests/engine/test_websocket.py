"""The WebSocket transport: RFC 6455, and Engine.IO's packets over it ("WebSocket")."""

import contextlib
import hashlib
import random
import socket
import struct
import tracemalloc
from collections.abc import Callable

import gevent
import pytest
from websockets.frames import Opcode

from django_socketio.engine import Session, State
from django_socketio.protocol.exceptions import ProtocolError
from tests.support import UNIT, wait_until

from .clients import PATH, frame, text
from .resources import KEPT_GREENLETS, Resources
from .served import Served, echo, lanes, message
from .test_handshake import UPGRADE

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG


@pytest.fixture
def echoing(served: Served) -> Served:
    served.app.answer = echo
    return served


# Messages


def test_text_and_binary_both_ways(echoing: Served) -> None:
    client = echoing.websocket()
    for sent in ("4", "4hello", "4\u2028drei \U0001f600", b"", b"\x00\x1e\xff", bytes(range(256))):
        client.send(sent)
        assert client.receive() == sent
    assert echoing.app.messages[1] == "hello"


# Lengths around those at which the header changes (RFC 6455, 5.2).
LENGTHS = [0, 1, 124, 125, 126, 127, 128, 65534, 65535, 65536, 65537, 99_999]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_of_length(echoing: Served, length: int) -> None:
    client = echoing.websocket()
    for sent in ("4" + "x" * length, b"\xfe" * length):
        client.send(sent)
        assert client.receive() == sent


def test_a_length_longer_than_needed(echoing: Served) -> None:
    """RFC 6455, 5.2 wants the shortest form; what matters is that both ends agree where it ends."""
    client = echoing.websocket()
    unmasked = bytes(4) + b"4one"
    client.send_raw(b"\x81\xfe" + struct.pack("!H", 4) + unmasked, text("4two"))
    client.send_raw(b"\x81\xff" + struct.pack("!Q", 4) + unmasked, text("4two"))
    assert [client.receive() for _ in range(4)] == ["4one", "4two"] * 2


def test_several_messages_in_one_segment(echoing: Served) -> None:
    client = echoing.websocket()
    sent: list[str | bytes] = ["4one", b"two", "4three", "4" * 200, b"\x81" * 300, "4six"]
    client.send(*sent)
    assert [client.receive() for _ in sent] == sent


def test_what_is_sent_in_one_turn_leaves_in_one_segment(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    for number in range(100):
        session.send(message(f"{number:>10}"))
    assert len(client.http.receive()) == 100 * 13


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_message_over_many_segments(echoing: Served, size: int) -> None:
    client = echoing.websocket()
    sent: list[str | bytes] = ["4hello", b"\x00\x01", "4" + "x" * 130, "4", b""]
    kinds = {str: TEXT, bytes: BINARY}
    client.http.send_in_pieces(b"".join(frame(kinds[type(item)], item) for item in sent), size)
    assert [client.receive() for _ in sent] == sent


def test_a_large_message_over_many_segments(echoing: Served) -> None:
    client = echoing.websocket()
    sent = "4" + "".join(chr(number) for number in range(32, 20_000))
    client.http.send_in_pieces(text(sent), 1_000)
    assert client.receive() == sent


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6, 7, 11])
def test_messages_behind_one_that_is_cut(echoing: Served, cut: int) -> None:
    client = echoing.websocket()
    whole, split = text("4whole"), text("4split")
    client.http.send(whole + whole + split[:cut])
    assert [client.receive(), client.receive()] == ["4whole"] * 2
    client.http.send(split[cut:] + whole)
    assert [client.receive(), client.receive()] == ["4split", "4whole"]


def test_frames_in_the_segment_of_the_request(echoing: Served) -> None:
    client = echoing.websocket(behind=text("4first") + frame(PING, b"?") + text("4second"))
    frames = [client.receive_frame() for _ in range(3)]
    assert sorted(bytes(item.data) for item in frames) == [b"4first", b"4second", b"?"]
    assert echoing.app.messages == ["first", "second"]


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 11])
def test_half_a_frame_in_the_segment_of_the_request(echoing: Served, cut: int) -> None:
    first = text("4first")
    client = echoing.websocket(behind=first[:cut])
    client.http.send(first[cut:])
    assert client.receive() == "4first"


def test_a_request_byte_by_byte(echoing: Served) -> None:
    client = echoing.http()
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "x", **UPGRADE}.items())
    request = f"GET {PATH}websocket HTTP/1.1\r\n{head}\r\n".encode() + text("4hello")
    assert client.send_in_pieces(request).answer().status == 101
    wait_until(lambda: echoing.app.messages == ["hello"], what="the message")


def test_fragments_with_control_frames_between(echoing: Served) -> None:
    """RFC 6455, 5.4."""
    client = echoing.websocket()
    client.send_raw(frame(TEXT, "4one ", fin=False), frame(PING, b"1"), frame(CONT, "", fin=False))
    client.send_raw(frame(PONG, b"unasked"), frame(CONT, "two ", fin=False), frame(PING, b"2"))
    client.send_raw(frame(CONT, "three"))
    frames = [client.receive_frame() for _ in range(3)]
    assert sorted((item.opcode, item.data) for item in frames) == [
        (TEXT, b"4one two three"),
        (PONG, b"1"),
        (PONG, b"2"),
    ]


def test_a_pong_goes_before_the_answer_to_the_message_around_the_ping(echoing: Served) -> None:
    client = echoing.websocket()
    client.send_raw(frame(TEXT, "4one ", fin=False), frame(PING, b"1"), frame(CONT, "two"))
    assert [client.receive_frame().opcode for _ in range(2)] == [PONG, TEXT]


def test_binary_fragments_and_then_text(echoing: Served) -> None:
    client = echoing.websocket()
    client.send_raw(frame(BINARY, b"a", fin=False), frame(CONT, b"b"), text("4c"))
    assert [client.receive(), client.receive()] == [b"ab", "4c"]


def test_a_character_in_two_fragments(echoing: Served) -> None:
    client = echoing.websocket()
    data = "4\U0001f600".encode()
    client.send_raw(frame(TEXT, data[:3], fin=False), frame(CONT, data[3:]))
    assert client.receive() == "4\U0001f600"


def test_a_ping_is_answered_with_its_data(echoing: Served) -> None:
    """RFC 6455, 5.5.2 and 5.5.3."""
    client = echoing.websocket()
    for data in (b"", b"x", bytes(125)):
        client.send_raw(frame(PING, data))
        answer = client.receive_frame()
        assert (answer.opcode, answer.data) == (PONG, data)


def test_each_client_gets_its_own(echoing: Served) -> None:
    clients = [echoing.websocket() for _ in range(50)]
    for client in clients:
        client.send(f"4{client.sid}")
    assert [client.receive() for client in clients] == [f"4{client.sid}" for client in clients]


def test_one_frame_object_goes_to_all(served: Served) -> None:
    clients = [served.websocket() for _ in range(20)]
    shared = message("everybody")
    for client in clients:
        served.session(client).send(shared)
    assert {client.receive() for client in clients} == {"4everybody"}


# The end


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_the_client_closes(echoing: Served, code: int) -> None:
    client = echoing.websocket()
    client.send_raw(text("4last"), frame(CLOSE, struct.pack("!H", code) + b"bye"), text("4late"))
    assert client.receive() == "4last"
    assert client.closed() == code
    echoing.wait_closed("transport close")
    assert echoing.app.messages == ["last"]


def test_the_client_closes_without_a_code(echoing: Served) -> None:
    client = echoing.websocket()
    client.send_raw(frame(CLOSE))
    assert client.closed() == 1005
    echoing.wait_closed("transport close")


def test_the_client_closes_within_a_message(echoing: Served) -> None:
    """As it may: a close frame is a control frame (RFC 6455, 5.4). There is no rest to wait for."""
    client = echoing.websocket()
    client.send_raw(frame(TEXT, "4half", fin=False), frame(CLOSE, b"\x03\xe8"), frame(CONT, "4x"))
    assert client.closed() == 1000
    echoing.wait_closed("transport close")
    assert echoing.app.messages == []


def test_a_close_packet(echoing: Served) -> None:
    client = echoing.websocket()
    client.send("4last", "1", "4late")
    assert client.receive() == "4last"
    assert client.closed() == 1000
    echoing.wait_closed("transport close")
    assert echoing.app.messages == ["last"]


def test_the_server_closes(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    session.send(message("last words"))
    session.close()
    session.send(message("too late"))
    assert client.receive() == "4last words"
    assert client.closed() == 1000
    served.wait_closed("forced close")
    assert session.transport.closed


def test_the_server_waits_a_while_for_the_clients_close(serve: Callable[..., Served]) -> None:
    served = serve(close_timeout=3 * UNIT)
    client = served.websocket(answers=False)
    session = served.session(client)
    session.close()
    assert served.app.reasons == ["forced close"]  # the application need not wait
    assert not session.transport.closed
    assert client.closed() == 1000
    assert session.transport.closed


def test_the_end_of_the_engine_waits_for_nobody(served: Served) -> None:
    closing, other = served.websocket(answers=False), served.websocket()
    sessions = [served.session(closing), served.session(other)]
    sessions[0].close()
    served.engine.stop()
    assert [session.transport.closed for session in sessions] == [True, True]
    assert [closing.closed(), other.closed()] == [1000, None]
    assert served.app.reasons == ["forced close", "server shutting down"]


def test_what_comes_while_the_server_closes_is_dropped(served: Served) -> None:
    client = served.websocket(answers=False)
    session = served.session(client)
    session.close()
    client.send("4crossed it", b"too", "7", "1")
    client.send_raw(frame(TEXT, "4also", fin=False), frame(CONT, "this"))
    client.send_raw(frame(CLOSE, b"\x03\xe8"))
    assert client.closed() == 1000
    assert served.app.messages == []
    assert served.app.reasons == ["forced close"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_client_just_goes(served: Served, how: str) -> None:
    client = served.websocket()
    getattr(client, how)()
    served.wait_closed("transport close" if how == "close" else "transport error")


def test_the_client_just_goes_and_the_server_sends(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    client.reset()
    session.send(message("to whom?"))
    wait_until(lambda: served.app.closed, what="the end of the session")
    assert served.app.reasons[0] in ("transport error", "transport close")


def test_it_is_closed_once(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    session.close("first")
    session.close("second")
    session.end("third")
    session.fail("fourth")
    session.send(message("fifth"))
    session.pause()
    session.resume()
    session.ping()
    assert client.closed() in (1000, None)
    assert served.app.reasons == ["first"]


def test_the_application_ends_a_session_from_its_message(served: Served) -> None:
    served.app.answer = lambda session, data: session.end("enough")
    client = served.websocket()
    with contextlib.suppress(ConnectionError):
        client.send("4one", "4two", b"three")
        client.closed()
    served.wait_closed("enough")
    assert served.app.messages == ["one"]


def test_the_application_closes_a_session_from_its_message(served: Served) -> None:
    def farewell(session: Session, data: str | bytes) -> None:
        session.send(message("bye"))
        session.close("enough")

    served.app.answer = farewell
    client = served.websocket()
    client.send("4one", "4two", b"three")
    assert client.receive() == "4bye"
    assert client.closed() == 1000
    served.wait_closed("enough")
    assert served.app.messages == ["one"]


# Failures of the client. It can read why.

ANNOUNCED = b"\x82\xff" + struct.pack("!Q", 2**63 - 1) + b"mask"
INVALID_UTF8 = b"4\xc0\xaf"

FAILURES = {
    "unmasked": (1002, text("4hello", mask=False)),
    "unmasked and long": (1002, text("4" * 200, mask=False)),
    "unmasked and very long": (1002, text("4" * 70_000, mask=False)),
    "unmasked and empty": (1002, frame(TEXT, mask=False)),
    "unmasked ping": (1002, frame(PING, mask=False)),
    "RSV1": (1002, text("4hello", rsv=4)),
    "RSV2": (1002, text("4hello", rsv=2)),
    "RSV3": (1002, text("4hello", rsv=1)),
    "RSV1 on a ping": (1002, frame(PING, rsv=4)),
    "a reserved opcode": (1002, b"\x83\x80mask"),
    "a reserved control opcode": (1002, b"\x8b\x80mask"),
    "a ping in fragments": (1002, b"\x09\x80mask"),
    "a long ping": (1002, b"\x89\xfe\x00\x7emask" + bytes(126)),
    "a continuation of nothing": (1002, frame(CONT, "4hello")),
    "text within fragments": (1002, frame(TEXT, "4a", fin=False) + text("4b")),
    "a close of one byte": (1002, frame(CLOSE, b"\x03")),
    "a close with code 1005": (1002, frame(CLOSE, struct.pack("!H", 1005))),
    "a close with code 999": (1002, frame(CLOSE, struct.pack("!H", 999))),
    "a close with code 5000": (1002, frame(CLOSE, struct.pack("!H", 5000))),
    "a close with a bad reason": (1007, frame(CLOSE, b"\x03\xe8\xff")),
    "invalid UTF-8": (1007, text(INVALID_UTF8)),
    "invalid UTF-8 in fragments": (1007, frame(TEXT, INVALID_UTF8, fin=False) + frame(CONT)),
    "a lone surrogate": (1007, text(b"4\xed\xa0\x80")),
    "half a character": (1007, text(b"4\xe2\x82")),
    "2**63-1 bytes": (1009, ANNOUNCED),
    "2**64-1 bytes": (1009, b"\x82\xff" + b"\xff" * 8 + b"mask"),
    "one byte too many": (1009, b"\x81\xff" + struct.pack("!Q", 100_001)),
    "one byte too many in fragments": (
        1009,
        frame(TEXT, b"4" * 60_000, fin=False) + b"\x80\xfe" + struct.pack("!H", 40_001),
    ),
}


@pytest.mark.parametrize("before", [False, True], ids=["", "after a message"])
@pytest.mark.parametrize(("code", "data"), FAILURES.values(), ids=FAILURES.keys())
def test_a_broken_frame(echoing: Served, code: int, data: bytes, before: bool) -> None:
    client, other = echoing.websocket(), echoing.websocket()
    if before:
        client.send_raw(text("4before"), data)
        assert client.receive() == "4before"
    else:
        client.send_raw(data)
    assert client.closed() == code
    wait_until(lambda: echoing.app.closed, what="the end of the session")
    assert echoing.app.reasons[0] in ("parse error", "transport close")
    assert echoing.app.messages == ["before"] * before
    other.send("4still here")
    assert other.receive() == "4still here"


@pytest.mark.parametrize("code", [1002, 1007, 1009])
def test_the_reason_of_a_failure_survives_more_data(echoing: Served, code: int) -> None:
    """Closing with unread input would reset the connection and take the close frame with it."""
    data = {1002: text("4x", mask=False), 1007: text(INVALID_UTF8), 1009: ANNOUNCED}[code]
    client = echoing.websocket(answers=False)
    client.send_raw(data, text("4" + "x" * 50_000) * 3)
    for _ in range(5):
        client.send_raw(text("4" + "x" * 50_000))
    client.http.sock.shutdown(socket.SHUT_WR)
    assert client.closed() == code
    assert echoing.app.messages == []


def test_a_client_that_will_not_go_after_a_failure(serve: Callable[..., Served]) -> None:
    served = serve(close_timeout=3 * UNIT)
    client = served.websocket(answers=False)
    session = served.session(client)
    client.send_raw(text("4x", mask=False))
    assert client.closed() == 1002
    wait_until(lambda: session.transport.closed, what="the end of the connection")


@pytest.mark.parametrize(("code", "data"), FAILURES.values(), ids=FAILURES.keys())
def test_a_broken_frame_in_the_segment_of_the_request(
    echoing: Served, code: int, data: bytes
) -> None:
    """CVE-2022-21676."""
    client, other = echoing.websocket(behind=data), echoing.websocket()
    assert client.closed() == code
    wait_until(lambda: echoing.app.closed, what="the end of the session")
    other.send("4still here")
    assert other.receive() == "4still here"


def test_a_large_message_is_refused_by_its_header(echoing: Served) -> None:
    """CVE-2016-10542: before the body, of which nothing need come."""
    client = echoing.websocket()
    client.send_raw(b"\x82\xff" + struct.pack("!Q", 100_001))
    assert client.closed() == 1009
    echoing.wait_closed("parse error")


def test_a_message_of_max_payload(serve: Callable[..., Served]) -> None:
    served = serve(max_payload=10_000)
    client = served.websocket()
    client.send("4" + "x" * 9_999, b"y" * 10_000)
    client.send_raw(frame(TEXT, b"4" + b"z" * 4_999, fin=False), frame(CONT, b"z" * 5_000))
    wait_until(lambda: len(served.app.messages) == 3, what="the messages")
    assert served.app.messages == ["x" * 9_999, b"y" * 10_000, "z" * 9_999]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("before", [False, True], ids=["", "after a message"])
def test_a_message_over_max_payload(
    serve: Callable[..., Served], opcode: Opcode, before: bool
) -> None:
    """All of it has come, in one segment."""
    served = serve(max_payload=1_000)
    client = served.websocket()
    client.send_raw(text("4before") * before, frame(opcode, "4" + "x" * 1_000), text("4behind"))
    assert client.closed() == 1009
    served.wait_closed("parse error")
    assert served.app.messages == ["before"] * before


@pytest.mark.parametrize("piece", [b"", b"xy"])
def test_endless_fragments(serve: Callable[..., Served], piece: bytes) -> None:
    """CVE-2026-48779 and -62389: the bookkeeping must not outgrow the message."""
    served = serve(max_payload=1_000_000, max_fragments=1_000_000)
    client = served.websocket()
    client.send_raw(frame(TEXT, b"4", fin=False))
    fragments, count = frame(CONT, piece, fin=False) * 1_000, 100
    tracemalloc.start()
    try:
        for _ in range(count):
            client.send_raw(fragments)
            gevent.idle()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # Beside the message, and room for it to grow, there is what one read may hold.
    assert kept < 2 * count * 1_000 * len(piece) + 300_000
    client.send_raw(frame(CONT, "end"))
    wait_until(lambda: served.app.messages, what="the message")
    assert served.app.messages == [(piece * count * 1_000).decode() + "end"]


# Engine.IO's packets


@pytest.mark.parametrize(
    "packet", ["", "7", "hello", "2", "2probe", "0", "0{}", "5", "\x00", "b4AA==", "\U0001f600"]
)
def test_a_packet_that_is_none(echoing: Served, packet: str) -> None:
    client = echoing.websocket()
    client.send("4before", packet, "4behind")
    assert client.receive() == "4before"
    assert client.closed() == 1000
    echoing.wait_closed("parse error")
    assert echoing.app.messages == ["before"]


def test_a_message_that_the_application_refuses(served: Served) -> None:
    def refuse(session: Session, data: str | bytes) -> None:
        raise ProtocolError("not like this")

    served.app.answer = refuse
    client = served.websocket()
    client.send("4one", "4two", b"three")
    assert client.closed() == 1000
    served.wait_closed("parse error")
    assert served.app.messages == ["one"]


def test_a_noop_means_nothing(echoing: Served) -> None:
    client = echoing.websocket()
    client.send("6", "4hello")
    assert client.receive() == "4hello"


@pytest.mark.parametrize("pong", [text("3"), frame(PONG, b"x")], ids=["packets", "frames"])
def test_a_flood_of_pongs(echoing: Served, pong: bytes) -> None:
    """CVE-2026-48802: each started a heartbeat of its own."""
    client = echoing.websocket()
    before = Resources.now(), lanes(echoing)
    for _ in range(10):
        client.send_raw(pong * 1_000)
    client.send("4still here")
    assert client.receive() == "4still here"
    after = Resources.now()
    assert after.greenlets <= before[0].greenlets
    assert after.watchers <= before[0].watchers
    assert lanes(echoing) == before[1]


def test_a_flood_of_pings(echoing: Served) -> None:
    client = echoing.websocket()
    for _ in range(100):
        client.send_raw(frame(PING, b"x") * 10)
        assert [client.receive_frame().opcode for _ in range(10)] == [PONG] * 10
    client.send("4still here")
    assert client.receive() == "4still here"


def test_pings_whose_pongs_nobody_reads(serve: Callable[..., Served]) -> None:
    """Each frame of the client costs the server one: also these answers are bounded."""
    served = serve(max_buffer=50_000)
    client = served.websocket(answers=False, receive_buffer=4096)
    session = served.session(client)
    session.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pings = frame(PING, bytes(125)) * 100
    with contextlib.suppress(ConnectionError):
        while not served.app.closed:
            client.send_raw(pings)
            gevent.sleep(0)
            assert session.transport.waiting <= 50_000 + 127
    served.wait_closed("slow consumer")


# Slow and large


def test_a_client_that_never_reads(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=100_000)
    client, other = served.websocket(receive_buffer=4096), served.websocket()
    session = served.session(client)
    most = 0
    while session.state is State.OPEN:
        session.send(message("x" * 1_000))
        most = max(most, session.transport.waiting)
        gevent.sleep(0)
    assert 50_000 < most <= 100_000
    assert session.transport.waiting == 0
    served.wait_closed("slow consumer")
    served.session(other).send(message("still here"))
    assert other.receive() == "4still here"


def test_a_handler_that_sends_much_in_one_turn(serve: Callable[..., Served]) -> None:
    """The client is not slow: it had no chance to read."""
    served = serve(max_buffer=10_000)
    client = served.websocket()
    session = served.session(client)
    for number in range(100):
        session.send(message(f"{number:>999}"))
    assert [client.receive() for _ in range(100)] == [f"4{number:>999}" for number in range(100)]


@pytest.mark.parametrize("size", [50_000, 10_000_000])
@pytest.mark.parametrize("behind", [False, True])
def test_a_message_larger_than_the_buffer(
    serve: Callable[..., Served], size: int, behind: bool
) -> None:
    served = serve(max_buffer=10_000)
    client = served.websocket()
    session = served.session(client)
    data = random.Random(size).randbytes(size)
    session.send(message(data))
    if behind:
        session.send(message("behind"))
    assert hashlib.sha256(client.receive()).digest() == hashlib.sha256(data).digest()  # type: ignore[arg-type]
    if behind:
        assert client.receive() == "4behind"
    wait_until(lambda: session.transport.waiting == 0, what="an empty buffer")
    # It is no licence for the next ones.
    while session.state is State.OPEN:
        session.send(message("x" * 1_000))
        gevent.sleep(0)
        assert session.transport.waiting <= 10_000
    served.wait_closed("slow consumer")


def test_frames_stay_whole_whatever_goes_between(serve: Callable[..., Served]) -> None:
    """reliability.md: others let a PONG land inside a large message of another greenlet."""
    served = serve(max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536)
    session = served.session(client)
    blobs = [random.Random(seed).randbytes(700_000 + seed) for seed in range(15)]

    def send(share: list[bytes]) -> None:
        for blob in share:
            session.send(message(blob))
            session.ping()
            gevent.sleep(0)

    senders = [gevent.spawn(send, blobs[start::5]) for start in range(5)]
    pongs, received = 0, []
    for number in range(200):
        client.send_raw(frame(PING, str(number).encode()))
    while len(received) < len(blobs) or pongs < 200:
        item = client.receive_frame()
        if item.opcode is PONG:
            assert item.data == str(pongs).encode()
            pongs += 1
        elif item.opcode is BINARY:
            received.append(hashlib.sha256(item.data).digest())
        else:
            assert item.data == b"2"
    gevent.joinall(senders, raise_error=True)
    assert sorted(received) == sorted(hashlib.sha256(blob).digest() for blob in blobs)


def test_a_close_behind_a_large_message(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536)
    session = served.session(client)
    data = random.Random(1).randbytes(10_000_000)
    session.send(message(data))
    session.close()
    assert client.receive() == data
    assert client.closed() == 1000
    served.wait_closed("forced close")


def test_the_clients_close_within_a_large_message(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536)
    data = random.Random(1).randbytes(10_000_000)
    served.session(client).send(message(data))
    gevent.sleep(0)
    client.send_raw(frame(CLOSE, b"\x03\xe8"))
    assert client.receive() == data
    assert client.closed() == 1000
    served.wait_closed("transport close")


def test_both_close_at_once_behind_a_large_message(serve: Callable[..., Served]) -> None:
    """Then the server has nothing to wait for once all has left."""
    served = serve(max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536, answers=False)
    session = served.session(client)
    data = random.Random(1).randbytes(10_000_000)
    session.send(message(data))
    session.close()
    client.send_raw(frame(CLOSE, b"\x03\xe8"))
    assert client.receive() == data
    assert client.closed() == 1000
    assert session.transport.closed


# Back-pressure


def test_a_paused_session_reads_nothing(echoing: Served) -> None:
    client = echoing.websocket()
    session = echoing.session(client)
    session.pause()
    client.send("4held back")
    other = echoing.websocket()
    for _ in range(3):
        other.send("4other")
        assert other.receive() == "4other"
    assert "held back" not in echoing.app.messages
    session.send(message("one way only"))
    assert client.receive() == "4one way only"
    session.resume()
    assert client.receive() == "4held back"


def test_a_paused_session_slows_its_client_down(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    session.pause()
    client.http.sock.settimeout(4 * UNIT)
    with pytest.raises(TimeoutError):
        for _ in range(1_000):
            client.send(b"x" * 50_000)
    assert served.app.messages == []


def test_a_paused_session_can_be_closed(served: Served) -> None:
    client = served.websocket()
    session = served.session(client)
    session.pause()
    session.close()
    assert client.closed() == 1000
    assert session.transport.closed


def test_pausing_twice(echoing: Served) -> None:
    client = echoing.websocket()
    session = echoing.session(client)
    session.pause()
    session.pause()
    session.resume()
    session.resume()
    client.send("4hello")
    assert client.receive() == "4hello"


# Clients that crash


def test_bad_upgrades_that_are_reset(echoing: Served) -> None:
    """CVE-2022-41940: nothing is left of them, and others are served."""
    other = echoing.websocket()
    poller = echoing.poller()
    wait_until(lambda: echoing.server.connections == 2, what="idle connections")
    before = Resources.now()
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "x", **UPGRADE}.items())
    good = f"GET {PATH}websocket HTTP/1.1\r\n{head}\r\n".encode()
    probe = good.replace(b" HTTP", f"&sid={poller.sid} HTTP".encode())
    requests = [
        good,
        good + FAILURES["RSV2"][1],
        good.replace(b"13", b"8"),
        good.replace(b"EIO=4", b"EIO=3"),
        good[:-10],
        probe,
        probe + text("2probe") + FAILURES["RSV3"][1],
        probe + text("5"),
        b"GET / HTTP/1.1\r\n",
        b"",
    ]
    for number in range(1000):
        client = echoing.http()
        client.send(requests[number % len(requests)])
        if number % 3 == 0:
            gevent.sleep(0)
        client.reset()
        echoing.clients.remove(client)
    other.send("4still here")
    assert other.receive() == "4still here"
    assert poller.post("4and here").body == b"ok"
    assert poller.get() == ["4and here"]
    wait_until(lambda: len(echoing.engine.sessions) == 2, what="the end of the others")
    wait_until(lambda: echoing.server.connections == 2, what="the end of their connections")
    del client
    wait_until(lambda: Resources.now().descriptors <= before.descriptors, what="all descriptors")
    after = Resources.now()
    assert after.greenlets <= before.greenlets + KEPT_GREENLETS
    assert after.watchers <= before.watchers
