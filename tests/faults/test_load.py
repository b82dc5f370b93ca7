"""All is well: nothing is lost, and nothing stays behind."""

from collections.abc import Iterator

import gevent
import pytest

from tests.deployment.cluster import Cluster
from tests.faults import gauges
from tests.faults.carriers import Carrier
from tests.faults.load import Load
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)

KEPT = 40
"""Greenlets that a worker keeps to serve the next connections and events."""


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    with Cluster(carrier.backend, workers=carrier.workers) as cluster:
        yield cluster


def load_of(cluster: Cluster) -> Load:
    if len(cluster.servers) == 1:
        return Load(cluster, walkers=12, inside=4, outside=0)
    return Load(cluster)


def base(cluster: Cluster) -> list[gauges.Sample]:
    """Wait until nobody is there, and return what the workers hold then."""
    samples: list[gauges.Sample] = []

    def alone() -> bool:
        samples[:] = [gauges.sample(server, greenlets=True) for server in cluster.servers]
        return not any(sample.sessions for sample in samples)

    wait_until(alone, what="the end of all sessions")
    return samples


def test_nothing_is_lost_in_health_and_nothing_stays(cluster: Cluster) -> None:
    with load_of(cluster) as load, load.flowing():
        gevent.sleep(10 * UNIT)  # whatever is made once is made now
    before = base(cluster)
    with load_of(cluster) as load:
        with load.flowing():
            gevent.sleep(80 * UNIT)
        load.report().loses_nothing()
        assert all(walker.upgraded for walker in load.walkers if walker.kind == "upgrading")
        assert not any(walker.ends for walker in load.walkers)
    goes_back(cluster, before)


def goes_back(cluster: Cluster, before: list[gauges.Sample]) -> None:
    """Wait until the workers hold no more than before."""

    def is_back() -> bool:
        return all(
            now.descriptors <= then.descriptors + 2  # the one that asks
            and (now.greenlets or 0) <= (then.greenlets or 0) + KEPT
            and now.topics <= then.topics
            for now, then in zip(base(cluster), before, strict=True)
        )

    try:
        wait_until(is_back, timeout=600 * UNIT)
    except AssertionError:
        raise AssertionError(f"before {before}, after {base(cluster)}") from None
