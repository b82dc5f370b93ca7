"""Engine.IO protocol v4, as far as it is about packets. Tests name the section they hold."""

import base64
import json

import pytest
from hypothesis import example, given, strategies as st

from django_socketio.protocol import engineio
from django_socketio.protocol.engineio import ErrorCode, Packet
from django_socketio.protocol.exceptions import ProtocolError

MAX_PACKETS = 1000

types = st.sampled_from("0123456")
# "Note: this assumes the record separator is not used in the data."
texts = st.text().filter(lambda text: "\x1e" not in text)
text_packets = st.builds(Packet, types, texts)
binary_packets = st.builds(Packet, st.just(engineio.MESSAGE), st.binary(max_size=100))

_pieces = st.sampled_from([b"4", b"2", b"b", b"\x1e", b"AQID", b"BA==", b"=", b"\xff", b"hello"])
nearly_payloads = st.lists(_pieces, max_size=8).map(b"".join)


def decode(body: bytes) -> list[Packet]:
    return engineio.decode_payload(body, max_packets=MAX_PACKETS)


def encode(packet: Packet) -> bytes:
    """Encode a packet of a payload as whoever sends it does."""
    if isinstance(packet.data, bytes):
        return engineio.encode_binary(packet.data)
    return (packet.type + packet.data).encode()


# Protocol


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("OPEN", "0"),
        ("CLOSE", "1"),
        ("PING", "2"),
        ("PONG", "3"),
        ("MESSAGE", "4"),
        ("UPGRADE", "5"),
        ("NOOP", "6"),
    ],
)
def test_packet_types(name: str, id_: str) -> None:
    """Protocol: "Here is the list of available packet types"."""
    assert getattr(engineio, name) == id_
    assert engineio.decode_packet(id_) == Packet(id_, "")
    assert engineio.decode_packet(f"{id_}data") == Packet(id_, "data")


@pytest.mark.parametrize("text", ["", "7", "9", "-", "a", " 4hello", "\x1e4hello", "４hello", "٤"])
def test_no_other_type_is_a_packet(text: str) -> None:
    with pytest.raises(ProtocolError, match="packet type"):
        engineio.decode_packet(text)


# Handshake


def test_open_packet() -> None:
    """Handshake: the example of the document."""
    packet = engineio.open_packet(
        "lv_VI97HAXpY6yYWAAAC",
        upgrades=("websocket",),
        ping_interval=25,
        ping_timeout=20.0,
        max_payload=1_000_000,
    )
    assert packet[:1] == b"0"
    assert json.loads(packet[1:]) == {
        "sid": "lv_VI97HAXpY6yYWAAAC",
        "upgrades": ["websocket"],
        "pingInterval": 25000,
        "pingTimeout": 20000,
        "maxPayload": 1000000,
    }


def test_open_packet_of_the_sample_session() -> None:
    """The Socket.IO protocol's "Sample session", byte for byte."""
    packet = engineio.open_packet(
        "lv_VI97HAXpY6yYWAAAC",
        upgrades=["websocket"],
        ping_interval=25.0,
        ping_timeout=5.0,
        max_payload=1_000_000,
    )
    assert packet == (
        b'0{"sid":"lv_VI97HAXpY6yYWAAAC","upgrades":["websocket"],"pingInterval":25000,'
        b'"pingTimeout":5000,"maxPayload":1000000}'
    )


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.3, 300), (0.2, 200), (1.0006, 1001)])
def test_open_packet_has_whole_milliseconds(seconds: float, milliseconds: int) -> None:
    """Handshake: "in milliseconds"; 0.3 * 1000 alone would be 300.0 or worse."""
    packet = engineio.open_packet(
        "sid", upgrades=(), ping_interval=seconds, ping_timeout=seconds, max_payload=1
    )
    assert f'"pingInterval":{milliseconds},"pingTimeout":{milliseconds},'.encode() in packet
    assert b'"upgrades":[]' in packet


# Packet encoding, HTTP long-polling

