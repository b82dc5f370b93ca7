"""Binding handlers: which are refused, and which events each is called for, with what."""

import re
from functools import partial
from typing import Any

import pytest
from django.http import HttpRequest

from django_socketio import EventError, events
from django_socketio.events import (
    on_connect,
    on_disconnect,
    on_error,
    on_event,
    on_finish,
    on_message,
    on_subscribe,
    on_unsubscribe,
)
from django_socketio.sockets import Socket
from tests import clients
from tests.clients import Refused
from tests.sites import Site
from tests.support import wait_until

EVENTS = (
    on_connect,
    on_message,
    on_subscribe,
    on_unsubscribe,
    on_error,
    on_disconnect,
    on_finish,
)
WITH_CHANNEL = [event for event in EVENTS if event is not on_connect]
RESERVED = (
    "connect",
    "connect_error",
    "disconnect",
    "disconnecting",
    "newListener",
    "removeListener",
    "__subscribe__",
    "__unsubscribe__",
)


def nothing(*args: Any) -> None:
    pass


# What is refused, in a sentence that names the fix


@pytest.mark.usefixtures("handlers")
class TestBinding:
    @pytest.mark.parametrize("event", EVENTS, ids=repr)
    def test_the_function_stays_what_it_was(self, event: Any) -> None:
        assert event(nothing) is nothing
        assert event()(nothing) is nothing
        assert event(namespace="/chat")(nothing) is nothing
        assert on_event("name")(nothing) is nothing

    def test_on_connect_takes_no_channel(self) -> None:
        with pytest.raises(EventError, match=r"^on_connect takes no channel.*nothing without one"):
            on_connect(channel="^room-")(nothing)

    @pytest.mark.parametrize("event", [*WITH_CHANNEL, partial(on_event, "name")], ids=repr)
    def test_a_channel_is_a_regular_expression(self, event: Any) -> None:
        with pytest.raises(EventError, match=r"room-\(.*nothing is no regular expression"):
            event(channel="room-(")(nothing)

    @pytest.mark.parametrize("name", RESERVED)
    def test_the_protocols_own_names_are_refused_at_decoration(self, name: str) -> None:
        with pytest.raises(EventError, match=f"^'{name}' .* choose another name"):
            on_event(name)

    def test_on_event_needs_a_name(self) -> None:
        with pytest.raises(EventError, match=r"@on_event\(\"name\"\)"):
            on_event(nothing)  # type: ignore[arg-type]

    @pytest.mark.parametrize("event", EVENTS, ids=repr)
    def test_what_is_no_function_is_refused(self, event: Any) -> None:
        with pytest.raises(EventError, match="decorates a function, not '\\^room-'"):
            event("^room-")

    @pytest.mark.parametrize("namespace", ["chat", "", "/a,b"])
    def test_a_namespace_begins_with_a_slash_and_has_no_comma(self, namespace: str) -> None:
        with pytest.raises(EventError, match="is no namespace for nothing"):
            on_message(namespace=namespace)(nothing)
        assert not events.registry.has_namespace(namespace)

    @pytest.mark.parametrize("event", [*EVENTS, on_event("name")], ids=repr)
    def test_an_async_function_is_refused(self, event: Any) -> None:
        async def handler(*args: Any) -> None:
            pass

        with pytest.raises(EventError, match=r"handler is async: .* are plain functions"):
            event(handler)

    def test_what_is_refused_is_not_bound(self) -> None:
        with pytest.raises(EventError):
            on_connect(channel="x", namespace="/chat")(nothing)
        assert not events.registry.has_namespace("/chat")
        assert not events.registry.get("on_connect", "/chat")


# Signatures


def test_each_handler_gets_what_its_signature_says(site: Site) -> None:
    heard: dict[str, tuple[Any, ...]] = {}

    def note(event: str) -> Any:
        def handler(*args: Any) -> None:
            heard[event] = args
            if event == "message":
                raise LookupError("for on_error")

        return handler

    on_connect(note("connect"))
    on_message(note("message"))
    on_event("move")(note("move"))
    on_subscribe(note("subscribe"))
    on_unsubscribe(note("unsubscribe"))
    on_error(note("error"))
    on_disconnect(note("disconnect"))
    on_finish(note("finish"))

    client = site.connect(auth={"token": 1})
    client.send("hello")
    client.emit("move", 3, {"y": 4})
    client.subscribe("room")
    client.unsubscribe("room")
    client.close()
    wait_until(lambda: "finish" in heard)

    request, socket, context = heard["connect"]
    assert isinstance(request, HttpRequest)
    assert isinstance(socket, Socket)
    assert context == {} and type(context) is dict
    error = heard["error"][3]
    assert isinstance(error, LookupError)
    rest = {
        "connect": (),
        "message": ("hello",),
        "move": (3, {"y": 4}),
        "subscribe": ("room",),
        "unsubscribe": ("room",),
        "error": (error,),
        "disconnect": (),
        "finish": (),
    }
    for event, args in heard.items():
        assert args[0] is request and args[1] is socket and args[2] is context, event
        assert args[3:] == rest[event], event
    assert set(heard) == set(rest)


