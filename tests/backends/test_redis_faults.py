"""The Redis backend in bad times, each of which has cost a neighbour its messages."""

import ctypes
import gc
import logging
import os
import shutil
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import hiredis
import pytest
from gevent.server import StreamServer
from redis import Redis as Client
from redis.exceptions import ResponseError

from django_socketio.backends import BackendError
from django_socketio.backends.redis import RedisBackend
from tests.backends.test_redis import Inbox, connect
from tests.services import Redis, Service
from tests.support import UNIT, require, wait_until

TIMEOUT = 40 * UNIT

Make = Callable[..., RedisBackend]


@pytest.fixture
def server() -> Iterator[Redis]:
    """Return a server of the test's own, to do it harm."""
    with Redis() as server:
        yield server


@pytest.fixture
def client(server: Redis) -> Iterator[Client]:
    with connect(server) as client:
        yield client


@pytest.fixture
def make(server: Redis) -> Iterator[Make]:
    made = []

    def make(url: str = server.url, **options: Any) -> RedisBackend:
        made.append(RedisBackend(url, **{"timeout": TIMEOUT, **options}))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def backend(make: Make, inbox: Inbox) -> RedisBackend:
    """Return a backend that listens to the topic t."""
    backend = make()
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    return backend


def hears(backend: RedisBackend, inbox: Inbox, topic: str = "t", payload: bytes = b"x") -> bool:
    """Return whether what is published arrives: once the backend has recovered it does."""
    before = len(inbox)
    try:
        reached = backend.publish(topic, payload)
    except BackendError:
        return False
    if reached:
        wait_until(lambda: (topic, payload) in inbox[before:], timeout=TIMEOUT)
    return bool(reached)


def failure(call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(BackendError) as caught:
        call(*args)
    return str(caught.value)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


class Scripted:
    """A Redis that answers each command as `answer` says; None is silence."""

    def __init__(self, answer: Callable[[list[bytes]], bytes | None]) -> None:
        self.answer = answer
        self.connections = 0
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def __enter__(self) -> "Scripted":
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.server_port}"

    def _serve(self, connection: socket.socket, address: object) -> None:
        self.connections += 1
        reader = hiredis.Reader()
        try:
            while data := connection.recv(65536):
                reader.feed(data)
                while command := reader.gets():
                    connection.sendall(self.answer(command) or b"")
        except OSError:
            pass


class Proxy:
    """A way to a Redis on which a host may vanish without a word: `lose()`."""

    def __init__(self, server: Redis) -> None:
        self._target = ("127.0.0.1", server.port)
        self._pumps: list[gevent.Greenlet] = []
        self._closed = threading.Event()
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def __enter__(self) -> "Proxy":
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop()
        self.lose()
        self._closed.set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.server_port}"

    def lose(self) -> None:
        """Forward nothing more on the connections that there are; new ones are fine."""
        gevent.killall(self._pumps)
        self._pumps.clear()

    def _serve(self, near: socket.socket, address: object) -> None:
        with socket.create_connection(self._target) as far:
            for pair in ((near, far), (far, near)):
                self._pumps.append(gevent.spawn(self._pump, *pair))
            self._closed.wait()  # for who returns, closes

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


# Publishing while Redis is down


def test_a_refused_connection_fails_at_once(make: Make, server: Redis) -> None:
    backend = make(timeout=100 * TIMEOUT)
    server.stop()
    with within(TIMEOUT):
        assert "refused" in failure(backend.publish, "t", b"x")
    with within(TIMEOUT):
        greenlets = [gevent.spawn(failure, backend.publish, "t", b"x") for _ in range(200)]
        gevent.joinall(greenlets, raise_error=True)
    assert backend.counters == {"publish failed: connection": 201}


def test_a_silent_redis_holds_up_one_at_a_time(make: Make) -> None:
    """The first that come wait for `timeout`; then one does, and the others give up soon."""
    with Scripted(lambda command: None) as silent:
        backend = make(silent.url, timeout=2 * TIMEOUT)
        with within(2.5 * TIMEOUT):
            first = [gevent.spawn(failure, backend.publish, "t", b"x") for _ in range(20)]
            gevent.joinall(first, raise_error=True)
        later = [gevent.spawn(failure, backend.publish, "t", b"x") for _ in range(20)]
        gevent.sleep(1.5 * TIMEOUT)
        assert sum(not greenlet.ready() for greenlet in later) == 1
        gevent.joinall(later, raise_error=True)
    assert backend.counters == {"publish failed: timeout": 40}


