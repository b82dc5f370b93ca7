"""From polling to WebSocket ("Upgrade"): the probe, the change, and all that can go wrong."""

import struct
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from websockets.frames import Opcode

from django_socketio.engine import Session, State
from django_socketio.engine.polling import PollingTransport
from tests.support import UNIT, wait_until

from .clients import Poller, WebSocket, frame, text
from .served import Served, echo, message
from .test_handshake import BAD_REQUEST, UPGRADE
from .test_websocket import FAILURES


@pytest.fixture
def echoing(served: Served) -> Served:
    served.app.answer = echo
    return served


def probe(served: Served, poller: Poller, **options: Any) -> WebSocket:
    """Return a WebSocket whose probe has been answered."""
    client = served.upgrade(poller, **options)
    client.send("2probe")
    assert client.receive() == "3probe"
    return client


def upgrade(served: Served, poller: Poller) -> WebSocket:
    client = probe(served, poller)
    client.send("5")
    wait_until(lambda: served.session(poller).transport.name == "websocket", what="the upgrade")
    return client


def test_the_happy_path(echoing: Served) -> None:
    poller = echoing.poller()
    poller.start_get()
    session = echoing.wait_polled(poller)
    client = echoing.upgrade(poller)
    client.send("2probe")
    assert client.receive() == "3probe"
    assert poller.end_get() == ["6"]  # so that the client can pause
    client.send("5", "4hello", b"binary")
    assert [client.receive(), client.receive()] == ["4hello", b"binary"]
    assert echoing.app.messages == ["hello", b"binary"]
    assert echoing.session(poller) is session
    assert session.transport.name == "websocket"
    assert echoing.engine.counters == {"opened": 1, "upgraded": 1}


def test_a_close_after_the_upgrade(echoing: Served) -> None:
    client = upgrade(echoing, echoing.poller())
    client.send_raw(frame(Opcode.CLOSE, struct.pack("!H", 1000)))
    assert client.closed() == 1000
    echoing.wait_closed("transport close")


def test_all_in_one_segment(echoing: Served) -> None:
    """A client that does not wait for the answer to its probe."""
    poller = echoing.poller()
    client = echoing.upgrade(poller, behind=text("2probe") + text("5") + text("4hello"))
    assert [client.receive(), client.receive()] == ["3probe", "4hello"]


def test_the_probe_byte_by_byte(echoing: Served) -> None:
    poller = echoing.poller()
    client = echoing.upgrade(poller)
    client.http.send_in_pieces(text("2probe"))
    assert client.receive() == "3probe"
    client.http.send_in_pieces(text("5") + text("4hello"))
    assert client.receive() == "4hello"


def test_what_waits_for_polling_arrives_over_the_websocket(served: Served) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller)
    expected: list[str | bytes] = []
    for number in range(20):
        session.send(message(str(number)))
        session.send(message(b"%d" % number))
        expected += [f"4{number}", b"%d" % number]
    client.send("5")
    assert [client.receive() for _ in expected] == expected
    session.send(message("after"))
    assert client.receive() == "4after"


def test_what_waits_may_be_as_much_as_the_buffer_holds(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=10_000)
    for sizes in ([9_900], [50_000], [900] * 11, [50_000, 9_000]):
        poller = served.poller()
        session = served.session(poller)
        client = probe(served, poller)
        for size in sizes:
            session.send(message("x" * size))
        client.send("5")
        assert [client.receive() for _ in sizes] == ["4" + "x" * size for size in sizes]


def test_a_get_between_probe_and_upgrade_does_not_wait(served: Served) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller)
    assert poller.get() == ["6"]
    session.send(message("hello"))
    assert poller.get() == ["4hello"]
    client.send("5")
    session.send(message("behind"))
    assert client.receive() == "4behind"


def test_a_get_that_waits_at_the_upgrade_ends(served: Served) -> None:
    """A client that does not pause before `5`: its GET is let go, with a noop."""
    poller = served.poller()
    client = served.upgrade(poller)
    poller.start_get()
    session = served.wait_polled(poller)
    client.send("2probe", "5")
    assert poller.end_get() == ["6"]
    assert client.receive() == "3probe"
    session.send(message("hello"))
    assert client.receive() == "4hello"


def test_a_post_on_its_way_at_the_upgrade_counts(served: Served) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller)
    body = b"4slow"
    head = f"POST {poller.target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    poller.posting.send(head.encode() + body[:2])
    wait_until(lambda: session.transport.posting, what="the POST")
    client.send("5")
    wait_until(lambda: session.transport.name == "websocket", what="the upgrade")
    assert poller.posting.send(body[2:]).answer().body == b"ok"
    assert served.app.messages == ["slow"]


def test_pausing_holds_across_the_upgrade(echoing: Served) -> None:
    poller = echoing.poller()
    session = echoing.session(poller)
    client = probe(echoing, poller)
    session.pause()
    client.send("5")
    wait_until(lambda: session.transport.name == "websocket", what="the upgrade")
    client.send("4held back")
    assert poller.getting.get(poller.target).error == BAD_REQUEST  # any request takes its time
    assert echoing.app.messages == []
    session.resume()
    assert client.receive() == "4held back"


