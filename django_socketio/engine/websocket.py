"""
The WebSocket transport: a socket, a read watcher and the Sans-I/O core of `websockets`.

Everything here runs in the thread of the loop, most of it in the loop's callbacks: nothing waits
and nothing raises.
"""

import itertools
import logging
import re
from collections.abc import Callable, Hashable, Iterable
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

from .deadlines import Lane
from .frames import Frame, Keyed, LossyFrame
from .http import Request
from .latest import Latest
from .outbox import Outbox

logger = logging.getLogger(__name__)

apply_mask = masking.apply_mask

NORMAL_CLOSURE = int(CloseCode.NORMAL_CLOSURE)

_READ_SIZE = 65536
_CHUNK = 262144  # bytes of many frames that are joined for one call
_RECORD = 16384  # the same for TLS, which takes a record as a whole or not at all
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
    def message_began(self) -> None: ...
    def message_ended(self) -> None: ...
    def over_limit(self, limit: str) -> None: ...
    def transport_lost(self, reason: str) -> None: ...
    def too_slow(self, why: str) -> None: ...


class _Stall:
    """How far the kernel has taken what waits."""

    __slots__ = ("begun", "fixed", "latest", "writer")

    def __init__(self) -> None:
        self.begun = 0
        """Bytes of the first frame that have left."""
        self.fixed = 0
        """Frames of which some has left, or that TLS has seen and insists on."""
        self.latest: Latest[bytes] | None = None
        self.writer: Any = None


