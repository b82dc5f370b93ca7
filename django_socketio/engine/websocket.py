"""
The WebSocket transport: a socket, a read watcher and the Sans-I/O core of `websockets`.

Everything here runs in the thread of the loop, most of it in the loop's callbacks: nothing waits
and nothing raises.
"""

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from socket import SHUT_WR
from ssl import SSLWantReadError, SSLWantWriteError
from typing import Any, Protocol

from websockets.frames import CloseCode, Frame as WebSocketFrame, Opcode
from websockets.protocol import OPEN, Protocol as WebSocketProtocol, Side
from websockets.utils import accept_key

try:
    from websockets import speedups as masking
except ImportError:  # built without a compiler
    from websockets import utils as masking  # type: ignore[no-redef]

from .frames import Frame
from .http import Request
from .outbox import Outbox

logger = logging.getLogger(__name__)

_apply_mask = masking.apply_mask

_READ_SIZE = 65536
_READ, _WRITE = 1, 2
_CONTINUATION, _TEXT = Opcode.CONT, Opcode.TEXT
_WHOLE_TEXT = 0x81  # FIN and the opcode, no reserved bit
_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
_WOULD_BLOCK = (BlockingIOError, SSLWantReadError, SSLWantWriteError)


def handshake(request: Request) -> list[tuple[str, str]] | None:
    """Return the headers that accept a handshake, or None if it is none (RFC 6455, 4.2)."""
    environ = request.environ
    key = environ.get("HTTP_SEC_WEBSOCKET_KEY", "")
    valid = (
        _has_token(environ.get("HTTP_UPGRADE", ""), "websocket")
        and _has_token(environ.get("HTTP_CONNECTION", ""), "upgrade")
        and environ.get("HTTP_SEC_WEBSOCKET_VERSION") == "13"
        and _KEY.match(key)
        and request.method == "GET"
        and environ.get("SERVER_PROTOCOL") != "HTTP/1.0"
    )
    if not valid:
        return None
    return [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", accept_key(key)),
    ]


_KEY = re.compile(r"[A-Za-z0-9+/]{22}==\Z")  # 16 bytes


@lru_cache(64)
def _has_token(value: str, token: str) -> bool:
    return any(part.strip().lower() == token for part in value.split(","))


class Owner(Protocol):
    """Whoever the transport tells: a session, or the trial of one before an upgrade."""

    def receive_text(self, text: str) -> None: ...
    def receive_binary(self, data: bytes) -> None: ...
    def transport_lost(self, reason: str) -> None: ...


