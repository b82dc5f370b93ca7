"""Limits of what a client may do to the application: at the limit it passes, one over does not."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest
from gevent.event import Event

from django_socketio import api, conf, dispatch
from django_socketio.events import on_connect, on_event, on_message, on_subscribe
from django_socketio.protocol import socketio
from django_socketio.protocol.exceptions import LimitExceeded
from tests import clients
from tests.clients import Client, Connection, HandshakeFailed, Lost, Refused
from tests.sites import Site, settings
from tests.support import UNIT, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
PLACE = '{{"_placeholder":true,"num":{}}}'


def over(site: Site, limit: str) -> int:
    return site.dispatcher.engine.counters[f"over limit: {limit}"]


def closed(site: Site, reason: str) -> int:
    return site.dispatcher.engine.counters[f"closed: {reason}"]


def connection_of(site: Site, client: Client) -> dispatch.Connection:
    connection: dispatch.Connection = site.dispatcher.engine.sessions[client.connection.sid].data
    return connection


def send(connection: Connection, *messages: str | bytes) -> None:
    """Send what may be the last thing that the server takes."""
    with contextlib.suppress(Lost, OSError):
        connection.transport.send(*messages)


@pytest.fixture
def heard(site: Site) -> list[Any]:
    messages: list[Any] = []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        messages.append(message)

    return messages


def check_it_ends_alone(site: Site, client: Client, other: Client, limit: str, reason: str) -> None:
    client.connection.wait_for_end()
    wait_until(lambda: closed(site, reason))
    assert (over(site, limit), closed(site, reason)) == (1, 1)
    assert other.fence() == []


# Attachments


def binary(*attachments: bytes) -> list[str | bytes]:
    places = ",".join(PLACE.format(number) for number in range(len(attachments)))
    return [f'45{len(attachments)}-["message",{places}]', *attachments]


@TRANSPORTS
def test_attachments(site: Site, transport: str, heard: list[Any]) -> None:
    client, other = site.connect(transport=transport), site.connect()
    send(client.connection, *binary(*[b"x"] * 10))
    client.fence()
    assert heard == [(b"x",) * 10]
    send(client.connection, *binary(*[b"x"] * 11))
    check_it_ends_alone(site, client, other, "MAX_ATTACHMENTS", "parse error")
    assert len(heard) == 1


@TRANSPORTS
@settings(SOCKETIO_MAX_ATTACHMENTS=2)
def test_the_number_of_attachments_is_a_setting(
    site: Site, transport: str, heard: list[Any]
) -> None:
    client, other = site.connect(transport=transport), site.connect()
    send(client.connection, *binary(b"x", b"y"))
    client.fence()
    send(client.connection, *binary(b"x", b"y", b"z"))
    check_it_ends_alone(site, client, other, "MAX_ATTACHMENTS", "parse error")
    assert heard == [(b"x", b"y")]


@TRANSPORTS
@pytest.mark.parametrize(
    "site",
    [{"SOCKETIO_MAX_ATTACHMENT_BYTES": 1_000}, {"SOCKETIO_MAX_PAYLOAD": 1_000}],
    indirect=True,
    ids=["its own", "that of a payload"],
)
def test_bytes_of_attachments(site: Site, transport: str, heard: list[Any]) -> None:
    """All of one packet's together."""
    client, other = site.connect(transport=transport), site.connect()
    for message in binary(b"x" * 300, b"y" * 700):
        send(client.connection, message)
    client.fence()
    assert heard == [(b"x" * 300, b"y" * 700)]
    for message in binary(b"x" * 300, b"y" * 701):
        send(client.connection, message)
    check_it_ends_alone(site, client, other, "MAX_ATTACHMENT_BYTES", "parse error")
    assert len(heard) == 1


