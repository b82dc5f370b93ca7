"""
The end of a process that serves sockets, in front of clients that come back elsewhere.

Nothing new is let in, and those who are there leave a few at a time, in no order, until all are
gone: whoever takes them in next meets a stream and not a storm. Until its turn comes a socket is
served as ever. One in a handler is left to the end of it, so that the client gets the ack; what was
sent to a client leaves before its close does.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from math import ceil
from random import randrange, sample, uniform
from time import monotonic

from gevent import sleep
from gevent.event import Event

from .dispatch import Connection, Dispatcher

logger = logging.getLogger(__name__)

REASON = "server shutting down"
"""What is the matter, to the handlers: `socket.disconnect_reason`."""

QUICK = 1.0
"""Seconds for all of it when it is in a hurry."""

_TICK = 0.05
"""Seconds between two batches, more or less. At least one client goes in each."""

_LAST = 2.0
"""Seconds that are kept for what handlers do once their socket is gone."""

_FETCHED = 3.0
"""Seconds for clients to take what was sent to them."""

_ANSWERED = 1.0
"""Seconds for clients to answer the close of their WebSocket, which says that they have read it."""

_RATE = 500
"""Handshakes in a second that are no trouble to whoever takes the clients of this process in."""

_SHOWN = 5
"""Names of handlers in a line of the log."""

_RESTART, _AWAY = 1012, 1001
"""WebSocket close codes: service restart, going away (IANA; RFC 6455, 7.4.1)."""


class Drain:
    """
    Close every socket `over` some seconds, or all at once for none, and be done in `timeout`.

    Without `lingering` what clients have not taken by the end of the handlers is dropped.
    """

    def __init__(
        self, dispatcher: Dispatcher, *, over: float, timeout: float, lingering: bool
    ) -> None:
        now = monotonic()
        self._dispatcher = dispatcher
        self._engine = dispatcher.engine
        self._until = now + timeout
        self._last_call = self._until - min(_LAST, timeout / 4)
        self._spread_until = min(now + over, self._last_call)
        self._gently = over > 0
        self._lingering = lingering
        self._hurried = Event()
        # Milliseconds within which clients that can be told when to come back do so.
        self._return_within = 1000 + 1000 * len(dispatcher.connections) // _RATE

    def hurry(self) -> None:
        """Be done soon, whatever is not."""
        self._until = min(self._until, monotonic() + QUICK)
        self._hurried.set()

    def run(self) -> None:
        """End all sockets, and return when that is done, or the time is over."""
        self._engine.stop_accepting()
        while self._gently and (there := self._there()) and not self._is_last_call():
            self._close_some(there)
            self._hurried.wait(_TICK * uniform(0.5, 1.5))
        for connection in self._there():
            self._close(connection)
        while monotonic() < self._until and not self._dispatcher.wait_empty(_TICK):
            pass
        self._tell_of_unfinished()
        if self._lingering:
            self._linger()

    def _there(self) -> list[Connection]:
        return [each for each in self._dispatcher.connections if each.session.reason is None]

    def _is_last_call(self) -> bool:
        return self._hurried.is_set() or monotonic() > self._last_call

    # Closing

    def _close_some(self, there: Sequence[Connection]) -> None:
        """Close the share of this tick, so that the last goes when the time is over."""
        ticks = (self._spread_until - monotonic()) / _TICK
        for connection in sample(there, ceil(len(there) / max(ticks, 1))):
            if _is_free(connection, patiently=ticks > 0):
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        if self._gently:
            # socketio.js, for one, reads this.
            note = f"service restart; reconnect after {500 + randrange(self._return_within)} ms"
            connection.session.close(REASON, code=_RESTART, note=note)
        else:
            connection.session.close(REASON, code=_AWAY, note=REASON)

    # What was sent

    def _linger(self) -> None:
        """Wait for clients to take what was sent to them, and to say that they have."""
        begun = monotonic()
        while monotonic() < self._until:
            waited, unfetched = monotonic() - begun, self._engine.unfetched()
            if not unfetched and (waited > _ANSWERED or not self._engine.unanswered()):
                return
            if waited > _FETCHED:
                break
            sleep(_TICK / 5)
        unfetched = self._engine.unfetched()
        if unfetched:
            self._engine.counters["lost: not fetched at the end"] += unfetched
            logger.warning("%d clients did not take all that was sent to them", unfetched)

    def _tell_of_unfinished(self) -> None:
        running, waiting = self._dispatcher.unfinished()
        if not running and not waiting:
            return
        counters = self._engine.counters
        counters["cut: handlers that ran"] += running.total()
        counters["cut: handlers that waited"] += waiting.total()
        logger.error(
            "There was no time for the end of %d handlers (%s), and for %d that waited (%s)",
            running.total(),
            _shown(running),
            waiting.total(),
            _shown(waiting),
        )


def _is_free(connection: Connection, *, patiently: bool) -> bool:
    """Tell whether a client can go without losing an ack, or what is between two transports."""
    if connection.session.probe is not None:
        return False
    # What waits in call() is told of the end; only the client could end it else.
    return not connection.busy or (connection.calling and not patiently)


def _shown(names: Counter[str]) -> str:
    """Return the most frequent ones, for a log."""
    most = [f"{count} {name}" for name, count in names.most_common(_SHOWN)]
    return ", ".join([*most, "…"] if len(names) > _SHOWN else most) or "none"
