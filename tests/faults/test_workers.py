"""A worker dies, and the others know."""

import signal
from collections.abc import Iterator

import gevent
import pytest

from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults.carriers import Carrier
from tests.faults.harness import ROOM
from tests.faults.load import Load
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)


@pytest.fixture
def cluster(broker: Carrier) -> Iterator[Cluster]:
    with Cluster(broker.backend, workers=3) as cluster:
        yield cluster


def members(asker: clients.Client, room: str = ROOM) -> set[str]:
    (found,) = asker.call("members", room)
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
    """Its clients go to another worker, and hear again from then on; nobody else is disturbed."""
    with Load(cluster, walkers=6, roams=True) as load:
        orphans = load.walkers[12:]
        with load.flowing():
            gevent.sleep(10 * UNIT)
            cluster.kill(2)
            load.is_whole()
            gevent.sleep(10 * UNIT)
        load.report().loses_nothing()
        assert [walker.connects for walker in orphans] == [2] * 6
        assert not any(walker.ends for walker in load.walkers[:12])
        for publisher in load.publishers:
            outcomes = {outcome for _, outcome in publisher.outcomes}
            assert outcomes <= {"sent", "NoSocket", "unknown"}, publisher.name
        present = {walker.sid for walker in load.walkers if "red" in walker.rooms}
        with clients.open_connection(cluster.addresses[0]) as connection:
            assert members(connection.connect(), "red") == present


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
