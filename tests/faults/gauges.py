"""What workers hold, once a second: from inside, where only they know, and from /proc."""

import json
import os
import resource
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent

from tests import clients
from tests.support import Server

_SELDOM = 5
"""Samples of which one counts the greenlets, which takes long."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`lag` is the hub's in seconds, the worst since the sample before; sizes are in bytes."""

    at: float
    rss: int
    descriptors: int
    sessions: int
    queued: int
    topics: int
    lag: float
    greenlets: int | None
    counters: dict[str, int]


def rss(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def ask(server: Server, greenlets: bool = False) -> dict[str, Any]:
    target = "/gauges/?greenlets" if greenlets else "/gauges/"
    answer = clients.request(server.address, "GET", target)
    assert answer.status == 200, answer.body
    gauges: dict[str, Any] = json.loads(answer.body)
    return gauges


def sample(server: Server, greenlets: bool = False) -> Sample:
    gauges = ask(server, greenlets)
    return Sample(
        at=monotonic(),
        rss=rss(server.pid),
        descriptors=descriptors(server.pid),
        sessions=gauges["sessions"],
        queued=gauges["queued"],
        topics=gauges["topics"],
        lag=gauges["lag"],
        greenlets=gauges.get("greenlets"),
        counters=gauges["counters"],
    )


class Sampler:
    """Sample some servers once a second; one that does not answer just has no sample."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        self._greenlets = [gevent.spawn(self._run, server) for server in servers]

    def _run(self, server: Server) -> None:
        number = 0
        while True:
            number += 1
            try:
                taken = sample(server, greenlets=number % _SELDOM == 0)
            except (OSError, AssertionError, RuntimeError):
                pass
            else:
                self.samples[server.address].append(taken)
            gevent.sleep(1)

    def stop(self) -> None:
        gevent.killall(self._greenlets)


def slope(points: list[tuple[float, float]]) -> float:
    """Return by how much the second rises with each unit of the first, by least squares."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
