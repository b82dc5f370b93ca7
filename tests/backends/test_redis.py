"""The Redis backend in good times: the contract, its options, and what it spares Redis."""

import gc
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import TestCase

import gevent
import pytest
from gevent.threadpool import ThreadPool
from redis import Redis as Client

from django_socketio.backends import BackendError, InvalidBackend
from django_socketio.backends.redis import RedisBackend
from django_socketio.backends.redis.wire import Wire
from django_socketio.testing import BackendContract
from tests.services import Redis
from tests.support import ROOT, UNIT, wait_until

TIMEOUT = 40 * UNIT

Make = Callable[..., RedisBackend]


class Contract(BackendContract):
    """The contract, with a server for each class of tests, which outages stop."""

    server: ClassVar[Redis]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.server = cls.make_server()
        cls.server.start()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.server.stop()
        super().tearDownClass()

    @classmethod
    def make_server(cls) -> Redis:
        return Redis()

    def make_backend(self) -> RedisBackend:
        return RedisBackend(self.url(), prefix=self.unique, timeout=self.timeout, **self.options())

    def url(self) -> str:
        return self.server.url

    def options(self) -> dict[str, Any]:
        return {}

    def break_carrier(self) -> None:
        self.server.stop()

    def heal_carrier(self) -> None:
        self.server.start()


class TestTCP(Contract, TestCase):
    pass


class TestSilence(Contract, TestCase):
    """A host that answers nothing, and closes nothing."""

    def break_carrier(self) -> None:
        self.server.freeze()

    def heal_carrier(self) -> None:
        self.server.thaw()


class TestUnixSocket(Contract, TestCase):
    def url(self) -> str:
        return self.server.unix


class TestTLS(Contract, TestCase):
    @classmethod
    def make_server(cls) -> Redis:
        return Redis(tls=True)


class TestACL(Contract, TestCase):
    """A user who may do pub/sub below the prefix, and nothing else."""

    @classmethod
    def make_server(cls) -> Redis:
        user = "realtime on >p@ss/word resetchannels &test* -@all +@pubsub".split()
        return Redis("--user", *user, "--user", "default", "off")

    def url(self) -> str:
        return self.server.url.replace("redis://", "redis://realtime:p%40ss%2Fword@")


class TestSharded(Contract, TestCase):
    @classmethod
    def make_server(cls) -> Redis:
        return Redis("--cluster-enabled", "yes")

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        with connect(cls.server) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("info")["cluster_state"] == "ok")

    def options(self) -> dict[str, Any]:
        return {"sharded": True}


class Inbox(list[tuple[str, bytes]]):
    """What was delivered, in order."""

    def deliver(self, topic: str, payload: bytes) -> None:
        self.append((topic, payload))


def connect(server: Redis) -> Client:
    return Client(port=server.port, decode_responses=True)


@pytest.fixture
def unique() -> str:
    return f"test{uuid.uuid4().hex}"


@pytest.fixture
def make(redis_server: Redis, unique: str) -> Iterator[Make]:
    """Return what makes a backend of this test's own address space."""
    made = []

    def make(url: str = redis_server.url, **options: Any) -> RedisBackend:
        made.append(RedisBackend(url, **{"prefix": unique, "timeout": TIMEOUT, **options}))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()


@pytest.fixture
def client(redis_server: Redis) -> Iterator[Client]:
    with connect(redis_server) as client:
        yield client


# Isolation


def test_a_topic_is_a_channel_below_prefix_and_database(
    make: Make, client: Client, redis_server: Redis, unique: str
) -> None:
    backend = make(f"redis://127.0.0.1:{redis_server.port}/7")
    backend.start(Inbox().deliver)
    backend.subscribe(["c/,room"])
    assert client.pubsub_channels(f"{unique}*") == [f"{unique}:7/c/,room"]


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"prefix": "a"}, {"prefix": "b"}),
        ({"db": 0}, {"db": 1}),
        ({"prefix": "a", "db": 0}, {"prefix": "a:0", "db": 0}),
        ({"prefix": "a", "db": 1}, {"prefix": "a", "db": 11}),
    ],
)
def test_two_deployments_on_one_redis(
    make: Make, redis_server: Redis, options: dict[str, Any], other: dict[str, Any]
) -> None:
    """They hear each other in no topic that could be made to look like the other's."""
    inbox, backends = Inbox(), []
    for number, each in enumerate((options, other)):
        prefix, db = each.get("prefix", "x"), each.get("db", 0)
        backends.append(make(f"redis://127.0.0.1:{redis_server.port}/{db}", prefix=prefix))
        backends[-1].start(lambda topic, payload, number=number: inbox.append((number, topic)))
        backends[-1].subscribe(["t", "0:t", ":t", "0/t", "/t", "1/t", "1:1/t", "done"])
    for topic in ("t", "0:t", ":t", "0/t", "/t", "1/t", "1:1/t"):
        assert backends[0].publish(topic, b"x") == 1
    for backend in backends:
        backend.publish("done", b"")
    wait_until(lambda: len(inbox) == 9)
    assert {topic for number, topic in inbox if number == 1} == {"done"}


