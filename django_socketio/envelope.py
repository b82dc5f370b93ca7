"""
What travels on a backend: finished Socket.IO packets, addressed.

Layout, all lengths in network order::

    1 byte   version
    1 byte   kind (`EVENT`, `DISCONNECT`)
    1 byte   length of `exclude`, then that
    2 bytes  number of `skip`, then each as 2 bytes length and text
    2 bytes  number of packets, then each as 4 bytes length and data: the text, then its attachments

Plain bytes rather than a serialisation format: a stranger who can write to the carrier can at worst
send messages, and receivers hand the packets on without decoding them.
"""

from struct import Struct, error as StructError
from typing import NamedTuple

VERSION = 1
EVENT = 1
DISCONNECT = 2

_HEAD = Struct("!BBB")
_SHORT = Struct("!H")
_LONG = Struct("!I")


class InvalidEnvelope(ValueError):
    """The payload is not of this version, or of nobody we know."""


class Envelope(NamedTuple):
    """
    `exclude` is the session that does not receive it, `skip` topics whose members have it already.

    `packets` is what goes to the client: a text packet and its attachments.
    """

    kind: int = EVENT
    packets: tuple[bytes, ...] = ()
    exclude: str = ""
    skip: tuple[str, ...] = ()


def encode(envelope: Envelope) -> bytes:
    kind, packets, exclude, skip = envelope
    who = exclude.encode()
    parts = [_HEAD.pack(VERSION, kind, len(who)), who, _SHORT.pack(len(skip))]
    for topic in skip:
        name = topic.encode()
        parts += (_SHORT.pack(len(name)), name)
    parts.append(_SHORT.pack(len(packets)))
    for packet in packets:
        parts += (_LONG.pack(len(packet)), packet)
    return b"".join(parts)


def decode(data: bytes) -> Envelope:
    """Raise `InvalidEnvelope` for whatever `encode()` of this version does not make."""
    try:
        return _decode(data)
    except (StructError, UnicodeDecodeError) as error:
        raise InvalidEnvelope(f"malformed: {error}") from None


def _decode(data: bytes) -> Envelope:
    version, kind, length = _HEAD.unpack_from(data)
    if version != VERSION:
        raise InvalidEnvelope(f"version {version}, not {VERSION}")
    if kind not in (EVENT, DISCONNECT):
        raise InvalidEnvelope(f"unknown kind {kind}")
    exclude, position = _take(data, _HEAD.size, length)
    (count,) = _SHORT.unpack_from(data, position)
    position += _SHORT.size
    skip = []
    for _ in range(count):
        (length,) = _SHORT.unpack_from(data, position)
        topic, position = _take(data, position + _SHORT.size, length)
        skip.append(topic.decode())
    (count,) = _SHORT.unpack_from(data, position)
    position += _SHORT.size
    packets = []
    for _ in range(count):
        (length,) = _LONG.unpack_from(data, position)
        packet, position = _take(data, position + _LONG.size, length)
        packets.append(packet)
    if position != len(data):
        raise InvalidEnvelope("something behind its end")
    if kind == EVENT and not packets:
        raise InvalidEnvelope("an event without a packet")
    return Envelope(kind, tuple(packets), exclude.decode(), tuple(skip))


def _take(data: bytes, start: int, length: int) -> tuple[bytes, int]:
    end = start + length
    if end > len(data):
        raise InvalidEnvelope("cut short")
    return data[start:end], end
