"""AMQP 0-9-1 in bytes, as much of it as is said once a connection is open."""

import struct
from collections.abc import Iterator

Name = tuple[int, int]
"""A method, by the numbers of its class and of itself."""

CONNECTION_CLOSE: Name = (10, 50)
CONNECTION_CLOSE_OK: Name = (10, 51)
CONNECTION_BLOCKED: Name = (10, 60)
CONNECTION_UNBLOCKED: Name = (10, 61)
CHANNEL_CLOSE: Name = (20, 40)
QUEUE_BIND: Name = (50, 20)
QUEUE_UNBIND: Name = (50, 50)
BASIC_QOS: Name = (60, 10)
BASIC_QOS_OK: Name = (60, 11)
BASIC_CANCEL: Name = (60, 30)
BASIC_PUBLISH: Name = (60, 40)
BASIC_RETURN: Name = (60, 50)
BASIC_DELIVER: Name = (60, 60)
BASIC_ACK: Name = (60, 80)
BASIC_NACK: Name = (60, 120)

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
"""Types of frames."""

CONTENT_TYPE, DELIVERY_MODE, MESSAGE_ID = 0x8000, 0x1000, 0x0080
"""Flags of properties."""

CHANNEL = 1
"""The only one of a connection."""

# Up to the message id, in their order: short strings, a table, octets.
_PROPERTIES = dict(zip((0x8000 >> number for number in range(9)), "ssFoossss", strict=True))
_FRAME = struct.Struct(">BHI")
_END = 0xCE


class NotAMQP(Exception):
    """These bytes are something else."""


def frame(kind: int, payload: bytes, channel: int = CHANNEL) -> bytes:
    return b"%b%b\xce" % (_FRAME.pack(kind, channel, len(payload)), payload)


def method(name: Name, arguments: bytes, channel: int = CHANNEL) -> bytes:
    """Return the frame of a method."""
    return frame(METHOD, struct.pack(">HH", *name) + arguments, channel)


def short(text: bytes) -> bytes:
    """Return a short string: up to 255 bytes, after their number."""
    return b"%c%b" % (len(text), text)


def read_short(payload: bytes, at: int) -> tuple[bytes, int]:
    """Return the short string that begins there, and where it ends."""
    end = at + 1 + payload[at]
    return payload[at + 1 : end], end


def read_property(header: bytes, wanted: int) -> bytes:
    """Return a property, a short string, from the frame that heads a message; b"" if it lacks."""
    flags, at = int.from_bytes(header[12:14]), 14
    try:
        for flag, kind in _PROPERTIES.items():
            if flags & flag and flag == wanted:
                return read_short(header, at)[0]
            if flags & flag:
                at += _length(header, at, kind)
    except IndexError:
        pass
    return b""


def _length(header: bytes, at: int, kind: str) -> int:
    if kind == "s":
        return 1 + header[at]
    return 1 if kind == "o" else 4 + int.from_bytes(header[at : at + 4])


class Reader:
    """Cut what arrives into frames."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._rest = b""

    def read(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield type and payload of each frame that is complete."""
        data, at = self._rest + data, 0
        while len(data) - at > 7:
            kind, _, size = _FRAME.unpack_from(data, at)
            end = at + 7 + size
            if size > self._max_size or (end < len(data) and data[end] != _END):
                raise NotAMQP("what the broker sends is not AMQP")
            if end >= len(data):
                break
            yield kind, data[at + 7 : end]
            at = end + 1
        self._rest = data[at:]