@TRANSPORTS
@settings(SOCKETIO_MESSAGE_TIMEOUT=4 * UNIT)
def test_attachments_that_never_come(site: Site, transport: str, heard: list[Any]) -> None:
    """CVE-2026-48804; whatever else the client does meanwhile."""
    client, other = site.connect(transport=transport), site.connect()
    connection = connection_of(site, client)
    started = time.monotonic()
    send(client.connection, *binary(b"x", b"y", b"z")[:2])
    while not closed(site, "message timeout"):
        send(client.connection, "3")
        gevent.sleep(UNIT / 5)
    assert time.monotonic() - started >= 3 * UNIT
    assert connection._pending is None
    check_it_ends_alone(site, client, other, "MESSAGE_TIMEOUT", "message timeout")
    assert heard == []


@settings(SOCKETIO_MESSAGE_TIMEOUT=2 * UNIT)
def test_attachments_that_come_in_time(site: Site, heard: list[Any]) -> None:
    client = site.connect()
    for _ in range(3):
        for message in binary(b"x", b"y"):
            send(client.connection, message)
            gevent.sleep(UNIT / 2)
    client.fence()
    assert heard == [(b"x", b"y")] * 3
    assert not len(site.dispatcher.attachments)


@TRANSPORTS
def test_attachments_that_a_client_owes_at_its_end(site: Site, transport: str) -> None:
    client = site.connect(transport=transport)
    (connection,) = site.dispatcher.connections
    send(client.connection, *binary(b"x" * 1000, b"y")[:2])
    wait_until(lambda: connection._pending)
    assert len(site.dispatcher.attachments) == 1
    client.close()
    wait_until(lambda: not site.dispatcher.connections)
    assert connection._pending is None
    assert not len(site.dispatcher.attachments)


ABUSE: dict[str, list[str | bytes]] = {
    "a thousand millions": ['451000000000-["message"]'],
    "none, and then some": ['450-["message"]', *[b"x"] * 1000],
    "none announced": [b"x"] * 1000,
    "more than announced": [*binary(b"x"), b"y"],
    "text in between": [*binary(b"x", b"y")[:2], '42["message"]'],
    "a packet in between": [*binary(b"x", b"y")[:2], *binary(b"z")],
    "number -1": [f'451-["message",{PLACE.format(-1)}]', b"x"],
    "number 5": [f'451-["message",{PLACE.format(5)}]', b"x"],
    "number 1e9": [f'451-["message",{PLACE.format("1e9")}]', b"x"],
    "number 1000000000": [f'451-["message",{PLACE.format(10**9)}]', b"x"],
    "number x": [f'451-["message",{PLACE.format(json.dumps("x"))}]', b"x"],
    "no number": ['451-["message",{"_placeholder":true}]', b"x"],
    "no placeholder": ['451-["message",{}]', b"x"],
    "twice": [f'452-["message",{PLACE.format(0)},{PLACE.format(0)}]', b"x", b"y"],
    "in each other": ['451-["message",{"_placeholder":true,"num":{"_placeholder":true,"num":0}}]'],
    "as the name": [f"451-[{PLACE.format(0)}]", b"x"],
    "of a connect": [f"450-{PLACE.format(0)}", b"x"],
    "to nobody": [f'451-/nowhere,["message",{PLACE.format(0)}]', b"x"],
}


@TRANSPORTS
@pytest.mark.parametrize("messages", ABUSE.values(), ids=ABUSE.keys())
def test_abuse_of_attachments(
    site: Site, transport: str, messages: list[str | bytes], heard: list[Any]
) -> None:
    """CVE-2022-2421, CVE-2026-33151, CVE-2026-69185."""
    client, other = site.connect(transport=transport), site.connect()
    connection = connection_of(site, client)
    send(client.connection, *messages)
    client.connection.wait_for_end()
    wait_until(lambda: len(site.dispatcher.connections) == 1)
    assert closed(site, "parse error") == 1
    assert connection._pending is None
    assert heard in ([], [b"x"])  # what was whole before it went wrong
    assert other.fence() == []


# Events


