"""The official client, and the extension, while the workers behind them are replaced."""

import os
from collections.abc import Iterator

import pytest

from tests.deployment.cluster import MANAGE, Cluster
from tests.interop.test_interop import run
from tests.interop.test_roaming import SETTINGS
from tests.services import Redis
from tests.support import UNIT, Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Redis() as redis:
        cluster = Cluster(redis.url, workers=0, **SETTINGS)
        with Server(MANAGE, "--workers", "3", env=cluster.env) as server:
            yield server


@pytest.mark.timeout(2000 * UNIT)
def test_deploys(node: str, client: None, server: Server, subtests: pytest.Subtests) -> None:
    env = {**os.environ, "SOCKETIO_URL": server.url, "SOCKETIO_ARBITER": str(server.pid)}
    run(node, "deploys.test.mjs", subtests, env, server)
    assert "Traceback" not in server.output, server.output
