"""What other projects test with: `BackendContract`, for a backend of one's own."""

import faulthandler
import functools
import itertools
import logging
import operator
import os
import reprlib
import signal
import sys
import threading
import time
import traceback
import unittest
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypeVar

from gevent import get_hub
from gevent.monkey import get_original, is_module_patched

from .backends import UNKNOWN, BackendError, BaseBackend, InvalidBackend
from .backends.waiting import Mutex, Signal

T = TypeVar("T")
Heard = tuple[str, bytes]

if TYPE_CHECKING:
    _TestCase = unittest.TestCase
else:
    _TestCase = object  # no runner collects a mixin by itself

_UNIT = float(os.environ.get("SOCKETIO_TEST_UNIT", "0.05"))
_THREADS = 8
_PROBE = b"probe "

ODD_TOPICS = (
    "a/",
    "c/,",
    "c/chat,",
    "c/,with spaces, and commas",
    "c/,Case",
    "c/,case",
    "c/,trailing",
    "c/,trailing ",
    "c/,größe 漢字 🎈",
    "c/,\u00e9",
    "c/,e\u0301",  # the same letter to the eye
    *(f"c/,{character}" for character in "*#.>+?%_/:;|&!~^@=$-,<()[]{}\\'\"`"),
    *(
        f"c/,{pattern}"
        for pattern in ("a.b", "a.*", "a.#", "*.*", "a*", "[ab]", "{tag}a", "{tag}b")
    ),
    *(f"c/,{text}" for text in ("\\\\", "\\0", "\\n", "'; --", "$1", "%s", "%00")),
    "c/," + 597 * "x",
    "c/," + 596 * "x" + "y",
    600 * "🎈",
    599 * "🎈" + "🎉",
)
"""Topics as namespaces, channels and sessions make them, some of which mean more to a broker."""

ODD_PAYLOADS = (
    b"",
    b"\0",
    bytes(range(256)),
    b"\r\n",
    b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\nb\r\n",
    b"\x01\x00\x00\x00\x00\x00\x00\xce",
    b"\xff\xfe\xc3\x28",
    b'{"json": null}',
    b"'; -- \\x00 \\n %s $1 {}",
    bytes(7_999),
    bytes(8_000),
    bytes(65_536),
    4_096 * bytes(range(256)),
)
"""Payloads that a carrier may take for something else, or that are much or nothing."""


