"""
A watchdog for what blocks the hub: a handler, or any callback, that neither waits nor ends.

While it does, nobody is served, and no greenlet could tell. So this is a thread of the operating
system, which asks the hub for a sign of life and then looks whether it has come. What it has seen
it has a greenlet log, for the locks of the log are gevent's and do not work between threads; only
where the hub does not come back it writes by itself.
"""

import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from time import monotonic, process_time
from types import FrameType

from gevent import get_hub, spawn
from gevent.hub import Hub
from gevent.monkey import get_original

logger = logging.getLogger(__name__)

_LOOKS = 4
"""How often it looks within the time that the hub may be blocked."""

_PAUSE = 1.0
"""Seconds from one block in the log to the next; those between are counted."""

_HOPELESS = 10.0
"""Seconds after which the hub is not waited for with what there is to tell."""

_STDERR = 2

_DEPTH = 30
"""Frames of a stack that are shown, the innermost."""

_DEBUGGERS = ("bdb", "pdb", "pydevd")

_allocate_lock = get_original("_thread", "allocate_lock")
_start_new_thread = get_original("_thread", "start_new_thread")


class Watchdog:
    """
    Watch the hub of the thread that makes it.

    When the hub has been blocked for `threshold` seconds the log says for how long, and where: the
    stack, and which handler `describe(frame)` finds in it. `counters` gets how often that was, and
    `blocked` is the seconds of all those times.
    """

    def __init__(
        self,
        threshold: float,
        describe: Callable[[FrameType], str | None],
        counters: Counter[str],
    ) -> None:
        self.threshold = threshold
        self.counters = counters
        self.blocked = 0.0
        self._hub = get_hub()
        self._describe = describe
        self._tick = threshold / _LOOKS
        self._stopped = _allocate_lock()
        self._worst = 0.0
        self._asked = 0.0
        self._answered: float | None = None
        self._sight: str | None = None  # what blocks the hub now
        self._next = 0.0  # when the next block may be logged

    def start(self) -> None:
        """Begin to watch, with a thread that ends with `stop()` or with the process."""
        self._stopped.acquire()
        _start_new_thread(self._watch, ())

    def stop(self) -> None:
        self._stopped.release()

    def worst_lag(self) -> float:
        """Return the longest time that a sign of life has taken since this was asked last."""
        worst, self._worst = self._worst, 0.0
        return worst

    # On the hub

    def _answer(self) -> None:
        self._answered = monotonic()

    # In the thread

    def _watch(self) -> None:
        clocks = _Clocks(self._tick)
        self._ask()
        while not self._stopped.acquire(True, self._tick):
            overslept, ran = clocks.read()
            self._look(overslept if overslept > self.threshold / 2 else 0.0, ran)

    def _ask(self) -> None:
        self._answered = None
        self._asked = monotonic()
        self._hub.loop.run_callback_threadsafe(self._answer)

    def _look(self, overslept: float, ran: bool) -> None:
        """
        See whether the sign has come.

        If this thread has overslept, either nothing of the process ran, which says nothing about
        the hub, or something did that let no other thread run.
        """
        if overslept and not ran:
            self._asked += overslept
            overslept = 0.0
        answered = self._answered
        lag = max((answered or monotonic()) - self._asked, overslept)
        self._worst = max(self._worst, lag)
        if lag > self.threshold and self._sight is None:
            self._sight = self._look_closer()
        if answered is not None:
            self._note_end(lag)
            self._ask()
        elif self._sight and lag > _HOPELESS:
            os.write(_STDERR, f"{_message(lag, self._sight)}\n".encode())
            self._sight = ""

    def _look_closer(self) -> str | None:
        """Return what blocks the hub, or None if it is not blocked but has no time."""
        frame = sys._current_frames().get(self._hub.thread_ident)
        if frame is None or _is_idle(frame) or _is_debugged(frame):
            return None
        culprit = self._describe(frame) or "something that is no handler"
        return f"{culprit}:\n{''.join(traceback.format_stack(frame, _DEPTH))}"

    def _note_end(self, lag: float) -> None:
        sight, self._sight = self._sight, None
        if sight is None:
            return
        self.counters["hub blocked"] += 1
        self.blocked += lag
        if monotonic() < self._next:
            self.counters["blocks not logged"] += 1
        elif sight:
            self._next = monotonic() + _PAUSE
            warn = logger.warning
            self._hub.loop.run_callback_threadsafe(spawn, warn, "%s", _message(lag, sight))


def _message(lag: float, sight: str) -> str:
    return f"The hub was blocked for {lag:.2f} s by {sight}"


class _Clocks:
    """How long each sleep of `seconds` takes in truth, and whether the process worked meanwhile."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._time, self._work = monotonic(), process_time()

    def read(self) -> tuple[float, bool]:
        time, work = monotonic(), process_time()
        overslept = time - self._time - self._seconds
        ran = work - self._work > overslept / 2
        self._time, self._work = time, work
        return overslept, ran


def _is_idle(frame: FrameType) -> bool:
    """Tell whether it is in no callback: the machine has no time for it."""
    return frame.f_code is Hub.run.__code__


def _is_debugged(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
