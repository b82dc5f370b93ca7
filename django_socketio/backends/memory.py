from collections.abc import Sequence
from typing import Any

from .base import BaseBackend, Deliver


class MemoryBackend(BaseBackend):
    """
    Carry payloads inside this process, and no further.

    The bytes are those that any other backend would carry, so a message that cannot be sent
    there fails here too.
    """

    crosses_processes = False

    def __init__(self, url: str = "memory://", **options: Any) -> None:
        super().__init__(url, **options)
        self._deliver: Deliver | None = None
        self._topics: set[str] = set()

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def stop(self) -> None:
        self._deliver = None
        self._topics.clear()

    def subscribe(self, topics: Sequence[str]) -> None:
        self._topics.update(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._topics.difference_update(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        if self._deliver is None or topic not in self._topics:
            return 0
        self._deliver(topic, payload)
        return 1
