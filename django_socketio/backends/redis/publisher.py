"""How to publish for many at a time over one connection."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable
from time import monotonic
from typing import Any

from ..exceptions import BackendError
from ..waiting import Mutex, Signal
from .wire import Connect, Refused, TimedOut, Wire

logger = logging.getLogger(__name__)

_BATCH = 1 << 20
"""Bytes of commands that share a round trip, unless a single one is larger."""

_IMPATIENCE = 0.5
"""Seconds that a call waits for its turn while publishing fails."""

_HOPE = 3
"""Timeouts after which an attempt to connect is left to itself: its thread may be gone."""


class _Attempt(threading.Thread):
    """
    A connection in the making.

    It has a thread of its own so that nobody waits longer than they mean to, whatever name servers,
    TLS and sentinels do; and so that whoever is killed while waiting does not spoil it.
    """

    def __init__(self, connect: Connect, timeout: float) -> None:
        super().__init__(name="django-socketio: connect to Redis", daemon=True)
        self._connect = connect
        self._expires = monotonic() + _HOPE * timeout
        self._given_up = False
        self._done = threading.Event()
        self._wire: Wire | None = None
        self._error = "the attempt to connect failed"

    @property
    def is_spoilt(self) -> bool:
        """Tell whether there is nothing to be had of it any more."""
        if not self._done.is_set():
            return monotonic() > self._expires
        return self._wire is None or not self._wire.is_idle()

    def run(self) -> None:
        try:
            self._wire = self._connect()
        except BackendError as error:
            self._error = str(error)
        except Exception:  # of what the settings bring along, such as a credential_provider
            logger.exception("The attempt to connect to Redis failed")
        finally:
            self._done.set()
            if self._given_up:
                self.give_up()

    def result(self, seconds: float) -> Wire | None:
        """Return the connection, or None if it takes longer; raise `BackendError`."""
        if not self._done.wait(max(seconds, 0)):
            return None
        if self._wire is None:
            raise BackendError(self._error)
        return self._wire

    def give_up(self) -> None:
        self._given_up = True
        if self._wire is not None:
            self._wire.close()


class _Call:
    """
    A publish that waits for its turn or for its answer.

    `ready` is set when it has the answer, or when it is to lead.
    """

    __slots__ = ("answer", "command", "deadline", "leads", "ready")

    def __init__(self, command: bytes, deadline: float) -> None:
        self.command = command
        self.deadline = deadline
        self.answer: int | BackendError | None = None
        self.leads = False
        self.ready = Signal()

    def settle(self, answer: Any) -> None:
        if not isinstance(answer, int | BackendError):
            answer = BackendError(f"Redis answered with {type(answer).__name__}")
        self.answer = answer
        if not self.leads:
            self.ready.set()


class Publisher:
    """
    Publish for many at a time over one connection, each within `timeout` seconds.

    Who finds nobody busy leads: it writes its command and those of all who wait, hands out the
    answers, and passes the lead to the next in the queue. So what queues up during one round trip
    shares the next, without a timer, and nobody works for others longer than one round trip.
    """

    def __init__(self, connect: Connect, timeout: float, counters: Counter[str]) -> None:
        self._connect = connect
        self._timeout = timeout
        self._counters = counters
        self._mutex = Mutex()  # of what follows
        self._queue: deque[_Call] = deque()
        self._is_led = False
        self._closing = False
        # These are the leader's:
        self._wire: Wire | None = None
        self._attempt: _Attempt | None = None
        self._fails = False

    def publish(self, command: bytes) -> int:
        """Send a command whose answer is a number; return that."""
        call = _Call(command, monotonic() + self._timeout)
        try:
            if self._enter(call) or self._wait(call):
                self._lead(call)
        except BaseException as error:
            self._leave(call)
            if isinstance(error, BackendError):
                self._counters[f"publish failed: {_kind(error)}"] += 1
            raise
        return self._result(call)

    def close(self) -> None:
        """Let go of the connection, behind the round trip that is under way."""
        with self._mutex:
            self._closing = True
            leads, self._is_led = not self._is_led, True
        if leads:
            self._hand_over()

    # The queue

    def _enter(self, call: _Call) -> bool:
        with self._mutex:
            if self._is_led:
                self._queue.append(call)
            else:
                self._is_led = call.leads = True
            return call.leads

    def _wait(self, call: _Call) -> bool:
        """Wait for the answer or the lead; return whether it is the lead."""
        # While publishing fails one call at a time finds out whether it still does.
        patience = min(self._timeout, _IMPATIENCE) if self._fails else self._timeout
        call.ready.wait(patience)
        if call.answer is None and (not call.leads or monotonic() >= call.deadline):
            raise TimedOut(f"no answer within {patience:g} s")
        return call.leads

    def _leave(self, call: _Call) -> None:
        with self._mutex:
            if call in self._queue:
                self._queue.remove(call)
        if call.leads:
            call.leads = False
            self._hand_over()

    def _hand_over(self) -> None:
        """Lead no more: the next in the queue does, if there is one."""
        while True:
            with self._mutex:
                closing, self._closing = self._closing, False
                successor = self._queue.popleft() if self._queue and not closing else None
                if successor is not None:
                    successor.leads = True
                elif not closing:
                    self._is_led = False
            if not closing:
                break
            self._drop()
        if successor is not None:
            successor.ready.set()

    def _take(self) -> list[_Call]:
        """Return who waits, as many as may share a round trip."""
        taken, size = [], 0
        with self._mutex:
            while self._queue and size < _BATCH:
                call = self._queue.popleft()
                size += len(call.command)
                taken.append(call)
        return taken

    def _result(self, call: _Call) -> int:
        answer = call.answer
        if isinstance(answer, BackendError):
            self._counters[f"publish failed: {_kind(answer)}"] += 1
            raise type(answer)(*answer.args)  # not itself: others raise it, too
        assert answer is not None
        return answer

    # The round trip

    def _lead(self, call: _Call) -> None:
        batch = [call]
        try:
            wire = self._connected(call, batch)
            batch += self._take()
            wire.send(b"".join([call.command for call in batch]))
            self._collect(wire, batch, call.deadline)
            self._fails = False
        except BackendError as error:
            self._fails = True
            self._fail(batch, error)
        except BaseException:  # killed, and whose answer comes next nobody can tell
            self._fail(batch, BackendError("the round trip was interrupted"))
            raise
        call.leads = False
        self._hand_over()

    def _connected(self, call: _Call, batch: list[_Call]) -> Wire:
        """Return a connection that works as far as one can see."""
        if self._wire is not None and not self._wire.is_idle():
            self._drop_wire()  # Redis has closed it meanwhile, which need not cost a publish
        if self._wire is None:
            try:
                self._wire = self._attempted().result(call.deadline - monotonic())
            except BackendError:
                batch += self._take()  # it was their attempt as well
                self._attempt = None
                raise
            if self._wire is None:
                raise TimedOut(f"no connection within {self._timeout:g} s")
            self._attempt = None
        return self._wire

    def _attempted(self) -> _Attempt:
        """Return the attempt to connect that is under way, or one that begins."""
        if self._attempt is not None and self._attempt.is_spoilt:
            self._attempt.give_up()
            self._attempt = None
        if self._attempt is None:
            self._attempt = _Attempt(self._connect, self._timeout)
            try:
                self._attempt.start()
            except RuntimeError:  # there are no new threads when the interpreter ends
                self._attempt.run()
        return self._attempt

    def _collect(self, wire: Wire, batch: list[_Call], deadline: float) -> None:
        """Hand out the answers, which come in order."""
        unanswered = iter(batch)
        missing = len(batch)
        misplaced = False
        wire.wait(deadline - monotonic())  # at once: meanwhile others run, and queue up
        while missing:
            if not wire.receive():
                left = deadline - monotonic()
                if left <= 0:
                    raise TimedOut(f"no answer within {self._timeout:g} s")
                wire.flush()
                wire.wait(left)
                continue
            for reply in wire.replies():
                misplaced |= isinstance(reply, Refused) and reply.is_misplaced
                missing -= 1
                if missing < 0:
                    raise BackendError("Redis answered what nobody asked")
                next(unanswered).settle(reply)
        if misplaced:
            self._drop_wire()

    def _fail(self, batch: Iterable[_Call], error: BackendError) -> None:
        self._drop_wire()
        # The error's own frames hold the calls: with it they, and the connection, would be garbage
        # that waits for the collector, 64 kB for each publish while Redis is away.
        answer = type(error)(*error.args)
        for call in batch:
            if call.answer is None:
                call.settle(answer)

    def _drop(self) -> None:
        self._drop_wire()
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.give_up()

    def _drop_wire(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()


def _kind(error: BackendError) -> str:
    if isinstance(error, Refused):
        return error.kind
    return "timeout" if isinstance(error, TimedOut) else "connection"
