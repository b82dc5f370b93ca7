"""Threads of the system and greenlets wait for one another, and none is forgotten."""

import time
from collections.abc import Callable

import gevent
import pytest
from gevent.monkey import get_original

from django_socketio.backends.waiting import Mutex, Signal
from tests.support import UNIT, wait_until

start_thread = get_original("_thread", "start_new_thread")
native_sleep = get_original("time", "sleep")

LONG = 600 * UNIT


def in_greenlet(call: Callable[[], object]) -> None:
    gevent.spawn(call)


def in_thread(call: Callable[[], object]) -> None:
    start_thread(call, ())


def in_thread_with_hub(call: Callable[[], object]) -> None:
    def run() -> None:
        gevent.sleep(0)
        call()
        gevent.get_hub().destroy(destroy_loop=True)

    start_thread(run, ())


PLACES = (in_greenlet, in_thread, in_thread_with_hub)


@pytest.mark.parametrize("setter", PLACES)
@pytest.mark.parametrize("waiter", PLACES)
def test_a_signal(waiter: Callable[..., None], setter: Callable[..., None]) -> None:
    signals, heard = [Signal() for _ in range(100)], []

    def wait(signal: Signal) -> None:
        heard.append(signal.wait(LONG))

    def set_all() -> None:
        for signal in signals:
            signal.set()

    began = time.monotonic()
    for number, signal in enumerate(signals):
        if number == len(signals) // 2:
            setter(set_all)  # before the wait of some, and while others begin to
        waiter(lambda signal=signal: wait(signal))
    wait_until(lambda: len(heard) == len(signals))
    assert all(heard)
    assert time.monotonic() - began < LONG


def test_a_signal_that_is_set() -> None:
    signal = Signal()
    signal.set()
    assert signal.is_set
    assert signal.wait(LONG)


@pytest.mark.parametrize("waiter", PLACES)
def test_a_signal_that_does_not_come(waiter: Callable[..., None]) -> None:
    signal, heard = Signal(), []
    waiter(lambda: heard.extend([signal.wait(UNIT), signal.wait(-1), signal.wait(0)]))
    wait_until(lambda: heard)
    assert heard == [False, False, False]


@pytest.mark.parametrize("waiter", PLACES)
def test_one_may_wait_again(waiter: Callable[..., None]) -> None:
    signal, heard = Signal(), []
    waiter(lambda: heard.extend([signal.wait(UNIT), signal.wait(LONG)]))
    gevent.sleep(2 * UNIT)
    in_thread(signal.set)
    wait_until(lambda: heard)
    assert heard == [False, True]


@pytest.mark.parametrize("setter", PLACES)
def test_whoever_waited_may_be_gone(setter: Callable[..., None]) -> None:
    """Killed, or in a thread that has ended."""
    killed, left = Signal(), Signal()
    greenlet = gevent.spawn(killed.wait, LONG)
    gevent.sleep(0)
    greenlet.kill()
    ended: list[bool] = []
    in_thread_with_hub(lambda: ended.append(left.wait(0)))
    wait_until(lambda: ended)
    native_sleep(UNIT)  # its hub goes after that
    done: list[bool] = []

    def set_both() -> None:
        killed.set()
        left.set()
        done.append(True)

    setter(set_both)
    wait_until(lambda: done)
    gevent.sleep(UNIT)


def test_a_waiting_greenlet_leaves_the_others_alone() -> None:
    signal = Signal()
    greenlet = gevent.spawn(signal.wait, LONG)
    for _ in range(3):
        gevent.sleep(0)
        assert not greenlet.ready()
    signal.set()
    assert greenlet.get(timeout=LONG)


def test_a_thread_may_have_done_something_else_before() -> None:
    signal = Signal()
    gevent.sleep(0)
    native_sleep(4 * UNIT)  # which the loop does not know of
    began = time.monotonic()
    assert not signal.wait(4 * UNIT)
    assert time.monotonic() - began > 3 * UNIT


def test_a_mutex_between_threads_and_greenlets() -> None:
    mutex, counts, ended = Mutex(), {"n": 0}, []

    def count() -> None:
        for _ in range(1000):
            with mutex:
                counts["n"] = counts["n"] + 1
        ended.append(True)

    for number in range(30):
        PLACES[number % 3](count)
    wait_until(lambda: len(ended) == 30)
    assert counts["n"] == 30_000
