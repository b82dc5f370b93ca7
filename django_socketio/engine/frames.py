"""Outgoing packets, encoded once for everybody who receives them."""

from struct import pack

from ..protocol import engineio

_TEXT = 0x81  # FIN and the opcode (RFC 6455, 5.2)
_BINARY = 0x82


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

    `websocket` and `polling` are the finished bytes for either transport. One frame object goes
    to all recipients of a message, and is never changed.
    """

    __slots__ = ("_attachments", "_polling", "_text", "websocket")

    def __init__(self, text: bytes | None, *attachments: bytes) -> None:
        self._text = text
        self._attachments = attachments
        self._polling: bytes | None = None
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


CLOSE = Frame(engineio.CLOSE.encode())
NOOP = Frame(engineio.NOOP.encode())
PONG_PROBE = Frame((engineio.PONG + engineio.PROBE).encode())
PING = Frame(engineio.PING.encode())
