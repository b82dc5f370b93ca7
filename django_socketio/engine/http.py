"""What the engine asks of an HTTP front: the parsed request, and the socket after the answer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any, Protocol
from urllib.parse import parse_qsl

from ..protocol.engineio import ErrorCode, error_body
from ..protocol.exceptions import ProtocolError

FRONT = "django_socketio.front"
"""The key of the front's `Front` in the WSGI environ. A server without one cannot serve us."""

HANDLED = "django_socketio.handled"
"""The key in the WSGI environ of a request that the engine has answered."""

OPENED = "django_socketio.opened"
"""The key in the WSGI environ of the id of the session whose handshake, by polling, it was."""

Headers = list[tuple[str, str]]
Handover = Callable[[Any, bytes, bytes], None]


class Front(Protocol):
    """The connection that a request came in on."""

    def handover(self, take: Handover) -> None:
        """
        Call `take(sock, greeting, data)` instead of sending the answer, if that is a 101.

        `sock` is a non-blocking socket that now belongs to the engine, `greeting` the answer,
        which the engine sends first, and `data` what the client sent behind its request.
        Whatever else the answer is, `take` is dropped.
        """

    def release(self) -> tuple[Any, bytes] | None:
        """
        Give up the connection with this request, of which nothing has been answered.

        Return the socket, which now belongs to the caller, and all bytes that were read of it from
        the head of this request on; or None if it cannot be passed on, as TLS that ends here.
        Nothing that the application returns for the request is sent.
        """

    def fileno(self) -> int:
        """Return the descriptor, to watch it for the client's going away; -1 if there is none."""


class Refused(Exception):
    """
    The request is answered with one of Engine.IO's errors; `hint` tells the client why.

    `limit` is the name of the setting that it is over, `retry_after` a number of seconds.
    """

    def __init__(
        self,
        code: ErrorCode,
        hint: str = "",
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        *,
        limit: str = "",
        retry_after: int = 0,
    ) -> None:
        super().__init__(code, hint, status)
        self.code = code
        self.hint = hint
        self.status = status
        self.limit = limit
        self.retry_after = retry_after


@dataclass(slots=True)
class Request:
    """The part of a WSGI environ that the engine reads."""

    method: str
    query: Mapping[str, str]
    environ: dict[str, Any]

    @classmethod
    def from_environ(cls, environ: dict[str, Any]) -> "Request":
        """Raise `Refused` for a query that cannot be read one way only."""
        try:
            pairs = _parse_query(environ.get("QUERY_STRING", ""))
        except ValueError:
            raise Refused(ErrorCode.BAD_REQUEST, "too many parameters") from None
        query = dict(pairs)
        if len(query) != len(pairs):
            raise Refused(ErrorCode.BAD_REQUEST, "a parameter stands twice")
        return cls(environ["REQUEST_METHOD"], query, environ)

    @property
    def front(self) -> Front:
        front: Front = self.environ[FRONT]
        return front

    def read_body(self, maximum: int) -> bytes:
        """
        Read the body, at most `maximum` bytes: never more is buffered.

        Raise `Refused` with 413 for a longer one, whether it says so or is sent in chunks, and
        `ProtocolError` for one that ends early.
        """
        declared = self.environ.get("CONTENT_LENGTH") or ""
        chunked = "HTTP_TRANSFER_ENCODING" in self.environ
        if not declared and not chunked:
            return b""
        if not chunked and int(declared) > maximum:
            raise _too_large(maximum)
        stream, parts, size = self.environ["wsgi.input"], [], 0
        try:
            while part := stream.read(min(maximum + 1 - size, 65536)):
                parts.append(part)
                size += len(part)
                if size > maximum:
                    raise _too_large(maximum)
        except OSError as error:
            raise ProtocolError(f"the body broke off: {error}") from None
        return b"".join(parts)


def _parse_query(query: str) -> list[tuple[str, str]]:
    if "%" in query or "+" in query or query.count("&") > 20:
        return parse_qsl(query, True, max_num_fields=100)
    pairs = []
    for item in query.split("&"):
        name, _, value = item.partition("=")
        if item:
            pairs.append((name, value))
    return pairs


def _too_large(maximum: int) -> Refused:
    return Refused(
        ErrorCode.BAD_REQUEST,
        f"the body is over maxPayload ({maximum} bytes)",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        limit="MAX_PAYLOAD",
    )


@dataclass(slots=True)
class Response:
    status: HTTPStatus
    body: bytes = b""
    headers: Headers = field(default_factory=list)
    sent: Callable[[bool], None] | None = None
    """Is told, once, whether the front could write all of it, or has gone on without."""

    @classmethod
    def text(cls, body: bytes) -> "Response":
        # A poll's answer must never come from a cache.
        headers = [("Content-Type", "text/plain; charset=UTF-8"), ("Cache-Control", "no-store")]
        return cls(HTTPStatus.OK, body, headers)

    @classmethod
    def refusal(cls, refused: Refused) -> "Response":
        body = error_body(refused.code, refused.hint)
        headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        if refused.retry_after:
            headers.append(("Retry-After", str(refused.retry_after)))
        elif refused.status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("Retry-After", "1"))
        if refused.retry_after or refused.status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            # Rather than keep a connection for nothing, or read the rest of the body.
            headers.append(("Connection", "close"))
        return cls(refused.status, body, headers)


def send_at_once(sock: Any) -> None:
    """
    Have no write wait for the client's delayed ACK of the one before.

    Head and body of an answer leave in two; the second of each poll waited for 40 ms.
    """
    try:
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    except OSError:
        pass  # a Unix socket, or the client is gone already and the first read will tell


def send_last(sock: Any, response: Response) -> None:
    """Send a response on a connection that was handed over, and close it."""
    headers = [*response.headers, ("Content-Length", str(len(response.body)))]
    lines = [f"HTTP/1.1 {response.status.value} {response.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    try:
        sock.send("\r\n".join([*lines, "", ""]).encode("latin-1") + response.body)
    except OSError:
        pass  # the client has gone, or its very first bytes do not fit
    sock.close()


class _Told:
    """A body that says what has become of it: a front asks for more when it has written a part."""

    def __init__(self, body: bytes, sent: Callable[[bool], None]) -> None:
        self._body = body
        self._sent: Callable[[bool], None] | None = sent

    def __iter__(self) -> Iterator[bytes]:
        body, self._body = self._body, b""
        yield body
        self._tell(True)

    def close(self) -> None:
        self._tell(False)

    def _tell(self, whether: bool) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            sent(whether)


def send_response(response: Response, start_response: Any) -> Iterable[bytes]:
    """Send an engine's response as WSGI wants it."""
    status = f"{response.status.value} {response.status.phrase}"
    headers = list(response.headers)
    if response.status >= 200 and response.status is not HTTPStatus.NO_CONTENT:
        headers.append(("Content-Length", str(len(response.body))))
    start_response(status, headers)
    if response.sent is not None:
        return _Told(response.body, response.sent)
    return [response.body] if response.body else []