NAMES = ["1", "null", "true", "[]", "{}", '{"toString":"foo"}', "1.5", '["message"]']
RESERVED = sorted(socketio.RESERVED_EVENTS)


@TRANSPORTS
@pytest.mark.parametrize(
    "packet",
    [
        *(f"42[{name}]" for name in NAMES),
        *(f"42[{name},1]" for name in NAMES),
        *(f'42["{name}"]' for name in RESERVED),
        *("42[]", "42{}", '42"x"', "42null", "42", "421[]", "42/,[]"),
        *('42["message",NaN]', '42["message",Infinity]', '42["message",-Infinity]'),
        *('42["message"', '42["message"]]', '42["message"]x', "42['message']"),
        '42["message","' + "\x00" + '"]',
        '42["message",' + "[" * 100_000,
        '42["message",' + "[" * 100_000 + "]" * 100_000 + "]",
        "42" + "1" * 999_000 + '["message"]',
        "42" + "1" * 17 + '["message"]',
        '429007199254740993["message"]',
        "43" + "1" * 999_000 + "[]",
    ],
    ids=lambda packet: packet[:24].replace("\x00", "NUL"),
)
def test_what_is_no_event(site: Site, transport: str, packet: str, heard: list[Any]) -> None:
    """CVE-2023-32695, and what else an event cannot be: the end of that client."""
    client, other = site.connect(transport=transport), site.connect()
    send(client.connection, packet)
    check = client.connection.wait_for_end()
    assert check
    wait_until(lambda: closed(site, "parse error"))
    assert heard == []
    assert other.fence() == []


@TRANSPORTS
@pytest.mark.parametrize(
    "name",
    [
        "__proto__",
        "constructor",
        "__class__",
        "__init__",
        "toString",
        "on_connect",
        "on_finish",
        "event:message",
        "",
        " ",
        "\u2028",
        "x" * 255,
    ],
)
def test_odd_names_are_names(site: Site, transport: str, name: str) -> None:
    """Nothing is looked up by them but handlers."""
    called: list[str] = []
    on_event(name)(lambda request, socket, context: called.append(name))
    client = site.connect(transport=transport)
    client.emit(name)
    client.emit(name + "!" if len(name) < 255 else "other")
    client.fence()
    assert called == [name]


LONE = '42["message","\\ud83d"]'


@TRANSPORTS
def test_half_a_surrogate_pair_is_heard(site: Site, transport: str, heard: list[Any]) -> None:
    client = site.connect(transport=transport)
    send(client.connection, LONE)
    client.fence()
    assert heard == ["\ud83d"]


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """Return an event whose JSON has so many levels, itself included."""
    return '42["message",' + opening * (depth - 1) + closing * (depth - 1) + "]"


@TRANSPORTS
@settings(SOCKETIO_MAX_JSON_DEPTH=20)
def test_the_depth_of_json(site: Site, transport: str, heard: list[Any]) -> None:
    client, other = site.connect(transport=transport), site.connect()
    brackets = '42["message",' + json.dumps([[{}] * 50, "[{[" * 500]) + "]"
    send(client.connection, nested(20), brackets)
    client.fence()
    assert len(heard) == 2
    send(client.connection, nested(21))
    check_it_ends_alone(site, client, other, "MAX_JSON_DEPTH", "parse error")
    assert len(heard) == 2


