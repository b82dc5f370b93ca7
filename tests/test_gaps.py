"""What did not come is missed: no less, and no more than that."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.monkey import get_original
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from django_socketio import gaps, hub as topics
from django_socketio.cluster import _GRACE, Cluster
from django_socketio.engine import Frame
from django_socketio.envelope import Envelope, Stamp
from django_socketio.gaps import Gap, Numbering, Reception
from django_socketio.hub import Hub
from tests.carrier import Carrier, Net
from tests.support import UNIT, wait_until

GRACE = 10.0
TOPIC = "c/,room"


class Link:
    """An origin and a receiver with a carrier between them that does as it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.numbering = Numbering("origin", lambda: self.now, GRACE)
        self.reception = Reception(lambda: self.now, GRACE)

    def send(self, topic: str = TOPIC) -> Stamp:
        stamp = self.numbering.stamp(topic)
        self.numbering.sent(topic, stamp)
        return stamp

    def fail(self, topic: str = TOPIC) -> None:
        self.numbering.failed(topic, self.numbering.stamp(topic))

    def bring(self, topic: str = TOPIC) -> bool:
        return self.reception.received(topic, self.send(topic))

    def beat(self, *, heard: bool = True) -> None:
        tails = self.numbering.tails()
        if heard:
            self.reception.told("origin", map(list, tails), lambda topic: True)

    def age(self) -> None:
        """Let so much time pass that what is subscribed to is old."""
        for _ in range(gaps._YOUNG):
            self.beat()
            self.now += GRACE
            assert not self.reception.lost()

    def lost(self) -> dict[str, int]:
        """Return what is lost when all that could come late has had its time."""
        found = Counter(self.reception.lost())
        self.now += GRACE
        return dict(found + Counter(self.reception.lost()))


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def old_link(link: Link) -> Link:
    """A link whose receiver has listened for a while."""
    link.reception.subscribed([TOPIC])
    link.age()
    return link


def test_nothing_is_missing(link: Link) -> None:
    for _ in range(100):
        assert link.bring()
        link.beat()
    assert link.lost() == {}


def test_what_is_behind_tells(link: Link) -> None:
    link.bring()
    link.send()
    link.send()
    link.bring()
    assert link.reception.lost() == {}  # it might still come
    assert link.lost() == {TOPIC: 2}
    assert link.lost() == {}


def test_each_topic_has_its_numbers(link: Link) -> None:
    for topic in ("a/", "c/,b", "a/", "c/,c", "c/,b"):
        assert link.bring(topic)
    assert link.lost() == {}


def test_topics_that_are_not_heard_leave_no_gap(link: Link) -> None:
    link.bring()
    for number in range(10):
        link.send(f"c/,{number}")
    link.bring()
    assert link.lost() == {}


def test_the_first_that_is_heard_may_have_any_number(link: Link) -> None:
    for _ in range(5):
        link.send()
    link.bring()
    assert link.lost() == {}


def test_the_last_is_told_by_the_beat(link: Link) -> None:
    link.bring()
    link.send()
    link.beat()
    assert link.lost() == {TOPIC: 1}


def test_beats_may_be_lost_with_it(link: Link) -> None:
    link.bring()
    link.send()
    for _ in range(3):
        link.beat(heard=False)
    link.beat()
    assert link.lost() == {TOPIC: 1}


def test_a_beat_tells_of_what_is_new_alone(link: Link) -> None:
    link.bring()
    for _ in range(4):
        assert link.numbering.tails()
    assert link.numbering.tails() == []


def test_the_only_one_is_told_by_the_beat(old_link: Link) -> None:
    old_link.send()
    old_link.beat()
    assert old_link.lost() == {TOPIC: 1}


def test_the_first_one_is_told_by_the_beat(old_link: Link) -> None:
    old_link.send()
    old_link.bring()
    old_link.beat()
    assert old_link.lost() == {TOPIC: 1}


