"""Ping and pong ("Heartbeat"), and what happens to those who do not answer."""

import time
from collections.abc import Callable, Iterator

import pytest
from websockets.frames import Opcode

from django_socketio.engine import State
from tests.support import UNIT, wait_until

from .clients import PATH, Poller, WebSocket, frame, text
from .served import Served, echo, lanes, message
from .test_polling import GONE

INTERVAL, TIMEOUT = 6 * UNIT, 4 * UNIT

Client = Poller | WebSocket


@pytest.fixture
def beating(serve: Callable[..., Served]) -> Served:
    served = serve(ping_interval=INTERVAL, ping_timeout=TIMEOUT)
    served.app.answer = echo
    return served


def packets(client: Client) -> Iterator[str | bytes]:
    """Yield all that the server sends, over either transport."""
    while True:
        if isinstance(client, Poller):
            yield from client.get()
        else:
            yield client.receive()


def send(client: Client, *data: str | bytes) -> None:
    if isinstance(client, Poller):
        client.post(*data)
    else:
        client.send(*data)


def test_a_ping_after_each_interval(beating: Served, transport: str) -> None:
    started = time.monotonic()
    client = beating.client(transport)
    arrivals = []
    for packet in packets(client):
        assert packet == "2"
        arrivals.append(time.monotonic())
        if len(arrivals) == 4:
            break
        send(client, "3")
    times = [started, *arrivals]
    # A pong starts the next interval. None is early; lateness may not add up to another beat.
    assert all(b - a >= INTERVAL for a, b in zip(times, times[1:], strict=False))
    assert times[-1] - started < 8 * INTERVAL
    assert beating.app.closed == []


def test_it_lives_as_long_as_it_answers(beating: Served, transport: str) -> None:
    client = beating.client(transport)
    started = time.monotonic()
    for packet in packets(client):
        if packet == "2":
            send(client, "3")
        if time.monotonic() - started > 3 * (INTERVAL + TIMEOUT):
            break
    send(client, "4still here")
    assert "4still here" in packets(client)
    assert beating.app.closed == []


def test_no_answer_is_the_end(beating: Served, transport: str) -> None:
    started = time.monotonic()
    client = beating.client(transport)
    assert next(packets(client)) == "2"
    beating.wait_closed("ping timeout")
    assert time.monotonic() - started >= INTERVAL + TIMEOUT
    if isinstance(client, WebSocket):
        assert client.closed() is None
    else:
        assert client.getting.get(client.target).error == GONE
    assert lanes(beating) == 0


def test_messages_are_no_answer(beating: Served, transport: str) -> None:
    """They may have been on their way for long; the protocol asks for a pong."""
    client = beating.client(transport)
    assert next(packets(client)) == "2"
    send(client, "4hello", "6")
    beating.wait_closed("ping timeout")


def test_a_pong_frame_is_no_answer(beating: Served) -> None:
    """Engine.IO's pong is a packet: a browser's own answers say nothing of the client in it."""
    client = beating.websocket()
    assert client.receive() == "2"
    client.send_raw(frame(Opcode.PONG))
    beating.wait_closed("ping timeout")


def test_a_client_that_never_polls(beating: Served) -> None:
    """It has not even fetched the ping."""
    started = time.monotonic()
    client = beating.poller()
    beating.wait_closed("ping timeout")
    assert time.monotonic() - started >= INTERVAL + TIMEOUT
    assert client.getting.get(client.target).error == GONE


def test_a_half_open_client(beating: Served) -> None:
    """No FIN and no RST ever come, and the application sends nothing (Flask-SocketIO#442)."""
    client = beating.websocket(answers=False)
    session = beating.session(client)
    beating.wait_closed("ping timeout")
    assert session.transport.closed
    assert beating.engine.sessions == {}


def test_the_get_that_waits_at_the_timeout_ends(beating: Served) -> None:
    client = beating.poller()
    assert client.get() == ["2"]
    assert client.get() == ["6"]
    beating.wait_closed("ping timeout")


def test_a_pong_that_nobody_asked_for(beating: Served, transport: str) -> None:
    """It neither delays the next ping nor answers it beforehand."""
    client = beating.client(transport)
    due = beating.engine._pings.earliest()
    send(client, "3", "3", "3", "4x")
    wait_until(lambda: beating.app.messages == ["x"], what="the message behind")
    assert beating.engine._pings.earliest() == due
    assert "2" in packets(client)
    beating.wait_closed("ping timeout")


def test_a_second_pong_changes_nothing(beating: Served, transport: str) -> None:
    client = beating.client(transport)
    assert next(packets(client)) == "2"
    answered = time.monotonic()
    send(client, "3", "3")
    assert next(packets(client)) == "2"
    assert time.monotonic() - answered >= INTERVAL
    assert beating.app.closed == []