# Sharing


def counting(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the list that what is written to Redis goes to, write by write."""
    written = []
    send = Wire.send

    def count(self: Wire, data: bytes) -> None:
        written.append(data)
        send(self, data)

    monkeypatch.setattr(Wire, "send", count)
    return written


def test_concurrent_publishes_share_round_trips(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, inbox = make(), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    backend.publish("t", b"first")
    written = counting(monkeypatch)
    greenlets = [gevent.spawn(backend.publish, "t", b"%d" % number) for number in range(64)]
    assert [greenlet.get() for greenlet in greenlets] == 64 * [1]
    assert 2 <= len(written) <= 4
    wait_until(lambda: len(inbox) == 65)


def test_a_leader_does_not_serve_others_for_ever(make: Make) -> None:
    """It returns after its own round trip, although more and more publishes come."""
    backend = make()
    backend.publish("t", b"connected")
    ended = threading.Event()
    done: Counter[int] = Counter()

    def publish(number: int) -> None:
        while not ended.is_set():
            backend.publish("t", b"x")
            done[number] += 1

    greenlets = [gevent.spawn(publish, number) for number in range(20)]
    wait_until(lambda: sum(done.values()) > 2000)
    ended.set()
    gevent.joinall(greenlets, raise_error=True)
    assert max(done.values()) <= min(done.values()) + 3


def test_concurrent_subscribes_share_round_trips(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    backend.start(Inbox().deliver)
    backend.subscribe(["first"])
    written = counting(monkeypatch)
    gevent.joinall(
        [gevent.spawn(backend.subscribe, [f"topic {number}"]) for number in range(64)],
        raise_error=True,
    )
    assert sum(b"SUBSCRIBE" in data and b"UNSUBSCRIBE" not in data for data in written) <= 3
    assert all(backend.publish(f"topic {number}", b"x") == 1 for number in range(64))


def test_thousands_of_topics_are_subscribed_in_portions(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, inbox = make(), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["first"])
    written = counting(monkeypatch)
    topics = [f"topic {number}" for number in range(3500)]
    backend.subscribe(topics)
    assert len([data for data in written if data.startswith(b"*1001")]) == 3
    assert backend.publish(topics[-1], b"x") == backend.publish(topics[0], b"x") == 1


def test_a_connection_begins_with_nothing_but_pubsub(make: Make, unique: str) -> None:
    """No HELLO, SELECT or CLIENT, which cost round trips and permissions; and two are enough."""
    with Redis() as server, connect(server) as client:
        backend = make(f"redis://127.0.0.1:{server.port}/3")
        client.config_resetstat()
        backend.start(Inbox().deliver)
        backend.subscribe(["t"])
        backend.unsubscribe(["t"])
        for number in range(20):
            backend.publish(f"topic {number}", b"x")
            backend.subscribe([f"topic {number}"])
        used = {name.partition("_")[2] for name in client.info("commandstats")}
        assert used <= {"publish", "subscribe", "unsubscribe", "info", "config|resetstat"}
        assert len(client.client_list()) == 3  # with this one


@pytest.mark.parametrize("tls", [False, True])
def test_payloads_larger_than_any_buffer(make: Make, tls: bool) -> None:
    """They are written in parts, and share round trips or not."""
    payloads = [bytes([number]) * (5_000_000 + number) for number in range(4)]
    with Redis(tls=tls) as server:
        backend, inbox = make(server.url, timeout=10 * TIMEOUT), Inbox()
        backend.start(inbox.deliver)
        backend.subscribe(["t"])
        greenlets = [gevent.spawn(backend.publish, "t", payload) for payload in payloads]
        assert [greenlet.get() for greenlet in greenlets] == 4 * [1]
        wait_until(lambda: len(inbox) == 4)
        assert sorted(payload for _, payload in inbox) == payloads


# Who is killed


def test_a_greenlet_that_is_killed_while_it_subscribes_leaves_nothing(
    make: Make, unique: str
) -> None:
    with Redis() as server:
        backend = make(server.url, timeout=10 * TIMEOUT)
        backend.start(Inbox().deliver)
        backend.subscribe(["kept"])
        server.freeze()
        killed = [gevent.spawn(backend.subscribe, topics) for topics in (["kept", "a"], ["a"])]
        gevent.sleep(UNIT)  # these are asked for, and the others wait
        alive = gevent.spawn(backend.subscribe, ["b", "a"])
        killed.append(gevent.spawn(backend.subscribe, ["b", "c"]))
        gevent.sleep(UNIT)
        gevent.killall(killed)
        server.thaw()
        alive.get(timeout=TIMEOUT)
        backend.subscribe(["kept"])
        with connect(server) as client:
            channels = {name.partition("/")[2] for name in client.pubsub_channels(f"{unique}*")}
        assert channels == {"kept", "a", "b"}
        assert not backend._subscriber.wanted.claims


def test_nor_does_one_that_is_killed_when_it_is_confirmed(make: Make, unique: str) -> None:
    """The confirmation is there, and the greenlet has not run yet."""
    backend = make()
    backend.start(Inbox().deliver)
    backend.subscribe(["kept"])
    wanted = backend._subscriber.wanted
    returned = []

    def is_confirmed() -> bool:
        fences = backend._subscriber._session._fence is not None
        return any(wanted.claims.values()) and not wanted.waiting and not fences

    for number in range(20):
        greenlet = gevent.spawn(backend.subscribe, [f"killed {number}"])
        while not is_confirmed() and not greenlet.ready():
            gevent.sleep(0)
        returned.append(greenlet.ready())  # in the same turn of the loop
        greenlet.kill()
    backend.subscribe(["kept"])
    assert not wanted.claims
    alive = [bool(backend.publish(f"killed {number}", b"")) for number in range(20)]
    assert alive == returned


# Other worlds


def test_native_threads_next_to_greenlets(make: Make) -> None:
    """Threads that gevent has not patched away publish and subscribe, too (FSIO#973)."""
    backend, inbox = make(), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    pool = gevent.get_hub().threadpool

    def work(number: int) -> None:
        for _ in range(50):
            assert backend.publish("t", b"%d" % number) == 1
        backend.subscribe([f"topic {number}"])

    native = [pool.spawn(work, number) for number in range(4)]
    greenlets = [gevent.spawn(work, number) for number in range(4, 8)]
    gevent.joinall([*native, *greenlets], timeout=20 * TIMEOUT, raise_error=True)
    assert all(each.ready() for each in (*native, *greenlets))
    wait_until(lambda: len(inbox) == 400)
    assert Counter(payload for _, payload in inbox) == {b"%d" % n: 50 for n in range(8)}
    assert [backend.publish(f"topic {number}", b"x") for number in range(8)] == 8 * [1]


def test_a_native_thread_is_the_first_to_connect(make: Make) -> None:
    """And its end, with that of its hub, does not end anything for the others."""
    backend = make()
    pool = ThreadPool(1)
    assert pool.apply(backend.publish, ("t", b"x")) == 0
    pool.kill()
    assert backend.publish("t", b"x") == 0


@pytest.mark.timeout(300)
def test_without_gevent(redis_server: Redis) -> None:
    """The contract in an interpreter that nobody has patched."""
    module = f"{__name__}.TestTCP"
    script = (
        "import sys, unittest; from gevent import monkey;"
        f"unittest.main(None, argv=['x', '-q', '{module}'], exit=False).result.wasSuccessful()"
        " or sys.exit(1); assert not monkey.is_module_patched('socket')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_backend_imports_no_client_library() -> None:
    script = (
        "import sys, django_socketio.backends.redis;"
        "assert not {'redis', 'hiredis', 'gevent'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_child_that_collects_garbage_closes_nothing(make: Make) -> None:
    """Nor does one that stops what it has inherited."""
    backend, inbox = make(), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    backend.publish("t", b"before")
    held = [backend]
    pid = os.fork()
    if not pid:
        held[0].stop()
        held.clear()
        del backend
        gc.collect()
        gevent.sleep(UNIT)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    for _ in range(10):
        assert backend.publish("t", b"after") == 1
    wait_until(lambda: len(inbox) == 11)
    assert backend.counters == {"connected": 1}


# Options


def test_what_it_says_of_itself(make: Make) -> None:
    backend = make()
    assert backend.supports_receivers and backend.crosses_processes
    assert backend.check() == []


def test_the_default_is_redis_on_this_host() -> None:
    backend = RedisBackend()
    assert backend.url == "redis://localhost:6379/0"
    assert backend._connector.where == "localhost:6379"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "redis://, rediss:// or unix://"),
        ("http://localhost", "redis://, rediss:// or unix://"),
        (None, "redis://, rediss:// or unix://"),
        ("redis://localhost:port", "percent-encoded"),
        ("redis://:secret/@localhost", "percent-encoded"),
        ("redis://localhost/zero", "database number"),
        ("redis://localhost/0/1", "database number"),
        ("redis://localhost?db=-1", "negative"),
        ("redis://localhost?db=x", "db"),
        ("redis://localhost?socket_timeout=3&retry=1", "retry, socket_timeout"),
        ("redis://localhost?ssl_ca_certs=ca.pem", "rediss://"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "maybe"),
        ("unix://", "path of a Unix socket"),
    ],
)
def test_a_bad_url_is_refused(url: str, sentence: str) -> None:
    with pytest.raises(InvalidBackend) as caught:
        RedisBackend(url)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"colour": 1, "retry": 2}, "option(s) colour, retry"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": "a/b"}, "prefix"),
        ({"prefix": "{a}"}, "prefix"),
        ({"prefix": "a b"}, "prefix"),
        ({"prefix": 1}, "prefix"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"ssl_ca_certs": "ca.pem"}, "rediss://"),
        ({"password": "secret", "credential_provider": object()}, "credential_provider"),
        ({"service": "mymaster"}, "go together"),
        ({"sentinels": [("a", 1)]}, "go together"),
        ({"sentinels": ["a:1"], "service": "mymaster"}, "pairs"),
        ({"sentinels": 5, "service": "mymaster"}, "pairs"),
        ({"sentinel_password": "secret"}, "no sentinels"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidBackend) as caught:
        RedisBackend("redis://localhost", **options)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


