"""Permessage-deflate: RFC 7692, once for all recipients and bounded for all senders."""

import random
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame as WebSocketFrame, Opcode
from websockets.protocol import OPEN, Protocol, Side

from django_socketio.engine import Compression, Frame, Session
from django_socketio.engine.deflate import (
    ANSWER,
    DeflatedTransport,
    InvalidOffer,
    accepts,
    deflate,
    inflate,
)
from django_socketio.engine.frames import Keyed, LossyFrame
from django_socketio.engine.websocket import WebSocketTransport
from tests.support import wait_until

from .clients import PATH, Answer, WebSocket, frame, text
from .served import Served, echo, message
from .test_handshake import UPGRADE

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG
OFFERS = [ClientPerMessageDeflateFactory()]
LARGE = "4" + "every word of it again, " * 100
RSV1 = 4


@dataclass(frozen=True)
class Counting(Compression):
    """Knows what it was asked to compress."""

    asked: list[bytes] = field(default_factory=list)

    def compress(self, data: bytes) -> bytes | None:
        self.asked.append(data)
        return super().compress(data)


@pytest.fixture
def compressing(serve: Callable[..., Served]) -> Served:
    served = serve(compression=Counting(threshold=100))
    served.app.answer = echo
    return served


def deflated(data: str | bytes) -> bytes:
    """Return a message as a client compresses it."""
    encoder = zlib.compressobj(wbits=-15)
    data = data.encode() if isinstance(data, str) else data
    return (encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compressed(data: str | bytes, opcode: Opcode = TEXT) -> bytes:
    return frame(opcode, deflated(data), rsv=RSV1)


# What is agreed on


def handshake(served: Served, *offers: str) -> Answer:
    lines = {"Host": "x", **UPGRADE}
    head = [f"{name}: {value}" for name, value in lines.items()]
    head += [f"Sec-WebSocket-Extensions: {offer}" for offer in offers]
    request = f"GET {PATH}websocket HTTP/1.1\r\n" + "\r\n".join(head) + "\r\n\r\n"
    return served.http().send(request.encode()).answer()


ACCEPTED = [
    "permessage-deflate",
    "permessage-deflate; client_max_window_bits",  # Chromium, Safari, Node
    "permessage-deflate; client_max_window_bits=15",
    "permessage-deflate; client_max_window_bits=8",
    'permessage-deflate;client_max_window_bits="10"',
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
    "permessage-deflate; server_max_window_bits=15",
    "permessage-deflate; server_max_window_bits=12; client_max_window_bits",
    "permessage-deflate; server_max_window_bits=10, permessage-deflate",
    "permessage-deflate; unknown, permessage-deflate; client_max_window_bits",
    "x-webkit-deflate-frame, permessage-deflate",
    "one; a=b; c, two, permessage-deflate",
    ", ,permessage-deflate,,",
    "permessage-deflate  ;  client_max_window_bits  =  9",
]
DECLINED = [
    "",
    "x-webkit-deflate-frame",
    "permessage-bzip2",
    "Permessage-Deflate-not",
    "permessage-deflate; server_max_window_bits=11",  # smaller than that of the shared frame
    "permessage-deflate; server_max_window_bits=8, permessage-deflate; server_max_window_bits=9",
    "permessage-deflate; server_max_window_bits",
    "permessage-deflate; server_max_window_bits=16",
    "permessage-deflate; server_max_window_bits=012",
    "permessage-deflate; server_max_window_bits=-12",
    "permessage-deflate; server_max_window_bits=1e1",
    "permessage-deflate; client_max_window_bits=7",
    "permessage-deflate; client_max_window_bits=16",
    "permessage-deflate; client_max_window_bits=08",
    "permessage-deflate; client_max_window_bits=99999999999999999999",
    "permessage-deflate; server_no_context_takeover=1",
    "permessage-deflate; client_no_context_takeover=true",
    "permessage-deflate; client_max_window_bits; client_max_window_bits",
    "permessage-deflate; client_max_window_bits; client_max_window_bits=10",
    "permessage-deflate; unknown",
    "permessage-deflate; client_max_window_bits; unknown=1",
]
BROKEN = [
    "permessage-deflate;",
    "permessage-deflate; =1",
    "permessage-deflate; client_max_window_bits=",
    'permessage-deflate; client_max_window_bits="10',
    'permessage-deflate; client_max_window_bits="1 0"',
    'permessage-deflate; client_max_window_bits=""',
    "permessage-deflate client_max_window_bits",
    "permessage deflate",
    'foo; x=", permessage-deflate, "',
    "\xe4, permessage-deflate",
    "permessage-deflate\x0b",
    '"permessage-deflate"',
    ",",
    " , ;",
    # CVE-2021-32640 and GHSA-5v72-xg48-5rpm: how long a parser may take for 8 KB of anything.
    "," * 8000,
    "permessage-deflate, " * 400,
    "a;" * 4000,
    'a; b="' + "\\" * 8000,
    "permessage-deflate" + " " * 8000 + "x",
]


@pytest.mark.parametrize("offer", ACCEPTED)
def test_an_offer_that_is_accepted(compressing: Served, offer: str) -> None:
    answer = handshake(compressing, offer)
    assert answer.status == 101
    assert answer.headers["sec-websocket-extensions"] == ANSWER


def test_offers_in_two_headers(compressing: Served) -> None:
    answer = handshake(compressing, "foo; bar", "permessage-deflate; client_max_window_bits")
    assert answer.headers["sec-websocket-extensions"] == ANSWER


@pytest.mark.parametrize("offer", DECLINED)
def test_an_offer_that_is_declined(compressing: Served, offer: str) -> None:
    """The client is served, but for that."""
    answer = handshake(compressing, offer)
    assert answer.status == 101
    assert "sec-websocket-extensions" not in answer.headers


@pytest.mark.parametrize("offer", BROKEN, ids=lambda offer: offer[:40])
def test_an_offer_that_is_none(compressing: Served, offer: str) -> None:
    """RFC 6455, 9.1: the connection fails."""
    with pytest.raises(InvalidOffer):
        accepts(offer)
    if offer.strip(" ") == offer and offer.isascii() and offer.isprintable():
        answer = handshake(compressing, offer)
        assert answer.status == 400
        assert answer.json["message"] == "Bad request"
    assert handshake(compressing).status == 101


@pytest.mark.parametrize("offer", [*ACCEPTED, *BROKEN[:8]])
def test_without_compression_no_offer_is_looked_at(served: Served, offer: str) -> None:
    answer = handshake(served, offer)
    assert answer.status == 101
    assert "sec-websocket-extensions" not in answer.headers


@given(st.text(alphabet=st.sampled_from('permessage-deflate;,= "\\_891\t'), max_size=200))
def test_any_offer_is_one_or_none(offer: str) -> None:
    try:
        assert accepts(offer) in (True, False)
    except InvalidOffer:
        pass


# What is sent


@dataclass
class Seen:
    """A frame on the wire."""

    opcode: int
    rsv1: bool
    payload: bytes

    @property
    def data(self) -> bytes:
        return inflate(self.payload, 2**24) if self.rsv1 else self.payload


def on_the_wire(data: bytes) -> Iterator[Seen]:
    while data:
        head, length, start = data[0], data[1], 2
        if length == 126:
            (length,), start = struct.unpack_from("!H", data, 2), 4
        elif length == 127:
            (length,), start = struct.unpack_from("!Q", data, 2), 10
        yield Seen(head & 0x0F, bool(head & 0x40), data[start : start + length])
        data = data[start + length :]


def read_by_a_client(data: bytes) -> list[WebSocketFrame]:
    """Return what a client reads that has reserved the window which we asked it to."""
    client = Protocol(Side.CLIENT, state=OPEN, max_size=None)
    (offer,) = OFFERS
    parameters = [tuple(item.strip().split("=")) for item in ANSWER.split(";")[1:]]
    agreed = [(item[0], item[1] if len(item) > 1 else None) for item in parameters]
    client.extensions = [offer.process_response_params(agreed, [])]
    client.receive_data(data)
    events: list[Any] = client.events_received()
    assert client.parser_exc is None
    return events


@given(st.lists(st.binary(max_size=3000) | st.sampled_from([b"x" * 70_000, b""]), max_size=3))
def test_a_client_reads_what_was_compressed(messages: list[bytes]) -> None:
    item = Frame(b"4[]", *messages)
    events = read_by_a_client(item.deflated(Compression(threshold=0)))
    assert [bytes(event.data) for event in events] == [b"4[]", *messages]
    assert [event.opcode for event in events] == [TEXT] + [BINARY] * len(messages)


@pytest.mark.parametrize("level", range(1, 10))
def test_a_large_message_refers_back_no_further_than_agreed(level: int) -> None:
    words = [random.Random(seed).randbytes(40) for seed in range(300)]  # 12 kB, again and again
    data = b"".join(random.Random(1).choices(words, k=20_000))
    item = Frame(None, data)
    (event,) = read_by_a_client(item.deflated(Compression(level=level)))
    assert event.data == data


def test_compressed_once_for_all(compressing: Served) -> None:
    clients = [compressing.websocket(offers=OFFERS) for _ in range(20)]
    plain = compressing.websocket()
    counting: Any = compressing.config.compression
    counting.asked.clear()
    shared = message(LARGE[1:])
    for client in (*clients, plain):
        compressing.session(client).send(shared)
    assert {client.receive() for client in (*clients, plain)} == {LARGE}
    assert counting.asked == [LARGE.encode()]


def test_who_gets_what(compressing: Served) -> None:
    agreed, plain = compressing.websocket(offers=OFFERS), compressing.websocket()
    assert type(compressing.session(agreed).transport) is DeflatedTransport
    assert type(compressing.session(plain).transport) is WebSocketTransport
    for client, rsv1 in (agreed, True), (plain, False):
        compressing.session(client).send(message(LARGE[1:]))
        (seen,) = on_the_wire(client.http.receive())
        assert (seen.opcode, seen.rsv1, seen.data) == (TEXT, rsv1, LARGE.encode())
        assert len(seen.payload) < len(LARGE) / 10 or not rsv1


def sent(data: str | bytes, **options: int) -> list[Seen]:
    item = Frame(data.encode()) if isinstance(data, str) else Frame(None, data)
    return list(on_the_wire(item.deflated(Compression(**options))))


def test_from_the_threshold_to_the_limit() -> None:
    sizes = (99, 100, 200, 201)
    frames = [sent("x" * size, threshold=100, limit=200)[0] for size in sizes]
    assert [item.rsv1 for item in frames] == [False, True, True, False]
    assert [item.data for item in frames] == [b"x" * size for size in sizes]


def test_what_would_grow_stays_as_it_is() -> None:
    noise = random.Random(1).randbytes(5000)
    (seen,) = sent(noise)
    assert (seen.rsv1, seen.payload) == (False, noise)


def test_attachments_each_by_itself() -> None:
    noise, small, zeros = random.Random(1).randbytes(5000), b"x" * 99, bytes(5000)
    item = Frame(LARGE.encode(), noise, small, zeros)
    frames = list(on_the_wire(item.deflated(Compression(threshold=100))))
    assert [seen.rsv1 for seen in frames] == [True, False, False, True]
    assert [seen.opcode for seen in frames] == [TEXT, BINARY, BINARY, BINARY]
    assert [seen.data for seen in frames] == [LARGE.encode(), noise, small, zeros]


def test_a_frame_that_nobody_compresses() -> None:
    item = Frame.message(LARGE.encode(), bytes(5000))
    item.never_deflate()
    assert item.deflated(Compression()) is item.websocket


def test_a_frame_of_which_nothing_is_compressed_is_kept_once() -> None:
    item = message("short")
    assert item.deflated(Compression()) is item.websocket


def test_only_the_latest_waits_for_a_client_that_is_behind(serve: Callable[..., Served]) -> None:
    """Compressed frames are left out as others are."""
    served = serve(compression=Compression(), max_buffer=10_000_000)
    client = served.websocket(offers=OFFERS, receive_buffer=4096)
    transport = served.session(client).transport
    transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    noise = [random.Random(number).randbytes(100_000).hex() for number in range(20)]
    dropped: list[int] = []
    for number, item in enumerate(noise):
        lossy = LossyFrame(
            item.encode(), key="k", dropped=lambda number=number: dropped.append(number)
        )
        transport.send_lossy(lossy)
        transport.flush()
        assert isinstance(lossy.deflated(Compression()), Keyed)
    received = []
    while not received or received[-1] != "4" + noise[-1]:
        received.append(client.receive())
    assert len(received) + len(dropped) == 20
    assert dropped and [f"4{item}" for i, item in enumerate(noise) if i not in dropped] == received


def test_pings_stay_as_they_are(compressing: Served) -> None:
    client = compressing.websocket(offers=OFFERS)
    compressing.session(client).ping()
    assert [(item.rsv1, item.payload) for item in on_the_wire(client.http.receive())] == [
        (False, b"2")
    ]


def test_after_an_upgrade(compressing: Served) -> None:
    poller = compressing.poller()
    session = compressing.session(poller)
    session.send(message(LARGE[1:]))
    client = compressing.upgrade(poller, offers=OFFERS)
    client.send_raw(compressed("2probe"))
    assert client.receive() == "3probe"
    client.send_raw(compressed("5"))
    assert client.receive() == LARGE  # what polling had not fetched
    assert type(session.transport) is DeflatedTransport
    session.send(message(LARGE[1:]))
    (seen,) = on_the_wire(client.http.receive())
    assert (seen.rsv1, seen.data) == (True, LARGE.encode())
    client.send_raw(compressed(LARGE))
    assert client.receive() == LARGE


def test_what_waits_is_counted_as_it_leaves(serve: Callable[..., Served]) -> None:
    """A client who takes compressed messages may have more of them waiting."""
    served = serve(compression=Compression(), max_buffer=100_000)
    client = served.websocket(offers=OFFERS)
    transport = served.session(client).transport
    for _ in range(1000):  # 2.4 MB
        transport.send(message(LARGE[1:]))
    assert transport.waiting < 100_000
    assert [client.receive() for _ in range(1000)] == [LARGE] * 1000


# What is received


@pytest.fixture
def client(compressing: Served) -> WebSocket:
    return compressing.websocket(offers=OFFERS)


def test_text_and_binary(client: WebSocket) -> None:
    for sent in ("4", "4hello", "4" + "\U0001f600" * 2000, LARGE):
        client.send_raw(compressed(sent))
        assert client.receive() == sent
    for data in (b"", bytes(5000), random.Random(1).randbytes(5000)):
        client.send_raw(compressed(data, BINARY))
        assert client.receive() == data


def test_compressed_and_plain_messages_in_one_segment(
    compressing: Served, client: WebSocket
) -> None:
    compressed_, plain = compressed("4compressed"), text("4plain")
    client.send_raw(compressed_ * 2, plain, compressed_, plain * 2, frame(PING), compressed_)
    assert client.receive() == "4compressed"
    wait_until(lambda: len(compressing.app.messages) == 7, what="the messages")
    assert compressing.app.messages == [
        *["compressed"] * 2,
        "plain",
        "compressed",
        *["plain"] * 2,
        "compressed",
    ]


def test_many_in_one_segment_either_kind_in_turn(compressing: Served, client: WebSocket) -> None:
    client.send_raw((compressed("4c") + text("4p")) * 2000)
    wait_until(lambda: len(compressing.app.messages) == 4000, what="the messages")
    assert compressing.app.messages == ["c", "p"] * 2000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_message_over_many_segments(client: WebSocket, size: int) -> None:
    sent = ["4hello", "4" + "".join(map(chr, range(32, 1000))), "4"]
    client.http.send_in_pieces(b"".join(map(compressed, sent)), size)
    assert [client.receive() for _ in sent] == sent


def test_whole_texts_need_no_protocol_of_their_own(compressing: Served, client: WebSocket) -> None:
    """Which would be a kilobyte for every browser there is, as they compress the shortest."""
    for sent in (compressed("4"), text("4plain"), compressed(LARGE), compressed("4x") * 3):
        client.send_raw(sent)
        client.receive()
    transport: Any = compressing.session(client).transport
    assert transport._protocol is None


@pytest.mark.parametrize("sizes", [(1,), (5, 0, 1), (2000, 3, 2100)])
def test_compressed_fragments(client: WebSocket, sizes: tuple[int, ...]) -> None:
    noise = "4" + random.Random(1).randbytes(5000).hex()
    data, at, frames = deflated(noise), 0, []
    for size in sizes:
        frames.append((data[at : at + size], False))
        at += size
    frames.append((data[at:], True))
    for number, (part, fin) in enumerate(frames):
        opcode, rsv = (CONT, 0) if number else (TEXT, RSV1)
        client.send_raw(frame(opcode, part, fin=fin, rsv=rsv), frame(PING, b"between"))
    assert client.receive() == noise


def test_plain_fragments(client: WebSocket) -> None:
    client.send_raw(frame(TEXT, "4one ", fin=False), frame(CONT, "two"), compressed("4three"))
    assert [client.receive(), client.receive()] == ["4one two", "4three"]


@pytest.mark.parametrize("window", range(9, 16))
def test_any_window_of_the_clients(client: WebSocket, window: int) -> None:
    encoder = zlib.compressobj(wbits=-window)
    sent = "4" + "".join(random.Random(1).choices("abcdefgh", k=50_000))
    data = encoder.compress(sent.encode()) + encoder.flush(zlib.Z_SYNC_FLUSH)
    client.send_raw(frame(TEXT, data[:-4], rsv=RSV1))
    assert client.receive() == sent


def test_a_last_block_that_says_so(client: WebSocket) -> None:
    """RFC 7692, 7.2.3.4: a final block, and the byte of an empty one behind it."""
    encoder = zlib.compressobj(wbits=-15)
    data = encoder.compress(LARGE.encode()) + encoder.flush(zlib.Z_FINISH) + b"\x00"
    client.send_raw(frame(TEXT, data, rsv=RSV1))
    assert client.receive() == LARGE


def bomb(size: int) -> bytes:
    """Return the deflated form of `size` zeros, a thousandth of them, without making them."""
    encoder, block = zlib.compressobj(9, wbits=-15), bytes(2**20)
    parts = [encoder.compress(block) for _ in range(size // len(block))]
    parts += [encoder.compress(block[: size % len(block)]), encoder.flush(zlib.Z_SYNC_FLUSH)]
    return b"".join(parts)[:-4]


INVALID = b"\xff" * 20
FAILURES = {
    "a bomb": (1009, frame(TEXT, bomb(2**24), rsv=RSV1)),
    "a binary bomb": (1009, frame(BINARY, bomb(2**24), rsv=RSV1)),
    "one byte too many": (1009, frame(BINARY, bomb(100_001), rsv=RSV1)),
    "a bomb in the last fragment": (
        1009,
        frame(TEXT, b"", fin=False, rsv=RSV1) + frame(CONT, bomb(2**24)),
    ),
    "a bomb in the first fragment": (1009, frame(TEXT, bomb(2**24), fin=False, rsv=RSV1)),
    "a bomb in many fragments": (
        1009,
        frame(TEXT, b"", fin=False, rsv=RSV1)
        + b"".join(frame(CONT, bytes((byte,)), fin=False) for byte in bomb(2**20)),
    ),
    "fragments behind all that there may be": (
        1009,
        frame(BINARY, bomb(100_000), fin=False, rsv=RSV1) + frame(CONT, deflated(b"x")),
    ),
    "bombs of each fragment's own": (
        1009,
        frame(BINARY, bomb(60_000) + b"\x00\x00\xff\xff", fin=False, rsv=RSV1)
        + frame(CONT, bomb(60_000)),
    ),
    "no deflate": (1002, frame(TEXT, INVALID, rsv=RSV1)),
    "no deflate in fragments": (
        1002,
        frame(TEXT, INVALID[:1], fin=False, rsv=RSV1) + frame(CONT, INVALID),
    ),
    "invalid UTF-8": (1007, compressed(b"4\xc0\xaf")),
    "half a character in fragments": (
        1007,
        frame(TEXT, deflated(b"4\xe2\x82"), fin=False, rsv=RSV1) + frame(CONT, b""),
    ),
    "RSV1 on a ping": (1002, frame(PING, deflated(b"x"), rsv=RSV1)),
    "RSV1 on a close": (1002, frame(CLOSE, b"\x03\xe8", rsv=RSV1)),
    "RSV1 on a continuation": (
        1002,
        frame(TEXT, deflated("4"), fin=False, rsv=RSV1) + frame(CONT, b"", rsv=RSV1),
    ),
    "RSV1 on a continuation of plain text": (
        1002,
        frame(TEXT, "4", fin=False) + frame(CONT, deflated("x"), rsv=RSV1),
    ),
    "RSV1 and RSV2": (1002, frame(TEXT, deflated("4"), rsv=RSV1 | 2)),
    "RSV3": (1002, text("4", rsv=1)),
    "unmasked": (1002, frame(TEXT, deflated("4"), rsv=RSV1, mask=False)),
    "unmasked and long": (1002, frame(TEXT, deflated("4") * 200, rsv=RSV1, mask=False)),
    "more than there may be, compressed": (1009, b"\xc1\xff" + struct.pack("!Q", 100_001)),
    "2**63-1 bytes": (1009, b"\xc1\xff" + struct.pack("!Q", 2**63 - 1) + b"mask"),
}


@pytest.mark.parametrize(
    "before",
    [b"", compressed("4before"), text("4before") + frame(PING)],
    ids=["", "after a message", "after a ping"],
)
@pytest.mark.parametrize(("code", "data"), FAILURES.values(), ids=FAILURES.keys())
def test_a_broken_message(
    compressing: Served, client: WebSocket, code: int, data: bytes, before: bytes
) -> None:
    """CVE-2018-1000518: the limit was applied to what came, not to what it inflated to."""
    other = compressing.websocket(offers=OFFERS)
    client.send_raw(before, data, text("4behind"))
    assert client.closed() == code
    wait_until(lambda: compressing.app.closed, what="the end of the session")
    assert compressing.app.reasons == ["parse error"]
    assert compressing.app.messages == ["before"] * bool(before)
    other.send_raw(compressed("4still here"))
    assert other.receive() == "4still here"


@pytest.mark.parametrize("fragments", [1, 100])
def test_a_bomb_is_never_inflated(serve: Callable[..., Served], fragments: int) -> None:
    """900 kB that come to 900 MB."""
    served = serve(max_payload=1_000_000, compression=Compression())
    client = served.websocket(offers=OFFERS)
    data = bomb(900_000_000)
    assert len(data) < 1_000_000
    size = -(-len(data) // fragments)
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    last = len(parts) - 1
    frames = [
        frame(CONT if number else BINARY, part, fin=number == last, rsv=0 if number else RSV1)
        for number, part in enumerate(parts)
    ]
    tracemalloc.start()
    try:
        client.send_raw(*frames)
        assert client.closed() == 1009
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6_000_000  # what came, joined and unmasked, and what there may be
    served.wait_closed("parse error")


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_many_that_are_large_are_not_there_all_at_once(
    serve: Callable[..., Served], opcode: Opcode
) -> None:
    """60 kB that come to 60 MB, each of whose messages may be as large as that."""
    served = serve(max_payload=1_000_000, compression=Compression())
    sizes: list[int] = []

    def forget(session: Session, data: str | bytes) -> None:
        sizes.append(len(data))
        served.app.messages.clear()

    served.app.answer = forget
    client = served.websocket(offers=OFFERS)
    one = compressed(b"4" + bytes(999_999), opcode)
    tracemalloc.start()
    try:
        client.send_raw(one * 60)
        wait_until(lambda: len(sizes) == 60, what="the messages")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_as_much_as_there_may_be(compressing: Served, client: WebSocket) -> None:
    client.send_raw(frame(BINARY, bomb(100_000), rsv=RSV1))
    assert client.receive() == bytes(100_000)
    most = "4" + "x" * 99_999
    client.send_raw(compressed(most))
    assert client.receive() == most


@pytest.mark.parametrize("offers", [[], OFFERS])
def test_compressed_messages_of_a_client_with_whom_that_was_not_agreed(
    serve: Callable[..., Served], offers: list[Any]
) -> None:
    """Whether it is the server that does not want it, or the client that did not say so."""
    served = serve(compression=None if offers else Compression())
    client = served.websocket(offers=offers)
    client.send_raw(compressed("4hello"))
    assert client.closed() == 1002
    served.wait_closed("parse error")
    assert served.app.messages == []


def test_the_application_ends_a_session_from_its_message(
    compressing: Served, client: WebSocket
) -> None:
    def end(session: Session, data: str | bytes) -> None:
        session.end("enough")

    compressing.app.answer = end
    client.send_raw(compressed("4one") * 3, text("4two"))
    compressing.wait_closed("enough")
    assert compressing.app.messages == ["one"]


# Inflating


@given(st.binary(max_size=5000), st.integers(1, 5000))
def test_inflating_makes_no_more_than_it_may(data: bytes, maximum: int) -> None:
    if len(data) <= maximum:
        assert inflate(deflate(data, 6), maximum) == data
    else:
        with pytest.raises(ValueError):
            inflate(deflate(data, 6), maximum)


@given(st.binary(max_size=200))
def test_inflating_anything(data: bytes) -> None:
    try:
        assert len(inflate(data, 1000)) <= 1000
    except ValueError:
        pass


# Over polling


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity", "x"])
def test_a_compressed_body_is_refused(served: Served, coding: str) -> None:
    """Compressed as it may be, it is never inflated."""
    poller = served.poller()
    body = zlib.compress(b"4" + bytes(10_000_000), wbits=31)
    answer = poller.posting.post(poller.target, body, {"Content-Encoding": coding})
    assert answer.error == (415, 3, "Bad request")
    served.wait_closed("parse error")
    assert served.app.messages == []


def test_a_compressed_body_that_does_not_say_so(served: Served) -> None:
    poller = served.poller()
    answer = poller.posting.post(poller.target, zlib.compress(b"4hello", wbits=31))
    assert answer.error == (400, 3, "Bad request")
    served.wait_closed("parse error")
