"""How to listen to channels over one connection that comes and goes."""

import _socket
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from enum import Enum
from time import monotonic
from typing import Any

from ..base import Deliver
from ..exceptions import BackendError
from ..waiting import Signal
from .wire import Connect, Refused, TimedOut, Wire, pack

logger = logging.getLogger(__name__)

_CHANNELS = 1000
"""Channels in one SUBSCRIBE: Redis serves nobody else while it works one off."""

_SLICE = 0.01
"""Seconds that the listener works without letting other greenlets in."""

_PATIENCE = 1.0
"""Seconds that a subscribe waits for a connection that is not there."""

_FIRST_DELAY, _LAST_DELAY = 0.1, 1.0
"""Seconds between two attempts to connect, at first and at most."""


class Verbs(Enum):
    """The commands that join and leave."""

    PLAIN = b"SUBSCRIBE", b"UNSUBSCRIBE"
    SHARDED = b"SSUBSCRIBE", b"SUNSUBSCRIBE"


class _Waiter:
    """A subscribe that waits until all of its channels are confirmed."""

    __slots__ = ("error", "names", "ready")

    def __init__(self, names: dict[bytes, str]) -> None:
        self.names = names
        self.error: BackendError | None = None
        self.ready = Signal()

    def settle(self, error: BackendError | None) -> None:
        self.error = error
        self.ready.set()


class _Wanted:
    """
    What this process wants to hear, and what of it Redis has not been told.

    `names` has the topic of each channel. `claims` are of the channels in it that were never
    confirmed: each is wanted by somebody who waits, and goes with the last of them to give up.
    """

    def __init__(self) -> None:
        self.names: dict[bytes, str] = {}
        self.claims: dict[bytes, set[_Waiter]] = {}
        self.changed: set[bytes] = set()
        self.waiting: dict[_Waiter, None] = {}

    def want(self, waiter: _Waiter) -> None:
        for channel, topic in waiter.names.items():
            if channel not in self.names:
                self.names[channel] = topic
                self.claims[channel] = {waiter}
            elif channel in self.claims:
                self.claims[channel].add(waiter)
        self.changed.update(waiter.names)
        self.waiting[waiter] = None

    def keep(self, waiter: _Waiter) -> None:
        """Take note that a subscribe has returned."""
        for channel in waiter.names:
            self.claims.pop(channel, None)

    def forget(self, waiter: _Waiter) -> None:
        """Undo a subscribe that failed or was killed, as far as nobody else wants the same."""
        self.waiting.pop(waiter, None)
        for channel in waiter.names:
            claims = self.claims.get(channel, set())
            if waiter in claims:
                claims.remove(waiter)
                if not claims:
                    self.drop([channel])

    def drop(self, channels: Iterable[bytes]) -> None:
        for channel in channels:
            self.claims.pop(channel, None)
            if self.names.pop(channel, None) is not None:
                self.changed.add(channel)


