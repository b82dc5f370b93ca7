"""The body of an HTTP request: how long it may take to come, and where its chunks end."""

import re
from collections.abc import Callable

_MAX_ASIDE = 8192
"""Bytes of a chunked body that may be neither data nor its size: extensions and trailers."""

# RFC 9112, 7.1: the extensions are ignored, but none of them may end a line for somebody else.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t -~\xa0-\xff]*)?\Z")
_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,15}(?:[ \t]*(?:;[\t -~\xa0-\xff]*)?)?\r?\Z")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\xa0-\xff]*\Z")


class MalformedBody(OSError):
    """The body is not what its head promised; who reads it takes that for a broken connection."""


class Pace:
    """
    The time that a body has: so many seconds, and one more for each `rate` bytes of it.

    Only waiting for the client counts, and no single wait may be longer than the first time is.
    """

    __slots__ = ("_left", "_longest", "_rate")

    def __init__(self, seconds: float, rate: float) -> None:
        self._longest = self._left = seconds
        self._rate = rate

    def patience(self) -> float:
        """Return how long to wait now. Raise `TimeoutError` if the body is too slow already."""
        if self._left <= 0:
            raise TimeoutError("the body is too slow")
        return min(self._left, self._longest)

    def waited(self, seconds: float, size: int) -> None:
        """Be told how long it took until `size` bytes came."""
        self._left += size / self._rate - seconds


class Chunks:
    """
    The reader of a chunked body.

    `receive` returns bytes of the connection, none at its end; those that are behind the body go
    back to `unread`.
    """

    __slots__ = ("_at", "_buffer", "_left", "_receive", "_spare", "_unread", "ended")

    def __init__(self, receive: Callable[[], bytes], unread: Callable[[bytes], object]) -> None:
        self._receive = receive
        self._unread = unread
        self._buffer = b""
        self._at = 0
        self._left = 0  # of the chunk, its data and the end of its line
        self._spare = _MAX_ASIDE
        self.ended = False

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes as soon as there are any; none at the end."""
        parts: list[bytes] = []
        while size and not self.ended and (not parts or self._at < len(self._buffer)):
            if not self._left:
                self._begin_chunk()
            else:
                part = self._take(size)
                size -= len(part)
                parts.append(part)
        return b"".join(parts)

    def _take(self, size: int) -> bytes:
        if self._at == len(self._buffer):
            self._more()
        part = self._buffer[self._at : self._at + min(size, self._left - 2)]
        self._at += len(part)
        self._left -= len(part)
        if self._left == 2:
            self._end_chunk()
        return part

    def _end_chunk(self) -> None:
        while not (end := self._buffer[self._at : self._at + 2]).endswith(b"\n"):
            if end not in (b"", b"\r"):
                break
            self._more()
        if end != b"\r\n":
            raise MalformedBody("a chunk that is longer than its size")
        self._at += 2
        self._left = 0

    def _begin_chunk(self) -> None:
        line = self._line(_BEGUN)
        match = _SIZE.match(line)
        if match is None:
            raise MalformedBody("a malformed size of a chunk")
        self._set_aside(len(match[2] or b""))
        size = int(match[1], 16)
        if size:
            self._left = size + 2
        else:
            self._end()

    def _end(self) -> None:
        while line := self._line():
            self._set_aside(len(line))
            if not _TRAILER.match(line):
                raise MalformedBody("a malformed trailer")
        self.ended = True
        self._unread(self._buffer[self._at :])
        self._buffer, self._at = b"", 0

    def _line(self, begun: re.Pattern[bytes] | None = None) -> bytes:
        """Return the next line. If it has only `begun`, what is there must match that."""
        while (end := self._buffer.find(b"\r\n", self._at)) < 0:
            there = self._buffer[self._at :]
            if len(there) > self._spare + 20:
                raise MalformedBody("a line without an end")
            if there and begun is not None and not begun.match(there):
                raise MalformedBody("a malformed size of a chunk")
            self._more()
        line = self._buffer[self._at : end]
        self._at = end + 2
        return line

    def _set_aside(self, size: int) -> None:
        self._spare -= size
        if self._spare < 0:
            raise MalformedBody("too much between the chunks")

    def _more(self) -> None:
        data = self._receive()
        if not data:
            raise MalformedBody("the body broke off")
        self._buffer, self._at = self._buffer[self._at :] + data, 0
