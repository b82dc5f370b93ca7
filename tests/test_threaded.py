"""Handlers in threads: they block nobody, and their socket does there what it does elsewhere."""

import contextvars
import logging
import time
from typing import Any

import gevent
import pytest
from django.contrib.auth.models import User
from django.db import connections
from gevent.monkey import get_original

from django_socketio import ConnectionRefused, broadcast_channel, members
from django_socketio.events import (
    on_connect,
    on_error,
    on_event,
    on_finish,
    on_message,
    on_subscribe,
)
from django_socketio.threads import ThreadedSocket
from tests.clients import Refused
from tests.sites import Site, settings
from tests.support import UNIT, wait_until

block = get_original("time", "sleep")
"""Sleep as a driver in C does: no greenlet runs meanwhile."""

get_ident = get_original("_thread", "get_ident")


def test_a_handler_that_blocks_holds_up_nobody(site: Site) -> None:
    @on_event("block", threaded=True)
    def block_(request: Any, socket: Any, context: Any) -> str:
        block(20 * UNIT)
        return "done"

    blocking, *others = site.connect_several(4)
    id_ = blocking.request("block")
    began = time.monotonic()
    for _ in range(10):
        for client in others:
            assert client.fence() == []
    assert time.monotonic() - began < 18 * UNIT
    assert site.dispatcher.threads.busy == 1
    assert blocking.acked(id_) == ["done"]
    wait_until(lambda: site.dispatcher.threads.busy == 0)


def test_only_what_asks_for_it_runs_in_a_thread(site: Site) -> None:
    threads: list[tuple[str, int]] = []
    on_message(threaded=True)(lambda *args: threads.append(("threaded", get_ident())))
    on_message(lambda *args: threads.append(("not", get_ident())))
    client = site.connect()
    client.send("x")
    client.fence()
    (first, thread), (second, here) = threads
    assert (first, second) == ("threaded", "not")
    assert here == get_ident() != thread


def test_the_order_of_a_connection_is_kept(site: Site) -> None:
    heard: list[int] = []

    @on_message(threaded=True)
    def message(request: Any, socket: Any, context: Any, number: int) -> None:
        if number % 10 == 0:
            block(UNIT / 5)
        heard.append(number)

    client = site.connect()
    for number in range(50):
        client.send(number)
    client.fence()
    assert heard == list(range(50))


def test_what_it_returns_is_the_ack(site: Site) -> None:
    on_event("one", threaded=True)(lambda *args: {"a": 1})
    on_event("several", threaded=True)(lambda *args: (1, 2))
    on_event("nothing", threaded=True)(lambda *args: None)
    client = site.connect()
    assert client.call("one") == [{"a": 1}]
    assert client.call("several") == [1, 2]
    assert client.call("nothing") == []


def test_what_it_raises_goes_to_on_error_with_its_traceback(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[BaseException] = []
    on_error(lambda request, socket, context, error: failures.append(error))

    @on_event("fail", threaded=True)
    def fail(request: Any, socket: Any, context: Any) -> None:
        raise ArithmeticError("in a thread")

    client = site.connect()
    client.emit("fail")
    client.fence()
    (failure,) = failures
    assert isinstance(failure, ArithmeticError)
    assert 'raise ArithmeticError("in a thread")' in caplog.text
    assert "fail failed for" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, gevent.Timeout, KeyError])
def test_nothing_that_it_raises_ends_the_thread_or_the_client(site: Site, error: Any) -> None:
    @on_event("fail", threaded=True)
    def fail(request: Any, socket: Any, context: Any) -> None:
        raise error

    client = site.connect()
    for _ in range(15):
        client.emit("fail")
    assert client.fence() == []


def test_on_connect_may_block_and_refuse(site: Site) -> None:
    @on_connect(threaded=True)
    def enter(request: Any, socket: Any, context: Any) -> None:
        block(UNIT)
        context["user"] = socket.auth.get("name")
        if socket.auth.get("name") == "mallory":
            raise ConnectionRefused("not you")

    on_event("who")(lambda request, socket, context: context["user"])
    with pytest.raises(Refused, match="not you"):
        site.connect(auth={"name": "mallory"})
    assert site.connect(auth={"name": "alice"}).call("who") == ["alice"]


def test_on_subscribe_may_block_and_refuse(site: Site) -> None:
    on_subscribe(threaded=True, channel="^secret")(lambda *args: False)
    client = site.connect()
    assert client.subscribe("secret")["ok"] is False
    assert client.subscribe("open") == {"ok": True}


def test_the_channel_and_namespace_count_as_ever(site: Site) -> None:
    heard: list[str] = []
    on_message(threaded=True, channel="^room", namespace="/chat")(
        lambda request, socket, context, message: heard.append(message)
    )
    site.namespace("/chat")
    inside, outside = site.connect_several(2, "/chat")
    inside.subscribe("room-1")
    for client in (outside, inside):
        client.send(client.sid)
        client.fence()
    assert heard == [inside.sid]


def test_context_variables_do_not_leak(site: Site) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    @on_event("count", threaded=True)
    def count(request: Any, socket: Any, context: Any) -> int:
        variable.set(variable.get() + 1)
        return variable.get()

    client = site.connect()
    assert [client.call("count") for _ in range(20)] == [[1]] * 20


# The socket there