def test_a_name_server_that_hangs_does_not_hold_anybody_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    resolve = socket.getaddrinfo
    hanging = threading.Event()

    def getaddrinfo(*args: Any) -> Any:
        hanging.wait()
        return resolve(*args)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(2):
        with within(2 * TIMEOUT):
            assert "no connection within" in failure(backend.publish, "t", b"x")
    hanging.set()
    assert backend.publish("t", b"x") == 0


def test_one_attempt_to_connect_is_all_that_those_who_wait_for_it_get(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def getaddrinfo(*args: Any) -> None:
        attempts.append(args)
        gevent.sleep(UNIT)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    backend = make()
    greenlets = [gevent.spawn(failure, backend.publish, "t", b"x") for _ in range(50)]
    for greenlet in greenlets:
        assert "no such host" in greenlet.get()
    assert len(attempts) == 1


def test_an_attempt_that_nobody_waited_for_is_used_while_it_works(
    make: Make, server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when names are found, but later than anybody waits."""
    resolve, slow = socket.getaddrinfo, gevent.event.Event()
    attempts = []

    def getaddrinfo(*args: Any) -> Any:
        attempts.append(args)
        slow.wait()
        return resolve(*args)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    backend = make()
    failure(backend.publish, "t", b"x")
    slow.set()
    attempt = backend._publisher._attempt
    wait_until(attempt._done.is_set)
    assert backend.publish("t", b"x") == 0
    assert len(attempts) == 1
    slow.clear()
    backend._publisher._wire.close()
    failure(backend.publish, "t", b"x")
    slow.set()
    wait_until(backend._publisher._attempt._done.is_set)
    server.kill()
    server.start()
    assert backend.publish("t", b"x") == 0
    assert len(attempts) == 3


def test_what_waited_in_the_queue_fails_in_time_too(make: Make) -> None:
    with Scripted(lambda command: None) as silent:
        backend = make(silent.url)
        greenlets = []
        for _ in range(10):
            greenlets.append(gevent.spawn(failure, backend.publish, "t", b"x"))
            gevent.sleep(TIMEOUT / 12)
        with within(1.5 * TIMEOUT):
            gevent.joinall(greenlets, raise_error=True)


# What Redis refuses

ERRORS = {
    b"READONLY": "READONLY You can't write against a read only replica.",
    b"OOM": "OOM command not allowed when used memory > 'maxmemory'.",
    b"NOAUTH": "NOAUTH Authentication required.",
    b"NOPERM": "NOPERM this user has no permissions to run the 'publish' command",
    b"LOADING": "LOADING Redis is loading the dataset in memory",
    b"MISCONF": "MISCONF Redis is configured to save RDB snapshots, but it's unable to",
    b"ERR": "ERR unknown command",
    b"odd": "odd one",
}


def test_an_error_reply_concerns_its_own_publish_alone(make: Make) -> None:
    def answer(command: list[bytes]) -> bytes:
        error = ERRORS.get(command[1].rpartition(b"/")[2])
        return b":3\r\n" if error is None else b"-%b\r\n" % error.encode()

    with Scripted(answer) as scripted:
        backend = make(scripted.url)
        good = [gevent.spawn(backend.publish, "good", b"x") for _ in range(3)]
        bad = {name: gevent.spawn(failure, backend.publish, name.decode(), b"x") for name in ERRORS}
        good += [gevent.spawn(backend.publish, "good", b"x") for _ in range(3)]
        for name, greenlet in bad.items():
            assert ERRORS[name] in greenlet.get()
        assert [greenlet.get() for greenlet in good] == 6 * [3]
    failed = {f"publish failed: {name.decode()}": 1 for name in ERRORS if name != b"odd"}
    assert backend.counters == {**failed, "publish failed: ERR": 2}


def test_a_connection_that_cannot_publish_any_more_is_replaced(make: Make) -> None:
    """A master that has become a replica, or a slot that has moved, is looked for anew."""
    replies = [b"-READONLY no\r\n", b":1\r\n", b"-MOVED 5 1.2.3.4:5\r\n", b":1\r\n", b":2\r\n"]
    with Scripted(lambda command: replies.pop(0)) as scripted:
        backend = make(scripted.url)
        assert "READONLY" in failure(backend.publish, "t", b"x")
        assert backend.publish("t", b"x") == 1
        assert "MOVED" in failure(backend.publish, "t", b"x")
        assert backend.publish("t", b"x") == 1
        assert backend.publish("t", b"x") == 2
        assert scripted.connections == 3


def test_redis_is_full(backend: RedisBackend, inbox: Inbox, client: Client) -> None:
    """What is refused then is to store, which nobody does."""
    client.config_set("maxmemory", "1mb")
    client.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(ResponseError, match="maxmemory"):
        while True:
            client.append("full", 10_000 * "x")
    assert hears(backend, inbox)
    assert backend.publish("t", b"x") == 1


def test_a_user_without_permission(make: Make, client: Client, server: Redis) -> None:
    client.execute_command("ACL SETUSER u on >p resetchannels &socketio:0/may* +@pubsub")
    backend, inbox = make(username="u", password="p"), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["may"])
    assert "NOPERM" in failure(backend.publish, "not", b"x")
    assert "NOPERM" in failure(backend.subscribe, ["not"])
    assert "NOPERM" in failure(backend.subscribe, ["maybe", "not"])
    backend.subscribe(["may"])
    assert backend.publish("may", b"x") == 1
    assert backend.publish("maybe", b"x") == 0
    assert backend.counters["connected"] == 1


def test_what_redis_refuses_does_not_keep_the_listener_from_the_rest(
    make: Make, client: Client
) -> None:
    """Not in an outage either, while somebody tries to subscribe to it all the time."""
    client.execute_command("ACL SETUSER u on >p resetchannels &socketio:0/may* +@pubsub")
    backend, inbox = make(username="u", password="p"), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["may"])
    trying = threading.Event()

    def insist() -> None:
        while not trying.is_set():
            failure(backend.subscribe, ["not"])

    greenlets = [gevent.spawn(insist) for _ in range(3)]
    try:
        for _ in range(3):
            client.client_kill_filter(_type="pubsub")
            wait_until(lambda: hears(backend, inbox, "may"))
    finally:
        trying.set()
        gevent.joinall(greenlets, raise_error=True)


@pytest.mark.parametrize(
    "garbage",
    [b":2\r\n" * 3, b"+OK\r\n", b"*2\r\n:1\r\n:2\r\n", b"$-1\r\n", b"HTTP/1.1 400\r\n\r\n", b"\0"],
)
def test_a_server_that_is_none(make: Make, garbage: bytes, caplog: Any) -> None:
    """It costs the calls an error, and the listener goes on trying."""
    replies = [garbage]
    with Scripted(lambda command: replies[0]) as scripted:
        backend = make(scripted.url)
        backend.start(Inbox().deliver)
        for _ in range(2):
            if garbage[:1] != b":":
                failure(backend.publish, "t", b"x")
            failure(backend.subscribe, ["t"])
        wait_until(lambda: scripted.connections > 5)
    assert len(caplog.records) <= 2


@pytest.mark.parametrize("answer", [b":2\r\n:3\r\n", b":2\r\n:3\r\n:4\r\n+OK\r\n"])
def test_an_answer_too_many_is_not_that_of_the_next(make: Make, answer: bytes) -> None:
    with Scripted(lambda command: answer) as scripted:
        backend = make(scripted.url)
        for _ in range(3):
            assert backend.publish("t", b"x") == 2


@pytest.mark.parametrize("answer", [b"$-1\r\n", b"+OK\r\n", b"*0\r\n"])
def test_an_answer_that_is_no_number(make: Make, answer: bytes) -> None:
    with Scripted(lambda command: answer) as scripted:
        assert "answered with" in failure(make(scripted.url).publish, "t", b"x")


def test_a_credential_provider_that_fails(make: Make, client: Client, caplog: Any) -> None:
    client.execute_command("ACL SETUSER u on >p &* +@pubsub")

    class Provider:
        def get_credentials(self) -> tuple[str, str]:
            if fails:
                raise ZeroDivisionError
            return "u", "p"

    fails = True
    backend, inbox = make(credential_provider=Provider()), Inbox()
    backend.start(inbox.deliver)
    assert "attempt to connect failed" in failure(backend.publish, "t", b"x")
    failure(backend.subscribe, ["t"])
    assert len([record for record in caplog.records if record.exc_info]) == 2
    fails = False
    wait_until(lambda: backend.counters["connected"])
    backend.subscribe(["t"])
    assert hears(backend, inbox)


# Who is killed


def test_a_leader_that_is_killed_takes_no_answer_of_others(make: Make) -> None:
    """In mid-command: the others of its round trip fail, and those that wait go on."""
    released = threading.Event()

    def answer(command: list[bytes]) -> bytes:
        if command[2] == b"held":
            released.wait()
        return b":%d\r\n" % int(command[1].rpartition(b"/")[2])

    with Scripted(answer) as scripted:
        backend = make(scripted.url, timeout=100 * TIMEOUT)
        assert backend.publish("7", b"x") == 7
        first = gevent.spawn(backend.publish, "1", b"held")
        gevent.sleep(UNIT)
        leader = gevent.spawn(backend.publish, "2", b"held")
        batch = [gevent.spawn(failure, backend.publish, str(n), b"held") for n in range(3, 6)]
        gevent.sleep(UNIT)
        released.set()
        assert first.get() == 1
        released.clear()
        gevent.sleep(UNIT)  # the second round trip is under way
        waiting = [gevent.spawn(backend.publish, str(n), b"x") for n in range(10, 20)]
        gevent.sleep(UNIT)
        leader.kill()
        assert all("interrupted" in greenlet.get(timeout=TIMEOUT) for greenlet in batch)
        assert [greenlet.get(timeout=TIMEOUT) for greenlet in waiting] == list(range(10, 20))
        released.set()
        assert backend.publish("8", b"x") == 8


def test_a_greenlet_that_is_killed_in_the_queue_is_nobody_s_burden(make: Make) -> None:
    answers = threading.Event()
    seen = []

    def answer(command: list[bytes]) -> bytes:
        seen.append(command[2])
        answers.wait()
        return b":1\r\n"

    with Scripted(answer) as scripted:
        backend = make(scripted.url, timeout=100 * TIMEOUT)
        first = gevent.spawn(backend.publish, "t", b"first")
        gevent.sleep(UNIT)
        killed = [gevent.spawn(backend.publish, "t", b"killed") for _ in range(5)]
        last = gevent.spawn(backend.publish, "t", b"last")
        gevent.sleep(UNIT)
        gevent.killall(killed)
        answers.set()
        assert first.get(timeout=TIMEOUT) == last.get(timeout=TIMEOUT) == 1
        assert b"killed" not in seen
        assert not backend._publisher._queue and not backend._publisher._is_led


def test_one_that_is_killed_with_the_lead_in_its_hand_passes_it_on(make: Make) -> None:
    """It has been told to lead, and has not run yet."""
    answers = threading.Event()

    def answer(command: list[bytes]) -> bytes:
        answers.wait()
        return b":1\r\n"

    with Scripted(answer) as scripted:
        backend = make(scripted.url, timeout=100 * TIMEOUT)
        greenlets = [gevent.spawn(backend.publish, "t", b"%d" % number) for number in range(4)]
        gevent.sleep(UNIT)
        first, second, *others = greenlets
        first.link(lambda _: second.kill(block=False))
        answers.set()
        assert [greenlet.get(timeout=TIMEOUT) for greenlet in others] == [1, 1]
        assert backend.publish("t", b"x") == 1


def test_one_that_is_killed_while_it_connects(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt goes on, for whoever comes next."""
    backend = make(timeout=100 * TIMEOUT)
    resolve, may = socket.getaddrinfo, threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: may.wait() and resolve(*args))
    first = gevent.spawn(backend.publish, "t", b"x")
    gevent.sleep(UNIT)
    second = gevent.spawn(backend.publish, "t", b"x")
    gevent.sleep(UNIT)
    first.kill()
    may.set()
    assert second.get(timeout=TIMEOUT) == 0


def test_a_gevent_timeout_around_a_publish(backend: RedisBackend, server: Redis) -> None:
    server.freeze()
    with pytest.raises(gevent.Timeout), gevent.Timeout(UNIT):
        backend.publish("t", b"x")
    server.thaw()
    assert backend.publish("u", b"x") == 0
    assert backend.publish("t", b"x") == 1


# Connections that go away


def test_a_connection_that_redis_closed_costs_no_publish(
    backend: RedisBackend, client: Client, server: Redis
) -> None:
    assert backend.publish("u", b"x") == 0
    for _ in range(5):
        client.client_kill_filter(_type="normal")
        assert backend.publish("u", b"x") == 0
    server.kill()
    server.start()
    assert backend.publish("u", b"x") == 0


def test_redis_closes_idle_connections(make: Make) -> None:
    """As `timeout 1` of redis.conf does: the listener's heartbeats keep it, the publisher goes."""
    with Redis("--timeout", "1") as server, connect(server) as client:
        backend = make(server.url)
        backend.start(Inbox().deliver)
        backend.publish("t", b"x")
        wait_until(lambda: len(client.client_list()) == 2, timeout=10 * TIMEOUT)
        assert backend.publish("t", b"x") == 0
        assert backend.counters == {"connected": 1}


def test_the_listener_survives_client_kill(
    backend: RedisBackend, inbox: Inbox, client: Client
) -> None:
    for number in range(5):
        assert client.client_kill_filter(_type="pubsub") == 1
        wait_until(lambda: hears(backend, inbox))
        assert backend.counters["disconnected"] == number + 1


def test_whoever_listens_is_told_of_an_interruption(
    make: Make, inbox: Inbox, client: Client
) -> None:
    backend, interruptions = make(), list[tuple[float, int]]()

    def interrupted(seconds: float) -> None:
        interruptions.append((seconds, backend.publish("t", b"x")))

    backend.interrupted = interrupted
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    assert not interruptions
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: interruptions)
    ((seconds, receivers),) = interruptions
    assert seconds > 0 and receivers == 1