def test_nothing_is_lost_or_reordered_under_fire(served: Served) -> None:
    for _ in range(5):
        _upgrade_under_fire(served, count=300)


def _upgrade_under_fire(served: Served, count: int) -> None:
    """Send both ways all the time, and upgrade in the middle as the official client does."""
    poller = served.poller()
    session = served.session(poller)
    session.data = []
    served.app.answer = lambda session, data: session.data.append(data)
    received: list[str | bytes] = []

    def fire() -> None:
        for number in range(count):
            session.send(message(str(number)))
            gevent.sleep(0)

    def poll() -> None:
        while not paused:
            received.extend(packet for packet in poller.get() if packet != "6")

    paused = False
    greenlets = [gevent.spawn(fire), gevent.spawn(poll)]
    sent = 0
    client = None
    while sent < count:
        if sent == count // 3:
            client = probe(served, poller)
            paused = True
            greenlets[1].join()  # for the GET, while the server goes on
            client.send("5")
        if client is None:
            assert poller.post(*(f"4{sent + more}" for more in range(5))).body == b"ok"
        else:
            client.send(*(f"4{sent + more}" for more in range(5)))
        sent += 5
    assert client is not None
    while len(received) < count:
        received.append(client.receive())
    gevent.joinall(greenlets, raise_error=True)
    wait_until(lambda: len(session.data) >= count, what="all messages")
    assert received == [f"4{number}" for number in range(count)]
    assert session.data == [str(number) for number in range(count)]


# A probe that comes to nothing: the session goes on polling with all that waited


def goes_on_polling(served: Served, poller: Poller) -> None:
    session = served.session(poller)
    assert session.probe is None
    assert session.transport.name == "polling"
    assert poller.post("4still here").body == b"ok"
    assert served.app.messages[-1] == "still here"
    assert poller.get() == ["4queued", b"too"]
    poller.start_get()
    served.wait_polled(poller).send(message("later"))
    assert poller.end_get() == ["4later"]
    assert served.app.closed == []


WRONG = {
    "a message": [text("4hello")],
    "a pong": [text("3probe")],
    "a plain ping": [text("2")],
    "another probe": [text("2probe2")],
    "an upgrade without a probe": [text("5")],
    "nothing": [text("")],
    "binary": [frame(Opcode.BINARY, b"2probe")],
    "a close packet": [text("1")],
    "a message before all the rest": [text("4hello"), text("2probe"), text("5")],
    "binary before all the rest": [frame(Opcode.BINARY, b"4"), text("2probe"), text("5")],
    "a message after the probe": [text("2probe"), text("4hello")],
    "two probes": [text("2probe"), text("2probe")],
    "a wrong upgrade": [text("2probe"), text("5x")],
    "a close frame": [frame(Opcode.CLOSE, b"\x03\xe8")],
    "a close frame after the probe": [text("2probe"), frame(Opcode.CLOSE, b"\x03\xe8")],
    **{name: [data] for name, (_, data) in FAILURES.items()},
    **{f"{name} after the probe": [text("2probe"), data] for name, (_, data) in FAILURES.items()},
}


