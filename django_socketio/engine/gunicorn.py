"""
The HTTP front of a worker: gunicorn's parser, and a socket that is given away after a 101.

A head has to pass two parsers. gunicorn's decides what the request is; ours refuses whatever could
be read in two ways, so that both fronts refuse the same, however gunicorn is configured.
"""

import logging
from collections.abc import Iterable
from datetime import datetime, timedelta
from http import HTTPStatus
from socket import SHUT_WR
from ssl import SSLWantReadError, SSLWantWriteError
from time import monotonic
from typing import Any

from gevent.socket import wait_read, wait_write
from gevent.ssl import SSLSocket
from gunicorn.http.body import Body
from gunicorn.http.errors import (
    ConfigurationProblem,
    ExpectationFailed,
    ForbiddenProxyRequest,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
)
from gunicorn.http.message import Request
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import create

from . import head, pywsgi
from .body import Chunks, Pace
from .head import END, MAX_HEAD, BadRequest
from .http import FRONT, HANDLED, Handover, Headers, send_at_once
from .pywsgi import SocketIOServer

logger = logging.getLogger(__name__)

# Taken apart here in ways that gunicorn's type stubs do not foresee.
_Body: Any = Body
_Request: Any = Request
_Unreader: Any = SocketUnreader
_create: Any = create

