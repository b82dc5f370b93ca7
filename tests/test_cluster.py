"""Several nodes on one carrier: who they take for alive, and what they answer."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import Event

from django_socketio import cluster as module, envelope, hub as topics
from django_socketio.backends import BackendError
from django_socketio.backends.memory import MemoryBackend
from django_socketio.cluster import ALL, Answer, Cluster, new_node, topic_of
from django_socketio.engine import Frame
from django_socketio.envelope import Envelope
from django_socketio.hub import Hub
from django_socketio.protocol import json
from tests.carrier import Carrier, Net
from tests.support import UNIT, wait_until

start_new_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")
block: Callable[[float], None] = monkey.get_original("time", "sleep")

BEAT, SILENCE = UNIT, 12 * UNIT
LONG = 600 * UNIT
"""A timeout that no question may need."""
SOON = 60 * UNIT
"""What a question may need that waits for somebody, on a busy machine."""


class Member:
    """A socket."""

    def __init__(self, sid: str) -> None:
        self.sid = sid
        self.frames: list[Frame] = []
        self.channels: list[str] = []

    def deliver(self, frame: Frame) -> None:
        self.frames.append(frame)

    def disconnect(self) -> None: ...

    def subscribe(self, channel: str) -> bool:
        self.channels.append(channel)
        return True

    def unsubscribe(self, channel: str) -> bool:
        self.channels.remove(channel)
        return True


class Process:
    """One that may ask; a node if it `serves`."""

    def __init__(self, net: Net) -> None:
        self.carrier = Carrier(net)
        self.hub = Hub(self.carrier)
        self.cluster = Cluster(self.hub, beat=BEAT, silence=SILENCE)
        self.serves = False

    def serve(self) -> "Process":
        self.serves = True
        self.hub.start()
        self.cluster.start()
        return self

    def answer_slowly(self, seconds: float) -> None:
        """Take a while for every answer."""

        def slow(*args: Any, attachments: Any) -> Answer:
            gevent.sleep(seconds)
            return Answer(self.cluster.node)

        self.cluster.answerers["who"] = slow

    def stop(self) -> None:
        self.carrier.thaw()
        self.carrier.net.down = False
        self.cluster.stop()
        self.hub.stop()

    @property
    def counters(self) -> dict[str, int]:
        return self.hub.counters

    @property
    def errors(self) -> int:
        return self.counters["dropped: invalid envelope"]


class Nodes:
    """Makes processes, and stops them in the end."""

    def __init__(self) -> None:
        self.net = Net()
        self._all: list[Process] = []

    def plain(self) -> Process:
        process = Process(self.net)
        process.answer_slowly(0)
        self._all.append(process)
        return process

    def node(self) -> Process:
        return self.plain().serve()

    def several(self, number: int) -> list[Process]:
        """Return nodes that have known each other for a while."""
        nodes = [self.node() for _ in range(number)]
        names = {node.cluster.node for node in nodes}
        wait_until(lambda: all(node.cluster.nodes() == names for node in nodes))
        wait_until(lambda: all(knows_all(node) for node in nodes), what="some beats")
        return nodes

    def asker(self, kind: str) -> Process:
        return {"node": self.node, "plain": self.plain}[kind]()

    def stop(self) -> None:
        for process in self._all:
            process.stop()


def knows_all(node: Process) -> bool:
    """Tell whether the node takes whoever it has not heard for dead."""
    return not node.cluster.is_alive(new_node())


def names(*processes: Process) -> set[str]:
    return {process.cluster.node for process in processes}


def ask(process: Process, timeout: float = LONG) -> set[str]:
    """Return the nodes that answer. Each must do so once."""
    answers = process.cluster.ask_all("who", timeout=timeout)
    assert len(answers) == len(set(answers))
    return set(answers)


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what the function returns or raises, for a greenlet."""
    try:
        return function(*args, **options)
    except BackendError as error:
        return error


def letter(kind: int, body: Any, *attachments: bytes) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return envelope.encode(Envelope(kind, (data, *attachments)))


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.stop()


COUNTS = pytest.mark.parametrize("counts", ["exactly", "some", "unknown"])
ASKERS = pytest.mark.parametrize("asker", ["node", "plain"])


