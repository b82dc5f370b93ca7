"""
One timer for all that must happen after a while.

Every delay of the engine is one of a few constants, so the things that share a delay fall due in
the order in which they came: a queue each (a lane), and one timer of the loop for the earliest.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

_GRAIN = 0.01
"""Seconds that the timer may be late, so that things due close together cost one wake-up."""


class Lane:
    """Items that fall due `delay` seconds after they were added; `expired(item, due)` is told."""

    __slots__ = ("_deadlines", "_due", "_expired", "delay")

    def __init__(
        self, deadlines: "Deadlines", delay: float, expired: Callable[[Any, float], None]
    ) -> None:
        self._deadlines = deadlines
        self._due: OrderedDict[Any, float] = OrderedDict()
        self._expired = expired
        self.delay = delay

    def __len__(self) -> int:
        return len(self._due)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._due)

    def add(self, item: Any, since: float | None = None) -> None:
        """Start the delay of `item` now, or from `since`; start it again if it was running."""
        due = (self._deadlines.now() if since is None else since) + self.delay
        self._due[item] = due
        self._due.move_to_end(item)
        self._deadlines.arm(due)

    def discard(self, item: Any) -> None:
        self._due.pop(item, None)

    def earliest(self) -> float | None:
        return next(iter(self._due.values()), None)

    def run(self, now: float) -> None:
        while self._due:
            item, due = next(iter(self._due.items()))
            if due > now:
                return
            del self._due[item]
            self._expired(item, due)


class Deadlines:
    """The lanes of one engine and the timer that wakes them. `now` is a monotonic clock."""

    def __init__(self, loop: Any, now: Callable[[], float]) -> None:
        self._loop = loop
        self._lanes: list[Lane] = []
        self._timer: Any = None
        self._armed = float("inf")
        self.now = now

    def lane(self, delay: float, expired: Callable[[Any, float], None]) -> Lane:
        lane = Lane(self, delay, expired)
        self._lanes.append(lane)
        return lane

    def arm(self, due: float) -> None:
        if due < self._armed:
            self._stop_timer()
            self._armed = due
            self._timer = self._loop.timer(max(due - self.now(), 0) + _GRAIN)
            self._timer.start(self._wake)

    def run(self) -> None:
        """Let everything happen that is due by now. Cheap if nothing is."""
        now = self.now()
        if now >= self._armed:
            for lane in self._lanes:
                lane.run(now)

    def stop(self) -> None:
        self._stop_timer()
        self._lanes.clear()

    def _wake(self) -> None:
        self._stop_timer()
        now = self.now()
        try:
            for lane in self._lanes:
                lane.run(now)
        finally:  # or one failure would be the end of every heartbeat
            waiting = [due for lane in self._lanes if (due := lane.earliest()) is not None]
            if waiting:
                self.arm(min(waiting))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._armed = float("inf")
