"""
The head of an HTTP request, parsed strictly: what could be read in two ways is refused.

Two parsers that disagree about where a request ends are what request smuggling lives on, so every
leniency that RFC 9112 allows a server is left out.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

MAX_HEAD = 16 * 1024
MAX_HEADERS = 100
END = b"\r\n\r\n"

# A target has no fragment (RFC 9112, 3.2): whoever is behind us may cut it off, or not.
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!\"$-~]+) HTTP/1\.([01])\Z")
# No white space before the colon (RFC 9112, 5.1); no line folding (5.2); and in the value no
# character that anything behind us may take for the end of a line. The white space around the
# value is stripped afterwards: an expression for it would try every way to divide a run of blanks.
_HEADERS = re.compile(
    rb"\r\n([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f\x85]*)(?=\r\n|\Z)"
)
_ABSOLUTE = re.compile(r"https?://([^/?]+)(/.*)?\Z", re.IGNORECASE)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_DIGITS = re.compile(r"[0-9]{1,15}\Z", re.ASCII)


class BadRequest(Exception):
    """The request is refused and its connection closed."""

    def __init__(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(slots=True)
class Head:
    """`environ` is the request's part of a WSGI environ, headers and all."""

    method: str
    target: str
    version: str
    environ: dict[str, str]
    content_length: int | None
    chunked: bool
    keep_alive: bool


def parse(data: bytes) -> Head:
    """Parse a head without its final empty line. Raise `BadRequest`."""
    line = data.partition(b"\r\n")[0]
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise BadRequest("malformed request line")
    method, target, version = match[1].decode(), match[2].decode(), f"HTTP/1.{match[3].decode()}"
    environ = _parse_headers(data[len(line) :])
    if "HTTP_HOST" not in environ and version == "HTTP/1.1":
        raise BadRequest("no Host header")
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        environ["HTTP_HOST"], target = absolute[1], absolute[2] or "/"
    elif target[0] != "/" and (method, target) != ("OPTIONS", "*"):
        raise BadRequest("malformed request target")
    path, _, query = target.partition("?")
    environ["REQUEST_METHOD"] = method
    environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1") if "%" in path else path
    environ["QUERY_STRING"] = query
    environ["SERVER_PROTOCOL"] = version
    length, chunked = _body(environ, version)
    return Head(method, target, version, environ, length, chunked, _keeps_alive(environ, version))


def check_start(data: bytes) -> None:
    """Raise `BadRequest` for the beginning of what can never become a head."""
    line, end, _ = data.partition(b"\r\n")
    if _BARE_LF.search(data) or (end and not _REQUEST_LINE.match(line)):
        raise BadRequest("malformed request line or line end")


def _parse_headers(data: bytes) -> dict[str, str]:
    headers = _HEADERS.findall(data)
    if len(headers) > MAX_HEADERS:
        raise BadRequest("too many headers")
    # Each took its line end, name, colon and value: what is left over was none.
    if sum(len(name) + len(value) + 3 for name, value in headers) != len(data):
        raise BadRequest("malformed header")
    environ: dict[str, str] = {}
    for name, value_ in headers:
        key = _environ_key(name)
        if key is None:
            continue
        value = value_.strip(b" \t").decode("latin-1")
        if key not in environ:
            environ[key] = value
        elif key in _SINGLE:
            raise BadRequest(f"two {name.decode()} headers")
        else:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    return environ


_SINGLE = frozenset(
    ("CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_HOST", "HTTP_TRANSFER_ENCODING", "HTTP_CONTENT_LENGTH")
)


@lru_cache(256)
def _environ_key(name: bytes) -> str | None:
    """Return the environ's key, or None for a name that would pass for another there."""
    if b"_" in name:
        return None
    key = name.decode().upper().replace("-", "_")
    return key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"


def _body(environ: dict[str, str], version: str) -> tuple[int | None, bool]:
    """Return the length of the body and whether it is chunked (RFC 9112, 6.3)."""
    declared = environ.get("CONTENT_LENGTH")
    encoding = environ.get("HTTP_TRANSFER_ENCODING")
    if encoding is not None:
        if declared is not None or version == "HTTP/1.0" or encoding.lower() != "chunked":
            raise BadRequest("ambiguous body")
        return None, True
    if declared is None:
        return None, False
    if not _DIGITS.match(declared):
        raise BadRequest("malformed Content-Length")
    return int(declared), False


def _keeps_alive(environ: dict[str, str], version: str) -> bool:
    connection = environ.get("HTTP_CONNECTION", "").lower()
    if version == "HTTP/1.0":
        return connection == "keep-alive"
    return "close" not in connection
