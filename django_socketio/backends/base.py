from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from .exceptions import InvalidBackend

Deliver = Callable[[str, bytes], None]
"""`deliver(topic, payload)`: hand what was published to this process. Never waits or raises."""

UNKNOWN = -1
"""What `publish()` returns if the carrier does not tell whether anybody is there."""


class BaseBackend(ABC):
    """
    Carry payloads to whichever processes subscribe to their topic.

    An address (everybody, a channel, a session) is a topic: a process subscribes to one when its
    first local socket needs it and leaves it with the last. So what a backend knows of topics is
    the membership of the whole cluster, and a payload goes only where somebody waits for it.
    A topic is a printable string of up to 600 characters, a payload bytes of any length.

    A backend promises:

    - **Order.** What one thread or greenlet publishes, one call after the other, arrives everywhere
      in that order. Calls that overlap are in any order.
    - **At most once.** Nothing arrives twice, so a publish is never tried again blindly; what a
      subscriber's outage swallows is lost.
    - **Confirmation.** When `subscribe()` returns, everything that is published from then on, by
      whomever, is delivered. It stays so through outages: the backend reconnects by itself, without
      end, and then subscribes to everything again.
    - **Its own echo.** The publisher's process is a subscriber like any other.
    - **Errors.** `publish()` and `subscribe()` raise `BackendError`, and nothing else, if the
      carrier does not answer within `timeout` seconds, an option of all backends that have a
      carrier to wait for. Whoever gets it may take it that nothing was sent; only an answer that
      is lost on its way back can make that untrue.
    - **Threads.** All methods may be called from any thread or greenlet, several at a time. The
      locks and events of the standard library, once gevent has patched it, now and then forget a
      thread of the system that waits for them: those in `backends.waiting` do not.
    - **Any process.** `publish()` works without `start()`, and after `stop()`. It connects when it
      first has to, with gevent's patched standard library or without: a backend that only uses
      `threading` and `socket`, and no gevent, runs in both.
    - **Forks.** An instance belongs to the process that made it. A child makes its own, and neither
      uses nor closes what its parent has open.

    `OPTIONS` from the settings are the constructor's keyword arguments; unknown ones are refused
    by name. Client libraries are imported in the constructor, not with the module.
    """

    supports_receivers = True
    """Whether `publish()` tells whether anybody is there."""

    crosses_processes = True
    """Whether other processes can be reached at all."""

    interrupted: Callable[[float], None] = staticmethod(lambda seconds: None)
    """
    To be called, in any thread, when after an outage all topics are subscribed again.

    The argument is for how many seconds the carrier may not have been heard. It is set by whoever
    uses the backend, who then knows that something may be lost; a backend that never calls it is
    found out by the numbers of messages alone, later.
    """

    def __init__(self, url: str = "", **options: Any) -> None:
        if options:
            names = ", ".join(sorted(options))
            raise InvalidBackend(f"{type(self).__name__} does not know the option(s) {names}.")
        self.url = url

    @abstractmethod
    def start(self, deliver: Deliver) -> None:
        """
        Begin to receive: call `deliver` for each payload on a subscribed topic, one at a time.

        Does not wait: a carrier that is not there yet is connected to as soon as it is. After
        `stop()` it may be called again, with no topic subscribed.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop receiving, forget all topics, and let go of every connection. Idempotent."""

    @abstractmethod
    def subscribe(self, topics: Sequence[str]) -> None:
        """
        Subscribe this process to `topics`; return when the carrier has confirmed all of them.

        A topic that is subscribed already stays so and is confirmed again. After a `BackendError`
        the topics may be subscribed or not; the caller unsubscribes from those that it gives up.
        """

    @abstractmethod
    def unsubscribe(self, topics: Sequence[str]) -> None:
        """
        Undo `subscribe()`, now or soon, but before any later `subscribe()`.

        It is called where nothing may wait, so it neither waits nor raises; topics that are not
        subscribed are none of its business.
        """

    @abstractmethod
    def publish(self, topic: str, payload: bytes) -> int:
        """
        Publish, and return how many processes the payload goes to.

        0 means nobody; a carrier that knows no number returns 1 for somebody, and one that does
        not even know that returns `UNKNOWN` and has `supports_receivers` unset.
        """

    def check(self) -> list[str]:
        """Return what is wrong with the configuration, a sentence each, for the system check."""
        return []
