import logging
import os
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from typing import Any, ClassVar

from ..exceptions import BackendError
from . import frames
from .broker import Broker
from .frames import Name

logger = logging.getLogger(__name__)

_READ = 1 << 18
"""Bytes that one read takes at most."""

_SLICE = 0.01
"""Seconds that the thread works on what has arrived before it gives others a turn."""

_GRACE = 1.0
"""Seconds of an outage that callers sit out. For the rest of it they fail at once."""

_PACE = 1.0
"""Seconds between two looks at the clock, at most."""

_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.0
"""Seconds between attempts to connect, at most. A connection that lasts longer was a success."""

_STALLED = 3.0
"""Seconds without a look at the clock after which the thread counts as dead."""

_STOPPED = "The backend was stopped."


class Lost(Exception):
    """The connection is of no more use."""


class Bell:
    """A pipe to wake a thread that waits for a socket; it lasts as long as anybody holds it."""

    _ends: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._ends = self.ear, self._button = os.pipe()
        self._rung = False

    def __del__(self) -> None:
        for end in self._ends:
            os.close(end)

    def ring(self) -> None:
        if not self._rung:
            self._rung = True
            os.write(self._button, b"\0")

    def hear(self) -> None:
        """Have it silent, after it rang. What is looked at from then on is what it rang for."""
        os.read(self.ear, 64)
        self._rung = False


class Call:
    """What somebody asks of a `Link`, and waits for."""

    __slots__ = ("answered", "error", "given_up")

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.error = ""
        self.given_up = False

    def answer(self, error: str = "") -> None:
        self.error = error
        self.answered.set()