_STATUS = {
    LimitRequestLine: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    LimitRequestHeaders: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    ExpectationFailed: HTTPStatus.EXPECTATION_FAILED,
    ForbiddenProxyRequest: HTTPStatus.FORBIDDEN,
    ConfigurationProblem: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The answers to what gunicorn refuses, where that is not 400."""

_OF_THE_CONNECTION = (FRONT, "gunicorn.socket", "wsgi.early_hints")
"""What is in an environ while the request is answered, and no longer."""

_PROXY_V2 = b"\r\n\r\n\x00\r\nQUIT\n"
_READ, _LARGE = 8192, 65536


class Connection:
    """
    A client, as gunicorn takes a socket: it waits in greenlets, and never for too long.

    `sock` is non-blocking, a plain one or gevent's for TLS. `received` is what has come since
    the head began that is being read, or that was read last.
    """

    def __init__(self, sock: Any, server: SocketIOServer) -> None:
        self.sock = sock
        self.received = b""
        self.intact = True  # of a request nothing was read but `received`, and nothing answered
        self.lost = False
        self.expects_continue = False
        self._server = server
        self._yield_if_hogging = server.greenlets.yield_if_hogging
        self._in_head = False
        self._deadline: float | None = None
        self._pace = Pace(pywsgi.BODY_TIMEOUT, pywsgi.BODY_RATE)
        self._held: list[bytes] | None = None
        send_at_once(sock)

    # The phases of a request

    def begin_head(self, data: bytes, idle: float | None) -> None:
        """
        Expect a head that begins with `data`.

        If there is none yet, the time for it runs from the first byte on, which may take `idle`
        seconds, or from now if that is None.
        """
        self._in_head, self.received, self.intact = True, data, True
        self._idle = idle
        begun = bool(data) or idle is None
        self._deadline = monotonic() + self._server.head_timeout if begun else None

    def begin_body(self) -> None:
        """Expect as much as the parser asks for: the connection must not end before that."""
        self._in_head, self._deadline = False, None
        self._pace = Pace(pywsgi.BODY_TIMEOUT, pywsgi.BODY_RATE)

    def begin_skipping(self) -> None:
        """Give all that is left of a body the time that a part of it has."""
        self._deadline = monotonic() + pywsgi.BODY_TIMEOUT

    # What gunicorn calls

    def recv(self, size: int) -> bytes:
        return self._recv_head() if self._in_head else self._recv_body(size)

    def _recv_head(self) -> bytes:
        if len(self.received) > self._server.max_head:
            raise LimitRequestHeaders("head too large")
        timeout = self._idle if self._deadline is None else self._left()
        try:
            data = self._receive(_READ, timeout)
        except TimeoutError:
            if self._deadline is not None:
                self._server.over_limit("HEAD_TIMEOUT")
                logger.info("A request took too long to come")
            raise
        if self._deadline is None:
            self._deadline = monotonic() + self._server.head_timeout
        self.received += data
        return data

    def _recv_body(self, size: int) -> bytes:
        if self.expects_continue:
            self.expects_continue = False
            self.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.intact = False
        began = monotonic()
        data = self._receive(size, self._body_patience())
        self._pace.waited(monotonic() - began, len(data))
        self._yield_if_hogging()
        if not data:  # gunicorn would take what there is for all of it
            self.lost = True
            raise ConnectionResetError("the body broke off")
        return data

    def _body_patience(self) -> float:
        try:
            return self._pace.patience() if self._deadline is None else self._left()
        except TimeoutError:
            self.lost = True
            raise

    def _left(self) -> float:
        assert self._deadline is not None
        return max(self._deadline - monotonic(), 0)

    def sendall(self, data: bytes) -> None:
        self.intact = False
        if self._held is not None:
            self._held.append(data)
            return
        for start in range(0, len(data), _LARGE):
            self._send(memoryview(data)[start : start + _LARGE])
            self._yield_if_hogging()

    send = sendall

    def hold(self) -> None:
        """Keep what is sent until `flush()`, so that head and body leave together."""
        self._held = []

    def flush(self) -> None:
        held, self._held = self._held, None
        if held:
            self.sendall(b"".join(held))

    # The socket

    def _receive(self, size: int, timeout: float | None) -> bytes:
        data: bytes = self._wait_for(self.sock.recv, size, wait_read, timeout)
        return data

    def _send(self, data: memoryview) -> None:
        until = monotonic() + pywsgi.SEND_TIMEOUT
        while data:
            left = max(until - monotonic(), 0)
            data = data[self._wait_for(self.sock.send, data, wait_write, left) :]

    def _wait_for(self, operation: Any, argument: Any, wait: Any, timeout: float | None) -> Any:
        """Return `operation(argument)` as soon as it need not wait; `TimeoutError` if too late."""
        # In all: of TLS, a record that drips in takes many waits.
        until = None if timeout is None else monotonic() + timeout
        try:
            while True:
                try:
                    return operation(argument)
                except BlockingIOError:
                    waits = wait
                except SSLWantReadError:
                    waits = wait_read
                except SSLWantWriteError:
                    waits = wait_write
                waits(self.sock.fileno(), None if until is None else max(until - monotonic(), 0))
        except OSError:
            self.lost = True
            raise

    def fileno(self) -> int:
        fd: int = self.sock.fileno()
        return fd

    def let_go(self) -> Any:
        """Return the socket, which is no longer ours."""
        sock, self.sock = self.sock, None
        return sock

    def linger(self) -> None:
        """Let a client that sends what nobody reads get to its answer: a close would be a reset."""
        if self.lost:
            return
        self.begin_skipping()
        try:
            if not isinstance(self.sock, SSLSocket):
                self.sock.shutdown(SHUT_WR)
            while self._receive(_LARGE, self._left()):
                self._yield_if_hogging()
        except OSError:
            pass

    def close(self) -> None:
        if self.sock is None:
            return
        try:
            self.sock.recv(MAX_HEAD)  # see `linger()`
        except OSError:
            pass
        self.sock.close()
        self.sock = None


class _Reader:
    """What the parser has for the body; whatever is wrong with it is an `OSError` to its reader."""

    def __init__(self, reader: Any, length: int | None) -> None:
        self._reader = reader
        self._left = length
        self.ended = length == 0
        self.failed = False

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._reader.read(size)
        except (ParseException, OSError) as error:
            self.failed = True
            raise OSError(f"malformed body: {error}") from error
        if self._left is not None:
            self._left -= len(data)
        self.ended = self._left == 0 or not data
        return data


class Exchange:
    """One request and its answer: the `Front` in its environ."""

    def __init__(self, connection: Connection, server: "GunicornServer", preface: bytes) -> None:
        self._connection = connection
        self._server = server
        self._preface = preface
        self._take: Handover | None = None
        self._waits = False
        self.greeting = b""
        self.released = False
        self.response: Any = None

    # The front

    def handover(self, take: Handover) -> None:
        self._take = take

    def release(self) -> tuple[Any, bytes] | None:
        connection = self._connection
        if isinstance(connection.sock, SSLSocket) or not connection.intact:
            return None
        self.released = True
        return connection.let_go(), self._preface + connection.received

    def fileno(self) -> int:
        """Return the descriptor. Whoever asks for it waits, so the request no longer counts."""
        if not self._waits:
            self._waits = True
            self._server.leave()
        return self._connection.fileno()

    # The answer

    def start_response(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        if self.released:
            return _write_nothing
        if self._take is not None and status.startswith("101 "):
            self.greeting = _head(status, headers)
            return _write_nothing
        # gunicorn drops what an application says of the connection.
        if any(name.lower() == "connection" and "close" in value for name, value in headers):
            self.response.force_close()
        if self._connection.expects_continue:
            # What comes next is either the body or another request: who could tell?
            self.response.force_close()
        self.response.start_response(status, headers, exc_info)
        return self._write

    def _write(self, data: bytes) -> None:
        self._connection.hold()
        try:
            self.response.write(data)
        finally:
            self._connection.flush()

    def send(self, parts: Iterable[bytes]) -> None:
        """Send what the application returned, unless the connection is another's by now."""
        if self.released or self.greeting:
            return
        for part in parts:
            self._write(part)
            if part and self.response.req.method == "HEAD":
                break  # the head is known with the first part of a body, which may have no end
        if not self.greeting and not self.released:  # a generator may only now have begun
            self.response.close()

    def give_away(self, data: bytes) -> None:
        """Let the engine have the socket, and what the client sent behind its request."""
        assert self._take is not None
        self._take(self._connection.let_go(), self.greeting, data)

    def end(self) -> None:
        if not self._waits:
            self._server.leave()


def _head(status: str, headers: Headers) -> bytes:
    """Return an answer without a body."""
    lines = [f"HTTP/1.1 {status}"]
    # RFC 9110, 8.6: no Content-Length in a 1xx, whoever has put it there.
    lines += [f"{name}: {value}" for name, value in headers if name != "Content-Length"]
    if any("\n" in line or "\r" in line for line in lines):
        raise ValueError("a line end in a header")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _write_nothing(data: bytes) -> None:
    """Be the `write()` of an answer that has no body."""


class GunicornHandler:
    """Serves the requests of one connection."""

    _unread = b""
    """What has been read already, by another worker; set by `SocketIOServer.adopt()`."""

    def __init__(self, sock: Any, address: Any, server: "GunicornServer") -> None:
        if isinstance(sock, SSLSocket):
            sock.settimeout(0.0)
        self._server = server
        self._worker = server.worker
        self._address = address
        self._connection = Connection(sock, server)
        self._unreader = _Unreader(self._connection, _READ)
        self._requests = 0
        self._preface = b""  # what a proxy has said of the connection, raw and parsed
        self._proxied: Any = None

    def handle(self) -> None:
        """Serve until the connection is over, and close it unless it has been given away."""
        self._unreader.unread(self._unread)
        try:
            while self._serve_one():
                self._server.greenlets.yield_if_hogging()
        except OSError as error:
            if not self._connection.lost:
                raise
            logger.debug("A connection from %s ended: %s", self._address, error)
        finally:
            self._connection.close()

    def _serve_one(self) -> bool:
        """Serve a request; tell whether there may be another."""
        try:
            request, parsed = self._read_request()
            environ, exchange = self._prepare(request, parsed)
        except StopIteration:  # gunicorn's word for the end
            return False
        except (ParseException, BadRequest) as error:
            self._refuse(error)
            return False
        return self._answer(request, environ, exchange)

    # Reading

    def _read_request(self) -> tuple[Any, head.Head]:
        """Read a head and have both parsers look at it."""
        connection, cfg = self._connection, self._worker.cfg
        connection.begin_head(self._buffered(), self._server.keepalive if self._requests else None)
        self._requests += 1
        try:
            request = _Request(cfg, self._unreader, self._address, self._requests)
        except OSError:  # the end in the middle of a head, or too slow
            connection.lost = True
            raise
        data = connection.received
        data = data[: len(data) - len(self._buffered())]
        if len(data) > self._server.max_head + len(END):
            raise LimitRequestHeaders("head too large")
        if self._requests == 1:
            self._preface = _preface(data, cfg)
            connection.received = connection.received[len(self._preface) :]
            data = data[len(self._preface) :]
            self._proxied = request.proxy_protocol_info
        request.proxy_protocol_info = self._proxied
        parsed = head.parse(data.lstrip(b"\r\n").removesuffix(END))
        connection.begin_body()
        connection.expects_continue = request._expected_100_continue
        request._expected_100_continue = False  # or gunicorn would send it, whoever reads or not
        return request, parsed

    def _buffered(self) -> bytes:
        """Return what has been read beyond the head, or beyond the last request."""
        data: bytes = self._unreader.buf.getvalue()
        return data

    def _prepare(self, request: Any, parsed: head.Head) -> tuple[dict[str, Any], Exchange]:
        """Return the environ, and the exchange that is its front."""
        length = None if parsed.chunked else parsed.content_length or 0
        reader = request.body.reader
        if parsed.chunked:
            reader = Chunks(self._unreader.read, self._unreader.unread)
        request.body = _Body(_Reader(reader, length))
        exchange = Exchange(self._connection, self._server, self._preface)
        response, environ = _create(
            request, self._connection, self._address, self._server.address, self._worker.cfg
        )
        # Ours has the host of a target that names one, and joins cookies as cookies are joined.
        environ |= {**parsed.environ, "PATH_INFO": environ["PATH_INFO"] or "/"}
        environ["wsgi.multithread"] = True
        environ[FRONT] = exchange
        exchange.response = response
        if not (parsed.keep_alive and self._server.keepalive and self._server.started):
            response.force_close()
        return environ, exchange

    def _refuse(self, error: Exception) -> None:
        logger.info("Refused a request from %s: %s", self._address, error)
        status = error.status if isinstance(error, BadRequest) else HTTPStatus.BAD_REQUEST
        status = _STATUS.get(type(error), status)
        if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self._server.over_limit("MAX_HEAD")
        self._send_last(status)

    def _send_last(self, status: HTTPStatus) -> None:
        headers = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\n"
        self._connection.sendall(f"{headers}Content-Length: 0\r\n\r\n".encode())

    # Answering

    def _answer(self, request: Any, environ: dict[str, Any], exchange: Exchange) -> bool:
        worker, started = self._worker, datetime.now()
        self._server.enter()
        try:
            worker.cfg.pre_request(worker, request)
            done = self._run(environ, exchange)
            self._log(request, environ, exchange, datetime.now() - started)
        finally:
            exchange.end()
            self._server.request_ended()
            worker.cfg.post_request(worker, request, environ, exchange.response)
            # Handlers keep the environ for as long as their socket lives.
            for key in _OF_THE_CONNECTION:
                environ.pop(key, None)
        return self._settle(request, exchange, done)

    def _settle(self, request: Any, exchange: Exchange, done: bool) -> bool:
        """Tell whether the connection may bring another request, and have done with it if not."""
        if exchange.released:
            return False
        stays = done and bool(exchange.greeting or not exchange.response.should_close())
        if not stays or not self._skip(request.body):
            if not request.body.reader.ended:
                self._connection.linger()
            return False
        if exchange.greeting:
            exchange.give_away(self._buffered())
        return not exchange.greeting

    def _run(self, environ: dict[str, Any], exchange: Exchange) -> bool:
        """Run the application; tell whether it has answered as it should."""
        try:
            result = self._server.application(environ, exchange.start_response)
            try:
                exchange.send(result)
            finally:
                if hasattr(result, "close"):
                    result.close()
        except (Exception, SystemExit) as error:
            if self._connection.lost and isinstance(error, OSError):
                raise
            self._fail(environ, exchange, error)
            return False
        return True

    def _fail(self, environ: dict[str, Any], exchange: Exchange, error: BaseException) -> None:
        request, status = exchange.response.req, HTTPStatus.INTERNAL_SERVER_ERROR
        if request.body.reader.failed and isinstance(error, OSError):
            status = HTTPStatus.BAD_REQUEST
            logger.info("Refused a body from %s: %s", self._address, error)
        else:
            logger.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
        # Once begun, an answer can only be cut short, for the client to see.
        if not exchange.response.headers_sent and not exchange.released:
            exchange.response.status = f"{status.value} {status.phrase}"
            exchange.response.status_code = status.value
            self._send_last(status)

    def _log(
        self, request: Any, environ: dict[str, Any], exchange: Exchange, duration: timedelta
    ) -> None:
        response, log = exchange.response, self._worker.log
        if exchange.greeting or exchange.released:
            return  # the engine counts it itself
        # What the engine answers well would drown the rest.
        fine = HANDLED in environ and response.status_code < 400
        if not fine or log.loglevel <= logging.DEBUG:
            log.access(response, request, environ, duration)

    def _skip(self, body: Any) -> bool:
        """Read what the application has left of the body; tell whether the next request follows."""
        if self._connection.expects_continue:  # it waits for the answer before it sends anything
            return bool(body.reader.ended)
        self._connection.begin_skipping()
        skipped = 0
        while not body.reader.ended and not body.reader.failed and skipped <= pywsgi.MAX_SKIPPED:
            skipped += len(body.read(_READ))
        return bool(body.reader.ended)


def _preface(data: bytes, cfg: Any) -> bytes:
    """Return what a proxy has put before the first head, in either version of its protocol."""
    if cfg.proxy_protocol in (False, "off"):
        return b""
    if data.startswith(_PROXY_V2):
        return data[: 16 + int.from_bytes(data[14:16])]
    line, end, _ = data.partition(b"\r\n")
    return line + end if line.startswith(b"PROXY ") else b""


class GunicornServer(SocketIOServer):
    """
    Serves one listener of a gunicorn worker.

    `worker_connections` requests at a time are served: while there are more, nothing is accepted.
    Those that wait for the engine do not count, nor do sockets that have been given away.
    """

    handler_class: Any = GunicornHandler

    def __init__(self, listener: Any, application: Any, worker: Any, **options: Any) -> None:
        self.worker = worker
        self.keepalive: float = worker.cfg.keepalive
        self._limit: int = worker.cfg.worker_connections
        self._busy = 0
        super().__init__(
            listener,
            application,
            environ={"wsgi.multiprocess": worker.cfg.workers > 1},
            **options,
        )

    def update_environ(self) -> None:
        """Leave it to gunicorn, which asks no name server."""

    def full(self) -> bool:
        return self._busy >= self._limit

    def enter(self) -> None:
        """Count a request, for `drain()` and for `worker_connections`."""
        self.request_began()
        self._busy += 1
        self.worker.request_began()

    def leave(self) -> None:
        """Be told that a request is over, or that from now on it waits for the engine."""
        self._busy -= 1
        if not self.full():
            self._start_accepting_if_started()
