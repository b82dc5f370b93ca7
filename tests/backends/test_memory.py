"""The carrier of one process: the contract of `BaseBackend`, as far as one process goes."""

import weakref
from collections.abc import Callable, Iterator
from unittest import TestCase

import pytest

from django_socketio.backends import InvalidBackend
from django_socketio.backends.memory import MemoryBackend
from django_socketio.testing import BackendContract


class Inbox(list[tuple[str, bytes]]):
    """What was delivered, in order."""

    def deliver(self, topic: str, payload: bytes) -> None:
        self.append((topic, payload))


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def backend(inbox: Inbox) -> Iterator[MemoryBackend]:
    backend = MemoryBackend()
    backend.start(inbox.deliver)
    yield backend
    backend.stop()


def test_what_is_published_is_delivered(backend: MemoryBackend, inbox: Inbox) -> None:
    backend.subscribe(["a"])
    assert backend.publish("a", b"\x00payload") == 1
    assert inbox == [("a", b"\x00payload")]


def test_nobody_there_is_no_receiver(backend: MemoryBackend, inbox: Inbox) -> None:
    backend.subscribe(["a"])
    assert backend.publish("b", b"x") == 0
    assert inbox == []


def test_several_topics(backend: MemoryBackend, inbox: Inbox) -> None:
    backend.subscribe(["a", "b"])
    backend.subscribe([])
    backend.unsubscribe(["a", "never"])
    assert [backend.publish(topic, b"x") for topic in "abc"] == [0, 1, 0]
    assert inbox == [("b", b"x")]


def test_to_subscribe_twice_is_to_subscribe(backend: MemoryBackend, inbox: Inbox) -> None:
    """At most once: nothing arrives twice."""
    backend.subscribe(["a", "a"])
    backend.subscribe(["a"])
    assert backend.publish("a", b"x") == 1
    assert inbox == [("a", b"x")]
    backend.unsubscribe(["a"])
    assert backend.publish("a", b"x") == 0


def test_the_order_is_kept(backend: MemoryBackend, inbox: Inbox) -> None:
    backend.subscribe(["a", "b"])
    sent = [("ab"[number % 2], str(number).encode()) for number in range(100)]
    for topic, payload in sent:
        backend.publish(topic, payload)
    assert inbox == sent


def test_it_publishes_without_a_start() -> None:
    """A process that only sends does not receive, and there is no other here."""
    backend = MemoryBackend("memory://")
    backend.subscribe(["a"])
    assert backend.publish("a", b"x") == 0


def test_after_the_end_nothing_is_delivered(backend: MemoryBackend, inbox: Inbox) -> None:
    backend.subscribe(["a"])
    backend.stop()
    backend.stop()
    assert backend.publish("a", b"x") == 0
    backend.start(inbox.deliver)
    assert backend.publish("a", b"x") == 0  # subscriptions end with it
    backend.stop()
    backend.subscribe(["a"])  # by a socket that is late
    assert backend.publish("a", b"x") == 0
    assert inbox == []


def test_a_delivery_may_publish_and_unsubscribe(backend: MemoryBackend) -> None:
    """Members that are too slow leave while they are served."""
    seen = []

    def deliver(topic: str, payload: bytes) -> None:
        seen.append((topic, payload))
        if topic == "a":
            backend.unsubscribe(["a"])
            backend.publish("b", payload)
            backend.publish("a", b"again")

    backend.start(deliver)
    backend.subscribe(["a", "b"])
    assert backend.publish("a", b"x") == 1
    assert seen == [("a", b"x"), ("b", b"x")]


def test_all_hear_one_order() -> None:
    """Also of what is published by a delivery: it waits until all have what comes before it."""
    backends = [MemoryBackend("memory://order") for _ in range(3)]
    inboxes = [Inbox() for _ in backends]

    def answer(topic: str, payload: bytes) -> None:
        inboxes[1].append((topic, payload))
        if payload == b"question":
            assert backends[1].publish("t", b"answer") == 3

    for backend, deliver in zip(
        backends, (inboxes[0].deliver, answer, inboxes[2].deliver), strict=True
    ):
        backend.start(deliver)
        backend.subscribe(["t"])
    assert backends[0].publish("t", b"question") == 3
    assert inboxes == 3 * [[("t", b"question"), ("t", b"answer")]]


def test_who_is_dropped_without_a_stop_is_gone(inbox: Inbox) -> None:
    """With all it has: the next start forgets the topics."""
    kept, dropped = MemoryBackend("memory://drop"), MemoryBackend("memory://drop")
    for backend in (kept, dropped):
        backend.start(inbox.deliver)
    kept.subscribe(["a"])
    dropped.subscribe(["a", "b"])
    del backend, dropped
    assert kept.publish("a", b"x") == 1
    assert kept.publish("b", b"x") == 0
    assert inbox == [("a", b"x")]
    kept.start(inbox.deliver)
    assert list(kept._bus._subscribers) == ["a"]


def test_a_bus_goes_with_its_last_backend() -> None:
    first, second = MemoryBackend("memory://last"), MemoryBackend("memory://last")
    bus = weakref.ref(first._bus)
    assert first._bus is second._bus
    assert first._bus is not MemoryBackend()._bus
    del first, second
    assert bus() is None


def test_it_says_what_it_can() -> None:
    assert MemoryBackend.supports_receivers
    assert not MemoryBackend.crosses_processes
    assert MemoryBackend().check() == []
    assert MemoryBackend().url == "memory://"


@pytest.mark.parametrize("make", [MemoryBackend, lambda **kw: MemoryBackend("memory://", **kw)])
def test_it_knows_no_options(make: Callable[..., MemoryBackend]) -> None:
    with pytest.raises(InvalidBackend, match="MemoryBackend does not know .* max_size"):
        make(max_size=1)


class TestContract(BackendContract, TestCase):
    carrier_breaks = False  # it is this process

    def make_backend(self) -> MemoryBackend:
        return MemoryBackend(f"memory://{self.unique}")
