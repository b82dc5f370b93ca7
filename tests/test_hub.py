"""Who receives what in one process, and which topics its backend knows of."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import AsyncResult, Event
from hypothesis import example, given, strategies as st

from django_socketio import envelope, hub as topics
from django_socketio.backends import BackendError
from django_socketio.backends.memory import MemoryBackend
from django_socketio.engine import Frame
from django_socketio.envelope import DISCONNECT, Envelope
from django_socketio.hub import Hub
from tests.support import wait_until

# The real ones: gevent has patched the modules of these names.
get_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")
start_new_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")

NEWS = Envelope(packets=(b'2["message","news"]',))


class Carrier(MemoryBackend):
    """A memory backend that keeps a record, and can be down."""

    def __init__(self) -> None:
        super().__init__(f"memory://{id(self)}")  # a bus of its own
        self.record: list[tuple[str, Sequence[str]]] = []
        self.down = False

    def subscribe(self, topics: Sequence[str]) -> None:
        self._note("subscribe", topics)
        super().subscribe(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._note("unsubscribe", topics)
        super().unsubscribe(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        self._note("publish", [topic])
        return super().publish(topic, payload)

    def _note(self, what: str, topics: Sequence[str]) -> None:
        if self.down:
            raise BackendError("down")
        self.record.append((what, topics))


class Member:
    """A socket that keeps what it gets."""

    def __init__(self, sid: str) -> None:
        self.sid = sid
        self.frames: list[Frame] = []
        self.threads: set[int] = set()
        self.disconnects = 0
        self.on_deliver: Callable[[], None] = lambda: None
        self.on_disconnect: Callable[[], None] = lambda: None

    def deliver(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.threads.add(get_ident())
        self.on_deliver()

    def disconnect(self) -> None:
        self.disconnects += 1
        self.on_disconnect()

    def subscribe(self, channel: str) -> bool:
        raise NotImplementedError

    unsubscribe = subscribe

    @property
    def texts(self) -> list[bytes]:
        return [frame.polling for frame in self.frames]


@pytest.fixture
def carrier() -> Carrier:
    return Carrier()


@pytest.fixture
def hub(carrier: Carrier) -> Hub:
    hub = Hub(carrier)
    hub.start()
    return hub


@pytest.fixture
def a() -> Member:
    return Member("a")


@pytest.fixture
def b() -> Member:
    return Member("b")


@pytest.fixture
def c() -> Member:
    return Member("c")


def news(text: str, **fields: Any) -> Envelope:
    return Envelope(packets=(text.encode(),), **fields)


# Addresses


_namespaces = st.text().map(lambda text: "/" + text.replace(",", ""))
_addresses = (
    st.tuples(st.just(topics.everybody), st.tuples(_namespaces))
    | st.tuples(st.just(topics.channel), st.tuples(_namespaces, st.text()))
    | st.tuples(st.just(topics.session), st.tuples(_namespaces, st.text()))
)


@given(st.sets(_addresses, min_size=2))
@example({(topics.channel, ("/a", "b,c")), (topics.channel, ("/a", ",c"))})
@example({(topics.channel, ("/", "x")), (topics.session, ("/", "x"))})
@example({(topics.channel, ("/", "")), (topics.everybody, ("/",))})
def test_no_two_addresses_are_one_topic(addresses: set[tuple[Any, tuple[str, ...]]]) -> None:
    """A namespace has no comma, a channel may have any."""
    assert len({kind(*names) for kind, names in addresses}) == len(addresses)


# Membership


def test_the_first_member_subscribes_and_the_last_unsubscribes(
    hub: Hub, carrier: Carrier, a: Member, b: Member
) -> None:
    assert hub.join(["t"], a)
    assert hub.join(["t"], b)
    assert carrier.record == [("subscribe", ["t"])]
    hub.leave(["t"], a)
    assert carrier.record == [("subscribe", ["t"])]
    hub.leave(["t"], b)
    assert carrier.record == [("subscribe", ["t"]), ("unsubscribe", ["t"])]
    hub.join(["t"], a)
    assert carrier.record[2:] == [("subscribe", ["t"])]


def test_to_join_twice_is_to_join(hub: Hub, carrier: Carrier, a: Member) -> None:
    assert hub.join(["t"], a) is True
    assert hub.join(["t"], a) is False
    assert hub.publish("t", NEWS) == 1
    assert len(a.frames) == 1
    hub.leave(["t"], a)
    assert set(hub.members("t")) == set()


def test_to_leave_what_one_is_not_in_is_nothing(
    hub: Hub, carrier: Carrier, a: Member, b: Member
) -> None:
    hub.join(["t"], a)
    hub.leave(["t", "other"], b)
    hub.leave([], a)
    assert set(hub.members("t")) == {"a"}
    assert carrier.record == [("subscribe", ["t"])]


def test_whoever_leaves_all_at_once_unsubscribes_all_at_once(
    hub: Hub, carrier: Carrier, a: Member, b: Member
) -> None:
    """One round trip for a disconnect, and only for topics that nobody else is in."""
    for topic in ("t", "u", "v"):
        hub.join([topic], a)
    hub.join(["u"], b)
    carrier.record.clear()
    hub.leave(iter(["t", "u", "v", "t"]), a)
    assert carrier.record == [("unsubscribe", ["t", "v"])]


def test_members(hub: Hub, a: Member, b: Member) -> None:
    hub.join(["t"], a)
    hub.join(["t"], b)
    hub.join(["u"], b)
    assert set(hub.members("t")) == {"a", "b"}
    assert set(hub.members("u")) == {"b"}
    assert set(hub.members("nobody")) == set()
    assert hub.is_member("t", a)
    assert not hub.is_member("u", a)
    assert not hub.is_member("nobody", a)


def test_the_members_are_a_copy(hub: Hub, a: Member) -> None:
    hub.join(["t"], a)
    hub.members("t").clear()
    assert set(hub.members("t")) == {"a"}


def test_who_could_not_subscribe_has_not_joined(hub: Hub, carrier: Carrier, a: Member) -> None:
    """A subscription counts when the carrier has confirmed it."""
    carrier.down = True
    with pytest.raises(BackendError):
        hub.join(["t"], a)
    assert set(hub.members("t")) == set()
    carrier.down = False
    assert hub.join(["t"], a)
    assert carrier.record == [("subscribe", ["t"])]


def test_several_at_once_are_one_round_trip(hub: Hub, carrier: Carrier, a: Member) -> None:
    assert hub.join(["t", "u"], a)
    assert hub.join(["u", "v"], a)
    assert not hub.join(["t", "v"], a)
    assert carrier.record == [("subscribe", ["t", "u"]), ("subscribe", ["v"])]


# A carrier that takes its time


class SlowCarrier(Carrier):
    """Confirms when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.confirm: list[AsyncResult[None]] = []

    def subscribe(self, topics: Sequence[str]) -> None:
        answer: AsyncResult[None] = AsyncResult()
        self.confirm.append(answer)
        answer.get()
        super().subscribe(topics)


