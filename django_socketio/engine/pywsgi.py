"""
The HTTP front of a single process: gevent's pywsgi, which gives its socket away after a 101.

Its documentation says that it is not for direct exposure to the Internet: put a proxy in front.
"""

import logging
from _socket import socket as RawSocket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM, EPIPE
from http import HTTPStatus
from io import BufferedReader, BytesIO, RawIOBase
from socket import SHUT_WR
from time import monotonic, time
from typing import Any

from gevent import Timeout, get_hub, sleep
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer
from gevent.socket import socket as GeventSocket
from gevent.ssl import SSLSocket
from greenlet import getcurrent, greenlet

from . import head
from .body import Chunks, MalformedBody, Pace
from .head import END, MAX_HEAD, BadRequest, Head
from .http import FRONT, HANDLED, Handover, Headers, send_at_once

logger = logging.getLogger(__name__)

HEAD_TIMEOUT = 10.0
"""Seconds for a request's head, from its first byte or from the accept, unless a server is told."""
IDLE_TIMEOUT = 75.0
"""Seconds that a connection may wait for its next request."""

_LAST_HEADERS = "Connection: close\r\nContent-Length: 0"

BODY_TIMEOUT = 20.0
"""Seconds that a body may stall, and that it may take beyond what `BODY_RATE` gives it."""

BODY_RATE = 1000.0
"""Bytes of a body that are worth another second."""

SEND_TIMEOUT = 20.0
"""Seconds that a client may take for the next part of its answer."""

MAX_SKIPPED = 65536
"""Bytes of a body that are read for nothing but the next request on its connection."""

_PART = 65536


# Both classes are built to be extended, but not described for it by gevent's type stubs.
_Handler: Any = WSGIHandler
_Server: Any = WSGIServer


