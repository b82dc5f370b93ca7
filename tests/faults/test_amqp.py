"""RabbitMQ breaks in every way that it can, under traffic."""

import os
from collections.abc import Callable, Iterator

import gevent
import kombu
import pytest

from django_socketio import envelope
from django_socketio.envelope import Envelope
from tests.deployment.cluster import Cluster
from tests.faults.carriers import amqp_backend
from tests.faults.harness import ROOM, SOON, Traffic, rss
from tests.faults.load import LONG, Load
from tests.services import RabbitMQ
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(4000 * UNIT)


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMQ]:
    with RabbitMQ() as rabbitmq:
        yield rabbitmq


@pytest.fixture(scope="module")
def cluster(rabbitmq: RabbitMQ) -> Iterator[Cluster]:
    with Cluster(amqp_backend(rabbitmq), workers=2) as cluster:
        yield cluster


def test_nothing_is_lost_in_health(traffic: Traffic) -> None:
    with traffic.flowing():
        gevent.sleep(20 * UNIT)
    traffic.loses_nothing()
    assert traffic.lost() == 0
    assert all(len(sender.sent) > 20 and not sender.refused for sender in traffic.senders)


def test_ten_restarts_during_traffic(traffic: Traffic, rabbitmq: RabbitMQ) -> None:
    """Of the application: its machine goes on, so this takes seconds and not a minute."""
    with traffic.flowing():
        for _ in range(10):
            rabbitmq.ctl("stop_app")
            rabbitmq.ctl("start_app")
            traffic.recovers()


def is_killed(rabbitmq: RabbitMQ) -> None:
    rabbitmq.kill()
    gevent.sleep((1200 if LONG else 10) * UNIT)
    rabbitmq.start()


def closes_all_connections(rabbitmq: RabbitMQ) -> None:
    for _ in range(3):
        rabbitmq.ctl("close_all_connections", "a test")
        gevent.sleep(10 * UNIT)


def restarts(rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("stop_app")
    gevent.sleep(20 * UNIT)
    rabbitmq.ctl("start_app")


def freezes(rabbitmq: RabbitMQ) -> None:
    rabbitmq.freeze()
    gevent.sleep(60 * UNIT)
    rabbitmq.thaw()


@pytest.mark.parametrize(
    "breaks",
    [is_killed, closes_all_connections, restarts, freezes],
    ids=lambda each: each.__name__,
)
def test_what_is_lost_is_counted(
    load: Load, rabbitmq: RabbitMQ, breaks: Callable[[RabbitMQ], None]
) -> None:
    """No copy and no disorder, and service is back soon; what is lost is a gap, and all of it."""
    with load.flowing():
        load.is_known()
        with load.fault(breaks.__name__):
            breaks(rabbitmq)
        load.is_known()
    load.report().loses_in_faults_only()
    load.notices_its_losses()
    outcomes = {outcome for who in load.publishers for _, outcome in who.outcomes}
    assert outcomes <= {"sent", "NoSocket", "BackendError"}
    assert not any(walker.ends for walker in load.walkers)


def test_it_freezes(traffic: Traffic, rabbitmq: RabbitMQ, cluster: Cluster) -> None:
    """Half-open: nothing comes, and nothing says so."""
    rabbitmq.freeze()
    try:
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
        wait_until(lambda: not cluster.healthy(), timeout=200 * UNIT, what="red health")
        gevent.sleep((600 if LONG else 60) * UNIT)
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
    finally:
        rabbitmq.thaw()
    traffic.recovers(timeout=2 * SOON)


def test_its_memory_is_full(traffic: Traffic, rabbitmq: RabbitMQ) -> None:
    """It takes nothing from publishers any more, and says so."""
    rabbitmq.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        wait_until(lambda: traffic.senders[0].send() == "BackendError", timeout=200 * UNIT)
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
    traffic.recovers()


def publish(rabbitmq: RabbitMQ, topic: str, payload: bytes) -> None:
    with kombu.Connection(rabbitmq.url) as connection:
        exchange = kombu.Exchange("socketio", "direct", durable=True)
        producer = connection.Producer()
        producer.publish(
            payload,
            exchange=exchange,
            routing_key=topic,
            content_type="text/plain",
            content_encoding="utf-8",
            declare=[exchange],
        )


def test_a_stranger_publishes_40_megabytes(
    traffic: Traffic, rabbitmq: RabbitMQ, cluster: Cluster
) -> None:
    traffic.loses_nothing()
    before = [rss(server.pid) for server in cluster.servers]
    for payload in (b"x" * 40_000_000, b"\x01" + b"\x00" * 40_000_000, os.urandom(40_000_000)):
        publish(rabbitmq, f"c/,{ROOM}", payload)
    traffic.recovers(timeout=400 * UNIT)
    wait_until(
        lambda: all(
            rss(server.pid) < was + 20_000_000
            for server, was in zip(cluster.servers, before, strict=True)
        ),
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
    ],
    ids=["empty", "text", "pickle", "older"],
)
def test_a_stranger_publishes(traffic: Traffic, rabbitmq: RabbitMQ, payload: bytes) -> None:
    publish(rabbitmq, f"c/,{ROOM}", payload)
    traffic.loses_nothing()