class Link:
    """
    A connection that is made again whenever it is lost, and the thread that it belongs to.

    kombu opens it: URLs, TLS, login, and declaring what there is to declare. Then the thread takes
    the socket over, and never waits in it; whoever wants something hands it a `Call`. py-amqp would
    wait for each confirm, read a frame in three system calls, keep whatever a stranger sends, and
    not let one read what another writes.

    `start()`, `ask()`, `tell()`, `close()` and `join()` are for everybody, the rest is the
    thread's. A link that is closed stays so. A forked child neither uses nor closes it.

    There are no locks: between threads of the system those of gevent's patched library stop for
    good. What others do here is one operation on a deque, a dict or an attribute at a time.
    """

    role: ClassVar[str]
    log_level: ClassVar[int]
    """Of the line about an outage, and of that about its end."""

    def __init__(self, broker: Broker, counters: Counter[str]) -> None:
        self.broker = broker
        self.counters = counters
        self.out = bytearray()
        self.closing = threading.Event()
        self.frame_max = 0
        self._urls = cycle(broker.urls)
        self._url = ""
        self._outage: float | None = None
        self._why = ""
        self._sock: Any = None
        self._reader = frames.Reader(0)
        self._missing = 0
        self._body: list[bytes] | None = None
        self._heartbeat = 0.0
        self._heard = self._spoke = self._turn = 0.0
        self._bell: Bell
        self._ended = False
        self._pid = os.getpid()
        self._native_id = threading.get_native_id()
        name = f"django-socketio AMQP {self.role}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # For everybody

    def start(self) -> None:
        """Connect soon; raise `BackendError` if the process has no thread or file to spare."""
        try:
            self._bell = Bell()
            self._thread.start()
        except (OSError, RuntimeError) as error:
            self._end()
            raise BackendError(f"There can be no connection: {error}") from error

    @property
    def is_alive(self) -> bool:
        """Whether the thread serves those who call."""
        ends = self._ended or self.closing.is_set()
        return not ends and not self.is_forked and not self._is_stalled

    @property
    def _is_stalled(self) -> bool:
        """
        Whether the thread is a greenlet of an OS thread that does not run its greenlets any more.

        That may be one of a pool, which was the first to publish.
        """
        if self._sock is None or threading.get_native_id() == self._native_id:
            return False
        return time.monotonic() - self._turn > _STALLED

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that the link belongs to."""
        return self._pid != os.getpid()

    def ask(self, call: Call) -> None:
        """Have the thread see to `call`; raise `BackendError` if it fails, or lasts too long."""
        deadline = time.monotonic() + self.broker.timeout
        self.tell(call)
        try:
            while not call.answered.wait(min(_GRACE / 4, max(deadline - time.monotonic(), 0))):
                self._check_hope()
                if not self.is_alive:
                    raise BackendError(_STOPPED)
                if time.monotonic() >= deadline:
                    seconds = f"{self.broker.timeout:g} s"
                    why = f": {self._why}" if self._outage is not None else "."
                    raise BackendError(f"The AMQP broker gave no answer for {seconds}{why}")
        finally:
            call.given_up = True
        if call.error:
            raise BackendError(call.error)

    def tell(self, call: Call) -> None:
        """Have the thread see to `call` when it can; raise `BackendError` if it will not."""
        if self.is_forked:
            raise BackendError("This backend belongs to the parent of this process.")
        self._check_hope()
        self._enqueue(call)
        self.ring()
        if self._ended:  # perhaps before it was there
            raise BackendError(_STOPPED)

    def ring(self) -> None:
        """Have the thread look at what has changed."""
        self._bell.ring()

    def close(self) -> None:
        """End the connection soon, and the thread."""
        if not self.is_forked:
            self.closing.set()
            self.ring()

    def join(self, seconds: float) -> None:
        """Wait for what `close()` has begun; the thread itself does not."""
        if not self.is_forked and threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _check_hope(self) -> None:
        """Raise `BackendError` if there is no use in waiting."""
        since = self._outage
        if since is not None and time.monotonic() - since > _GRACE:
            raise BackendError(f"The AMQP broker is out of reach: {self._why}")

    # What a role makes of it

    def _enqueue(self, call: Any) -> None:
        """Keep a call for `_write()`. This is called by anybody."""
        raise NotImplementedError

    def _declare(self, channel: Any) -> None:
        """Declare what the role needs, by py-amqp's means."""
        raise NotImplementedError

    def _connected(self) -> None:
        """Begin on a new connection; `_end_outage()` once everything is as it was."""
        raise NotImplementedError

    def _write(self) -> None:
        """Move to `out` what there is to say."""
        raise NotImplementedError

    def _on_method(self, name: Name, payload: bytes) -> None:
        raise NotImplementedError

    def _wants(self, header: bytes) -> bool:
        """Decide by its head whether a message is kept, for `_on_message()`."""
        raise NotImplementedError

    def _on_message(self, body: bytes) -> None:
        raise NotImplementedError

    def _check(self, now: float) -> None:
        """Raise `Lost` if an answer is overdue."""
        raise NotImplementedError

    def _lost(self, why: str) -> None:
        """Answer the calls that nobody else will answer any more."""
        raise NotImplementedError

    def _despair(self, why: str) -> None:
        """Answer all calls."""
        raise NotImplementedError

    # Outages

    def _begin_outage(self, why: str, since: float, level: int) -> None:
        self._why = why
        if self._outage is None:
            self._outage = since
            self.counters[f"{self.role} disconnected"] += 1
            where = self._url.rpartition("@")[2]
            logger.log(level, "The AMQP %s is cut off from %s: %s", self.role, where, why)

    def _end_outage(self, level: int) -> float | None:
        """Return how many seconds it was, or None if there was none."""
        since, self._outage = self._outage, None
        if since is None:
            return None
        seconds = time.monotonic() - since
        logger.log(level, "The AMQP %s is connected again after %.1f s", self.role, seconds)
        return seconds

    # The thread

    def _run(self) -> None:
        pauses = _pauses()
        try:
            while not self.closing.is_set() and not self.is_forked:
                began = time.monotonic()
                try:
                    self._connect()
                    self._serve()
                except Exception as error:
                    self._fail(error, began if self._sock is None else time.monotonic())
                finally:
                    self._disconnect()
                if time.monotonic() - began > _LAST_PAUSE:
                    pauses = _pauses()
                self.closing.wait(next(pauses))
        finally:
            self._end()

    def _connect(self) -> None:
        name = f"django-socketio {self.role} {socket.gethostname()}:{self._pid}"
        self._url = next(self._urls)
        connection = self.broker.connect(self._url, name)
        try:
            self._declare(connection.channels[frames.CHANNEL])
        except BaseException:
            connection.collect()
            raise
        self.frame_max = connection.frame_max
        self._reader = frames.Reader(self.frame_max)
        self._heartbeat = connection.heartbeat
        self._heard = self._spoke = self._turn = time.monotonic()
        # From here on py-amqp has nothing that it could read, write or close.
        self._sock, connection.transport.sock = connection.sock, None
        self._sock.setblocking(False)
        self.counters[f"{self.role} connected"] += 1

    def _serve(self) -> None:
        """Read and write until this is closed, lost, or a fork."""
        poll = select.poll()
        self._connected()
        while not self.closing.is_set():
            self._write()
            self._flush()
            self._wait(poll)
            if self.is_forked:
                return
            self._read()
            self._tick()
        self._say_goodbye(poll)

    def _fail(self, error: Exception, since: float) -> None:
        if self.is_forked or self.closing.is_set():
            return
        expected: tuple[type[Exception], ...] = (Lost, frames.NotAMQP, *self.broker.errors)
        if self._outage is None and not isinstance(error, expected):
            logger.exception("The AMQP %s has failed, and starts anew", self.role)
        why = str(error) or type(error).__name__
        self._begin_outage(why, since, self.log_level)
        self._lost(f"The connection to the AMQP broker was lost: {why}")
        if self._outage is not None and time.monotonic() - self._outage > _GRACE:
            self._despair(f"The AMQP broker is out of reach: {why}")

    def _disconnect(self) -> None:
        sock, self._sock = self._sock, None
        self._body = None
        self.out.clear()
        if sock is not None and not self.is_forked:
            sock.close()

    def _end(self) -> None:
        if not self.is_forked:
            self._ended = True
            self._despair(_STOPPED)

    def _wait(self, poll: "select.poll") -> None:
        """Wait for the socket, the bell, or the next look at the clock."""
        poll.register(self._bell.ear, select.POLLIN)
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self.out else 0))
        ready = poll.poll(1000 * min(_PACE, self._heartbeat / 4 or _PACE))
        self._turn = time.monotonic()
        if (self._bell.ear, select.POLLIN) in ready and not self.is_forked:
            self._bell.hear()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if not data:
            raise Lost("the broker closed the connection")
        for kind, payload in self._reader.read(data):
            self._on_frame(kind, payload)
        self._heard = time.monotonic()  # now: while it was at work here, nobody listened

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == frames.METHOD:
            first, second = struct.unpack_from(">HH", payload)
            self._on_any_method((first, second), payload)
        elif kind == frames.HEADER:
            self._missing = int.from_bytes(payload[4:12])
            self._body = [] if self._wants(payload) else None
            self._complete()
        elif kind == frames.BODY:
            self._missing -= len(payload)
            if self._body is not None:
                self._body.append(payload)
            self._complete()

    def _on_any_method(self, name: Name, payload: bytes) -> None:
        if name in (frames.CONNECTION_CLOSE, frames.CHANNEL_CLOSE):
            raise Lost(frames.read_short(payload, 6)[0].decode(errors="replace"))
        if name == frames.CONNECTION_CLOSE_OK:
            raise Lost("it was closed")
        self._on_method(name, payload)

    def _complete(self) -> None:
        if self._body is None or self._missing > 0:
            return
        body, self._body = b"".join(self._body), None
        self._on_message(body)
        if time.monotonic() - self._turn > _SLICE:
            # Not zero: gevent's sleep(0) does not look at any socket before it goes on.
            time.sleep(1e-5)
            self._turn = time.monotonic()

    def _flush(self) -> None:
        if not self.out:
            return
        try:
            sent = self._sock.send(self.out)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if sent:
            del self.out[:sent]
            self._spoke = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._heartbeat:
            if now - self._heard > 2 * self._heartbeat:
                raise Lost(f"the broker was silent for {2 * self._heartbeat:g} s")
            if now - self._spoke > self._heartbeat / 2 and not self.out:
                self.out += frames.frame(frames.HEARTBEAT, b"", channel=0)
        self._check(now)

    def _say_goodbye(self, poll: "select.poll") -> None:
        """Have the broker remove what is ours before anybody goes on, if it is quick about it."""
        reason = struct.pack(">H", 200) + frames.short(b"") + bytes(4)
        self.out += frames.method(frames.CONNECTION_CLOSE, reason, channel=0)
        deadline = time.monotonic() + min(_GRACE, self.broker.timeout)
        try:
            while time.monotonic() < deadline and not self.is_forked:
                self._flush()
                self._wait(poll)
                self._read()
        except (Lost, OSError):
            pass


def _pauses() -> Iterator[float]:
    """Yield the seconds between attempts to connect, such that not all processes come at once."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, _LAST_PAUSE)
