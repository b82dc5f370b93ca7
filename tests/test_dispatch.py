"""From what a client sends to handlers and back: connecting, messages, acks, channels, the end."""

import contextlib
import contextvars
import logging
import time
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from django.core.exceptions import PermissionDenied
from django.utils import translation
from gevent.event import Event

from django_socketio import (
    BackendError,
    ConnectionRefused,
    NoSocket,
    broadcast as broadcast_all,
    broadcast_channel,
    send as send_to,
)
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
from tests import clients
from tests.clients import CONNECT_ERROR, EVENT, Client, Lost, Refused
from tests.sites import Site, settings
from tests.support import UNIT, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])


def endings() -> list[tuple[Any, ...]]:
    """Bind handlers that note each step of a socket's end, and return the list they note in."""
    steps: list[tuple[Any, ...]] = []

    @on_disconnect
    def disconnected(request: Any, socket: Any, context: Any) -> None:
        steps.append(("disconnect", socket.disconnect_reason))

    @on_unsubscribe
    def unsubscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        steps.append(("unsubscribe", channel))

    @on_finish
    def finished(request: Any, socket: Any, context: Any) -> None:
        steps.append(("finish", socket.disconnect_reason))

    return steps


def wait_for_finish(steps: list[tuple[Any, ...]]) -> None:
    wait_until(lambda: steps and steps[-1][0] == "finish", what="on_finish")


def gone(site: Site) -> bool:
    """Tell whether the server knows that all its clients are gone."""
    return all(session.reason for session in site.dispatcher.engine.sessions.values())


# Messages


@TRANSPORTS
@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        ((), None),
        (("hello",), "hello"),
        ((None,), None),
        ((0,), 0),
        (([1, 2],), [1, 2]),
        (({"a": [True, 1.5]},), {"a": [True, 1.5]}),
        (("a", 2), ("a", 2)),
        (([1], None, {}), ([1], None, {})),
        ((b"\x00\xff",), b"\x00\xff"),
        (({"file": b"abc"}, "name"), ({"file": b"abc"}, "name")),
        (("ünï ✓ 😀 \u2028",), "ünï ✓ 😀 \u2028"),
    ],
)
def test_a_message_is_what_javascript_sent(
    site: Site, transport: str, sent: tuple[Any, ...], heard: Any
) -> None:
    messages: list[Any] = []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        messages.append(message)

    client = site.connect(transport=transport)
    client.send(*sent)
    client.fence()
    assert messages == [heard]
    assert type(messages[0]) is type(heard)


@TRANSPORTS
def test_an_event_has_the_arguments_that_were_emitted(site: Site, transport: str) -> None:
    heard: list[tuple[Any, ...]] = []

    @on_event("move")
    def move(request: Any, socket: Any, context: Any, *args: Any) -> None:
        heard.append(args)

    client = site.connect(transport=transport)
    expected: list[tuple[Any, ...]] = [(), (1,), ([1],), (1, None, "x"), ({"b": b"1"}, b"2")]
    for args in expected:
        client.emit("move", *args)
    client.fence()
    assert heard == expected


def test_a_handler_whose_arguments_do_not_fit_fails_like_any_other(site: Site) -> None:
    errors: list[BaseException] = []
    on_error(lambda request, socket, context, error: errors.append(error))

    @on_event("move")
    def move(request: Any, socket: Any, context: Any, x: int) -> int:
        return x

    client = site.connect()
    client.emit("move", 1, 2)
    assert client.call("move", 3) == [3]
    assert [type(error) for error in errors] == [TypeError]


# Acks


@TRANSPORTS
@pytest.mark.parametrize(
    ("returned", "ack"),
    [
        (None, []),
        ("yes", ["yes"]),
        (0, [0]),
        (False, [False]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [1, 2]),
        ((), []),
        ((None,), [None]),
        ({"a": b"bytes"}, [{"a": b"bytes"}]),
        ((b"a", b"b"), [b"a", b"b"]),
    ],
)
def test_what_a_handler_returns_is_the_ack(
    site: Site, transport: str, returned: Any, ack: list[Any]
) -> None:
    on_event("ask")(lambda request, socket, context: returned)
    on_message(lambda request, socket, context, message: returned)
    client = site.connect(transport=transport)
    assert client.call("ask") == ack
    assert client.call("message", "x") == ack


