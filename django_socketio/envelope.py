"""
What travels on a backend: finished Socket.IO packets, addressed.

Layout, all lengths in network order::

    1 byte   version
    1 byte   kind
    1 byte   length of `exclude`, then that
    2 bytes  number of `among`, then each as 2 bytes length and text
    2 bytes  number of packets, then each as 4 bytes length and data

Plain bytes rather than a serialisation format: a stranger who can write to the carrier can at worst
send messages, and receivers hand the packets on without decoding them.
"""

from struct import Struct, error as StructError
from typing import NamedTuple

VERSION = 1

EVENT = 1
"""For clients: the packets are a text packet and its attachments."""
DISCONNECT = 2
"""For sockets: end. No packets."""
REQUEST = 3
"""For processes: the packets are a question, as JSON, and what belongs to it."""
REPLY = 4
"""For the process that asked: an answer, as JSON, and what belongs to it."""
BEAT = 5
"""For processes: one of them lives, as JSON."""
_KINDS = frozenset((EVENT, DISCONNECT, REQUEST, REPLY, BEAT))

_HEAD = Struct("!BBB")
_SHORT = Struct("!H")
_LONG = Struct("!I")


class InvalidEnvelope(ValueError):
    """The payload is not of this version, or of nobody we know."""


class Envelope(NamedTuple):
    """
    `exclude` is the session that does not receive it. If there is `among`, only those receive it
    who are in one of these topics, whatever topic carries it.
    """

    kind: int = EVENT
    packets: tuple[bytes, ...] = ()
    exclude: str = ""
    among: tuple[str, ...] = ()


def encode(envelope: Envelope) -> bytes:
    kind, packets, exclude, among = envelope
    who = exclude.encode()
    parts = [_HEAD.pack(VERSION, kind, len(who)), who, _SHORT.pack(len(among))]
    for topic in among:
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
    if kind not in _KINDS:
        raise InvalidEnvelope(f"unknown kind {kind}")
    exclude, position = _take(data, _HEAD.size, length)
    (count,) = _SHORT.unpack_from(data, position)
    position += _SHORT.size
    among = []
    for _ in range(count):
        (length,) = _SHORT.unpack_from(data, position)
        topic, position = _take(data, position + _SHORT.size, length)
        among.append(topic.decode())
    (count,) = _SHORT.unpack_from(data, position)
    position += _SHORT.size
    packets = []
    for _ in range(count):
        (length,) = _LONG.unpack_from(data, position)
        packet, position = _take(data, position + _LONG.size, length)
        packets.append(packet)
    if position != len(data):
        raise InvalidEnvelope("something behind its end")
    if kind != DISCONNECT and not packets:
        raise InvalidEnvelope("nothing in it")
    return Envelope(kind, tuple(packets), exclude.decode(), tuple(among))


def _take(data: bytes, start: int, length: int) -> tuple[bytes, int]:
    end = start + length
    if end > len(data):
        raise InvalidEnvelope("cut short")
    return data[start:end], end