@pytest.fixture
def slow() -> SlowCarrier:
    return SlowCarrier()


@pytest.fixture
def slow_hub(slow: SlowCarrier) -> Hub:
    hub = Hub(slow)
    hub.start()
    return hub


def joining(hub: Hub, slow: SlowCarrier, member: Member) -> "gevent.Greenlet[..., bool]":
    asked = len(slow.confirm)
    greenlet = gevent.spawn(hub.join, ["t"], member)
    wait_until(lambda: len(slow.confirm) == asked + 1 or greenlet.ready())
    return greenlet


def joined(hub: Hub, slow: SlowCarrier, member: Member) -> None:
    greenlet = joining(hub, slow, member)
    slow.confirm[-1].set(None)
    assert greenlet.get(timeout=10)


def test_nobody_is_in_before_it_is_confirmed(slow_hub: Hub, slow: SlowCarrier, a: Member) -> None:
    greenlet = joining(slow_hub, slow, a)
    assert slow_hub.members("t") == {}
    slow.confirm[0].set(None)
    assert greenlet.get(timeout=10)
    assert slow_hub.members("t") == {"a": a}


def test_who_comes_second_waits_for_the_confirmation_as_well(
    slow_hub: Hub, slow: SlowCarrier, a: Member, b: Member
) -> None:
    first, second = joining(slow_hub, slow, a), joining(slow_hub, slow, b)
    slow.confirm[1].set(None)
    assert second.get(timeout=10)
    assert not first.ready()
    slow.confirm[0].set(None)
    assert first.get(timeout=10)
    assert set(slow_hub.members("t")) == {"a", "b"}