def test_all_handlers_of_an_event_are_called_once_in_the_order_of_their_binding(
    site: Site,
) -> None:
    heard: list[tuple[str, int]] = []

    def note(event: str, number: int) -> Any:
        return lambda *args: heard.append((event, number))

    for number in range(3):
        for event in EVENTS:
            event(note(event.name, number))
        on_event("go")(note("go", number))

    @on_event("raise")
    def fail(request: Any, socket: Any, context: Any) -> None:
        raise RuntimeError

    client = site.connect()
    client.subscribe("room")
    client.emit("go")
    client.send(1)
    client.emit("raise")
    client.unsubscribe("room")
    client.fence()
    client.close()
    wait_until(lambda: ("on_finish", 2) in heard)
    order = (
        "on_connect",
        "on_subscribe",
        "go",
        "on_message",
        "on_error",
        "on_unsubscribe",
        "on_disconnect",
        "on_finish",
    )
    assert heard == [(event, number) for event in order for number in range(3)]


def test_one_function_may_hear_several_events(site: Site) -> None:
    @on_event("a")
    @on_event("b")
    @on_event("b", namespace="/chat")
    def handler(request: Any, socket: Any, context: Any) -> str:
        return str(socket.namespace)

    client = site.connect()
    assert client.call("a") == client.call("b") == ["/"]
    assert client.connection.connect("/chat").call("b") == ["/chat"]


# Channels


def test_a_handler_with_a_channel_hears_subscribers_of_a_matching_one(site: Site) -> None:
    heard: list[str] = []

    def note(name: str) -> Any:
        return lambda *args: heard.append(name)

    on_message(note("all"))
    on_message(channel="^room-")(note("^room-"))
    on_message(channel="room-")(note("room-"))
    on_message(channel="oom-1")(note("oom-1"))
    on_message(channel="room-1$")(note("room-1$"))
    on_message(channel=re.compile("ROOM-", re.IGNORECASE))(note("compiled"))
    on_event("go", channel="room-2")(note("go"))

    def after(*channels: str) -> list[str]:
        client = site.connect()
        for channel in channels:
            assert client.subscribe(channel) == {"ok": True}
        client.send("x")
        client.emit("go")
        client.fence()
        client.close()
        names, heard[:] = heard.copy(), []
        return names

    assert after() == ["all"]
    assert after("room-1") == ["all", "^room-", "room-", "room-1$", "compiled"]
    assert after("room-12") == ["all", "^room-", "room-", "compiled"]
    assert after("a room-1") == ["all"]
    assert after("other", "room-2") == ["all", "^room-", "room-", "compiled", "go"]


def test_a_handler_is_called_once_however_many_channels_match(site: Site) -> None:
    heard: list[str] = []

    @on_message(channel="room-")
    def handler(request: Any, socket: Any, context: Any, message: str) -> None:
        heard.append(message)

    client = site.connect()
    client.subscribe("room-1")
    client.subscribe("room-2")
    client.send("x")
    client.fence()
    assert heard == ["x"]


def test_subscribe_and_unsubscribe_match_the_channel_at_hand(site: Site) -> None:
    heard: list[tuple[str, str]] = []

    @on_subscribe(channel="room-")
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("+", channel))

    @on_unsubscribe(channel="room-")
    def unsubscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("-", channel))

    client = site.connect()
    for channel in ("room-1", "a room-1", "hall"):
        client.subscribe(channel)
    assert heard == [("+", "room-1")]
    client.unsubscribe("hall")  # of a socket that is in room-1 still
    assert heard == [("+", "room-1")]
    client.unsubscribe("room-1")
    assert heard == [("+", "room-1"), ("-", "room-1")]


def test_error_disconnect_and_finish_match_the_sockets_channels(site: Site) -> None:
    heard: list[str] = []
    for event in (on_error, on_disconnect, on_unsubscribe, on_finish):
        for channel in ("room-", "hall"):
            event(channel=channel)(
                lambda *args, it=f"{event.name} {channel}": heard.append(it)  # type: ignore[misc]
            )

    @on_finish
    def last(request: Any, socket: Any, context: Any) -> None:
        heard.append("last")

    @on_message
    def fail(request: Any, socket: Any, context: Any, message: Any) -> None:
        raise RuntimeError

    client = site.connect()
    client.subscribe("room-1")
    client.send("x")
    client.fence()
    client.close()
    wait_until(lambda: "last" in heard)
    assert heard == [
        "on_error room-",
        "on_disconnect room-",
        "on_unsubscribe room-",
        "on_finish room-",
        "last",
    ]


