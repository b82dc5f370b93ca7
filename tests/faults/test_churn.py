"""Thousands come and go, in every way there is: a worker is as it was before."""

import random
from collections import Counter
from collections.abc import Iterator

import gevent
import pytest

from tests.deployment.cluster import Cluster
from tests.faults import gauges
from tests.faults.carriers import Carrier
from tests.faults.churn import MANNERS, VISITS, attack, visit
from tests.faults.load import LONG, SEED
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout((16_000 if LONG else 3000) * UNIT)

CYCLES, FEWER, ROUND, AT_ONCE = 10_000, 2000, 2000, 20
SETTINGS = {
    "SOCKETIO_PING_INTERVAL": 20 * UNIT,
    "SOCKETIO_PING_TIMEOUT": 20 * UNIT,
    "SOCKETIO_CONNECT_TIMEOUT": 20 * UNIT,
    "SOCKETIO_UPGRADE_TIMEOUT": 20 * UNIT,
}
KEPT_GREENLETS, KEPT_DESCRIPTORS, KEPT_BYTES = 64, 4, 4_000_000
"""What a worker may hold for whoever comes next."""


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    with Cluster(carrier.backend, workers=1, **SETTINGS) as cluster:
        yield cluster


def come_and_go(address: str, number: int) -> Counter[str]:
    """Have so many visits, many at once; return how many of each kind there were."""
    counts: Counter[str] = Counter()

    def share(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(number // AT_ONCE):
            counts[visit(address, chance)] += 1
            if turn % 10 == 0:
                attack(address, chance)

    shares = [gevent.spawn(share, SEED + each) for each in range(AT_ONCE)]
    gevent.joinall(shares, raise_error=True)
    return counts


def test_thousands_come_and_go(carrier: Carrier, cluster: Cluster) -> None:
    (server,) = cluster.servers
    cycles = CYCLES if LONG or carrier.name == "memory" else FEWER
    come_and_go(server.address, ROUND)  # what is made once, and what an allocator keeps of a peak
    before = at_rest(cluster)
    counts: Counter[str] = Counter()
    for _ in range(cycles // ROUND):
        counts += come_and_go(server.address, ROUND)
        after = at_rest(cluster)
    assert len(counts) == len(VISITS) * len(MANNERS)
    assert (after.greenlets or 0) <= (before.greenlets or 0) + KEPT_GREENLETS
    assert after.descriptors <= before.descriptors + KEPT_DESCRIPTORS
    assert after.topics <= before.topics
    assert after.rss <= before.rss + KEPT_BYTES
    opened = after.counters["opened"] - before.counters["opened"]
    assert opened > cycles * 0.9


def at_rest(cluster: Cluster) -> gauges.Sample:
    """Wait until a worker has noticed that everybody is gone, and return what it holds."""
    (server,) = cluster.servers
    samples = [gauges.sample(server)]

    def rests() -> bool:
        samples.append(gauges.sample(server, greenlets=True))
        last, now = samples[-2:]
        return not now.sessions and not now.queued and now.descriptors >= last.descriptors

    wait_until(rests, timeout=600 * UNIT, what="the end of all sessions")
    gevent.sleep(30 * UNIT)  # those that wait for a last GET
    return gauges.sample(server, greenlets=True)