class _Protocol(WebSocketProtocol):
    """Lets a client close within a fragmented message, as it may (RFC 6455, 5.4)."""

    def recv_frame(self, frame: WebSocketFrame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class _Message:
    """One that comes in fragments (RFC 6455, 5.4), in one piece: a million cost a million bytes."""

    __slots__ = ("data", "fragments", "is_text")

    def __init__(self, is_text: bool) -> None:
        self.is_text = is_text
        self.data = bytearray()
        self.fragments = 0


class WebSocketTransport:
    """
    One WebSocket, open since its handshake.

    `waiting` counts the bytes that were sent here and have not left. What waits may not exceed
    `max_buffer`, but for a single message that is larger and has nothing before it. While the
    kernel takes no more the client is behind, and there is a `_stall`, which `stalled` times.
    """

    __slots__ = (
        "_bound",
        "_closing",
        "_loop",
        "_max_fragments",
        "_max_payload",
        "_message",
        "_out",
        "_outbox",
        "_protocol",
        "_reader",
        "_sock",
        "_stall",
        "_stalled",
        "_tls",
        "_unread",
        "closed",
        "max_buffer",
        "owner",
        "paused",
        "waiting",
    )

    name = "websocket"

    _piece = 8192
    """Bytes that the protocol is given at once: all that they hold is there before we can pause."""

    def __init__(
        self,
        sock: Any,
        owner: Owner,
        loop: Any,
        outbox: Outbox,
        stalled: Lane,
        *,
        max_payload: int,
        max_fragments: int,
        max_buffer: int,
    ) -> None:
        self._sock = sock
        self._tls = hasattr(sock, "pending")
        self.owner = owner
        self._loop = loop
        self._outbox = outbox
        self._stalled = stalled
        self.max_buffer = self._bound = max_buffer
        self._max_payload = max_payload
        self._max_fragments = max_fragments
        self._protocol: WebSocketProtocol | None = None
        self._message: _Message | None = None
        self._unread: bytes | None = None
        self._out: list[bytes] = []
        self._stall: _Stall | None = None
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
        """Stop reading, so that TCP slows the client down. What was read is kept as it came."""
        if not self.paused:
            self.paused = True
            self._reader.stop()

    def resume(self) -> None:
        if self.paused and not self.closed:
            self.paused = False
            self._reader.start(self.read)
            if self._tls or self._unread:
                self._loop.run_callback(self.read)

    # Sending

    def send(self, frame: Frame) -> None:
        """Send at the end of this loop turn. Frames for a closed transport are dropped."""
        if self._closing is None and not self.closed:
            self._write(frame.websocket)

    def send_lossy(self, frame: LossyFrame) -> None:
        """Send; a client that is behind does without, or without an earlier one of its key."""
        if self._closing is not None or self.closed:
            return
        data = self._data(frame)
        if self._stall is None and frame.key is None and self.waiting + len(data) > self._bound:
            self.flush()  # which is to show whether the client is behind
        if self._stall is None:
            self._write(data)
        elif frame.key is None:
            frame.dropped()
        else:
            self._replace(self._stall, data, frame.key)

    def _data(self, frame: Frame) -> bytes:
        return frame.websocket

    def _write(self, data: bytes) -> None:
        out = self._out
        if not out:
            self._outbox.add(self)
        out.append(data)
        self.waiting += len(data)
        if self.waiting > self._bound:
            self._overflow()

    def _replace(self, stall: _Stall, data: bytes, key: Hashable) -> None:
        """Have `data` wait, and nothing of its key before it that can still be left out."""
        self._drop(self._coalesce(stall).append(data, key, stall.fixed))
        self.waiting += len(data)
        if self.waiting > self._bound:
            self._overflow()

    def _coalesce(self, stall: _Stall) -> Latest[bytes]:
        """Leave out what has become old before the client was known to be behind."""
        if stall.latest is None:
            stall.latest = Latest(self._out, b"")
            self._drop(stall.latest.index(stall.fixed))
        return stall.latest

    def _drop(self, frames: Iterable[bytes]) -> None:
        for data in frames:
            assert isinstance(data, Keyed)
            self.waiting -= len(data)
            data.dropped()

    def _overflow(self) -> None:
        if self._stall is None and len(self._out) > 1:
            self._make_room()
        elif self._stall is None:  # it waits for nothing but its turn
            self._bound = max(self.max_buffer, self.waiting)
        else:
            self._coalesce(self._stall)
            if self.waiting > self._bound:
                limit = f"SOCKETIO_MAX_BUFFER ({self.max_buffer})"
                self._give_up(f"{self.waiting} bytes wait, more than {limit}")

    def _make_room(self) -> None:
        """Flush before the turn ends: a handler that sends much in one is not a slow client."""
        last = self._out.pop()
        self.waiting -= len(last)
        self.flush()
        if self.closed:
            return
        if self._stall is not None and isinstance(last, Keyed):
            self._replace(self._stall, last, last.key)
        else:
            self._write(last)

    def took_nothing(self) -> None:
        """Be told that the kernel has taken nothing for too long, while something waited."""
        limit = f"SOCKETIO_WRITE_TIMEOUT ({self._stalled.delay:g} s)"
        self._give_up(f"took none of {self.waiting} bytes within {limit}")

    def _give_up(self, why: str) -> None:
        self.abort()
        self.owner.too_slow(why)

    def fail(self) -> None:
        """Be told that a flush has failed for a reason of our own."""
        self._lost("transport error")

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        out = self._out
        if self.closed or self._stall is not None or not out:
            return
        if self.waiting > _RECORD and (self._tls or self.waiting > _CHUNK):
            self._write_in_chunks()
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        sent = self._send(data)
        if sent == len(data):
            out.clear()
            self._drained()
        elif sent >= 0:
            self._stall = _Stall()
            self._taken(self._stall, sent)
            self._wait_for_kernel(self._stall, sent, len(data) - sent)

    def _write_in_chunks(self) -> None:
        """Write until nothing waits or the kernel takes no more."""
        stall = self._stall = self._stall or _Stall()
        total = sent = size = 0
        while self._out and sent == size:
            data = self._chunk(stall)
            size = len(data)
            sent = self._send(data)
            if sent < 0:
                return
            self._taken(stall, sent)
            total += sent
        if self._out:
            self._wait_for_kernel(stall, total, size - sent)
        else:
            self._end_stall()
            self._drained()

    def _chunk(self, stall: _Stall) -> bytes | memoryview:
        """Return what to write next; what TLS has not taken must come again as it was."""
        out, most = self._out, _RECORD if self._tls else _CHUNK
        first = memoryview(out[0])[stall.begun :]
        if len(first) >= most or len(out) == 1:
            return first[:most] if self._tls else first
        parts: list[bytes | memoryview] = [first]
        size = len(first)
        for data in itertools.islice(out, 1, None):
            parts.append(data)
            size += len(data)
            if size >= most:
                break
        return b"".join(parts)[:most]

    def _taken(self, stall: _Stall, sent: int) -> None:
        """
        Forget what has left.

        The frames behind it stay what they are: each one object for all who wait for it, and one
        that a later one of its key may replace.
        """
        out, sent, count = self._out, stall.begun + sent, 0
        while count < len(out) and len(out[count]) <= sent:
            sent -= len(out[count])
            count += 1
        del out[:count]
        stall.begun = sent
        if stall.latest is not None:
            stall.latest.removed(count)

    def _wait_for_kernel(self, stall: _Stall, progress: int, refused: int) -> None:
        seen = stall.begun + (refused if self._tls else 0)
        sizes = itertools.accumulate(map(len, self._out), initial=0)
        stall.fixed = sum(1 for _ in itertools.takewhile(lambda start: start < seen, sizes))
        if stall.writer is None:
            stall.writer = self._loop.io(self._sock.fileno(), _WRITE)
            stall.writer.start(self._write_in_chunks)
            self._stalled.add(self)
        elif progress:
            self._stalled.add(self)  # anew

    def _end_stall(self) -> None:
        stall, self._stall = self._stall, None
        if stall is not None and stall.writer is not None:
            stall.writer.close()
            self._stalled.discard(self)

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
        self._bound = self.max_buffer
        if self._closing is not None:
            self._closing()

    # Receiving

    def read(self) -> None:
        """Take what there is, without waiting."""
        if self.closed or self.paused:
            return
        try:
            data = self._unread
            if data is None:
                data = self._sock.recv(_READ_SIZE)
            else:
                self._unread = None
            if data:
                self._received(data)
            else:
                self._lost("transport close")
        except _WOULD_BLOCK:
            return
        except OSError as error:
            self._lost("transport error", error)
        except MemoryError:  # that of one message, which the next client need not miss
            logger.exception("There is no memory for what a client sent")
            self._lost("transport error")
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
        plain = self._protocol is None and self._closing is None and not self.paused
        while plain and size - at > 5 and data[at] == _WHOLE_TEXT:
            length, mask = data[at + 1] - 0x80, at + 2  # negative without a mask, which is a must
            if length == 126:
                length, mask = data[at + 2] << 8 | data[at + 3], at + 4
            start = mask + 4
            end = start + length
            if not 0 <= length <= self._max_payload or data[at + 1] == 0xFF or end > size:
                break
            try:
                text = str(apply_mask(data[start:end], data[mask:start]), "utf-8")
            except UnicodeDecodeError:
                break
            at = end
            self.owner.receive_text(text)
            plain = self._closing is None and not self.closed and not self.paused
        while at < size and not self.closed:
            if self.paused:
                self._unread = data[at:]
                return
            self._frames_received(data[at : at + self._piece])
            at += self._piece

    def _frames_received(self, data: bytes) -> None:
        protocol = self._core()
        protocol.receive_data(data)
        answers = protocol.data_to_send()
        if answers and answers[-1] != b"":
            # Pongs before the answers to messages whose fragments may be around the pings.
            self._answer(answers)
            answers = []
        for frame in protocol.events_received():
            if self.closed:
                return
            assert isinstance(frame, WebSocketFrame)  # the handshake is behind it
            self._frame_received(frame)
        answers += protocol.data_to_send()
        if answers and not self.closed:
            self._answer(answers)

    def _core(self) -> WebSocketProtocol:
        if self._protocol is None:
            self._protocol = _Protocol(
                Side.SERVER, state=OPEN, max_size=self._max_payload, logger=logger
            )
        return self._protocol

    def _frame_received(self, frame: WebSocketFrame) -> None:
        opcode = frame.opcode
        if self._closing is not None or opcode not in _DATA:
            return  # control frames are answered by the protocol, in data_to_send()
        if frame.fin and opcode is not _CONTINUATION:
            self._message_received(opcode is _TEXT, frame.data)
        else:
            self._fragment_received(frame)

    def _fragment_received(self, frame: WebSocketFrame) -> None:
        if frame.opcode is not _CONTINUATION:
            self._message = _Message(frame.opcode is _TEXT)
            self.owner.message_began()
        message = self._message
        assert message is not None  # else the protocol would have failed
        message.data += frame.data
        message.fragments += 1
        if message.fragments > self._max_fragments:
            self.owner.over_limit("MAX_FRAGMENTS")
            self._fail(CloseCode.POLICY_VIOLATION, "too many fragments")
        elif frame.fin:
            self._message = None
            self.owner.message_ended()
            self._message_received(message.is_text, message.data)

    def _message_received(self, is_text: bool, data: bytes | bytearray | memoryview) -> None:
        if not is_text:
            self.owner.receive_binary(bytes(data))
            return
        try:
            text = str(data, "utf-8")
        except UnicodeDecodeError:
            self._fail(CloseCode.INVALID_DATA)  # RFC 6455, 8.1
            return
        self.owner.receive_text(text)

    def _fail(self, code: int, reason: str = "") -> None:
        """Fail the connection; the close frame leaves with what the protocol has to say."""
        self._core().fail(code, reason)
        self._closing = self._shutdown

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
            if protocol.close_sent and protocol.close_sent.code == CloseCode.MESSAGE_TOO_BIG:
                self.owner.over_limit("MAX_PAYLOAD")
        self.owner.transport_lost("parse error" if failed else "transport close")

    def _shutdown(self) -> None:
        """Send no more, and wait for the client to close."""
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError:
            self.abort()

    # Closing

    def close(self, code: int = NORMAL_CLOSURE, reason: str = "") -> None:
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
        self._end_stall()
        self._sock.close()
        self._out.clear()
        self._message = self._unread = self._closing = None
        self.waiting = 0

    def _lost(self, reason: str, error: OSError | None = None) -> None:
        if error is not None:
            logger.debug("WebSocket lost: %s", error)
        self.abort()
        self.owner.transport_lost(reason)
