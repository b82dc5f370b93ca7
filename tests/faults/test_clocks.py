"""The clock of the workers jumps, or that of the broker: nobody notices."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import gevent
import pytest
import redis

from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults.carriers import BROKERS, Carrier, amqp_backend, redis_backend
from tests.faults.harness import Traffic
from tests.services import RabbitMQ, Redis
from tests.support import UNIT, faketime_library, require, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)

JUMPS = ["+3600", "-3600", "+86400", "-86400", "+0"]
PINGS = {"SOCKETIO_PING_INTERVAL": 20 * UNIT, "SOCKETIO_PING_TIMEOUT": 50 * UNIT}


class Clock:
    """The wall clock of the processes that have its environment; the monotonic one is real."""

    def __init__(self, directory: Path) -> None:
        library = require("faketime", faketime_library())
        self._file = directory / "clock"
        self.set("+0")
        self.env = {
            # The C library's malloc() as well, for Redis's asks what time it is: while the library
            # that knows allocates what it needs for that.
            "LD_PRELOAD": f"{library}:libc.so.6",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset: str) -> None:
        """Have it differ from the true time by so many seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.rename(self._file)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def time_of(broker: Redis | RabbitMQ) -> int:
    """Return what the broker takes for the time."""
    if isinstance(broker, RabbitMQ):
        return int(broker.ctl("eval", "os:system_time(second)."))
    with redis.Redis(port=broker.port) as client:
        return client.time()[0]


def jump(clock: Clock, cluster: Cluster) -> None:
    """Let it jump to and fro, under traffic, and see that nobody was ended and nothing lost."""
    polling = clients.connect(cluster.addresses[0], transport="polling")
    with ExitStack() as block:
        block.callback(polling.close)
        traffic = block.enter_context(Traffic(cluster))
        traffic.recovers()
        poll = gevent.spawn(polling.event, timeout=10_000)
        block.callback(poll.kill)
        with traffic.flowing():
            for offset in JUMPS:
                clock.set(offset)
                gevent.sleep(2 * sum(PINGS.values()) / len(JUMPS) + 4 * UNIT)
        traffic.loses_nothing()
        wait_until(lambda: traffic.lost() == 0, what="all that was sent")
        assert not any(sender.refused for sender in traffic.senders)
        assert not any(listener._greenlet.ready() for listener in traffic.listeners)
        assert not poll.ready()
        assert cluster.healthy()


def test_the_clock_of_the_workers_jumps(carrier: Carrier, clock: Clock) -> None:
    cluster = Cluster(carrier.backend, workers=min(carrier.workers, 2), **PINGS)
    for server in cluster.servers:
        server.env.update(clock.env)
    with cluster:
        jump(clock, cluster)


@pytest.mark.parametrize("name", BROKERS)
def test_the_clock_of_the_broker_jumps(name: str, clock: Clock) -> None:
    """And that of nobody else: hosts need not agree."""
    broker = Redis() if name == "redis" else RabbitMQ()
    broker.env.update(clock.env)
    make = redis_backend if name == "redis" else amqp_backend
    with broker, Cluster(make(broker), **PINGS) as cluster:
        clock.set("+86400")
        assert time_of(broker) - time.time() > 80_000
        jump(clock, cluster)


def test_the_clock_of_these_tests_does_jump(clock: Clock) -> None:
    """And the monotonic one does not, or they would show nothing."""
    source = "import time; print(time.time(), time.monotonic())"
    clock.set("+86400")
    env = {**os.environ, **clock.env}
    run = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True)
    wall, monotonic = map(float, run.stdout.split())
    assert wall - time.time() > 80_000
    assert abs(time.monotonic() - monotonic) < 600