def test_the_socket_does_all_that_it_does_elsewhere(site: Site) -> None:
    seen: dict[str, Any] = {}

    @on_event("all", threaded=True)
    def everything(request: Any, socket: Any, context: Any) -> str:
        assert isinstance(socket, ThreadedSocket)
        seen.update(
            sid=socket.session.session_id,
            namespace=socket.namespace,
            transport=socket.transport,
            connected=socket.connected,
            subscribed=socket.subscribe("room"),
            channels=socket.channels,
        )
        socket.send("to you")
        socket.emit("event", 1, b"2")
        socket.broadcast("to others")
        socket.broadcast_channel("to the room", "room")
        socket.send_and_broadcast("to all")
        socket.send_and_broadcast_channel("to the room, too")
        seen["members"] = members("room")
        broadcast_channel("from nowhere", "room")
        seen["answer"] = socket.call("question", timeout=100 * UNIT)
        seen["left"] = socket.unsubscribe("room")
        return "done"

    client, other = site.connect_several(2)
    other.subscribe("room")
    id_ = client.request("all")
    question = client.asked()
    client.ack(question, 42)
    assert client.acked(id_) == ["done"]
    assert seen == {
        "sid": client.sid,
        "namespace": "/",
        "transport": "websocket",
        "connected": True,
        "subscribed": True,
        "channels": ["room"],
        "members": {client.sid, other.sid},
        "answer": 42,
        "left": True,
    }
    assert [event[1:] for event in client.fence()] == [
        ["to you"],
        [1, b"2"],
        ["to all"],
        ["to the room, too"],
        ["from nowhere"],
    ]
    assert [event[1] for event in other.fence()] == [
        "to others",
        "to the room",
        "to all",
        "to the room, too",
        "from nowhere",
    ]


def test_what_the_socket_raises_is_raised_there(site: Site) -> None:
    @on_event("fail", threaded=True)
    def fail(request: Any, socket: Any, context: Any) -> list[str]:
        errors = []
        for wrong in (lambda: socket.send(object()), lambda: socket.emit("disconnect")):
            try:
                wrong()
            except (TypeError, ValueError) as error:
                errors.append(type(error).__name__)
        return errors

    assert site.connect().call("fail") == [["TypeError", "ValueError"]]


def test_it_may_disconnect(site: Site) -> None:
    finished: list[str] = []
    on_event("go", threaded=True)(lambda request, socket, context: socket.disconnect())
    on_finish(threaded=True)(lambda request, socket, context: finished.append(socket.namespace))
    client = site.connect()
    client.emit("go")
    client.disconnected()
    wait_until(lambda: finished == ["/"])


def test_a_socket_that_was_kept_works_outside_of_the_thread(site: Site) -> None:
    on_event("keep", threaded=True)(lambda request, socket, context: context.update(mine=socket))
    on_event("use")(lambda request, socket, context: context["mine"].send("used"))
    client = site.connect()
    client.call("keep")
    client.emit("use")
    assert client.fence() == [["message", "used"]]


# Many at once


@settings(SOCKETIO_THREADS=3)
def test_there_are_no_more_threads_than_the_setting_says(site: Site) -> None:
    running: list[int] = []
    most: list[int] = []

    @on_event("block", threaded=True)
    def block_(request: Any, socket: Any, context: Any) -> int:
        running.append(1)
        most.append(len(running))
        block(UNIT / 2)
        running.pop()
        return get_ident()

    crowd = site.connect_several(20)
    ids = [client.request("block") for client in crowd]
    threads = {client.acked(id_)[0] for client, id_ in zip(crowd, ids, strict=True)}
    assert max(most) <= 3
    assert len(threads) == 3


def test_threads_may_log(site: Site) -> None:
    """All at once, and while greenlets do, with a handler that waits."""
    lines: list[str] = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gevent.sleep(UNIT / 100)
            lines.append(record.getMessage())

    logger, slow = logging.getLogger("project"), Slow()
    logger.addHandler(slow)
    logger.propagate = False
    logger.setLevel(logging.INFO)

    @on_event("log", threaded=True)
    @on_event("chat")
    def log(request: Any, socket: Any, context: Any, who: int) -> None:
        for number in range(10):
            logger.info("%d: %d", who, number)

    try:
        crowd = site.connect_several(10)
        ids = [
            client.request(("log", "chat")[number % 2], number)
            for number, client in enumerate(crowd)
        ]
        for client, id_ in zip(crowd, ids, strict=True):
            client.acked(id_)
        wait_until(lambda: len(lines) == 100)
    finally:
        logger.removeHandler(slow)
    for who in range(10):
        mine = [line for line in lines if line.startswith(f"{who}: ")]
        assert mine == [f"{who}: {number}" for number in range(10)]
    site.stop()
    assert slow.filters == []


def test_a_server_stops_while_a_thread_blocks(site: Site) -> None:
    begun: list[int] = []

    @on_event("block", threaded=True)
    def block_(request: Any, socket: Any, context: Any) -> None:
        begun.append(1)
        block(10 * UNIT)
        socket.send("too late")

    site.connect().emit("block")
    wait_until(lambda: begun)
    site.stop()


# The database


def test_a_thread_keeps_no_connection(
    site: Site, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where connections persist: nobody knows when it works again."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)

    @on_event("add", threaded=True)
    def add(request: Any, socket: Any, context: Any, name: str) -> int:
        User.objects.create(username=name)
        return User.objects.count()

    client = site.connect()
    opened.clear()
    for number in range(3):
        assert client.call("add", f"user {number}") == [number + 1]
        assert [wrapper.connection for wrapper in opened] == [None] * (number + 1)
