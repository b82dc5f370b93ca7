"""Redis breaks in every way that it can, under traffic."""

import os
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import redis as redis_py

from django_socketio import envelope
from django_socketio.envelope import Envelope
from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults.harness import ROOM, SOON, Traffic, rss
from tests.services import Redis
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(3000 * UNIT)
TIMEOUT = 20 * UNIT


def backend(redis: Redis) -> dict[str, Any]:
    path = "django_socketio.backends.redis.RedisBackend"
    return {"BACKEND": path, "OPTIONS": {"url": redis.url, "timeout": TIMEOUT}}


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module")
def cluster(redis: Redis) -> Iterator[Cluster]:
    with Cluster(backend(redis), workers=2) as cluster:
        yield cluster


@pytest.fixture
def traffic(cluster: Cluster) -> Iterator[Traffic]:
    with Traffic(cluster) as traffic:
        traffic.recovers()
        yield traffic
        traffic.holds()


@pytest.fixture
def admin(redis: Redis) -> Iterator[Any]:
    with redis_py.Redis.from_url(redis.url, socket_timeout=60) as admin:
        yield admin


def test_nothing_is_lost_in_health(traffic: Traffic) -> None:
    with traffic.flowing():
        gevent.sleep(20 * UNIT)
    traffic.loses_nothing()
    assert traffic.lost() == 0
    assert all(len(sender.sent) > 20 and not sender.refused for sender in traffic.senders)


def test_workers_start_before_the_broker() -> None:
    redis = Redis()
    cluster = Cluster(backend(redis), workers=2)
    wait_for_health, cluster.healthy = cluster.healthy, lambda: True  # type: ignore[method-assign]
    with cluster:
        answer = clients.request(cluster.addresses[0], "GET", "/socket.io/health")
        assert answer.status == 503
        # Not let in and not refused: it connects again by itself.
        with clients.open_connection(cluster.addresses[0]) as connection:
            connection.request()
            connection.wait_for_end()
        with redis:
            cluster.healthy = wait_for_health  # type: ignore[method-assign]
            wait_until(cluster.healthy, timeout=SOON, what="health")
            with Traffic(cluster) as traffic:
                traffic.loses_nothing()


def test_ten_restarts_during_traffic(traffic: Traffic, redis: Redis) -> None:
    with traffic.flowing():
        for _ in range(10):
            gevent.sleep(2 * UNIT)
            redis.kill()
            gevent.sleep(2 * UNIT)
            redis.start()
            traffic.recovers()
    assert all(sender.refused.keys() <= {"BackendError", "NoSocket"} for sender in traffic.senders)
    assert any(sender.refused.get("BackendError") for sender in traffic.senders)


def test_two_quick_restarts_lose_no_subscription(traffic: Traffic, redis: Redis) -> None:
    redis.kill()
    redis.start()
    redis.kill()
    redis.start()
    traffic.recovers()


def test_its_subscribers_are_killed(traffic: Traffic, admin: Any) -> None:
    with traffic.flowing():
        for _ in range(10):
            gevent.sleep(4 * UNIT)
            admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    traffic.recovers()


def test_its_publishers_are_killed(traffic: Traffic, admin: Any) -> None:
    """Redis tells nobody why: the connection is simply closed."""
    with traffic.flowing():
        for _ in range(10):
            gevent.sleep(4 * UNIT)
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    traffic.recovers()


def test_it_pauses(traffic: Traffic, admin: Any) -> None:
    """Connections stay open, and nothing answers: senders are told in bounded time."""
    admin.execute_command("CLIENT", "PAUSE", int(3 * TIMEOUT * 1000), "ALL")
    assert traffic.senders[0].send() == "BackendError"
    wait_until(lambda: admin.ping(), timeout=400 * UNIT)
    traffic.recovers()


@pytest.mark.parametrize("seconds", [60 * UNIT, 600 * UNIT], ids=["3 s", "30 s"])
def test_it_freezes(traffic: Traffic, redis: Redis, cluster: Cluster, seconds: float) -> None:
    """Half-open: nothing comes, and nothing says so."""
    redis.freeze()
    try:
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
        wait_until(lambda: not cluster.healthy(), timeout=200 * UNIT, what="red health")
        gevent.sleep(seconds)
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
    finally:
        redis.thaw()
    traffic.recovers()


def topic_of_the_room(admin: Any) -> str:
    (topic,) = (name for name in admin.pubsub_channels() if name.endswith(f"c/,{ROOM}".encode()))
    return str(topic.decode())


def test_a_stranger_publishes_40_megabytes(traffic: Traffic, admin: Any, cluster: Cluster) -> None:
    topic = topic_of_the_room(admin)
    pids = [server.pid for server in cluster.servers]
    traffic.loses_nothing()
    before = [rss(pid) for pid in pids]
    for payload in (b"x" * 40_000_000, b"\x01" + b"\x00" * 40_000_000, os.urandom(40_000_000)):
        admin.publish(topic, payload)
    traffic.recovers(timeout=200 * UNIT)
    wait_until(
        lambda: all(rss(pid) < was + 20_000_000 for pid, was in zip(pids, before, strict=True)),
        timeout=200 * UNIT,
        what="memory",
    )


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        b"\x80\x04\x95.",
        b"\x00" + envelope.encode(Envelope(packets=(b'2["message","old"]',)))[1:],
        b"\x02" + envelope.encode(Envelope(packets=(b'2["message","new"]',)))[1:],
        envelope.encode(Envelope(packets=(b"nonsense" * 100,)))[:-1],
    ],
    ids=["empty", "text", "pickle", "older", "newer", "cut"],
)
def test_a_stranger_publishes(traffic: Traffic, admin: Any, payload: bytes) -> None:
    assert admin.publish(topic_of_the_room(admin), payload) == 2
    traffic.loses_nothing()


def test_a_slow_worker_is_cut_off_by_the_broker(traffic: Traffic, admin: Any) -> None:
    """`client-output-buffer-limit` closes the connection of one that does not read."""
    limit = admin.config_get("client-output-buffer-limit")["client-output-buffer-limit"]
    admin.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 1")
    try:
        admin.publish(topic_of_the_room(admin), b"x" * 8_000_000)
        traffic.recovers()
    finally:
        admin.config_set("client-output-buffer-limit", limit)
