"""The Socket as handlers use it: what it sends, to whom, and what it says of itself."""

import datetime
import decimal
import logging
import uuid
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from django.utils.translation import gettext_lazy
from gevent.event import Event

from django_socketio import NoSocket
from django_socketio.engine import Frame
from django_socketio.events import on_connect, on_disconnect, on_event, on_finish, on_message
from django_socketio.sockets import Socket
from tests import clients
from tests.clients import Client
from tests.sites import Site
from tests.support import UNIT, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])


def action(name: str = "do") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Bind a function of the socket to an event whose ack says whether it returned."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @on_event(name)
        def handler(request: Any, socket: Any, context: Any, *args: Any) -> Any:
            function(socket, *args)
            return "done"

        return function

    return decorate


def sockets_of(site: Site) -> dict[str, Socket]:
    """Return every socket of the server, by its session id."""
    return {
        socket.sid: socket
        for connection in site.dispatcher.connections
        for socket in connection.sockets.values()
        if socket is not None
    }


# To this client


@TRANSPORTS
@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("hello", ["hello"]),
        (None, [None]),
        ({"a": [1, 2.5, True, None]}, [{"a": [1, 2.5, True, None]}]),
        (("a", 2), ["a", 2]),
        ((), []),
        (["a", 2], [["a", 2]]),
        (b"\x00\xff", [b"\x00\xff"]),
        (({"file": b"1"}, b"2"), [{"file": b"1"}, b"2"]),
        (bytearray(b"12"), [b"12"]),
        ("ünï ✓ 😀", ["ünï ✓ 😀"]),
        (datetime.date(2026, 1, 2), ["2026-01-02"]),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 678901), ["2026-01-02T03:04:05.678"]),
        (decimal.Decimal("1.10"), ["1.10"]),
        (uuid.UUID(int=1), ["00000000-0000-0000-0000-000000000001"]),
        (gettext_lazy("lazy"), ["lazy"]),
        ({1: "a", None: "b"}, [{"1": "a", "null": "b"}]),
        (2**64, [2**64]),
        ("half of an emoji: \ud83d", ["half of an emoji: \ud83d"]),
        (({"id": -(2**70)}, b"1"), [{"id": -(2**70)}, b"1"]),
    ],
    ids=repr,
)
def test_send_is_the_event_message(
    site: Site, transport: str, message: Any, args: list[Any]
) -> None:
    action()(lambda socket: socket.send(message))
    client = site.connect(transport=transport)
    assert client.call("do") == ["done"]
    assert client.fence() == [["message", *args]]


@TRANSPORTS
def test_emit_sends_an_event_of_any_name(site: Site, transport: str) -> None:
    @action()
    def emit(socket: Socket) -> None:
        socket.emit("nothing")
        socket.emit("several", 1, [2], {"c": b"3"})
        socket.emit("ünï ✓", None)

    client = site.connect(transport=transport)
    client.emit("do")
    expected = [["nothing"], ["several", 1, [2], {"c": b"3"}], ["ünï ✓", None]]
    assert client.fence() == expected


@pytest.mark.parametrize(
    "name", ["connect", "disconnect", "connect_error", "disconnecting", "newListener"]
)
def test_the_protocols_own_events_cannot_be_emitted(site: Site, name: str) -> None:
    refused: list[str] = []

    @action()
    def emit(socket: Socket) -> None:
        for method in (socket.emit, socket.call):
            with pytest.raises(ValueError, match=f"'{name}' is an event of the protocol") as error:
                method(name, 1)
            refused.append(str(error.value))

    client = site.connect()
    assert client.call("do") == ["done"]
    assert client.fence() == []
    assert len(refused) == 2


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "unfit", [object(), {1, 2}, {"deep": [object()]}, 1j, {(1, 2): 3}, CYCLE], ids=type
)
@pytest.mark.parametrize(
    "method",
    [
        "send",
        "broadcast",
        "broadcast_channel",
        "send_and_broadcast",
        "send_and_broadcast_channel",
        "emit",
        "call",
    ],
)
def test_what_cannot_be_serialised_raises_in_the_caller_and_goes_to_nobody(
    site: Site, method: str, unfit: Any
) -> None:
    raised: list[BaseException] = []

    @action()
    def send(socket: Socket) -> None:
        function = getattr(socket, method)
        args = ("name", b"fine", unfit) if method in ("emit", "call") else ((b"fine", unfit),)
        with pytest.raises(TypeError) as error:
            function(*args)
        raised.append(error.value)

    client, other = site.connect_several(2)
    for each in (client, other):
        each.subscribe("room")
    assert client.call("do") == ["done"]
    assert client.fence() == other.fence() == []
    assert raised


