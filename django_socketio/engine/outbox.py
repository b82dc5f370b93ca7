"""What is to leave in this turn of the loop, connection by connection."""

import logging
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Flushable(Protocol):
    def flush(self) -> None: ...
    def abort(self) -> None: ...


class Outbox:
    """
    Flush each connection once per loop turn.

    Messages that are sent together then leave in one system call.
    """

    __slots__ = ("_dirty", "_loop")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._dirty: list[Flushable] = []

    def add(self, connection: Flushable) -> None:
        """Have `connection.flush()` called at the end of this turn. It must not raise."""
        if not self._dirty:
            self._loop.run_callback(self._flush)
        self._dirty.append(connection)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            try:
                connection.flush()
            except Exception:  # of one: the others must not wait for ever for a flush
                logger.exception("A connection could not be flushed")
                connection.abort()