class SocketIOHandler(_Handler):  # type: ignore[misc]
    """
    Parses heads itself, strictly and within a deadline, and is the `Front` of each request.

    pywsgi's own parser takes much that can be read in two ways.
    """

    environ: Any
    response_headers: Any
    _take: Handover | None = None
    _raw: RawSocket | None = None
    _waiting: Any = None
    _unread = b""
    _received = b""
    _greeting = b""
    _released = False
    _head: Head
    _body: Any = None

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server, rfile=_NO_FILE)

    @property
    def socket(self) -> Any:
        """
        The connection as a socket that greenlets can wait for.

        Made when somebody has to: a handshake, all of which comes at once, needs none.
        """
        if self._raw is not None:
            raw, self._raw = self._raw, None
            self._waiting = GeventSocket(raw.family, raw.type, raw.proto, raw.detach())
            send_at_once(self._waiting)
        return self._waiting

    @socket.setter
    def socket(self, sock: Any) -> None:
        if isinstance(sock, RawSocket):
            self._raw, self._waiting = sock, None
        else:
            self._raw, self._waiting = None, sock
            if sock is not None:
                send_at_once(sock)

    def handle(self) -> None:
        """Serve the requests of the connection, and close it unless it has been given away."""
        try:
            while (result := self.handle_one_request()) is True:
                self.server.greenlets.yield_if_hogging()
            if result is not None:
                self.socket.sendall(result)
        except OSError as error:
            logger.debug("A connection from %s ended: %s", self.client_address, error)
        finally:
            self._close()

    def _close(self) -> None:
        if self._raw is None and self._waiting is None:
            return
        try:
            sock = self.socket
            if self._body is not None and not self._body.ended and not self._body.late:
                self._linger(sock)
            sock.settimeout(0.0)
            sock.recv(MAX_HEAD)  # closing with unread input would reset the connection
        except OSError:
            pass
        sock.close()
        self.socket = None

    def _linger(self, sock: Any) -> None:
        """Let a client that sends what nobody reads get to its answer: a close would be a reset."""
        if not isinstance(sock, SSLSocket):
            sock.shutdown(SHUT_WR)
        until = monotonic() + BODY_TIMEOUT
        while (left := until - monotonic()) > 0 and self._receive(_PART, left):
            self.server.greenlets.yield_if_hogging()

    def handle_one_request(self) -> Any:
        self._body = None
        try:
            data = self._read_head()
            if data is None:
                return None
            self._head = head.parse(data)
        except BadRequest as error:
            return self._refuse(error)
        request = self._head
        self.command, self.path, self.request_version = (
            request.method,
            request.target,
            request.version,
        )
        self.requestline = f"{self.command} {self.path} {self.request_version}"
        self.close_connection = not (request.keep_alive and self.server.started)
        self.content_length = request.content_length
        self.environ = self.get_environ()
        self.application = self.server.application
        self.handle_one_response()
        return None if self.close_connection else True

    def _read_head(self) -> bytes | None:
        """Return the next head without its end, or None if there is none to come."""
        data = self._unread.lstrip(b"\r\n") if self._unread else b""
        try:
            if self._raw is not None and not data:
                data = self._raw.recv(MAX_HEAD)
                if not data:
                    return None
        except BlockingIOError:
            pass
        except OSError:
            return None
        if END not in data:
            data = self._wait_for_head(data)
            if not data:
                return None
        end = data.find(END)
        if end > self.server.max_head:
            raise self._too_large()
        self._received = data
        self._unread = data[end + 4 :]
        return data[:end]

    def _wait_for_head(self, data: bytes) -> bytes:
        """Return `data` and all that comes until a head is whole, or nothing."""
        begun = bool(data) or not self.requestline
        patience = self.server.head_timeout if begun else IDLE_TIMEOUT
        deadline = None
        try:
            while END not in data:
                if len(data) > self.server.max_head:
                    raise self._too_large()
                head.check_start(data)
                part = self._receive(MAX_HEAD, patience)
                if not part:
                    return b""
                # RFC 9112, 2.2: some clients send an empty line behind a body.
                data = (data + part).lstrip(b"\r\n")
                # The deadline is for the whole head: a byte now and then does not move it.
                now = monotonic()
                deadline = deadline or now + self.server.head_timeout
                if now > deadline:
                    raise TimeoutError
                patience = deadline - now + 0.01
        except TimeoutError:
            if begun or data:
                self.server.over_limit("HEAD_TIMEOUT")
                logger.info("A request from %s took too long to come", self.client_address)
            return b""
        except OSError:  # gone
            return b""
        self.socket.settimeout(None)
        return data

    def _receive(self, size: int, seconds: float) -> bytes:
        with _patience(self.socket, seconds):
            data: bytes = self.socket.recv(size)
        return data

    def _too_large(self) -> BadRequest:
        self.server.over_limit("MAX_HEAD")
        return BadRequest("head too large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: BadRequest) -> bytes:
        logger.info("Refused a request from %s: %s", self.client_address, error)
        status = error.status
        return f"HTTP/1.1 {status.value} {status.phrase}\r\n{_LAST_HEADERS}\r\n\r\n".encode()

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = self.server.get_environ()
        environ.update(self._head.environ)
        if isinstance(self.client_address, tuple):
            environ["REMOTE_ADDR"] = self.client_address[0]
            environ["REMOTE_PORT"] = str(self.client_address[1])
        environ["wsgi.input"] = self.wsgi_input = self._open_body()
        environ["wsgi.input_terminated"] = True
        environ[FRONT] = self
        self._take = None
        return environ

    def _open_body(self) -> Any:
        request = self._head
        if not request.chunked and not request.content_length:
            return _NO_BODY
        expects = request.environ.get("HTTP_EXPECT", "").lower() == "100-continue"
        self._body = _Body(self, request.content_length, expects)
        return self._body

    def handover(self, take: Handover) -> None:
        self._take = take

    def release(self) -> tuple[Any, bytes] | None:
        if isinstance(self._waiting, SSLSocket) or not self._received:
            return None
        self._released = self.close_connection = True
        self.environ["wsgi.input"] = self.wsgi_input = _NO_BODY
        return self._let_go(), self._received

    def fileno(self) -> int:
        fd: int = (self._raw or self.socket).fileno()
        return fd

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.command == "HEAD":
            self.response_use_chunked = False  # the header stays, but there are no chunks
        elif not self.response_use_chunked and not self._has_header(b"content-length"):
            # HTTP/1.0 knows the end of a stream by the end of the connection.
            self.close_connection = self.code not in (204, 304) or self.close_connection
        if self.close_connection:
            # RFC 9112, 9.6: else the client may send its next request into the void.
            kept = [item for item in self.response_headers if item[0].lower() != b"connection"]
            self.response_headers = [*kept, (b"Connection", b"close")]

    def _has_header(self, name: bytes) -> bool:
        return any(item[0].lower() == name for item in self.response_headers)

    def handle_one_response(self) -> None:
        self.server.request_began()
        try:
            super().handle_one_response()
        finally:
            self.server.request_ended()
        take, self._take = self._take, None
        self._received = b""
        environ, self.environ = self.environ, None
        if environ is not None:
            environ.pop(FRONT, None)
        if take is not None and self.code == 101 and self.headers_sent:
            self._give_away(take)

    def start_response(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        if self._take is not None and status.startswith("101 "):
            self._switch(status, headers)
            return self._write_nothing
        write = super().start_response(status, headers, exc_info)
        if self.close_connection:
            self.wsgi_input = _NO_BODY
        return write

    def _switch(self, status: str, headers: Headers) -> None:
        """Keep a 101 back: it leaves together with what the engine says first."""
        lines = [f"HTTP/1.1 {status}"]
        # RFC 9110, 8.6: no Content-Length in a 1xx, whoever has put it there.
        lines += [f"{name}: {value}" for name, value in headers if name != "Content-Length"]
        if any("\n" in line or "\r" in line for line in lines):
            raise ValueError("a line end in a header")
        self._greeting = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.response_length = len(self._greeting)
        self.code, self._orig_status, self.status = 101, status, status.encode()
        self.headers_sent = True

    @staticmethod
    def _write_nothing(data: bytes) -> None:
        """Be the `write()` of an answer that has no body."""

    def write(self, data: bytes) -> None:
        if self.code == 101:
            return
        # RFC 9110, 9.3.2: the answer to a HEAD has no body, whatever the view returns.
        if self.command != "HEAD":
            super().write(data)
        elif not self.headers_sent:
            self._write_with_headers(b"")

    def process_result(self) -> None:
        if self._released:
            return  # it is another worker's to answer
        if self.command == "HEAD":
            # The head is known with the first part of a body, which may have no end.
            any(self.result)
            self.write(b"")
        else:
            super().process_result()

    def _sendall(self, data: Any) -> None:
        try:
            for start in range(0, len(data), _PART):
                with _patience(self.socket, SEND_TIMEOUT):
                    super()._sendall(memoryview(data)[start : start + _PART])
                self.server.greenlets.yield_if_hogging()
        except OSError as error:  # it hung up, which TLS calls otherwise, or it does not read
            raise BrokenPipeError(EPIPE, str(error)) from None

    def _give_away(self, take: Handover) -> None:
        self.close_connection = True
        take(self._let_go(), self._greeting, self._unread)

    def _let_go(self) -> Any:
        """Return the connection's socket, non-blocking, which is no longer ours."""
        sock: Any = self._raw or self._waiting
        self.socket = None
        if isinstance(sock, SSLSocket):
            sock.settimeout(0.0)
        elif not isinstance(sock, RawSocket):
            sock = RawSocket(sock.family, sock.type, sock.proto, sock.detach())
            sock.setblocking(False)
        return sock

    def handle_error(self, t: Any, v: Any, tb: Any) -> None:
        if self._released:
            logger.error("A request failed that was handed over", exc_info=(t, v, tb))
        elif issubclass(t, OSError) and self.wsgi_input.failed:
            # It is the client's fault, and no error of the view's.
            logger.info("Refused a body from %s: %s", self.client_address, v)
            self._send_error_response_if_possible(400)
        elif issubclass(t, SystemExit):
            # gevent would end the process for it; a view may not.
            logger.error("A view called for the end of the process", exc_info=(t, v, tb))
            self._send_error_response_if_possible(500)
        else:
            super().handle_error(t, v, tb)

    def log_request(self) -> None:
        if self._released:
            return
        # What the engine answers well it counts itself; polls would drown the rest.
        fine = self.code < 400 and HANDLED in (self.environ or ())
        level = logging.DEBUG if fine else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", self.format_request())


class _Body(BufferedReader):
    """What follows the head on the connection."""

    def __init__(self, handler: SocketIOHandler, length: int | None, expects: bool) -> None:
        self._source = _Chunked(handler) if length is None else _Counted(handler, length)
        self._source.expects_continue = expects
        super().__init__(self._source)

    @property
    def failed(self) -> bool:
        return self._source.failed

    @property
    def late(self) -> bool:
        return self._source.late

    @property
    def ended(self) -> bool:
        return self._source.ended

    def _discard(self) -> None:
        """Read what the application has left, for the next request follows."""
        if not self._source.discard():
            self._source.handler.close_connection = True


class _Source(RawIOBase):
    """The bytes of a body, as they come: first those that came with the head."""

    def __init__(self, handler: SocketIOHandler) -> None:
        self.handler = handler
        self.expects_continue = self.failed = self.late = False
        self._pace = Pace(BODY_TIMEOUT, BODY_RATE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(len(buffer))
        except OSError:
            self.failed = True
            self.handler.close_connection = True  # for what comes late is no request
            raise
        buffer[: len(data)] = data
        return len(data)

    def discard(self) -> bool:
        """Read the rest for nothing; return False if it is not worth that, or does not come."""
        if self.expects_continue:
            return self.ended  # the client waits for the answer before it sends anything
        skipped, self._pace = 0, Pace(BODY_TIMEOUT, float("inf"))
        try:
            while not self.failed and not self.ended and skipped <= MAX_SKIPPED:
                skipped += len(self._read(_PART))
        except OSError:
            return False
        return self.ended

    @property
    def ended(self) -> bool:
        raise NotImplementedError

    def _read(self, size: int) -> bytes:
        raise NotImplementedError

    def _receive(self, size: int) -> bytes:
        handler = self.handler
        if handler._unread:
            data = handler._unread[:size]
            handler._unread = handler._unread[len(data) :]
            return data
        if self.expects_continue:
            self.expects_continue = False
            handler.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        handler._received = b""  # is not all any more
        began = monotonic()
        try:
            data = handler._receive(size, self._pace.patience())
        except OSError:
            self.late = True
            raise
        self._pace.waited(monotonic() - began, len(data))
        handler.server.greenlets.yield_if_hogging()
        return data


class _Counted(_Source):
    """A body of which the head says how long it is."""

    def __init__(self, handler: SocketIOHandler, length: int) -> None:
        super().__init__(handler)
        self._left = length

    def _read(self, size: int) -> bytes:
        if self.ended:
            return b""
        data = self._receive(min(size, self._left))
        if not data:
            raise MalformedBody("the body broke off")
        self._left -= len(data)
        return data

    @property
    def ended(self) -> bool:
        return not self._left


class _Chunked(_Source):
    """A body in chunks."""

    def __init__(self, handler: SocketIOHandler) -> None:
        super().__init__(handler)
        self._chunks = Chunks(lambda: self._receive(_PART), self._unread)

    def _read(self, size: int) -> bytes:
        return self._chunks.read(size)

    @property
    def ended(self) -> bool:
        return self._chunks.ended

    def _unread(self, data: bytes) -> None:
        self.handler._unread = data + self.handler._unread


def _patience(sock: Any, seconds: float) -> AbstractContextManager[Any]:
    """Return a block in which the socket waits for so long at most."""
    sock.settimeout(seconds)
    if isinstance(sock, SSLSocket):
        # There that is the time of each wait, and a record that drips in takes many.
        return Timeout(seconds, TimeoutError("timed out"))
    return _AS_IT_IS


_AS_IT_IS = nullcontext()


class _Nothing(BytesIO):
    """No body, or one that nobody reads because the connection is closed behind the answer."""

    failed = False

    def _discard(self) -> None:
        pass


_NO_FILE = BytesIO()
_NO_BODY = _Nothing()


class Greenlets:
    """
    Greenlets that serve one connection after the other.

    What Django and others keep for each thread is then made once and not for every connection.
    Each connection has a `contextvars` context of its own.
    """

    def __init__(self) -> None:
        self._hub = get_hub()
        self._idle: list[greenlet] = []

    def yield_if_hogging(self) -> None:
        """Give the loop a turn if the running greenlet has had it for long without waiting."""
        if time() - self._hub.loop.now() > _SLICE:
            sleep(_A_TURN)

    def stop(self) -> None:
        """End those that wait for a connection."""
        while self._idle:
            self._hub.loop.run_callback(self._idle.pop().throw)

    def spawn(self, function: Callable[..., None], *args: Any) -> None:
        if self._idle:
            self._hub.loop.run_callback(self._idle.pop().switch, function, args)
        else:
            self._hub.loop.run_callback(greenlet(self._run, self._hub).switch, function, args)

    def _run(self, function: Callable[..., None], args: Any) -> None:
        current = getcurrent()
        while True:
            try:
                Context().run(function, *args)
            except Exception:
                logger.exception("A connection failed")
            if len(self._idle) >= _KEPT:
                return
            self._idle.append(current)
            function, args = self._hub.switch()


_KEPT = 32
_A_TURN = 1e-6
"""Seconds to sleep for a turn of the loop. None at all would be a callback before the next poll."""
_SLICE = 0.01
"""Seconds that one greenlet may run while others are ready."""


_PAUSE = 0.25
"""Seconds for which nothing is accepted when there are no descriptors, or no memory, left."""

_EXHAUSTED = (EMFILE, ENFILE, ENOBUFS, ENOMEM)


class SocketIOServer(_Server):  # type: ignore[misc]
    """
    Serves one listener.

    A head has to come within `head_timeout` seconds and have at most `max_head` bytes;
    `over_limit(name)` is told of those who go over a limit.
    """

    handler_class = SocketIOHandler

    def __init__(
        self,
        listener: Any,
        application: Any,
        *,
        head_timeout: float = HEAD_TIMEOUT,
        max_head: int = MAX_HEAD,
        over_limit: Callable[[str], None] = lambda limit: None,
        **options: Any,
    ) -> None:
        self.head_timeout = head_timeout
        self.max_head = max_head
        self.over_limit = over_limit
        self.greenlets = Greenlets()
        self._requests = 0
        self._no_request = Event()
        self._no_request.set()
        super().__init__(listener, application, spawn=self.greenlets.spawn, **options)

    def request_began(self) -> None:
        """Count a request that `drain()` waits for."""
        self._requests += 1
        self._no_request.clear()

    def request_ended(self) -> None:
        self._requests -= 1
        if not self._requests:
            self._no_request.set()

    def stop(self, timeout: float | None = None) -> None:
        super().stop(timeout)
        self.greenlets.stop()

    def drain(self, timeout: float) -> bool:
        """Accept nothing more, and wait until what was begun is answered; tell whether it is."""
        self.stop_accepting()
        sleep(_A_TURN)  # what has only just been accepted, or adopted, begins
        return bool(self._no_request.wait(timeout))

    def do_read(self) -> tuple[Any, Any] | None:
        try:
            return self._accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._pause(error)
            return None

    def _pause(self, error: OSError) -> None:
        """Leave those who come to the kernel for a moment: it would tell of them all the time."""
        self.over_limit("descriptors")
        logger.error("Nothing is accepted for %s seconds: %s", _PAUSE, error)
        self.stop_accepting()
        self._timer = self.loop.timer(_PAUSE)
        self._timer.start(self._start_accepting_if_started)

    def _accept(self) -> tuple[Any, Any] | None:
        if self.ssl_enabled:
            connection: tuple[Any, Any] | None = super().do_read()
            return connection
        fd, address = self.socket._accept()
        sock = RawSocket(self.socket.family, self.socket.type, self.socket.proto, fd)
        sock.setblocking(False)
        return sock, address

    def adopt(self, sock: RawSocket, data: bytes) -> None:
        """Serve a connection that another worker gave up, and whose first bytes are `data`."""
        try:
            handler = self.handler_class(sock, sock.getpeername(), self)
        except OSError:
            sock.close()  # the client has gone meanwhile
            return
        handler._unread = data
        self.greenlets.spawn(handler.handle)

    def do_close(self, *args: Any) -> None:
        """Leave it to the handler, which may have given the socket away."""

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        try:
            client_socket.getpeername()  # gevent would not close one that has gone already
            # In all: a client that sends byte by byte makes many waits of one handshake.
            with Timeout(self.head_timeout, TimeoutError("too slow")):
                sock = self.wrap_socket(client_socket, **self.ssl_args)
        except OSError as error:
            logger.info("TLS handshake with %s failed: %s", address, error)
            client_socket.close()
            return
        self.handle(sock, address)