def test_what_was_before_the_subscription_is_not_missed(link: Link) -> None:
    for _ in range(5):
        link.send()
    link.beat(heard=False)
    link.send()
    link.reception.subscribed([TOPIC])
    link.beat()
    link.bring()
    link.beat()
    assert link.lost() == {}


def test_long_before_the_subscription(old_link: Link) -> None:
    """A beat tells of the last few beats' messages, not of those since the beginning."""
    for _ in range(5):
        old_link.send("c/,other")
    for _ in range(10):
        old_link.beat(heard=False)
    old_link.bring("c/,other")
    old_link.beat()
    assert old_link.lost() == {}


def joins_late(link: Link) -> None:
    """Publish a little, and only then have the receiver subscribe."""
    for _ in range(3):
        link.send()
        link.beat(heard=False)
    link.send()
    link.send()
    link.reception.subscribed([TOPIC])


def is_heard(link: Link) -> None:
    """Bring the first that is heard, and tell of it."""
    assert link.bring()
    link.beat()


def test_before_the_subscription_and_the_origin_beats_no_more(link: Link) -> None:
    """Its carrier is down: it tells of what was before that when it is old for the others."""
    joins_late(link)
    for _ in range(3 * gaps._YOUNG):
        link.now += GRACE
        link.reception.lost()
    is_heard(link)
    assert link.lost() == {}


def test_before_the_subscription_and_the_receiver_stands_still(link: Link) -> None:
    """What it hears then is as old as it was before."""
    joins_late(link)
    for _ in range(2):
        link.now += 100 * GRACE
        link.numbering._told = link.now  # for the origin that was a moment
        assert link.reception.lost() == {}
        is_heard(link)
    assert link.lost() == {}


def test_before_the_subscription_and_the_receiver_looks_often(link: Link) -> None:
    """As it does in an outage."""
    joins_late(link)
    for _ in range(gaps._YOUNG + 1):
        link.now += GRACE / 10
        link.reception.lost()
    is_heard(link)
    assert link.lost() == {}


def test_before_the_subscription_and_there_was_too_much_to_tell_of(link: Link) -> None:
    link.send()
    for number in range(10 * gaps._MAX_TAILS):
        link.send(f"c/,{number}")
    for _ in range(2):
        link.beat(heard=False)
    link.send()
    link.reception.subscribed([TOPIC])
    for _ in range(gaps._YOUNG):
        link.now += GRACE
        link.reception.lost()
        link.beat(heard=False)
    link.bring()
    for _ in range(10):
        link.beat()
    assert link.lost() == {}


def test_an_origin_that_beats_again_tells_of_the_first_ones(link: Link) -> None:
    link.reception.subscribed([TOPIC])
    link.age()
    link.now += 100 * GRACE
    for _ in range(gaps._REPEATS + 1):
        link.beat()
    link.send()
    is_heard(link)
    assert link.lost() == {TOPIC: 1}


def test_the_carrier_has_refused_it(link: Link) -> None:
    link.bring()
    link.fail()
    link.fail()
    assert link.bring()
    assert link.lost() == {}


def test_the_carrier_has_refused_it_and_lost_another(link: Link) -> None:
    link.bring()
    link.send()
    link.fail()
    assert link.bring()
    assert link.lost() == {TOPIC: 1}


def test_the_carrier_refuses_one_of_several_at_once(link: Link) -> None:
    link.bring()
    first, second = link.numbering.stamp(TOPIC), link.numbering.stamp(TOPIC)
    link.numbering.sent(TOPIC, second)
    assert link.reception.received(TOPIC, second)
    link.numbering.failed(TOPIC, first)
    link.beat()
    assert link.lost() == {}


def test_refused_long_ago_and_lost_now(old_link: Link) -> None:
    old_link.fail()
    for _ in range(5):
        old_link.beat()
    old_link.send()
    old_link.beat()
    assert old_link.lost() == {TOPIC: 1}


