"""RabbitMQ breaks in every way that it can, under traffic."""

import os
from collections.abc import Iterator
from typing import Any

import gevent
import kombu
import pytest

from django_socketio import envelope
from django_socketio.envelope import Envelope
from tests.deployment.cluster import Cluster
from tests.faults.harness import ROOM, SOON, Traffic, rss
from tests.services import RabbitMQ
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(4000 * UNIT)
TIMEOUT = 20 * UNIT
HEARTBEAT = 2  # whole seconds: less the protocol cannot say


def backend(rabbitmq: RabbitMQ) -> dict[str, Any]:
    path = "django_socketio.backends.amqp.AMQPBackend"
    options = {"url": rabbitmq.url, "timeout": TIMEOUT, "heartbeat": HEARTBEAT}
    return {"BACKEND": path, "OPTIONS": options}


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMQ]:
    with RabbitMQ() as rabbitmq:
        yield rabbitmq


@pytest.fixture(scope="module")
def cluster(rabbitmq: RabbitMQ) -> Iterator[Cluster]:
    with Cluster(backend(rabbitmq), workers=2) as cluster:
        yield cluster


@pytest.fixture
def traffic(cluster: Cluster) -> Iterator[Traffic]:
    with Traffic(cluster) as traffic:
        traffic.recovers()
        yield traffic
        traffic.holds()


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


def test_it_is_killed_and_started_again(traffic: Traffic, rabbitmq: RabbitMQ) -> None:
    with traffic.flowing():
        rabbitmq.kill()
        gevent.sleep(10 * UNIT)
        rabbitmq.start()
        traffic.recovers()
    assert any(sender.refused.get("BackendError") for sender in traffic.senders)


def test_it_closes_all_connections(traffic: Traffic, rabbitmq: RabbitMQ) -> None:
    with traffic.flowing():
        for _ in range(5):
            rabbitmq.ctl("close_all_connections", "a test")
            traffic.recovers()


def test_it_freezes(traffic: Traffic, rabbitmq: RabbitMQ, cluster: Cluster) -> None:
    """Half-open: nothing comes, and nothing says so."""
    rabbitmq.freeze()
    try:
        assert {sender.send() for sender in traffic.senders} == {"BackendError"}
        wait_until(lambda: not cluster.healthy(), timeout=200 * UNIT, what="red health")
        gevent.sleep(600 * UNIT)
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
