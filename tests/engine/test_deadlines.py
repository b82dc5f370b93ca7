"""One timer for all delays, on a clock that the tests turn."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from django_socketio.engine.deadlines import Deadlines, Lane

GRAIN = 0.05
"""More than the timer may be late."""


class Timer:
    def __init__(self, loop: "Loop", due: float) -> None:
        self._loop = loop
        self.due = due
        self.callback: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self._loop.timers.append(self)

    def close(self) -> None:
        if self in self._loop.timers:
            self._loop.timers.remove(self)


class Loop:
    """A loop with a clock of its own, which counts how often it woke anybody."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.timers: list[Timer] = []
        self.wakes = 0

    def now(self) -> float:
        return self.clock

    def timer(self, after: float) -> Timer:
        assert after >= 0
        return Timer(self, self.clock + after)

    def advance(self, seconds: float) -> None:
        """Let time pass, and the timers go off on it."""
        end = self.clock + seconds
        while due := sorted((timer for timer in self.timers if timer.due <= end), key=_due):
            self.clock = max(self.clock, due[0].due)
            self._fire(due[0])
        self.clock = end

    def stall(self, seconds: float) -> None:
        """Let time pass while something else has the thread, and then the timers go off."""
        self.clock += seconds
        self.advance(0)

    def _fire(self, timer: Timer) -> None:
        timer.close()
        self.wakes += 1
        assert timer.callback is not None
        timer.callback()


def _due(timer: Timer) -> float:
    return timer.due


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def deadlines(loop: Loop) -> Deadlines:
    return Deadlines(loop, loop.now)


class Log:
    """The items that expired, in order, with the delay after which they did."""

    def __init__(self, loop: Loop) -> None:
        self._start = loop.clock
        self.entries: list[tuple[Any, float]] = []

    def __call__(self, item: Any, due: float) -> None:
        self.entries.append((item, round(due - self._start, 6)))

    @property
    def items(self) -> list[Any]:
        return [item for item, _ in self.entries]


@pytest.fixture
def log(loop: Loop) -> Log:
    return Log(loop)