def refuses_one_of_two(link: Link) -> None:
    """Have one come whose stamp cannot tell that the one before it was refused."""
    link.beat()
    link.bring()
    first, second = link.numbering.stamp(TOPIC), link.numbering.stamp(TOPIC)
    link.numbering.sent(TOPIC, second)
    assert link.reception.received(TOPIC, second)
    link.numbering.failed(TOPIC, first)


def test_the_beat_that_tells_of_a_refusal_is_late(link: Link) -> None:
    refuses_one_of_two(link)
    assert link.lost() == {}
    link.beat()
    link.now += gaps._PATIENCE * GRACE
    assert link.lost() == {}


def test_thousands_are_refused_in_an_outage(link: Link) -> None:
    """By several at once, so that the stamps do not tell."""
    link.beat()
    link.bring()
    stamps = [link.numbering.stamp(TOPIC) for _ in range(5_000)]
    while stamps:
        some, stamps = stamps[:100], stamps[100:]
        for stamp in [*some[::2], *some[1::2]]:
            link.numbering.failed(TOPIC, stamp)
    link.send()
    link.bring()
    link.beat()
    assert link.lost() == {TOPIC: 1}


def test_what_was_refused_is_remembered_within_bounds(link: Link) -> None:
    for _ in range(2 * gaps._MAX_RUNS):
        link.fail()
        link.send()
    ((*_, runs),) = link.numbering.tails()
    assert len(runs) == gaps._MAX_RUNS
    assert runs[-1] == (4 * gaps._MAX_RUNS - 1, 4 * gaps._MAX_RUNS)
    refused = link.numbering._streams[TOPIC].refused
    assert refused is not None and len(refused._starts) == len(refused._stops)


