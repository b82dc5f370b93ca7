"""What clients that are behind do without: who decides, what they get, and what is counted."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from django.core.exceptions import ImproperlyConfigured

import django_socketio
from django_socketio import envelope, hub as topics, runtime
from django_socketio.events import on_connect, on_disconnect, on_event
from django_socketio.slow import Drops, Rules
from django_socketio.sockets import Socket
from tests.clients import Client, Lost
from tests.sites import Site, settings
from tests.support import wait_until

RULES = [
    ("ticks-", "volatile"),
    ("state-", "coalesce"),
    ("ticks-.*|x", "coalesce"),
    (".*y", "disconnect"),
]
VOLATILE, ORDINARY = (envelope.VOLATILE, ""), (0, "")


# Whoever sends decides


@pytest.mark.parametrize(
    ("channels", "manner"),
    [
        ([], ORDINARY),
        (["ticks-1"], VOLATILE),
        (["ticks-1", "ticks-2"], VOLATILE),
        (["my-ticks-1"], ORDINARY),
        (["ticks-1", "other"], ORDINARY),
        (["any"], ORDINARY),
    ],
)
def test_rules_of_channels(channels: list[str], manner: tuple[int, str]) -> None:
    rules = Rules(RULES)
    assert rules.manner(None, None, channels) == manner
    assert rules.manner(None, None, channels) == manner
    assert rules.manner(False, None, channels) == ORDINARY  # a call overrules
    assert rules.manner(True, None, channels) == VOLATILE
    assert rules.manner(None, "key", channels) == rules.manner(False, "key", channels) == (0, "key")


def test_the_channels_of_a_rule_coalesce_by_a_key_that_no_call_can_give() -> None:
    rules = Rules(RULES)
    (flags, key) = rules.manner(None, None, ["state-1"])
    assert flags == 0 and key
    with pytest.raises(ValueError, match="printable"):
        rules.manner(None, key)


def test_rules_are_looked_up_once_per_channel_and_remembered_in_bounds() -> None:
    rules = Rules(RULES)
    for number in range(5_000):
        assert rules.manner(None, None, [f"ticks-{number}"]) == VOLATILE
    assert len(rules._known) <= 1_000


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb", 5, b"key"])
def test_what_is_no_key(key: Any) -> None:
    with pytest.raises(ValueError, match="coalesce= takes a printable string of 1 to 255"):
        Rules().manner(None, key)


def test_both_at_once() -> None:
    with pytest.raises(ValueError, match="volatile or coalesces, not both"):
        Rules().manner(True, "key")


@settings(SOCKETIO_SLOW_CONSUMERS=RULES)
def test_every_way_to_send_takes_both(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[envelope.Envelope] = []

    @on_event("do")
    def do(request: Any, socket: Any, context: Any) -> None:
        for send, args in [
            (socket.send, ()),
            (socket.emit, ()),
            (socket.broadcast, ()),
            (socket.send_and_broadcast, ()),
            (socket.broadcast_channel, ("room",)),
            (socket.send_and_broadcast_channel, ("room",)),
            (socket.send_and_broadcast_channel, ()),
            (django_socketio.broadcast, ()),
            (django_socketio.broadcast_channel, ("room",)),
            (django_socketio.emit, ()),
        ]:
            every_manner(lambda *a, **k: send("m", *a, **k), args)  # noqa: B023
        every_manner(lambda **k: django_socketio.send(socket.sid, "m", **k), ())

    def every_manner(send: Callable[..., Any], args: Any) -> None:
        send(*args, volatile=True)
        send(*args, coalesce="key")
        send(*args)
        with pytest.raises(ValueError, match="not both"):
            send(*args, volatile=True, coalesce="key")

    client = site.connect()
    assert client.subscribe("room") == client.subscribe("ticks-1") == {"ok": True}
    hub = runtime.get_hub()
    publish = hub.publish
    monkeypatch.setattr(
        hub, "publish", lambda t, letter: published.append(letter) or publish(t, letter)
    )  # type: ignore[func-returns-value]
    client.emit("do")
    received = client.fence()
    # One that keeps up gets all; broadcast() and broadcast_channel() are for others.
    assert len(received) == 3 * 9
    manners = [(letter.flags, letter.key) for letter in published]
    assert manners == [VOLATILE, (0, "key"), ORDINARY] * 9


@settings(SOCKETIO_SLOW_CONSUMERS=RULES)
def test_what_is_sent_to_a_channel_goes_by_its_rule(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, published = runtime.get_hub(), Counter[Any]()
    client = site.connect()
    for name in ("ticks-1", "state-1", "other"):
        assert client.subscribe(name) == {"ok": True}
    publish = hub.publish

    def note(topic: str, letter: envelope.Envelope) -> int:
        published[topic, letter.flags, bool(letter.key)] += 1
        return publish(topic, letter)

    monkeypatch.setattr(hub, "publish", note)
    for name in ("ticks-1", "state-1", "other"):
        django_socketio.broadcast_channel("m", name)
        django_socketio.emit("e", channel=name)
    django_socketio.broadcast_channel("m", "ticks-1", volatile=False)
    assert published == {
        ("c/,ticks-1", 1, False): 2,
        ("c/,state-1", 0, True): 2,
        ("c/,other", 0, False): 2,
        ("c/,ticks-1", 0, False): 1,
    }


def test_an_impossible_rule_is_told_to_whoever_sends() -> None:
    with pytest.raises(ImproperlyConfigured, match="SOCKETIO_SLOW_CONSUMERS has '\\('"):
        runtime.make_rules([("(", "volatile")])


# Those who are behind


def stall(site: Site, *more: str) -> tuple[Client, Socket]:
    """Return a client that has stopped reading, and its socket."""
    client = site.connect()
    for channel in more:
        assert client.subscribe(channel) == {"ok": True}
    socket = socket_of(site, client)
    while not len(site.dispatcher.engine._stalled):
        socket.send("x" * 10_000)
        gevent.sleep(0)
    return client, socket


def socket_of(site: Site, client: Client) -> Socket:
    return next(
        socket
        for connection in site.dispatcher.connections
        for socket in connection.sockets.values()
        if socket is not None and socket.sid == client.sid
    )


def rest(client: Client) -> list[Any]:
    """Return what a client gets that reads again, without what it was stalled with."""
    return [args for args in client.fence() if args[1][:1] != "x"]


def drops() -> dict[str, int]:
    counters = runtime.get_hub().counters
    return {name: number for name, number in counters.items() if name.startswith("dropped: ")}


def test_volatile(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    client, socket = stall(site, "room")
    good = site.connect()
    assert good.subscribe("room") == {"ok": True}
    for number in range(5_000):
        django_socketio.broadcast_channel(f"{number}" * 200, "room", volatile=True)
        if number % 100 == 0:
            good.fence()
    django_socketio.broadcast("all", volatile=True)
    socket.send("to itself", volatile=True)
    socket.send("behind")
    assert rest(client) == [["message", "behind"]]
    assert drops() == {
        "dropped: volatile room": 5_000,
        "dropped: volatile (everybody)": 1,
        "dropped: volatile (one client)": 1,
    }
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        "Slow clients did without 1 messages: volatile room",
        "Slow clients did without 1 messages: volatile (everybody)",
        "Slow clients did without 1 messages: volatile (one client)",
    ]


def test_coalesced(site: Site) -> None:
    client, socket = stall(site, "room", "hall")
    for number in range(2_000):
        django_socketio.broadcast_channel(f"room {number}", "room", coalesce="k")
        django_socketio.broadcast_channel(f"hall {number}", "hall", coalesce="k")
        django_socketio.emit("other", f"same key {number}", channel="hall", coalesce="k")
        socket.send_and_broadcast_channel(f"both {number}", coalesce="k")
        socket.emit("e", f"own {number}", coalesce="k")
        socket.emit("e", f"other key {number}", coalesce="l")
    assert rest(client) == [
        ["message", "room 1999"],
        ["other", "same key 1999"],
        ["message", "both 1999"],
        ["e", "own 1999"],
        ["e", "other key 1999"],
    ]
    assert drops() == {
        "dropped: coalesced room": 1_999,
        "dropped: coalesced hall": 3_999,
        "dropped: coalesced (several channels)": 1_999,
        "dropped: coalesced (one client)": 2 * 1_999,
    }


def test_namespaces_have_keys_of_their_own(site: Site) -> None:
    site.namespace("/chat")
    client, socket = stall(site)
    other = client.connection.request("/chat")
    django_socketio.broadcast("one", coalesce="k")
    wait_until(lambda: runtime.get_hub().count(topics.everybody("/chat")), what="the second")
    django_socketio.broadcast("two", namespace="/chat", coalesce="k")
    assert rest(client) == [["message", "one"]]
    other.accepted()
    assert other.event() == ["message", "two"]


@settings(SOCKETIO_SLOW_CONSUMERS=RULES)
def test_by_the_rule_of_a_channel(site: Site) -> None:
    client, socket = stall(site, "ticks-1", "state-1", "state-2")
    for number in range(100):
        for channel in ("ticks-1", "state-1", "state-2"):
            django_socketio.broadcast_channel(f"{channel} {number}", channel)
    assert rest(client) == [["message", "state-1 99"], ["message", "state-2 99"]]
    assert drops() == {
        "dropped: volatile ticks-1": 100,
        "dropped: coalesced state-1": 99,
        "dropped: coalesced state-2": 99,
    }


def test_by_default_it_is_disconnected(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []

    @on_disconnect
    def disconnected(request: Any, socket: Any, context: Any) -> None:
        reasons.append(socket.disconnect_reason)

    client, _ = stall(site, "room")
    good = site.connect()
    assert good.subscribe("room") == {"ok": True}
    received = []
    for number in range(4_000):
        django_socketio.broadcast_channel(f"{number:>1000}", "room")
        if number % 100 == 99:
            received += good.fence()
    assert received == [["message", f"{number:>1000}"] for number in range(4_000)]
    assert reasons == ["slow consumer"]
    assert site.dispatcher.engine.counters["closed: slow consumer"] == 1
    with pytest.raises(Lost):
        client.fence()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and "more than SOCKETIO_MAX_BUFFER (1048576)" in lines[0]


# While on_connect decides


def hold(site: Site, volatile: bool | None = None) -> None:
    @on_connect
    def connect(request: Any, socket: Any, context: Any) -> None:
        for number in range(20):
            socket.send(f"{number:>999}", volatile=volatile)


@settings(SOCKETIO_MAX_BUFFER=10_000)
def test_what_waits_for_on_connect_is_bounded(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    hold(site)
    with site.open() as connection:
        client = connection.request()
        assert client.packet().type == 4
    assert (
        sum("SOCKETIO_MAX_BUFFER (10000)" in record.getMessage() for record in caplog.records) == 1
    )


@settings(SOCKETIO_MAX_BUFFER=10_000)
def test_volatile_ones_for_which_there_is_no_room_in_on_connect(site: Site) -> None:
    hold(site, volatile=True)
    client = site.connect()
    assert client.fence() == [["message", f"{number:>999}"] for number in range(9)]
    assert drops() == {"dropped: volatile (one client)": 11}


@settings(SOCKETIO_MAX_BUFFER=10_000)
def test_a_single_message_of_on_connect_may_be_larger(site: Site) -> None:
    @on_connect
    def connect(request: Any, socket: Any, context: Any) -> None:
        socket.send("x" * 50_000)

    client = site.connect()
    assert client.fence() == [["message", "x" * 50_000]]


# What is counted


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_log_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock, counters = Clock(), Counter[str]()
    drops = Drops(counters, lambda topic: topic, clock)
    for second in range(150):
        clock.time = 100.0 + second
        for _ in range(10):
            drops.count("volatile", "room")
        drops.count("coalesced", "room")
    assert counters == {"dropped: volatile room": 1_500, "dropped: coalesced room": 150}
    assert [record.args for record in caplog.records] == [
        (1, "volatile room"),
        (1, "coalesced room"),
        (600, "volatile room"),
        (60, "coalesced room"),
        (600, "volatile room"),
        (60, "coalesced room"),
    ]


def test_there_are_not_more_counters_than_a_fixed_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    counters = Counter[str]()
    drops = Drops(counters, lambda topic: topic, Clock())
    for _ in range(2):
        for number in range(3_000):
            drops.count("volatile", f"room-{number}")
    assert len(counters) == 1_001 and len(drops._names) <= 1_000 and len(drops._logs) <= 1_002
    assert counters.total() == 6_000
    assert counters["dropped: volatile (other)"] == 4_000
    assert counters["dropped: volatile room-5"] == 2


@pytest.mark.parametrize(
    ("topic", "description"),
    [
        (topics.everybody("/"), "(everybody)"),
        (topics.everybody("/chat"), "(everybody)"),
        (topics.channel("/", "a,b"), "a,b"),
        (topics.channel("/chat", "a"), "/chat,a"),
        (topics.subscribers("/"), "(several channels)"),
        (topics.session("/", "sid"), "(one client)"),
        ("", "(other)"),
    ],
)
def test_topics_in_the_words_of_users(topic: str, description: str) -> None:
    assert topics.describe(topic) == description
