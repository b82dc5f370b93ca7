"""
The HTTP front of a single process: gevent's pywsgi, which gives its socket away after a 101.

Its documentation says that it is not for direct exposure to the Internet: put a proxy in front.
"""

import logging
from _socket import socket as RawSocket
from ssl import SSLWantReadError
from typing import Any

from gevent.pywsgi import WSGIHandler, WSGIServer
from gevent.ssl import SSLSocket

from .http import FRONT, Handover, Response

logger = logging.getLogger(__name__)


def send_response(response: Response, start_response: Any) -> list[bytes]:
    """Send an engine's response as WSGI wants it."""
    status = f"{response.status.value} {response.status.phrase}"
    headers = list(response.headers)
    if response.status >= 200:
        headers.append(("Content-Length", str(len(response.body))))
    start_response(status, headers)
    return [response.body] if response.body else []


class SocketIOHandler(WSGIHandler):  # type: ignore[misc,unused-ignore]
    """Is the `Front` of each request that it parses."""

    _take: Handover | None = None

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ[FRONT] = self
        self._take = None
        return environ

    def handover(self, take: Handover) -> None:
        self._take = take

    def fileno(self) -> int:
        fd: int = self.socket.fileno()
        return fd

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.code == 101:
            # RFC 9110, 8.6: no Content-Length in a 1xx, whoever has put it there.
            self.response_headers = [
                item for item in self.response_headers if item[0].lower() != b"content-length"
            ]

    def handle_one_response(self) -> None:
        super().handle_one_response()
        take, self._take = self._take, None
        environ, self.environ = self.environ, None
        if environ is not None:
            environ.pop(FRONT, None)
        if take is not None and self.code == 101 and self.headers_sent:
            self._give_away(take)

    def start_response(self, *args: Any, **kwargs: Any) -> Any:
        write = super().start_response(*args, **kwargs)
        if self.close_connection:
            self.wsgi_input = _Unread()
        return write

    def _give_away(self, take: Handover) -> None:
        self.close_connection = True
        sock, self.socket = self.socket, None
        sock.settimeout(0.0)  # so that peek() returns what is there and waits for nothing
        try:
            data = self.rfile.peek()
        except SSLWantReadError:
            data = b""
        if not isinstance(sock, SSLSocket):
            sock = RawSocket(fileno=sock.detach())
            sock.setblocking(False)
        take(sock, data)

    def log_request(self) -> None:
        # Polls would drown the rest.
        level = logging.DEBUG if "&sid=" in (self.requestline or "") else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", self.format_request())


class _Unread:
    """Stands for a body that nobody reads because the connection is closed behind the answer."""

    def _discard(self) -> None:
        pass


class SocketIOServer(WSGIServer):  # type: ignore[misc,unused-ignore]
    handler_class = SocketIOHandler

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        # The inherited method closes the socket behind the handler, which may have given it away.
        try:
            sock = self.wrap_socket(client_socket, **self.ssl_args)
        except OSError as error:
            logger.info("TLS handshake with %s failed: %s", address, error)
            return
        self.handle(sock, address)
