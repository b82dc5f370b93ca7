"""A connection to Redis that never blocks, and what goes over it."""

import _socket
import os
import select
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from ..exceptions import BackendError

_CHUNK = 65536
"""Bytes that are read at once."""

_AT_ONCE = struct.pack("ii", 1, 0)
"""What SO_LINGER takes for: drop what is not sent, and reset."""

_NOTHING = object()
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Refused(BackendError):
    """Redis answered with an error, whose text is the argument."""

    def __str__(self) -> str:
        return f"Redis refused: {self.args[0]}"

    @property
    def kind(self) -> str:
        """Return the first word, which tells which error it is."""
        word: str = self.args[0].partition(" ")[0]
        return word if word.isalpha() and word.isupper() else "ERR"

    @property
    def is_misplaced(self) -> bool:
        """Tell whether another connection may have another answer."""
        return self.kind in ("MOVED", "READONLY", "NOAUTH")


class TimedOut(BackendError):
    """Redis did not answer in time."""


def pack(*words: bytes) -> bytes:
    """Return a command as Redis reads it."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


class Wire:
    """
    A connection that never blocks, for one thread or greenlet at a time.

    Its user waits for it with `wait()`, by a `poll` of its own. So it may pass from one thread to
    the next, each with a gevent hub of its own or with none: the socket is no gevent one, which
    would belong to a hub, unless it speaks TLS.
    """

    __slots__ = ("_buffer", "_pid", "_reader", "_socket", "_unsent")

    def __init__(self, connection: Any) -> None:
        """Take the socket over from a `redis.connection.Connection` that is connected."""
        import hiredis

        taken, connection._sock = connection._sock, None
        is_tls = hasattr(taken, "pending")
        self._socket = taken if is_tls else _socket.socket(fileno=taken.detach())
        self._socket.setblocking(False)
        self._reader = hiredis.Reader(
            protocolError=BackendError, replyError=Refused, notEnoughData=_NOTHING
        )
        self._buffer = bytearray(_CHUNK)
        self._unsent: deque[memoryview] = deque()
        self._pid = os.getpid()

    def send(self, data: bytes) -> None:
        """Write what the kernel takes; the rest is for `flush()`."""
        self._unsent.append(memoryview(data))
        self.flush()

    def flush(self) -> None:
        self._check_owner()
        unsent = self._unsent
        while unsent:
            try:
                sent = self._socket.send(unsent[0])
            except _BLOCKED:
                return
            except OSError as error:
                raise BackendError(f"the connection broke: {error}") from error
            if sent == len(unsent[0]):
                unsent.popleft()
            elif sent:
                unsent[0] = unsent[0][sent:]
            else:  # what gevent says for TLS that would block
                return

    def receive(self) -> bool:
        """Read once; return whether there was something to read."""
        try:
            size = self._socket.recv_into(self._buffer)
        except _BLOCKED:
            return False
        except OSError as error:
            raise BackendError(f"the connection broke: {error}") from error
        if not size:
            raise BackendError("Redis closed the connection")
        self._reader.feed(self._buffer, 0, size)  # type: ignore[arg-type]
        return True

    def replies(self) -> Iterator[Any]:
        """Yield what has been read completely; an error reply is an instance of `Refused`."""
        gets = self._reader.gets
        try:
            while (reply := gets()) is not _NOTHING:
                yield reply
        except (TypeError, ValueError) as error:  # a map whose key is a list, and the like
            raise BackendError(f"Redis sent what cannot be read: {error}") from error

    def wait(self, seconds: float, also: _socket.socket | None = None) -> None:
        """Wait until there is something to read, here or in `also`, or to write."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if also is not None:
            poll.register(also, select.POLLIN)
        poll.poll(max(seconds, 0) * 1000)
        self._check_owner()

    def is_idle(self) -> bool:
        """Tell whether it can be used: nobody has closed it, and nothing unasked has come."""
        try:
            return not self.receive()
        except BackendError:
            return False

    def close(self) -> None:
        if os.getpid() == self._pid:  # a child shares the connection, and has its own descriptor
            with suppress(OSError):
                # What the kernel still holds must not arrive later, behind the next connection's.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError, ValueError):  # which is a gevent hub that ended with its thread
            self._socket.close()

    def __del__(self) -> None:
        # Nobody has to stop a backend that has only published.
        try:
            self._socket.close()
        except (AttributeError, OSError, ValueError):
            pass

    def _check_owner(self) -> None:
        """Keep greenlets that a fork has copied from taking what is meant for the parent."""
        if os.getpid() != self._pid:
            raise BackendError("the connection belongs to another process")


Connect = Callable[[], Wire]
"""Return a new connection, or raise `BackendError`. It may take longer than anybody wants."""
