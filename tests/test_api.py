"""Sending from outside of handlers: from wherever, to whom, and what it raises."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
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
    api,
    broadcast,
    broadcast_channel,
    channels,
    count,
    disconnect,
    emit,
    health,
    members,
    runtime,
    send,
    subscribe,
    unsubscribe,
)
from django_socketio.events import on_connect, on_disconnect, on_event, on_finish
from django_socketio.urls import urlpatterns as socketio_urls
from tests import clients
from tests.clients import Client
from tests.deployment.cluster import Cluster
from tests.services import Redis
from tests.sites import Site, settings
from tests.support import ROOT, UNIT, wait_until

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


# Across processes


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module")
def deployment(redis: Redis) -> Iterator[Cluster]:
    with Cluster(redis.url, workers=2) as cluster:
        yield cluster


@contextmanager
def worker_of(backend: Any, directory: Path) -> Iterator[Site]:
    """Serve in this process too, as another worker of a deployment."""
    runtime.stop()  # whoever asked before has made a backend
    with Site(SOCKETIO_BACKEND=backend, SOCKETIO_RUNTIME_DIR=str(directory / "r")) as site:
        yield site


@pytest.fixture
def node(redis: Redis, deployment: Cluster) -> Iterator[Site]:
    with worker_of(redis.url, deployment.directory) as site:
        wait_until(lambda: health()["ok"], what="the first beat")
        yield site


@pytest.fixture
def everywhere(node: Site, deployment: Cluster) -> Iterator[list[Client]]:
    """Clients of this process and of each worker, of one channel but the last."""
    with ExitStack() as block:
        addresses = [node.address, *deployment.addresses, deployment.addresses[0]]
        everywhere = []
        for number, address in enumerate(addresses):
            transport = ["websocket", "polling"][number % 2]
            everywhere.append(clients.connect(address, transport=transport))
            block.callback(everywhere[-1].close)
        for client in everywhere[:-1]:
            assert client.subscribe("room") == {"ok": True}
        yield everywhere


def plainly(deployment: Cluster, *lines: str) -> list[Any]:
    """Run lines in a process without sockets or patches; return what each `tell()` was given."""
    script = [
        "import django, json, time",
        "django.setup()",
        "from django_socketio import *",
        "from django_socketio import runtime",
        "def tell(value): print(json.dumps(value, default=sorted), flush=True)",
        *lines,
    ]
    env = {**deployment.env, "DJANGO_SETTINGS_MODULE": "tests.deployment.settings"}
    command = [sys.executable, "-W", "error", "-c", "\n".join(script)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800 * UNIT, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sids(several: Iterable[Client]) -> set[str]:
    return {client.sid for client in several}


def test_who_is_where_in_the_cluster(everywhere: list[Client], deployment: Cluster) -> None:
    inside, outside = sids(everywhere[:-1]), everywhere[-1].sid
    for _ in range(20):
        assert members("room") == inside
    assert (count("room"), count(), count("nowhere")) == (3, 4, 0)
    assert (count(namespace="/nowhere"), members("nowhere")) == (0, set())
    assert channels() == {"room": 3}
    subscribe(outside, "hall")
    assert channels() == {"room": 3, "hall": 1}
    assert plainly(
        deployment,
        "tell(members('room'))",
        "tell([count('room'), count(), count('nowhere')])",
        "tell(channels())",
        "tell(count(namespace='/nowhere'))",
    ) == [sorted(inside), [3, 4, 0], {"room": 3, "hall": 1}, 0]


def test_the_first_question_of_many_threads(everywhere: list[Client], deployment: Cluster) -> None:
    lines = (
        "from concurrent.futures import ThreadPoolExecutor",
        "pool = ThreadPoolExecutor(16)",
        "tell([*pool.map(lambda number: count('room'), range(200))])",
        "tell(list(runtime.get_cluster()._questions))",
    )
    assert plainly(deployment, *lines) == [[3] * 200, []]


def test_the_first_question_of_a_young_worker(
    redis: Redis, deployment: Cluster, everywhere: list[Client]
) -> None:
    """The one that `everywhere` had in this process is gone."""
    with worker_of(redis.url, deployment.directory):
        assert members("room") == sids(everywhere[1:-1])


def test_subscribed_is_subscribed(everywhere: list[Client], deployment: Cluster) -> None:
    """What is sent as soon as `subscribe()` returns arrives, wherever the client is."""
    for number in range(20):
        for client in everywhere:
            subscribe(client.sid, f"channel {number}")
            broadcast_channel(number, f"channel {number}")
            assert client.event() == ["message", number]
            unsubscribe(client.sid, f"channel {number}")
            with suppress(NoSocket):
                broadcast_channel("late", f"channel {number}")
    for client in everywhere:
        lines = (
            f"sid = {client.sid!r}",
            "subscribe(sid, 'hall'); broadcast_channel('hello', 'hall')",
            "subscribe(sid, 'hall'); tell(members('hall'))",
            "unsubscribe(sid, 'hall'); unsubscribe(sid, 'hall'); tell(members('hall'))",
        )
        assert plainly(deployment, *lines) == [[client.sid], []]
        assert client.event() == ["message", "hello"]
        assert client.fence() == []


def test_a_handler_subscribes_its_own_socket(node: Site) -> None:
    @on_event("join")
    def join(request: Any, socket: Any, context: Any, channel: str) -> list[str]:
        sid = socket.session.session_id
        subscribe(sid, channel)
        broadcast_channel("welcome", channel)
        unsubscribe(sid, channel)
        subscribe(sid, channel)
        found = members(channel)
        assert found == {sid}
        return list(socket.channels)

    @on_event("leave")
    def leave(request: Any, socket: Any, context: Any) -> None:
        disconnect(socket.session.session_id)

    client = node.connect()
    assert client.call("join", "hall") == [["hall"]]
    assert client.fence() == [["message", "welcome"]]
    client.emit("leave")
    client.disconnected()


def test_who_is_disconnected_from_afar(everywhere: list[Client], deployment: Cluster) -> None:
    for client in everywhere[:2]:
        disconnect(client.sid)
        client.disconnected()
    lines = [f"disconnect({client.sid!r})" for client in everywhere[2:]]
    assert plainly(deployment, *lines) == []
    for client in everywhere[2:]:
        client.disconnected()
    wait_until(lambda: count() == 0)


@pytest.mark.parametrize("channel", ["room", "hall"])
def test_nobody_of_that_name_in_the_cluster(
    everywhere: list[Client], deployment: Cluster, channel: str
) -> None:
    for function in (subscribe, unsubscribe):
        for sid in ("nobody", "", "x" * 500, "\n", everywhere[0].connection.sid):
            with pytest.raises(NoSocket, match="There is no socket with the session id"):
                function(sid, channel)
        for name in ("", "x" * 256, "a\n", None):
            with pytest.raises(ValueError, match="A channel is"):
                function(everywhere[1].sid, name)
    (answer,) = plainly(
        deployment,
        "try: subscribe('nobody', 'room')",
        "except NoSocket as error: tell(str(error))",
    )
    assert answer == "There is no socket with the session id 'nobody'."
    assert members("room") == sids(everywhere[:-1])


def test_nobody_serves_anything(tmp_path: Path) -> None:
    with Redis() as redis:
        started = time.monotonic()
        lines = ("tell([members('room'), count(), channels(), health()['ok']])",)
        assert plainly(Cluster(redis.url, workers=0), *lines) == [[[], 0, {}, True]]
        assert time.monotonic() - started < 100 * UNIT


@pytest.mark.timeout(2000 * UNIT)
def test_no_ghosts() -> None:
    """Of a worker that is killed nobody is left, and its clients count where they come back."""
    with Redis() as redis, Cluster(redis.url, workers=3) as cluster, ExitStack() as block:
        site = block.enter_context(worker_of(redis.url, cluster.directory))
        wait_until(lambda: health()["ok"])

        def connect(address: str) -> Client:
            client = clients.connect(address)
            block.callback(client.connection.drop)
            client.subscribe("room")
            return client

        crowd = [connect(address) for address in cluster.addresses for _ in range(5)]
        crowd.append(connect(site.address))
        assert members("room") == sids(crowd)
        cluster.kill(0)
        wait_until(lambda: members("room") == sids(crowd[5:]), timeout=60 * UNIT)
        assert plainly(cluster, "tell(count('room'))") == [11]
        crowd[:5] = [connect(cluster.addresses[1]) for _ in range(5)]
        for _ in range(10):
            assert members("room") == sids(crowd)
        wait_until(lambda: len(runtime.get_cluster().nodes()) == 3)
        assert plainly(cluster, "tell(count('room'))") == [16]


@pytest.mark.timeout(2000 * UNIT)
@pytest.mark.parametrize("killed", [True, False])
def test_the_owner_goes_while_it_should_subscribe(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(api, "_TIMEOUT", 40 * UNIT)
    with Cluster(redis.url, workers=1) as cluster, ExitStack() as block:
        block.enter_context(worker_of(redis.url, cluster.directory))
        wait_until(lambda: health()["ok"])
        client = clients.connect(cluster.addresses[0])
        block.callback(client.connection.drop)
        cluster.servers[0].signal(signal.SIGSTOP)
        try:
            asking = gevent.spawn(outcome, subscribe, client.sid, "room")
            gevent.sleep(2 * UNIT)
            if killed:
                cluster.kill(0)
            kind = NoSocket if killed else BackendError
            assert isinstance(asking.get(timeout=200 * UNIT), kind)
        finally:
            if not killed:
                cluster.servers[0].signal(signal.SIGCONT)


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """Return what the function returns or raises, for a greenlet."""
    try:
        return function(*args)
    except (NoSocket, BackendError) as error:
        return error


@pytest.mark.timeout(2000 * UNIT)
def test_the_carrier_of_the_cluster_is_down(tmp_path: Path) -> None:
    with Redis() as redis, ExitStack() as block:
        url = {"BACKEND": PATH_OF_REDIS, "OPTIONS": {"url": redis.url, "timeout": 20 * UNIT}}
        site = block.enter_context(worker_of(url, tmp_path))
        wait_until(lambda: health()["ok"])
        client = site.connect()
        redis.freeze()
        calls = [
            lambda: members("room"),
            lambda: count(),
            lambda: channels(),
            lambda: subscribe(client.sid, "room"),
            lambda: unsubscribe(client.sid, "room"),
            lambda: disconnect(client.sid),
        ]
        asking = [gevent.spawn(outcome, call) for call in calls]
        for each in asking:
            assert isinstance(each.get(timeout=400 * UNIT), BackendError)
        wait_until(lambda: not health()["ok"])
        assert health()["reason"] == "the backend cannot be heard"
        redis.thaw()
        wait_until(lambda: health()["ok"], timeout=400 * UNIT)
        assert count() == 1


PATH_OF_REDIS = "django_socketio.backends.redis.RedisBackend"


# Health


def test_health_of_a_process_without_sockets(redis: Redis, deployment: Cluster) -> None:
    assert health()["ok"] is False  # of memory://, which cannot reach any
    assert "one process only" in health()["reason"]
    (state,) = plainly(deployment, "tell(health())")
    assert (state["ok"], state["reason"]) == (True, "")
    with Redis() as other:
        cluster = Cluster(other.url, workers=0)
    (state,) = plainly(cluster, "tell(health())")  # it is down again
    assert (state["ok"], state["reason"]) == (False, "the backend cannot be reached")


def test_health_of_one_process_alone(site: Site) -> None:
    wait_until(lambda: health()["ok"])
    node = runtime.get_cluster().node
    assert health() == {"ok": True, "reason": "", "node": node}
    assert site.connect().connection.sid.startswith(node)
    site.dispatcher.engine.stop_accepting()
    assert health() == {"ok": False, "reason": "stopping", "node": node}
