"""
What travels on a backend: finished Socket.IO packets, addressed.

Layout, all numbers in network order::

    1 byte   version
    1 byte   kind
    1 byte   flags
    1 byte   length of `stamp.origin`; 0 without a stamp
    4 bytes  `stamp.epoch`
    8 bytes  `stamp.number`
    4 bytes  `stamp.skipped`
             `stamp.origin`
    1 byte   length of `exclude`, then that
    2 bytes  length of `key`, then that
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

VOLATILE = 1
"""Flag: a client for whom anything waits does without it."""
UNCOMPRESSED = 2
"""Flag: it is not to be compressed on its way to the clients."""
_FLAGS = VOLATILE | UNCOMPRESSED

_HEAD = Struct("!BBBBIQI")
_BYTE = Struct("!B")
_SHORT = Struct("!H")
_LONG = Struct("!I")

_NOBODY_IN_PARTICULAR = bytes(5)
"""No `exclude`, no `key` and no `among`, which is how most are."""


class InvalidEnvelope(ValueError):
    """The payload is not of this version, or of nobody we know."""


class Stamp(NamedTuple):
    """
    The place of a message among those that `origin`, a process, has published on its topic.

    Numbers count from 1 in each epoch. The `skipped` ones before this one never went out.
    """

    origin: str
    epoch: int
    number: int
    skipped: int = 0


class Envelope(NamedTuple):
    """
    `exclude` is the session that does not receive it. If there is `among`, only those receive it
    who are in one of these topics, whatever topic carries it. Of several with the same `key` that
    wait for a client only the latest needs to reach it.
    """

    kind: int = EVENT
    packets: tuple[bytes, ...] = ()
    exclude: str = ""
    among: tuple[str, ...] = ()
    flags: int = 0
    key: str = ""
    stamp: Stamp | None = None

    @property
    def is_lossy(self) -> bool:
        """Tell whether a client that is behind need not get it."""
        return bool(self.key or self.flags & VOLATILE)


def encode(envelope: Envelope, stamp: Stamp | None = None) -> bytes:
    """Encode; `stamp` goes before that of the envelope."""
    kind, packets, exclude, among, flags, key, own = envelope
    origin, epoch, number, skipped = stamp or own or _NO_STAMP
    whence, who, what = origin.encode(), exclude.encode(), key.encode()
    parts = [
        _HEAD.pack(VERSION, kind, flags, len(whence), epoch, number, skipped),
        whence,
        _BYTE.pack(len(who)),
        who,
        _SHORT.pack(len(what)),
        what,
        _SHORT.pack(len(among)),
    ]
    for topic in among:
        name = topic.encode()
        parts += (_SHORT.pack(len(name)), name)
    parts.append(_SHORT.pack(len(packets)))
    for packet in packets:
        parts += (_LONG.pack(len(packet)), packet)
    return b"".join(parts)


_NO_STAMP = Stamp("", 0, 0)
_NONE: tuple[str, ...] = ()


def decode(data: bytes) -> Envelope:
    """Raise `InvalidEnvelope` for whatever `encode()` of this version does not make."""
    try:
        return _decode(data)
    except (IndexError, StructError, UnicodeDecodeError) as error:
        raise InvalidEnvelope(f"malformed: {error}") from None


def _decode(data: bytes) -> Envelope:
    if data[0] != VERSION:
        raise InvalidEnvelope(f"version {data[0]}, not {VERSION}")
    _, kind, flags, length, epoch, number, skipped = _HEAD.unpack_from(data)
    if kind not in _KINDS:
        raise InvalidEnvelope(f"unknown kind {kind}")
    if flags & ~_FLAGS:
        raise InvalidEnvelope(f"unknown flags {flags}")
    origin, position = _take(data, _HEAD.size, length)
    stamp = Stamp(origin.decode(), epoch, number, skipped) if origin else None
    if stamp is None and (epoch or number or skipped):
        raise InvalidEnvelope("a number of nobody")
    exclude, key, among = "", "", _NONE
    if data.startswith(_NOBODY_IN_PARTICULAR, position):
        position += len(_NOBODY_IN_PARTICULAR)
    else:
        exclude, key, among, position = _take_whom(data, position)
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
    return Envelope(kind, tuple(packets), exclude, among, flags, key, stamp)


def _take_whom(data: bytes, position: int) -> tuple[str, str, tuple[str, ...], int]:
    exclude, position = _take_text(data, position, _BYTE)
    key, position = _take_text(data, position, _SHORT)
    (count,) = _SHORT.unpack_from(data, position)
    position += _SHORT.size
    among = []
    for _ in range(count):
        topic, position = _take_text(data, position, _SHORT)
        among.append(topic)
    return exclude, key, tuple(among), position


def _take_text(data: bytes, start: int, size: Struct) -> tuple[str, int]:
    (length,) = size.unpack_from(data, start)
    text, position = _take(data, start + size.size, length)
    return text.decode(), position


def _take(data: bytes, start: int, length: int) -> tuple[bytes, int]:
    end = start + length
    if end > len(data):
        raise InvalidEnvelope("cut short")
    return data[start:end], end
