"""What leaves in a turn of the loop: everybody's, whatever becomes of one."""

import itertools
from collections.abc import Callable

import pytest

from django_socketio.engine.outbox import Outbox


class Loop:
    """Keeps the callbacks of the next turn."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def run_callback(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def turn(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()

    def timer(self, seconds: float) -> "Timer":
        self.moment = Timer()
        return self.moment


class Timer:
    """Ends when it is told to."""

    end: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None], update: bool) -> None:
        self.end = callback

    def close(self) -> None:
        assert self.end is None

    def expire(self) -> None:
        end, self.end = self.end, None
        assert end is not None
        end()


class Connection:
    def __init__(self, log: list[str], name: str, error: Exception | None = None) -> None:
        self.log, self.name, self.error = log, name, error

    def flush(self) -> None:
        self.log.append(f"flush {self.name}")
        if self.error is not None:
            raise self.error

    def fail(self) -> None:
        self.log.append(f"fail {self.name}")


def test_all_are_flushed_at_the_end_of_the_turn() -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    for name in ("one", "two"):
        outbox.add(Connection(log, name))
    assert log == [] and len(loop.callbacks) == 1
    loop.turn()
    assert log == ["flush one", "flush two"]
    outbox.add(Connection(log, "three"))
    loop.turn()
    assert log[2:] == ["flush three"]


def test_one_that_cannot_be_flushed_fails_and_keeps_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    error = ArithmeticError("not now")
    outbox.add(Connection(log, "one"))
    outbox.add(Connection(log, "two", error))
    outbox.add(Connection(log, "three"))
    loop.turn()
    assert log == ["flush one", "flush two", "fail two", "flush three"]
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is error
    outbox.add(Connection(log, "four"))
    loop.turn()
    assert log[-1] == "flush four"


def test_what_is_added_by_a_flush_leaves_in_the_next_turn() -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    one = Connection(log, "one")
    one.flush = lambda: outbox.add(Connection(log, "two"))  # type: ignore[method-assign]
    outbox.add(one)
    loop.turn()
    assert log == []
    loop.turn()
    assert log == ["flush two"]


class Fan:
    """Messages of a carrier, each to forty connections."""

    def __init__(self) -> None:
        self.loop, self.log = Loop(), list[str]()
        self.loop.moment = Timer()
        self.outbox = Outbox(self.loop)
        self.outbox.moderate()
        self.connections = [Connection(self.log, str(number)) for number in range(40)]

    def deliver(self, times: int = 1) -> None:
        """Have messages come, of which the first marks the connections."""
        if times:
            for connection in self.connections:
                self.outbox.add(connection)
        for _ in range(times):
            self.outbox.delivered()
        self.loop.turn()

    @property
    def waits(self) -> bool:
        return self.loop.moment.end is not None

    def flushed(self) -> bool:
        """Tell whether all have been flushed since the last time, once."""
        flushes = len(self.log)
        self.log.clear()
        assert flushes in (0, 40)
        return flushes == 40


def test_many_wait_as_long_as_it_takes_several_messages_along() -> None:
    fan = Fan()
    for _ in range(5):
        fan.deliver()
        assert fan.waits and not fan.flushed()
        fan.outbox.delivered()
        fan.loop.moment.expire()
        assert fan.flushed()


def test_where_it_does_not_pay_it_is_tried_seldom() -> None:
    fan, waited = Fan(), []
    for number in range(2000):
        fan.deliver()
        if fan.waits:
            waited.append(number)
            fan.loop.moment.expire()
        assert fan.flushed()
    gaps = [later - sooner for sooner, later in itertools.pairwise(waited)]
    assert gaps[:8] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert set(gaps[8:]) == {256}


def test_few_wait_for_nothing() -> None:
    fan = Fan()
    fan.connections = fan.connections[:8]
    fan.deliver()
    assert len(fan.log) == 8


def test_without_a_carrier_nobody_waits() -> None:
    fan = Fan()
    fan.outbox = Outbox(fan.loop)
    fan.deliver()
    assert fan.flushed()