def open_questions(process: Process) -> int:
    return len(process.cluster._questions)


# Who is there


def test_names_fit_a_url_and_differ() -> None:
    found = {new_node() for _ in range(1000)}
    assert len(found) == 1000
    assert {len(name) for name in found} == {module.NODE_LENGTH}
    assert all(name.replace("-", "x").replace("_", "x").isalnum() for name in found)


def test_nodes_know_each_other(nodes: Nodes) -> None:
    first, second, third = nodes.several(3)
    newcomer = nodes.node()
    everybody = names(first, second, third, newcomer)
    wait_until(lambda: newcomer.cluster.nodes() == first.cluster.nodes() == everybody)
    assert nodes.plain().cluster.nodes() == set()


def test_a_node_says_good_bye(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = nodes.several(3)
    third.stop()
    assert first.cluster.nodes() == second.cluster.nodes() == names(first, second)
    assert not first.cluster.is_alive(third.cluster.node)
    assert ask(first) == names(first, second)
    assert not first.counters["nodes lost"] and not caplog.records


def test_a_node_says_that_it_leaves(nodes: Nodes) -> None:
    """With each beat, and answers to the end."""
    first, second, third = nodes.several(3)
    third.cluster.retire()
    wait_until(lambda: first.cluster.staying() == names(second))
    newcomer = nodes.node()
    wait_until(lambda: newcomer.cluster.staying() == names(first, second))
    assert third.cluster.nodes() == first.cluster.nodes() == names(first, second, third, newcomer)
    assert ask(first) == names(first, second, third, newcomer)
    third.stop()
    wait_until(lambda: not first.cluster._leaving)
    assert first.cluster.staying() == names(second, newcomer)


def test_a_node_that_left_and_was_killed_is_forgotten(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.cluster.retire()
    wait_until(lambda: first.cluster._leaving == names(second))
    second.carrier.kill()
    wait_until(lambda: first.cluster.nodes() == names(first))
    wait_until(lambda: not first.cluster._leaving)


def test_a_node_may_leave_while_the_carrier_is_down(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    nodes.net.down = True
    wait_until(lambda: second.counters["outages"])
    second.cluster.retire()
    nodes.net.down = False
    wait_until(lambda: first.cluster._leaving == names(second))


def test_a_killed_node_is_forgotten(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    first, second = nodes.several(2)
    second.carrier.kill()
    wait_until(lambda: first.cluster.nodes() == names(first))
    wait_until(lambda: first.counters["nodes lost"])
    (record,) = caplog.records
    assert second.cluster.node in record.getMessage()


def test_whom_a_young_node_has_not_heard_may_be_alive(nodes: Nodes) -> None:
    assert nodes.node().cluster.is_alive(new_node())
    assert nodes.plain().cluster.is_alive(new_node())


def test_a_process_that_asked_before_it_serves(nodes: Nodes) -> None:
    """A project may ask while it is imported."""
    (other,) = nodes.several(1)
    process = nodes.plain()
    assert ask(process) == names(other)
    process.serve()
    wait_until(lambda: not process.cluster.deaf)
    wait_until(lambda: other.cluster.nodes() == names(process, other))
    assert ask(other) == ask(process) == names(process, other)
    gevent.sleep(1.5 * SILENCE)
    assert (process.carrier.starts, process.carrier.stops) == (2, 1)
    assert not process.counters["restarts of a deaf backend"]


# Questions to all


@COUNTS
@ASKERS
def test_everybody_answers_once(nodes: Nodes, asker: str, counts: str) -> None:
    nodes.net.counts = counts
    others = nodes.several(3)
    process = nodes.asker(asker)
    everybody = names(*others, *[process] * process.serves)
    for _ in range(3):
        assert ask(process) == everybody
        gevent.sleep(BEAT)
    assert ask(others[0]) == everybody
    assert not open_questions(process)


@COUNTS
@ASKERS
@pytest.mark.parametrize("age", ["young", "old"])
def test_nobody_is_missed_who_takes_his_time(
    nodes: Nodes, asker: str, counts: str, age: str
) -> None:
    """The first to answer need not know of the others, nor need whoever asks."""
    nodes.net.counts = counts
    others = nodes.several(3) if age == "old" else [nodes.node() for _ in range(3)]
    wait_until(lambda: not any(node.cluster.deaf for node in others))
    for number, node in enumerate(others):
        node.answer_slowly(number * 3 * module._PATIENCE)
    process = nodes.asker(asker)
    assert ask(process) == names(*others, *[process] * process.serves)
    assert not open_questions(process)


@COUNTS
def test_nobody_is_missed_though_the_carrier_takes_its_time(
    nodes: Nodes, counts: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is anybody taken for dead, or deaf."""
    nodes.net.counts = counts
    several = [nodes.node() for _ in range(4)]
    processes = [several[-1], nodes.plain()]
    for process in (*several, processes[1]):
        process.carrier.delay = 3 * BEAT
    wait_until(lambda: not any(node.cluster.deaf for node in several))
    for _ in range(2):
        asking = [gevent.spawn(ask, process) for process in processes]
        assert [each.get() for each in asking] == [names(*several)] * 2
        gevent.sleep(SILENCE)
    assert not caplog.records


@pytest.mark.parametrize("counts", ["exactly", "some"])
def test_nobody_is_there(nodes: Nodes, counts: str) -> None:
    nodes.net.counts = counts
    started = time.monotonic()
    assert ask(nodes.plain()) == set()
    assert time.monotonic() - started < SOON


def test_nobody_is_there_and_the_carrier_does_not_tell(nodes: Nodes) -> None:
    nodes.net.counts = "unknown"
    assert ask(nodes.plain(), timeout=4 * UNIT) == set()


@COUNTS
def test_a_node_alone_waits_for_nobody(nodes: Nodes, counts: str) -> None:
    nodes.net.counts = counts
    (node,) = nodes.several(1)
    before = len(node.carrier.published)
    started = time.monotonic()
    for _ in range(100):
        assert ask(node) == names(node)
    assert time.monotonic() - started < 100 * module._PATIENCE
    assert node.carrier.published[before:].count(ALL) < 100 + LONG / BEAT


def test_in_one_process_nothing_is_carried() -> None:
    class Inside(MemoryBackend):
        def publish(self, topic: str, payload: bytes) -> int:
            raise AssertionError("published")

    backend = Inside(Net().url)
    cluster = Cluster(Hub(backend))
    assert cluster.ask_all("count", "c/,room") == []


@pytest.mark.parametrize("counts", ["exactly", "some"])
@ASKERS
def test_a_killed_node_costs_next_to_nothing(nodes: Nodes, asker: str, counts: str) -> None:
    nodes.net.counts = counts
    first, second, third = nodes.several(3)
    process = first if asker == "node" else nodes.plain()
    ask(process)
    third.carrier.kill()
    started = time.monotonic()
    for _ in range(3):
        assert ask(process) == names(first, second)
    assert time.monotonic() - started < SOON
    assert not process.counters["nodes that did not answer"]


def test_a_killed_node_of_which_no_carrier_tells_counts_as_long_as_its_beats(nodes: Nodes) -> None:
    nodes.net.counts = "unknown"
    first, second, third = nodes.several(3)
    third.carrier.kill()
    started = time.monotonic()
    assert ask(first) == names(first, second)
    assert time.monotonic() - started < SILENCE + SOON
    assert ask(first) == names(first, second)


@COUNTS
@pytest.mark.parametrize("others", [1, 2])
def test_a_node_that_hangs_counts_as_long_as_its_beats(
    nodes: Nodes, counts: str, others: int
) -> None:
    """The carrier goes on counting it."""
    nodes.net.counts = counts
    first, *rest = nodes.several(1 + others)
    rest[-1].carrier.freeze()
    expected = names(first, *rest[:-1])
    started = time.monotonic()
    assert ask(first) == expected
    assert time.monotonic() - started < SILENCE + SOON
    wait_until(lambda: first.cluster.nodes() == expected)
    started = time.monotonic()
    for _ in range(10):
        assert ask(first) == expected
    assert time.monotonic() - started < SOON
    assert not first.counters["nodes that did not answer"]
    rest[-1].carrier.thaw()
    wait_until(lambda: first.cluster.nodes() == names(first, *rest))
    assert ask(first) == names(first, *rest)


def test_a_node_that_hangs_and_a_process_that_asks(nodes: Nodes) -> None:
    first, second, third = nodes.several(3)
    third.carrier.freeze()
    wait_until(lambda: third.cluster.node not in first.cluster.nodes() | second.cluster.nodes())
    process = nodes.plain()
    started = time.monotonic()
    for _ in range(5):
        assert ask(process) == names(first, second)
    assert time.monotonic() - started < SOON


def test_a_node_that_lives_and_does_not_answer(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = nodes.several(3)
    third.answer_slowly(LONG)
    assert ask(first, timeout=4 * UNIT) == names(first, second)
    assert first.counters["nodes that did not answer"] == 1
    assert third.cluster.node in caplog.text
    assert not open_questions(first)


def test_a_node_that_cannot_answer_holds_nobody_up(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = nodes.several(3)

    def fail(*, attachments: Any) -> Answer:
        raise ZeroDivisionError

    third.cluster.answerers["who"] = fail
    assert ask(first) == names(first, second)
    assert first.counters["nodes that did not answer"] == 1
    assert third.counters["requests that failed"] == 1
    assert "ZeroDivisionError" in caplog.text


@ASKERS
def test_the_carrier_is_down(nodes: Nodes, asker: str) -> None:
    nodes.several(1)
    process = nodes.asker(asker)
    ask(process)
    nodes.net.down = True
    with pytest.raises(BackendError):
        ask(process)
    with pytest.raises(BackendError):
        process.cluster.ask_one("s/,x", "subscribe", timeout=LONG)
    assert not open_questions(process)
    nodes.net.down = False
    wait_until(lambda: ask(process))


@ASKERS
def test_the_carrier_is_not_there_yet(nodes: Nodes, asker: str) -> None:
    nodes.net.down = True
    process = nodes.asker(asker)
    with pytest.raises(BackendError):
        ask(process)
    nodes.net.down = False
    (other,) = nodes.several(1) if not process.serves else [process]
    wait_until(lambda: not other.cluster.deaf)
    assert ask(process) == names(other)


def test_no_answer_at_all_is_an_error(nodes: Nodes) -> None:
    """Nobody may take a process that hears nothing for an empty cluster."""
    nodes.several(2)
    process = nodes.plain()
    ask(process)
    process.carrier.deaf = True
    with pytest.raises(BackendError, match="brings no answers to 'who'"):
        ask(process, timeout=4 * UNIT)


def test_a_deaf_node_does_not_answer_for_all(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = nodes.several(2)
    first.carrier.deaf = True
    monkeypatch.setattr(first.carrier, "start", lambda deliver: None)
    with pytest.raises(BackendError, match="brings no answers to 'who'"):
        ask(first, timeout=2 * SILENCE)


def test_many_questions_at_once(nodes: Nodes) -> None:
    others = nodes.several(3)
    for node in others:
        node.answer_slowly(UNIT / 10)
    process = nodes.plain()
    askers = [*others, process]
    greenlets = [gevent.spawn(outcome, ask, askers[number % 4]) for number in range(400)]
    assert all(each.get() == names(*others) for each in greenlets)
    wait_until(lambda: not any(sum(node.cluster._busy.values()) for node in others))
    assert not any(map(open_questions, askers))


def test_from_threads_of_the_operating_system(nodes: Nodes) -> None:
    """Views run in such, in most servers, and on a node too if it has a thread pool."""
    others = nodes.several(3)
    done: list[Any] = []

    def work(process: Process) -> None:
        try:
            done.append([ask(process) for _ in range(20)])
        except BaseException as error:
            done.append(error)

    process = nodes.plain()
    for asker in (others[0], others[0], process, process):
        start_new_thread(work, (asker,))
    wait_until(lambda: len(done) == 4)
    assert done == [[names(*others)] * 20] * 4
    assert not open_questions(process)


def test_from_threads_of_a_young_node(nodes: Nodes) -> None:
    node, done = nodes.node(), []
    for _ in range(4):
        start_new_thread(lambda: done.append(outcome(ask, node)), ())
    wait_until(lambda: len(done) == 4)
    assert done == [names(node)] * 4


def test_whoever_asks_may_be_killed(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.answer_slowly(2 * UNIT)
    greenlets = [
        gevent.spawn(outcome, ask, first),
        gevent.spawn(outcome, first.cluster.ask_one, second.cluster.topic, "who", timeout=LONG),
    ]
    wait_until(lambda: second.cluster._busy["who"] == 2)
    gevent.killall(greenlets)
    assert not open_questions(first)
    wait_until(lambda: first.counters["dropped: answer to no question"] == 2)
    assert ask(first) == names(first, second)


def test_the_end_of_a_process_ends_its_questions(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.answer_slowly(LONG)
    greenlets = [
        gevent.spawn(outcome, ask, first),
        gevent.spawn(outcome, first.cluster.ask_one, second.cluster.topic, "who", timeout=LONG),
    ]
    wait_until(lambda: second.cluster._busy["who"] == 2)
    first.stop()
    assert [type(each.get(timeout=SOON)) for each in greenlets] == [BackendError] * 2


# What nodes are asked


def test_what_a_node_answers_of_its_members(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    room, hall = topics.channel("/", "room"), topics.channel("/", "hall")
    for number, node in enumerate((first, first, second)):
        node.hub.join([room, hall][: number + 1], Member(f"member {number}"))
    ask_all = nodes.plain().cluster.ask_all
    assert sorted(ask_all("members", room), key=len) == [["member 2"], ["member 0", "member 1"]]
    assert sorted(ask_all("count", room)) == [1, 2]
    assert sorted(ask_all("count", topics.channel("/", "nowhere"))) == [0, 0]
    channels = sorted(ask_all("channels", "/"), key=lambda found: found["room"])
    assert channels == [{"room": 1, "hall": 1}, {"room": 2, "hall": 1}]
    assert ask_all("channels", "/other") == [{}, {}]


def test_a_session_is_subscribed_where_it_lives(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    topic, member = topics.session("/", "x"), Member("x")
    second.hub.join([topic], member)
    for process in (first, second, nodes.plain()):
        answer = process.cluster.ask_one(topic, "subscribe", topic, "room", timeout=LONG)
        assert answer is not None and answer.value is True
        assert member.channels == ["room"]
        answer = process.cluster.ask_one(topic, "unsubscribe", topic, "room", timeout=LONG)
        assert answer is not None and answer.value is True
        assert member.channels == []


def test_a_session_that_ends_meanwhile_is_nobodys(nodes: Nodes) -> None:
    (node,) = nodes.several(1)
    topic = topics.session("/", "x")

    class Leaving(Member):
        def subscribe(self, channel: str) -> bool:
            node.hub.leave([topic], self)
            return False

    node.hub.join([topic], Leaving("x"))
    answer = node.cluster.ask_one(topic, "subscribe", topic, "room", timeout=LONG)
    assert answer is not None and answer.value is False


def test_a_carrier_that_fails_the_owner_fails_whoever_asks(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    topic = topics.session("/", "x")

    class Failing(Member):
        def subscribe(self, channel: str) -> bool:
            raise BackendError("down")

    second.hub.join([topic], Failing("x"))
    with pytest.raises(BackendError, match="could not"):
        first.cluster.ask_one(topic, "subscribe", topic, "room", timeout=LONG)


# Questions to one


def test_nobody_is_subscribed(nodes: Nodes) -> None:
    (node,) = nodes.several(1)
    assert node.cluster.ask_one("s/,x", "subscribe", timeout=LONG) is None
    assert nodes.plain().cluster.ask_one("s/,x", "subscribe", timeout=LONG) is None
    assert not open_questions(node)


def test_attachments_go_both_ways(nodes: Nodes) -> None:
    first, second = nodes.several(2)

    def double(number: int, attachments: tuple[bytes, ...]) -> Answer:
        return Answer(2 * number, (*attachments, *attachments))

    second.cluster.answerers["double"] = double
    answer = first.cluster.ask_one(
        second.cluster.topic, "double", 4, attachments=(b"\x00", b""), timeout=LONG
    )
    assert answer == Answer(8, (b"\x00", b"", b"\x00", b""))


def test_no_answer_in_time(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.answer_slowly(LONG)
    with pytest.raises(BackendError, match="no answer to 'who'"):
        first.cluster.ask_one(second.cluster.topic, "who", timeout=2 * UNIT)
    assert not open_questions(first)


def test_whoever_asks_may_lose_interest(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.answer_slowly(LONG)
    interested = [True]
    greenlet = gevent.spawn(
        outcome,
        first.cluster.ask_one,
        second.cluster.topic,
        "who",
        timeout=LONG,
        still=lambda: interested[0],
    )
    wait_until(lambda: second.cluster._busy["who"])
    interested.clear()
    interested.append(False)
    assert isinstance(greenlet.get(timeout=SOON), BackendError)


def test_the_end_of_who_should_answer_is_noticed(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    second.answer_slowly(LONG)
    ask_one = first.cluster.ask_one
    greenlet = gevent.spawn(outcome, ask_one, second.cluster.topic, "who", timeout=LONG, again=UNIT)
    wait_until(lambda: second.cluster._busy["who"])
    second.carrier.kill()
    assert greenlet.get(timeout=SOON) is None


def test_an_answer_that_nobody_is_there_for(nodes: Nodes) -> None:
    """The node hears of it, for it may have been the only copy of something."""
    first, second = nodes.several(2)
    undelivered: list[bool] = []

    def answer(attachments: Any) -> Answer:
        gevent.sleep(UNIT)
        return Answer(1, undelivered=lambda: undelivered.append(True))

    second.cluster.answerers["who"] = answer
    ask_one = first.cluster.ask_one
    assert ask_one(second.cluster.topic, "who", timeout=LONG) == Answer(1)
    assert not undelivered
    gevent.spawn(outcome, ask_one, second.cluster.topic, "who", timeout=LONG)
    wait_until(lambda: second.cluster._busy["who"])
    first.carrier.kill()
    wait_until(lambda: undelivered)


def test_an_answer_that_the_carrier_does_not_take(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    undelivered: list[bool] = []

    def answer(attachments: Any) -> Answer:
        nodes.net.down = True
        return Answer(1, undelivered=lambda: undelivered.append(True))

    second.cluster.answerers["who"] = answer
    with pytest.raises(BackendError):
        first.cluster.ask_one(second.cluster.topic, "who", timeout=2 * UNIT)
    assert undelivered == [True]


def test_to_tell_is_to_want_no_answer(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    told: list[str] = []

    def listen(what: str, attachments: Any) -> Answer:
        told.append(what)
        return Answer(what)

    second.cluster.answerers["listen"] = listen
    before = len(second.carrier.published)
    assert first.cluster.tell(second.cluster.topic, "listen", "news") == 1
    wait_until(lambda: told == ["news"])
    assert set(second.carrier.published[before:]) <= {ALL}
    assert first.cluster.tell(topic_of(new_node()), "listen", "news") == 0


def test_only_so_many_requests_of_a_name_are_answered_at_once(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_MAX_REQUESTS", 3)
    first, second = nodes.several(2)
    gate = Event()

    def wait(attachments: Any) -> Answer:
        gate.wait()
        return Answer("done")

    second.cluster.answerers["wait"] = wait
    ask_one, topic = first.cluster.ask_one, second.cluster.topic
    greenlets = [gevent.spawn(outcome, ask_one, topic, "wait", timeout=10 * UNIT) for _ in range(5)]
    wait_until(lambda: second.counters["dropped: too many requests"] == 2)
    assert ask(first) == names(first, second)  # others are none of theirs
    gate.set()
    outcomes = [each.get(timeout=SOON) for each in greenlets]
    assert list(map(type, outcomes)) == [Answer] * 3 + [BackendError] * 2
    assert len(caplog.records) == 1
    assert ask_one(topic, "wait", timeout=LONG) == Answer("done")


# What should not come


STRANGE: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    None,
    1,
    "text",
    {},
    [],
    [[]],
    [1, 2, 3, 4],
    ["1", None, "who", []],
    ["1", "stranger/", "who", []],
    ["1", "stranger\n", "who", []],
    ["1", "x" * 100_000, "who", []],
    ["1", "strange\u00e9", "who", []],
    ["1", "", "who", []],
    ["1", "stranger", "who", {}],
    ["1", "stranger", 1, []],
    ["stranger"],
    ["stranger", 1, 1],
    ["stranger", "alive", "1", []],
    ["stranger", "alive", 1],
    ["stranger", "alive"],
    ["stranger", "alive", 1, {}],
    ["\n" * 8, "alive", 1, []],
    ["x" * 100_000, "alive", 1, []],
    ["1", "stranger", [1], True, True, 1],
    ["1", "stranger", [[]], True, True, 1],
    ["1", "stranger", ["x"], True, True, 1],
    ["1", "stranger", [], 1, True, 1],
    ["1", "stranger", [], True, None, 1],
    ["1", "stranger", {}, True, True, 1],
    [1, "stranger", [], True, True, 1],
]


@pytest.mark.parametrize("kind", [envelope.REQUEST, envelope.REPLY, envelope.BEAT])
def test_what_is_malformed_is_dropped(
    nodes: Nodes, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = nodes.several(2)
    stranger = Carrier(nodes.net)
    for number, body in enumerate(STRANGE, 1):
        stranger.publish(ALL, letter(kind, body))
        assert (first.errors, second.errors) == (number, number), body
        stranger.publish(second.cluster.topic, letter(kind, body))
        second.counters["dropped: invalid envelope"] -= 1
    assert first.cluster.nodes() == names(first, second)
    assert ask(first) == ask(second) == names(first, second)
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


def test_requests_that_nobody_can_answer(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    first, second = nodes.several(2)
    stranger = Carrier(nodes.net)
    requests = [
        ["1", "stranger", "no such request", []],
        ["1", "stranger", "who", ["one", "too", "many"]],
        ["1", "stranger", "count", []],
        ["1", "stranger", "count", [{}]],
        ["1", "stranger", "members", [[[]]]],
        ["1", "stranger", "channels", [None]],
        ["1", "stranger", "subscribe", ["s/,x", "room", 3]],
    ]
    for body in requests:
        stranger.publish(first.cluster.topic, letter(envelope.REQUEST, body, b"attachment"))
    wait_until(lambda: first.counters["requests that failed"] == 4)
    assert first.counters["dropped: unknown request"] == 1
    assert ask(first) == ask(second) == names(first, second)
    wait_until(lambda: not sum(first.cluster._busy.values()))


def test_a_process_without_sockets_answers_nothing(nodes: Nodes) -> None:
    nodes.several(1)
    process = nodes.plain()
    ask(process)
    request = letter(envelope.REQUEST, ["1", "stranger", "count", ["c/,room"]])
    assert Carrier(nodes.net).publish(process.cluster.topic, request) == 1
    assert process.counters["dropped: unknown request"] == 1


def test_answers_to_no_question_are_dropped(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    reply = ["no number", second.cluster.node, [], True, True, "x"]
    Carrier(nodes.net).publish(first.cluster.topic, letter(envelope.REPLY, reply))
    assert first.counters["dropped: answer to no question"] == 1
    assert ask(first) == names(first, second)


def test_an_answer_of_the_wrong_node_is_dropped(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    gate = Event()

    def wait(attachments: Any) -> Answer:
        gate.wait()
        return Answer("right")

    second.cluster.answerers["wait"] = wait
    greenlet = gevent.spawn(
        outcome, first.cluster.ask_one, second.cluster.topic, "wait", timeout=LONG
    )
    wait_until(lambda: second.cluster._busy["wait"])
    (number,) = first.cluster._questions
    reply = letter(envelope.REPLY, [number, new_node(), [], True, True, "wrong"])
    Carrier(nodes.net).publish(first.cluster.topic, reply)
    gate.set()
    assert greenlet.get(timeout=SOON) == Answer("right")


def test_nodes_that_somebody_has_invented_are_forgotten(nodes: Nodes) -> None:
    (node,) = nodes.several(1)
    stranger = Carrier(nodes.net)
    for _ in range(1000):
        stranger.publish(ALL, letter(envelope.BEAT, [new_node(), "alive", 1, []]))
    assert len(node.cluster.nodes()) == 1001
    started = time.monotonic()
    assert ask(node) == names(node)
    assert time.monotonic() - started < SOON  # the carrier knows that there are none
    wait_until(lambda: node.cluster.nodes() == names(node))
    assert not node.cluster._others


# Deafness and outages


def test_health_begins_with_the_first_echo(nodes: Nodes) -> None:
    nodes.net.down = True
    node = nodes.node()
    assert node.cluster.deaf and node.cluster.silent_for is None
    nodes.net.down = False
    wait_until(lambda: not node.cluster.deaf)
    assert node.cluster.silent_for is not None and node.cluster.silent_for < SILENCE
    assert nodes.plain().cluster.deaf


def test_a_deaf_node_starts_its_backend_anew(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = nodes.several(2)
    member = Member("x")
    first.hub.join(["c/,room"], member)
    first.carrier.deaf = True
    wait_until(lambda: first.carrier.starts == 2, what="the restart")
    wait_until(lambda: not first.cluster.deaf, what="green health")
    assert second.hub.publish("c/,room", Envelope(packets=(b"2[]",))) == 1
    assert len(member.frames) == 1
    assert ask(first) == ask(second) == names(first, second)
    assert first.counters["restarts of a deaf backend"] == 1
    # It could not hear them, which is no word on their lives.
    assert not first.counters["nodes lost"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_backend_that_does_not_start_anew_is_started_again(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before all topics are confirmed does the node count as hearing."""
    first, second = nodes.several(2)
    member = Member("x")
    first.hub.join(["c/,room"], member)
    first.carrier.deaf = True
    first.carrier.refuses = 5
    wait_until(lambda: first.carrier.refuses < 5)
    while first.carrier.refuses:
        assert first.cluster.deaf
        gevent.sleep(BEAT / 8)
    wait_until(lambda: not first.cluster.deaf)
    assert first.carrier.starts == 7
    second.hub.publish("c/,room", Envelope(packets=(b"2[]",)))
    assert len(member.frames) == 1
    assert first.counters["restarts of a deaf backend"] == 1
    assert len(caplog.records) == 3, caplog.text  # deaf, down, back


def test_an_outage_is_one_line_and_its_end_another(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = nodes.several(2)
    nodes.net.down = True
    wait_until(lambda: first.cluster.deaf and second.cluster.deaf)
    gevent.sleep(SILENCE)
    assert first.cluster.nodes() == names(first, second)  # who could know?
    nodes.net.down = False
    wait_until(lambda: not first.cluster.deaf and not second.cluster.deaf)
    assert ask(first) == names(first, second)
    gevent.sleep(SILENCE)
    lines = sorted((record.levelname, record.getMessage()) for record in caplog.records)
    assert [level for level, _ in lines] == ["ERROR"] * 2 + ["WARNING"] * 2
    assert all("is down" in line for _, line in lines[:2])
    assert all("is back after" in line for _, line in lines[2:])
    assert first.counters["outages"] == 1
    assert not first.counters["nodes lost"] and first.carrier.starts == 1


def test_who_dies_in_an_outage_is_forgotten_after_it(nodes: Nodes) -> None:
    first, second, third = nodes.several(3)
    nodes.net.down = True
    third.carrier.kill()
    gevent.sleep(SILENCE)
    nodes.net.down = False
    wait_until(lambda: ask(first) == names(first, second))
    wait_until(lambda: first.cluster.nodes() == names(first, second))


def test_a_stall_of_ones_own_says_nothing_about_others(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """What has come meanwhile is read afterwards; a restart would lose it."""
    first, second = nodes.several(2)
    block(1.2 * SILENCE)  # all of this thread
    gevent.sleep(SILENCE)
    assert first.cluster.nodes() == second.cluster.nodes() == names(first, second)
    assert first.carrier.starts == second.carrier.starts == 1
    assert not caplog.records


def test_the_heart_survives_anything(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nodes.several(2)

    def fail(topic: str, payload: bytes) -> int:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(first.carrier, "publish", fail)
        wait_until(lambda: first.cluster.deaf)
    wait_until(lambda: not first.cluster.deaf)
    wait_until(lambda: ask(second) == names(first, second))


def test_no_good_bye_over_a_carrier_that_is_down(nodes: Nodes) -> None:
    first, second = nodes.several(2)
    nodes.net.down = True
    first.cluster.stop()
    first.cluster.stop()
    assert first.cluster.nodes() == names(second)
    nodes.net.down = False
