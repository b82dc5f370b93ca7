"""Sending from outside of handlers: from wherever, to whom, and what it raises."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client as Browser
from django.urls import path
from gevent.monkey import get_original

import django_socketio
from django_socketio import (
    BackendError,
    NoSocket,
    broadcast,
    broadcast_channel,
    disconnect,
    emit,
    members,
    send,
)
from django_socketio.events import on_connect, on_disconnect, on_finish
from django_socketio.urls import urlpatterns as socketio_urls
from tests import clients
from tests.clients import Client
from tests.sites import Site, settings
from tests.support import ROOT, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])


def view(request: HttpRequest) -> HttpResponse:
    broadcast("from a view")
    return HttpResponse("sent")


urlpatterns = [path("view/", view), *socketio_urls]


def test_what_the_package_exports() -> None:
    names = {"send", "broadcast", "broadcast_channel", "emit", "disconnect", "members"}
    names |= {"NoSocket", "BackendError", "ConnectionRefused"}
    assert names <= set(django_socketio.__all__)
    assert all(hasattr(django_socketio, name) for name in django_socketio.__all__)


# To whom


@pytest.fixture
def crowd(site: Site) -> dict[str, Client]:
    site.namespace("/chat")
    crowd = {
        "one": site.connect(),
        "two": site.connect(transport="polling"),
        "three": site.connect("/chat"),
        "four": site.connect("/chat"),
    }
    for name in ("one", "two", "three"):
        crowd[name].subscribe("room")
    crowd["two"].subscribe("hall")
    return crowd


def received(crowd: dict[str, Client]) -> dict[str, list[list[Any]]]:
    return {name: events for name, client in crowd.items() if (events := client.fence())}


def test_send_reaches_one_client(crowd: dict[str, Client]) -> None:
    send(crowd["two"].sid, "hello")
    assert received(crowd) == {"two": [["message", "hello"]]}


def test_broadcast_reaches_everybody(crowd: dict[str, Client]) -> None:
    broadcast("hello")
    assert received(crowd) == dict.fromkeys(("one", "two"), [["message", "hello"]])


def test_broadcast_channel_reaches_its_members(crowd: dict[str, Client]) -> None:
    broadcast_channel("hello", "hall")
    broadcast_channel("you", "room")
    expected = {"one": [["message", "you"]], "two": [["message", "hello"], ["message", "you"]]}
    assert received(crowd) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ({}, {"one", "two"}),
        ({"channel": "hall"}, {"two"}),
        ({"session_id": "one"}, {"one"}),
        ({"namespace": "/chat"}, {"three", "four"}),
        ({"namespace": "/chat", "channel": "room"}, {"three"}),
        ({"namespace": "/chat", "session_id": "four"}, {"four"}),
    ],
)
def test_emit_reaches_whom_it_names(
    crowd: dict[str, Client], address: dict[str, str], expected: set[str]
) -> None:
    if "session_id" in address:
        address = {**address, "session_id": crowd[address["session_id"]].sid}
    emit("news", 1, [b"2"], **address)
    assert received(crowd) == dict.fromkeys(expected, [["news", 1, [b"2"]]])


def test_every_function_takes_a_namespace(crowd: dict[str, Client]) -> None:
    three = crowd["three"].sid
    send(three, 1, namespace="/chat")
    broadcast(2, namespace="/chat")
    broadcast_channel(3, "room", namespace="/chat")
    assert members("room", namespace="/chat") == {three}
    expected = {"three": [["message", 1], ["message", 2], ["message", 3]]}
    assert received(crowd) == {**expected, "four": [["message", 2]]}
    disconnect(three, namespace="/chat")
    crowd["three"].disconnected()


def test_a_tuple_is_several_arguments(site: Site) -> None:
    client = site.connect()
    client.subscribe("room")
    for function in (
        lambda m: send(client.sid, m),
        broadcast,
        lambda m: broadcast_channel(m, "room"),
    ):
        function(("a", b"b"))
        function(["a", "b"])
    assert client.fence() == [["message", "a", b"b"], ["message", ["a", "b"]]] * 3


def test_members_are_session_ids(crowd: dict[str, Client]) -> None:
    one, two = crowd["one"].sid, crowd["two"].sid
    assert members("room") == {one, two}
    assert members("hall") == {two}
    assert members("nowhere") == set()
    crowd["two"].unsubscribe("hall")
    crowd["one"].disconnect()
    wait_until(lambda: members("room") == {two})
    assert members("hall") == set()
    members("room").clear()
    assert members("room") == {two}


@TRANSPORTS
def test_disconnect_ends_one_client(site: Site, transport: str) -> None:
    steps: list[tuple[str, str]] = []
    on_disconnect(lambda request, socket, context: steps.append(("-", socket.disconnect_reason)))
    on_finish(lambda request, socket, context: steps.append((".", socket.disconnect_reason)))
    client, other = site.connect(transport=transport), site.connect()
    client.subscribe("room")
    send(client.sid, "last words")
    disconnect(client.sid)
    assert client.event() == ["message", "last words"]
    client.disconnected()
    reason = "server namespace disconnect"
    wait_until(lambda: steps == [("-", reason), (".", reason)])
    assert members("room") == set()
    assert other.fence() == []
    with pytest.raises(NoSocket):
        disconnect(client.sid)


# What it raises


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize(
    ("call", "whom"),
    [
        (lambda: send("nobody", "x"), "with the session id 'nobody'"),
        (lambda: emit("x", session_id="nobody"), "with the session id 'nobody'"),
        (lambda: disconnect("nobody"), "with the session id 'nobody'"),
        (lambda: broadcast_channel("x", "empty"), "in the channel 'empty'"),
        (lambda: emit("x", channel="empty"), "in the channel 'empty'"),
        (lambda: broadcast("x"), "in the namespace '/'"),
        (lambda: emit("x"), "in the namespace '/'"),
        (lambda: broadcast("x", namespace="/chat"), "in the namespace '/chat'"),
    ],
)
def test_nobody_is_there(request: Any, served: bool, call: Callable[[], None], whom: str) -> None:
    if served:
        request.getfixturevalue("site")
    with pytest.raises(NoSocket) as error:
        call()
    assert str(error.value).startswith(f"There is no socket {whom}.")
    # Whoever asks in the wrong process is told so; where sockets live there is nothing to tell.
    assert ("SOCKETIO_BACKEND" in str(error.value)) is not served


def test_members_without_a_server_are_none() -> None:
    assert members("room") == set()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: emit("x", channel="a", session_id="b"), "a channel or a session_id, not both"),
        (lambda: emit("connect"), "'connect' is an event of the protocol"),
        (lambda: emit("__subscribe__", "a"), "'__subscribe__' is an event of the protocol"),
        (lambda: broadcast_channel("x", ""), "A channel is"),
        (lambda: emit("x", channel="a\n"), "A channel is"),
        (lambda: members("x" * 256), "A channel is"),
    ],
)
def test_what_cannot_be_meant(site: Site, call: Callable[[], None], error: str) -> None:
    client = site.connect()
    with pytest.raises(ValueError, match=error):
        call()
    assert client.fence() == []


@pytest.mark.parametrize("nothing", [None, "", 0])
def test_a_missing_address_is_not_everybody(site: Site, nothing: Any) -> None:
    """What is meant for one must not reach all because a variable was empty."""
    client = site.connect()
    client.subscribe("room")
    with pytest.raises((ValueError, NoSocket)):
        send(nothing, "secret")
    with pytest.raises((ValueError, NoSocket)):
        broadcast_channel("secret", nothing)
    with pytest.raises((ValueError, NoSocket)):
        disconnect(nothing)
    assert client.fence() == []


@pytest.mark.parametrize("unfit", [object(), [{1}], 1j], ids=type)
def test_what_cannot_be_serialised_raises_in_the_caller(site: Site, unfit: Any) -> None:
    client = site.connect()
    client.subscribe("room")
    for call in (
        lambda: send(client.sid, unfit),
        lambda: broadcast(unfit),
        lambda: broadcast_channel((1, unfit), "room"),
        lambda: emit("x", 1, unfit),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError):  # ahead of the question whether anybody is there
        send("nobody", unfit)
    assert client.fence() == []


def test_a_carrier_that_is_down_raises_in_the_caller(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(topic: str, payload: bytes) -> int:
        raise BackendError("no route")

    client = site.connect()
    monkeypatch.setattr(site.dispatcher.hub.backend, "publish", down)
    for call in (lambda: send(client.sid, 1), lambda: broadcast(1), lambda: disconnect(client.sid)):
        with pytest.raises(BackendError, match="no route"):
            call()
    assert client.fence() == []


# From where


def test_from_a_greenlet(site: Site) -> None:
    client = site.connect()
    gevent.spawn(broadcast, "hello").get()
    assert client.fence() == [["message", "hello"]]


def test_from_another_thread_of_the_operating_system(site: Site) -> None:
    client = site.connect(transport="polling")
    client.subscribe("room")
    done: list[Any] = []

    def work() -> None:
        try:
            for number in range(100):
                broadcast_channel(number, "room")
            send(client.sid, ("to you", b"!"))
            emit("news", channel="room")
            with pytest.raises(NoSocket):
                send("nobody", "x")
            done.append(members("room"))
            disconnect(client.sid)
        except BaseException as error:
            done.append(error)

    get_original("_thread", "start_new_thread")(work, ())
    events = [client.event() for _ in range(102)]
    expected = [["message", number] for number in range(100)]
    assert events == [*expected, ["message", "to you", b"!"], ["news"]]
    client.disconnected()
    wait_until(lambda: done)
    assert done == [{client.sid}]


@settings(ROOT_URLCONF=__name__)
@pytest.mark.parametrize("way", ["server", "test client"])
def test_from_a_view(site: Site, way: str) -> None:
    client = site.connect()
    if way == "server":
        assert clients.request(site.address, target="/view/").body == b"sent"
    else:
        assert Browser().get("/view/").content == b"sent"
    assert client.fence() == [["message", "from a view"]]


def test_from_on_connect_to_others(site: Site) -> None:
    first = site.connect()
    on_connect(lambda request, socket, context: broadcast("somebody comes"))
    second = site.connect()
    assert first.fence() == [["message", "somebody comes"]]
    assert second.fence() == []


@pytest.mark.parametrize("patched", [True, False])
def test_from_another_process(patched: bool) -> None:
    """A shell, a cron job: it serves no sockets, and memory:// goes no further than itself."""
    source = """
        import django
        django.setup()
        from django_socketio import NoSocket, broadcast, disconnect, emit, members, send
        assert members("room") == set()
        for call in (lambda: send("x", 1), lambda: broadcast(1), lambda: emit("e"),
                     lambda: disconnect("x")):
            try:
                call()
            except NoSocket as error:
                print(error)
    """
    source = textwrap.dedent(source)
    if patched:
        source = "from gevent import monkey; monkey.patch_all()\n" + source
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 4 and not run.stderr
    for line in lines:
        assert line.startswith("There is no socket ")
        assert "SOCKETIO_BACKEND" in line and "crosses processes" in line