class WebSocketTransport:
    """
    One WebSocket, open since its handshake.

    `waiting` counts the bytes that were sent here and have not left. What waits may not exceed
    `max_buffer`, but for a single message that is larger and has nothing before it.
    """

    __slots__ = (
        "_bound",
        "_closing",
        "_fragments",
        "_fragments_are_text",
        "_loop",
        "_max_buffer",
        "_max_payload",
        "_out",
        "_outbox",
        "_protocol",
        "_reader",
        "_rest",
        "_sock",
        "_tls",
        "_writer",
        "closed",
        "owner",
        "paused",
        "waiting",
    )

    name = "websocket"

    def __init__(
        self,
        sock: Any,
        owner: Owner,
        loop: Any,
        outbox: Outbox,
        *,
        max_payload: int,
        max_buffer: int,
    ) -> None:
        self._sock = sock
        self._tls = hasattr(sock, "pending")
        self.owner = owner
        self._loop = loop
        self._outbox = outbox
        self._max_buffer = self._bound = max_buffer
        self._max_payload = max_payload
        self._protocol: WebSocketProtocol | None = None
        self._fragments: bytearray | None = None
        self._fragments_are_text = False
        self._out: list[bytes] = []
        self._rest: memoryview | None = None
        self._writer: Any = None
        self._closing: Callable[[], None] | None = None
        self.waiting = 0
        self.paused = False
        self.closed = False
        self._reader = loop.io(sock.fileno(), _READ)

    def greet(self, answer: bytes) -> None:
        """Send the answer to the handshake, before anything else."""
        self._write(answer)

    def start(self, data: bytes) -> None:
        """Begin to read; `data` came along with the handshake."""
        if self.closed:  # by the application, or the client was gone already
            return
        self._reader.start(self.read)
        if data:
            self._received(data)
        if self._tls:
            # What TLS has decrypted already makes no descriptor readable.
            self._loop.run_callback(self.read)

    def pause(self) -> None:
        """Stop reading, so that TCP slows the client down."""
        if not self.paused:
            self.paused = True
            self._reader.stop()

    def resume(self) -> None:
        if self.paused and not self.closed:
            self.paused = False
            self._reader.start(self.read)
            if self._tls:
                self._loop.run_callback(self.read)

    # Sending

    def send(self, frame: Frame) -> None:
        """Send at the end of this loop turn. Frames for a closed transport are dropped."""
        if self._closing is None and not self.closed:
            self._write(frame.websocket)

    def _write(self, data: bytes) -> None:
        out = self._out
        if not out and self._rest is None:
            self._outbox.add(self)
        out.append(data)
        self.waiting += len(data)
        if self.waiting > self._bound:
            self._overflow(len(data))

    def _overflow(self, size: int) -> None:
        if self._rest is None:
            if len(self._out) == 1:
                self._bound = max(self._bound, size)
                return
            last = self._out.pop()
            self.flush()  # a handler that sends much in one turn is not a slow client
            if not self.closed:
                self._out.append(last)
                if self._rest is None:
                    self._outbox.add(self)
                    self._bound = max(self._max_buffer, self.waiting)
        if self.waiting > self._bound and not self.closed:
            logger.warning(
                "Slow consumer: %d bytes waited, more than SOCKETIO_MAX_BUFFER", self.waiting
            )
            self.abort()
            self.owner.transport_lost("slow consumer")

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        out = self._out
        if self.closed or self._rest is not None or not out:
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        sent = self._send(data)
        if sent == len(data):
            self._drained()
        elif sent >= 0:
            self._rest = memoryview(data)[sent:]
            if self._writer is None:
                self._writer = self._loop.io(self._sock.fileno(), _WRITE)
                self._writer.start(self._writable)

    def _send(self, data: bytes | memoryview) -> int:
        """Return how much the kernel has taken; -1 if the connection is gone."""
        try:
            sent: int = self._sock.send(data)
        except _WOULD_BLOCK:
            return 0
        except OSError as error:
            self._lost("transport error", error)
            return -1
        self.waiting -= sent
        return sent

    def _drained(self) -> None:
        self._bound = self._max_buffer
        if self._closing is not None:
            self._closing()

    def _writable(self) -> None:
        rest = self._rest
        if rest is not None:
            sent = self._send(rest)
            if sent < 0:
                return
            self._rest = rest[sent:] if sent < len(rest) else None
        if self._rest is None:
            if self._out:
                self.flush()
            else:
                self._drained()
        if self._rest is None and self._writer is not None:
            self._writer.close()
            self._writer = None

    # Receiving

    def read(self) -> None:
        """Take what there is, without waiting."""
        if self.closed or self.paused:
            return
        try:
            data = self._sock.recv(_READ_SIZE)
        except _WOULD_BLOCK:
            return
        except OSError as error:
            self._lost("transport error", error)
            return
        if not data:
            self._lost("transport close")
            return
        self._received(data)
        if self._tls and not self.closed and self._sock.pending():
            self._loop.run_callback(self.read)

    def _received(self, data: bytes) -> None:
        """
        Take the whole text messages that `data` begins with, and leave the rest to the protocol.

        Nearly all that clients send is one short message in one frame in one segment, and most
        never send anything else. Reading that here saves the protocol's object and a quarter of
        the time of an event. All else is the protocol's, and from then on everything.
        """
        at, size = 0, len(data)
        plain = self._protocol is None and self._closing is None
        while plain and size - at > 5 and data[at] == _WHOLE_TEXT:
            length, mask = data[at + 1] - 0x80, at + 2  # negative without a mask, which is a must
            if length == 126:
                length, mask = data[at + 2] << 8 | data[at + 3], at + 4
            start = mask + 4
            end = start + length
            if not 0 <= length <= self._max_payload or data[at + 1] == 0xFF or end > size:
                break
            try:
                text = str(_apply_mask(data[start:end], data[mask:start]), "utf-8")
            except UnicodeDecodeError:
                break
            at = end
            self.owner.receive_text(text)
            plain = self._closing is None and not self.closed
        if at < size and not self.closed:
            self._frames_received(data[at:] if at else data)

    def _frames_received(self, data: bytes) -> None:
        protocol = self._core()
        protocol.receive_data(data)
        for frame in protocol.events_received():
            assert isinstance(frame, WebSocketFrame)  # the handshake is behind it
            self._frame_received(frame)
            if self.closed:
                return
        answers = protocol.data_to_send()
        if answers:
            self._answer(answers)

    def _core(self) -> WebSocketProtocol:
        if self._protocol is None:
            self._protocol = WebSocketProtocol(
                Side.SERVER, state=OPEN, max_size=self._max_payload, logger=logger
            )
        return self._protocol

    def _frame_received(self, frame: WebSocketFrame) -> None:
        opcode = frame.opcode
        if self._closing is not None or opcode not in _DATA:
            return  # control frames are answered by the protocol, in data_to_send()
        if frame.fin and opcode is not _CONTINUATION:
            self._message_received(opcode is _TEXT, frame.data)
            return
        if opcode is not _CONTINUATION:  # the first of several (RFC 6455, 5.4)
            self._fragments = bytearray()
            self._fragments_are_text = opcode is _TEXT
        assert self._fragments is not None  # else the protocol would have failed
        self._fragments += frame.data  # in one piece: a million of one byte cost a million bytes
        if frame.fin:
            data, self._fragments = self._fragments, None
            self._message_received(self._fragments_are_text, data)

    def _message_received(self, is_text: bool, data: bytes | bytearray | memoryview) -> None:
        if not is_text:
            self.owner.receive_binary(bytes(data))
            return
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self._core().fail(CloseCode.INVALID_DATA)  # RFC 6455, 8.1
            self._closing = self._shutdown
            return
        self.owner.receive_text(text)

    def _answer(self, answers: list[bytes]) -> None:
        """Send what the protocol itself has to say: pongs, and its end of the closing handshake."""
        ends = answers[-1] == b""
        for data in answers[:-1] if ends else answers:
            self._write(data)
        if not ends or self.closed:
            return
        protocol = self._core()
        failed = protocol.close_rcvd is None
        # After both close frames the server closes at once (RFC 6455, 7.1.1). After a failure it
        # first lets the client read why: closing with unread input would reset the connection.
        self._closing = self._shutdown if failed else self.abort
        self.flush()
        if not self.waiting and self._closing is not None:
            self._closing()
        if failed:
            logger.info("WebSocket failed: %s", protocol.close_sent)
        self.owner.transport_lost("parse error" if failed else "transport close")

    def _shutdown(self) -> None:
        """Send no more, and wait for the client to close."""
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError:
            self.abort()

    # Closing

    def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """
        Begin the closing handshake behind what was sent before.

        The connection is closed when the client answers; whoever calls sees to it that `abort()`
        follows if it does not.
        """
        if self.closed or self._closing is not None:
            return
        protocol = self._core()
        if protocol.state is OPEN:
            protocol.send_close(code, reason)
            for data in protocol.data_to_send():
                self._write(data)
        self._closing = self._await_close
        self.resume()  # to read the client's close frame
        self.flush()

    def finish(self) -> None:
        """Be done: the client closes."""
        self.close()

    def _await_close(self) -> None:
        """Have nothing left to do: the client's close frame ends it."""

    def abort(self) -> None:
        """Close the socket now. What waits is lost."""
        if self.closed:
            return
        self.closed = True
        self._reader.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._sock.close()
        self._out.clear()
        self._rest = self._fragments = self._closing = None
        self.waiting = 0

    def _lost(self, reason: str, error: OSError | None = None) -> None:
        if error is not None:
            logger.debug("WebSocket lost: %s", error)
        self.abort()
        self.owner.transport_lost(reason)
