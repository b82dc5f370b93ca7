"""The official client against several workers behind a balancer that knows no client."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.deployment.cluster import MANAGE, Cluster
from tests.interop.test_interop import run
from tests.services import Redis
from tests.support import UNIT, Server

SETTINGS: dict[str, Any] = {
    "INSTALLED_APPS": ["django_socketio", "tests.interop.server.rooms"],
    "SOCKETIO_PING_INTERVAL": 0.5,
    "SOCKETIO_PING_TIMEOUT": 5,
}


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@contextmanager
def serve(redis: Redis, where: str) -> Iterator[list[Server]]:
    """Start workers; those of gunicorn have one address, and the kernel chooses."""
    cluster = Cluster(redis.url, workers=4, hosts=where == "several hosts", **SETTINGS)
    if where == "gunicorn":
        with Server(MANAGE, "--workers", "4", env=cluster.env) as server:
            yield [server]
    else:
        with cluster:
            yield cluster.servers


@pytest.mark.timeout(6000 * UNIT)
@pytest.mark.parametrize("where", ["one host", "several hosts", "gunicorn"])
def test_roaming(
    node: str, client: None, redis: Redis, subtests: pytest.Subtests, where: str
) -> None:
    with serve(redis, where) as servers:
        workers = [{"url": server.url, "pid": server.pid} for server in servers]
        env = {
            **os.environ,
            "SOCKETIO_URL": servers[0].url,
            "SOCKETIO_WORKERS": json.dumps(workers),
            "SOCKETIO_APART": "yes" if where == "several hosts" else "no",
        }
        run(node, "roaming.test.mjs", subtests, env, servers[0])
        for server in servers:
            assert "Traceback" not in server.output, server.output
