import logging
import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary, ref

from gevent.monkey import get_original

from .base import BaseBackend, Deliver

logger = logging.getLogger(__name__)

# Held for microseconds, in which no greenlet gives way. A patched lock would do without need what
# it does poorly: have greenlets and threads outside of gevent wait for one another.
_Lock = get_original("threading", "Lock")


class MemoryBackend(BaseBackend):
    """
    Carry payloads inside this process, and no further.

    Instances with one URL share a bus: `memory://` is one, `memory://name` another. A payload is
    delivered before `publish()` returns, unless another thread is at it, or it is published by a
    delivery: then it waits for its turn, for all subscribers of a bus hear everything in one order.

    The bytes are those that any other backend would carry, so a message that cannot be sent there
    fails here too.
    """

    crosses_processes = False

    def __init__(self, url: str = "memory://", **options: Any) -> None:
        super().__init__(url, **options)
        self._bus = _bus(url)
        self._deliver: Deliver | None = None
        self.topics: set[str] = set()

    def start(self, deliver: Deliver) -> None:
        self._bus.forget_the_dead()
        self._deliver = deliver

    def stop(self) -> None:
        self._deliver = None
        self._bus.remove(self, list(self.topics))

    def subscribe(self, topics: Sequence[str]) -> None:
        if self._deliver is not None:
            self._bus.add(self, topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._bus.remove(self, topics)

    def publish(self, topic: str, payload: bytes) -> int:
        return self._bus.publish(topic, payload)

    def receive(self, topic: str, payload: bytes) -> None:
        """Take a payload from the bus, which may have been on its way for a while."""
        deliver = self._deliver
        if deliver is None or topic not in self.topics:
            return
        try:
            deliver(topic, payload)
        except Exception:
            logger.exception("A payload on topic %r could not be delivered", topic)


class _Bus:
    """
    The subscribers of each topic, and a queue that puts all that is published in one order.

    Publishing takes no lock: a topic's subscribers are a tuple, which is replaced and never
    changed. They are weak references, for nobody has to stop a backend before dropping it.
    """

    def __init__(self) -> None:
        self._subscribers: dict[str, tuple[ref[MemoryBackend], ...]] = {}
        self._changing = _Lock()
        self._queue: deque[tuple[str, bytes, list[MemoryBackend]]] = deque()
        self._turn = [True]  # whoever pops it delivers; list.pop() is atomic, and waits for nobody

    def add(self, backend: MemoryBackend, topics: Iterable[str]) -> None:
        with self._changing:
            for topic in topics:
                if topic not in backend.topics:
                    backend.topics.add(topic)
                    self._subscribers[topic] = (*self._subscribers.get(topic, ()), ref(backend))

    def remove(self, backend: MemoryBackend, topics: Iterable[str]) -> None:
        with self._changing:
            for topic in topics:
                if topic in backend.topics:
                    backend.topics.remove(topic)
                    self._keep(topic, [each for each in self._live(topic) if each is not backend])

    def forget_the_dead(self) -> None:
        """Remove what backends have left that were dropped without a stop."""
        with self._changing:
            for topic in list(self._subscribers):
                self._keep(topic, self._live(topic))

    def publish(self, topic: str, payload: bytes) -> int:
        if topic not in self._subscribers:
            return 0
        backends = self._live(topic)
        self._queue.append((topic, payload, backends))
        self._work()
        return len(backends)

    def _live(self, topic: str) -> list[MemoryBackend]:
        subscribers = self._subscribers.get(topic, ())
        return [backend for each in subscribers if (backend := each()) is not None]

    def _keep(self, topic: str, backends: list[MemoryBackend]) -> None:
        if backends:
            self._subscribers[topic] = tuple(map(ref, backends))
        else:
            del self._subscribers[topic]

    def _work(self) -> None:
        """Deliver what is in the queue, unless somebody is at it: then they go on with it."""
        queue, turn = self._queue, self._turn
        while queue:
            try:
                turn.pop()
            except IndexError:
                return
            try:
                while queue:
                    topic, payload, backends = queue.popleft()
                    for backend in backends:
                        backend.receive(topic, payload)
            finally:
                turn.append(True)


_buses: WeakValueDictionary[tuple[int, str], _Bus] = WeakValueDictionary()
_finding = _Lock()


def _bus(url: str) -> _Bus:
    """Return the bus of this URL; that of a parent process is not this process's."""
    with _finding:
        return _buses.setdefault((os.getpid(), url), _Bus())
