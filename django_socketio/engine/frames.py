"""Outgoing packets, encoded once for everybody who receives them."""

from collections.abc import Callable, Hashable
from struct import pack
from typing import Protocol

from ..protocol import engineio

_TEXT = 0x81  # FIN and the opcode (RFC 6455, 5.2)
_BINARY = 0x82
_DEFLATED = 0x40  # RSV1 (RFC 7692, 6)


class Compressor(Protocol):
    def compress(self, data: bytes) -> bytes | None:
        """Return the message compressed, or None where that does not pay."""


def _websocket(head: int, data: bytes) -> bytes:
    """Frame `data`. A server masks nothing (RFC 6455, 5.1), so a frame fits every recipient."""
    length = len(data)
    if length < 126:
        return pack("!BB", head, length) + data
    if length < 65536:
        return pack("!BBH", head, 126, length) + data
    return pack("!BBQ", head, 127, length) + data


class Frame:
    """
    One text packet and the binary messages that follow it, or binary messages alone.

    `websocket` and `polling` are the finished bytes for either transport, `deflated()` those for a
    WebSocket that takes compressed messages. One frame object goes to all recipients of a message,
    and is never changed.
    """

    __slots__ = ("_attachments", "_deflated", "_polling", "_text", "websocket")

    def __init__(self, text: bytes | None, *attachments: bytes) -> None:
        self._text = text
        self._attachments = attachments
        self._polling: bytes | None = None
        self._deflated: bytes | None = None
        self.websocket = b"" if text is None else _websocket(_TEXT, text)
        if attachments:
            self.websocket += b"".join(_websocket(_BINARY, item) for item in attachments)

    @classmethod
    def message(cls, text: bytes, *attachments: bytes) -> "Frame":
        """Return the frame of an Engine.IO message."""
        return cls(b"4" + text, *attachments)

    @property
    def polling(self) -> bytes:
        if self._polling is None:
            packets = [] if self._text is None else [self._text]
            packets += map(engineio.encode_binary, self._attachments)
            self._polling = engineio.encode_payload(packets)
        return self._polling

    def deflated(self, compressor: Compressor) -> bytes:
        """Return the messages of `websocket`, those compressed with which that pays."""
        if self._deflated is None:
            self._deflated = self._deflate(compressor)
        return self._deflated

    def never_deflate(self) -> None:
        """Have everybody receive it as it is."""
        self._deflated = self.websocket

    def _deflate(self, compressor: Compressor) -> bytes:
        messages = [] if self._text is None else [(_TEXT, self._text)]
        messages += [(_BINARY, item) for item in self._attachments]
        parts = [(head, data, compressor.compress(data)) for head, data in messages]
        if all(less is None for *_, less in parts):
            return self.websocket
        return b"".join(
            _websocket(head, data) if less is None else _websocket(head | _DEFLATED, less)
            for head, data, less in parts
        )


class Keyed(bytes):
    """The bytes of a message of which only the latest with its key needs to reach a client."""

    key: Hashable
    dropped: Callable[[], None]


class LossyFrame(Frame):
    """
    A frame that a client which is behind need not get.

    Without a key it is dropped for such a client; with one, it takes the place of an earlier one
    with that key that waits. `dropped()` is called for each that a client does without.
    """

    __slots__ = ("dropped", "key")

    def __init__(
        self,
        text: bytes,
        *attachments: bytes,
        key: Hashable = None,
        dropped: Callable[[], None],
    ) -> None:
        super().__init__(b"4" + text, *attachments)
        self.key = key
        self.dropped = dropped
        if key is not None:
            self.websocket = self._keyed(self.websocket)

    def _deflate(self, compressor: Compressor) -> bytes:
        data = super()._deflate(compressor)
        return data if data is self.websocket or self.key is None else self._keyed(data)

    def _keyed(self, data: bytes) -> Keyed:
        keyed = Keyed(data)
        keyed.key, keyed.dropped = self.key, self.dropped
        return keyed


CLOSE = Frame(engineio.CLOSE.encode())
NOOP = Frame(engineio.NOOP.encode())
PONG_PROBE = Frame((engineio.PONG + engineio.PROBE).encode())
PING = Frame(engineio.PING.encode())