def test_the_last_leaves_while_another_joins(
    slow_hub: Hub, slow: SlowCarrier, a: Member, b: Member
) -> None:
    """The topic is not taken away from under the one who comes."""
    first, second = joining(slow_hub, slow, a), joining(slow_hub, slow, b)
    slow.confirm[0].set(None)
    assert first.get(timeout=10)
    slow_hub.leave(["t"], a)
    assert ("unsubscribe", ["t"]) not in slow.record
    slow.confirm[1].set(None)
    assert second.get(timeout=10)
    assert slow_hub.publish("t", NEWS) == 1
    assert len(b.frames) == 1
    slow_hub.leave(["t"], b)
    assert slow.record[-1] == ("unsubscribe", ["t"])


def test_what_was_there_already_is_not_taken_away_meanwhile(
    slow_hub: Hub, slow: SlowCarrier, a: Member, b: Member
) -> None:
    joined(slow_hub, slow, a)
    greenlet = gevent.spawn(slow_hub.join, ["t", "u"], b)
    wait_until(lambda: len(slow.confirm) == 2)
    slow_hub.leave(["t"], a)
    slow.confirm[1].set(None)
    assert greenlet.get(timeout=10)
    assert slow.record == [("subscribe", ["t"]), ("subscribe", ["u"])]
    assert slow_hub.publish("t", NEWS) == 1
    assert len(b.frames) == 1


def test_a_failed_join_leaves_the_topic_to_the_others(
    slow_hub: Hub,
    slow: SlowCarrier,
    a: Member,
    b: Member,
    c: Member,
    greenlet_errors: list[BaseException],
) -> None:
    joined(slow_hub, slow, a)
    slow_hub.leave(["t"], a)
    first, second = joining(slow_hub, slow, b), joining(slow_hub, slow, c)
    slow.confirm[1].set_exception(BackendError("down"))
    with pytest.raises(BackendError):
        first.get(timeout=10)
    assert slow.record[-1] == ("unsubscribe", ["t"]) and len(slow.record) == 2
    slow.confirm[2].set(None)
    assert second.get(timeout=10)
    assert slow_hub.members("t") == {"c": c}
    greenlet_errors.clear()


def test_whoever_fails_as_the_last_unsubscribes(
    slow_hub: Hub, slow: SlowCarrier, a: Member, greenlet_errors: list[BaseException]
) -> None:
    """The backend may have subscribed all the same, or try on."""
    greenlet = joining(slow_hub, slow, a)
    slow.confirm[0].set_exception(BackendError("no answer in 5 seconds"))
    with pytest.raises(BackendError):
        greenlet.get(timeout=10)
    assert slow.record == [("unsubscribe", ["t"])]
    greenlet_errors.clear()


def test_a_killed_join_leaves_nothing(slow_hub: Hub, slow: SlowCarrier, a: Member) -> None:
    joining(slow_hub, slow, a).kill()
    assert slow_hub.members("t") == {}
    assert slow.record == [("unsubscribe", ["t"])]


def test_a_backend_that_is_started_anew_has_all_topics(
    hub: Hub, carrier: Carrier, a: Member
) -> None:
    hub.keep(["mine"])
    hub.join(["t", "u"], a)
    hub.leave(["u"], a)
    carrier.record.clear()
    hub.restart_backend()
    assert carrier.record == [("subscribe", ["mine", "t"])]
    assert hub.publish("t", NEWS) == 1
    assert len(a.frames) == 1


# Messages


def test_only_the_members_of_the_topic_receive(hub: Hub, a: Member, b: Member) -> None:
    hub.join(["t"], a)
    hub.join(["u"], b)
    assert hub.publish("t", NEWS) == 1
    assert a.texts == [b'42["message","news"]']
    assert b.texts == []


