"""How a process that serves sockets ends, as its clients and handlers see it."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event

from django_socketio import NoSocket, broadcast, broadcast_channel, runtime, send
from django_socketio.events import on_connect, on_event, on_finish
from tests import clients
from tests.clients import PATH, Client, Lost, WebSocket
from tests.sites import Site
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(4000 * UNIT)

FOR_EVER = 1000.0
REASON = "server shutting down"
TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])

Drain = Callable[..., "gevent.Greenlet[..., Any]"]


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site
        runtime.hurry()


@pytest.fixture
def drain(site: Site) -> Drain:
    """Return a function that begins to drain, as a server does that is told to stop."""

    def drain(over: float = UNIT, timeout: float = 200 * UNIT) -> "gevent.Greenlet[..., Any]":
        greenlet = gevent.spawn(runtime.drain, over, timeout)
        wait_until(lambda: not site.dispatcher.engine.accepting)
        return greenlet

    return drain


@pytest.fixture
def finished() -> list[str]:
    """Return the sessions whose `on_finish` has run, as they end."""
    sids: list[str] = []

    @on_finish
    def finish(request: Any, socket: Any, context: Any) -> None:
        assert socket.disconnect_reason == REASON
        sids.append(socket.sid)

    return sids


def counted(site: Site, what: str) -> int:
    return site.dispatcher.engine.counters[what]


# In batches


def test_many_leave_a_few_at_a_time(site: Site, drain: Drain) -> None:
    """In no order, and each is told once."""
    ended: list[tuple[float, str]] = []

    @on_finish
    def finish(request: Any, socket: Any, context: Any) -> None:
        ended.append((monotonic(), socket.sid))

    crowd = site.connect_several(500)
    drain(over=20 * UNIT).get()
    sids = [sid for _, sid in ended]
    assert Counter(sids) == Counter(client.sid for client in crowd)
    assert sids != [client.sid for client in crowd]
    times = [time for time, _ in ended]
    assert times[-1] - times[0] > 10 * UNIT
    batches = Counter(round(time / UNIT) for time in times)
    assert len(batches) > 5 and max(batches.values()) < 250


def test_few_are_gone_at_once(site: Site, drain: Drain, finished: list[str]) -> None:
    crowd = site.connect_several(3)
    ends = [gevent.spawn(client.connection.wait_for_end) for client in crowd]
    drain(over=FOR_EVER, timeout=2 * FOR_EVER).get(timeout=100 * UNIT)
    assert [end.get().code for end in ends] == [1012] * 3
    assert set(finished) == {client.sid for client in crowd}


def test_nobody_is_nothing_to_wait_for(drain: Drain) -> None:
    drain(over=FOR_EVER, timeout=2 * FOR_EVER).get(timeout=50 * UNIT)


def test_clients_hear_when_to_come_back(site: Site, drain: Drain) -> None:
    crowd = site.connect_several(20)
    drain()
    notes = [client.connection.wait_for_end().note for client in crowd]
    found = [re.fullmatch(r"service restart; reconnect after (\d+) ms", note) for note in notes]
    delays = [int(match[1]) for match in found if match]
    assert len(delays) == 20 and len(set(delays)) > 5
    assert all(500 <= delay < 1600 for delay in delays)


def test_those_who_are_left_are_served_as_ever(site: Site, drain: Drain) -> None:
    """What is sent reaches whoever is there, without a hole; events are handled and answered."""
    crowd = site.connect_several(30)
    for client in crowd:
        client.subscribe("room")
    heard: dict[str, list[int]] = {client.sid: [] for client in crowd}
    acks: dict[str, int] = dict.fromkeys(heard, 0)

    def listen(client: Client) -> None:
        try:
            while True:
                id_ = client.request("fence")
                assert client.acked(id_) == []
                acks[client.sid] += 1
                events = client.fence()
                heard[client.sid] += [number for _, number in events]
                gevent.sleep(UNIT / 20)
        except (Lost, OSError):
            events = [packet.data for packet in client._packets if packet.type == clients.EVENT]
            heard[client.sid] += [number for _, number in events]

    listeners = [gevent.spawn(listen, client) for client in crowd]
    draining = drain(over=20 * UNIT)
    number = 0
    while not draining.ready():
        try:
            broadcast_channel(number, "room")
        except NoSocket:
            break
        number += 1
        gevent.sleep(UNIT / 20)
    gevent.joinall(listeners)
    assert number > 10
    for numbers in heard.values():
        assert numbers == list(range(len(numbers)))
    assert max(len(numbers) for numbers in heard.values()) == number  # nobody was told a lie
    assert len(set(map(len, heard.values()))) > 5 and sum(map(bool, acks.values())) > 15


@TRANSPORTS
def test_nobody_new_is_let_in(site: Site, drain: Drain, transport: str) -> None:
    site.namespace("/other")
    begun, go_on = hanging("hold")
    client = site.connect(transport=transport)
    client.emit("hold")
    begun.wait()
    draining = drain()
    answer = clients.request(site.address, target=f"{PATH}?EIO=4&transport={transport}")
    assert (answer.status, answer.header("Retry-After")) == (503, "1")
    state = clients.request(site.address, target=f"{PATH}health")
    assert (state.status, json.loads(state.body)["reason"]) == (503, "stopping")
    other = client.connection.request("/other")  # of one who is there, that is another matter
    wait_until(lambda: any("/other" in each.sockets for each in site.dispatcher.connections))
    go_on.set()
    other.accepted()
    draining.get()


def is_busy(site: Site) -> bool:
    return any(connection.busy for connection in site.dispatcher.connections)


# In the middle of something


@TRANSPORTS
def test_an_event_in_a_handler_is_acknowledged(
    site: Site, drain: Drain, finished: list[str], transport: str
) -> None:
    """However long it takes, while there is time; what waits behind it, too."""
    go_on = Event()

    @on_event("hold")
    def hold(request: Any, socket: Any, context: Any, number: int) -> int:
        go_on.wait()
        return number

    client, other = site.connect(transport=transport), site.connect()
    ids = [client.request("hold", number) for number in range(3)]
    wait_until(lambda: is_busy(site))
    drain()
    other.connection.wait_for_end()
    gevent.sleep(3 * UNIT)
    assert finished == [other.sid]
    go_on.set()
    assert [client.acked(id_) for id_ in ids] == [[0], [1], [2]]
    assert client.connection.wait_for_end().code in (1012, None)
    assert finished == [other.sid, client.sid]


def test_a_client_that_is_being_let_in_is_told_so(
    site: Site, drain: Drain, finished: list[str]
) -> None:
    begun, go_on = Event(), Event()

    @on_connect
    def connect(request: Any, socket: Any, context: Any) -> None:
        begun.set()
        go_on.wait()
        socket.send("welcome")

    client = site.open().request()
    begun.wait()
    drain()
    gevent.sleep(3 * UNIT)
    go_on.set()
    client.accepted()
    assert client.event() == ["message", "welcome"]
    assert client.connection.wait_for_end().code == 1012
    wait_until(lambda: finished == [client.sid])


def test_a_session_without_a_namespace_is_closed(site: Site, drain: Drain) -> None:
    connection = site.open()
    draining = drain()
    assert connection.wait_for_end().code == 1012
    draining.get()


def test_call_ends_with_the_drain_and_not_with_the_time(
    site: Site, drain: Drain, finished: list[str]
) -> None:
    outcomes: list[str] = []

    @on_event("ask")
    def ask(request: Any, socket: Any, context: Any) -> None:
        try:
            outcomes.append(socket.call("question", timeout=FOR_EVER))
        except NoSocket:
            outcomes.append("NoSocket")

    silent, answering = site.connect_several(2)
    for client in (silent, answering):
        client.emit("ask")
    questions = [client.asked() for client in (silent, answering)]
    draining = drain(over=10 * UNIT, timeout=FOR_EVER)
    answering.ack(questions[1], "an answer")
    draining.get(timeout=150 * UNIT)
    assert outcomes == ["an answer", "NoSocket"]
    assert set(finished) == {silent.sid, answering.sid}


def test_a_client_between_two_transports_gets_to_the_second(site: Site, drain: Drain) -> None:
    client = site.connect(transport="polling")
    websocket = WebSocket(site.address, query={"sid": client.connection.sid})
    websocket.send("2probe")
    assert websocket.receive(monotonic() + clients.TIMEOUT) == "3probe"
    send(client.sid, "on its way")
    draining = drain(over=UNIT)
    gevent.sleep(3 * UNIT)
    polling, client.connection.transport = client.connection.transport, websocket
    websocket.send("5")
    assert client.event() == ["message", "on its way"]
    assert client.connection.wait_for_end().code == 1012
    polling.drop()
    draining.get()


def test_a_client_that_stays_between_two_transports_is_closed(
    site: Site, drain: Drain, finished: list[str]
) -> None:
    client = site.connect(transport="polling")
    websocket = WebSocket(site.address, query={"sid": client.connection.sid})
    websocket.send("2probe")
    assert websocket.receive(monotonic() + clients.TIMEOUT) == "3probe"
    drain(over=UNIT, timeout=20 * UNIT).get(timeout=100 * UNIT)
    assert finished == [client.sid]
    with pytest.raises(Lost):
        websocket.receive(monotonic() + clients.TIMEOUT)
    websocket.drop()


# What was sent


def test_what_was_sent_comes_before_the_close(site: Site, drain: Drain) -> None:
    """Also more than the kernel takes at once."""
    client = site.connect()
    large = "x" * 900_000
    for number in range(3):
        send(client.sid, [number, large[number:]])
    drain()
    assert [client.event()[1][0] for _ in range(3)] == [0, 1, 2]
    assert client.connection.wait_for_end().code == 1012


def test_a_poll_that_waits_gets_the_close(site: Site, drain: Drain) -> None:
    client = site.connect(transport="polling")
    poll = gevent.spawn(client.connection.wait_for_end)
    sessions = site.dispatcher.engine.sessions
    wait_until(lambda: all(session.transport.polled for session in sessions.values()))
    draining = drain()
    assert poll.get().args[0] == "closed by a packet"
    draining.get()
    assert not counted(site, "lost: not fetched at the end")


def test_a_client_between_two_polls_fetches_the_rest(site: Site, drain: Drain) -> None:
    client = site.connect(transport="polling")
    for number in range(3):
        send(client.sid, number)
    draining = drain()
    wait_until(lambda: not site.dispatcher.connections)
    assert [client.event()[1] for _ in range(3)] == [0, 1, 2]
    assert client.connection.wait_for_end().args[0] == "closed by a packet"
    draining.get(timeout=50 * UNIT)
    assert not counted(site, "lost: not fetched at the end")


@TRANSPORTS
def test_a_client_that_does_not_read_is_waited_for_and_counted(
    site: Site, drain: Drain, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    """But not for long, and nobody with it."""
    stalled, good = site.connect(transport=transport), site.connect()
    session = site.dispatcher.engine.sessions[stalled.connection.sid]
    while not session.transport.waiting:  # which the kernel does not take any more
        send(stalled.sid, "x" * 100_000)
        gevent.sleep(0)
    draining = drain(timeout=FOR_EVER)
    assert good.connection.wait_for_end().code == 1012
    started = monotonic()
    draining.get()
    assert monotonic() - started < 60
    assert counted(site, "lost: not fetched at the end") == 1
    assert "1 clients did not take all that was sent to them" in caplog.text


def test_a_websocket_that_does_not_answer_the_close_is_not_waited_for(
    site: Site, drain: Drain
) -> None:
    """It is in the hands of the kernel."""
    site.connect_several(3)
    drain(timeout=FOR_EVER).get(timeout=100 * UNIT)
    assert not counted(site, "lost: not fetched at the end")


# No time


def hanging(name: str) -> tuple[Event, Event]:
    begun, go_on = Event(), Event()

    @on_event(name)
    def hang(request: Any, socket: Any, context: Any, *args: Any) -> None:
        begun.set()
        go_on.wait()

    return begun, go_on


@pytest.mark.parametrize("large", ["", "x" * 100_000], ids=["small", "large"])
def test_what_there_was_no_time_for_is_named(
    site: Site, drain: Drain, finished: list[str], caplog: pytest.LogCaptureFixture, large: str
) -> None:
    begun, go_on = hanging("hang")
    client, other = site.connect_several(2)
    client.emit("hang", large)
    client.emit("fence")
    client.emit("fence", large)
    begun.wait()
    started = monotonic()
    drain(timeout=10 * UNIT).get()
    assert 5 * UNIT < monotonic() - started < 100 * UNIT
    assert finished == [other.sid]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line == (
        "There was no time for the end of 1 handlers (1 'hang'), and for 3 that waited"
        " (2 'fence', 1 on_finish)"
    )
    assert counted(site, "cut: handlers that ran") == 1
    assert counted(site, "cut: handlers that waited") == 3
    go_on.set()
    wait_until(lambda: not site.dispatcher.connections)


def test_all_in_time_is_nothing_to_tell(
    site: Site, drain: Drain, caplog: pytest.LogCaptureFixture
) -> None:
    crowd = site.connect_several(5)
    ends = [gevent.spawn(client.connection.wait_for_end) for client in crowd]
    drain().get()
    gevent.joinall(ends)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert not [
        name for name in site.dispatcher.engine.counters if name.startswith(("cut", "lost"))
    ]


def test_a_drain_may_be_hurried(site: Site, drain: Drain, finished: list[str]) -> None:
    begun, go_on = hanging("hang")
    crowd = site.connect_several(50)
    crowd[0].emit("hang")
    begun.wait()
    draining = drain(over=FOR_EVER, timeout=2 * FOR_EVER)
    assert not draining.ready()
    runtime.hurry()
    draining.get(timeout=100 * UNIT)
    assert set(finished) == {client.sid for client in crowd[1:]}
    go_on.set()
    wait_until(lambda: not site.dispatcher.connections)


def test_without_a_drain_all_go_at_once(site: Site, drain: Drain, finished: list[str]) -> None:
    crowd = site.connect_several(20)
    ends = [gevent.spawn(client.connection.wait_for_end) for client in crowd]
    drain(over=0).get()
    found = [end.get() for end in ends]
    assert {(end.code, end.note) for end in found} == {(1001, REASON)}
    assert len(finished) == 20


def test_messages_keep_their_order_to_the_end(site: Site, drain: Drain) -> None:
    crowd = [site.connect(transport=name) for name in ("websocket", "polling") for _ in range(10)]

    def listen(client: Client) -> list[int]:
        found = []
        while True:
            try:
                found.append(client.event()[1])
            except Lost:
                return found

    listeners = [gevent.spawn(listen, client) for client in crowd]
    draining = drain(over=10 * UNIT)
    number = 0
    while not draining.ready():
        try:
            broadcast(number)
        except NoSocket:
            break
        number += 1
        gevent.sleep(UNIT / 20)
    for listener in listeners:
        numbers = listener.get()
        assert all(after - before == 1 for before, after in pairwise(numbers))