@pytest.mark.parametrize("frames", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_probe(served: Served, frames: list[bytes]) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = served.upgrade(poller)
    session.send(message("queued"))
    session.send(message(b"too"))
    client.send_raw(*frames)
    client.http.gone()
    wait_until(lambda: session.probe is None, what="the end of the probe")
    goes_on_polling(served, poller)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("frames", [[], ["2probe"]], ids=["at once", "after the probe"])
def test_a_probe_that_dies(served: Served, frames: list[str], how: str) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = served.upgrade(poller)
    wait_until(lambda: session.probe, what="the probe")
    session.send(message("queued"))
    session.send(message(b"too"))
    client.send(*frames)
    getattr(client, how)()
    wait_until(lambda: session.probe is None, what="the end of the probe")
    goes_on_polling(served, poller)


@pytest.mark.parametrize("frames", [[], ["2probe"]], ids=["at once", "after the probe"])
def test_a_probe_that_falls_silent(serve: Callable[..., Served], frames: list[str]) -> None:
    served = serve(upgrade_timeout=3 * UNIT)
    poller = served.poller()
    session = served.session(poller)
    client = served.upgrade(poller)
    client.send(*frames)
    session.send(message("queued"))
    session.send(message(b"too"))
    assert client.closed() is None
    goes_on_polling(served, poller)


def test_an_upgrade_after_one_that_failed(echoing: Served) -> None:
    poller = echoing.poller()
    session = echoing.session(poller)
    for _ in range(3):
        client = probe(echoing, poller)
        client.reset()
        wait_until(lambda: session.probe is None, what="the end of the probe")
    client = probe(echoing, poller)
    client.send("5", "4hello")
    assert client.receive() == "4hello"


# A second WebSocket, and polling after the upgrade


@pytest.mark.parametrize("answered", [False, True])
def test_a_second_websocket_during_the_upgrade(echoing: Served, answered: bool) -> None:
    poller = echoing.poller()
    client = probe(echoing, poller) if answered else echoing.upgrade(poller)
    wait_until(lambda: echoing.session(poller).probe, what="the probe")
    second = echoing.upgrade(poller, behind=text("2probe"))
    assert second.closed() == 1008
    if not answered:
        client.send("2probe")
        assert client.receive() == "3probe"
    client.send("5", "4hello")
    assert client.receive() == "4hello"


def test_a_second_websocket_after_the_upgrade(echoing: Served) -> None:
    poller = echoing.poller()
    client = upgrade(echoing, poller)
    second = echoing.upgrade(poller, behind=text("2probe") + text("5"))
    assert second.closed() == 1008
    client.send("4hello")
    assert client.receive() == "4hello"


def test_a_second_websocket_to_a_websocket_session(echoing: Served) -> None:
    client = echoing.websocket()
    second = echoing.websocket(sid=client.sid)
    assert second.closed() == 1008
    client.send("4hello")
    assert client.receive() == "4hello"


def test_a_second_websocket_that_will_not_go(serve: Callable[..., Served]) -> None:
    served = serve(close_timeout=3 * UNIT)
    client = served.websocket()
    second = served.websocket(sid=client.sid, answers=False)
    assert second.closed() == 1008


@pytest.mark.parametrize("upgraded", [False, True])
def test_polling_on_a_websocket_session(echoing: Served, upgraded: bool) -> None:
    client = echoing.websocket()
    sid = client.sid
    if upgraded:
        poller = echoing.poller()
        client, sid = upgrade(echoing, poller), poller.sid
    target = f"/engine.io/?EIO=4&transport=polling&sid={sid}"
    for answer in (echoing.http().get(target), echoing.http().post(target, b"4hello")):
        assert answer.error == BAD_REQUEST
        assert answer.json["hint"] == "the session has been upgraded to websocket"
    client.send("4hello")
    assert client.receive() == "4hello"
    assert echoing.app.messages == ["hello"]


def test_no_request_but_an_upgrade_is_one(echoing: Served) -> None:
    poller = echoing.poller()
    target = poller.target.replace("polling", "websocket")
    assert echoing.http().get(target).error == BAD_REQUEST
    assert echoing.http().post(target, b"4hello", UPGRADE).error == BAD_REQUEST
    assert poller.post("4hello").body == b"ok"
    assert echoing.app.messages == ["hello"]


# The end in the middle of it


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_websocket_that_dies_right_after_the_upgrade(served: Served, how: str) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller)
    session.send(message("lost with it"))
    client.send("5")
    getattr(client, how)()
    wait_until(lambda: served.app.closed, what="the end of the session")
    # Either the upgrade was read, and the session ended with its transport, or it never was.
    assert served.app.reasons[0] in ("transport close", "transport error")
    assert session.state is State.CLOSED


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("polled", [False, True])
def test_the_server_closes_during_the_upgrade(served: Served, answered: bool, polled: bool) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller) if answered else served.upgrade(poller)
    wait_until(lambda: session.probe, what="the probe")
    if polled and not answered:
        poller.start_get()
        served.wait_polled(poller)
    session.send(message("last words"))
    session.close()
    packets = poller.end_get() if polled and not answered else poller.get()
    assert packets == ["4last words", "1"]
    assert client.closed() is None
    served.wait_closed("forced close")
    assert not served.engine.sessions


def test_the_client_closes_during_the_upgrade(served: Served) -> None:
    poller = served.poller()
    client = probe(served, poller)
    assert poller.post("1").body == b"ok"
    assert client.closed() is None
    served.wait_closed("transport close")


def test_an_upgrade_of_a_session_that_closes(served: Served) -> None:
    poller = served.poller()
    served.session(poller).close()
    assert served.upgrade(poller, behind=text("2probe")).closed() == 1008
    assert poller.get() == ["1"]


def test_an_upgrade_read_late_comes_before_the_request_behind_it(served: Served) -> None:
    """The loop keeps no order between connections; the client's order counts."""
    poller = served.poller()
    session = served.session(poller)
    client = probe(served, poller)
    # Both are there before the loop looks at either.
    client.send("5")
    poller.getting.request("GET", poller.target)
    assert poller.getting.answer().error == BAD_REQUEST
    assert session.transport.name == "websocket"


def test_a_message_in_the_segment_of_the_upgrade_may_end_the_session(served: Served) -> None:
    def close(session: Session, data: str | bytes) -> None:
        session.close("enough")

    served.app.answer = close
    poller = served.poller()
    client = probe(served, poller)
    client.send("5", "4hello", "4more")
    assert client.closed() == 1000
    served.wait_closed("enough")
    assert served.app.messages == ["hello"]
    assert not isinstance(served.app.opened[0].transport, PollingTransport)