def test_what_is_sent_to_a_socket_that_has_ended_is_dropped(site: Site) -> None:
    done: list[Socket] = []

    @on_finish
    def finish(request: Any, socket: Any, context: Any) -> None:
        socket.send("x")
        socket.emit("x")
        socket.disconnect()
        done.append(socket)

    site.connect().close()
    wait_until(lambda: done)
    assert done[0].disconnect_reason == "transport close"


# What it says of itself


@TRANSPORTS
def test_what_a_socket_says_of_itself(site: Site, transport: str) -> None:
    found: dict[str, Any] = {}

    @on_connect(namespace="/chat")
    def connected(request: Any, socket: Any, context: Any) -> None:
        for name in ("namespace", "auth", "transport", "channels", "disconnect_reason"):
            found[name] = getattr(socket, name)
        found["sid"] = socket.session.session_id
        found["repr"] = repr(socket)

    client = site.connect("/chat", {"a": 1}, transport=transport)
    assert found.pop("sid") == client.sid
    assert client.sid in found.pop("repr")
    assert found == {
        "namespace": "/chat",
        "auth": {"a": 1},
        "transport": transport,
        "channels": [],
        "disconnect_reason": None,
    }


def test_transport_is_the_one_of_the_moment(site: Site) -> None:
    on_event("transport")(lambda request, socket, context: socket.transport)
    action()(lambda socket: socket.send("hello"))
    client = site.connect(transport="polling")
    assert client.call("transport") == ["polling"]
    query = {"sid": client.connection.sid}
    client.connection.upgrade(clients.WebSocket(site.address, query=query))
    assert client.call("transport") == ["websocket"]
    assert client.call("do") == ["done"]
    assert client.fence() == [["message", "hello"]]


def test_session_ids_are_random_and_not_the_sessions_own(site: Site) -> None:
    crowd = site.connect_several(20)
    ids = {client.sid for client in crowd} | {client.connection.sid for client in crowd}
    assert len(ids) == 40
    assert all(len(id_) >= 22 for id_ in ids)  # 128 bits in base64


@TRANSPORTS
def test_channels_are_those_that_it_is_subscribed_to(site: Site, transport: str) -> None:
    on_event("channels")(lambda request, socket, context: sorted(socket.channels))
    client = site.connect(transport=transport)
    for channel in ("a", "b", "a"):
        client.subscribe(channel)
    assert client.call("channels") == [["a", "b"]]
    client.unsubscribe("a")
    assert client.call("channels") == [["b"]]


def test_channels_is_a_copy(site: Site) -> None:
    on_event("clear")(lambda request, socket, context: socket.channels.clear())
    on_event("channels")(lambda request, socket, context: socket.channels)
    client = site.connect()
    client.subscribe("a")
    client.emit("clear")
    assert client.call("channels") == [["a"]]


# To others


@pytest.fixture
def crowd(site: Site) -> dict[str, Client]:
    """
    Return clients by what they are: the sender, in "a" and "b"; one in "a", one in both, one in
    "c", one in none, and one in "a" of another namespace.
    """
    site.namespace("/chat")
    places: dict[str, tuple[str, tuple[str, ...]]] = {
        "sender": ("/", ("a", "b")),
        "in a": ("/", ("a",)),
        "in a and b": ("/", ("a", "b")),
        "in c": ("/", ("c",)),
        "in none": ("/", ()),
        "elsewhere": ("/chat", ("a", "b", "c")),
    }
    crowd = {}
    for name, (namespace, channels) in places.items():
        crowd[name] = site.connect(namespace, transport="polling" if "b" in name else "websocket")
        for channel in channels:
            assert crowd[name].subscribe(channel) == {"ok": True}
    return crowd