@pytest.mark.parametrize("packet", ['2["x",{}]', '27["x",{}]', '2/a,["x",{}]', "31[1,{}]"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[1,"]",', "]")])
@pytest.mark.parametrize("maximum", [2, 3, 64, 500])
def test_the_depth_of_any_packet(packet: str, opening: str, closing: str, maximum: int) -> None:
    limits = socketio.Limits(depth=maximum)

    def text(depth: int) -> str:
        inner = opening * (depth - 1) + "1" + closing * (depth - 1)
        return packet.replace("{}", inner)

    assert isinstance(socketio.decode(text(maximum), limits), socketio.Packet)
    with pytest.raises(LimitExceeded, match="levels") as caught:
        socketio.decode(text(maximum + 1), limits)
    assert caught.value.limit == "MAX_JSON_DEPTH"


def test_the_depth_of_a_connect_and_of_a_binary_event() -> None:
    limits = socketio.Limits(depth=10)
    auth = '0{"a":' + "[" * 9 + "]" * 9 + "}"
    event = '51-["x",' + "[" * 8 + PLACE.format(0) + "]" * 8 + "]"
    assert isinstance(socketio.decode(auth, limits), socketio.Packet)
    assert isinstance(socketio.decode(event, limits), socketio.Assembly)
    for packet in (auth.replace("[", "[[", 1).replace("]", "]]", 1), event.replace("[[", "[[[")):
        with pytest.raises(LimitExceeded):
            socketio.decode(packet.replace("]]", "]]]") if packet[0] == "5" else packet, limits)


def test_wide_is_not_deep() -> None:
    """However wide: that costs about as much as reading it."""
    text = '2["x",' + json.dumps([[[]] * 100] * 1000) + "]"
    started = time.process_time()
    assert isinstance(socketio.decode(text, socketio.Limits()), socketio.Packet)
    assert time.process_time() - started < 100 * UNIT  # and not its square


# Names


@TRANSPORTS
@settings(SOCKETIO_MAX_NAME=20)
@pytest.mark.parametrize("packet", ['42["{}"]', '421["{}"]', '42/,["{}"]', "40/{}", "40/{},"])
def test_the_length_of_names(site: Site, transport: str, packet: str) -> None:
    client, other = site.connect(transport=transport), site.connect()
    slash = packet.startswith("40")
    if not slash:
        send(client.connection, packet.format("x" * 20))
        client.fence()
    send(client.connection, packet.format("x" * (20 if slash else 21)))
    check_it_ends_alone(site, client, other, "MAX_NAME", "parse error")


def test_an_unknown_namespace_with_the_longest_name(site: Site) -> None:
    connection = site.open()
    with pytest.raises(Refused) as refused:
        connection.connect("/" + "x" * 254)
    assert refused.value.data == {"message": "Invalid namespace"}
    assert not over(site, "MAX_NAME")


@TRANSPORTS
@settings(SOCKETIO_MAX_NAME=20)
def test_the_length_of_channels(site: Site, transport: str) -> None:
    client = site.connect(transport=transport)
    assert client.subscribe("x" * 20) == {"ok": True}
    answer = {"ok": False, "error": "A channel has at most 20 characters."}
    assert client.subscribe("x" * 21) == answer
    assert over(site, "MAX_NAME") == 1
    assert client.subscribe("y") == {"ok": True}
    api.subscribe(client.sid, "x" * 255)  # the server's own are as long as carriers take


# Channels and namespaces


@TRANSPORTS
@settings(SOCKETIO_MAX_CHANNELS=3)
def test_channels_of_a_socket(site: Site, transport: str) -> None:
    asked: list[str] = []
    on_subscribe(lambda request, socket, context, channel: asked.append(channel))
    client, other = site.connect(transport=transport), site.connect()
    assert [client.subscribe(name) for name in "abc"] == [{"ok": True}] * 3
    assert client.subscribe("a") == {"ok": True}  # it is in there already
    answer = {"ok": False, "error": "A socket is in at most 3 channels."}
    assert client.subscribe("d") == answer
    assert asked == list("abc")
    assert over(site, "MAX_CHANNELS") == 1
    assert client.unsubscribe("b") == {"ok": True}
    assert client.subscribe("d") == {"ok": True}
    assert other.subscribe("d") == {"ok": True}
    assert api.members("d") == {client.sid, other.sid}


@settings(SOCKETIO_MAX_CHANNELS=2)
def test_the_server_is_told_of_one_channel_too_many(site: Site) -> None:
    errors: list[Exception] = []

    @on_connect
    def connect(request: Any, socket: Any, context: Any) -> None:
        for name in "ab":
            assert socket.subscribe(name)
        assert not socket.subscribe("a")
        try:
            socket.subscribe("c")
        except ValueError as error:
            errors.append(error)

    client = site.connect()
    assert [str(error) for error in errors] == ["A socket is in at most 2 channels."]
    with pytest.raises(ValueError, match="in at most 2 channels"):
        api.subscribe(client.sid, "d")
    assert over(site, "MAX_CHANNELS") == 2
    assert api.channels() == {"a": 1, "b": 1}


@TRANSPORTS
@settings(SOCKETIO_MAX_NAMESPACES=3)
def test_namespaces_of_a_connection(site: Site, transport: str) -> None:
    for name in ("/a", "/b", "/c"):
        site.namespace(name)
    connection = site.open(transport)
    for name in ("/", "/a", "/b"):
        connection.connect(name)
    with pytest.raises(Refused) as refused:
        connection.connect("/c")
    assert refused.value.data == {"message": "Too many namespaces"}
    assert over(site, "MAX_NAMESPACES") == 1
    assert connection.clients["/"].fence() == []
    connection.write(clients.DISCONNECT, "/a")
    assert connection.connect("/c").fence() == []
    assert site.connect("/c").fence() == []


# How fast


@TRANSPORTS
@settings(SOCKETIO_EVENT_RATE=(0.001, 10))
def test_the_rate_of_events(site: Site, transport: str, heard: list[Any]) -> None:
    client, other = site.connect(transport=transport), site.connect()
    for number in range(8):
        client.send(number)
    assert client.fence() == []  # to connect was the first event, and this is the tenth
    assert heard == list(range(8))
    with contextlib.suppress(Lost):
        client.send("one too many")
    lost = client.connection.wait_for_end()
    assert lost.code == (1008 if transport == "websocket" else None)
    wait_until(lambda: closed(site, "rate limit"))
    assert over(site, "EVENT_RATE") == 1
    assert heard == list(range(8))
    assert other.fence() == []


@settings(SOCKETIO_EVENT_RATE=(0.001, 10))
def test_a_post_that_is_over_the_rate_is_told_so(site: Site, heard: list[Any]) -> None:
    client = site.connect(transport="polling")
    with pytest.raises(Lost, match='429 .*"hint":"rate limit"'):
        client.connection.transport.send(*[f'42["message",{n}]' for n in range(20)])
    wait_until(lambda: len(heard) == 9)  # what was allowed is heard


@TRANSPORTS
@settings(SOCKETIO_EVENT_RATE=(0.001, 6))
def test_what_counts_as_an_event(site: Site, transport: str, heard: list[Any]) -> None:
    """Attachments, acknowledgements and pongs do not."""
    site.namespace("/other")
    client = site.connect(transport=transport)
    for _ in range(30):
        send(client.connection, "3", "431[]")
    client.connection.connect("/other")
    client.send(*[b"x"] * 10)
    client.emit("nobody hears this")
    client.connection.clients["/other"].fence()
    client.fence()
    assert len(heard) == 1
    with contextlib.suppress(Lost):
        client.emit("nobody hears this")
    client.connection.wait_for_end()
    wait_until(lambda: closed(site, "rate limit"))


@settings(SOCKETIO_EVENT_RATE=(200, 5))
def test_the_rate_lets_a_patient_client_go_on(site: Site, heard: list[Any]) -> None:
    client = site.connect()
    for number in range(50):
        client.send(number)
        gevent.sleep(0.01)
    client.fence()
    assert heard == list(range(50))
    rates: Any = site.dispatcher._rates
    assert len(rates._connections) == 1
    client.close()
    wait_until(lambda: not site.dispatcher.connections)
    assert not len(rates._connections)


class User:
    """As little of one as has to be known."""

    is_authenticated = True

    def __init__(self, pk: int) -> None:
        self.pk = pk


def by_header(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    """Be a middleware that takes the user's and the client's word for who they are."""

    class Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            user: Any = User(int(self._name)) if self._name else AnonymousUser()
            return getattr(user, name)

    def middleware(request: HttpRequest) -> Any:
        request.user = Lazy(request.headers.get("X-User", ""))  # type: ignore[assignment]
        if "X-Forwarded-For" in request.headers:
            request.META["REMOTE_ADDR"] = request.headers["X-Forwarded-For"]
        return get_response(request)

    return middleware


BY_HEADER = {"MIDDLEWARE": [f"{__name__}.by_header"]}


def user(number: int) -> dict[str, str]:
    return {"X-User": str(number)}


def refusal(site: Site, transport: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(HandshakeFailed) as failed:
        site.connect(transport=transport, **options)
    assert ("Retry-After", "5") in failed.value.headers
    return failed.value.status, json.loads(failed.value.body)["hint"]


@TRANSPORTS
@settings(**BY_HEADER, SOCKETIO_MAX_CONNECTIONS_PER_USER=2)
def test_connections_of_a_user(site: Site, transport: str) -> None:
    first = [site.connect(transport=transport, headers=user(1)) for _ in range(2)]
    assert refusal(site, transport, headers=user(1)) == (429, "too many connections of one user")
    assert over(site, "MAX_CONNECTIONS_PER_USER") == 1
    assert site.connect(transport=transport, headers=user(2)).fence() == []
    anonymous = [site.connect(transport=transport) for _ in range(5)]
    first[0].close()
    wait_until(lambda: len(site.dispatcher.connections) == 7)
    assert site.connect(transport=transport, headers=user(1)).fence() == []
    assert all(client.fence() == [] for client in anonymous)


@TRANSPORTS
@settings(**BY_HEADER, SOCKETIO_MAX_CONNECTIONS_PER_ADDRESS=2)
def test_connections_of_an_address_that_a_middleware_has_found(site: Site, transport: str) -> None:
    here, there = {"X-Forwarded-For": "1.1.1.1"}, {"X-Forwarded-For": "2.2.2.2"}
    for _ in range(2):
        site.connect(transport=transport, headers=here)
    answer = refusal(site, transport, headers=here)
    assert answer == (429, "too many connections of one address")
    assert over(site, "MAX_CONNECTIONS_PER_ADDRESS") == 1
    assert site.connect(transport=transport, headers=there).fence() == []


@TRANSPORTS
@settings(**BY_HEADER, SOCKETIO_EVENT_RATE_PER_USER=(0.001, 10))
def test_the_rate_of_a_users_events(site: Site, transport: str, heard: list[Any]) -> None:
    """Of all connections together; it is the one that is too fast that ends."""
    one, two = [site.connect(transport=transport, headers=user(1)) for _ in range(2)]
    other, nobody = site.connect(headers=user(2)), site.connect()
    for number in range(4):
        one.send(number)
    for number in range(4, 8):
        two.send(number)
    wait_until(lambda: len(heard) == 8)
    with contextlib.suppress(Lost):
        two.send("one too many")
    two.connection.wait_for_end()
    wait_until(lambda: closed(site, "rate limit"))
    assert over(site, "EVENT_RATE_PER_USER") == 1
    assert other.fence() == []
    assert [nobody.fence() for _ in range(20)] == [[]] * 20
    assert len(site.dispatcher.connections) == 3


@TRANSPORTS
@settings(SOCKETIO_MAX_CONNECTIONS=2, SOCKETIO_ALLOWED_ORIGINS=["https://a.example"])
def test_connections_of_a_worker(site: Site, transport: str) -> None:
    """Whoever is one too many does not even reach the middleware, but may read why."""
    good = [site.connect(transport=transport) for _ in range(2)]
    origin = {"Origin": "https://a.example"}
    with pytest.raises(HandshakeFailed) as failed:
        site.connect(transport=transport, headers=origin)
    assert failed.value.status == 503
    names = [name.lower() for name, _ in failed.value.headers]
    assert "access-control-allow-origin" in names and "x-frame-options" not in names
    assert refusal(site, transport) == (503, "the server is full")
    assert over(site, "MAX_CONNECTIONS") == 2
    assert all(client.fence() == [] for client in good)
    connection_of(site, good[0]).session.end("transport close")
    assert site.connect(transport=transport).fence() == []


@TRANSPORTS
@settings(SOCKETIO_HANDSHAKE_RATE=(0.001, 3))
def test_handshakes_of_a_worker(site: Site, transport: str) -> None:
    good = [site.connect(transport=transport) for _ in range(3)]
    assert refusal(site, transport) == (503, "too many handshakes at once")
    assert over(site, "HANDSHAKE_RATE") == 1
    assert all(client.fence() == [] for client in good)


@TRANSPORTS
@settings(SOCKETIO_HANDSHAKE_RATE_PER_ADDRESS=(0.001, 3))
def test_handshakes_of_an_address(site: Site, transport: str) -> None:
    good = [site.connect(transport=transport) for _ in range(3)]
    assert refusal(site, transport) == (429, "too many handshakes of one address")
    assert over(site, "HANDSHAKE_RATE_PER_ADDRESS") == 1
    assert all(client.fence() == [] for client in good)


# Handlers


@settings(SOCKETIO_MAX_HANDLERS=3)
def test_handlers_that_run_at_once(site: Site) -> None:
    go_on, running = Event(), []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        running.append(message)
        go_on.wait()
        running.remove(message)

    crowd = site.connect_several(5)
    for number, client in enumerate(crowd):
        client.send(number)
    wait_until(lambda: len(running) == 3)
    wait_until(lambda: over(site, "MAX_HANDLERS"))
    gevent.sleep(UNIT)
    assert len(running) == 3
    go_on.set()
    for client in crowd:
        client.fence()
    assert running == []


# What waits for handlers


@TRANSPORTS
@settings(SOCKETIO_MAX_PAYLOAD=100_000)
@pytest.mark.parametrize("size", [1_500, 20_000, 90_000])
def test_large_events_wait_in_small_numbers(site: Site, transport: str, size: int) -> None:
    """128 of a megabyte each would be too many."""
    go_on, heard = Event(), []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        go_on.wait()
        heard.append(message[0])

    client, other = site.connect(transport=transport), site.connect()
    connection = connection_of(site, client)
    number = 3_000_000 // size
    bulk = "x" * size
    packets = [clients.encode(clients.EVENT, data=["message", n, bulk])[0] for n in range(number)]

    def flood() -> None:
        for packet in packets:
            client.connection.transport.send(packet)

    flooding = gevent.spawn(flood)
    try:
        wait_until(lambda: connection.session.paused, what="the pause")
        gevent.sleep(UNIT)
        assert connection._large <= 2 * 100_000
        assert len(connection._inbox or ()) <= 2 * 100_000 // size + 1
        assert other.fence() == []
        go_on.set()
        flooding.get(timeout=clients.TIMEOUT)
    finally:
        flooding.kill()
    client.fence()
    assert heard == list(range(number))
    assert connection._large == 0 and not connection.session.paused


@settings(SOCKETIO_MAX_PAYLOAD=100_000)
def test_large_attachments_count_too(site: Site) -> None:
    go_on = Event()
    on_message(lambda request, socket, context, message: go_on.wait())
    client = site.connect()
    (connection,) = site.dispatcher.connections

    def flood() -> None:
        for _ in range(20):
            client.send(b"x" * 50_000)

    flooding = gevent.spawn(flood)
    try:
        wait_until(lambda: connection.session.paused, what="the pause")
        assert connection._large <= 2 * 100_000
        go_on.set()
        flooding.get(timeout=clients.TIMEOUT)
    finally:
        flooding.kill()
    client.fence()


@settings(SOCKETIO_MAX_PAYLOAD=100_000)
def test_a_call_is_answered_behind_large_events(site: Site) -> None:
    """And no more than eight times as much waits meanwhile."""
    answers: list[Any] = []

    @on_event("ask")
    def ask(request: Any, socket: Any, context: Any) -> None:
        answers.append(socket.call("question", timeout=clients.TIMEOUT))

    heard: list[int] = []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        heard.append(len(message))

    client = site.connect()
    (connection,) = site.dispatcher.connections
    client.emit("ask")
    question = client.packet()
    for _ in range(5):
        client.send("x" * 90_000)
    client.connection.write(clients.ACK, "/", question.id, ["answer"])
    client.fence()
    assert answers == ["answer"]
    assert heard == [90_000] * 5
    assert connection._large == 0 and not connection.session.paused


@settings(SOCKETIO_MAX_PACKETS=10_000)
def test_a_post_of_very_many_events_does_not_pile_up(site: Site) -> None:
    go_on, heard = Event(), []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        go_on.wait()
        heard.append(message)

    client = site.connect(transport="polling")
    (connection,) = site.dispatcher.connections
    posting = gevent.spawn(
        client.connection.transport.send, *[f'42["message",{n}]' for n in range(10_000)]
    )
    wait_until(lambda: connection.session.paused, what="the pause")
    gevent.sleep(UNIT)
    assert len(connection._inbox or ()) <= 150
    go_on.set()
    posting.get(timeout=clients.TIMEOUT)
    client.fence()
    assert heard == list(range(10_000))


def test_a_segment_of_very_many_events_does_not_pile_up(site: Site) -> None:
    go_on, heard = Event(), []

    @on_message
    def message(request: Any, socket: Any, context: Any, message: Any) -> None:
        go_on.wait()
        heard.append(message)

    client = site.connect()
    (connection,) = site.dispatcher.connections
    sending = gevent.spawn(
        client.connection.transport.send, *[f'42["message",{n}]' for n in range(10_000)]
    )
    wait_until(lambda: connection.session.paused, what="the pause")
    gevent.sleep(UNIT)
    assert len(connection._inbox or ()) <= 150
    go_on.set()
    sending.get(timeout=clients.TIMEOUT)
    client.fence()
    assert heard == list(range(10_000))


# The settings arrive


def test_every_limit_reaches_the_engine_and_the_application() -> None:
    values = {name: conf.get(name) for name in conf.SETTINGS}
    changed = {
        f"SOCKETIO_{name}": value + 1
        for name, value in values.items()
        if name.startswith("MAX_") and value is not None and name not in ("MAX_NAME",)
    }
    with Site(**changed, SOCKETIO_MAX_NAME=254, SOCKETIO_UPGRADE_TIMEOUT=11) as site:
        config, limits = site.dispatcher.engine.config, site.dispatcher.limits
        assert (config.max_payload, config.max_buffer) == (1_000_001, 1_048_577)
        assert (config.max_packets, config.max_fragments) == (10_001, 1025)
        assert config.upgrade_timeout == 11
        assert (limits.packet.attachments, limits.packet.attachment_bytes) == (11, 1_000_001)
        assert (limits.packet.depth, limits.packet.name) == (65, 254)
        assert (limits.channels, limits.namespaces) == (1025, 33)
        assert site.dispatcher.runners._limit == 1001


def test_a_refusal_is_one_line_of_the_log(
    site: Site, caplog: pytest.LogCaptureFixture, heard: list[Any]
) -> None:
    client = site.connect()
    caplog.set_level(logging.INFO, "django_socketio")
    send(client.connection, *binary(*[b"x"] * 11))
    client.connection.wait_for_end()
    (line,) = [r.getMessage() for r in caplog.records if "attachments" in r.getMessage()]
    assert line == f"Session {client.connection.sid}: 11 attachments, over 10"
