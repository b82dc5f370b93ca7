"""
Greenlets that run handlers, reused.

Whoever has work waits in one ready queue. Once per loop turn the hub switches into an idle runner,
which works the queue off and parks again. Only when a handler blocks does the next turn need a
further runner; so handlers that do not block cost a switch per turn and not a greenlet each.
"""

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from gevent import get_hub
from greenlet import GreenletExit, getcurrent, greenlet

logger = logging.getLogger(__name__)

_SLICE = 0.01
"""Seconds that a runner works without giving the loop a turn."""

_KEPT = 8
"""Idle runners that are kept; more than these end, and their database connections with them."""


class Worker(Protocol):
    def step(self) -> bool:
        """Do one piece of work; return whether there is more. Called by one runner at a time."""


class Runner(greenlet):
    """
    `uses_database` is set when a database connection is made in it.

    It spares the others the question, which costs more than many a handler.
    """

    uses_database = False


class Runners:
    """
    At most `limit` runners.

    `before` and `after` bracket each step of one that uses a database, `end` follows its last.
    """

    def __init__(
        self,
        *,
        limit: int,
        before: Callable[[], None],
        after: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._hub = get_hub()
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
            return  # the first that comes back goes on with the queue
        if self._ready and not self._waking:  # it blocks in a handler
            self._waking = True
            self._hub.loop.run_callback(self._wake)

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
                idle.append(runner)
                self._hub.switch()
        finally:
            self._all.discard(runner)
            if runner.uses_database:
                self._end()

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
    """Be told that the running greenlet has made a database connection."""
    current = getcurrent()
    if isinstance(current, Runner):
        current.uses_database = True
