"""A worker dies, and the others know."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults import test_amqp, test_redis
from tests.faults.harness import ROOM, Traffic
from tests.services import RabbitMQ, Redis
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)


@pytest.fixture(scope="module", params=["redis", "amqp"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "redis":
        with Redis() as redis:
            yield test_redis.backend(redis)
    else:
        with RabbitMQ() as rabbitmq:
            yield test_amqp.backend(rabbitmq)


@pytest.fixture
def cluster(backend: Any) -> Iterator[Cluster]:
    with Cluster(backend, workers=3) as cluster:
        yield cluster


def members(asker: clients.Client) -> set[str]:
    (found,) = asker.call("members", ROOM)
    return set(found)


def test_a_killed_worker_leaves_no_ghosts(cluster: Cluster) -> None:
    everybody = [clients.connect(address) for address in cluster.addresses for _ in range(3)]
    try:
        for client in everybody:
            client.subscribe(ROOM)
        asker = everybody[0]
        assert members(asker) == {client.sid for client in everybody}
        cluster.kill(2)
        assert members(asker) == {client.sid for client in everybody[:6]}
        for client in everybody[6:]:
            assert asker.call("disconnect_other", client.sid) == ["NoSocket"]
            assert asker.call("enrol", client.sid, "hall") == ["NoSocket"]
        # They come back to another worker.
        back = [clients.connect(address) for address in cluster.addresses[:2]]
        everybody += back
        for client in back:
            client.subscribe(ROOM)
        assert members(asker) == {client.sid for client in [*everybody[:6], *back]}
    finally:
        for client in everybody:
            client.close()
    with clients.open_connection(cluster.addresses[1]) as connection:
        asker = connection.connect()
        wait_until(lambda: members(asker) == set(), what="an empty room")


def test_the_others_go_on(cluster: Cluster) -> None:
    survivors = Cluster.__new__(Cluster)
    survivors.servers = cluster.servers[:2]
    with Traffic(survivors) as traffic:
        with traffic.flowing():
            cluster.kill(2)
            traffic.recovers()
        assert not any(sender.refused for sender in traffic.senders)
        wait_until(lambda: traffic.lost() == 0, what="all that was sent")


def test_one_that_hangs_is_not_waited_for(cluster: Cluster) -> None:
    """It keeps its connections, so the carrier counts it until its silence counts."""
    client, other = (clients.connect(address) for address in cluster.addresses[::2])
    try:
        client.subscribe(ROOM)
        other.subscribe(ROOM)
        assert members(client) == {client.sid, other.sid}
        cluster.servers[2].signal(signal.SIGSTOP)
        try:
            wait_until(lambda: members(client) == {client.sid}, what="it is given up")
            assert members(client) == {client.sid}
        finally:
            cluster.servers[2].signal(signal.SIGCONT)
        wait_until(lambda: members(client) == {client.sid, other.sid}, what="it is back")
    finally:
        client.close()
        other.close()