EXAMPLES = [
    (
        b"4hello\x1e2\x1e4world",
        [Packet("4", "hello"), Packet("2", ""), Packet("4", "world")],
    ),
    (b"4hello\x1ebAQIDBA==", [Packet("4", "hello"), Packet("4", b"\x01\x02\x03\x04")]),
    # The Socket.IO protocol's "Sample session", request 5.
    (b'42["hello"]\x1e42["world"]', [Packet("4", '2["hello"]'), Packet("4", '2["world"]')]),
]


@pytest.mark.parametrize(("body", "packets"), EXAMPLES)
def test_the_examples_of_payloads(body: bytes, packets: list[Packet]) -> None:
    """Packet encoding, HTTP long-polling."""
    assert decode(body) == packets
    assert engineio.encode_payload(map(encode, packets)) == body


@pytest.mark.parametrize(
    ("body", "packet"),
    [
        (b"4", Packet("4", "")),
        (b"b", Packet("4", b"")),
        (b"bAA==", Packet("4", b"\x00")),
        (b"b+/+/", Packet("4", b"\xfb\xff\xbf")),
        ("4€".encode(), Packet("4", "€")),
        ("4\N{GRINNING FACE}".encode(), Packet("4", "\N{GRINNING FACE}")),
        (b"4b", Packet("4", "b")),
        (b"2probe", Packet("2", "probe")),
        (b"4\x00\r\n\x1f", Packet("4", "\x00\r\n\x1f")),
    ],
)
def test_payloads_of_one_packet(body: bytes, packet: Packet) -> None:
    """Packet encoding: "UTF-8 for plain text and for base64-encoded binary payloads"."""
    assert decode(body) == [packet]
    assert engineio.encode_payload([encode(packet)]) == body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x1e",
        b"4hello\x1e",
        b"\x1e4hello",
        b"4hello\x1e\x1e4world",
        b"7",
        b"hello",
        b"2:4\xe2\x82\xac\x1e9",
        b"4\xff",
        b"4\xed\xa0\x80",  # a surrogate half
        b"4\xc0\x80",  # more bytes than it takes
        b"\xe2\x82",
        b"B",
    ],
)
def test_malformed_payloads(body: bytes) -> None:
    """A payload is taken whole or not at all, wherever in it the mistake is."""
    for around in (body, b"4before\x1e" + body, body + b"\x1e4after"):
        with pytest.raises(ProtocolError):
            decode(around)


@pytest.mark.parametrize(
    "body",
    [
        b"bA",
        b"bAQ",
        b"bAQ=",
        b"bAQ==\n",
        b"b AQ==",
        b"bAQ==AQ==",
        b"bAQ=B",
        b"b=",
        b"b====",
        b"bAQI-",  # base64 for addresses has an alphabet of its own
        b"bAQI_",
        b"b\xff",
    ],
)
def test_malformed_base64(body: bytes) -> None:
    """RFC 4648, 3.3: characters outside the alphabet are refused, not skipped."""
    with pytest.raises(ProtocolError, match="base64"):
        decode(b"4before\x1e" + body)


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 1000])
def test_the_limit_of_packets_is_an_argument(limit: int) -> None:
    """Python-engineio drops what is over 16 packets, and says 200 OK: we take all or refuse."""
    most = engineio.SEPARATOR.join([b"4x"] * limit)
    assert engineio.decode_payload(most, max_packets=limit) == [Packet("4", "x")] * limit
    with pytest.raises(ProtocolError, match=f"more than {limit} packets"):
        engineio.decode_payload(most + b"\x1e4x", max_packets=limit)


