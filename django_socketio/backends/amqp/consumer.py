import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..base import Deliver
from . import frames
from .broker import Broker
from .frames import Name
from .link import Call, Link, Lost
from .publisher import CONTENT_TYPE

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECEIVED, _DROPPED = b"received", b"dropped"
"""Tags of the two consumers."""

_NOWAIT = b"\x01"
_NO_ARGUMENTS = bytes(4)
_NO_LIMIT = bytes(7)

_BATCH = 500
"""Topics that are bound, or not any more, in one round trip."""

_LEAVING = 100
"""Of them, those that are left even if many wait to subscribe."""

_COMPLAINTS = 60.0
"""Seconds between two lines about messages that were dropped."""


class Consumer(Link):
    """
    Receive from a queue that lives and dies with the connection.

    The topics that it is to be bound to are kept here, for this connection and the next; whoever
    waits for a binding meanwhile waits for that.
    """

    role = "listener"
    log_level = logging.WARNING

    def __init__(
        self,
        broker: Broker,
        counters: Counter[str],
        max_bytes: int,
        deliver: Deliver,
        interrupted: Callable[[float], None],
    ) -> None:
        super().__init__(broker, counters)
        self._max_bytes = max_bytes
        self._deliver = deliver
        self._interrupted = interrupted
        self._topics: dict[bytes, str] = {}
        self._changes: deque[bytes | Call] = deque()
        self._left: deque[bytes] = deque()
        self._asked: list[Call] | None = None
        self._asked_at = 0.0
        self._restored = Call()
        self._exchange = broker.exchange.encode()
        self._queue = b""
        self._delivery = b"", b"", b""
        self._complain_at = 0.0

    def subscribe(self, topics: Mapping[bytes, str]) -> None:
        """Bind topics, by their routing keys; it is tried until they are left, whatever happens."""
        if not self.is_forked:
            self._topics.update(topics)
            self._changes.extend(topics)
        self.ask(Call())

    def unsubscribe(self, keys: Iterable[bytes]) -> None:
        if not self.is_forked:
            self._left.extend(key for key in keys if self._topics.pop(key, None) is not None)
            self.ring()

    def _enqueue(self, call: Call) -> None:
        self._changes.append(call)

    def _declare(self, channel: Any) -> None:
        """
        Declare the queue, and one for what is dropped of it.

        Nothing is acknowledged: 200 messages at most are on their way to a process that does not
        read, and the others wait in the queue. Of a full one the oldest go, for to refuse the
        newest would have one slow process fail everybody's broadcasts. The broker tells nobody, but
        makes them dead letters, which are counted here and not read. Those wait in a bounded queue
        too, so after a long jam there were more.
        """
        name = f"{self.broker.exchange}.{uuid.uuid4().hex}"
        dropped = f"{name}.dropped"
        options = {"durable": False, "exclusive": True, "auto_delete": True}
        arguments: dict[str, Any] = {"x-queue-type": "classic", "x-overflow": "drop-head"}
        limit = {"x-max-length-bytes": max(self._max_bytes // 16, 1)}
        channel.queue_declare(dropped, **options, arguments={**arguments, **limit})
        channel.queue_bind(dropped, self.broker.exchange, dropped)
        limit = {"x-max-length-bytes": self._max_bytes}
        arguments["x-dead-letter-exchange"] = self.broker.exchange
        arguments["x-dead-letter-routing-key"] = dropped
        channel.queue_declare(name, **options, arguments={**arguments, **limit})
        channel.basic_consume(dropped, consumer_tag=_DROPPED.decode(), no_ack=True)
        channel.basic_consume(name, consumer_tag=_RECEIVED.decode(), no_ack=True)
        self._queue = name.encode()

    def _connected(self) -> None:
        """Bind the queue to everything."""
        waiting = self._drain()
        self._restored = Call()
        self._changes.extend(list(self._topics))
        self._changes.extend([self._restored, *waiting])

    def _drain(self) -> list[Call]:
        """Forget all changes; return the calls that wait for them."""
        _take(self._left)
        asked, self._asked = self._asked or [], None
        return asked + [each for each in _take(self._changes) if isinstance(each, Call)]

    def _write(self) -> None:
        """Write a batch, unless the answer to the last one is still due."""
        if self._asked is not None or self.out:
            return
        changes = _take(self._changes, _BATCH)
        left = _take(self._left, max(_BATCH - len(changes), _LEAVING))
        if not changes and not left:
            return
        calls = [each for each in changes if isinstance(each, Call)]
        keys = [each for each in changes if isinstance(each, bytes)]
        for key in dict.fromkeys(keys + left):
            # In whatever order: what holds now counts, and who changes it again asks again.
            self.out += self._bind(key) if key in self._topics else self._unbind(key)
        # The shortest question of those that the broker answers when all before it is done.
        self.out += frames.method(frames.BASIC_QOS, _NO_LIMIT)
        self._asked = calls
        self._asked_at = time.monotonic()

    def _bind(self, key: bytes) -> bytes:
        return frames.method(frames.QUEUE_BIND, self._where(key) + _NOWAIT + _NO_ARGUMENTS)

    def _unbind(self, key: bytes) -> bytes:
        return frames.method(frames.QUEUE_UNBIND, self._where(key) + _NO_ARGUMENTS)

    def _where(self, key: bytes) -> bytes:
        return bytes(2) + b"".join(map(frames.short, (self._queue, self._exchange, key)))

    def _on_method(self, name: Name, payload: bytes) -> None:
        if name == frames.BASIC_DELIVER:
            tag, at = frames.read_short(payload, 4)
            exchange, at = frames.read_short(payload, at + 9)
            self._delivery = tag, exchange, frames.read_short(payload, at)[0]
        elif name == frames.BASIC_QOS_OK:
            asked, self._asked = self._asked or [], None
            for call in asked:
                call.answer()
            if self._restored in asked:
                seconds = self._end_outage(self.log_level)
                if seconds is not None:
                    self._interrupted(seconds)
        elif name == frames.BASIC_CANCEL:
            raise Lost("somebody has deleted the queue")

    def _wants(self, header: bytes) -> bool:
        tag, exchange, key = self._delivery
        if tag == _DROPPED:
            self._count_dropped()
            return False
        content_type = frames.read_property(header, frames.CONTENT_TYPE)
        if exchange != self._exchange or content_type != CONTENT_TYPE:
            self.counters["dropped: of a stranger"] += 1
            return False
        return key in self._topics

    def _count_dropped(self) -> None:
        self.counters["dropped: queue full"] += 1
        if (now := time.monotonic()) > self._complain_at:
            self._complain_at = now + _COMPLAINTS
            logger.warning("Messages were dropped: this process is slow, and its queue was full")

    def _on_message(self, body: bytes) -> None:
        topic = self._topics.get(self._delivery[2])
        if topic is None or self.closing.is_set():
            return
        try:
            self._deliver(topic, body)
        except Exception:
            logger.exception("A payload on topic %r could not be delivered", topic)

    def _check(self, now: float) -> None:
        if self._asked is not None and now - self._asked_at > self.broker.timeout:
            raise Lost(f"the broker bound nothing for {self.broker.timeout:g} s")

    def _lost(self, why: str) -> None:
        """Who waits for a binding waits for the next connection."""

    def _despair(self, why: str) -> None:
        for call in self._drain():
            call.answer(why)


def _take(queue: deque[T], most: int | None = None) -> list[T]:
    """Take up to `most` from a queue that others add to."""
    taken: list[T] = []
    while queue and len(taken) != most:
        taken.append(queue.popleft())
    return taken
