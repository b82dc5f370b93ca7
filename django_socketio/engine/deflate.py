"""
Permessage-deflate (RFC 7692): what is agreed on with a client, and messages either way.

Nothing outlives a message, in either direction. So a frame is compressed once for all who receive
it, and a connection that is idle holds no window.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from websockets.exceptions import InvalidHeader
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.headers import parse_extension
from websockets.protocol import Protocol as WebSocketProtocol

from .frames import Frame
from .websocket import WebSocketTransport, apply_mask

_WINDOW_BITS, _MEMORY = 12, 5
"""
Of what is sent. 4 kB find nearly all that 32 kB do, in half the time: to allocate and to clear
these costs more than to compress a message of the usual size.
"""

_LONGEST_OFFER = 1024
"""Characters; browsers need 50."""

_WHOLE_TEXT = 0xC1  # FIN, RSV1 and the opcode
_TAIL = b"\x00\x00\xff\xff"  # what the sender leaves out (7.2.1)

ANSWER = (
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
    f"; server_max_window_bits={_WINDOW_BITS}"
)


class InvalidOffer(ValueError):
    """The header is none (RFC 6455, 9.1)."""


@lru_cache(64)
def accepts(header: str) -> bool:
    """
    Tell whether `ANSWER` answers an offer in a client's `Sec-WebSocket-Extensions`.

    Raise `InvalidOffer` if the header is broken, or beyond all measure.
    """
    if not header:
        return False
    if len(header) > _LONGEST_OFFER:
        raise InvalidOffer
    try:
        offers = parse_extension(header)
    except InvalidHeader:
        raise InvalidOffer from None
    return any(
        name == PerMessageDeflate.name and _is_acceptable(parameters) for name, parameters in offers
    )


def _is_acceptable(parameters: Sequence[tuple[str, str | None]]) -> bool:
    """Tell whether an offer is one, and lets us have our window (RFC 7692, 7.1)."""
    values = dict(parameters)
    return len(values) == len(parameters) and all(
        name in _PARAMETERS and value in _PARAMETERS[name] for name, value in parameters
    )


_BITS = frozenset(str(bits) for bits in range(8, 16))
_PARAMETERS = {
    "server_no_context_takeover": frozenset((None,)),
    "client_no_context_takeover": frozenset((None,)),
    # Every window of the client's fits into ours.
    "client_max_window_bits": _BITS | {None},
    "server_max_window_bits": frozenset(str(bits) for bits in range(_WINDOW_BITS, 16)),
}


@dataclass(frozen=True, slots=True)
class Compression:
    """
    Compress messages from `threshold` to `limit` bytes, as hard as zlib's `level` says.

    Smaller ones gain nothing, and larger ones would keep the hub from everybody else for too long.
    """

    threshold: int = 1024
    level: int = 6
    limit: int = 1_000_000

    def compress(self, data: bytes) -> bytes | None:
        """Return the message compressed; None if it had better be left alone."""
        if not self.threshold <= len(data) <= self.limit:
            return None
        deflated = deflate(data, self.level)
        return deflated if len(deflated) < len(data) else None


def deflate(data: bytes, level: int) -> bytes:
    """Return a message as RFC 7692, 7.2.1 wants it."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, -_WINDOW_BITS, _MEMORY)
    deflated = encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH)
    return deflated[: -len(_TAIL)]


def inflate(data: bytes, maximum: int) -> bytes:
    """
    Return a message as it was, of which never more than `maximum` bytes are made.

    Raise `ValueError` if it is none, or longer.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = decoder.decompress(data + _TAIL, maximum)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if decoder.unconsumed_tail:
        raise ValueError(f"over {maximum} bytes")
    return inflated


class DeflatedTransport(WebSocketTransport):
    """A WebSocket with whose client `ANSWER` was agreed on."""

    __slots__ = ("_compression",)

    _piece = 1024  # which may come to a thousand times as much

    def __init__(self, *args: Any, compression: Compression, **options: Any) -> None:
        super().__init__(*args, **options)
        self._compression = compression

    def send(self, frame: Frame) -> None:
        if self._closing is None and not self.closed:
            self._write(frame.deflated(self._compression))

    def _data(self, frame: Frame) -> bytes:
        return frame.deflated(self._compression)

    def _received(self, data: bytes) -> None:
        """
        Take the whole compressed text messages that `data` begins with, as others the plain ones.

        Browsers compress whatever they send, however short.
        """
        at, size = 0, len(data)
        while size - at > 5 and data[at] == _WHOLE_TEXT and self._reads_plainly():
            length, mask = data[at + 1] - 0x80, at + 2
            if length == 126:
                length, mask = data[at + 2] << 8 | data[at + 3], at + 4
            start = mask + 4
            end = start + length
            if not 0 <= length <= self._max_payload or data[at + 1] == 0xFF or end > size:
                break
            try:
                payload = apply_mask(data[start:end], data[mask:start])
                text = str(inflate(payload, self._max_payload), "utf-8")
            except ValueError:
                break  # the protocol finds out what to tell the client
            at = end
            self.owner.receive_text(text)
        if at < size and not self.closed:
            super()._received(data[at:] if at else data)

    def _reads_plainly(self) -> bool:
        ready = self._closing is None and not self.closed and not self.paused
        return ready and self._protocol is None

    def _core(self) -> WebSocketProtocol:
        if self._protocol is None:
            bits = zlib.MAX_WBITS
            super()._core().extensions.append(PerMessageDeflate(True, True, bits, bits))
        return super()._core()