class Subscriber:
    """
    Listen in a thread that does not end before `stop()`, whatever becomes of the connection.

    All state belongs to that thread: what others want of it is an order in its queue.
    """

    def __init__(
        self,
        connect: Connect,
        deliver: Deliver,
        interrupted: Callable[[float], None],
        *,
        verbs: Verbs,
        where: str,
        timeout: float,
        counters: Counter[str],
    ) -> None:
        self.connect = connect
        self.deliver = deliver
        self.interrupted = interrupted
        self.verbs = verbs
        self.where = where
        self.timeout = timeout
        self.counters = counters
        self.wanted = _Wanted()
        self.stopped = threading.Event()
        self.bell, self._rope = _socket.socketpair()
        self.bell.setblocking(False)
        self._rope.setblocking(False)
        self._orders: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._session: _Session | None = None
        self._pid = os.getpid()
        self._delay = _FIRST_DELAY
        self._down_since: float | None = None
        self._trouble = "no connection yet"
        self._thread = threading.Thread(
            target=self._run, name="django-socketio: listen to Redis", daemon=True
        )

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have the listener end, and wait a moment for it."""
        self.stopped.set()
        self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(min(self.timeout, _PATIENCE))

    def subscribe(self, names: dict[bytes, str]) -> None:
        """Listen to the channels of `names`, which has their topics; return when confirmed."""
        waiter = _Waiter(names)
        try:
            self._order(self.wanted.want, waiter)
            self._await(waiter)
        except BaseException:
            self._order(self.wanted.forget, waiter)
            raise
        self._orders.append((self.wanted.keep, waiter))  # there is no hurry

    def unsubscribe(self, channels: Collection[bytes]) -> None:
        self._order(self.wanted.drop, channels)

    def _order(self, act: Callable[[Any], None], what: Any) -> None:
        self._orders.append((act, what))
        self._ring()

    def _ring(self) -> None:
        try:
            self._rope.send(b"!")
        except OSError:
            pass  # it rings already, or nobody listens any more

    def _await(self, waiter: _Waiter) -> None:
        patience = min(self.timeout, _PATIENCE)
        settled = waiter.ready.wait(patience)
        if not settled and self._session is not None:
            settled = waiter.ready.wait(self.timeout - patience)
            patience = self.timeout
        if not settled:
            trouble = self._trouble if self._session is None else "no answer"
            raise TimedOut(f"not subscribed within {patience:g} s: {trouble}")
        if waiter.error is not None:
            raise type(waiter.error)(*waiter.error.args)  # not itself: others raise it, too

    # In the listener

    def obey(self) -> None:
        while self._orders:
            act, what = self._orders.popleft()
            act(what)

    def note_recovery(self) -> None:
        self._delay = _FIRST_DELAY
        self.counters["connected"] += 1
        if self._down_since is not None:
            seconds, self._down_since = monotonic() - self._down_since, None
            logger.warning("Redis at %s is back after %.1f s", self.where, seconds)
            self.interrupted(seconds)

    def _run(self) -> None:
        try:
            while not self.stopped.is_set() and os.getpid() == self._pid:
                self._try_to_listen()
                self.stopped.wait(self._delay * random.uniform(0.5, 1))
                self._delay = min(2 * self._delay, _LAST_DELAY)
                self.obey()
                self.wanted.changed.clear()  # there is nobody to be told
        finally:
            self._end()

    def _try_to_listen(self) -> None:
        try:
            self._listen()
        except BackendError as error:
            self._note_outage(error)
        except Exception as error:
            if self._down_since is None:
                logger.exception("The listener to Redis at %s failed", self.where)
            self._note_outage(error)

    def _listen(self) -> None:
        """Listen until the connection fails, or the end."""
        with closing(self.connect()) as wire:
            self.obey()
            self._session = _Session(self, wire)
            try:
                self._session.run()
            finally:
                # What it has not answered the next one will.
                self.wanted.waiting |= self._session.asking
                self._session = None

    def _note_outage(self, error: Exception) -> None:
        self._trouble = str(error)
        if self._down_since is None and os.getpid() == self._pid:
            self._down_since = monotonic()
            self.counters["disconnected"] += 1
            logger.warning("Nothing is heard from Redis at %s: %s", self.where, error)

    def _end(self) -> None:
        self.obey()
        for waiter in self.wanted.waiting:
            waiter.settle(BackendError("stopped"))
        self.bell.close()
        self._rope.close()


class _Session:
    """
    What is heard over one connection.

    It asks Redis for one thing at a time: the changes that have come up since, with a fence behind
    them. What Redis has not confirmed when it answers the fence, it has refused. The fence is an
    UNSUBSCRIBE from nothing, and so is the heartbeat: where PING is refused (for want of a
    permission, with LOADING, with MISCONF) this is not.
    """

    def __init__(self, listener: Subscriber, wire: Wire) -> None:
        self._listener = listener
        self._wanted = listener.wanted
        self._deliver = listener.deliver
        self._names = listener.wanted.names
        self._timeout = listener.timeout
        self._stopped = listener.stopped
        self._wire = wire
        self.asking: dict[_Waiter, None] = {}
        self._fence: bytes | None = None
        self._fences = 0
        self._asked_at = 0.0
        self._unconfirmed: set[bytes] = set()
        self._refusal: Refused | None = None
        self._is_proven = False
        self._heard_at = monotonic()
        self._slice_ends = self._heard_at + _SLICE

    def run(self) -> None:
        self._ask_again()
        while not self._stopped.is_set():
            self._turn()

    def _ask_again(self) -> None:
        """Ask for what was confirmed before, alone: what is new may be refused."""
        wanted = self._wanted
        newcomers, wanted.waiting = wanted.waiting, {}
        wanted.changed = wanted.names.keys() - wanted.claims.keys()
        self._ask()
        wanted.changed, wanted.waiting = set(wanted.claims), newcomers

    def _turn(self) -> None:
        self._listener.obey()
        if self._fence is None and (self._wanted.changed or self._wanted.waiting):
            self._ask()
        self._wire.flush()
        if self._wire.receive():
            self._heard_at = monotonic()
            self._take_all()
            return
        bell = self._listener.bell
        self._wire.wait(self._pulse(), bell)
        self._slice_ends = monotonic() + _SLICE
        try:
            bell.recv(4096)
        except BlockingIOError:
            pass

    def _ask(self) -> None:
        """Tell Redis what has changed, with a fence behind it."""
        wanted = self._wanted
        changed, wanted.changed = wanted.changed, set()
        self.asking, wanted.waiting = wanted.waiting, {}
        joined = [channel for channel in changed if channel in self._names]
        left = [channel for channel in changed if channel not in self._names]
        self._unconfirmed = set(joined)
        self._refusal = None
        self._asked_at = monotonic()
        self._fences += 1
        self._fence = b"fence %d" % self._fences
        for verb, channels in zip(self._listener.verbs.value, (joined, left), strict=True):
            for start in range(0, len(channels), _CHANNELS):
                self._wire.send(pack(verb, *channels[start : start + _CHANNELS]))
        self._wire.send(pack(b"UNSUBSCRIBE", self._fence))

    def _pulse(self) -> float:
        """Return how long to wait. Ask a silent Redis for a sign of life, and raise without."""
        now = monotonic()
        if self._fence is None:
            left = self._heard_at + self._timeout / 2 - now
            if left > 0:
                return left
            self._ask()
        left = max(self._asked_at, self._heard_at) + self._timeout - now
        if left <= 0:
            raise self._refusal or TimedOut(f"no answer within {self._timeout:g} s")
        return left

    def _take_all(self) -> None:
        for reply in self._wire.replies():
            self._take(reply)
            if self._stopped.is_set():
                return
            if monotonic() > self._slice_ends:
                time.sleep(1e-6)  # lets gevent's loop turn, which 0 does not
                self._slice_ends = monotonic() + _SLICE

    def _take(self, reply: Any) -> None:
        if type(reply) is not list:
            self._take_refusal(reply)
            return
        kind, channel, value = reply
        if kind == b"message" or kind == b"smessage":
            self._take_message(channel, value)
        elif kind == b"subscribe" or kind == b"ssubscribe":
            self._unconfirmed.discard(channel)
        elif channel == self._fence:
            self._take_fence()
        elif channel in self._names and channel not in self._wanted.changed:
            raise BackendError("Redis has ended a subscription by itself")

    def _take_message(self, channel: bytes, payload: bytes) -> None:
        topic = self._names.get(channel)
        if topic is None:
            self._listener.counters["ignored: not subscribed"] += 1
            return
        try:
            self._deliver(topic, payload)
        except Exception:
            logger.exception("A payload on topic %r could not be delivered", topic)

    def _take_refusal(self, reply: Any) -> None:
        if not isinstance(reply, Refused):
            raise BackendError(f"Redis sent {type(reply).__name__}, which nobody asked for")
        if not self._is_proven or reply.is_misplaced:
            raise reply
        self._refusal = reply

    def _take_fence(self) -> None:
        self._fence = None
        refused = self._unconfirmed.intersection(self._names)
        for waiter in self.asking:
            failed = not refused.isdisjoint(waiter.names)
            waiter.settle(self._refusal or BackendError("not confirmed") if failed else None)
        self.asking = {}
        if not self._is_proven:
            self._is_proven = True
            self._listener.note_recovery()