def test_two_quick_reconnects_lose_no_subscription(
    make: Make, inbox: Inbox, client: Client
) -> None:
    """Killed again before all is subscribed again (PSIO's listener came back with a part)."""
    backend = make()
    backend.start(inbox.deliver)
    topics = [f"topic {number}" for number in range(5000)]
    backend.subscribe(topics)
    for _ in range(5):
        client.client_kill_filter(_type="pubsub")
        gevent.sleep(0)
        wait_until(lambda: client.client_kill_filter(_type="pubsub"))
    wait_until(lambda: hears(backend, inbox, topics[-1]))
    backend.subscribe(["done"])
    assert sum(backend.publish(topic, b"all") for topic in topics) == 5000
    wait_until(lambda: sum(payload == b"all" for _, payload in inbox) == 5000)


def test_a_subscribe_while_the_listener_reconnects_just_works(
    backend: RedisBackend, inbox: Inbox, client: Client
) -> None:
    for number in range(5):
        client.client_kill_filter(_type="pubsub")
        backend.subscribe([f"topic {number}"])
        assert hears(backend, inbox, f"topic {number}")
        assert hears(backend, inbox)


def test_a_subscribe_in_an_outage_is_refused_soon(make: Make, server: Redis) -> None:
    """A client that connects holds nothing for as long as a `timeout` may be."""
    backend = make(timeout=100 * TIMEOUT)
    backend.start(Inbox().deliver)
    server.stop()
    with within(1.0 + TIMEOUT):
        assert "refused" in failure(backend.subscribe, ["u"])