@pytest.mark.parametrize("filler", [b"3", b"4", b"1234567890", "4€".encode()])
def test_a_megabyte_of_one_packet(filler: bytes) -> None:
    """CVE-2020-36048: the time it took grew with the square of the length."""
    body = filler * (1_000_000 // len(filler))
    assert decode(body) == [Packet(body[:1].decode(), body[1:].decode())]


@pytest.mark.parametrize("filler", [b"2\x1e", b"\x1e", b"b\x1e", b"4\x1e2\x1e"])
def test_a_megabyte_of_tiny_packets(filler: bytes) -> None:
    """CVE-2020-36048, the other way: refused before any of them is looked at."""
    with pytest.raises(ProtocolError, match="more than"):
        decode(filler * (1_000_000 // len(filler)))


# Packet encoding, WebSocket


@pytest.mark.parametrize(
    ("text", "packet"),
    [
        ("4hello", Packet("4", "hello")),
        ("2probe", Packet("2", "probe")),
        ("3probe", Packet("3", "probe")),
        ("5", Packet("5", "")),
        ("4", Packet("4", "")),
        # One packet a frame: the separator belongs to payloads only.
        ("4hello\x1e4world", Packet("4", "hello\x1e4world")),
    ],
)
def test_the_text_of_a_websocket_frame_is_one_packet(text: str, packet: Packet) -> None:
    """Packet encoding, WebSocket; and the packets of "Upgrade"."""
    assert engineio.decode_packet(text) == packet


def test_base64_belongs_to_payloads_only() -> None:
    """WebSocket: "Binary payloads are sent as is, without modification"."""
    with pytest.raises(ProtocolError):
        engineio.decode_packet("bAQIDBA==")


# Transports


def test_the_version() -> None:
    """Query parameters: `EIO`, "the version of the protocol"."""
    assert engineio.VERSION == "4"


# Errors


@pytest.mark.parametrize(
    ("code", "number", "message"),
    [
        (ErrorCode.UNKNOWN_TRANSPORT, 0, "Transport unknown"),
        (ErrorCode.UNKNOWN_SID, 1, "Session ID unknown"),
        (ErrorCode.BAD_HANDSHAKE_METHOD, 2, "Bad handshake method"),
        (ErrorCode.BAD_REQUEST, 3, "Bad request"),
        (ErrorCode.FORBIDDEN, 4, "Forbidden"),
        (ErrorCode.UNSUPPORTED_PROTOCOL_VERSION, 5, "Unsupported protocol version"),
    ],
)
def test_error_bodies(code: ErrorCode, number: int, message: str) -> None:
    """The protocol says 400 only: codes and messages are those of the reference implementation."""
    assert json.loads(engineio.error_body(code)) == {"code": number, "message": message}
    with_hint = json.loads(engineio.error_body(code, 'the "sid" has ended'))
    assert with_hint == {"code": number, "message": message, "hint": 'the "sid" has ended'}


def test_every_error_has_a_message() -> None:
    assert set(engineio.ERROR_MESSAGES) == set(ErrorCode)


# Properties


@given(st.lists(text_packets | binary_packets, min_size=1, max_size=20))
def test_payloads_round_trip(packets: list[Packet]) -> None:
    assert decode(engineio.encode_payload(map(encode, packets))) == packets


@given(st.binary())
def test_binary_is_standard_base64(data: bytes) -> None:
    """Packet encoding: "base64-encoded and prefixed with a `b` character"."""
    assert engineio.encode_binary(data) == b"b" + base64.b64encode(data)


@given(types, st.text())
def test_packets_round_trip(type_: str, data: str) -> None:
    assert engineio.decode_packet(type_ + data) == Packet(type_, data)


@given(st.text(st.characters()) | st.builds("{}{}".format, types, st.text()))
@example("\ud800")
def test_any_text_is_a_packet_or_an_error(text: str) -> None:
    try:
        packet = engineio.decode_packet(text)
    except ProtocolError:
        assert text[:1] not in tuple("0123456")
    else:
        assert f"{packet.type}{packet.data!s}" == text


@given(st.binary() | nearly_payloads)
def test_any_bytes_are_a_payload_or_an_error(body: bytes) -> None:
    try:
        packets = decode(body)
    except ProtocolError:
        return
    assert len(packets) == body.count(b"\x1e") + 1
    again = engineio.encode_payload(map(encode, packets))
    assert decode(again) == packets
