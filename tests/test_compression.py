"""`SOCKETIO_COMPRESSION` and `compress=`: what goes out compressed, by every way there is."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import (
    ClientPerMessageDeflateFactory,
    PerMessageDeflate,
)
from websockets.frames import Frame

import django_socketio
from django_socketio.events import on_connect, on_event
from django_socketio.sockets import Socket
from tests.clients import Client
from tests.sites import Site, settings

ON = settings(SOCKETIO_COMPRESSION={"threshold": 200})
OFF = settings(SOCKETIO_COMPRESSION=None)
LARGE = "every word of it again, " * 20


class Noticing(ClientPerMessageDeflateFactory):
    """Offers to take compressed messages, and knows which were."""

    def __init__(self) -> None:
        super().__init__()
        self.compressed: list[bool] = []

    def process_response_params(
        self, params: Sequence[Any], accepted_extensions: Sequence[Extension]
    ) -> PerMessageDeflate:
        extension = super().process_response_params(params, accepted_extensions)
        decode = extension.decode

        def notice(frame: Frame, **options: Any) -> Frame:
            self.compressed.append(frame.rsv1)
            return decode(frame, **options)

        extension.decode = notice  # type: ignore[method-assign]
        return extension


def joined(site: Site, **options: Any) -> tuple[Client, Noticing]:
    """Return a client in the channel "x" that takes compressed messages."""
    noticing = Noticing()
    client = site.connect(offers=[noticing], **options)
    assert client.subscribe("x") == {"ok": True}
    noticing.compressed.clear()
    return client, noticing


def of_the_socket(name: str, *args: Any) -> Callable[..., None]:
    def send(socket: Socket, sid: str, **options: Any) -> None:
        getattr(socket, name)(*args, **options)

    return send


def from_anywhere(name: str, *args: Any, **to: Any) -> Callable[..., None]:
    def send(socket: Socket, sid: str, **options: Any) -> None:
        first = (sid,) if name == "send" else ()
        to_sid = {"session_id": sid} if to.get("session_id") == "sid" else to
        getattr(django_socketio, name)(*first, *args, **to_sid, **options)

    return send


# Each with whether the client itself, or another one, is to receive it.
WAYS = {
    "Socket.send": (True, of_the_socket("send", LARGE)),
    "Socket.emit": (True, of_the_socket("emit", "news", LARGE)),
    "Socket.broadcast": (False, of_the_socket("broadcast", LARGE)),
    "Socket.broadcast_channel": (False, of_the_socket("broadcast_channel", LARGE)),
    "Socket.broadcast_channel of one": (False, of_the_socket("broadcast_channel", LARGE, "x")),
    "Socket.send_and_broadcast": (True, of_the_socket("send_and_broadcast", LARGE)),
    "Socket.send_and_broadcast_channel": (True, of_the_socket("send_and_broadcast_channel", LARGE)),
    "to a channel one is not in": (True, of_the_socket("send_and_broadcast_channel", LARGE, "y")),
    "send": (True, from_anywhere("send", LARGE)),
    "broadcast": (False, from_anywhere("broadcast", LARGE)),
    "broadcast_channel": (False, from_anywhere("broadcast_channel", LARGE, "x")),
    "emit": (False, from_anywhere("emit", "news", LARGE)),
    "emit to a channel": (False, from_anywhere("emit", "news", LARGE, channel="x")),
    "emit to a client": (True, from_anywhere("emit", "news", LARGE, session_id="sid")),
}
OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"compress": True}, True),
    ({"compress": False}, False),
    ({"compress": False, "volatile": True}, False),
    ({"compress": False, "coalesce": "key"}, False),
    ({"volatile": True}, True),
    ({"coalesce": "key"}, True),
]


@ON
@pytest.mark.parametrize(("options", "compressed"), OPTIONS, ids=str)
@pytest.mark.parametrize(("own", "send"), WAYS.values(), ids=WAYS.keys())
def test_what_is_compressed(
    site: Site, own: bool, send: Callable[..., None], options: dict[str, Any], compressed: bool
) -> None:
    @on_event("do")
    def do(request: Any, socket: Socket, context: Any) -> None:
        send(socket, socket.session.session_id, **options)

    client, noticing = joined(site)
    other, others = joined(site)
    client.emit("do")
    receiver, noticed = (client, noticing) if own else (other, others)
    assert receiver.event()[1] == LARGE
    assert noticed.compressed == [compressed]


@ON
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_whoever_does_not_ask_for_it_gets_it_plain(site: Site, transport: str) -> None:
    plain, (asking, noticed) = site.connect(transport=transport), joined(site)
    django_socketio.broadcast(LARGE)
    assert plain.event() == asking.event() == ["message", LARGE]
    assert noticed.compressed == [True]


@ON
def test_from_the_threshold(site: Site) -> None:
    client, noticed = joined(site)
    for size in (200 - len('42["message",""]') - 1, 200 - len('42["message",""]')):
        django_socketio.broadcast("x" * size)
        client.event()
    assert noticed.compressed == [False, True]


@ON
def test_attachments(site: Site) -> None:
    client, noticed = joined(site)
    django_socketio.emit("files", LARGE, bytes(1000), b"short")
    assert client.event() == ["files", LARGE, bytes(1000), b"short"]
    django_socketio.emit("files", LARGE, bytes(1000), compress=False)
    assert client.event() == ["files", LARGE, bytes(1000)]
    assert noticed.compressed == [True, True, False, False, False]


@ON
def test_what_on_connect_sends(site: Site) -> None:
    @on_connect
    def greet(request: Any, socket: Socket, context: Any) -> None:
        socket.send(LARGE)
        socket.send(LARGE, compress=False)

    noticing = Noticing()
    client = site.connect(offers=[noticing])
    assert [client.event(), client.event()] == [["message", LARGE]] * 2
    assert noticing.compressed[-2:] == [True, False]


@ON
def test_what_the_client_compresses(site: Site) -> None:
    @on_event("echo")
    def echo(request: Any, socket: Socket, context: Any, text: str, data: bytes) -> Any:
        return text, data

    client, noticed = joined(site)
    assert client.call("echo", LARGE, bytes(1000)) == [LARGE, bytes(1000)]
    assert noticed.compressed == [True, True]


@OFF
def test_without_the_setting_nothing_is(site: Site) -> None:
    client, noticed = joined(site)
    django_socketio.broadcast(LARGE, compress=True)
    assert client.event() == ["message", LARGE]
    assert noticed.compressed == []  # nothing was agreed on