def receivers(crowd: dict[str, Client], event: list[Any]) -> set[str]:
    """Return who got an event; once, and nothing else."""
    got = {name: client.fence() for name, client in crowd.items()}
    assert all(events in ([], [event]) for events in got.values()), got
    return {name for name, events in got.items() if events}


EVERYBODY = {"sender", "in a", "in a and b", "in c", "in none"}


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [
        ("send", (), {"sender"}),
        ("broadcast", (), EVERYBODY - {"sender"}),
        ("send_and_broadcast", (), EVERYBODY),
        ("broadcast_channel", ("a",), {"in a", "in a and b"}),
        ("broadcast_channel", ("b",), {"in a and b"}),
        ("broadcast_channel", ("c",), {"in c"}),
        ("broadcast_channel", ("empty",), set()),
        ("broadcast_channel", (), {"in a", "in a and b"}),
        ("broadcast_channel", (None,), {"in a", "in a and b"}),
        ("send_and_broadcast_channel", ("a",), {"sender", "in a", "in a and b"}),
        ("send_and_broadcast_channel", ("c",), {"sender", "in c"}),
        ("send_and_broadcast_channel", ("empty",), {"sender"}),
        ("send_and_broadcast_channel", (), {"sender", "in a", "in a and b"}),
    ],
)
def test_who_receives(
    crowd: dict[str, Client], method: str, args: tuple[Any, ...], expected: set[str]
) -> None:
    action()(lambda socket: getattr(socket, method)(("hello", b"!"), *args))
    assert crowd["sender"].call("do") == ["done"]
    assert receivers(crowd, ["message", "hello", b"!"]) == expected


@pytest.mark.parametrize(
    ("method", "expected"), [("broadcast_channel", set()), ("send_and_broadcast_channel", {"in c"})]
)
def test_all_channels_of_a_socket_without_any(
    crowd: dict[str, Client], method: str, expected: set[str]
) -> None:
    action()(lambda socket: getattr(socket, method)("hello"))
    crowd["in c"].unsubscribe("c")
    assert crowd["in c"].call("do") == ["done"]
    assert receivers(crowd, ["message", "hello"]) == expected


def test_namespaces_do_not_hear_of_each_other(site: Site, crowd: dict[str, Client]) -> None:
    @on_event("do", namespace="/chat")
    def do(request: Any, socket: Any, context: Any) -> None:
        socket.send_and_broadcast("1")
        socket.broadcast_channel("2", "a")

    other = site.connect("/chat")
    other.call("do")
    assert other.fence() == [["message", "1"]]
    assert crowd["elsewhere"].fence() == [["message", "1"], ["message", "2"]]
    assert receivers(crowd, []) == set()


def test_a_channel_is_no_room_for_a_session_id(site: Site) -> None:
    """A socket that subscribes to another's session id hears nothing that is for the other."""
    client, spy = site.connect_several(2)
    on_event("do")(lambda request, socket, context: socket.send("secret"))
    for name in (client.sid, f"s/,{client.sid}", "/", "a/", f"/,{client.sid}"):
        assert spy.subscribe(name) == {"ok": True}
    client.emit("do")
    assert client.fence() == [["message", "secret"]]
    assert spy.fence() == []


@pytest.mark.parametrize("channel", ["", "a\nb", "x" * 256, 5, b"room"])
def test_what_is_no_channel_raises_in_the_caller(site: Site, channel: Any) -> None:
    @action()
    def publish(socket: Socket) -> None:
        for method in (socket.broadcast_channel, socket.send_and_broadcast_channel):
            with pytest.raises(ValueError, match="A channel is"):
                method("x", channel)
        with pytest.raises(ValueError, match="A channel is"):
            socket.subscribe(channel)

    client = site.connect()
    assert client.call("do") == ["done"]
    assert client.fence() == []


