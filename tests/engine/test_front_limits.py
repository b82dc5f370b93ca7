"""What both fronts take of a request before it is one: how much, for how long, of how many."""

import errno
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gevent
import pytest

from tests.support import UNIT, wait_until

from . import served as alone, workers
from .clients import Http, request


@pytest.fixture(params=[alone.Served, workers.Served], ids=["pywsgi", "gunicorn"])
def served(request: pytest.FixtureRequest) -> Iterator[alone.Served]:
    with request.param() as served:
        served.server.over_limit = served.engine.over_limit
        yield served


def over(served: alone.Served, limit: str) -> int:
    return served.engine.counters[f"over limit: {limit}"]


def head(size: int) -> bytes:
    """Return a request that ends behind so many bytes."""
    start = b"GET /page HTTP/1.1\r\nHost: localhost\r\nX-Padding: "
    return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize("pieces", [1, 20])
def test_max_head(served: alone.Served, pieces: int) -> None:
    served.server.max_head = 4000
    good = served.websocket()
    client = served.http()
    client.send_in_pieces(head(4000), 4000 // pieces)
    assert client.answer().status == 200
    assert not over(served, "MAX_HEAD")
    client.send_in_pieces(head(4005), 4005 // pieces)
    assert client.answer().status == 431
    assert client.gone()
    assert over(served, "MAX_HEAD") == 1
    good.send("4still here")
    wait_until(lambda: served.app.messages == ["still here"])


def test_a_head_without_an_end(served: alone.Served) -> None:
    client = served.http()
    with suppress(ConnectionError):
        client.send(b"GET /page HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(100_000):
            client.send(b"X-Padding: " + b"x" * 50 + b"\r\n")
            gevent.sleep(0)
    wait_until(lambda: not served.server.connections)
    assert over(served, "MAX_HEAD") == 1


@pytest.mark.parametrize("data", [b"", b"GET /page HTTP/1.1\r\nHo"], ids=["silent", "begun"])
def test_head_timeout(served: alone.Served, data: bytes) -> None:
    served.server.head_timeout = 3 * UNIT
    good = served.websocket()
    client = served.http()
    client.send(data)
    assert client.gone()
    wait_until(lambda: over(served, "HEAD_TIMEOUT") == 1)
    good.send("4still here")
    wait_until(lambda: served.app.messages == ["still here"])


def test_a_connection_that_rests_is_over_no_limit(
    served: alone.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_socketio.engine.pywsgi.IDLE_TIMEOUT", 4 * UNIT)
    served.server.keepalive = 4 * UNIT
    served.server.head_timeout = 2 * UNIT
    client = served.http()
    assert client.get("/page").status == 200
    assert client.gone()
    assert not over(served, "HEAD_TIMEOUT")


EXHAUSTED = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]


@pytest.mark.parametrize("number", EXHAUSTED, ids=lambda number: errno.errorcode[number])
def test_what_cannot_be_accepted_is_left_to_the_kernel(
    served: alone.Served, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And tried again later, without a loop that spins until then."""
    good, tries, accept = served.websocket(), 0, served.server._accept

    def fail() -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(number, "exhausted")
        return accept()

    served.server._accept = fail
    late = Http(served.address)
    late.send(request("GET", "/page"))
    good.send("4still here")
    wait_until(lambda: served.app.messages == ["still here"])
    assert tries == 1
    assert late.answer().status == 200
    late.close()
    assert tries < 10
    assert over(served, "descriptors") == 2
    lines = [r for r in caplog.records if "Nothing is accepted" in r.getMessage()]
    assert [line.levelno for line in lines] == [logging.ERROR] * 2
    served.errors.clear()


def test_another_error_of_accept_is_gevents(
    served: alone.Served, greenlet_errors: list[BaseException]
) -> None:
    accept = served.server._accept

    def fail() -> Any:
        served.server._accept = accept
        raise OSError(errno.ECONNABORTED, "gone")

    served.server._accept = fail
    assert served.http().get("/page").status == 200
    assert len(greenlet_errors) <= 1
    greenlet_errors.clear()
