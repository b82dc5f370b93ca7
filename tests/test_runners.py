"""Runner greenlets: how many there are, who works in which, and what brackets the work."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from greenlet import GreenletExit, getcurrent

from django_socketio.runners import Runners, note_database
from tests.support import UNIT, wait_until


class Work:
    """`times` steps, each of which calls `function` and notes the greenlet that it ran in."""

    def __init__(self, function: Callable[[], Any] = lambda: None, times: int = 1) -> None:
        self.function = function
        self.left = times
        self.greenlets: list[Any] = []

    def step(self) -> bool:
        self.left -= 1
        self.greenlets.append(getcurrent())
        self.function()
        return self.left > 0

    @property
    def done(self) -> bool:
        return self.left == 0


class Pool:
    """Runners, and what they call around the work."""

    def __init__(self, limit: int, rest: float = 1000 * UNIT) -> None:
        self.calls: list[tuple[str, Any]] = []
        note = lambda name: lambda: self.calls.append((name, getcurrent()))  # noqa: E731
        self.runners = Runners(
            limit=limit, before=note("before"), after=note("after"), end=note("end"), rest=rest
        )

    def run(self, *works: Work) -> None:
        for work in works:
            self.runners.schedule(work)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(limit=20)
    yield pool
    pool.runners.stop()
    gevent.sleep(0)


def test_work_that_does_not_wait_shares_one_runner(pool: Pool) -> None:
    works = [Work(times=3) for _ in range(50)]
    pool.run(*works)
    assert not works[0].greenlets  # it runs in a later turn of the loop
    wait_until(lambda: all(work.done for work in works))
    assert len({greenlet for work in works for greenlet in work.greenlets}) == 1
    again = Work()
    pool.run(again)
    wait_until(lambda: again.done)
    assert again.greenlets[0] is works[0].greenlets[0]
    assert pool.runners.busy == 0


def test_those_with_more_to_do_take_turns(pool: Pool) -> None:
    order: list[str] = []
    one = Work(lambda: order.append("one"), 3)
    two = Work(lambda: order.append("two"), 2)
    pool.run(one, two)
    wait_until(lambda: one.done and two.done)
    assert order == ["one", "two", "one", "two", "one"]


def test_work_that_waits_holds_up_nobody(pool: Pool) -> None:
    go_on = Event()
    waiting = [Work(go_on.wait) for _ in range(10)]
    quick = Work(times=5)
    pool.run(*waiting, quick)
    wait_until(lambda: quick.done)
    assert pool.runners.busy == 10
    go_on.set()
    wait_until(lambda: pool.runners.busy == 0)


def test_there_are_never_more_than_the_limit() -> None:
    pool = Pool(limit=3)
    go_on = Event()
    works = [Work(go_on.wait) for _ in range(10)]
    pool.run(*works)
    wait_until(lambda: pool.runners.busy == 3)
    for _ in range(10):
        gevent.sleep(0)
    assert [work.done for work in works] == [True] * 3 + [False] * 7
    go_on.set()
    wait_until(lambda: all(work.done for work in works))
    assert len({work.greenlets[0] for work in works}) == 3
    pool.runners.stop()


def test_few_idle_runners_are_kept(pool: Pool) -> None:
    go_on = Event()
    works = [Work(go_on.wait) for _ in range(20)]
    pool.run(*works)
    wait_until(lambda: pool.runners.busy == 20)
    go_on.set()
    wait_until(lambda: pool.runners.busy == 0)
    alive = [greenlet for work in works for greenlet in work.greenlets if not greenlet.dead]
    assert 1 <= len(alive) <= 8


def test_work_without_an_end_leaves_the_loop_its_turns(pool: Pool) -> None:
    def compute() -> None:
        until = time.perf_counter() + UNIT / 50
        while time.perf_counter() < until:
            pass

    crowd = [Work(compute, times=10_000) for _ in range(2)]
    pool.run(*crowd)
    for _ in range(5):
        gevent.sleep(UNIT / 10)  # a timer of the loop
    assert all(work.greenlets and work.left > 9_800 for work in crowd)
    assert pool.runners.busy == 1


def test_work_behind_such_work_may_wait(pool: Pool) -> None:
    def compute() -> None:
        until = time.perf_counter() + UNIT / 2
        while time.perf_counter() < until:
            pass

    go_on = Event()
    pool.run(Work(compute, times=2), Work(go_on.wait), other := Work(go_on.set))
    wait_until(lambda: other.done)
    wait_until(lambda: pool.runners.busy == 0)


def test_work_that_fails_is_logged_and_goes_on(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once() -> None:
        if len(failing.greenlets) == 1:
            raise ArithmeticError("outside of any handler")

    failing, other = Work(fail_once, times=2), Work(times=2)
    pool.run(failing, other)
    wait_until(lambda: failing.done and other.done)
    assert "ArithmeticError" in caplog.text
    assert set(failing.greenlets) == set(other.greenlets)


def test_work_that_ends_its_runner_goes_on_in_another(pool: Pool) -> None:
    def end_once() -> None:
        if len(work.greenlets) == 1:
            raise GreenletExit

    work, other = Work(end_once, times=3), Work(times=3)
    pool.run(work, other)
    wait_until(lambda: work.done and other.done)
    assert work.greenlets[0].dead
    assert work.greenlets[0] is not work.greenlets[1]
    assert pool.runners.busy == 0


def test_work_that_is_done_stays_done_if_what_follows_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise ArithmeticError("while the connections were closed")

    runners = Runners(limit=2, before=lambda: None, after=fail, end=lambda: None)
    work = Work(note_database)
    runners.schedule(work)
    wait_until(lambda: work.done and not runners.busy)
    for _ in range(5):
        gevent.sleep(0)
    assert len(work.greenlets) == 1
    assert "while the connections were closed" in caplog.text
    runners.stop()


def test_only_runners_that_use_the_database_are_bracketed(pool: Pool) -> None:
    plain = Work(times=3)
    pool.run(plain)
    wait_until(lambda: plain.done)
    assert pool.calls == []

    using = Work(note_database)
    pool.run(using)
    wait_until(lambda: using.done)
    (runner,) = using.greenlets
    assert pool.calls == [("after", runner)]
    later = Work()
    pool.run(later)
    wait_until(lambda: later.done)
    assert pool.calls == [("after", runner), ("before", runner), ("after", runner)]


def test_a_runner_that_used_the_database_ends_its_connections(pool: Pool) -> None:
    go_on = Event()
    works = [Work(lambda: (note_database(), go_on.wait())) for _ in range(12)]
    pool.run(*works)
    wait_until(lambda: pool.runners.busy == 12)
    go_on.set()
    wait_until(lambda: pool.runners.busy == 0)
    ended = {greenlet for name, greenlet in pool.calls if name == "end"}
    assert ended == {work.greenlets[0] for work in works if work.greenlets[0].dead}
    assert len(ended) == 4
    pool.runners.stop()
    wait_until(lambda: all(work.greenlets[0].dead for work in works))
    assert len([name for name, _ in pool.calls if name == "end"]) == 12


REST = 4 * UNIT


@pytest.fixture
def resting() -> Iterator[Pool]:
    pool = Pool(limit=20, rest=REST)
    yield pool
    pool.runners.stop()
    gevent.sleep(0)


def test_a_runner_that_used_the_database_ends_when_it_is_idle(resting: Pool) -> None:
    using, plain = Work(note_database), Work()
    resting.run(using)
    wait_until(lambda: using.done)
    (runner,) = using.greenlets
    assert not runner.dead
    wait_until(lambda: runner.dead)
    assert resting.calls[-1] == ("end", runner)
    resting.run(plain)
    wait_until(lambda: plain.done)
    assert plain.greenlets[0] is not runner
    gevent.sleep(3 * REST)
    assert not plain.greenlets[0].dead  # which used none


def test_a_runner_that_is_needed_keeps_its_connections(resting: Pool) -> None:
    until = time.monotonic() + 4 * REST
    greenlets = set()
    while time.monotonic() < until:
        work = Work(note_database)
        resting.run(work)
        wait_until(lambda work=work: work.done)  # type: ignore[misc]
        greenlets.add(work.greenlets[0])
        gevent.sleep(UNIT / 4)
    assert len(greenlets) == 1
    assert "end" not in [name for name, _ in resting.calls]


def test_connections_that_cannot_be_closed_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ArithmeticError("while all were closed")

    nothing = lambda: None  # noqa: E731
    runners = Runners(limit=2, before=nothing, after=nothing, end=fail, rest=UNIT / 4)
    runners.schedule(work := Work(note_database))
    wait_until(lambda: work.done and work.greenlets[0].dead)
    assert "while all were closed" in caplog.text
    runners.stop()


def test_noting_the_database_elsewhere_means_nothing(pool: Pool) -> None:
    note_database()
    work = Work()
    pool.run(work)
    wait_until(lambda: work.done)
    assert pool.calls == []


def test_stopping_ends_those_that_wait(pool: Pool) -> None:
    ended: list[str] = []

    def wait() -> None:
        try:
            gevent.sleep(1000 * UNIT)
        finally:
            ended.append("ended")

    works = [Work(wait) for _ in range(3)]
    pool.run(*works)
    wait_until(lambda: pool.runners.busy == 3)
    pool.runners.stop()
    wait_until(lambda: len(ended) == 3)
    assert all(work.greenlets[0].dead for work in works)
    assert pool.runners.busy == 0