def test_all_recipients_get_the_same_frame(hub: Hub) -> None:
    """It is encoded and framed once."""
    members = [Member(str(number)) for number in range(50)]
    for member in members:
        hub.join(["t"], member)
    hub.publish("t", Envelope(packets=(b'51-["x",{"_placeholder":true,"num":0}]', b"\x00")))
    frames = [frame for member in members for frame in member.frames]
    assert len(frames) == 50
    assert len(set(map(id, frames))) == 1
    assert frames[0].polling == b'451-["x",{"_placeholder":true,"num":0}]\x1ebAA=='


def test_nobody_there(hub: Hub, carrier: Carrier, a: Member) -> None:
    assert hub.publish("t", NEWS) == 0
    hub.join(["t"], a)
    hub.leave(["t"], a)
    assert hub.publish("t", NEWS) == 0
    assert a.texts == []


def test_one_is_excluded(hub: Hub, a: Member, b: Member) -> None:
    hub.join(["t"], a)
    hub.join(["t"], b)
    assert hub.publish("t", NEWS._replace(exclude="a")) == 1
    assert a.texts == []
    assert len(b.texts) == 1
    hub.publish("t", NEWS._replace(exclude="somebody elsewhere"))
    assert len(a.texts) == 1


def test_several_topics_are_one_copy_each(
    hub: Hub, carrier: Carrier, a: Member, b: Member, c: Member
) -> None:
    """`broadcast_channel(message)` to all channels of a socket: never half of it."""
    for topic, members in {"t": [a, b], "u": [b, c], "v": [a, b, c]}.items():
        for member in members:
            hub.join([topic], member)
    hub.join(["all"], a)
    carrier.record.clear()
    assert hub.publish("all", NEWS._replace(exclude="c", among=("t", "u", "v", "t"))) == 1
    assert [len(member.frames) for member in (a, b, c)] == [1, 1, 0]
    assert carrier.record == [("publish", ["all"])]


def test_who_is_in_none_of_them_does_not_receive(hub: Hub, a: Member, b: Member) -> None:
    hub.join(["all", "t"], a)
    hub.join(["all"], b)
    hub.publish("all", NEWS._replace(among=("t", "nobody's")))
    assert [len(member.frames) for member in (a, b)] == [1, 0]


def test_the_order_is_kept(hub: Hub, a: Member) -> None:
    hub.join(["t"], a)
    hub.join(["u"], a)
    for number in range(100):
        hub.publish("tu"[number % 2], news(str(number)))
    assert a.texts == [f"4{number}".encode() for number in range(100)]


def test_the_sender_learns_that_the_carrier_is_down(hub: Hub, carrier: Carrier, a: Member) -> None:
    """And nobody has received half of it."""
    hub.join(["t"], a)
    carrier.down = True
    with pytest.raises(BackendError):
        hub.publish("t", NEWS)
    assert a.texts == []


def test_a_disconnect_is_for_all_members(hub: Hub, a: Member, b: Member, c: Member) -> None:
    hub.join(["t"], a)
    hub.join(["t"], b)
    hub.join(["u"], c)
    assert hub.publish("t", Envelope(DISCONNECT, exclude="b")) == 1
    assert [member.disconnects for member in (a, b, c)] == [1, 0, 0]
    assert a.frames == []


def test_one_that_is_disconnected_may_leave(hub: Hub, a: Member, b: Member) -> None:
    for member in (a, b):
        hub.join(["t"], member)
        member.on_disconnect = functools.partial(hub.leave, ["t"], member)
    hub.publish("t", Envelope(DISCONNECT))
    assert [a.disconnects, b.disconnects] == [1, 1]
    assert set(hub.members("t")) == set()


def test_one_that_is_too_slow_leaves_during_the_delivery(
    hub: Hub, carrier: Carrier, a: Member, b: Member, c: Member
) -> None:
    """Its buffer is full, so it ends: the others have their message all the same."""
    for member in (a, b, c):
        hub.join(["t"], member)
    b.on_deliver = lambda: hub.leave(["t"], b)
    hub.publish("t", NEWS)
    assert [len(member.frames) for member in (a, b, c)] == [1, 1, 1]
    assert set(hub.members("t")) == {"a", "c"}
    hub.publish("t", NEWS)
    assert [len(member.frames) for member in (a, b, c)] == [2, 1, 2]


