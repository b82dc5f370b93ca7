"""Frames as each transport sends them, read by the client's side of `websockets`."""

from typing import Any

import pytest
from hypothesis import given, strategies as st
from websockets.frames import Frame as WebSocketFrame, Opcode
from websockets.protocol import OPEN, Protocol, Side

from django_socketio.engine import Frame, frames
from django_socketio.protocol import engineio

SIZES = [0, 1, 125, 126, 127, 65535, 65536, 100_000]

#: Bytes before the payload (RFC 6455, 5.2: "the minimal number of bytes MUST be used").
HEADERS = {0: 2, 1: 2, 125: 2, 126: 4, 127: 4, 65535: 4, 65536: 10, 100_000: 10}


def received(data: bytes) -> list[WebSocketFrame]:
    """Return the frames that a client reads, which refuses masked and reserved ones."""
    client = Protocol(Side.CLIENT, state=OPEN, max_size=None)
    client.receive_data(data)
    events: list[Any] = client.events_received()
    assert client.parser_exc is None
    return events


def payload(frame: Frame) -> list[engineio.Packet]:
    """Return the packets that a client reads from a poll's answer."""
    return engineio.decode_payload(frame.polling, max_packets=1000)


@pytest.mark.parametrize("size", SIZES)
def test_a_text_of_any_size(size: int) -> None:
    text = b"x" * size
    frame = Frame(text)
    (event,) = received(frame.websocket)
    assert (event.opcode, event.fin, event.data) == (Opcode.TEXT, True, text)
    assert len(frame.websocket) == HEADERS[size] + size


@pytest.mark.parametrize("size", SIZES)
def test_a_binary_message_of_any_size(size: int) -> None:
    data = b"\xff" * size
    frame = Frame(None, data)
    (event,) = received(frame.websocket)
    assert (event.opcode, event.fin, event.data) == (Opcode.BINARY, True, data)
    assert len(frame.websocket) == HEADERS[size] + size
    assert payload(frame) == [engineio.Packet("4", data)]


@pytest.mark.parametrize("size", SIZES)
def test_the_first_byte_of_a_message_is_its_type(size: int) -> None:
    """Engine.IO, "Packet encoding": the type counts for the size, too."""
    frame = Frame.message(b"x" * size)
    (event,) = received(frame.websocket)
    assert event.data == b"4" + b"x" * size
    assert frame.polling == b"4" + b"x" * size


def test_each_attachment_is_a_message_of_its_own() -> None:
    """Engine.IO: "Each packet (read or write) is sent its own WebSocket frame"; in order."""
    frame = Frame.message(b'52-["x"]', b"\x00" * 126, b"")
    events = received(frame.websocket)
    assert [(event.opcode, event.fin, event.data) for event in events] == [
        (Opcode.TEXT, True, b'452-["x"]'),
        (Opcode.BINARY, True, b"\x00" * 126),
        (Opcode.BINARY, True, b""),
    ]
    assert frame.polling == b'452-["x"]\x1eb' + b"AAAA" * 42 + b"\x1eb"


def test_the_example_of_a_payload() -> None:
    """Engine.IO, "Packet encoding", "HTTP long-polling"."""
    assert Frame.message(b"hello", b"\x01\x02\x03\x04").polling == b"4hello\x1ebAQIDBA=="


def test_binary_messages_alone() -> None:
    frame = Frame(None, b"one", b"two")
    events = received(frame.websocket)
    assert [event.data for event in events] == [b"one", b"two"]
    assert [packet.data for packet in payload(frame)] == [b"one", b"two"]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (frames.CLOSE, b"1"),
        (frames.PING, b"2"),
        (frames.PONG_PROBE, b"3probe"),
        (frames.NOOP, b"6"),
    ],
)
def test_the_engine_s_own_packets(frame: Frame, text: bytes) -> None:
    """Engine.IO, "Protocol" and "Upgrade"."""
    (event,) = received(frame.websocket)
    assert (event.opcode, event.data) == (Opcode.TEXT, text)
    assert frame.polling == text


def test_it_is_rendered_once_for_all() -> None:
    """Everybody is handed the same bytes, whoever asks first."""
    frame = Frame.message(b"hello", b"\x00" * 100)
    assert frame.websocket is frame.websocket
    assert frame.polling is frame.polling


def test_frames_follow_one_another() -> None:
    """What is joined into one write is read as it was."""
    texts = [b"x" * size for size in SIZES]
    joined = b"".join(Frame(text).websocket for text in texts)
    assert [event.data for event in received(joined)] == texts


@given(st.none() | st.text(), st.lists(st.binary(max_size=300), max_size=5))
def test_both_transports_carry_the_same(text: str | None, attachments: list[bytes]) -> None:
    # As JSON the text has no record separator.
    safe = None if text is None else text.replace("\x1e", " ").encode()
    if safe is None:
        frame = Frame(None, b"one at least", *attachments)
    else:
        frame = Frame.message(safe, *attachments)
    by_websocket = [
        event.data if event.opcode is Opcode.BINARY else bytes(event.data[1:]).decode()
        for event in received(frame.websocket)
    ]
    assert [packet.data for packet in payload(frame)] == by_websocket
    assert {packet.type for packet in payload(frame)} == {"4"}