def test_a_broadcast_from_an_ended_socket_still_reaches_the_others(site: Site) -> None:
    @on_disconnect
    @on_finish
    def tell(request: Any, socket: Any, context: Any) -> None:
        socket.broadcast("gone")
        socket.broadcast_channel("left the room")

    client, other = site.connect_several(2)
    client.subscribe("room")
    other.subscribe("room")
    client.close()
    assert [other.event()[1] for _ in range(4)] == ["gone", "left the room"] * 2
    assert other.fence() == []


def test_all_members_of_a_channel_see_one_order(site: Site) -> None:
    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        gevent.sleep(0)
        socket.send_and_broadcast_channel(message, "room")

    crowd = site.connect_several(5)
    for client in crowd:
        client.subscribe("room")
    for number in range(20):
        for index, client in enumerate(crowd):
            client.send([index, number])
    orders = [[client.event()[1] for _ in range(100)] for client in crowd]
    assert orders[1:] == orders[:1] * 4
    for index in range(5):
        assert [n for who, n in orders[0] if who == index] == list(range(20))


@pytest.mark.parametrize("method", ["send_and_broadcast", "send_and_broadcast_channel"])
def test_all_recipients_get_the_same_frame_object(
    site: Site, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Frame] = []
    init = Frame.__init__

    def record(frame: Frame, text: bytes | None, *attachments: bytes) -> None:
        init(frame, text, *attachments)
        if text and b"hello" in text:
            made.append(frame)

    action()(lambda socket: getattr(socket, method)(("hello", b"!")))
    crowd = [*site.connect_several(4), site.connect(transport="polling")]
    for number, client in enumerate(crowd):
        for channel in ("even", "odd") if client is crowd[0] else (("even", "odd")[number % 2],):
            client.subscribe(channel)
    monkeypatch.setattr(Frame, "__init__", record)
    crowd[0].emit("do")
    for client in crowd:
        assert client.fence() == [["message", "hello", b"!"]]
    assert len(made) == 1


# Subscribing from the server


def test_the_server_subscribes_a_socket(site: Site) -> None:
    heard: list[str] = []
    results: list[bool] = []

    @action("join")
    def join(socket: Socket) -> None:
        results.append(socket.subscribe("room"))

    @action("leave")
    def leave(socket: Socket) -> None:
        results.append(socket.unsubscribe("room"))

    on_message(channel="room")(lambda request, socket, context, message: heard.append(message))
    action("tell")(lambda socket: socket.broadcast_channel("x", "room"))
    client, other = site.connect_several(2)
    client.send("before")
    client.call("join")
    client.call("join")
    client.send("during")
    other.call("tell")
    client.call("leave")
    client.call("leave")
    other.call("tell")
    client.send("after")
    assert client.fence() == [["message", "x"]]
    assert results == [True, False, True, False]
    assert heard == ["during"]


def test_on_connect_may_subscribe(site: Site) -> None:
    on_connect(lambda request, socket, context: socket.subscribe("room") and None)
    action()(lambda socket: socket.broadcast_channel("x", "room"))
    client, other = site.connect_several(2)
    client.call("do")
    assert other.fence() == [["message", "x"]]


def test_a_socket_acts_for_others_outside_of_handlers(site: Site) -> None:
    """A handler may leave its socket to a greenlet."""
    done = Event()

    @on_event("later")
    def later(request: Any, socket: Any, context: Any) -> None:
        def act() -> None:
            gevent.sleep(0)
            socket.subscribe("room")
            socket.send("later")
            assert socket.call("ask") == "answer"
            done.set()

        gevent.spawn(act)

    client = site.connect()
    client.emit("later")
    assert client.event() == ["message", "later"]
    client.ack(client.asked(), "answer")
    assert done.wait(clients.TIMEOUT)


# call()


