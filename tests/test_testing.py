"""The contract has teeth: each way to break a backend fails the test that is meant for it."""

import contextlib
import fnmatch
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from unittest import TestCase, TestResult as Result

import pytest

from django_socketio.backends import UNKNOWN, BackendError, BaseBackend, Deliver
from django_socketio.backends.memory import MemoryBackend
from django_socketio.testing import BackendContract, Cluster, Node
from tests.support import ROOT, UNIT

PARENT = os.getpid()
TIMEOUT = 4 * UNIT
PATIENCE = 8 * UNIT

Breaks = tuple[type["Sound"], str]
B = TypeVar("B", bound=type["Sound"])

BROKEN: list[Any] = []


def fails(name: str) -> Callable[[B], B]:
    """Say which test of the contract the backend fails."""

    def note(broken: B) -> B:
        BROKEN.append(pytest.param(broken, name, id=f"{broken.__name__}-{name}"))
        return broken

    return note


class Carrier:
    """Something between the nodes that can go away, and forgets who was subscribed."""

    def __init__(self) -> None:
        self.nodes: weakref.WeakSet[Sound] = weakref.WeakSet()
        self.back = threading.Event()
        self.back.set()

    def go(self) -> None:
        self.back.clear()
        for node in list(self.nodes):
            node.lose()

    def come(self) -> None:
        self.back.set()
        for node in list(self.nodes):
            node.resubscribe()