def answer(value: Any) -> Callable[..., Any]:
    def handler(*args: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return handler


FAIL = RuntimeError("a handler that fails")


@pytest.mark.parametrize("event", ["ask", "message"])
@pytest.mark.parametrize(
    ("returned", "ack"),
    [
        ((None, "b", "c"), ["b"]),
        ((None, None), []),
        ((0, "b"), [0]),
        ((False, None), [False]),
        ((FAIL, "b"), ["b"]),
        (("a", FAIL), ["a"]),
        ((None, FAIL, "c"), ["c"]),
    ],
)
def test_the_first_that_is_not_none_is_the_ack(
    site: Site, event: str, returned: tuple[Any, ...], ack: list[Any]
) -> None:
    for value in returned:
        on_event(event)(answer(value))
    assert site.connect().call(event, "x") == ack


@pytest.mark.parametrize(
    ("named", "general", "ack"),
    [(None, "b", ["b"]), ("a", "b", ["a"]), (FAIL, "b", ["b"]), ("a", FAIL, ["a"])]
    + [("a", None, ["a"]), (None, None, [])],
)
def test_message_may_be_bound_by_name_too(
    site: Site, named: Any, general: Any, ack: list[Any]
) -> None:
    on_event("message")(answer(named))
    on_message(answer(general))
    assert site.connect().call("message", "x") == ack


@pytest.mark.parametrize("event", ["ask", "message"])
@pytest.mark.parametrize("returned", [(FAIL,), (None, FAIL), (FAIL, None), (FAIL, FAIL)])
def test_a_handler_that_raises_gives_no_ack(
    site: Site, event: str, returned: tuple[Any, ...]
) -> None:
    for value in returned:
        on_event(event)(answer(value))
    client = site.connect()
    client.request(event, "x")
    client.fence()
    assert not [packet for packet in client._packets if packet.type == clients.ACK]


def test_an_event_without_an_ack_id_gets_none(site: Site) -> None:
    on_event("ask")(answer("unasked"))
    client = site.connect()
    client.emit("ask")
    client.fence()
    assert not client._packets


def test_only_those_who_hear_answer(site: Site) -> None:
    on_event("ask", channel="room")(answer("room"))
    on_event("ask")(answer("all"))
    client = site.connect()
    assert client.call("ask") == ["all"]
    client.subscribe("room")
    assert client.call("ask") == ["room"]


def test_an_ack_that_cannot_be_serialised_is_a_failure(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = []
    on_error(lambda request, socket, context, error: errors.append(error))
    on_event("ask")(answer(object()))
    client = site.connect()
    client.request("ask")
    assert client.fence() == []
    assert [type(error) for error in errors] == [TypeError]
    assert "ack" in caplog.text


# Handlers that raise


@pytest.mark.parametrize(
    "error",
    [
        LookupError("lost"),
        PermissionDenied("no"),
        ConnectionRefused("no"),
        gevent.Timeout(1),
        CancelledError(),
        SystemExit(1),
    ],
    ids=repr,
)
def test_a_handler_that_raises_is_logged_and_told_to_on_error(
    site: Site, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[BaseException] = []

    @on_error
    def told(request: Any, socket: Any, context: Any, exception: BaseException) -> None:
        heard.append(exception)
        socket.emit("sorry", type(exception).__name__)

    @on_event("fail")
    def fail(request: Any, socket: Any, context: Any) -> None:
        raise error

    client = site.connect()
    client.emit("fail")
    assert client.fence() == [["sorry", type(error).__name__]]
    assert heard == [error]
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "django_socketio.dispatch"
    assert "fail" in record.getMessage() and client.sid in record.getMessage()
    assert record.exc_info is not None and record.exc_info[1] is error


def test_an_error_handler_that_raises_is_logged_and_the_others_are_called(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[BaseException] = []

    @on_error
    def worse(request: Any, socket: Any, context: Any, exception: BaseException) -> None:
        raise ArithmeticError

    on_error(lambda request, socket, context, exception: heard.append(exception))
    on_event("fail")(answer(FAIL))
    client = site.connect()
    client.emit("fail")
    client.fence()
    assert heard == [FAIL]
    assert "An on_error handler failed" in caplog.text


def test_a_failing_handler_keeps_nobody_from_hearing(site: Site) -> None:
    heard: list[str] = []
    on_message(answer(FAIL))
    on_message(lambda request, socket, context, message: heard.append(message))
    client = site.connect()
    client.send("x")
    client.send("y")
    client.fence()
    assert heard == ["x", "y"]


def test_each_way_of_the_end_survives_a_failing_handler(site: Site) -> None:
    on_disconnect(answer(FAIL))
    on_unsubscribe(answer(FAIL))
    steps = endings()
    client = site.connect()
    client.subscribe("a")
    client.subscribe("b")
    client.close()
    wait_for_finish(steps)
    assert [step[0] for step in steps] == ["disconnect", "unsubscribe", "unsubscribe", "finish"]


# Connecting


def test_the_auth_payload_is_the_sockets(site: Site) -> None:
    auths: list[Any] = []
    on_connect(lambda request, socket, context: auths.append(socket.auth))
    site.connect(auth={"token": "x", "n": [1]})
    site.connect()
    assert auths == [{"token": "x", "n": [1]}, {}]


@TRANSPORTS
@pytest.mark.parametrize(
    ("refusal", "data"),
    [
        (False, {"message": "Connection refused"}),
        (ConnectionRefused(), {"message": "Connection refused"}),
        (ConnectionRefused("Not you"), {"message": "Not you"}),
        (ConnectionRefused("No", {"retry": [1]}), {"message": "No", "data": {"retry": [1]}}),
        (ConnectionRefused("No", data="why"), {"message": "No", "data": "why"}),
        (ConnectionRefused("No", 0), {"message": "No", "data": 0}),
        (PermissionDenied("Members only"), {"message": "Members only"}),
        (PermissionDenied(), {"message": "Connection refused"}),
        (RuntimeError("secret"), {"message": "Connection refused"}),
        (gevent.Timeout(1), {"message": "Connection refused"}),
        (ConnectionRefused("No", object()), {"message": "No"}),
    ],
    ids=repr,
)
def test_on_connect_refuses(
    site: Site, transport: str, refusal: Any, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    steps = endings()

    @on_connect
    def refuse(request: Any, socket: Any, context: Any) -> Any:
        socket.send("too early")
        socket.subscribe("room")
        socket.send_and_broadcast_channel("room")
        if isinstance(refusal, BaseException):
            raise refusal
        return refusal

    client = site.open(transport).request()
    client.emit("fence")  # to somebody who is not let in
    packet = client.packet()
    assert (packet.type, packet.data) == (CONNECT_ERROR, data)
    assert "secret" not in str(packet.data)
    assert not client._packets
    site.namespace("/other")
    assert client.connection.connect("/other").fence() == []  # nothing followed the refusal
    assert not client._packets
    assert not steps


@pytest.mark.parametrize("value", [None, True, 0, "", []])
def test_only_false_refuses(site: Site, value: Any) -> None:
    on_connect(lambda request, socket, context: value)
    assert site.connect().sid


def test_a_refused_client_may_ask_again(site: Site) -> None:
    asked: list[Any] = []

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> Any:
        asked.append(socket)
        return len(asked) > 1

    connection = site.open()
    with pytest.raises(Refused):
        connection.connect()
    assert connection.connect().sid == asked[1].session.session_id


def test_the_first_refusal_ends_the_asking(site: Site) -> None:
    asked: list[int] = []

    def ask(number: int, returned: Any) -> None:
        on_connect(lambda *args: [asked.append(number), returned][1])

    ask(1, None)
    ask(2, False)
    ask(3, None)
    with pytest.raises(Refused):
        site.connect()
    assert asked == [1, 2]


def test_a_connect_handler_that_crashes_is_logged_and_told_to_on_error(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = []
    on_error(lambda request, socket, context, error: errors.append(error))
    on_connect(answer(FAIL))
    with pytest.raises(Refused):
        site.connect()
    assert errors == [FAIL]
    assert FAIL.args[0] in caplog.text


@pytest.mark.parametrize("error", [SystemExit(1), CancelledError("gone")], ids=repr)
def test_a_connect_handler_that_calls_for_the_end_has_not_let_in(
    site: Site, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[BaseException] = []
    on_error(lambda request, socket, context, error: heard.append(error))

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        if not heard:
            raise error

    connection = site.open()
    with pytest.raises(Refused):
        connection.connect()
    assert heard == [error]
    assert "connected failed" in caplog.text
    assert connection.connect().fence() == []


def test_nothing_reaches_a_client_before_it_is_accepted(site: Site) -> None:
    deciding, decide = Event(), Event()
    ids: list[str] = []

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        if socket.auth:
            ids.append(socket.session.session_id)
            socket.subscribe("room")
            socket.send("first")
            socket.emit("second", b"2")
            deciding.set()
            decide.wait()
            socket.send_and_broadcast("third")

    other = site.connect()
    client = site.open().request(auth={"slow": True})
    assert deciding.wait(clients.TIMEOUT)
    broadcast_all("to all")
    broadcast_channel("to the room", "room")
    with pytest.raises(NoSocket):
        send_to(ids[0], "to it")
    assert other.fence() == [["message", "to all"]]
    with pytest.raises(TimeoutError):
        client.packet(timeout=UNIT)
    decide.set()
    client.accepted()
    assert client.fence() == [
        ["message", "first"],
        ["second", b"2"],
        ["message", "to the room"],
        ["message", "third"],
    ]
    assert other.fence() == [["message", "third"]]


def test_what_a_client_sends_while_on_connect_decides_is_heard_after_it(site: Site) -> None:
    decide = Event()
    heard: list[Any] = []

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        decide.wait()
        heard.append("connected")

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        heard.append(message)

    client = site.open().request()
    client.send("early")
    id_ = client.request("__subscribe__", "room")
    wait_until(lambda: len(next(iter(site.dispatcher.connections))._inbox or ()) == 2)
    assert heard == []
    decide.set()
    client.accepted()
    assert client.acked(id_) == [{"ok": True}]
    assert heard == ["connected", "early"]


@TRANSPORTS
def test_a_client_that_leaves_while_on_connect_decides_is_disconnected_after_it(
    site: Site, transport: str
) -> None:
    deciding, decide = Event(), Event()
    steps = endings()

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        socket.subscribe("room")
        deciding.set()
        decide.wait()
        steps.append(("connect",))

    client = site.open(transport).request()
    assert deciding.wait(clients.TIMEOUT)
    client.close()
    wait_until(lambda: gone(site))
    assert steps == []
    decide.set()
    wait_for_finish(steps)
    reason = "transport close"
    assert steps == [
        ("connect",),
        ("disconnect", reason),
        ("unsubscribe", "room"),
        ("finish", reason),
    ]
    with pytest.raises(NoSocket):
        broadcast_channel("x", "room")


def test_on_connect_may_disconnect_the_socket(site: Site) -> None:
    steps = endings()
    on_connect(lambda request, socket, context: socket.disconnect())
    with pytest.raises(Refused):
        site.connect()
    site.namespace("/other")
    site.connect("/other").fence()
    assert not steps


def test_connecting_twice_to_a_namespace_is_a_parse_error(site: Site) -> None:
    steps = endings()
    client = site.connect()
    client.connection.write(clients.CONNECT, "/")
    client.connection.wait_for_end()
    wait_for_finish(steps)
    assert steps == [("disconnect", "parse error"), ("finish", "parse error")]


@TRANSPORTS
@pytest.mark.parametrize("namespace", ["", "/other,"])
def test_attachments_before_connecting_are_a_parse_error(
    site: Site, transport: str, namespace: str
) -> None:
    """Else anybody could have us keep what nobody will ever ask for."""
    open_ = site.open(transport)
    (connection,) = site.dispatcher.connections
    with contextlib.suppress(Lost):
        open_.transport.send(f'451-{namespace}["message",{{"_placeholder":true,"num":0}}]')
        open_.wait_for_end()
    wait_until(lambda: site.dispatcher.engine.counters["closed: parse error"])
    wait_until(lambda: not site.dispatcher.connections)
    assert connection._pending is None and not connection.sockets
    assert site.connect().fence() == []


@TRANSPORTS
@settings(SOCKETIO_CONNECT_TIMEOUT=2 * UNIT)
def test_a_client_that_connects_to_no_namespace_is_closed(site: Site, transport: str) -> None:
    asked: list[Any] = []
    on_connect(lambda request, socket, context: asked.append(socket) or False)
    silent = site.open(transport)
    refused = site.open(transport)
    unknown = site.open(transport)
    refused.request()
    unknown.request("/nowhere")
    for connection in (silent, refused, unknown):
        connection.wait_for_end()
    wait_until(lambda: not site.dispatcher.connections)
    assert site.dispatcher.engine.counters["closed: connect timeout"] == 3
    assert len(asked) == 1


@settings(SOCKETIO_CONNECT_TIMEOUT=2 * UNIT)
def test_a_client_that_left_its_last_namespace_has_the_timeout_again(site: Site) -> None:
    steps = endings()
    client = site.connect()
    started = time.monotonic()
    client.disconnect()
    client.connection.wait_for_end()
    assert time.monotonic() - started >= 2 * UNIT
    assert site.dispatcher.engine.counters["closed: connect timeout"] == 1
    reason = "client namespace disconnect"
    assert steps == [("disconnect", reason), ("finish", reason)]


@settings(SOCKETIO_CONNECT_TIMEOUT=2 * UNIT)
def test_a_slow_on_connect_is_no_connect_timeout(site: Site) -> None:
    on_connect(lambda request, socket, context: gevent.sleep(4 * UNIT))
    client = site.connect()
    assert client.fence() == []


# Subscribing


@TRANSPORTS
def test_subscribing_and_unsubscribing(site: Site, transport: str) -> None:
    heard: list[tuple[str, str, list[str]]] = []

    @on_subscribe
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("+", channel, socket.channels))

    @on_unsubscribe
    def unsubscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("-", channel, socket.channels))

    client = site.connect(transport=transport)
    assert client.subscribe("room") == {"ok": True}
    broadcast_channel("one", "room")
    assert client.event() == ["message", "one"]
    assert client.unsubscribe("room") == {"ok": True}
    with pytest.raises(NoSocket):
        broadcast_channel("two", "room")
    assert client.fence() == []
    assert heard == [("+", "room", []), ("-", "room", [])]


def test_subscribing_without_an_ack(site: Site) -> None:
    client = site.connect()
    client.emit("__subscribe__", "room")
    client.fence()
    broadcast_channel("x", "room")
    assert client.fence() == [["message", "x"]]
    client.emit("__unsubscribe__", "room")
    client.emit("__subscribe__", "")
    assert client.fence() == []
    with pytest.raises(NoSocket):
        broadcast_channel("x", "room")


def test_subscribing_twice_is_one_subscription(site: Site) -> None:
    heard: list[str] = []
    on_subscribe(lambda request, socket, context, channel: heard.append(f"+{channel}"))
    on_unsubscribe(lambda request, socket, context, channel: heard.append(f"-{channel}"))
    client = site.connect()
    assert client.subscribe("room") == client.subscribe("room") == {"ok": True}
    broadcast_channel("x", "room")
    assert client.fence() == [["message", "x"]]
    assert client.unsubscribe("room") == client.unsubscribe("room") == {"ok": True}
    assert heard == ["+room", "-room"]


def test_unsubscribing_from_what_was_never_subscribed_calls_nobody(site: Site) -> None:
    heard: list[str] = []
    on_unsubscribe(lambda request, socket, context, channel: heard.append(channel))
    assert site.connect().unsubscribe("room") == {"ok": True}
    assert heard == []


@TRANSPORTS
@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (False, "Permission denied"),
        (PermissionDenied(), "Permission denied"),
        (PermissionDenied("Members only"), "Members only"),
        (RuntimeError("secret"), "The server could not decide"),
        (gevent.Timeout(1), "The server could not decide"),
        (CancelledError(), "The server could not decide"),
        (SystemExit(1), "The server could not decide"),
    ],
    ids=repr,
)
def test_on_subscribe_refuses(site: Site, transport: str, refusal: Any, error: str) -> None:
    heard: list[str] = []

    @on_subscribe(channel="private")
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> Any:
        with pytest.raises(NoSocket):
            broadcast_channel("not for you", "private")
        if isinstance(refusal, BaseException):
            raise refusal
        return refusal

    on_unsubscribe(lambda request, socket, context, channel: heard.append(channel))
    client = site.connect(transport=transport)
    assert client.subscribe("private") == {"ok": False, "error": error}
    assert client.subscribe("public") == {"ok": True}
    with pytest.raises(NoSocket):
        broadcast_channel("not for you", "private")
    assert client.fence() == []
    client.close()
    wait_until(lambda: heard)
    assert heard == ["public"]


def test_a_refused_channel_is_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "django_socketio.dispatch")

    @on_subscribe
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        raise PermissionDenied("Members only")

    client = site.connect()
    client.subscribe("private")
    (record,) = [r for r in caplog.records if r.name == "django_socketio.dispatch"]
    assert record.levelno == logging.INFO
    assert record.getMessage() == f"Refused {client.sid} the channel 'private': Members only"


@pytest.mark.parametrize("value", [None, True, 0, ""])
def test_only_false_refuses_a_subscription(site: Site, value: Any) -> None:
    on_subscribe(lambda request, socket, context, channel: value)
    assert site.connect().subscribe("room") == {"ok": True}


def test_all_on_subscribe_handlers_must_agree(site: Site) -> None:
    on_subscribe(lambda *args: None)
    on_subscribe(lambda *args: False)
    assert site.connect().subscribe("room")["ok"] is False


def test_no_message_of_the_channel_arrives_before_the_subscription_is_granted(site: Site) -> None:
    asked, decide = Event(), Event()

    @on_subscribe
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        asked.set()
        decide.wait()

    client = site.connect()
    id_ = client.request("__subscribe__", "room")
    assert asked.wait(clients.TIMEOUT)
    with pytest.raises(NoSocket):
        broadcast_channel("early", "room")
    decide.set()
    assert client.acked(id_) == [{"ok": True}]
    broadcast_channel("late", "room")
    assert client.fence() == [["message", "late"]]


def test_a_subscription_that_crashed_is_logged_and_told_to_on_error(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = []
    on_error(lambda request, socket, context, error: errors.append(error))
    on_subscribe(answer(FAIL))
    site.connect().subscribe("room")
    assert errors == [FAIL]
    assert FAIL.args[0] in caplog.text


@pytest.mark.parametrize(
    "channel",
    ["", "x" * 256, "a\nb", "a\x00", "\x7f", "\u2028", None, 1, True, [], ["room"], {}, b"room"],
)
def test_what_is_no_channel_is_refused(site: Site, channel: Any) -> None:
    heard: list[Any] = []
    on_subscribe(lambda request, socket, context, channel: heard.append(channel))
    client = site.connect()
    error = {"ok": False, "error": "A channel is a printable string of 1 to 255 characters."}
    assert client.subscribe(channel) == error
    assert client.unsubscribe(channel) == error
    assert heard == []


@pytest.mark.parametrize("args", [(), ("a", "b")])
def test_subscribing_takes_one_channel(site: Site, args: tuple[str, ...]) -> None:
    client = site.connect()
    for name in ("__subscribe__", "__unsubscribe__"):
        (answered,) = client.call(name, *args)
        assert answered["ok"] is False and "channel" in answered["error"]


@pytest.mark.parametrize("channel", ["x" * 255, "a b", "/", ",", "räume-😀", "c/,room"])
def test_what_is_a_channel(site: Site, channel: str) -> None:
    client = site.connect()
    assert client.subscribe(channel) == {"ok": True}
    broadcast_channel("x", channel)
    assert client.fence() == [["message", "x"]]


def test_a_backend_that_is_down_refuses_for_now(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a client takes for the last word, the server must not say."""

    def down(topics: Any) -> None:
        raise BackendError("no route")

    steps = endings()
    client = site.connect()
    monkeypatch.setattr(site.dispatcher.hub.backend, "subscribe", down)
    answered = client.subscribe("room")
    error = "The server cannot reach its backend"
    assert answered == {"ok": False, "error": error, "retry": True}
    assert "retry" not in client.subscribe("")
    newcomer = site.open()
    newcomer.request()
    newcomer.wait_for_end()
    wait_for_finish(steps)
    assert {step[-1] for step in steps} == {"backend down"}
    assert client.fence() == []
    assert "no route" in caplog.text


def test_a_handler_that_ends_its_greenlet_does_not_end_its_client(site: Site) -> None:
    steps = endings()

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        raise gevent.GreenletExit

    client = site.connect()
    client.send("x")
    assert client.fence() == []
    client.close()
    wait_for_finish(steps)
    assert [step[0] for step in steps] == ["disconnect", "finish"]


# The end


def leave_namespace(client: Client) -> None:
    client.disconnect()


def say_goodbye(client: Client) -> None:
    client.connection.close()


def hang_up(client: Client) -> None:
    client.connection.drop()


def break_the_protocol(client: Client) -> None:
    client.connection.transport.send("42nonsense")


ENDINGS = {
    "client namespace disconnect": leave_namespace,
    "transport close": say_goodbye,
    "transport close ": hang_up,
    "parse error": break_the_protocol,
}


@TRANSPORTS
@pytest.mark.parametrize("reason", ENDINGS)
def test_a_client_that_ends_is_told_about_once(site: Site, transport: str, reason: str) -> None:
    steps = endings()
    other = site.connect()
    client = site.connect(transport=transport)
    for channel in ("a", "b"):
        client.subscribe(channel)
    poll = None
    if reason == "transport close " and transport == "polling":
        # A poll must wait, for nobody sees that a client without a connection is gone.
        poll = gevent.spawn(client.connection.wait_for_end)
        (session,) = [
            session
            for session in site.dispatcher.engine.sessions.values()
            if session.transport.name == "polling"
        ]
        wait_until(lambda: session.transport.polled)
        poll.kill()
    try:
        ENDINGS[reason](client)
    except Lost:
        assert reason == "parse error"  # that is the answer to the POST
    wait_for_finish(steps)
    reason = reason.strip()
    assert steps == [
        ("disconnect", reason),
        ("unsubscribe", "a"),
        ("unsubscribe", "b"),
        ("finish", reason),
    ]
    client.connection.drop()
    assert other.fence() == []
    wait_until(lambda: len(site.dispatcher.connections) == 1 or reason.startswith("client"))
    assert steps[-1] == ("finish", reason) and len(steps) == 4


@TRANSPORTS
@settings(SOCKETIO_PING_INTERVAL=2 * UNIT, SOCKETIO_PING_TIMEOUT=2 * UNIT)
def test_a_client_that_answers_no_ping_is_ended(site: Site, transport: str) -> None:
    steps = endings()
    client = site.connect(transport=transport)
    client.subscribe("room")
    client.connection.answers_pings = False
    wait_for_finish(steps)
    reason = "ping timeout"
    assert steps == [("disconnect", reason), ("unsubscribe", "room"), ("finish", reason)]


@TRANSPORTS
@settings(SOCKETIO_PING_INTERVAL=2 * UNIT, SOCKETIO_PING_TIMEOUT=4 * UNIT)
def test_a_client_that_answers_pings_lives(site: Site, transport: str) -> None:
    steps = endings()
    client = site.connect(transport=transport)
    late = gevent.spawn_later(12 * UNIT, send_to, client.sid, "late")
    assert client.event() == ["message", "late"]  # pings are answered while it waits
    late.get()
    assert client.fence() == []
    assert steps == []


@TRANSPORTS
def test_the_server_ends_a_socket(site: Site, transport: str) -> None:
    steps = endings()

    @on_event("leave")
    def leave(request: Any, socket: Any, context: Any) -> str:
        socket.send("goodbye")
        socket.disconnect()
        socket.disconnect()
        socket.send("dropped")
        return "no ack after the end"

    site.namespace("/other")
    client = site.connect(transport=transport)
    client.subscribe("room")
    client.request("leave")
    assert client.event() == ["message", "goodbye"]
    assert client.packet().type == clients.DISCONNECT
    wait_for_finish(steps)
    reason = "server namespace disconnect"
    assert steps == [("disconnect", reason), ("unsubscribe", "room"), ("finish", reason)]
    # The connection itself lives on.
    assert client.connection.connect("/other").fence() == []
    assert not client._packets


@settings(SOCKETIO_MAX_BUFFER=100_000)
def test_a_client_that_does_not_read_is_ended(site: Site) -> None:
    steps = endings()
    slow, other = site.connect_several(2)
    for client in (slow, other):
        client.subscribe("room")
    text = "x" * 10_000
    sent = 0
    while not steps:
        broadcast_channel(text, "room")
        sent += 1
        assert other.event() == ["message", text]
        assert sent < 10_000
    wait_for_finish(steps)
    reason = "slow consumer"
    assert steps == [("disconnect", reason), ("unsubscribe", "room"), ("finish", reason)]
    assert other.fence() == []


@settings(SOCKETIO_MAX_BUFFER=10_000)
def test_a_client_that_does_not_poll_is_ended(site: Site) -> None:
    steps = endings()
    client = site.connect(transport="polling")
    for _ in range(10):
        try:
            send_to(client.sid, "x" * 2_000)
        except NoSocket:
            break
    wait_for_finish(steps)
    assert steps == [("disconnect", "slow consumer"), ("finish", "slow consumer")]


@TRANSPORTS
def test_much_that_is_sent_before_a_client_is_let_in_arrives(site: Site, transport: str) -> None:
    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        for number in range(1500):
            socket.send(number)

    assert site.connect(transport=transport).fence() == [["message", n] for n in range(1500)]


def test_a_client_that_is_sent_too_much_before_it_is_let_in_is_refused(site: Site) -> None:
    """What waits for the word of `on_connect` has a bound too."""
    steps = endings()
    reasons: list[str] = []

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        for _ in range(10_000):
            socket.send("x" * 1000)
            if socket.disconnect_reason:
                break
        reasons.append(socket.disconnect_reason)

    with pytest.raises(Refused):
        site.connect()
    site.namespace("/other")
    site.connect("/other").fence()
    assert reasons == ["slow consumer"]
    assert steps == []


@TRANSPORTS
def test_a_server_that_stops_ends_every_socket_first(site: Site, transport: str) -> None:
    steps = endings()
    client = site.connect(transport=transport)
    client.subscribe("room")
    site.stop()
    reason = "server shutting down"
    assert steps == [("disconnect", reason), ("unsubscribe", "room"), ("finish", reason)]
    if transport == "websocket":
        assert client.connection.wait_for_end().code == 1001


@TRANSPORTS
def test_each_namespace_ends_by_itself_and_all_with_the_connection(
    site: Site, transport: str
) -> None:
    ended: list[tuple[str, str, str]] = []
    for namespace in ("/", "/a", "/b"):
        site.namespace(namespace)
        for event in (on_disconnect, on_finish):
            event(namespace=namespace)(
                lambda request, socket, context, name=event.name: ended.append(
                    (socket.namespace, name, socket.disconnect_reason)
                )
            )
    connection = site.open(transport)
    for namespace in ("/", "/a", "/b"):
        connection.connect(namespace)
    connection.clients["/a"].disconnect()
    connection.clients["/"].fence()
    first = [("/a", name, "client namespace disconnect") for name in ("on_disconnect", "on_finish")]
    assert ended == first
    connection.close()
    wait_until(lambda: len(ended) == 6)
    rest = [
        (namespace, name, "transport close")
        for namespace in ("/", "/b")
        for name in ("on_disconnect", "on_finish")
    ]
    assert sorted(ended[2:]) == sorted(rest)


@TRANSPORTS
def test_what_was_sent_before_the_end_is_still_handled(site: Site, transport: str) -> None:
    steps = endings()
    begun, go_on = Event(), Event()

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        begun.set()
        go_on.wait()
        steps.append(("message", message))

    client = site.connect(transport=transport)
    for number in range(3):
        client.send(number)
    assert begun.wait(clients.TIMEOUT)
    client.close()
    wait_until(lambda: gone(site))
    assert steps == []
    go_on.set()
    wait_for_finish(steps)
    reason = "transport close"
    messages = [("message", number) for number in range(3)]
    assert steps == [*messages, ("disconnect", reason), ("finish", reason)]


def test_nobody_joins_a_channel_after_the_end(site: Site) -> None:
    outcome: list[Any] = []
    steps = endings()
    asked, decide = Event(), Event()

    @on_subscribe
    def subscribed(request: Any, socket: Any, context: Any, channel: str) -> None:
        steps.append(("subscribe", channel))
        asked.set()
        decide.wait()

    @on_disconnect
    @on_finish
    def late(request: Any, socket: Any, context: Any) -> None:
        outcome.append((socket.subscribe("late"), socket.channels))

    client = site.connect()
    client.request("__subscribe__", "asked")
    client.request("__subscribe__", "queued")
    assert asked.wait(clients.TIMEOUT)
    client.close()
    wait_until(lambda: gone(site))
    decide.set()
    wait_for_finish(steps)
    wait_until(lambda: len(outcome) == 2)
    assert [joined for joined, channels in outcome] == [False, False]
    assert not site.dispatcher.hub._members
    for channel in ("asked", "queued", "late"):
        with pytest.raises(NoSocket):
            broadcast_channel("x", channel)
    # Whoever was told of a subscription is told of its end.
    subscribed_to = {step[1] for step in steps if step[0] == "subscribe"}
    assert {step[1] for step in steps if step[0] == "unsubscribe"} == subscribed_to


def test_a_channel_that_is_left_at_the_end_is_left_once(site: Site) -> None:
    steps = endings()
    begun, go_on = Event(), Event()
    on_message(lambda request, socket, context, message: [begun.set(), go_on.wait()][0])
    client = site.connect()
    client.subscribe("room")
    client.send("x")
    client.emit("__unsubscribe__", "room")
    client.close()
    assert begun.wait(clients.TIMEOUT)
    wait_until(lambda: gone(site))
    go_on.set()
    wait_for_finish(steps)
    assert [step[0] for step in steps] == ["disconnect", "unsubscribe", "finish"]


def test_many_clients_leave_nothing_behind(site: Site) -> None:
    steps = endings()
    hub, engine = site.dispatcher.hub, site.dispatcher.engine
    for _ in range(50):
        client = site.connect()
        client.subscribe("room")
        client.close()
    wait_until(lambda: not site.dispatcher.connections)
    assert not hub._members and not engine.sessions
    assert [step[0] for step in steps].count("finish") == 50
    assert len(steps) == 150


# One at a time, in order


def test_context_is_one_dict_per_connection(site: Site) -> None:
    @on_event("count")
    def count(request: Any, socket: Any, context: dict[str, int]) -> int:
        context["n"] = context.get("n", 0) + 1
        return context["n"]

    one, other = site.connect_several(2)
    assert [one.call("count"), one.call("count"), other.call("count")] == [[1], [2], [1]]


def test_handlers_of_one_connection_run_one_at_a_time_and_in_order(site: Site) -> None:
    running = 0
    heard: list[Any] = []

    @on_message
    @on_event("other")
    def handler(request: Any, socket: Any, context: Any, message: Any) -> None:
        nonlocal running
        running += 1
        gevent.sleep(0)
        gevent.sleep(UNIT / 50)
        heard.append((message, running))
        running -= 1

    client = site.connect()
    for number in range(20):
        client.emit("other" if number % 2 else "message", number)
    client.fence()
    assert heard == [(number, 1) for number in range(20)]


def test_handlers_of_one_connection_take_turns_over_its_namespaces(site: Site) -> None:
    running: list[str] = []
    most = 0

    def handler(request: Any, socket: Any, context: Any, message: Any) -> None:
        nonlocal most
        running.append(socket.namespace)
        most = max(most, len(running))
        gevent.sleep(UNIT / 10)
        running.remove(socket.namespace)

    on_message(handler)
    on_message(namespace="/chat")(handler)
    site.namespace("/chat")
    connection = site.open()
    both = [connection.connect("/"), connection.connect("/chat")]
    for _ in range(3):
        for client in both:
            client.send("x")
    for client in both:
        client.fence()
    assert most == 1


def test_a_handler_that_waits_holds_up_its_own_connection_only(site: Site) -> None:
    go_on = Event()
    on_event("wait")(lambda request, socket, context: [go_on.wait(), "waited"][1])
    on_event("echo")(lambda request, socket, context, value: value)
    slow, *others = site.connect_several(4)
    waiting, echo = slow.request("wait"), slow.request("echo", 1)
    for client in others:
        assert client.call("echo", 2) == [2]
    with pytest.raises(TimeoutError):
        slow.acked(echo, timeout=UNIT)
    go_on.set()
    assert slow.acked(waiting) == ["waited"]
    assert slow.acked(echo) == [1]


def test_many_handlers_may_wait_at_once(site: Site) -> None:
    waiting = 0
    go_on = Event()

    @on_event("wait")
    def wait(request: Any, socket: Any, context: Any) -> str:
        nonlocal waiting
        waiting += 1
        go_on.wait()
        return "done"

    crowd = site.connect_several(30)
    ids = [client.request("wait") for client in crowd]
    wait_until(lambda: waiting == 30)
    go_on.set()
    assert [client.acked(id_) for client, id_ in zip(crowd, ids, strict=True)] == [["done"]] * 30


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_context_variables_do_not_leak(site: Site) -> None:
    found: list[str] = []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        found.append(variable.get())
        variable.set(message)
        gevent.sleep(0)
        assert variable.get() == message

    one, other = site.connect_several(2)
    for _ in range(2):
        one.send("one")
        other.send("other")
        one.fence()
        other.fence()
    assert found == ["unset"] * 4
    assert variable.get() == "unset"


def test_a_translation_does_not_leak(site: Site) -> None:
    @on_event("language")
    def language(request: Any, socket: Any, context: Any, activate: str | None) -> str:
        before = translation.get_language()
        if activate:
            translation.activate(activate)
            gevent.sleep(0)
        return before

    one, other = site.connect_several(2)
    assert one.call("language", "de") == ["en-us"]
    assert one.call("language", None) == other.call("language", None) == ["en-us"]


# Back-pressure


@TRANSPORTS
def test_a_client_that_floods_is_held_back_and_loses_nothing(site: Site, transport: str) -> None:
    number, batch = 5000, 50
    go_on = Event()
    heard: list[int] = []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        go_on.wait()
        heard.append(message[0])

    client = site.connect(transport=transport)
    (connection,) = site.dispatcher.connections
    bulk = "x" * 1000
    packets = [clients.encode(EVENT, data=["message", n, bulk])[0] for n in range(number)]

    def flood() -> None:
        for start in range(0, number, batch):
            client.connection.transport.send(*packets[start : start + batch])

    flooding = gevent.spawn(flood)
    try:
        wait_until(lambda: connection.session.paused)
        most = len(connection._inbox or ())
        assert not flooding.ready()
        assert 100 <= most <= 1000
        go_on.set()
        flooding.get(timeout=clients.TIMEOUT)
    finally:
        flooding.kill()
    client.fence()
    assert heard == list(range(number))
    assert not connection.session.paused


def test_a_client_that_floods_keeps_nobody_waiting(site: Site) -> None:
    on_message(lambda request, socket, context, message: gevent.sleep(UNIT / 500))
    loud, other = site.connect_several(2)

    def flood() -> None:
        for number in range(2000):
            loud.send(number, "x" * 1000)

    flooding = gevent.spawn(flood)
    try:
        for _ in range(20):
            started = time.monotonic()
            assert other.fence() == []
            assert time.monotonic() - started < 20 * UNIT
    finally:
        flooding.kill()


def test_a_client_that_is_held_back_and_leaves_is_told_about(site: Site) -> None:
    steps = endings()
    go_on = Event()
    on_message(lambda request, socket, context, message: go_on.wait())
    client = site.connect()
    (connection,) = site.dispatcher.connections
    for number in range(200):
        client.send(number)
    wait_until(lambda: connection.session.paused)
    client.close()
    go_on.set()
    wait_for_finish(steps)
    assert steps == [("disconnect", "transport close"), ("finish", "transport close")]


@settings(SOCKETIO_PING_INTERVAL=2 * UNIT, SOCKETIO_PING_TIMEOUT=2 * UNIT)
def test_a_client_that_is_held_back_is_not_taken_for_dead(site: Site) -> None:
    steps = endings()
    go_on = Event()
    on_message(lambda request, socket, context, message: go_on.wait())
    client = site.connect()
    (connection,) = site.dispatcher.connections
    for number in range(200):
        client.send(number)
    wait_until(lambda: connection.session.paused)
    gevent.sleep(8 * UNIT)  # two periods of its heartbeat
    assert steps == []
    go_on.set()
    assert client.fence() == []
