"""What is to leave in this turn of the loop, connection by connection."""

import logging
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Flushable(Protocol):
    def flush(self) -> None: ...
    def fail(self) -> None: ...


_MANY = 32
"""Connections whose flush takes long enough to be worth a moment's wait."""

_MOMENT = 0.001
"""Seconds of that."""

_SELDOM = 256
"""Flushes between two attempts at waiting, at most, while it does not pay."""


class Outbox:
    """
    Flush each connection once per loop turn.

    Messages that are sent together then leave in one system call. `moderate()` is for messages that
    come one by one from a carrier, each to many: then a flush of many connections waits for a
    moment, as long as that makes it take several messages along; while it does not, it is only
    tried again now and then.
    """

    __slots__ = (
        "_attempts_in",
        "_before",
        "_dirty",
        "_loop",
        "_messages",
        "_moderate",
        "_patience",
        "_pays",
        "_timer",
    )

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._dirty: list[Flushable] = []
        self._moderate = False
        self._messages = 0
        self._before = 0  # messages at the beginning of the wait
        self._pays = False
        self._patience = self._attempts_in = 1
        self._timer: Any = None  # while it waits; one that has ended cannot be started again

    def moderate(self) -> None:
        """Wait a moment for more where it pays. `delivered()` tells when more has come."""
        self._moderate = True

    def delivered(self) -> None:
        """Be told that a message of the carrier has been added, to however many connections."""
        self._messages += 1

    def add(self, connection: Flushable) -> None:
        """Have `connection.flush()` called at the end of this turn. It must not raise."""
        if not self._dirty:
            self._loop.run_callback(self._end_turn)
        self._dirty.append(connection)

    def _end_turn(self) -> None:
        if self._moderate and len(self._dirty) >= _MANY and self._is_to_wait():
            self._before = self._messages
            self._timer = self._loop.timer(_MOMENT)
            self._timer.start(self._end_wait, update=True)
        else:
            self._flush()

    def _is_to_wait(self) -> bool:
        self._attempts_in -= 1
        return self._pays or self._attempts_in <= 0

    def _end_wait(self) -> None:
        self._timer.close()
        self._pays = self._messages > self._before
        self._patience = 1 if self._pays else min(2 * self._patience, _SELDOM)
        self._attempts_in = self._patience
        self._flush()

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            try:
                connection.flush()
            except Exception:  # of one: the others must not wait for ever for a flush
                logger.exception("A connection could not be flushed")
                connection.fail()
