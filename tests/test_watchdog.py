"""What blocks the hub is noticed, named and counted; what only waits, or stands still, is not."""

import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import pytest

from django_socketio import runtime
from django_socketio.events import on_connect, on_event, on_message
from django_socketio.watchdog import Watchdog
from tests.sites import Site
from tests.support import ROOT, UNIT, wait_until

THRESHOLD = 2 * UNIT


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(SOCKETIO_BLOCKING_THRESHOLD=THRESHOLD) as site:
        yield site


def burn(seconds: float) -> None:
    """Work in Python, which lets other threads have their turn."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def watchdog() -> Watchdog:
    found = runtime.get_watchdog()
    assert found is not None
    return found


def blocks() -> int:
    return watchdog().counters["hub blocked"]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return what the watchdog has logged as a warning. A busy machine may add to it."""
    monkeypatch.setattr("django_socketio.watchdog._PAUSE", 0)
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, keep = logging.getLogger("django_socketio.watchdog"), Keep(logging.WARNING)
    logger.addHandler(keep)
    yield messages
    logger.removeHandler(keep)


def wait_for(warnings: list[str], named: str) -> str:
    """Return the warning of a block by `named`."""
    return wait_until(lambda: next((each for each in warnings if named in each), ""), what=named)


def test_a_handler_that_blocks_is_named_with_its_stack(site: Site, warnings: list[str]) -> None:
    @on_event("compute")
    def compute(request: Any, socket: Any, context: Any, secret: str) -> None:
        burn(10 * UNIT)

    client = site.connect()
    assert client.call("compute", "a payload") == []
    warning = wait_for(warnings, "compute, which")
    first, _, stack = warning.partition("\n")
    match = re.fullmatch(r"The hub was blocked for ([0-9.]+) s by (.*):", first)
    assert match is not None, first
    assert 5 * UNIT < float(match[1]) < 40 * UNIT
    assert "compute, which handles event:compute of <Socket " + client.sid in match[2]
    assert "burn(10 * UNIT)" in stack and "while time.monotonic() < until" in stack
    assert "a payload" not in warning
    assert 5 * UNIT < watchdog().blocked < 40 * UNIT
    assert 5 * UNIT < watchdog().worst_lag()


def test_every_kind_of_handler_is_named(site: Site, warnings: list[str]) -> None:
    @on_connect
    def enter(request: Any, socket: Any, context: Any) -> None:
        burn(6 * UNIT)

    site.connect()
    wait_for(warnings, "enter, which handles on_connect of <Socket")


def test_what_is_no_handler_shows_in_the_stack(site: Site, warnings: list[str]) -> None:
    gevent.get_hub().loop.run_callback(burn, 6 * UNIT)
    warning = wait_for(warnings, "while time.monotonic() < until")
    assert "by something that is no handler:" in warning


def test_a_handler_that_waits_is_no_block(site: Site, warnings: list[str]) -> None:
    @on_event("wait")
    def wait(request: Any, socket: Any, context: Any) -> None:
        gevent.sleep(10 * UNIT)

    @on_message
    def work(request: Any, socket: Any, context: Any, message: Any) -> None:
        burn(THRESHOLD / 20)

    waiting, working = site.connect_several(2)
    id_ = waiting.request("wait")
    for _ in range(100):  # much, and each of it short
        working.send("x")
    working.fence()
    waiting.acked(id_)
    assert not any("wait, which handles" in warning for warning in warnings)


