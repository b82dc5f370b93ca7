import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..base import UNKNOWN, Deliver
from ..exceptions import BackendError

logger = logging.getLogger(__name__)

_POLLING = 0.01
"""Seconds between two looks into an empty queue: kombu's broker wakes nobody."""


class Memory:
    """
    kombu's own broker, inside this process.

    It has neither confirms nor mandatory messages, and its queues have no bound.
    """

    def __init__(self, url: str, exchange: str) -> None:
        self._url = url
        self._channel = self._client().channel()
        self._channel.exchange_declare(exchange, "direct", durable=True)
        self._exchange = exchange
        self._topics: set[str] = set()
        self._queue = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _client(self) -> Any:
        from kombu.connection import Connection

        untyped: Any = Connection
        return untyped(self._url, transport_options={"polling_interval": _POLLING})

    def start(self, deliver: Deliver, interrupted: Callable[[float], None]) -> None:
        """Begin; a broker in this process has no outages."""
        self.stop()
        self._queue, self._ended = f"{self._exchange}.{uuid.uuid4().hex}", threading.Event()
        self._channel.queue_declare(self._queue)
        self.subscribe([self._queue])  # kombu does not delete a queue that has no binding
        arguments = self._queue, self._ended, deliver
        self._thread = threading.Thread(target=self._listen, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ended.set()
        if thread is not threading.current_thread():
            thread.join(1.0)
        self._channel.queue_delete(self._queue)
        self.unsubscribe(list(self._topics))
        self._queue = ""

    def subscribe(self, topics: Sequence[str]) -> None:
        if not self._queue:
            raise BackendError("The backend is not started.")
        for topic in topics:
            self._topics.add(topic)
            self._channel.queue_bind(self._queue, self._exchange, topic)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        for topic in self._topics.intersection(topics):
            self._topics.discard(topic)
            self._channel.queue_unbind(self._queue, self._exchange, topic)

    def publish(self, topic: str, payload: bytes) -> int:
        message = self._channel.prepare_message(payload)
        self._channel.basic_publish(message, self._exchange, topic)
        return UNKNOWN

    def _listen(self, queue: str, ended: threading.Event, deliver: Deliver) -> None:
        def receive(message: Any) -> None:
            topic = message.delivery_info["routing_key"]
            if ended.is_set() or topic not in self._topics:
                return
            try:
                deliver(topic, message.body or b"")
            except Exception:
                logger.exception("A payload on topic %r could not be delivered", topic)

        with self._client() as client:
            client.channel().basic_consume(queue, True, receive, queue)
            while not ended.is_set():
                try:
                    client.drain_events(timeout=10 * _POLLING)
                except TimeoutError:
                    pass