# Namespaces


def test_a_namespace_exists_when_a_handler_names_it(site: Site) -> None:
    connection = site.open()
    with pytest.raises(Refused) as refused:
        connection.connect("/chat")
    assert refused.value.data == {"message": "Invalid namespace"}
    on_disconnect(namespace="/chat")(nothing)
    assert connection.connect("/chat").sid
    with pytest.raises(Refused):
        connection.connect("/chat/2")


def test_the_root_exists_without_any_handler() -> None:
    with Site() as site:
        events.registry.__init__()  # type: ignore[misc]
        assert site.connect().sid


def test_handlers_hear_their_own_namespace_only(site: Site) -> None:
    heard: list[tuple[str, str, str]] = []

    def bind(namespace: str) -> None:
        def note(event: str) -> Any:
            return lambda request, socket, *args: heard.append((event, namespace, socket.namespace))

        on_connect(namespace=namespace)(note("connect"))
        on_message(namespace=namespace)(note("message"))
        on_event("go", namespace=namespace)(note("go"))
        on_subscribe(namespace=namespace)(note("subscribe"))
        on_unsubscribe(namespace=namespace)(note("unsubscribe"))
        on_disconnect(namespace=namespace)(note("disconnect"))
        on_finish(namespace=namespace)(note("finish"))

    for namespace in ("/", "/chat", "/chat/2"):
        bind(namespace)
        site.namespace(namespace)
    connection = site.open()
    for namespace in ("/chat", "/"):
        client = connection.connect(namespace)
        client.subscribe("room")
        client.emit("go")
        client.send("x")
        client.fence()
    connection.clients["/chat"].disconnect()
    wait_until(lambda: len(heard) == 11)
    expected = [("connect", "/chat"), ("subscribe", "/chat"), ("go", "/chat"), ("message", "/chat")]
    expected += [(event, "/") for event in ("connect", "subscribe", "go", "message")]
    expected += [(event, "/chat") for event in ("disconnect", "unsubscribe", "finish")]
    assert heard == [(event, namespace, namespace) for event, namespace in expected]


def test_each_namespace_of_a_client_has_its_own_socket_and_one_context(site: Site) -> None:
    sockets: dict[str, Any] = {}
    contexts: list[dict[Any, Any]] = []

    @on_connect
    @on_connect(namespace="/chat")
    def connected(request: Any, socket: Any, context: dict[Any, Any]) -> None:
        sockets[socket.namespace] = socket
        contexts.append(context)

    connection = site.open()
    ids = {name: connection.connect(name, {"for": name}).sid for name in ("/", "/chat")}
    assert sockets["/"] is not sockets["/chat"]
    assert contexts[0] is contexts[1]
    for name, socket in sockets.items():
        assert socket.namespace == name
        assert socket.session.session_id == ids[name]
        assert socket.auth == {"for": name}
    assert ids["/"] != ids["/chat"]


# Names that cannot be reached


@pytest.mark.parametrize("name", [name for name in RESERVED if not name.startswith("__")])
def test_a_client_that_emits_a_reserved_name_is_closed(site: Site, name: str) -> None:
    heard: list[Any] = []
    for event in EVENTS[1:]:
        event(lambda *args: heard.append(args))
    finished: list[str] = []
    on_finish(lambda request, socket, context: finished.append(socket.disconnect_reason))
    client = site.connect()
    other = site.connect()
    client.emit(name, "x")
    client.connection.wait_for_end()
    wait_until(lambda: finished)
    assert finished == ["parse error"]
    assert len(heard) == 2  # its own on_disconnect and on_finish, and nothing else
    assert other.fence() == []


@pytest.mark.parametrize(
    "name",
    ["on_connect", "on_message", "on_subscribe", "on_error", "on_finish", "finish", "error"]
    + ["subscribe", "event:go", "on_event", ""],
)
def test_no_name_of_an_event_reaches_the_lifecycle(site: Site, name: str) -> None:
    heard: list[str] = []

    def note(event: str) -> Any:
        return lambda *args: heard.append(event)

    for event in EVENTS:
        event(note(event.name))
    on_event("go")(note("go"))
    client = site.connect()
    client.emit(name, "room")
    assert client.fence() == []
    assert heard == ["on_connect"]


def test_an_event_that_nobody_binds_is_no_error_and_has_no_ack(site: Site) -> None:
    client = site.connect()
    client.request("unheard", 1)
    assert client.call("fence") == []
    assert not [packet for packet in client._packets if packet.type == clients.ACK]
