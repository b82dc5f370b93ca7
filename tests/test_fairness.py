"""Whoever asks for much takes turns with the others, as the order in which they are served says."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gevent
import pytest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import include, path

from django_socketio.events import on_event
from tests import clients
from tests.clients import EVENT, PATH
from tests.engine.clients import Http, request
from tests.sites import Site, settings
from tests.support import wait_until

pytestmark = settings(
    ROOT_URLCONF=__name__, SOCKETIO_MAX_PAYLOAD=2_000_000, SOCKETIO_MAX_PACKETS=100_000
)

UNKNOWN = f"{PATH}?EIO=4&transport=polling&sid=unknown"

order: list[str] = []
"""Who was served, in that order."""


def take_turn(who: str) -> None:
    """Be noted, and for "flood" work for a while, which gives nobody a turn."""
    order.append(who)
    until = time.perf_counter() + 0.0002
    while who == "flood" and time.perf_counter() < until:
        pass


def turn(request: HttpRequest, who: str) -> HttpResponse:
    take_turn(who)
    return HttpResponse(who)


def download(request: HttpRequest, number: int) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        for _ in range(number):
            take_turn("flood")
            yield b"x" * 100

    return StreamingHttpResponse(parts())


def file(request: HttpRequest, size: int) -> StreamingHttpResponse:
    def parts() -> Iterator[bytes]:
        order.append("flood")
        yield bytes(size)
        order.append("flood")

    return StreamingHttpResponse(parts())


urlpatterns: list[Any] = [
    path("", include("django_socketio.urls")),
    path("turn/<str:who>/", turn),
    path("download/<int:number>/", download),
    path("file/<int:size>/", file),
]


@pytest.fixture(autouse=True)
def forget() -> None:
    order.clear()


def ask_meanwhile(site: Site) -> None:
    """Have another client served as soon as the flood has begun."""
    wait_until(lambda: order, what="the first of the flood")
    assert clients.request(site.address, target="/turn/other/").body == b"other"


def check(number: int) -> None:
    """Check that all of the flood was served, and the other before its end."""
    wait_until(lambda: order.count("flood") == number, what="all of the flood")
    assert order.count("other") == 1
    assert order[-1] == "flood"


def flood(site: Site, data: bytes) -> gevent.Greenlet:
    """Send it on one connection, whose answers are read meanwhile and counted at the end."""

    def run() -> int:
        with closing(Http(("127.0.0.1", site.server.server_port))) as client:
            sending = gevent.spawn(client.send, data)
            answers = client.rest().count(b"HTTP/1.1 ")
            sending.get()
            return answers

    return gevent.spawn(run)


LAST = request("GET", "/turn/flood/", headers={"Connection": "close"})


def test_pipelined_requests(site: Site) -> None:
    number = 3000
    flooding = flood(site, request("GET", "/turn/flood/") * (number - 1) + LAST)
    ask_meanwhile(site)
    check(number)
    assert flooding.get() == number


def test_pipelined_requests_to_the_engine(site: Site) -> None:
    """They are refused, which is as cheap as a request can be."""
    number = 10_000
    refused = site.dispatcher.engine.counters
    flooding = flood(site, request("GET", UNKNOWN) * number + LAST)
    wait_until(lambda: refused["refused: unknown_sid"])
    assert clients.request(site.address, target="/turn/other/").body == b"other"
    assert refused["refused: unknown_sid"] < number
    assert flooding.get() == number + 1


def test_a_stream(site: Site) -> None:
    number = 3000
    last = request("GET", f"/download/{number}/", headers={"Connection": "close"})
    flooding = flood(site, last)
    ask_meanwhile(site)
    check(number)
    assert flooding.get() == 1


def test_a_large_answer(site: Site) -> None:
    """Also one that a view returns in one piece."""
    last = request("GET", "/file/100000000/", headers={"Connection": "close"})
    flooding = flood(site, last)
    ask_meanwhile(site)
    check(2)
    assert flooding.get() == 1


@pytest.fixture
def turns(site: Site) -> None:
    @on_event("turn")
    def turn(request: Any, socket: Any, context: Any, who: str) -> None:
        take_turn(who)


def test_a_request_beside_events(site: Site, turns: None) -> None:
    number = 3000
    client = site.connect()
    flooding = gevent.spawn(client.connection.transport.send, *events(number))
    ask_meanwhile(site)
    check(number)
    flooding.get()
    assert client.fence() == []


def test_events_beside_events(site: Site, turns: None) -> None:
    number = 3000
    client, other = site.connect_several(2)
    flooding = gevent.spawn(client.connection.transport.send, *events(number))
    wait_until(lambda: order, what="the first of the flood")
    assert other.call("turn", "other") == []
    check(number)
    flooding.get()
    assert client.fence() == []


def events(number: int) -> list[str | bytes]:
    return clients.encode(EVENT, data=["turn", "flood"]) * number


def test_many_events_in_one_post(site: Site) -> None:
    number = 100_000
    heard: list[int] = []
    waiting: list[int] = []

    @on_event("n")
    def count(request: Any, socket: Any, context: Any, n: int) -> None:
        heard.append(n)
        if n == 0:
            waiting.append(len(connection._inbox or ()))

    client = site.connect(transport="polling")
    (connection,) = site.dispatcher.connections
    other = site.connect()
    packets = (f'42["n",{n}]' for n in range(number))
    posting = gevent.spawn(client.connection.transport.send, *packets)
    wait_until(lambda: heard, what="the first of them")
    assert other.fence() == []
    assert len(heard) < number
    assert waiting[0] < number / 10  # for the rest was yet to be taken
    posting.get(timeout=3 * clients.TIMEOUT)
    assert client.fence() == []
    assert heard == list(range(number))
