"""A carrier between several nodes of one process, with whatever may be wrong with one."""

from collections.abc import Callable, Sequence
from itertools import count

import gevent
from gevent.event import Event

from django_socketio.backends import UNKNOWN, BackendError
from django_socketio.backends.memory import MemoryBackend

_numbers = count()


class Net:
    """
    What the carriers of a test have in common.

    They count all receivers, or tell only whether there is "some", or nothing ("unknown").
    """

    def __init__(self) -> None:
        self.url = f"memory://{next(_numbers)}"
        self.counts = "exactly"
        self.down = False

    def count(self, receivers: int) -> int:
        return {"exactly": receivers, "some": min(receivers, 1), "unknown": UNKNOWN}[self.counts]


class Carrier(MemoryBackend):
    """
    A process's end of the carrier.

    A deaf one sends and hears nothing, until it is started anew, for which it `refuses` so many
    times; a frozen one does neither. What it hears comes with some `delay`.
    """

    crosses_processes = True

    def __init__(self, net: Net) -> None:
        super().__init__(net.url)
        self.net = net
        self.deaf = False
        self.starts = self.stops = 0
        self.refuses = 0
        self.delay = 0.0
        self.published: list[str] = []
        self._moves = Event()
        self._moves.set()

    def start(self, deliver: Callable[[str, bytes], None]) -> None:
        self.starts += 1
        self.deaf = False
        super().start(deliver)

    def stop(self) -> None:
        self.stops += 1
        super().stop()

    def subscribe(self, topics: Sequence[str]) -> None:
        if self.net.down:
            raise BackendError("down")
        if self.refuses:
            self.refuses -= 1
            super().subscribe(topics[:2])  # for a backend may, nevertheless
            raise BackendError("refused")
        super().subscribe(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        if not self._moves.is_set():
            self._moves.wait()
        if self.net.down:
            raise BackendError("down")
        self.published.append(topic)
        return self.net.count(super().publish(topic, payload))

    def receive(self, topic: str, payload: bytes) -> None:
        if not self._moves.is_set() or self.deaf:
            return
        if self.delay:
            gevent.spawn_later(self.delay, super().receive, topic, payload)
        else:
            super().receive(topic, payload)

    def freeze(self) -> None:
        self._moves.clear()

    def thaw(self) -> None:
        self._moves.set()

    def kill(self) -> None:
        """Be gone without a word."""
        self.freeze()
        self.stop()