def test_it_expires_after_the_delay(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a")
    loop.advance(4.99)
    assert log.entries == []
    loop.advance(GRAIN)
    assert log.entries == [("a", 5)]
    loop.advance(100)
    assert log.entries == [("a", 5)]
    assert len(lane) == 0


def test_they_expire_in_the_order_in_which_they_came(
    loop: Loop, deadlines: Deadlines, log: Log
) -> None:
    lane = deadlines.lane(5, log)
    for item in "abc":
        lane.add(item)
        loop.advance(1)
    loop.advance(10)
    assert log.entries == [("a", 5), ("b", 6), ("c", 7)]


def test_lanes_do_not_wait_for_each_other(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    slow, fast = deadlines.lane(10, log), deadlines.lane(1, log)
    slow.add("slow")
    fast.add("fast")  # later, and due earlier: the timer moves forward
    loop.advance(1 + GRAIN)
    assert log.items == ["fast"]
    loop.advance(9)
    assert log.items == ["fast", "slow"]


def test_to_add_it_again_moves_it(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a")
    lane.add("b")
    loop.advance(3)
    lane.add("a")
    assert len(lane) == 2
    loop.advance(2 + GRAIN)
    assert log.entries == [("b", 5)]
    loop.advance(3)
    assert log.entries == [("b", 5), ("a", 8)]


def test_since_when_the_delay_counts(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a", since=loop.clock - 2)
    assert lane.earliest() == loop.clock + 3
    loop.advance(3 + GRAIN)
    assert log.entries == [("a", 3)]


def test_what_is_overdue_expires_at_once(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    deadlines.lane(5, log).add("a", since=loop.clock - 60)
    assert log.entries == []  # but not inside add()
    loop.advance(GRAIN)
    assert log.items == ["a"]


def test_a_period_does_not_drift(loop: Loop, deadlines: Deadlines) -> None:
    """Timers are late, each time: `since=` the time that was due makes up for it."""
    dues = []

    def again(item: str, due: float) -> None:
        dues.append(round(due - 1000, 6))
        lane.add(item, since=due)

    lane = deadlines.lane(1, again)
    lane.add("a")
    for _ in range(5):
        loop.stall(1.3)
    assert dues == [1, 2, 3, 4, 5, 6]


def test_a_lane_knows_what_waits(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    for item in "abc":
        lane.add(item)
    lane.discard("b")
    lane.add("a")
    assert list(lane) == ["c", "a"]
    loop.advance(10)
    assert list(lane) == []


def test_what_is_discarded_does_not_expire(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    for item in "abc":
        lane.add(item)
    lane.discard("b")
    lane.discard("never added")
    loop.advance(10)
    assert log.items == ["a", "c"]


def test_one_that_expires_may_discard_the_next(loop: Loop, deadlines: Deadlines) -> None:
    expired = []

    def expire(item: str, due: float) -> None:
        expired.append(item)
        lane.discard("b")
        other.discard("d")

    lane, other = deadlines.lane(5, expire), deadlines.lane(5, expire)
    for item in "abc":
        lane.add(item)
    other.add("d")
    loop.advance(10)
    assert expired == ["a", "c"]


def test_one_that_expires_may_add_to_any_lane(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    first = deadlines.lane(5, lambda item, due: second.add(item, since=due))
    second = deadlines.lane(2, log)
    first.add("a")
    loop.advance(7 + GRAIN)
    assert log.entries == [("a", 7)]


def test_one_timer_for_all(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    """Ten thousand sessions are no ten thousand timers."""
    lanes = [deadlines.lane(delay, log) for delay in (5, 1, 3)]
    for lane in lanes:
        for number in range(100):
            lane.add((lane, number))
            assert len(loop.timers) == 1
    loop.advance(2)
    assert len(loop.timers) == 1
    loop.advance(10)
    assert loop.timers == []
    assert len(log.items) == 300


def test_no_timer_when_nothing_waits(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    """An idle process sleeps."""
    lane = deadlines.lane(5, log)
    assert loop.timers == []
    lane.add("a")
    lane.discard("a")
    loop.advance(10)
    assert loop.timers == []
    assert loop.wakes == 1  # for nothing, once


def test_things_due_close_together_cost_one_wake_up(
    loop: Loop, deadlines: Deadlines, log: Log
) -> None:
    lane = deadlines.lane(5, log)
    for number in range(100):
        lane.add(number)
        loop.advance(0.00005)
    loop.advance(10)
    assert log.items == list(range(100))
    assert loop.wakes == 1


def test_a_later_deadline_leaves_the_timer_alone(
    loop: Loop, deadlines: Deadlines, log: Log
) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a")
    (timer,) = loop.timers
    loop.advance(1)
    lane.add("b")
    deadlines.lane(60, log).add("c")
    assert loop.timers == [timer]


def test_whoever_asks_does_not_wait_for_the_timer(
    loop: Loop, deadlines: Deadlines, log: Log
) -> None:
    """`run()`: a request of a session that is due to end finds it ended."""
    lane = deadlines.lane(5, log)
    lane.add("a")
    loop.advance(1)
    lane.add("b")
    loop.clock += 4  # the timer has not gone off yet
    deadlines.run()
    assert log.items == ["a"]
    assert len(lane) == 1
    loop.advance(1 + GRAIN)
    assert log.items == ["a", "b"]


def test_to_ask_too_early_changes_nothing(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    deadlines.lane(5, log).add("a")
    loop.clock += 4.99
    deadlines.run()
    assert log.items == []
    assert loop.wakes == 0


def test_after_a_stall_all_that_is_due_expires(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a")
    loop.advance(2)
    lane.add("b")
    loop.advance(2)
    lane.add("c")
    loop.stall(4)
    assert log.items == ["a", "b"]
    loop.advance(2)
    assert log.items == ["a", "b", "c"]


def test_one_failure_does_not_stop_the_clock(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    """A timer that is never set again would be the end of every heartbeat."""

    def fail(item: str, due: float) -> None:
        raise RuntimeError(item)

    lane, failing = deadlines.lane(5, log), deadlines.lane(1, fail)
    failing.add("bad")
    lane.add("a")
    with pytest.raises(RuntimeError, match="bad"):
        loop.advance(1 + GRAIN)
    loop.advance(5)
    assert log.items == ["a"]


def test_nothing_expires_after_the_end(loop: Loop, deadlines: Deadlines, log: Log) -> None:
    lane = deadlines.lane(5, log)
    lane.add("a")
    deadlines.stop()
    deadlines.stop()
    assert loop.timers == []
    lane.add("b")  # by a connection that closes meanwhile
    loop.advance(10)
    deadlines.run()
    assert log.items == []


_steps = st.lists(
    st.tuples(st.sampled_from(["add", "discard"]), st.integers(0, 2), st.integers(0, 4))
    | st.tuples(st.just("advance"), st.floats(0, 3), st.just(0))
)


@given(_steps)
def test_each_expires_once_in_time_and_never_early(steps: list[tuple[str, Any, int]]) -> None:
    """Against a model that keeps every deadline by itself."""
    loop = Loop()
    deadlines = Deadlines(loop, loop.now)
    expected: dict[tuple[int, int], float] = {}

    def expire(item: tuple[int, int], due: float) -> None:
        assert expected.pop(item) == due
        assert due <= loop.clock <= due + GRAIN

    lanes: list[Lane] = [deadlines.lane(delay, expire) for delay in (1, 2.5, 4)]
    for step, number, item in steps:
        if step == "add":
            lanes[number].add((number, item))
            expected[number, item] = loop.clock + lanes[number].delay
        elif step == "discard":
            lanes[number].discard((number, item))
            expected.pop((number, item), None)
        else:
            loop.advance(number)
        assert len(loop.timers) <= 1
    loop.advance(4 + GRAIN)
    assert expected == {}
