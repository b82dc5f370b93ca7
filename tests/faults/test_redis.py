"""Redis breaks in every way that it can, under traffic."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
import redis as redis_py

from django_socketio import envelope
from django_socketio.envelope import Envelope
from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults.carriers import TIMEOUT, redis_backend
from tests.faults.harness import ROOM, SOON, Traffic, rss
from tests.faults.load import LONG, Load
from tests.services import Redis
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(3000 * UNIT)


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module")
def cluster(redis: Redis) -> Iterator[Cluster]:
    with Cluster(redis_backend(redis), workers=2) as cluster:
        yield cluster


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
    cluster = Cluster(redis_backend(redis), workers=2)
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


def is_killed(redis: Redis, admin: Any) -> None:
    redis.kill()
    gevent.sleep(4 * UNIT)
    redis.start()


def is_away(redis: Redis, admin: Any) -> None:
    redis.kill()
    gevent.sleep((1200 if LONG else 60) * UNIT)
    redis.start()


def its_subscribers_are_killed(redis: Redis, admin: Any) -> None:
    for _ in range(5):
        gevent.sleep(10 * UNIT)
        admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


def its_publishers_are_killed(redis: Redis, admin: Any) -> None:
    """Redis tells nobody why: the connection is simply closed."""
    for _ in range(5):
        gevent.sleep(10 * UNIT)
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def pauses(redis: Redis, admin: Any) -> None:
    """Connections stay open, and nothing answers: senders are told in bounded time."""
    admin.execute_command("CLIENT", "PAUSE", int(3 * TIMEOUT * 1000), "ALL")
    wait_until(lambda: admin.ping(), timeout=400 * UNIT)


def takes_no_writes(redis: Redis, admin: Any) -> None:
    admin.execute_command("CLIENT", "PAUSE", int(3 * TIMEOUT * 1000), "WRITE")
    wait_until(lambda: admin.publish("nobody", b"") == 0, timeout=400 * UNIT)


def freezes(redis: Redis, admin: Any) -> None:
    redis.freeze()
    gevent.sleep(60 * UNIT)
    redis.thaw()


OUTAGES = [
    is_killed,
    is_away,
    its_subscribers_are_killed,
    its_publishers_are_killed,
    pauses,
    takes_no_writes,
    freezes,
]


@pytest.mark.parametrize("breaks", OUTAGES, ids=lambda each: each.__name__)
def test_what_is_lost_is_counted(
    load: Load, redis: Redis, admin: Any, breaks: Callable[[Redis, Any], None]
) -> None:
    """No copy and no disorder, and service is back soon; what is lost is a gap, and all of it."""
    with load.flowing():
        load.is_known()
        with load.fault(breaks.__name__):
            breaks(redis, admin)
        load.is_known()
    load.report().loses_in_faults_only()
    load.notices_its_losses()
    outcomes = {outcome for who in load.publishers for _, outcome in who.outcomes}
    assert outcomes <= {"sent", "NoSocket", "BackendError"}
    assert not any(walker.ends for walker in load.walkers)


def test_it_freezes(traffic: Traffic, redis: Redis, cluster: Cluster) -> None:
    """Half-open: nothing comes, and nothing says so."""
    redis.freeze()
    try:
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
        wait_until(lambda: not cluster.healthy(), timeout=200 * UNIT, what="red health")
        gevent.sleep((600 if LONG else 60) * UNIT)
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
