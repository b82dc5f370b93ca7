"""What leaves in a turn of the loop: everybody's, whatever becomes of one."""

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

    def start(self, callback: Callable[[], None]) -> None:
        self.end = callback

    def stop(self) -> None:
        self.end = None


class Connection:
    def __init__(self, log: list[str], name: str, error: Exception | None = None) -> None:
        self.log, self.name, self.error = log, name, error

    def flush(self) -> None:
        self.log.append(f"flush {self.name}")
        if self.error is not None:
            raise self.error

    def abort(self) -> None:
        self.log.append(f"abort {self.name}")


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


def test_one_that_cannot_be_flushed_is_aborted_and_keeps_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    error = ArithmeticError("not now")
    outbox.add(Connection(log, "one"))
    outbox.add(Connection(log, "two", error))
    outbox.add(Connection(log, "three"))
    loop.turn()
    assert log == ["flush one", "flush two", "abort two", "flush three"]
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


def many(outbox: Outbox, log: list[str]) -> None:
    for number in range(40):
        outbox.add(Connection(log, str(number)))


def test_many_wait_for_what_is_about_to_come() -> None:
    """A flush of hundreds takes as long as several answers of a carrier."""
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    outbox.expect()
    many(outbox, log)
    loop.turn()
    assert log == []
    outbox.arrived()
    outbox.expect()  # the handler's next
    loop.turn()
    assert log == []
    outbox.arrived()
    outbox.add(Connection(log, "last"))
    loop.turn()
    assert len(log) == 41 and log[-1] == "flush last"
    assert loop.moment.end is None
    outbox.add(Connection(log, "next"))
    loop.turn()
    assert log[-1] == "flush next"


def test_few_wait_for_nothing() -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    outbox.expect()
    outbox.add(Connection(log, "one"))
    loop.turn()
    assert log == ["flush one"]


def test_nobody_waits_for_longer_than_a_moment() -> None:
    loop, log = Loop(), list[str]()
    outbox = Outbox(loop)
    outbox.expect()
    many(outbox, log)
    loop.turn()
    assert loop.moment.end is not None
    loop.moment.end()
    assert len(log) == 40
    outbox.arrived()
    loop.turn()
    assert len(log) == 40
