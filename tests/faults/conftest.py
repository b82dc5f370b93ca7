from collections.abc import Iterator

import pytest

from tests.deployment.cluster import Cluster
from tests.faults import carriers
from tests.faults.carriers import Carrier
from tests.faults.harness import Traffic
from tests.faults.load import Load


@pytest.fixture(scope="module", params=carriers.NAMES)
def carrier(request: pytest.FixtureRequest) -> Iterator[Carrier]:
    with carriers.carrier(request.param) as carrier:
        yield carrier


@pytest.fixture(scope="module", params=carriers.BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[Carrier]:
    with carriers.carrier(request.param) as carrier:
        yield carrier


@pytest.fixture
def traffic(cluster: Cluster) -> Iterator[Traffic]:
    """Return the traffic of the module's cluster, which comes back and holds to the end."""
    with Traffic(cluster) as traffic:
        traffic.recovers()
        yield traffic
        traffic.holds()


@pytest.fixture
def load(cluster: Cluster) -> Iterator[Load]:
    with Load(cluster, walkers=4, private=0) as load:
        yield load