def test_one_block_is_one_warning_and_many_are_few(
    site: Site, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_socketio.watchdog._PAUSE", 1000)

    @on_message
    def compute(request: Any, socket: Any, context: Any, message: Any) -> None:
        burn(THRESHOLD * 1.7)
        gevent.sleep(THRESHOLD)

    client = site.connect()
    for _ in range(4):
        client.send("x")
    client.fence()
    wait_until(lambda: blocks() >= 3)
    assert len([each for each in warnings if "compute, which" in each]) <= 1
    assert watchdog().counters["blocks not logged"] >= 2


def test_a_call_that_lets_no_thread_run_is_noticed_on_its_return(
    site: Site, warnings: list[str]
) -> None:
    """Such as a large JSON: C code that keeps the interpreter for itself."""
    work, seconds = 1_000, 0.0
    while seconds < 6 * THRESHOLD:  # find out what takes this machine so long
        work *= 2
        began = time.monotonic()
        sorted_in_c(work)
        seconds = time.monotonic() - began

    @on_event("crunch")
    def crunch(request: Any, socket: Any, context: Any) -> None:
        sorted_in_c(work)

    client = site.connect()
    before = blocks()
    client.call("crunch")
    wait_until(lambda: blocks() > before)
    assert watchdog().worst_lag() > THRESHOLD


def sorted_in_c(work: int) -> None:
    sorted(list(range(work, 0, -1)) + list(range(0, 2 * work, 2)), key=None)
    hash(tuple(range(work)))


def test_the_clock_of_the_wall_is_none_of_its_business(
    site: Site, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = time.time
    for jump in (3600, -3600, 86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
        gevent.sleep(2 * THRESHOLD)
    assert watchdog().worst_lag() < 200 * UNIT


def test_it_can_be_turned_off() -> None:
    with Site(SOCKETIO_BLOCKING_THRESHOLD=None):
        assert runtime.get_watchdog() is None


def watches() -> bool:
    """Tell whether a thread of this process is a watchdog's."""
    outermost = list(sys._current_frames().values())
    while any(frame.f_back for frame in outermost):
        outermost = [frame.f_back or frame for frame in outermost]
    return any(frame.f_code is Watchdog._watch.__code__ for frame in outermost)


def test_it_ends_with_the_server(site: Site) -> None:
    wait_until(watches, what="the thread")  # which runs meanwhile, and its frames come and go
    site.stop()
    assert runtime.get_watchdog() is None
    wait_until(lambda: not watches(), what="the end of the thread")


def test_a_process_without_sockets_has_none() -> None:
    try:
        runtime.get_hub()
        assert runtime.get_watchdog() is None
    finally:
        runtime.stop()


def test_a_debugger_is_no_block(site: Site, warnings: list[str]) -> None:
    """Who steps through a handler knows that it stands."""
    namespace: dict[str, Any] = {"__name__": "pdb", "burn": burn}
    exec("def interaction(): burn(%f)" % (6 * UNIT), namespace)

    @on_event("debug")
    def debug(request: Any, socket: Any, context: Any) -> None:
        namespace["interaction"]()

    client = site.connect()
    client.call("debug")
    assert not any("debug, which handles" in warning for warning in warnings)


STOPPED = """
from gevent import monkey; monkey.patch_all()
import logging, sys, gevent
from collections import Counter
from django_socketio.watchdog import Watchdog
logging.basicConfig(stream=sys.stdout)
dog = Watchdog({threshold}, lambda frame: None, Counter())
dog.start()
print("watching", flush=True)
gevent.sleep({seconds})
dog.stop()
print(dog.counters["hub blocked"], flush=True)
"""


def test_a_process_that_was_stopped_has_not_been_blocked() -> None:
    """It is as after a suspend: neither the hub nor the watchdog had any time."""
    source = STOPPED.format(threshold=THRESHOLD, seconds=30 * UNIT)
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        for _ in range(3):
            gevent.sleep(4 * UNIT)
            process.send_signal(signal.SIGSTOP)
            gevent.sleep(5 * THRESHOLD)
            process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "0\n"


def test_it_logs_while_greenlets_do(site: Site, warnings: list[str]) -> None:
    """The locks of the log are gevent's: a thread would wait for one of them for ever."""
    lines: list[str] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gevent.sleep(UNIT / 10)  # with the lock
            lines.append(record.getMessage())

    slow, logger = Slow(), logging.getLogger("django_socketio")
    logger.addHandler(slow)

    def chatter() -> None:
        while True:
            logging.getLogger("django_socketio.chatter").warning("chatter")
            gevent.sleep(0)

    chatting = [gevent.spawn(chatter) for _ in range(3)]
    try:
        for number in range(3):
            burn(6 * UNIT)
            gevent.sleep(0)
            wait_until(lambda number=number: len(warnings) > number)  # type: ignore[misc]
        wait_until(lambda: sum("blocked for" in line for line in lines) >= 3)
    finally:
        gevent.killall(chatting)
        logger.removeHandler(slow)


HOPELESS = """
from gevent import monkey; monkey.patch_all()
import gevent
from collections import Counter
from django_socketio import watchdog
watchdog._HOPELESS = {hopeless}
watchdog.Watchdog({threshold}, lambda frame: "somebody", Counter()).start()
gevent.sleep({threshold})
while True:
    pass
"""


def test_a_hub_that_does_not_come_back_is_told_of_all_the_same() -> None:
    source = HOPELESS.format(threshold=THRESHOLD, hopeless=5 * THRESHOLD)
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()
    assert re.match(r"The hub was blocked for [0-9.]+ s by somebody:", line)