def test_who_waits_when_the_backend_stops(make: Make, server: Redis) -> None:
    backend = make(timeout=100 * TIMEOUT)
    backend.start(Inbox().deliver)
    backend.subscribe(["t"])
    server.freeze()
    waiting = [gevent.spawn(failure, backend.subscribe, [topic]) for topic in "ab"]
    gevent.sleep(UNIT)
    backend.stop()
    for greenlet in waiting:
        assert greenlet.get(timeout=TIMEOUT) == "stopped"


def test_workers_that_start_before_redis(make: Make, inbox: Inbox, server: Redis) -> None:
    """Their first subscription is not the only one that is ever tried (PSIO#1534)."""
    server.stop()
    backend = make()
    backend.start(inbox.deliver)
    failure(backend.subscribe, ["t"])
    server.start()
    wait_until(lambda: backend.counters["connected"])
    backend.subscribe(["t"])
    assert hears(backend, inbox)


@pytest.mark.timeout(400)
def test_restarts_during_traffic(backend: RedisBackend, inbox: Inbox, server: Redis) -> None:
    """Nothing arrives twice or out of order, and after each of ten restarts all arrives."""
    ended = threading.Event()
    published = []

    def publish() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            try:
                if backend.publish("t", b"%d" % number):
                    published.append(number)
            except BackendError:
                gevent.sleep(UNIT / 10)

    greenlet = gevent.spawn(publish)
    for _ in range(10):
        server.kill()
        server.start()
        backend.subscribe(["t"])
        expected = len(published) + 100
        wait_until(lambda expected=expected: len(published) >= expected)
        wait_until(lambda: len(inbox) and int(inbox[-1][1]) >= published[-100])
        heard = {int(payload) for _, payload in inbox[-150:]}
        assert heard.issuperset(published[-100:-90])
    ended.set()
    greenlet.get()
    numbers = [int(payload) for _, payload in inbox]
    assert numbers == sorted(set(numbers))