def test_the_last_may_leave_during_the_delivery(hub: Hub, carrier: Carrier, a: Member) -> None:
    hub.join(["t"], a)
    a.on_deliver = lambda: hub.leave(["t"], a)
    assert hub.publish("t", NEWS) == 1
    assert carrier.record[-1] == ("unsubscribe", ["t"])


def test_one_may_join_and_publish_during_the_delivery(hub: Hub, a: Member, b: Member) -> None:
    def answer() -> None:
        a.on_deliver = lambda: None
        hub.join(["t"], b)
        hub.publish("t", news("second"))

    hub.join(["t"], a)
    a.on_deliver = answer
    hub.publish("t", news("first"))
    assert a.texts == [b"4first", b"4second"]
    assert b.texts == [b"4second"]


# What does not belong there


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"\x80\x04\x95secret.",
        b"\x02" + envelope.encode(NEWS)[1:],
        envelope.encode(NEWS)[:-1],
        b"\x00" * 100_000,
    ],
    ids=["empty", "text", "pickle", "version", "truncated", "zeros"],
)
def test_garbage_is_counted_and_dropped(
    hub: Hub, a: Member, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    hub.join(["t"], a)
    with caplog.at_level(logging.WARNING, "django_socketio.hub"):
        hub.deliver("t", garbage)
        hub.deliver("t", garbage)
    assert a.frames == []
    assert hub.counters == {"dropped: invalid envelope": 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "'t'" in caplog.text
    assert "secret" not in caplog.text
    hub.deliver("t", envelope.encode(NEWS))
    assert len(a.frames) == 1


def test_a_topic_that_nobody_is_in_any_more(hub: Hub) -> None:
    """What was under way when the last member left is nobody's, and no garbage either."""
    hub.deliver("t", envelope.encode(NEWS))
    assert hub.counters == {}


# Threads


def in_threadpool(function: Callable[[], Any]) -> None:
    gevent.get_hub().threadpool.spawn(function).get()


def in_thread(function: Callable[[], Any]) -> None:
    start_new_thread(function, ())


@pytest.mark.parametrize("run", [in_threadpool, in_thread])
def test_from_another_thread_it_is_delivered_on_the_hub_s(
    hub: Hub, a: Member, run: Callable[[Callable[[], Any]], None]
) -> None:
    """Sends from another OS thread (FSIO#973): sockets belong to one."""
    receivers: list[int] = []
    threads: set[int] = set()

    def publish() -> None:
        threads.add(get_ident())
        receivers.extend(hub.publish("t", news(str(number))) for number in range(100))

    hub.join(["t"], a)
    run(publish)
    wait_until(lambda: len(a.frames) == 100, what="the messages of the other thread")
    assert a.texts == [f"4{number}".encode() for number in range(100)]
    assert a.threads == {get_ident()}
    assert threads.isdisjoint(a.threads)
    assert receivers == [1] * 100


def test_another_thread_wakes_a_hub_that_sleeps(hub: Hub, a: Member) -> None:
    """It waits in the kernel: a message must not wait for something else to happen."""
    received = Event()
    a.on_deliver = received.set
    hub.join(["t"], a)
    start_new_thread(hub.publish, ("t", NEWS))
    assert received.wait(timeout=10)


def test_in_its_own_thread_it_is_delivered_at_once(hub: Hub, a: Member) -> None:
    """What a handler broadcasts is under way when the call returns, from any greenlet."""
    hub.join(["t"], a)
    gevent.spawn(hub.publish, "t", NEWS).get()
    hub.publish("t", NEWS)
    assert len(a.frames) == 2


# Start and stop


def test_a_process_that_only_sends(carrier: Carrier) -> None:
    """A shell or a cron job: nothing is started, and `publish()` works."""
    hub = Hub(carrier)
    assert not hub.serves
    assert hub.publish("t", NEWS) == 0
    assert carrier.record == [("publish", ["t"])]


def test_the_end(hub: Hub, a: Member) -> None:
    assert hub.serves
    hub.join(["t"], a)
    hub.stop()
    hub.stop()
    assert set(hub.members("t")) == set()
    assert hub.publish("t", NEWS) == 0
    assert a.frames == []