@TRANSPORTS
@pytest.mark.parametrize(
    ("acked", "value"),
    [
        ((), None),
        ((None,), None),
        (("yes",), "yes"),
        (([1, 2],), [1, 2]),
        ((1, 2), (1, 2)),
        ((b"bytes",), b"bytes"),
        (({"a": b"b"}, 2), ({"a": b"b"}, 2)),
    ],
)
def test_call_returns_the_clients_ack(
    site: Site, transport: str, acked: tuple[Any, ...], value: Any
) -> None:
    results: list[Any] = []
    action()(lambda socket: results.append(socket.call("ask", 1, b"2")))
    client = site.connect(transport=transport)
    id_ = client.request("do")
    question = client.asked()
    assert question.data == ["ask", 1, b"2"]
    client.ack(question, *acked)
    assert client.acked(id_) == ["done"]
    assert results == [value]


def test_several_calls_at_once_get_their_own_answers(site: Site) -> None:
    results: dict[int, Any] = {}

    @action()
    def ask(socket: Socket) -> None:
        def call(number: int) -> None:
            results[number] = socket.call("ask", number)

        gevent.joinall([gevent.spawn(call, number) for number in range(3)], raise_error=True)

    client = site.connect()
    id_ = client.request("do")
    questions = [client.asked() for _ in range(3)]
    for question in reversed(questions):
        client.ack(question, question.data[1] * 10)
    assert client.acked(id_) == ["done"]
    assert results == {0: 0, 1: 10, 2: 20}


def test_call_times_out(site: Site) -> None:
    results: list[Any] = []

    @action()
    def ask(socket: Socket) -> None:
        with pytest.raises(TimeoutError, match=r"No ack for 'ask' from .* in 0\.\d+ seconds"):
            socket.call("ask", timeout=2 * UNIT)
        results.append(socket.call("ask again"))

    client = site.connect()
    id_ = client.request("do")
    late, again = client.asked(), client.asked()
    client.ack(late, "too late")
    client.ack(again, "in time")
    client.ack(again, "twice")
    assert client.acked(id_) == ["done"]
    assert results == ["in time"]
    assert client.fence() == []


@pytest.mark.parametrize("end", ["drop", "disconnect"])
def test_call_to_a_client_that_goes_away(site: Site, end: str) -> None:
    errors: list[BaseException] = []

    @action()
    def ask(socket: Socket) -> None:
        with pytest.raises(NoSocket) as error:
            socket.call("ask")
        errors.append(error.value)

    client = site.connect()
    client.request("do")
    client.asked()
    if end == "drop":
        client.connection.drop()
    else:
        client.disconnect()
    wait_until(lambda: errors)
    assert client.sid in str(errors[0])


def test_call_to_a_client_that_is_gone(site: Site) -> None:
    errors: list[BaseException] = []

    @on_disconnect
    def ask(request: Any, socket: Any, context: Any) -> None:
        with pytest.raises(NoSocket) as error:
            socket.call("ask")
        errors.append(error.value)

    site.connect().close()
    wait_until(lambda: errors)


def test_call_in_on_connect_would_wait_forever(site: Site) -> None:
    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        with pytest.raises(RuntimeError, match="on_connect"):
            socket.call("ask")

    assert site.connect().fence() == []


def test_call_waits_while_others_are_served(site: Site) -> None:
    action()(lambda socket: socket.call("ask"))
    client, other = site.connect_several(2)
    id_ = client.request("do")
    question = client.asked()
    assert other.fence() == []
    client.ack(question)
    assert client.acked(id_) == ["done"]


def test_the_answer_to_a_call_is_heard_behind_a_crowd_of_events(site: Site) -> None:
    results: list[Any] = []
    heard: list[Any] = []
    action()(lambda socket: results.append(socket.call("ask")))
    on_message(lambda request, socket, context, message: heard.append(message))
    client = site.connect()
    id_ = client.request("do")
    question = client.asked()
    for number in range(500):
        client.send(number)
    client.ack(question, "answer")
    assert client.acked(id_) == ["done"]
    assert results == ["answer"]
    assert client.fence() == []
    assert heard == list(range(500))


@pytest.mark.parametrize("id", [0, 1, 99, 2**53])
def test_an_ack_that_nobody_asked_for_is_dropped(
    site: Site, id: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    client = site.connect()
    client.connection.write(clients.ACK, "/", id, ["x"])
    assert client.fence() == []
    assert not caplog.records
