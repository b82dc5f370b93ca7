from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from .exceptions import InvalidBackend

Deliver = Callable[[str, bytes], None]
"""`deliver(topic, payload)`: hand what was published to this process. Returns at once."""


class BaseBackend(ABC):
    """
    Carry payloads to whichever processes subscribe to their topic.

    An address (everybody, a channel, a session) is a topic: a process subscribes to one when its
    first local socket needs it and leaves it with the last. So what a backend knows of topics is
    the membership of the whole cluster, and a payload goes only where somebody waits for it.

    A backend promises:

    - **Order.** What one process publishes to one topic arrives everywhere in that order.
    - **At most once.** Nothing arrives twice; what a subscriber's outage swallows is lost.
    - **Confirmation.** When `subscribe()` returns, everything that is published from then on, by
      whomever, is delivered.
    - **Its own echo.** The publisher's process is a subscriber like any other.
    - **Errors.** `publish()` and `subscribe()` raise `BackendError` if the carrier is down, within
      a bounded time, and then have sent nothing. `unsubscribe()` does not wait: it is called
      where nothing may.
    - **Any process.** `publish()` works without `start()`, from any thread, and after a fork.

    `OPTIONS` from the settings are the constructor's keyword arguments; unknown ones are refused
    by name. Client libraries are imported in the constructor, not with the module.
    """

    supports_receivers = True
    """Whether `publish()` knows how many processes it reached; if not, it returns -1."""

    crosses_processes = True
    """Whether other processes can be reached at all."""

    def __init__(self, url: str = "", **options: Any) -> None:
        if options:
            names = ", ".join(sorted(options))
            raise InvalidBackend(f"{type(self).__name__} does not know the option(s) {names}.")
        self.url = url

    @abstractmethod
    def start(self, deliver: Deliver) -> None:
        """Begin to receive: call `deliver` for each payload on a subscribed topic."""

    @abstractmethod
    def stop(self) -> None:
        """Stop receiving and let go of every connection. Idempotent."""

    @abstractmethod
    def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe this process to `topics`; return when the carrier has confirmed all of them."""

    @abstractmethod
    def unsubscribe(self, topics: Sequence[str]) -> None:
        """Undo `subscribe()`, now or soon. Must not wait."""

    @abstractmethod
    def publish(self, topic: str, payload: bytes) -> int:
        """Publish, and return how many processes the payload goes to."""

    def check(self) -> list[str]:
        """Return what is wrong with the configuration, a sentence each, for the system check."""
        return []
