import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..base import BaseBackend, Deliver
from ..exceptions import BackendError, InvalidBackend
from .broker import Broker
from .consumer import Consumer
from .memory import Memory
from .publisher import Publish, Publisher

_MOST = (1 << 31) - 1
"""Of a number that every broker understands among the arguments of a queue."""

_LONGEST = 255
"""Bytes of a routing key."""


class AMQPBackend(BaseBackend):
    """
    Carry payloads through RabbitMQ.

    Each topic is a routing key of one direct exchange, and each process has a queue of its own,
    which is bound to its topics and goes when the process does.

    `url` may name several hosts of a cluster, with `;` between them. With `amqps://` the host has
    to prove its name; `ssl` has py-amqp's options (`ca_certs`, `certfile`, `keyfile`, …). `prefix`
    is the exchange's name: it separates deployments, as a virtual host does. `heartbeat` is in
    seconds, rounded up, and 0 for none. A process that is too slow finds the last `max_queue_bytes`
    in its queue, and `counters` tells that there were more.

    With `memory://`, kombu's own broker, one process can be reached and receivers are not known.
    """

    def __init__(
        self,
        url: str = "amqp://guest:guest@localhost:5672//",
        *,
        prefix: str = "socketio",
        timeout: float = 5.0,
        heartbeat: float = 10.0,
        max_queue_bytes: int = 64 << 20,
        ssl: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(url, **options)
        self.counters: Counter[str] = Counter()
        if problem := _problem(prefix, timeout, heartbeat, max_queue_bytes):
            raise InvalidBackend(f"AMQPBackend: {problem}.")
        broker = Broker(tuple(url.split(";")), prefix, timeout, math.ceil(heartbeat), ssl or {})
        try:
            self._carrier = self._make_carrier(broker, max_queue_bytes)
        except ImportError as error:
            message = "AMQPBackend needs kombu: pip install django-socketio[amqp]"
            raise InvalidBackend(message) from error
        except (ValueError, KeyError) as error:
            raise InvalidBackend(f"AMQPBackend: this is no URL of a broker: {error}") from error

    def _make_carrier(self, broker: Broker, max_bytes: int) -> "Network | Memory":
        schemes = {url.partition("://")[0] for url in broker.urls}
        if schemes == {"memory"}:
            self.supports_receivers = self.crosses_processes = False
            return Memory(self.url, broker.exchange)
        if not schemes <= {"amqp", "amqps"}:
            raise ValueError("it begins with amqp://, amqps:// or memory://")
        for url in broker.urls:
            broker.client(url)
        return Network(broker, self.counters, max_bytes)

    def start(self, deliver: Deliver) -> None:
        self._carrier.start(deliver, self.interrupted)

    def stop(self) -> None:
        self._carrier.stop()

    def subscribe(self, topics: Sequence[str]) -> None:
        self._carrier.subscribe(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._carrier.unsubscribe(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        return self._carrier.publish(topic, payload)


class Network:
    """A broker elsewhere, by one connection to publish and one to receive."""

    def __init__(self, broker: Broker, counters: Counter[str], max_bytes: int) -> None:
        self._broker = broker
        self._counters = counters
        self._max_bytes = max_bytes
        self._publisher: Publisher | None = None
        self._consumer: Consumer | None = None
        self._turn = [True]
        """Who pops it makes a publisher: a lock that works between any threads."""

    def start(self, deliver: Deliver, interrupted: Callable[[float], None]) -> None:
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = Consumer(
            self._broker, self._counters, self._max_bytes, deliver, interrupted
        )
        self._consumer.start()
        self._get_publisher()  # here, where the process lives, and not in some passing thread

    def stop(self) -> None:
        """Close both connections at once, and wait a moment for the broker to have seen it."""
        links = [link for link in (self._consumer, self._publisher) if link is not None]
        self._consumer = self._publisher = None
        for link in links:
            link.close()
        deadline = time.monotonic() + 1.5
        for link in links:
            link.join(max(deadline - time.monotonic(), 0))

    def subscribe(self, topics: Sequence[str]) -> None:
        if self._consumer is None:
            raise BackendError("The backend is not started.")
        if topics:
            self._consumer.subscribe({routing_key(topic): topic for topic in topics})

    def unsubscribe(self, topics: Sequence[str]) -> None:
        if self._consumer is not None:
            self._consumer.unsubscribe(map(routing_key, topics))

    def publish(self, topic: str, payload: bytes) -> int:
        call = Publish(routing_key(topic), payload)
        try:
            self._get_publisher().ask(call)
        except BackendError:
            self._counters["publish failed"] += 1
            raise
        return call.receivers

    def _get_publisher(self) -> Publisher:
        while (publisher := self._publisher) is None or not publisher.is_alive:
            try:
                turn = self._turn.pop()
            except IndexError:
                time.sleep(0.001)
                continue
            try:
                self._make_publisher()
            finally:
                self._turn.append(turn)
        return publisher

    def _make_publisher(self) -> None:
        old = self._publisher
        if old is not None and old.is_alive:
            return
        new = Publisher(self._broker, self._counters)
        new.start()
        self._publisher = new
        if old is not None:
            old.close()


def routing_key(topic: str) -> bytes:
    """
    Return what stands for a topic in the broker.

    A topic that is too long ends in a digest, and no other topic is as long as that makes it.
    """
    try:
        key = topic.encode()
        if len(key) < _LONGEST:
            return key
    except UnicodeEncodeError:  # of half a surrogate pair, which is no text to every broker
        key = topic.encode(errors="surrogatepass")
    digest = b"~" + hashlib.sha256(key).hexdigest().encode()
    room = _LONGEST - len(digest)
    return key[:room].decode(errors="ignore").encode().ljust(room, b"~") + digest


def _problem(prefix: str, timeout: float, heartbeat: float, max_queue_bytes: int) -> str | None:
    if not 0 < len(prefix.encode()) <= 200 or prefix.startswith("amq."):
        return "prefix has 1 to 200 bytes, and does not begin with amq"
    if timeout <= 0:
        return "timeout is more than 0"
    if not 0 <= heartbeat <= 65_535:
        return "heartbeat is a number of seconds up to 65535, or 0 for none"
    if not 0 < max_queue_bytes <= _MOST:
        return f"max_queue_bytes is a number up to {_MOST}"
    return None
