"""What is to leave in this turn of the loop, connection by connection."""

import logging
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Flushable(Protocol):
    def flush(self) -> None: ...
    def abort(self) -> None: ...


_MANY = 32
"""Connections whose flush takes long enough to be worth a moment's wait for more."""

_MOMENT = 0.001
"""Seconds that a flush waits at most for what is expected."""


class Outbox:
    """
    Flush each connection once per loop turn.

    Messages that are sent together then leave in one system call. A flush of many connections also
    waits for what is just about to come back from a carrier, so that it leaves along with it.
    """

    __slots__ = ("_dirty", "_expected", "_loop", "_timer", "_waits")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._dirty: list[Flushable] = []
        self._expected = 0
        self._waits = False
        self._timer = loop.timer(_MOMENT)

    def add(self, connection: Flushable) -> None:
        """Have `connection.flush()` called at the end of this turn. It must not raise."""
        if not self._dirty:
            self._loop.run_callback(self._end_turn)
        self._dirty.append(connection)

    def expect(self) -> None:
        """Be told that something is under way which will make more to flush."""
        self._expected += 1

    def arrived(self) -> None:
        """Be told that what was expected has come."""
        self._expected -= 1
        if self._waits and not self._expected:
            # Not at once: the next thing may be under way before this turn ends.
            self._loop.run_callback(self._end_wait)

    def _end_turn(self) -> None:
        if self._expected and len(self._dirty) >= _MANY:
            self._waits = True
            self._timer.start(self._flush)
        else:
            self._flush()

    def _end_wait(self) -> None:
        if self._waits and not self._expected:
            self._flush()

    def _flush(self) -> None:
        if self._waits:
            self._waits = False
            self._timer.stop()
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            try:
                connection.flush()
            except Exception:  # of one: the others must not wait for ever for a flush
                logger.exception("A connection could not be flushed")
                connection.abort()