def test_several_threads_are_refused_at_once() -> None:
    runs, ended = gaps._Runs(), list[None]()

    def add(numbers: range) -> None:
        for number in numbers:
            if number % 100:
                runs.add(number)
        ended.append(None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for first in range(10):
            get_original("_thread", "start_new_thread")(add, (range(first, 20_000, 10),))
        wait_until(lambda: len(ended) == 10)
    finally:
        sys.setswitchinterval(interval)
    assert len(runs._stops) <= gaps._MAX_RUNS + 10
    assert all(0 <= start < stop <= 20_000 for start, stop in runs)
    found = {number for start, stop in runs for number in range(start, stop)}
    assert found and not any(number % 100 == 0 for number in found)


def test_a_run_may_be_told_of_that_has_no_end(link: Link) -> None:
    link.bring()
    link.send()
    link.bring()
    runs = [[-(10**30), 1], [3, 10**30], [5, 1], [2.0, 3], ["2", 3], [2], 2, None]
    link.reception.told("origin", [[TOPIC, 1, 0, 3, runs]], lambda topic: True)
    assert link.lost() == {TOPIC: 1}
    link.reception.told("origin", [[TOPIC, 1, 0, 9, []]], lambda topic: True)
    link.reception.told("origin", [[TOPIC, 1, 0, 9, [[0, 10**30]]]], lambda topic: True)
    assert link.lost() == {}


def test_a_gap_is_counted_as_soon_as_a_beat_has_told_that_it_is_one(link: Link) -> None:
    refuses_one_of_two(link)
    link.send()
    link.bring()
    assert link.lost() == {}
    link.beat()
    assert link.reception.lost() == {TOPIC: 1}


def test_an_origin_that_beats_no_more_is_not_waited_for(link: Link) -> None:
    link.beat()
    link.bring()
    link.send()
    link.bring()
    assert link.lost() == {}
    link.now += (gaps._PATIENCE - 1) * GRACE
    assert link.lost() == {TOPIC: 1}


def test_those_who_beat_are_bounded(link: Link) -> None:
    for number in range(2 * gaps._MAX_ORIGINS):
        link.reception.told(str(number), [], lambda topic: True)
    assert len(link.reception._beating) == gaps._MAX_ORIGINS


def test_what_was_refused_and_comes_all_the_same_is_no_gap(link: Link) -> None:
    link.bring()
    stamp = link.numbering.stamp(TOPIC)
    link.numbering.failed(TOPIC, stamp)
    assert link.reception.received(TOPIC, stamp)
    assert link.bring()
    assert link.lost() == {}


def test_late_is_not_lost(link: Link) -> None:
    link.bring()
    late = link.send()
    link.bring()
    assert link.reception.received(TOPIC, late)
    assert link.lost() == {}
    assert link.reception.late == 1


def test_a_copy(link: Link) -> None:
    stamps = [link.send() for _ in range(3)]
    assert [link.reception.received(TOPIC, stamp) for stamp in stamps] == [True] * 3
    assert [link.reception.received(TOPIC, stamp) for stamp in stamps[1:]] == [False] * 2


def test_older_than_the_first_that_was_heard(link: Link) -> None:
    older = link.send()
    link.bring()
    assert link.reception.received(TOPIC, older)


def test_another_epoch(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that counts on too many topics counts anew; what is lost around that is missed."""
    monkeypatch.setattr(gaps, "_MAX_STREAMS", 3)
    link.bring()
    for topic in ("c/,1", "c/,2", "c/,3"):
        link.send(topic)
    stamp = link.send()
    assert (stamp.epoch, stamp.number) == (2, 1)
    assert link.bring()
    assert link.lost() == {TOPIC: 1}
    assert link.bring()
    assert link.lost() == {}


def test_the_outcome_of_a_number_of_an_older_epoch(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "_MAX_STREAMS", 1)
    stamps = [link.numbering.stamp(TOPIC), link.numbering.stamp(TOPIC)]
    link.send("c/,1")
    link.send()
    link.numbering.sent(TOPIC, stamps[0])
    link.numbering.failed(TOPIC, stamps[1])
    (tail,) = link.numbering.tails()
    assert tail == (TOPIC, 3, 0, 1, [])


def test_topics_that_nobody_publishes_on_are_forgotten(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "_IDLE", 10)
    for number in range(100):
        assert link.bring(f"s/,{number}")
    assert link.bring()
    for _ in range(21):
        assert link.bring()
        link.beat()
    assert len(link.numbering._streams) + len(link.numbering._older) == 1
    assert link.bring("s/,1")  # and it is no copy of the one before
    link.send("s/,1")
    assert link.bring("s/,1")
    assert link.bring()
    link.beat()
    assert link.lost() == {"s/,1": 1}


def test_a_topic_is_forgotten_between_a_number_and_its_fate(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "_IDLE", 1)
    link.bring()
    stamp = link.numbering.stamp(TOPIC)
    link.beat()
    link.numbering.failed(TOPIC, stamp)
    assert link.bring()
    assert link.lost() == {}


def test_an_epoch_that_is_over(link: Link) -> None:
    link.bring()
    old = link.numbering.stamp(TOPIC)
    assert link.reception.received(TOPIC, old._replace(epoch=2, number=1))
    assert link.reception.received(TOPIC, old)
    assert link.reception.received(TOPIC, old._replace(epoch=2, number=2))
    link.reception.told("origin", [[TOPIC, 1, 0, 9, []]], lambda topic: True)
    assert link.lost() == {}


def test_what_nobody_listens_to_any_more_is_forgotten(link: Link) -> None:
    link.bring()
    link.send()
    link.bring()
    link.reception.unsubscribed([TOPIC, "c/,never"])
    assert link.lost() == {}
    link.send()
    assert link.bring()
    assert link.lost() == {}


def test_a_number_from_nowhere_costs_nothing(link: Link) -> None:
    link.bring()
    assert link.reception.received(TOPIC, Stamp("origin", 1, 2**63))
    assert link.lost() == {TOPIC: 2**63 - 2}


def test_the_origins_of_a_topic_are_bounded(link: Link) -> None:
    for number in range(10_000):
        assert link.reception.received(TOPIC, Stamp(f"{number}", 1, 1))
        assert link.reception.received(TOPIC, Stamp(f"{number}", 1, 3))
    link.now += GRACE
    assert link.reception.lost() == {TOPIC: gaps._MAX_ORIGINS}


def test_a_beat_tells_of_a_thousand_topics_and_the_next_of_others(link: Link) -> None:
    for number in range(1500):
        link.send(f"c/,{number}")
    told = [tail[0] for _ in range(2) for tail in link.numbering.tails()]
    assert len(told) == 2000
    assert len(set(told)) == 1500


@pytest.mark.parametrize(
    "tail", [None, [], [TOPIC], [TOPIC, 1, 0, "2", []], [TOPIC, 1, 0, 2, 3], [1, 1, 0, 2, []]]
)
def test_a_beat_that_is_malformed(link: Link, tail: Any) -> None:
    link.bring()
    link.reception.told("origin", [tail, [TOPIC, 1, 0, 1, [[], None]]], lambda topic: True)
    assert link.lost() == {}


class Machine(RuleBasedStateMachine):
    """A carrier that refuses, loses, delays and doubles, against a count of what it has lost."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Link()
        self.link.reception.subscribed([TOPIC])
        self.link.age()
        self.delayed: list[Stamp] = []
        self.brought: list[Stamp] = []
        self.lost = self.found = 0
        self.silent = 0

    @rule()
    def bring(self) -> None:
        stamp = self.link.send()
        assert self.link.reception.received(TOPIC, stamp)
        self.brought.append(stamp)

    @rule()
    def lose(self) -> None:
        self.link.send()
        self.lost += 1

    @rule()
    def refuse(self) -> None:
        self.link.fail()

    @rule()
    def delay(self) -> None:
        self.delayed.append(self.link.send())

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def bring_late(self, data: st.DataObject) -> None:
        stamp = data.draw(st.sampled_from(self.delayed))
        self.delayed.remove(stamp)
        assert self.link.reception.received(TOPIC, stamp)
        self.brought.append(stamp)

    @precondition(lambda self: self.brought)
    @rule(data=st.data())
    def bring_again(self, data: st.DataObject) -> None:
        assert not self.link.reception.received(TOPIC, data.draw(st.sampled_from(self.brought)))

    @rule(heard=st.booleans())
    def beat(self, heard: bool) -> None:
        heard = heard or self.silent == gaps._REPEATS - 1
        self.silent = 0 if heard else self.silent + 1
        self.link.beat(heard=heard)
        self.found += sum(self.link.reception.lost().values())

    @invariant()
    def never_more_than_were_lost(self) -> None:
        assert self.found <= self.lost

    def teardown(self) -> None:
        for stamp in self.delayed:
            self.link.reception.received(TOPIC, stamp)
        self.link.beat()
        self.found += sum(self.link.lost().values())
        assert self.found == self.lost


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAnyCarrier = Machine.TestCase


# Nodes on a carrier that can be deaf

BEAT = UNIT


class Listener:
    def __init__(self, sid: str) -> None:
        self.sid = sid
        self.frames: list[Frame] = []

    def deliver(self, frame: Frame) -> None:
        self.frames.append(frame)

    def disconnect(self) -> None: ...

    def subscribe(self, channel: str) -> bool:
        return True

    def unsubscribe(self, channel: str) -> bool:
        return True


class Node:
    def __init__(self, net: Net) -> None:
        self.carrier = Carrier(net)
        self.hub = Hub(self.carrier)
        self.cluster = Cluster(self.hub, beat=BEAT, silence=12 * BEAT)
        self.missed: list[tuple[list[Gap], float | None]] = []
        self.hub.missed = lambda *what: self.missed.append(what)
        self.member = Listener(f"{id(self)}")
        self.hub.start()
        self.cluster.start()

    def publish(self, topic: str = TOPIC) -> None:
        self.hub.publish(topic, Envelope(packets=(b'2["message","x"]',)))

    def stop(self) -> None:
        self.cluster.stop()
        self.hub.stop()


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    """Two nodes, each with a member of the topic that has been there for a while."""
    net = Net()
    nodes = Node(net), Node(net)
    for node in nodes:
        node.hub.join([TOPIC, topics.everybody("/")], node.member)
    try:
        wait_until(lambda: all(node.cluster._settled for node in nodes))
        gevent.sleep(2 * gaps._YOUNG * _GRACE * BEAT)
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def test_a_deaf_node_finds_out_what_it_has_missed(pair: tuple[Node, Node]) -> None:
    one, two = pair
    one.publish()
    two.carrier.deaf = True
    for _ in range(3):
        one.publish()
    one.publish("a/")
    two.carrier.deaf = False
    wait_until(lambda: two.hub.counters["lost in gaps"] == 4)
    found = {gap.channel: gap.lost for gaps_, _ in two.missed for gap in gaps_}
    assert found == {"room": 3, None: 1}
    assert two.hub.counters["gaps"] == 2
    assert not one.missed


def test_a_node_misses_its_own(pair: tuple[Node, Node]) -> None:
    one, two = pair
    one.carrier.deaf = True
    one.publish()
    one.carrier.deaf = False
    wait_until(lambda: one.missed)
    assert one.missed == [([Gap("/", "room", None, 1)], None)]
    assert not two.missed


def test_what_the_carrier_refuses_nobody_misses(pair: tuple[Node, Node]) -> None:
    one, two = pair
    one.publish()
    one.carrier.net.down = True
    for _ in range(3):
        with pytest.raises(Exception, match="down"):
            one.publish()
    one.carrier.net.down = False
    one.publish()
    wait_until(lambda: one.cluster._outage is None)
    gevent.sleep(10 * BEAT)
    assert not one.missed and not two.missed
    assert len(two.member.frames) == 2


def test_what_comes_twice_is_delivered_once(pair: tuple[Node, Node]) -> None:
    one, two = pair
    heard: list[tuple[str, bytes]] = []
    deliver, two.carrier._deliver = two.carrier._deliver, lambda *what: heard.append(what)
    one.publish()
    two.carrier._deliver = deliver
    two.hub.deliver(*heard[0])
    two.hub.deliver(*heard[0])
    assert len(two.member.frames) == 1
    assert two.hub.counters["dropped: came twice"] == 1


def test_an_outage_that_the_backend_tells_of(pair: tuple[Node, Node]) -> None:
    one, _ = pair
    one.carrier.interrupted(1.5)
    wait_until(lambda: one.missed)
    assert one.missed == [([], 1.5)]
    assert one.hub.counters["interruptions"] == 1


def test_a_node_that_is_restarted_for_its_deafness(pair: tuple[Node, Node]) -> None:
    one, two = pair
    two.carrier.deaf = True
    one.publish()
    wait_until(lambda: two.hub.counters["restarts of a deaf backend"])
    wait_until(lambda: any(interrupted for _, interrupted in two.missed))


def test_who_has_nobody_misses_nothing() -> None:
    node = Node(Net())
    try:
        node.carrier.interrupted(1.5)
        gevent.sleep(3 * BEAT)
        assert not node.missed
    finally:
        node.stop()


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("a/", Gap("/", None, None, 1)),
        ("m/chat", Gap("/chat", None, None, 1)),
        ("c/,room, the best", Gap("/", "room, the best", None, 1)),
        ("s/chat,sid", Gap("/chat", None, "sid", 1)),
    ],
)
def test_what_a_gap_means(topic: str, expected: Gap) -> None:
    assert topics.gap(topic, 1) == expected
