"""
What takes bytes from a stranger, and what must hold whatever these are.

Each target is a function of some bytes. It raises, or takes far too long, only if there is a bug:
of the errors that a decoder declares it makes nothing. pytest gives each the corpus in every run;
`python -m tests.fuzz TARGET` has atheris look for more.
"""

import socket
from collections.abc import Callable
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

from websockets.frames import Opcode
from websockets.protocol import OPEN, Protocol, Side

from django_socketio import envelope
from django_socketio.backends.amqp import frames
from django_socketio.backends.exceptions import BackendError
from django_socketio.backends.memory import MemoryBackend
from django_socketio.backends.redis.wire import Refused as RedisRefused, Wire
from django_socketio.cluster import ALL, Cluster
from django_socketio.engine import head
from django_socketio.engine.body import Chunks, MalformedBody
from django_socketio.engine.http import Refused, Request
from django_socketio.engine.outbox import Outbox
from django_socketio.engine.websocket import WebSocketTransport, handshake
from django_socketio.hub import Hub
from django_socketio.protocol import engineio, json, socketio
from django_socketio.protocol.exceptions import ProtocolError

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}

_MAX_ATTACHMENTS = 10
_MAX_PAYLOAD = 1_000


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


# Engine.IO and Socket.IO


@target
def engineio_packet(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with suppress(ProtocolError):
        packet = engineio.decode_packet(text)
        assert packet.type in engineio.PACKET_TYPES
        assert f"{packet.type}{packet.data}" == text


@target
def engineio_payload(data: bytes) -> None:
    """A payload that is taken can be sent on, and says the same."""
    with suppress(ProtocolError):
        packets = engineio.decode_payload(data, max_packets=100)
        assert 1 <= len(packets) <= 100
        again = engineio.encode_payload(map(_engineio_encoded, packets))
        assert engineio.decode_payload(again, max_packets=100) == packets


def _engineio_encoded(packet: engineio.Packet) -> bytes:
    if isinstance(packet.data, bytes):
        return engineio.encode_binary(packet.data)
    return f"{packet.type}{packet.data}".encode()


@target
def socketio_packet(data: bytes) -> None:
    """The first line is the packet, the others are its attachments."""
    first, *rest = data.split(b"\n")
    try:
        decoded = socketio.decode(first.decode("utf-8", "replace"), socketio.Limits())
    except ProtocolError:
        return
    if isinstance(decoded, socketio.Assembly):
        packet = _assembled(decoded, rest)
    else:
        packet = decoded
    if packet is not None:
        _check_socketio(packet)


def _assembled(assembly: socketio.Assembly, attachments: list[bytes]) -> socketio.Packet | None:
    for number, attachment in enumerate(attachments, 1):
        packet = assembly.add(attachment)
        if packet is not None:
            assert number <= _MAX_ATTACHMENTS
            return packet
    return None


def _check_socketio(packet: socketio.Packet) -> None:
    assert packet.id is None or 0 <= packet.id <= socketio.MAX_ACK_ID
    if packet.type is socketio.EVENT:
        assert type(packet.data[0]) is str
        assert packet.data[0] not in socketio.RESERVED_EVENTS
        assert len(packet.data[0]) <= 255
    text, attachments = socketio.encode(packet)
    again = socketio.decode(text.decode(), socketio.Limits())
    if isinstance(again, socketio.Assembly):
        assembled = _assembled(again, attachments)
        assert assembled is not None
        again = assembled
    if "," not in packet.namespace:
        assert again == packet, (again, packet)


@target
def json_value(data: bytes) -> None:
    """What was read can be written, and is then the same."""
    for text in (data, data.decode("utf-8", "replace")):
        with suppress(ProtocolError):
            value = json.loads(text)
            written, attachments = json.dumps_binary(value)
            assert not attachments
            assert json.loads(written.decode()) == value


# HTTP


@target
def http_head(data: bytes) -> None:
    """A head that passes is one line for each header, whoever reads it next."""
    with suppress(head.BadRequest):
        head.check_start(data)
        request = head.parse(data)
        for key, value in request.environ.items():
            assert key == "PATH_INFO" or len(f"{value}.".splitlines()) == 1
        assert not (request.chunked and request.content_length is not None)
        assert request.version == "HTTP/1.0" or "HTTP_HOST" in request.environ
        with suppress(Refused):
            query = Request.from_environ(request.environ)
            assert len(query.query) <= 100
            handshake(query)


@target
def http_chunks(data: bytes) -> None:
    """A body is the same in whatever pieces it comes."""
    outcomes = [_read_chunks(_pieces(data, size)) for size in (len(data) or 1, 1, 7)]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def _read_chunks(pieces: list[bytes]) -> tuple[bytes, bytes] | None:
    behind: list[bytes] = []
    chunks = Chunks(lambda: pieces.pop(0) if pieces else b"", behind.append)
    try:
        data = b"".join(iter(lambda: chunks.read(10), b""))
    except MalformedBody:
        return None
    assert chunks.ended
    return data, b"".join(behind + pieces)


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# WebSocket


class _Loop:
    """A loop that never turns."""

    def io(self, fd: int, events: int) -> Any:
        return SimpleNamespace(start=_nothing, stop=_nothing, close=_nothing)

    def run_callback(self, function: Any, *args: Any) -> None:
        """Nothing is due."""


class _Socket:
    def __init__(self) -> None:
        self.sent = b""

    def fileno(self) -> int:
        return 0

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def shutdown(self, how: int) -> None:
        """There is nobody."""

    def close(self) -> None:
        """There is nothing."""


class _Owner:
    def __init__(self) -> None:
        self.received: list[str | bytes] = []
        self.lost: list[str] = []

    def receive_text(self, text: str) -> None:
        self.received.append(text)

    receive_binary: Any = receive_text

    def message_began(self) -> None:
        """Have no deadline."""

    message_ended = message_began

    def over_limit(self, limit: str) -> None:
        assert limit in ("MAX_PAYLOAD", "MAX_FRAGMENTS")

    def transport_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def too_slow(self, why: str) -> None:
        raise AssertionError("nobody is behind")


def _nothing(*args: object) -> None:
    """Do that."""


@target
def websocket_frames(data: bytes) -> None:
    """What is received is what the library makes of it alone, in whatever segments it comes."""
    expected = _expected_messages(data)
    for size in (len(data) or 1, 1, 5):
        received, lost, fragments = _received_messages(_pieces(data, size))
        assert received == expected, (size, received, expected)
        assert len(lost) <= 1
        assert fragments <= _MAX_PAYLOAD


def _received_messages(segments: list[bytes]) -> tuple[list[str | bytes], list[str], int]:
    loop, owner = _Loop(), _Owner()
    transport = WebSocketTransport(
        _Socket(),
        owner,
        loop,
        Outbox(loop),
        SimpleNamespace(add=_nothing, discard=_nothing),
        max_payload=_MAX_PAYLOAD,
        max_fragments=_MAX_PAYLOAD,
        max_buffer=1_000_000,
    )
    most = 0
    for segment in segments:
        if transport.closed:
            break
        transport._received(segment)
        if transport._message is not None:
            most = max(most, len(transport._message.data))
    return owner.received, owner.lost, most


def _expected_messages(data: bytes) -> list[str | bytes]:
    protocol = Protocol(Side.SERVER, state=OPEN, max_size=_MAX_PAYLOAD)
    protocol.receive_data(data)
    messages: list[str | bytes] = []
    fragments: list[bytes] = []
    is_text = False
    for frame in protocol.events_received():
        assert hasattr(frame, "opcode")
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            fragments, is_text = [bytes(frame.data)], frame.opcode is Opcode.TEXT
        elif frame.opcode is Opcode.CONT:
            fragments.append(bytes(frame.data))
        else:
            continue
        if frame.fin:
            try:
                whole = b"".join(fragments)
                messages.append(whole.decode() if is_text else whole)
            except UnicodeDecodeError:
                break
    return messages


# Carriers


@target
def envelopes(data: bytes) -> None:
    with suppress(envelope.InvalidEnvelope):
        assert envelope.encode(envelope.decode(data)) == data


@target
def letters(data: bytes) -> None:
    """A payload of the carrier never raises, and answers no question but by a node asked."""
    hub = Hub(MemoryBackend())
    cluster = Cluster(hub)
    kind, _, body = data.partition(b"\n")
    packets = tuple(body.split(b"\x00"))
    kinds = {b"request": envelope.REQUEST, b"reply": envelope.REPLY, b"beat": envelope.BEAT}
    letter = envelope.Envelope(kinds.get(kind, envelope.BEAT), packets)
    hub.deliver(ALL, envelope.encode(letter))
    hub.deliver(cluster.topic, data)
    assert len(cluster.nodes()) <= 1
    assert not cluster._questions


@target
def amqp_frames(data: bytes) -> None:
    """The frames are the same in whatever pieces they come, and can be made again."""
    outcomes = [_read_frames(_pieces(data, size)) for size in (len(data) or 1, 1, 9)]
    # Of a broker that goes wrong somewhere, what came before that may have been read or not.
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for kind, payload in outcomes[0][0]:
        assert len(payload) <= 1000
        reader = frames.Reader(1000)
        assert list(reader.read(frames.frame(kind, payload))) == [(kind, payload)]
        for flag in (frames.CONTENT_TYPE, frames.DELIVERY_MODE, frames.MESSAGE_ID):
            assert isinstance(frames.read_property(payload, flag), bytes)


def _read_frames(pieces: list[bytes]) -> tuple[list[tuple[int, bytes]], bool]:
    reader = frames.Reader(1000)
    read: list[tuple[int, bytes]] = []
    try:
        for piece in pieces:
            read += reader.read(piece)
    except frames.NotAMQP:
        return [], False
    return read, True


@target
def redis_replies(data: bytes) -> None:
    """Replies are replies, and an error says which it is."""
    ours, theirs = socket.socketpair()
    with theirs, closing(Wire(SimpleNamespace(_sock=ours))) as wire:
        theirs.sendall(data[:65536])
        theirs.shutdown(socket.SHUT_WR)
        with suppress(BackendError):
            while wire.receive():
                for reply in wire.replies():
                    if isinstance(reply, RedisRefused):
                        assert reply.kind
                        assert isinstance(reply.is_misplaced, bool)
