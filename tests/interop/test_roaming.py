"""The official client against several workers behind a balancer that knows no client."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deployment.cluster import Cluster
from tests.interop.test_interop import run
from tests.services import Redis
from tests.support import UNIT

SETTINGS: dict[str, Any] = {
    "INSTALLED_APPS": ["django_socketio", "tests.interop.server.rooms"],
    "SOCKETIO_PING_INTERVAL": 0.5,
    "SOCKETIO_PING_TIMEOUT": 5,
}


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.mark.timeout(6000 * UNIT)
@pytest.mark.parametrize("apart", [False, True], ids=["one host", "several hosts"])
def test_roaming(
    node: str, client: None, redis: Redis, subtests: pytest.Subtests, apart: bool
) -> None:
    with Cluster(redis.url, workers=4, hosts=apart, **SETTINGS) as cluster:
        workers = [{"url": server.url, "pid": server.pid} for server in cluster.servers]
        env = {
            **os.environ,
            "SOCKETIO_URL": cluster.servers[0].url,
            "SOCKETIO_WORKERS": json.dumps(workers),
            "SOCKETIO_APART": "yes" if apart else "no",
        }
        run(node, "roaming.test.mjs", subtests, env, cluster.servers[0])
        for server in cluster.servers:
            assert "Traceback" not in server.output, server.output
