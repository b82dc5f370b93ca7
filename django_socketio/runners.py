"""
Greenlets that run handlers, reused.

Whoever has work waits in one ready queue. Once per loop turn the hub switches into an idle runner,
which works the queue off and parks again. Only when a handler blocks does the next turn need a
further runner; so handlers that do not block cost a switch per turn and not a greenlet each.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from types import FrameType
from typing import Any, Protocol

from gevent import get_hub
from greenlet import GreenletExit, getcurrent, greenlet

logger = logging.getLogger(__name__)

_SLICE = 0.01
"""Seconds that a runner works without giving the loop a turn."""

_KEPT = 8
"""Idle runners that are kept; more than these end, and their database connections with them."""

_REST = 5.0
"""Seconds, or up to twice as many, after which an idle runner that has used a database ends."""


_QUIET = 60.0
"""Seconds between two lines of the log about work for which there is no runner."""


class Worker(Protocol):
    def step(self) -> bool:
        """Do one piece of work; return whether there is more. Called by one runner at a time."""


class Runner(greenlet):
    """
    `uses_database` is set when a database connection is made in it.

    It spares the others the question, which costs more than many a handler. `rested` is set when
    it has been idle for a while.
    """

    uses_database = False
    rested = False


class Runners:
    """
    At most `limit` runners.

    `before` and `after` bracket each step of one that uses a database, `end` follows its last; and
    it is its last when nothing comes for `rest` seconds, however long connections may live.
    `over_limit("MAX_HANDLERS")` is called when there is work and nobody for it.
    """

    def __init__(
        self,
        *,
        limit: int,
        before: Callable[[], None],
        after: Callable[[], None],
        end: Callable[[], None],
        rest: float = _REST,
    ) -> None:
        self.over_limit: Callable[[str], None] = lambda limit: None
        self._next_warning = 0.0
        self._hub = get_hub()
        self._rest = rest
        self._resting: Any = None  # the timer, while a runner rests
        self._limit = limit
        self._before = before
        self._after = after
        self._end = end
        self._ready: deque[Worker] = deque()
        self._idle: list[Runner] = []
        self._all: set[Runner] = set()
        self._waking = False
        self._giving_way = 0
        self._stopped = False

    @property
    def busy(self) -> int:
        return len(self._all) - len(self._idle)

    def frames(self) -> Iterator[FrameType]:
        """Yield the innermost frame of each runner that waits in the middle of its work."""
        for runner in self._all.difference(self._idle):
            if runner.gr_frame is not None:
                yield runner.gr_frame

    def schedule(self, worker: Worker) -> None:
        """Have `worker.step()` called until it returns False. Not for one that is scheduled."""
        self._ready.append(worker)
        if not self._waking:
            self._waking = True
            self._hub.loop.run_callback(self._wake)

    def stop(self) -> None:
        """End the runners that are idle, and those that are busy at their next wait."""
        self._stopped = True
        for runner in list(self._all):
            self._hub.loop.run_callback(runner.throw, GreenletExit)
        self._idle.clear()
        self._end_rest()

    def _wake(self) -> None:
        self._waking = False
        if not self._ready or self._giving_way:
            return
        if self._idle:
            self._idle.pop().switch()
        elif len(self._all) < self._limit:
            runner = Runner(self._run, self._hub)
            self._all.add(runner)
            runner.switch()
        else:
            self._note_full()
            return  # the first that comes back goes on with the queue
        if self._ready and not self._waking:  # it blocks in a handler
            self._waking = True
            self._hub.loop.run_callback(self._wake)

    def _note_full(self) -> None:
        self.over_limit("MAX_HANDLERS")
        now = monotonic()
        if now >= self._next_warning:
            self._next_warning = now + _QUIET
            logger.warning("Events wait: all %d handlers that may run at once do", self._limit)

    def _run(self) -> None:
        runner: Any = getcurrent()
        ready, idle = self._ready, self._idle
        try:
            while True:
                until = monotonic() + _SLICE
                while ready:
                    if monotonic() > until:
                        self._give_way(runner)
                        until = monotonic() + _SLICE
                        continue
                    worker = ready.popleft()
                    if self._step(runner, worker):
                        ready.append(worker)
                if len(idle) >= _KEPT:
                    return
                if runner.uses_database:
                    self._begin_rest(runner)
                idle.append(runner)
                self._hub.switch()
        finally:
            self._all.discard(runner)
            if runner.uses_database:
                self._close_connections()

    def _close_connections(self) -> None:
        try:
            self._end()
        except Exception:
            logger.exception("The database connections of a runner could not be closed")

    def _begin_rest(self, runner: Runner) -> None:
        runner.rested = False
        if self._resting is None and not self._stopped:
            self._resting = self._hub.loop.timer(self._rest)
            self._resting.start(self._look_at_rest)

    def _look_at_rest(self) -> None:
        """End the runners that nobody has needed since the last look."""
        self._end_rest()
        users = [runner for runner in self._idle if runner.uses_database]
        for runner in users:
            if runner.rested:
                self._idle.remove(runner)
                runner.throw(GreenletExit)
            else:
                self._begin_rest(runner)
                runner.rested = True

    def _end_rest(self) -> None:
        if self._resting is not None:
            self._resting.close()
            self._resting = None

    def _give_way(self, runner: Runner) -> None:
        """
        Let the loop turn: others wait for it, readable sockets, timers, signals.

        By a timer, for the loop runs dozens of callbacks in a row before it looks at those. The
        queue waits for this runner; that it is not empty does not mean that a handler blocks.
        """
        timer = self._hub.loop.timer(0)
        timer.start(runner.switch)
        self._giving_way += 1
        try:
            self._hub.switch()
        finally:
            self._giving_way -= 1
            timer.close()
        if self._ready and not self._waking:  # whatever comes next may block
            self._waking = True
            self._hub.loop.run_callback(self._wake)

    def _step(self, runner: Runner, worker: Worker) -> bool:
        more = True
        try:
            if runner.uses_database:
                self._before()
            more = worker.step()
            if runner.uses_database:
                self._after()
        except Exception:
            logger.exception("A piece of work failed outside of any handler")
        except BaseException:
            # A handler that ends its greenlet, or the process, does not end its connection.
            if more and not self._stopped:
                self.schedule(worker)
            raise
        return more


def note_database() -> None:
    """Be told that the running greenlet, of whatever kind, has made a database connection."""
    current: Any = getcurrent()
    current.uses_database = True


def uses_database() -> bool:
    """Tell whether the running greenlet has ever made a database connection."""
    return getattr(getcurrent(), "uses_database", False)
