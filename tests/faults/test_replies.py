"""A reply is lost on its way back: the caller may be wrong about it, and nobody gets a copy."""

from collections.abc import Iterator
from contextlib import contextmanager

import gevent
import pytest

from tests.deployment.cluster import Cluster
from tests.faults.carriers import Carrier
from tests.faults.load import Load
from tests.faults.proxy import Proxy
from tests.faults.publishers import Publisher
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)


@pytest.fixture(scope="module")
def cluster(broker: Carrier) -> Iterator[Cluster]:
    with Cluster(broker.backend, workers=2) as cluster:
        yield cluster


@contextmanager
def outsider(broker: Carrier, load: Load, proxy: Proxy) -> Iterator[Publisher]:
    """A process whose broker is behind the proxy, and with which all is well."""
    env = load.cluster.env_with(SOCKETIO_BACKEND=broker.through(proxy.port))
    publisher = load.add_outside(env)
    assert publisher.publish() in ("sent", "NoSocket")
    yield publisher


def test_the_reply_to_a_publish_is_swallowed(broker: Carrier, cluster: Cluster) -> None:
    with Proxy((broker.service.place.address, broker.service.port)) as proxy:
        with Load(cluster, walkers=3, outside=0) as load:
            with outsider(broker, load, proxy) as publisher:
                with load.flowing():
                    wait_until(lambda: publisher.is_fine(0), what="a reply")
                    proxy.down.swallow()
                    wait_until(
                        lambda: publisher.outcomes[-1][1] == "BackendError", what="its refusal"
                    )
                    proxy.heal()
                    load.is_whole()
            report = load.report()
            report.loses_nothing()
            assert report.heard_though_refused
            assert publisher.outcomes[-1][1] == "sent"


def test_the_line_is_cut_all_the_time(broker: Carrier, cluster: Cluster) -> None:
    """Before a publish, in its midst, and before its reply: no copy and no disorder."""
    with Proxy((broker.service.place.address, broker.service.port)) as proxy:
        with Load(cluster, walkers=3, outside=0) as load:
            with outsider(broker, load, proxy) as publisher:
                with load.flowing():
                    for number in range(20):
                        gevent.sleep(2 * UNIT)
                        proxy.up.delay = proxy.down.delay = (number % 3) * UNIT / 10
                        proxy.cut()
                    proxy.heal()
                    load.is_whole()
                    wait_until(lambda: len(publisher.outcomes) > 20, what="its messages")
            report = load.report()
            report.loses_nothing()