def test_everybody_hears_again_soon_after_redis_is_back(
    backend: RedisBackend, inbox: Inbox, server: Redis
) -> None:
    """However long it was away: the listener never waits for more than a second."""
    server.stop()
    gevent.sleep(5 * TIMEOUT)
    server.start()
    with within(2.0 + TIMEOUT):
        wait_until(lambda: hears(backend, inbox))


def test_the_back_off_begins_anew_after_each_success(
    backend: RedisBackend, server: Redis, client: Client
) -> None:
    """It was never reset in a neighbour (PSIO#617)."""
    subscriber = backend._subscriber
    server.stop()
    wait_until(lambda: subscriber._delay == 1.0)
    server.start()
    wait_until(lambda: backend.counters["connected"] == 2)
    assert subscriber._delay == 0.1


def test_an_outage_is_two_lines_in_the_log(
    backend: RedisBackend, server: Redis, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        server.stop()
        wait_until(lambda: backend._subscriber._delay == 1.0)
        server.start()
        wait_until(lambda: backend.counters["connected"] == 2)
    lost, back = (record.getMessage() for record in caplog.records)
    assert (
        lost
        == f"Nothing is heard from Redis at 127.0.0.1:{server.port}: Redis closed the connection"
    )
    assert back.startswith(f"Redis at 127.0.0.1:{server.port} is back after ")


# Silence


def test_client_pause(backend: RedisBackend, inbox: Inbox, client: Client) -> None:
    client.execute_command("CLIENT PAUSE", int(3000 * TIMEOUT))
    with within(2 * TIMEOUT):
        assert "no answer" in failure(backend.publish, "t", b"x")
    with within(2 * TIMEOUT):
        failure(backend.subscribe, ["u"])
    wait_until(lambda: hears(backend, inbox), timeout=10 * TIMEOUT)


def test_a_listener_notices_that_the_host_has_vanished(
    make: Make, inbox: Inbox, server: Redis
) -> None:
    """By itself and for good: half-open connections passed for healthy in kombu (kombu#2590)."""
    with Proxy(server) as proxy:
        backend, direct = make(proxy.url), make()
        backend.start(inbox.deliver)
        backend.subscribe(["t"])
        assert backend.publish("t", b"x") == 1
        proxy.lose()
        wait_until(lambda: backend.counters["connected"] == 2, timeout=10 * TIMEOUT)
        wait_until(lambda: hears(direct, inbox))
        assert "no answer" in failure(backend.publish, "u", b"x")
        assert backend.publish("u", b"x") == 0


def test_an_idle_listener_stays_subscribed(backend: RedisBackend, inbox: Inbox) -> None:
    """A subscription lives as long as its connection (CHR PR#91: membership that expires)."""
    gevent.sleep(5 * TIMEOUT)
    assert hears(backend, inbox)
    assert backend.counters == {"connected": 1}


# Strangers and floods


def test_a_listener_that_was_too_slow_is_back(make: Make, inbox: Inbox) -> None:
    """Redis ends it by `client-output-buffer-limit`, which was for good in PSIO#1581."""
    with Redis("--client-output-buffer-limit", "pubsub", "1mb", "0", "0") as server:
        backend, slow = make(server.url), threading.Event()

        def deliver(topic: str, payload: bytes) -> None:
            slow.wait()
            inbox.deliver(topic, payload[:1])

        backend.start(deliver)
        backend.subscribe(["t"])
        with connect(server) as client:
            while client.publish("socketio:0/t", 100_000 * "x"):
                pass
        slow.set()
        wait_until(lambda: backend.counters["connected"] == 2)
        assert hears(backend, inbox)


def test_forty_megabytes_of_a_stranger(make: Make) -> None:
    """They pass, and the memory that they took comes back."""
    with Redis("--client-output-buffer-limit", "pubsub", "0", "0", "0") as server:
        backend, sizes = make(server.url, timeout=4 * TIMEOUT), []
        backend.start(lambda topic, payload: sizes.append(len(payload)))
        backend.subscribe(["t"])
        before = resident()
        with connect(server) as client:
            for _ in range(3):
                client.eval(FORTY_MEGABYTES, 0, "socketio:0/t")
        wait_until(lambda: sizes == 3 * [40_000_000], timeout=30 * TIMEOUT)
        wait_until(lambda: resident() < before + 10_000_000, timeout=30 * TIMEOUT)  # heartbeats
        backend.publish("t", b"x")
        wait_until(lambda: sizes[3:] == [1])
        assert backend.counters == {"connected": 1}


def test_forty_megabytes_that_redis_does_not_keep(
    backend: RedisBackend, inbox: Inbox, client: Client
) -> None:
    """By its default it rather ends all listeners."""
    client.eval(FORTY_MEGABYTES, 0, "socketio:0/t")
    wait_until(lambda: backend.counters["connected"] == 2)
    assert hears(backend, inbox)
    assert len(inbox) == 1


@pytest.mark.parametrize("listens", [False, True])
def test_failures_leave_little_for_the_garbage_collector(make: Make, listens: bool) -> None:
    """Of each there were two buffers of 64 kB, and memory rose while Redis was away."""
    with ExitStack() as block:
        nobody = StreamServer(("127.0.0.1", 0), lambda connection, address: connection.close())
        block.callback(nobody.stop)
        nobody.start()
        backend = make(f"redis://127.0.0.1:{nobody.server_port if listens else 1}")
        fail(backend, 10)
        gc.collect()
        gc.disable()
        block.callback(gc.enable)
        tracemalloc.start()
        block.callback(tracemalloc.stop)
        fail(backend, 40)
        left = tracemalloc.get_traced_memory()[0] / 40
    assert left < 30_000


def fail(backend: RedisBackend, times: int) -> None:
    for _ in range(times):
        with pytest.raises(BackendError):
            backend.publish("t", b"x")


FORTY_MEGABYTES = "return redis.call('PUBLISH', ARGV[1], ('x'):rep(4e7))"


def resident() -> int:
    """Return what the process holds, in bytes, without what only its allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_bad_messages_of_strangers(backend: RedisBackend, inbox: Inbox, client: Client) -> None:
    """One of these ended the listener of FSIO#1808."""
    with Client(port=client.connection_pool.connection_kwargs["port"]) as raw:
        bad = [b"", b"\x80\x04\x95", b"{", bytes(range(256)), b"\r\n" * 1000]
        for payload in bad:
            raw.publish("socketio:0/t", payload)
        raw.publish(b"socketio:0/t\xff", b"nobody's")
    assert hears(backend, inbox)
    assert [payload for _, payload in inbox] == [*bad, b"x"]


def test_what_arrives_late_is_ignored(backend: RedisBackend, inbox: Inbox, client: Client) -> None:
    """Of a topic that has just been left, there may still be something on its way."""
    for number in range(20):
        backend.subscribe([f"left {number}"])
        backend.unsubscribe([f"left {number}"])
        client.publish(f"socketio:0/left {number}", "late")
    assert hears(backend, inbox)
    backend.subscribe(["t"])
    assert inbox == [("t", b"x")]
    assert client.pubsub_channels() == ["socketio:0/t"]


def test_a_flood_lets_others_run(make: Make, client: Client) -> None:
    """The loop has turns for sockets and timers while there is always something to read."""
    taken, turns = 0, set()

    def deliver(topic: str, payload: bytes) -> None:
        nonlocal taken
        taken += 1
        until = time.perf_counter() + 50e-6
        while time.perf_counter() < until:
            pass

    backend = make()
    backend.start(deliver)
    backend.subscribe(["t"])
    script = "for i = 1, 20000 do redis.call('PUBLISH', ARGV[1], 'x') end"
    flood = gevent.spawn(client.eval, script, 0, "socketio:0/t")
    while taken < 20000:
        gevent.sleep(0.001)
        turns.add(taken)
    flood.get()
    assert len(turns) > 20


# Sentinel and Cluster


class Sentinel(Service):
    """A sentinel that is quick to find out that its master is down."""

    name = "sentinel"

    def __init__(self, master: Redis) -> None:
        self.binary = require("redis", shutil.which("redis-sentinel"), "redis-sentinel")
        super().__init__()
        (self.directory / "conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\n"
            f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds mymaster 500\n"
            "sentinel failover-timeout mymaster 3000\n"
        )

    def _start(self) -> Any:
        return self._spawn(self.binary, self.directory / "conf")

    def _answers(self) -> bool:
        return self._ask(b"PING\r\n").startswith(b"+PONG")


@pytest.fixture
def replica(server: Redis) -> Iterator[Redis]:
    with Redis("--replicaof", "127.0.0.1", str(server.port)) as replica:
        yield replica


@pytest.fixture
def sentinel(server: Redis, replica: Redis) -> Iterator[Sentinel]:
    with Sentinel(server) as sentinel:
        with connect(sentinel) as client:
            wait_until(lambda: client.sentinel_slaves("mymaster"), timeout=30 * TIMEOUT)
            state = lambda: client.sentinel_slaves("mymaster")[0]["flags"]  # noqa: E731
            wait_until(lambda: state() == "slave", timeout=30 * TIMEOUT)
        yield sentinel


@pytest.mark.timeout(400)
def test_a_failover_is_followed(
    make: Make, inbox: Inbox, server: Redis, replica: Redis, sentinel: Sentinel
) -> None:
    nowhere = ("127.0.0.1", 1)
    addresses = [nowhere, ("127.0.0.1", sentinel.port)]
    backend = make("redis://ignored", sentinels=addresses, service="mymaster")
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    assert hears(backend, inbox)
    server.kill()
    wait_until(lambda: hears(backend, inbox), timeout=60 * TIMEOUT)
    with connect(replica) as client:
        assert client.pubsub_channels("socketio:*") == ["socketio:0/t"]  # sentinels have their own


@pytest.mark.timeout(400)
def test_a_master_that_becomes_a_replica_is_left(
    make: Make, inbox: Inbox, server: Redis, replica: Redis, sentinel: Sentinel
) -> None:
    """It goes on serving, and whoever stayed would publish to nobody."""
    address = [("127.0.0.1", sentinel.port)]
    backends = [make(sentinels=address, service="mymaster") for _ in range(2)]
    for backend in backends:
        backend.start(inbox.deliver)
        backend.subscribe(["t"])
        backend.publish("t", b"x")
    with connect(sentinel) as client:
        client.sentinel_failover("mymaster")
    with connect(replica) as client:
        wait_until(lambda: client.pubsub_numsub("socketio:0/t")[0][1] == 2, timeout=60 * TIMEOUT)
    assert backends[0].publish("t", b"x") == 2


def test_sentinels_that_do_not_know(
    make: Make, server: Redis, replica: Redis, sentinel: Sentinel
) -> None:
    address = ("127.0.0.1", sentinel.port)
    backend = make(sentinels=[address], service="other")
    assert "does not know" in failure(backend.publish, "t", b"x")
    backend = make(sentinels=[("127.0.0.1", 1)], service="mymaster")
    assert "refused" in failure(backend.publish, "t", b"x")


def test_a_sentinel_that_is_behind(make: Make, server: Redis, replica: Redis) -> None:
    """It names a replica for the master: nobody stays there."""
    address = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%d\r\n"
    behind = address % (len(str(replica.port)), replica.port)
    with Scripted(lambda command: behind) as scripted:
        backend = make(sentinels=[("127.0.0.1", int(scripted.url[-5:]))], service="mymaster")
        assert "is no master" in failure(backend.publish, "t", b"x")


@pytest.fixture
def cluster() -> Iterator[tuple[Redis, Redis]]:
    """Return two nodes, each with one half of the slots."""
    with Redis("--cluster-enabled", "yes") as a, Redis("--cluster-enabled", "yes") as b:
        with connect(a) as first, connect(b) as second:
            first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
            second.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
            second.execute_command("CLUSTER SET-CONFIG-EPOCH", 2)
            first.execute_command("CLUSTER MEET", "127.0.0.1", b.port)
            for client in (first, second):
                wait_until(lambda c=client: c.cluster("info")["cluster_state"] == "ok")
        yield a, b


def prefix_in(slots: range, client: Client) -> str:
    names = (f"prefix{number}" for number in range(100))
    return next(n for n in names if int(client.cluster("keyslot", f"{{{n}:0}}")) in slots)


@pytest.mark.timeout(400)
def test_sharded_goes_to_the_node_that_has_the_slot(
    make: Make, inbox: Inbox, cluster: tuple[Redis, Redis]
) -> None:
    """Whichever node the URL names; and follows when it moves."""
    a, b = cluster
    with connect(a) as first, connect(b) as second:
        prefix = prefix_in(range(8192), first)
        backends = [make(node.url, prefix=prefix, sharded=True) for node in cluster]
        for backend in backends:
            backend.start(inbox.deliver)
            backend.subscribe(["t", "u"])
        assert [backend.publish("t", b"x") for backend in backends] == [2, 2]
        assert len(first.execute_command("PUBSUB SHARDCHANNELS")) == 2
        slot = first.cluster("keyslot", f"{{{prefix}:0}}")
        ids = [client.cluster("myid") for client in (first, second)]
        second.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        first.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        for client in (second, first):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])

        def moved() -> bool:
            [(_, count)] = second.execute_command("PUBSUB SHARDNUMSUB", f"{{{prefix}:0}}/t")
            return int(count) == 2

        wait_until(moved)
        for backend in backends:
            wait_until(lambda backend=backend: hears(backend, inbox))
        assert [backend.publish("t", b"x") for backend in backends] == [2, 2]


@pytest.mark.timeout(400)
def test_a_cluster_carries_what_is_not_sharded_to_all_nodes(
    make: Make, inbox: Inbox, cluster: tuple[Redis, Redis]
) -> None:
    """And counts who receives it on one of them."""
    backends = [make(node.url) for node in cluster]
    for backend in backends:
        backend.start(inbox.deliver)
        backend.subscribe(["t"])
    assert [backend.publish("t", b"x") for backend in backends] == [1, 1]
    wait_until(lambda: len(inbox) == 4)


def test_sharded_on_a_redis_that_cannot(make: Make) -> None:
    with Scripted(lambda command: b"-ERR unknown command 'SPUBLISH'\r\n") as scripted:
        backend = make(scripted.url, sharded=True)
        assert "Redis 7" in failure(backend.publish, "t", b"x")


def test_nodes_that_send_us_in_circles(make: Make) -> None:
    def answer(command: list[bytes]) -> bytes:
        return b"-MOVED 1 :%d\r\n" % int(scripted.url.rpartition(":")[2])

    with Scripted(answer) as scripted:
        backend = make(scripted.url, sharded=True)
        assert "in circles" in failure(backend.publish, "t", b"x")
        assert scripted.connections == 5