class Node:
    """A process of the cluster, as far as a test goes: a backend, and what it was handed."""

    def __init__(self, backend: BaseBackend, senders: Sequence[BaseBackend]) -> None:
        self.backend = backend
        self.senders = senders  # all of its address space
        self.heard: list[Heard] = []
        self.overlapped = False
        self._probes: list[Heard] = []
        self._fence = ""
        # Of the system, as a backend may deliver in threads that gevent does not know.
        self._delivering, self._taking = Mutex(), Mutex()
        self._arrival: Signal | None = None  # what somebody waits for

    def start(self) -> None:
        self._fence = ""
        self.backend.start(self.deliver)

    def deliver(self, topic: str, payload: bytes) -> None:
        alone = self._delivering.acquire(blocking=False)
        self.overlapped = self.overlapped or not alone
        with self._taking:
            heard = self._probes if payload.startswith(_PROBE) else self.heard
            heard.append((topic, payload))
            arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set()
        if alone:
            self._delivering.release()

    def wait_for(self, count: int, seconds: float) -> bool:
        """Return whether the node has heard so much within `seconds`."""
        return self._wait_until(lambda: len(self.heard) >= count, seconds)

    def take(self) -> list[Heard]:
        """Return what the node has heard since it was asked last."""
        with self._taking:
            heard, self.heard = self.heard, []
        return heard

    def settle(self, seconds: float) -> bool:
        """Return whether all that was published until now is through, within `seconds`."""
        if not self._fence:
            self._fence = f"fence {uuid.uuid4()}"
            self.backend.subscribe([self._fence])
        last = {_publish_probe(sender, self._fence) for sender in self.senders}
        return self._wait_until(lambda: last.issubset(self._probes), seconds)

    def hears(self, topics: Sequence[str], sender: BaseBackend, seconds: float) -> bool:
        """Return whether what is published on all these topics arrives, and once."""
        sent = {_publish_probe(sender, topic) for topic in topics}
        settled = self.settle(seconds)
        with self._taking:
            heard, self._probes = self._probes, []
        if len(heard) != len(set(heard)):
            raise AssertionError("a payload arrived twice")
        return settled and sent.issubset(heard)

    def _wait_until(self, predicate: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            arrival = self._arrival = Signal()  # before the look: so nothing arrives unseen
            if predicate():
                return True
            if not arrival.wait(deadline - time.monotonic()):
                return predicate()


class Failing(Node):
    """One whose application has a defect."""

    def deliver(self, topic: str, payload: bytes) -> None:
        super().deliver(topic, payload)
        if payload == b"bad":
            raise ArithmeticError("a test of what raises")


class Cluster(_TestCase):
    """Nodes of a backend, and what tests ask of them: the words of the contracts below."""

    unit: ClassVar[float] = _UNIT
    """What all times are multiples of, in seconds: SOCKETIO_TEST_UNIT of the environment."""

    timeout: ClassVar[float] = 20 * _UNIT
    """How long a backend waits for the carrier: pass it the option of this name."""

    patience: ClassVar[float] = 400 * _UNIT
    """How long what must happen may take, such as to reconnect after an outage."""

    carrier_breaks: ClassVar[bool] = True
    """Whether there is a carrier that can go away."""

    unique: str
    """A name that no other test has: make it part of all addresses, for example as a prefix."""

    def make_backend(self) -> BaseBackend:
        """
        Return a backend that is not started: a further node of this test.

        Those with the same `unique` share an address space that is theirs alone. One test changes
        `unique` midway, and expects another address space of the same carrier.
        """
        raise NotImplementedError("make_backend() returns a backend, with `unique` for addresses.")

    def break_carrier(self) -> None:
        """Take the carrier away from all nodes."""
        raise NotImplementedError(
            "break_carrier() and heal_carrier() show what a backend does in an outage; "
            "carrier_breaks = False says that there can be none."
        )

    def heal_carrier(self) -> None:
        """Bring the carrier back; it may have forgotten everything."""
        raise NotImplementedError("heal_carrier() undoes break_carrier().")

    def setUp(self) -> None:
        super().setUp()
        self.unique = _unique()
        self._spaces: dict[str, list[BaseBackend]] = {}

    @property
    def senders(self) -> list[BaseBackend]:
        """The backends of the address space at hand."""
        return self._spaces.setdefault(self.unique, [])

    def backend(self) -> BaseBackend:
        """Return a backend that only publishes; it is stopped at the end of the test."""
        backend = self.make_backend()
        self.addCleanup(backend.stop)
        self.senders.append(backend)
        return backend

    def node(self, *topics: str) -> Node:
        """Return a node that is subscribed to these topics."""
        node = Node(self.backend(), self.senders)
        node.start()
        node.backend.subscribe(topics)
        return node

    def nodes(self, *topics: str) -> tuple[Node, Node]:
        return self.node(*topics), self.node(*topics)

    @contextmanager
    def outage(self) -> Iterator[None]:
        if not self.carrier_breaks:
            self.skipTest("nothing can break: carrier_breaks is False")
        self.break_carrier()
        try:
            yield
        finally:
            self.heal_carrier()

    def recover(self, nodes: Sequence[Node], topics: Sequence[str]) -> None:
        """Wait until each of the nodes hears each on all these topics."""
        for sender, node in itertools.product(nodes, nodes):
            hears = functools.partial(node.hears, topics, sender.backend, self.timeout)
            self.eventually(functools.partial(_works, hears), "the outage goes on")

    def assert_receivers(self, reported: int, nodes: int) -> None:
        """Assert that so many nodes were reported, as far as the carrier knows."""
        known = type(self.senders[0]).supports_receivers
        self.assertIn(reported, {min(nodes, 1), nodes} if known else {UNKNOWN}, "receivers")

    def assert_hears(self, node: Node, sent: Sequence[Heard]) -> None:
        """Assert that the node has heard this since it was asked last, and nothing else."""
        node.wait_for(len(sent), self.patience)
        self.settle(node)
        heard = node.take()
        if heard != list(sent):
            self.fail(_difference(heard, list(sent)))
        self.assertFalse(node.overlapped, "deliver() was called while it was at work")

    def assert_refused(self, call: Callable[..., object], *args: object) -> None:
        """Assert that the call raises `BackendError`, in time."""
        with self.assertRaises(BackendError):
            self.within(3 * self.timeout, call, *args)

    def settle(self, node: Node) -> None:
        """Wait until nothing is on its way to the node any more."""
        self.assertTrue(node.settle(self.patience), "the last that was published does not arrive")

    def hears(self, node: Node, topic: str, sender: Node) -> bool:
        """Return whether the node is subscribed, by trying."""
        self.settle(node)
        return node.hears([topic], sender.backend, self.patience)

    def assert_left(self, node: Node, topic: str, sender: Node) -> None:
        """Assert that the node hears of this topic no more, soon."""
        self.eventually(lambda: not self.hears(node, topic, sender), f"{topic!r} is still heard")

    def assert_nobody(self, topic: str, sender: Node) -> None:
        """Assert that this topic has no receivers, soon and as far as the carrier knows."""
        self.eventually(
            lambda: sender.backend.publish(topic, _probe()) in (0, UNKNOWN),
            f"somebody is counted on {topic!r}",
        )

    def eventually(self, predicate: Callable[[], object], otherwise: str) -> None:
        """Wait until the predicate is true."""
        deadline = time.monotonic() + self.patience
        late = False
        while not predicate():
            if late:
                self.fail(otherwise)
            # There is a last look, for a process that stood still sees the hour before the news.
            late = time.monotonic() > deadline
            threading.Event().wait(self.unit / 10)

    def within(self, seconds: float, call: Callable[..., T], *args: object) -> T:
        """Return what the call returns; fail if that takes longer, or forever."""
        future = _in_thread(call, *args)
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise
            self.fail(f"{call} takes longer than {seconds:g} s")

    def in_threads(self, call: Callable[[int], object]) -> None:
        """Call it in several threads at once, with the number of the thread."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # to have them meet
        try:
            for future in [_in_thread(call, number) for number in range(_THREADS)]:
                future.result(self.patience)
        finally:
            sys.setswitchinterval(interval)

    @contextmanager
    def in_child(self, call: Callable[[], object]) -> Iterator[None]:
        """Call it in a fork of this process, which ends before the block does."""
        if is_module_patched("os"):
            # gevent does it after the first fork, and misses a child that has ended before that.
            get_hub().loop.install_sigchld()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads; the child needs none
            pid = os.fork()
        if not pid:
            _end_with(call, self.patience / 2)
        status: list[int] = []

        def has_ended() -> bool:
            ended, code = os.waitpid(pid, os.WNOHANG)
            status.extend([code] if ended else [])
            return bool(ended)

        try:
            yield
            self.eventually(has_ended, "the child does not end")
        finally:
            if not status:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.assertEqual(status, [0], "the child failed")


class OutageContract(Cluster):
    """
    The part of `BackendContract` that is about outages.

    A host that refuses and a host that is silent are two: mix it in once more for each further one.
    """

    def test_an_outage_is_told_in_time(self) -> None:
        """To whoever publishes and subscribes, one after the other and many at once."""
        a, b = self.nodes("t")
        other = self.backend()
        with self.outage():
            for _ in range(2):
                self.assert_refused(a.backend.publish, "t", b"x")
                self.assert_refused(b.backend.subscribe, ["u"])
                self.assert_refused(other.publish, "t", b"x")
            self.in_threads(lambda _: self.assert_refused(a.backend.publish, "t", b"x"))
            self.in_threads(lambda thread: self.assert_refused(a.backend.subscribe, [str(thread)]))

    def test_after_an_outage_all_is_heard_again(self) -> None:
        """On all nodes, which do nothing for it, and after a second outage too."""
        topics = [f"topic {number}" for number in range(200)]
        nodes = self.nodes(*topics)
        for node in nodes:
            self.settle(node)
        for _ in range(2):
            with self.outage():
                pass
            self.recover(nodes, topics)
            for topic in topics:
                self.assert_receivers(nodes[0].backend.publish(topic, b"x"), 2)
            for node in nodes:
                self.assert_hears(node, [(topic, b"x") for topic in topics])

    def test_an_outage_repeats_nothing(self) -> None:
        """What is published all the while arrives once or never, and in order."""
        a, b = self.nodes("t")
        sent: list[bytes] = []
        failed: list[bytes] = []
        ended = threading.Event()

        def publish() -> None:
            while not ended.wait(self.unit / 10):
                payload = b"%d" % (len(sent) + len(failed))
                try:
                    b.backend.publish("t", payload)
                except BackendError:
                    failed.append(payload)
                else:
                    sent.append(payload)

        publishing = _in_thread(publish)
        self.addCleanup(ended.set)
        a.wait_for(10, self.patience)
        with self.outage():
            self.eventually(lambda: failed or publishing.done(), "publish() does not fail")
        a.wait_for(len(a.heard) + 10, self.patience)
        ended.set()
        publishing.result(self.patience)
        self.recover([a, b], ["t"])
        heard = [payload for _, payload in a.heard]
        self.assertEqual(len(heard), len(set(heard)), "something arrived twice")
        self.assertLessEqual({sent[0], sent[-1]}, set(heard))
        kept = [payload for payload in heard if payload in set(sent)]
        self.assertEqual(kept, sorted(kept, key=int), "not in order")

    def test_starting_in_an_outage(self) -> None:
        """It neither waits nor raises, and the node works when the carrier does."""
        node = Node(self.backend(), self.senders)
        with self.outage():
            self.within(self.timeout, node.start)
            self.assert_refused(node.backend.subscribe, ["t"])
        self.eventually(lambda: _works(node.backend.subscribe, ["t"]), "subscribe() fails")
        self.recover([node], ["t"])
        node.backend.publish("t", b"x")
        self.assert_hears(node, [("t", b"x")])

    def test_leaving_in_an_outage(self) -> None:
        """It neither waits nor raises, and nothing that was left comes back."""
        a, b = self.nodes("kept", "left")
        for node in (a, b):
            self.settle(node)
        with self.outage():
            self.within(self.timeout, a.backend.unsubscribe, ["left"])
            self.within(self.timeout, b.backend.unsubscribe, ["left"])
            self.assert_refused(a.backend.subscribe, ["given up"])
            self.within(self.timeout, a.backend.unsubscribe, ["given up"])
        self.recover((a, b), ["kept"])
        for topic in ("left", "given up"):
            self.assert_left(a, topic, b)
            self.assert_nobody(topic, b)

    def test_stopping_in_an_outage(self) -> None:
        a, b = self.nodes("t", "u")
        self.settle(b)
        with self.outage():
            self.within(3 * self.timeout, a.backend.stop)
            self.within(3 * self.timeout, a.backend.stop)
            a.heard.clear()
        self.recover([b], ["t", "u"])
        b.backend.unsubscribe(["t"])
        self.assert_nobody("t", b)
        b.backend.publish("u", b"x")
        self.assert_hears(b, [("u", b"x")])
        self.assertEqual(a.heard, [])


class BackendContract(OutageContract):
    """
    The tests that every backend passes: what `BaseBackend` promises, with two nodes or more.

    Mix it into a `TestCase`, and say how a backend is made and how its carrier goes away::

        class PigeonBackendTests(BackendContract, TestCase):
            def make_backend(self):
                return PigeonBackend("pigeon://loft", prefix=self.unique, timeout=self.timeout)

            def break_carrier(self):
                self.loft.close()

            def heal_carrier(self):
                self.loft.open()

    It runs under pytest and under Django's runner, with gevent's patched standard library and
    without. Nothing in it sleeps and hopes: it waits for what must happen; and to see that nothing
    else does, it publishes something more and waits for that. All times scale with `unit`.

    A backend has to show what it does in an outage: without `break_carrier()` those tests fail. If
    nothing can break, as between objects of one process, say so with `carrier_breaks = False`. A
    carrier that goes away in several ways has this for one and `OutageContract` for each other.
    """

    # Who hears

    def test_all_who_subscribed_hear(self) -> None:
        a, b = self.nodes("t")
        self.assert_receivers(a.backend.publish("t", b"x"), 2)
        self.assert_hears(a, [("t", b"x")])
        self.assert_hears(b, [("t", b"x")])

    def test_a_node_hears_itself(self) -> None:
        node = self.node("t")
        self.assert_receivers(node.backend.publish("t", b"x"), 1)
        self.assert_hears(node, [("t", b"x")])

    def test_nobody_is_no_receiver(self) -> None:
        a, b = self.nodes("other")
        self.assert_receivers(a.backend.publish("t", b"x"), 0)
        self.assert_hears(a, [])
        self.assert_hears(b, [])

    def test_only_those_who_subscribed_hear(self) -> None:
        a, b = self.node("t"), self.node("u")
        self.assert_receivers(a.backend.publish("u", b"1"), 1)
        self.assert_receivers(a.backend.publish("t", b"2"), 1)
        self.assert_hears(a, [("t", b"2")])
        self.assert_hears(b, [("u", b"1")])

    def test_three_nodes(self) -> None:
        a, b, c = self.node("t"), self.node(), self.node("t")
        self.assert_receivers(b.backend.publish("t", b"x"), 2)
        self.assert_hears(a, [("t", b"x")])
        self.assert_hears(b, [])
        self.assert_hears(c, [("t", b"x")])

    def test_two_address_spaces_do_not_hear_each_other(self) -> None:
        a, b = self.nodes("t")
        self.unique = _unique()
        stranger = self.node("t", "u")
        self.assert_receivers(stranger.backend.publish("t", b"elsewhere"), 1)
        self.assert_receivers(a.backend.publish("t", b"here"), 2)
        self.assert_receivers(a.backend.publish("u", b"here"), 0)
        self.assert_hears(stranger, [("t", b"elsewhere")])
        self.assert_hears(a, [("t", b"here")])
        self.assert_hears(b, [("t", b"here")])

    # Subscribing

    def test_a_subscribe_that_returned_is_confirmed(self) -> None:
        """Whatever another node publishes from then on arrives, each of many times."""
        a, b = self.nodes()
        sent = [(f"topic {number}", b"%d" % number) for number in range(200)]
        for topic, payload in sent:
            a.backend.subscribe([topic])
            self.assert_receivers(b.backend.publish(topic, payload), 1)
        self.assert_hears(a, sent)

    def test_all_topics_of_a_subscribe_are_confirmed(self) -> None:
        a, b = self.nodes()
        for attempt in range(10):
            topics = [f"{attempt} {number}" for number in range(50)]
            a.backend.subscribe(topics)
            for topic in reversed(topics):
                self.assert_receivers(b.backend.publish(topic, b"x"), 1)
            self.assert_hears(a, [(topic, b"x") for topic in reversed(topics)])

    def test_subscribing_twice_is_subscribing(self) -> None:
        a, b = self.nodes("t")
        a.backend.subscribe(["t", "t"])
        a.backend.subscribe(["u", "t", "u"])
        self.assert_receivers(b.backend.publish("t", b"x"), 2)
        self.assert_hears(a, [("t", b"x")])
        a.backend.unsubscribe(["t"])
        self.assert_left(a, "t", b)

    def test_no_topics_are_fine(self) -> None:
        a, b = self.nodes("t")
        a.backend.subscribe([])
        a.backend.unsubscribe([])
        b.backend.publish("t", b"x")
        self.assert_hears(a, [("t", b"x")])

    def test_unsubscribing_ends_it(self) -> None:
        """Soon, for these topics and this node alone, and for the count of receivers too."""
        a, b = self.nodes("t", "u", "v")
        a.backend.unsubscribe(["t", "u"])
        for topic in ("t", "u"):
            self.assert_left(a, topic, b)
            self.assertTrue(self.hears(b, topic, a))
        self.assertTrue(self.hears(a, "v", b))
        b.backend.unsubscribe(["t"])
        self.assert_nobody("t", b)

    def test_unsubscribing_from_what_is_not_subscribed(self) -> None:
        a, b = self.nodes("t")
        a.backend.unsubscribe(["never", "t", "never"])
        a.backend.unsubscribe(["t"])
        a.backend.subscribe(["t"])
        b.backend.publish("t", b"x")
        self.assert_hears(a, [("t", b"x")])

    def test_subscribing_again_comes_after_unsubscribing(self) -> None:
        a, b = self.nodes("t")
        for number in range(100):
            a.backend.unsubscribe(["t"])
            a.backend.subscribe(["t"])
            self.assert_receivers(b.backend.publish("t", b"%d" % number), 2)
            self.assertTrue(a.wait_for(number + 1, self.patience), f"{number} does not arrive")
        self.assert_hears(a, [("t", b"%d" % number) for number in range(100)])

    def test_many_topics(self) -> None:
        a, b = self.nodes()
        topics = [f"topic {number}" for number in range(1000)]
        a.backend.subscribe(topics)
        for topic in topics:
            self.assert_receivers(b.backend.publish(topic, topic.encode()), 1)
        self.assert_hears(a, [(topic, topic.encode()) for topic in topics])
        a.backend.unsubscribe(topics[1:])
        for topic in (topics[-1], topics[1]):
            self.assert_left(a, topic, b)
        self.assertTrue(self.hears(a, topics[0], b))

    def test_odd_topics(self) -> None:
        """Each is itself and no other: no pattern, no separator, no second spelling."""
        a, b = self.nodes()
        a.backend.subscribe(ODD_TOPICS)
        for topic in ODD_TOPICS:
            self.assert_receivers(b.backend.publish(topic, topic.encode()), 1)
        self.assert_hears(a, [(topic, topic.encode()) for topic in ODD_TOPICS])

    def test_odd_topics_reach_no_other(self) -> None:
        a, b = self.nodes("c/,a", "c/,ab", "c/,x", "c/", "a")
        for topic in ODD_TOPICS:
            self.assert_receivers(b.backend.publish(topic, b"x"), 0)
        self.assert_hears(a, [])

    # Publishing

    def test_payloads_arrive_as_they_are(self) -> None:
        a, b = self.nodes("t")
        for payload in ODD_PAYLOADS:
            self.assert_receivers(b.backend.publish("t", payload), 2)
        for node in (a, b):
            node.wait_for(len(ODD_PAYLOADS), self.patience)
            self.assertLessEqual({type(payload) for _, payload in node.heard}, {bytes})
            self.assert_hears(node, [("t", payload) for payload in ODD_PAYLOADS])

    def test_the_order_in_a_topic(self) -> None:
        a, b = self.nodes("t")
        sent = [("t", b"%d" % number) for number in range(1000)]
        for topic, payload in sent:
            b.backend.publish(topic, payload)
        self.assert_hears(a, sent)
        self.assert_hears(b, sent)

    def test_the_order_over_topics(self) -> None:
        """Also of those that only one node hears, and of short payloads after long ones."""
        a, b = self.nodes("0", "1", "2", "3", "4")
        b.backend.subscribe(["b"])
        sent = []
        for number in range(500):
            padding = b"" if number % 50 else bytes(50_000)
            sent.append((str(number * number % 5), b"%d" % number + padding))
            sent.append(("b", b"%d" % number))
        for topic, payload in sent:
            a.backend.publish(topic, payload)
        self.assert_hears(a, [(topic, payload) for topic, payload in sent if topic != "b"])
        self.assert_hears(b, sent)

    def test_publishing_needs_no_start(self) -> None:
        a, b = self.nodes("t")
        other = self.backend()
        self.assert_receivers(other.publish("t", b"x"), 2)
        self.assert_receivers(other.publish("u", b"x"), 0)
        self.assert_hears(a, [("t", b"x")])
        self.assert_hears(b, [("t", b"x")])

    # Threads

    def test_threads_publish(self) -> None:
        """At most once, each thread's in order; and `deliver` is called for one at a time."""
        a, b = self.nodes("0", "1")
        parts = [
            [(str(number % 2), b"%d %d" % (thread, number)) for number in range(200)]
            for thread in range(_THREADS)
        ]

        def publish(thread: int) -> None:
            for topic, payload in parts[thread]:
                (a, b)[thread % 2].backend.publish(topic, payload)

        self.in_threads(publish)
        for node in (a, b):
            node.wait_for(200 * _THREADS, self.patience)
            node.heard.sort(key=lambda heard: heard[1].split()[0])  # leaves the order of each
            self.assert_hears(node, sum(parts, []))

    def test_threads_are_the_first_to_publish(self) -> None:
        """All at once they need a connection that is not there yet."""
        a, _ = self.nodes("t")
        other = self.backend()
        self.in_threads(lambda thread: other.publish("t", b"%d" % thread))
        a.wait_for(_THREADS, self.patience)
        a.heard.sort()
        self.assert_hears(a, [("t", b"%d" % thread) for thread in range(_THREADS)])

    def test_threads_that_gevent_does_not_know_publish(self) -> None:
        """In a process that it has patched, at the same time as greenlets do."""
        a, b = self.nodes("t")

        def publish(thread: int) -> None:
            for number in range(50):
                b.backend.publish("t", b"%d %d" % (thread, number))

        start = get_original("_thread", "start_new_thread")
        ends: list[BaseException | None] = []  # not Futures: their lock forgets such threads

        def publish_outside(thread: int) -> None:
            try:
                publish(thread)
            except BaseException as error:
                ends.append(error)
            else:
                ends.append(None)

        for number in range(_THREADS):
            start(publish_outside, (_THREADS + number,))
        self.in_threads(publish)
        self.eventually(lambda: len(ends) == _THREADS, "a thread hangs")
        self.assertEqual(ends, _THREADS * [None])
        a.wait_for(2 * _THREADS * 50, self.patience)
        a.heard.sort(key=lambda heard: int(heard[1].split()[0]))
        numbers = itertools.product(range(2 * _THREADS), range(50))
        self.assert_hears(a, [("t", b"%d %d" % pair) for pair in numbers])

    def test_threads_subscribe(self) -> None:
        """To topics of their own, some of which they leave, and to one that they share."""
        a, b = self.nodes("steady")

        def subscribe(thread: int) -> None:
            a.backend.subscribe(["shared"])
            for number in range(20):
                a.backend.subscribe([f"{thread} left"])
                a.backend.subscribe([topic := f"{thread} {number}"])
                a.backend.unsubscribe([f"{thread} left"])
                self.assert_receivers(b.backend.publish(topic, b"x"), 1)
                b.backend.publish("steady", topic.encode())

        self.in_threads(subscribe)
        topics = [f"{thread} {number}" for thread in range(_THREADS) for number in range(20)]
        sent = [(topic, b"x") for topic in topics] + [("steady", each.encode()) for each in topics]
        a.wait_for(len(sent), self.patience)
        a.heard.sort()
        self.assert_hears(a, sorted(sent))
        for topic in (*topics, "shared"):
            self.assert_receivers(b.backend.publish(topic, b"again"), 1)
        self.assert_hears(a, [(topic, b"again") for topic in (*topics, "shared")])

    # Starting and stopping

    def test_stopping_is_idempotent(self) -> None:
        backend = self.backend()
        backend.stop()
        backend.stop()
        node = self.node("t")
        node.backend.stop()
        node.backend.stop()

    def test_a_node_that_stopped_is_gone(self) -> None:
        a, b = self.nodes("t", "u")
        a.backend.stop()
        b.backend.unsubscribe(["t"])
        self.assert_nobody("t", b)
        b.backend.publish("u", b"x")
        self.assert_hears(b, [("u", b"x")])
        self.assertEqual(a.heard, [])

    def test_publishing_goes_on_after_a_stop(self) -> None:
        """Whoever says goodbye last says it through a backend that has stopped."""
        a, b = self.nodes("t")
        b.backend.stop()
        b.backend.publish("t", b"x")
        self.assert_hears(a, [("t", b"x")])

    def test_starting_again_is_starting_afresh(self) -> None:
        a, b = self.nodes("t", "u")
        for _ in range(3):
            a.backend.stop()
            a.start()
            a.backend.subscribe(["u"])
            b.backend.publish("t", b"forgotten")
            b.backend.publish("u", b"x")
            self.assert_hears(a, [("u", b"x")])

    def test_stopping_lets_go_of_everything(self) -> None:
        """Of connections and threads, those of a backend that only publishes too."""
        for _ in range(2):  # what is made once and kept is no leak
            self._come_and_go()
        before = _threads_and_files()
        for _ in range(3):
            self._come_and_go()
        self.eventually(
            lambda: all(map(operator.le, _threads_and_files(), before)),
            f"threads or files are left; before there were {before}",
        )

    def _come_and_go(self) -> None:
        self.unique = _unique()
        node, other = self.node("t"), self.backend()
        other.publish("t", b"x")
        self.assert_hears(node, [("t", b"x")])
        other.stop()
        node.backend.stop()

    # What goes wrong

    def test_a_delivery_that_raises_is_not_the_last(self) -> None:
        a, b = self.nodes("t")
        failing = Failing(self.backend(), a.senders)
        failing.start()
        failing.backend.subscribe(["t"])
        sent = [("t", payload) for payload in (b"1", b"bad", b"2", b"bad", b"3")]
        with _silent_logs():
            for topic, payload in sent:
                b.backend.publish(topic, payload)
            for node in (failing, a, b):
                self.assert_hears(node, sent)

    def test_unknown_options_are_refused_by_name(self) -> None:
        backend = self.backend()
        with self.assertRaisesRegex(InvalidBackend, "no_such_option"):
            type(backend)(backend.url, no_such_option=1)

    def test_a_forked_child_uses_nothing_of_its_parent(self) -> None:
        """While it has nodes of its own, its parent's lose nothing, nor after its end."""
        a, b = self.nodes("t")

        def run() -> None:
            child = self.node("child")
            for _ in range(100):
                self.assert_receivers(child.backend.publish("child", b"x"), 1)
            child.wait_for(100, self.patience)
            self.assertEqual(child.take(), 100 * [("child", b"x")])

        with self.in_child(run):
            for _ in range(100):
                self.assert_receivers(b.backend.publish("t", b"meanwhile"), 2)
        for _ in range(100):
            b.backend.publish("t", b"afterwards")
        for node in (a, b):
            self.assert_hears(node, 100 * [("t", b"meanwhile")] + 100 * [("t", b"afterwards")])


def _unique() -> str:
    return f"test{uuid.uuid4().hex}"


def _probe() -> bytes:
    return _PROBE + uuid.uuid4().bytes


def _publish_probe(sender: BaseBackend, topic: str) -> Heard:
    probe = _probe()
    sender.publish(topic, probe)
    return topic, probe


def _works(call: Callable[..., object], *args: object) -> bool:
    """Return whether the call returns anything but False, instead of a `BackendError`."""
    try:
        return call(*args) is not False
    except BackendError:
        return False


def _in_thread(call: Callable[..., T], *args: object) -> Future[T]:
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, call, *args), daemon=True).start()
    return future


def _fulfil(future: Future[T], call: Callable[..., T], *args: object) -> None:
    try:
        future.set_result(call(*args))
    except BaseException as error:
        future.set_exception(error)


def _end_with(call: Callable[[], object], seconds: float) -> NoReturn:
    """
    End this process with the call, and with nothing else that a process does at its end.

    If it hangs, it says where, `seconds` later.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        call()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _threads_and_files() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/dev/fd"))


@contextmanager
def _silent_logs() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


def _difference(heard: list[Heard], sent: list[Heard]) -> str:
    """Return the first difference of many, perhaps."""
    pairs = itertools.zip_longest(heard, sent)
    number, pair = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    return (
        f"{len(heard)} payloads were heard and {len(sent)} were due; "
        f"the first difference is number {number}: {reprlib.repr(pair[0])} "
        f"instead of {reprlib.repr(pair[1])}"
    )
