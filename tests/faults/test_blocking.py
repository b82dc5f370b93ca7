"""A handler takes five seconds: one that waits is nobody's business, one that computes is named."""

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest

from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults import carriers
from tests.faults.harness import ROOM, Traffic
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)
LONG = 100 * UNIT


@pytest.fixture(params=["memory", "redis"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    # RabbitMQ would end the connection of a worker that is away for so long.
    with carriers.carrier(request.param) as carrier:
        with Cluster(carrier.backend, workers=min(carrier.workers, 2)) as cluster:
            yield cluster


@pytest.mark.parametrize("how", ["wait", "work"])
def test_others_lose_nothing_and_the_order_is_kept(cluster: Cluster, how: str) -> None:
    client = clients.connect(cluster.addresses[0])
    with ExitStack() as block:
        block.callback(client.close)
        traffic = block.enter_context(Traffic(cluster))
        traffic.recovers()
        with traffic.flowing():
            gevent.sleep(2 * UNIT)
            before = [len(sender.sent) for sender in traffic.senders]
            client.emit("block", how, LONG)
            ids = [client.request("publish", ROOM, ["behind it", n]) for n in range(1, 21)]
            gevent.sleep(LONG / 2)
            if how == "wait":
                now = [len(sender.sent) for sender in traffic.senders]
                assert all(n > was + 10 for n, was in zip(now, before, strict=True))
                assert not any(listener.numbers("behind it") for listener in traffic.listeners)
            assert [client.acked(id_, 1000 * UNIT) for id_ in ids] == [["sent"]] * 20
        traffic.recovers()
        wait_until(lambda: traffic.lost() == 0, what="all that was sent")
        traffic.holds()
        for listener in traffic.listeners:
            assert listener.numbers("behind it") == list(range(1, 21))
            assert not listener._greenlet.ready()
    named = "block, which handles event:block of <Socket " + client.sid
    if how == "work":
        wait_until(lambda: named in cluster.servers[0].output, what="the alarm")
    else:
        assert named not in cluster.servers[0].output