def test_sentinels_know_no_unix_sockets() -> None:
    with pytest.raises(InvalidBackend, match="Unix"):
        RedisBackend("unix:///tmp/socket", sentinels=[("a", 1)], service="mymaster")


@pytest.mark.parametrize("library", ["redis", "hiredis"])
def test_a_missing_library_is_told_how_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InvalidBackend, match=r"pip install django-socketio\[redis\]"):
        RedisBackend()


@pytest.mark.parametrize(
    ("version", "fine"),
    [("8.0.0", False), ("7.9.9", False), ("8.0.1", True), ("8.1.0b1", True), ("10.0", True)],
)
def test_an_old_library_is_refused(
    version: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    monkeypatch.setattr(redis, "__version__", version)
    if fine:
        RedisBackend()
    else:
        with pytest.raises(InvalidBackend, match=f"8.0.1.*pip install .* {version}"):
            RedisBackend()


def test_its_check_misses_files(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    backend = RedisBackend(
        "rediss://localhost",
        ssl_ca_certs=str(tmp_path / "ca.pem"),
        ssl_certfile=str(tmp_path / "cert.pem"),
    )
    assert backend.check() == [
        f"RedisBackend: there is no {tmp_path / 'cert.pem'}, which ssl_certfile names."
    ]


def test_its_check_finds_a_cluster_with_sentinels() -> None:
    backend = RedisBackend(sharded=True, sentinels=[("a", 1)], service="mymaster")
    [problem] = backend.check()
    assert "sharded" in problem and "sentinels" in problem


def test_user_and_password_may_be_options(redis_server: Redis, make: Make, unique: str) -> None:
    with connect(redis_server) as client:
        client.execute_command("ACL SETUSER", unique, "on", ">secret", "&test*", "+@pubsub")
    assert make(username=unique, password="secret").publish("t", b"x") == 0
    with pytest.raises(BackendError) as caught:
        make(username=unique, password="guessed").publish("t", b"x")
    assert "password" in str(caught.value)
    assert "guessed" not in str(caught.value)


def test_a_certificate_that_nobody_vouches_for_is_refused() -> None:
    with Redis(tls=True) as server:
        backend = RedisBackend(f"rediss://127.0.0.1:{server.port}", timeout=TIMEOUT)
        with pytest.raises(BackendError, match="CERTIFICATE_VERIFY_FAILED"):
            backend.publish("t", b"x")
        backend = RedisBackend(f"rediss://127.0.0.1:{server.port}", ssl_cert_reqs="none")
        assert backend.publish("t", b"x") == 0
        backend.stop()


def test_a_client_name_shows(make: Make, client: Client, unique: str) -> None:
    backend = make(client_name=unique)
    backend.publish("t", b"x")
    assert [each["name"] for each in client.client_list()].count(unique) == 1


def test_it_needs_a_start_to_subscribe(make: Make) -> None:
    backend = make()
    backend.subscribe([])
    backend.unsubscribe(["t"])
    with pytest.raises(BackendError, match="not started"):
        backend.subscribe(["t"])


def test_starting_twice_is_starting(make: Make) -> None:
    backend, inbox = make(), Inbox()
    backend.start(inbox.deliver)
    backend.subscribe(["t"])
    backend.start(inbox.deliver)
    assert backend.publish("t", b"x") == 1
    wait_until(lambda: inbox == [("t", b"x")])
