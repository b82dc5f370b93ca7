"""Receivers of backend_gap: in order, one at a time, and none harms another or whoever counts."""

import logging
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event

from django_socketio import signals
from django_socketio.backends.memory import MemoryBackend
from django_socketio.signals import Gap, GapTeller, backend_gap
from tests.support import wait_until

GAP = Gap("/", "room", None, 3)


@pytest.fixture
def tell() -> GapTeller:
    return GapTeller(MemoryBackend())


@pytest.fixture
def heard() -> Iterator[list[dict[str, Any]]]:
    heard: list[dict[str, Any]] = []

    def receiver(**kwargs: Any) -> None:
        kwargs.pop("signal")
        heard.append(kwargs)

    backend_gap.connect(receiver)
    yield heard
    backend_gap.disconnect(receiver)


def test_lost_messages(tell: GapTeller, heard: list[dict[str, Any]]) -> None:
    other = Gap("/", None, "sid", 2)
    tell([GAP, other], None)
    assert heard == []  # whoever counts does not wait for receivers
    wait_until(lambda: heard)
    expected = {"sender": MemoryBackend, "gaps": [GAP, other], "lost": 5, "interrupted": None}
    assert heard == [expected]


def test_an_outage(tell: GapTeller, heard: list[dict[str, Any]]) -> None:
    tell([], 1.5)
    wait_until(lambda: heard)
    assert heard == [{"sender": MemoryBackend, "gaps": [], "lost": None, "interrupted": 1.5}]


def test_one_after_the_other(tell: GapTeller, heard: list[dict[str, Any]]) -> None:
    go_on, entered = Event(), []

    def slow(**kwargs: Any) -> None:
        entered.append(kwargs["interrupted"])
        go_on.wait()

    backend_gap.connect(slow)
    try:
        for number in range(5):
            tell([], float(number))
            gevent.sleep(0)
        assert entered == [0.0]
        go_on.set()
        wait_until(lambda: len(heard) == 5)
    finally:
        backend_gap.disconnect(slow)
    assert [each["interrupted"] for each in heard] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_receiver_that_fails(
    tell: GapTeller, heard: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**kwargs: Any) -> None:
        raise ValueError("broken")

    backend_gap.connect(broken)
    try:
        tell([GAP], None)
        tell([], 1.0)
        wait_until(lambda: len(heard) == 2)
    finally:
        backend_gap.disconnect(broken)
    assert "broken" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_what_waits_is_bounded(
    tell: GapTeller, heard: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(signals._MAX_WAITING + 10):
        tell([], float(number))
    wait_until(lambda: len(heard) == signals._MAX_WAITING)
    assert heard[0]["interrupted"] == 10.0