def test_whoever_is_late_finds_the_session_gone(beating: Served) -> None:
    """Also if the timer of the loop has not fired yet, because something kept the loop busy."""
    client = beating.poller()
    session = beating.session(client)
    assert client.get() == ["2"]
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:  # nothing else runs
        pass
    assert session.state is State.OPEN
    query = client.target.partition("?")[2]
    answer = beating.engine.handle({"REQUEST_METHOD": "GET", "QUERY_STRING": query})
    assert answer.status == 400
    assert beating.app.reasons == ["ping timeout"]
    assert client.post("3").error == GONE


def test_a_ping_that_a_busy_loop_sent_late_leaves_the_client_its_time(beating: Served) -> None:
    client = beating.poller()
    session = beating.session(client)
    until = time.monotonic() + INTERVAL + TIMEOUT + UNIT
    while time.monotonic() < until:
        pass
    assert client.getting.get(client.target).body == b"2"
    assert session.state is State.OPEN
    assert client.posting.post(client.target, b"3").body == b"ok"
    assert client.getting.get(client.target).body == b"2"


def test_a_paused_session_is_not_late(beating: Served, transport: str) -> None:
    """What it answered has not been read."""
    client = beating.client(transport)
    session = beating.session(client)
    assert next(packets(client)) == "2"
    session.pause()
    until = time.monotonic() + 2 * TIMEOUT
    if isinstance(client, WebSocket):
        client.send("3")
    else:
        client.posting.request("POST", client.target, b"4x")
    wait_until(lambda: time.monotonic() > until)
    assert beating.app.closed == []
    # The deadline that passed in the meantime was put off; only now does it count, and in full.
    due = beating.engine._pongs.earliest()
    wait_until(lambda: time.monotonic() > due - UNIT / 10)
    session.resume()
    if isinstance(client, Poller):
        assert client.posting.answer().body == b"ok"
        client.post("3")
    send(client, "4still here")
    assert "4still here" in packets(client)
    assert beating.app.closed == []


def test_a_session_that_resumes_must_answer(beating: Served, transport: str) -> None:
    client = beating.client(transport)
    session = beating.session(client)
    assert next(packets(client)) == "2"
    session.pause()
    session.resume()
    beating.wait_closed("ping timeout")


def test_the_upgrade_keeps_the_beat(beating: Served) -> None:
    poller = beating.poller()
    assert poller.get() == ["2"]
    client = beating.upgrade(poller, behind=text("2probe"))
    assert client.receive() == "3probe"
    client.send("5", "3")  # the answer to the ping of the other transport
    for _ in range(3):
        assert client.receive() == "2"
        client.send("3")
    client.send("4still here")
    assert client.receive() == "4still here"
    assert beating.app.closed == []


def test_a_ping_that_polling_did_not_deliver_comes_over_the_websocket(beating: Served) -> None:
    poller = beating.poller()
    session = beating.session(poller)
    client = beating.upgrade(poller, behind=text("2probe"))
    assert client.receive() == "3probe"
    wait_until(lambda: session.awaits_pong, what="the ping")
    client.send("5")
    assert client.receive() == "2"
    client.send("3", "4still here")
    assert "4still here" in packets(client)


def test_no_ping_to_a_session_that_has_ended(beating: Served) -> None:
    client = beating.websocket(answers=False)
    beating.session(client).close()
    until = time.monotonic() + 2 * INTERVAL
    wait_until(lambda: time.monotonic() > until)
    client.send_raw(frame(Opcode.CLOSE, b"\x03\xe8"))
    assert [item.opcode for item in client.rest()] == [Opcode.CLOSE]
    assert beating.app.reasons == ["forced close"]


def test_a_large_answer_to_a_slow_reader_is_no_timeout(serve: Callable[..., Served]) -> None:
    """The ping waits behind the message, and its answer comes in time."""
    served = serve(ping_interval=INTERVAL, ping_timeout=40 * UNIT, max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536)
    session = served.session(client)
    session.send(message(b"x" * 20_000_000))
    wait_until(lambda: session.awaits_pong, what="the ping")
    assert client.receive() == b"x" * 20_000_000
    assert client.receive() == "2"
    client.send("3")
    wait_until(lambda: not session.awaits_pong, what="the pong")
    assert served.app.closed == []


def test_many_beat_together(beating: Served) -> None:
    """One timer serves them all, and each is asked as often as it should be."""
    clients = [beating.websocket() for _ in range(100)]
    for _ in range(3):
        for client in clients:
            assert client.receive() == "2"
            client.send("3")
    wait_until(lambda: not any(s.awaits_pong for s in beating.app.opened), what="all pongs")
    assert beating.app.closed == []


def test_announced_and_kept(serve: Callable[..., Served]) -> None:
    served = serve(ping_interval=INTERVAL, ping_timeout=TIMEOUT)
    answer = served.http().get(f"{PATH}polling")
    assert f'"pingInterval":{round(INTERVAL * 1000)}'.encode() in answer.body
    assert f'"pingTimeout":{round(TIMEOUT * 1000)}'.encode() in answer.body
    served.wait_closed("ping timeout")