class Sound(MemoryBackend):
    """A backend with a carrier, with which nothing is wrong."""

    carrier: Carrier

    def __init__(self, url: str, *, timeout: float = TIMEOUT, **options: Any) -> None:
        super().__init__(url, **options)
        self.timeout = timeout
        self.wanted: set[str] = set()

    def stop(self) -> None:
        super().stop()
        self.wanted.clear()

    def subscribe(self, topics: Sequence[str]) -> None:
        self.reach()
        self.wanted.update(topics)
        super().subscribe(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.wanted.difference_update(topics)
        super().unsubscribe(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        self.reach()
        return super().publish(topic, payload)

    def reach(self) -> None:
        if not self.carrier.back.is_set():
            raise BackendError("The carrier is away.")

    def lose(self) -> None:
        MemoryBackend.unsubscribe(self, list(self.topics))

    def resubscribe(self) -> None:
        MemoryBackend.subscribe(self, list(self.wanted))


class Case(BackendContract):
    """The contract, in a hurry."""

    timeout = TIMEOUT
    patience = PATIENCE
    backend_class: ClassVar[type[Sound]]

    def setUp(self) -> None:
        super().setUp()
        self.carrier = Carrier()

    def make_backend(self) -> BaseBackend:
        backend = self.backend_class(f"memory://{self.unique}", timeout=self.timeout)
        backend.carrier = self.carrier
        self.carrier.nodes.add(backend)
        return backend

    def break_carrier(self) -> None:
        self.carrier.go()

    def heal_carrier(self) -> None:
        self.carrier.come()


def complaints(backend_class: type[Sound], name: str, **attributes: Any) -> list[str]:
    """Return what a test of the contract says of a backend."""
    attributes = {"backend_class": backend_class, **attributes}
    result = Result()
    type("TestBackend", (Case, TestCase), attributes)(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    return [text for _, text in (*result.failures, *result.errors)]


TESTS = [name for name in dir(BackendContract) if name.startswith("test_")]


@pytest.mark.parametrize("name", TESTS)
def test_a_sound_backend_passes(name: str) -> None:
    assert complaints(Sound, name) == []


@pytest.mark.parametrize("name", TESTS)
def test_a_carrier_may_know_no_numbers(name: str) -> None:
    class OneForAll(Sound):
        def publish(self, topic: str, payload: bytes) -> int:
            return min(super().publish(topic, payload), 1)

    class Unknowing(Sound):
        supports_receivers = False

        def publish(self, topic: str, payload: bytes) -> int:
            super().publish(topic, payload)
            return UNKNOWN

    assert complaints(OneForAll, name) == []
    assert complaints(Unknowing, name) == []


# Who hears


@fails("test_all_who_subscribed_hear")
class Hermit(Sound):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(f"{url}/{id(self)}", **options)


@fails("test_a_node_hears_itself")
@fails("test_all_who_subscribed_hear")
class NoEcho(Sound):
    publishing = False

    def publish(self, topic: str, payload: bytes) -> int:
        self.publishing = True
        receivers = super().publish(topic, payload)
        self.publishing = False
        return receivers

    def receive(self, topic: str, payload: bytes) -> None:
        if not self.publishing:
            super().receive(topic, payload)


@fails("test_only_those_who_subscribed_hear")
@fails("test_three_nodes")
class Loudspeaker(Sound):
    """Delivers what is for others."""

    def subscribe(self, topics: Sequence[str]) -> None:
        super().subscribe([*topics, "everything"])

    def publish(self, topic: str, payload: bytes) -> int:
        if payload.startswith(b"probe"):
            return super().publish(topic, payload)
        receivers = len(self._bus._live(topic))
        super().publish("everything", payload)
        return receivers


@fails("test_nobody_is_no_receiver")
@fails("test_odd_topics_reach_no_other")
@fails("test_unsubscribing_ends_it")
@fails("test_a_node_that_stopped_is_gone")
class Optimist(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        return max(super().publish(topic, payload), 1)


@fails("test_all_who_subscribed_hear")
class Boaster(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        return 2 * super().publish(topic, payload)


@fails("test_a_node_hears_itself")
class Modest(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        return super().publish(topic, payload) - (topic in self.topics)


@fails("test_all_who_subscribed_hear")
class Unsure(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        super().publish(topic, payload)
        return UNKNOWN


@fails("test_two_address_spaces_do_not_hear_each_other")
class OneSpace(Sound):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__("memory://", **options)


# Subscribing


@fails("test_a_subscribe_that_returned_is_confirmed")
class Hasty(Sound):
    def subscribe(self, topics: Sequence[str]) -> None:
        later(super().subscribe, topics)


@fails("test_all_topics_of_a_subscribe_are_confirmed")
class HalfHasty(Sound):
    def subscribe(self, topics: Sequence[str]) -> None:
        super().subscribe(topics[:1])
        later(super().subscribe, topics[1:])


@fails("test_many_topics")
class Forgetful(Sound):
    def subscribe(self, topics: Sequence[str]) -> None:
        super().subscribe(topics[:500])


@fails("test_subscribing_twice_is_subscribing")
class Counting(Sound):
    """Wants an unsubscribe for each subscribe."""

    def unsubscribe(self, topics: Sequence[str]) -> None:
        asked = self.__dict__.setdefault("asked", set())
        super().unsubscribe([topic for topic in topics if topic in asked])
        asked.update(topics)


@fails("test_subscribing_twice_is_subscribing")
class Doubling(Sound):
    """Delivers what is subscribed twice twice."""

    def subscribe(self, topics: Sequence[str]) -> None:
        self.__dict__.setdefault("twice", set()).update(self.topics.intersection(topics))
        super().subscribe(topics)

    def receive(self, topic: str, payload: bytes) -> None:
        super().receive(topic, payload)
        if topic in self.__dict__["twice"]:
            super().receive(topic, payload)


@fails("test_no_topics_are_fine")
class Fussy(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        if not topics:
            raise ValueError("no topics")
        super().unsubscribe(topics)


@fails("test_unsubscribing_ends_it")
@fails("test_subscribing_twice_is_subscribing")
@fails("test_many_topics")
@fails("test_leaving_in_an_outage")
class Faithful(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        pass


@fails("test_unsubscribing_ends_it")
@fails("test_many_topics")
class Thorough(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        super().unsubscribe(list(self.wanted) if topics else [])


@fails("test_unsubscribing_from_what_is_not_subscribed")
class Strict(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        if not self.wanted.issuperset(topics):
            raise BackendError("not subscribed")
        super().unsubscribe(topics)


@fails("test_subscribing_again_comes_after_unsubscribing")
class Overtaken(Sound):
    """Unsubscribes when it comes to it, whatever happened meanwhile."""

    left: Sequence[str] = ()

    def subscribe(self, topics: Sequence[str]) -> None:
        super().subscribe(topics)
        super().unsubscribe(self.left)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.left = topics


@fails("test_odd_topics")
@fails("test_odd_topics_reach_no_other")
class Patterns(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        topics = [each for each in self._bus._subscribers if fnmatch.fnmatchcase(each, topic)]
        return max((super(Patterns, self).publish(each, payload) for each in topics), default=0)


class Renaming(Sound):
    """Fits topics to its carrier, with which some become the same."""

    rename: ClassVar[Callable[[str], str]]

    def start(self, deliver: Deliver) -> None:
        self.topic: dict[str, str] = {}
        super().start(lambda name, payload: deliver(self.topic[name], payload))

    def subscribe(self, topics: Sequence[str]) -> None:
        self.topic.update((type(self).rename(topic), topic) for topic in topics)
        super().subscribe([type(self).rename(topic) for topic in topics])

    def publish(self, topic: str, payload: bytes) -> int:
        return super().publish(type(self).rename(topic), payload)


@fails("test_odd_topics")
class Short(Renaming):
    rename = staticmethod(lambda topic: topic[:255])


@fails("test_odd_topics")
class Lower(Renaming):
    rename = staticmethod(str.lower)


@fails("test_odd_topics")
class Stripped(Renaming):
    rename = staticmethod(str.strip)


@fails("test_odd_topics")
class ASCII(Renaming):
    rename = staticmethod(lambda topic: topic.encode("ascii", "replace").decode())


# Publishing


class Changing(Sound):
    change: ClassVar[Callable[[bytes], Any]]

    def publish(self, topic: str, payload: bytes) -> int:
        return super().publish(topic, type(self).change(payload))


@fails("test_payloads_arrive_as_they_are")
class Text(Changing):
    change = staticmethod(
        lambda payload: (
            payload if payload.startswith(b"probe") else payload.decode(errors="replace").encode()
        )
    )


@fails("test_payloads_arrive_as_they_are")
class Trimmed(Changing):
    change = staticmethod(bytes.rstrip)


@fails("test_payloads_arrive_as_they_are")
class Truncated(Changing):
    change = staticmethod(lambda payload: payload[:1_000_000])


@fails("test_payloads_arrive_as_they_are")
class Mutable(Changing):
    change = staticmethod(
        lambda payload: payload if payload.startswith(b"probe") else bytearray(payload)
    )


@fails("test_payloads_arrive_as_they_are")
class Mute(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        return super().publish(topic, payload) if payload else 2


class Holding(Sound):
    """Keeps some payloads back until the next one on any topic."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.held: list[tuple[str, bytes]] = []

    def holds(self, topic: str, payload: bytes) -> bool:
        raise NotImplementedError

    def publish(self, topic: str, payload: bytes) -> int:
        if self.holds(topic, payload):
            self.held.append((topic, payload))
            return len(self._bus._live(topic))
        receivers = super().publish(topic, payload)
        while self.held:
            super().publish(*self.held.pop())
        return receivers


@fails("test_the_order_in_a_topic")
@fails("test_the_order_over_topics")
class Swapping(Holding):
    def holds(self, topic: str, payload: bytes) -> bool:
        return payload == b"400"


@fails("test_the_order_over_topics")
class TopicByTopic(Holding):
    def holds(self, topic: str, payload: bytes) -> bool:
        return topic == "1"


@fails("test_the_order_over_topics")
class ShortFirst(Holding):
    def holds(self, topic: str, payload: bytes) -> bool:
        return len(payload) > 10_000


@fails("test_the_order_in_a_topic")
@fails("test_threads_publish")
class Repeating(Sound):
    """Publishes again what may have arrived."""

    def publish(self, topic: str, payload: bytes) -> int:
        receivers = super().publish(topic, payload)
        if payload.endswith(b"77"):
            super().publish(topic, payload)
        return receivers


@fails("test_the_order_in_a_topic")
@fails("test_threads_publish")
class Losing(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        if payload.endswith(b"77"):
            return len(self._bus._live(topic))
        return super().publish(topic, payload)


@fails("test_publishing_needs_no_start")
@fails("test_threads_are_the_first_to_publish")
@fails("test_publishing_goes_on_after_a_stop")
class Unready(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        if self._deliver is None:
            raise BackendError("not started")
        return super().publish(topic, payload)


# Threads


@fails("test_threads_that_gevent_does_not_know_publish")
@fails("test_threads_publish")
class Tied(Sound):
    """Works in the thread that it was made in."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.home = threading.get_ident()

    def publish(self, topic: str, payload: bytes) -> int:
        if threading.get_ident() != self.home:
            raise BackendError("objects made in a thread can only be used in it")
        return super().publish(topic, payload)


@fails("test_threads_are_the_first_to_publish")
class Connecting(Sound):
    """Has a connection as soon as it began to connect."""

    connected = connecting = False

    def publish(self, topic: str, payload: bytes) -> int:
        if not self.connecting:
            self.connecting = True
            threading.Event().wait(UNIT / 10)
            self.connected = True
        elif not self.connected:
            raise AttributeError("'NoneType' object has no attribute 'send'")
        return super().publish(topic, payload)


@fails("test_threads_subscribe")
class Racing(Sound):
    """Reads, waits, and writes."""

    def subscribe(self, topics: Sequence[str]) -> None:
        before = set(self.topics)
        threading.Event().wait(UNIT / 50)
        super().subscribe(topics)
        MemoryBackend.unsubscribe(self, list(self.topics - before - set(topics)))


# Starting and stopping


@fails("test_stopping_is_idempotent")
class Once(Sound):
    stopped = False

    def stop(self) -> None:
        if self.stopped:
            raise RuntimeError("stopped already")
        self.stopped = True
        super().stop()


@fails("test_stopping_is_idempotent")
class StartedOnly(Sound):
    def stop(self) -> None:
        if self._deliver is None:
            raise RuntimeError("not started")
        super().stop()


@fails("test_a_node_that_stopped_is_gone")
class Ghost(Sound):
    def stop(self) -> None:
        pass


@fails("test_starting_again_is_starting_afresh")
class Remembering(Sound):
    def stop(self) -> None:
        self.lose()

    def start(self, deliver: Deliver) -> None:
        super().start(deliver)
        self.resubscribe()


@fails("test_starting_again_is_starting_afresh")
class Piling(Sound):
    """Starts a further listener, and leaves the one before."""

    starts = 0

    def start(self, deliver: Deliver) -> None:
        self.starts += 1
        starts = self.starts
        super().start(lambda topic, payload: [deliver(topic, payload) for _ in range(starts)])


@fails("test_stopping_lets_go_of_everything")
class Leaking(Sound):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        weakref.finalize(self, os.close, os.open(os.devnull, os.O_RDONLY))


@fails("test_stopping_lets_go_of_everything")
class Lingering(Sound):
    def start(self, deliver: Deliver) -> None:
        super().start(deliver)
        for _ in range(10):
            later(lambda: None, seconds=10 * PATIENCE)


# What goes wrong


@fails("test_a_delivery_that_raises_is_not_the_last")
class Fragile(Sound):
    """Its listener ends with the first error."""

    def start(self, deliver: Deliver) -> None:
        def attempt(topic: str, payload: bytes) -> None:
            if not self.__dict__.get("ended"):
                self.ended = True
                deliver(topic, payload)
                self.ended = False

        super().start(attempt)


@fails("test_a_delivery_that_raises_is_not_the_last")
class PassingOn(Sound):
    """It tells the publisher."""

    def receive(self, topic: str, payload: bytes) -> None:
        if self._deliver is not None and topic in self.topics:
            self._deliver(topic, payload)


@fails("test_unknown_options_are_refused_by_name")
class Tolerant(Sound):
    def __init__(self, url: str, *, timeout: float = TIMEOUT, **options: Any) -> None:
        super().__init__(url, timeout=timeout)


@fails("test_unknown_options_are_refused_by_name")
class Terse(Sound):
    def __init__(self, url: str, *, timeout: float = TIMEOUT) -> None:
        super().__init__(url, timeout=timeout)


@fails("test_a_forked_child_uses_nothing_of_its_parent")
class Inherited(Sound):
    """All of a process share a connection, and those of its children."""

    def publish(self, topic: str, payload: bytes) -> int:
        if os.getpid() != PARENT:
            raise BackendError("the answer was somebody else's")
        return super().publish(topic, payload)


# Outages


@fails("test_an_outage_is_told_in_time")
@fails("test_an_outage_repeats_nothing")
class Secretive(Sound):
    def publish(self, topic: str, payload: bytes) -> int:
        return super().publish(topic, payload) if self.carrier.back.is_set() else 0


@fails("test_an_outage_is_told_in_time")
@fails("test_starting_in_an_outage")
class Promising(Sound):
    def subscribe(self, topics: Sequence[str]) -> None:
        try:
            super().subscribe(topics)
        except BackendError:
            self.wanted.update(topics)


@fails("test_an_outage_is_told_in_time")
class Foreign(Sound):
    def reach(self) -> None:
        if not self.carrier.back.is_set():
            raise ConnectionRefusedError(111, "refused")


@fails("test_an_outage_is_told_in_time")
class Endless(Sound):
    def reach(self) -> None:
        self.carrier.back.wait(100 * PATIENCE)


@fails("test_an_outage_is_told_in_time")
class OneByOne(Sound):
    """One waits for the carrier, and the others for that one."""

    lock = threading.Lock()

    def reach(self) -> None:
        with self.lock:
            if not self.carrier.back.wait(self.timeout):
                raise BackendError("too late")


@fails("test_after_an_outage_all_is_heard_again")
@fails("test_an_outage_repeats_nothing")
class Deaf(Sound):
    def resubscribe(self) -> None:
        pass


@fails("test_after_an_outage_all_is_heard_again")
class HalfDeaf(Sound):
    def resubscribe(self) -> None:
        MemoryBackend.subscribe(self, sorted(self.wanted)[:100])


@fails("test_after_an_outage_all_is_heard_again")
class OneOutage(Sound):
    outages = 0

    def resubscribe(self) -> None:
        self.outages += 1
        if self.outages == 1:
            super().resubscribe()


@fails("test_after_an_outage_all_is_heard_again")
class TwoListeners(Sound):
    """Each outage leaves another listener."""

    outages = 0

    def resubscribe(self) -> None:
        super().resubscribe()
        self.outages += 1

    def receive(self, topic: str, payload: bytes) -> None:
        for _ in range(1 + self.outages):
            super().receive(topic, payload)


@fails("test_an_outage_repeats_nothing")
class Retrying(Sound):
    """Publishes again what was under way when the carrier went."""

    last: tuple[str, bytes] | None = None

    def publish(self, topic: str, payload: bytes) -> int:
        receivers = super().publish(topic, payload)
        self.last = topic, payload
        return receivers

    def resubscribe(self) -> None:
        super().resubscribe()
        if self.last:
            later(super().publish, *self.last)


@fails("test_starting_in_an_outage")
class Impatient(Sound):
    def start(self, deliver: Deliver) -> None:
        self.reach()
        super().start(deliver)


@fails("test_starting_in_an_outage")
class Patient(Sound):
    def start(self, deliver: Deliver) -> None:
        self.carrier.back.wait(100 * PATIENCE)
        super().start(deliver)


@fails("test_starting_in_an_outage")
class Resigned(Sound):
    def start(self, deliver: Deliver) -> None:
        if self.carrier.back.is_set():
            super().start(deliver)


@fails("test_leaving_in_an_outage")
class Raising(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.reach()
        super().unsubscribe(topics)


@fails("test_leaving_in_an_outage")
class Waiting(Sound):
    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.carrier.back.wait(2 * self.timeout)
        super().unsubscribe(topics)


@fails("test_leaving_in_an_outage")
class Nostalgic(Sound):
    """Subscribes again to what was left meanwhile."""

    def unsubscribe(self, topics: Sequence[str]) -> None:
        if self.carrier.back.is_set():
            super().unsubscribe(topics)


@fails("test_leaving_in_an_outage")
class Stubborn(Sound):
    """Goes on with what failed, though it was given up."""

    def subscribe(self, topics: Sequence[str]) -> None:
        try:
            super().subscribe(topics)
        except BackendError:
            self.failed = list(topics)
            raise

    def resubscribe(self) -> None:
        self.wanted.update(self.__dict__.get("failed", []))
        super().resubscribe()


@fails("test_stopping_in_an_outage")
class Clinging(Sound):
    def stop(self) -> None:
        self.reach()
        super().stop()


@fails("test_stopping_in_an_outage")
class Undead(Sound):
    def stop(self) -> None:
        if self.carrier.back.is_set():
            super().stop()


@pytest.mark.parametrize(("broken", "name"), BROKEN)
def test_a_broken_backend_fails(broken: type[Sound], name: str) -> None:
    assert complaints(broken, name)


def test_every_test_has_a_backend_that_fails_it() -> None:
    assert {parameters.values[1] for parameters in BROKEN} == set(TESTS)


# What the contract says


@pytest.mark.parametrize("name", [name for name in TESTS if "outage" in name])
def test_outages_are_shown_or_ruled_out(name: str) -> None:
    (said,) = complaints(Sound, name, break_carrier=Cluster.break_carrier)
    assert "carrier_breaks = False says that there can be none" in said
    result = Result()
    type("TestBackend", (Case, TestCase), {"backend_class": Sound, "carrier_breaks": False})(
        name
    ).run(result)
    assert [reason for _, reason in result.skipped] == [
        "nothing can break: carrier_breaks is False"
    ]


def test_a_difference_is_told_in_few_words() -> None:
    (said,) = complaints(Swapping, "test_the_order_in_a_topic")
    assert (
        "1000 payloads were heard and 1000 were due; the first difference is number 400: "
        "('t', b'401') instead of ('t', b'400')"
    ) in said


def test_deliveries_that_overlap_are_noticed() -> None:
    class Nested(Node):
        depth = 0

        def deliver(self, topic: str, payload: bytes) -> None:
            if self.depth == 0:
                self.depth += 1
                with self._delivering:
                    super().deliver(topic, payload)
                return
            super().deliver(topic, payload)

    node = Nested(Sound("memory://overlap"), [])
    node.deliver("t", b"x")
    assert node.overlapped


@pytest.mark.parametrize(
    "runner", [["unittest"], ["django", "test", "--settings", "tests.settings"]]
)
def test_other_runners_and_no_gevent(runner: list[str]) -> None:
    command = [sys.executable, "-W", "error", "-m", *runner]
    done = subprocess.run(
        [*command, "tests.backends.test_memory.TestContract"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"Ran {len(TESTS)} tests" in done.stderr


def later(call: Callable[..., object], *args: object, seconds: float = UNIT / 20) -> None:
    """Call it in a moment, in another thread, whatever became of the test."""

    def attempt() -> None:
        with contextlib.suppress(BackendError):
            call(*args)

    timer = threading.Timer(seconds, attempt)
    timer.daemon = True
    timer.start()
