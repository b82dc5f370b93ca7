"""
A soak: workers under load and attack for as long as one likes, while everything breaks in turn.

    python -m tests.faults.soak --minutes 30 --backend redis --seed 7

It writes a report into a directory, says where, and fails if a verdict does. Rounds of health, of a
fault and of its healing follow one another; each ends with the checker's word on what was sent.
There is a silence after the first fifth of the time, and in the end: in both a worker must hold the
same.
"""

# ruff: noqa: E402, I001
from gevent import monkey

monkey.patch_all()

import argparse
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import redis as redis_py

from tests.deployment.cluster import Cluster
from tests.faults import carriers, gauges, report
from tests.faults.carriers import Carrier
from tests.faults.checker import Report
from tests.faults.churn import MANNERS, attack, visit
from tests.faults.load import RESTORED, Load
from tests.faults.population import ENDS, KINDS, Walker, open_transport
from tests.faults.proxy import Proxy
from tests import clients
from tests.support import wait_until

SETTINGS = {
    "SOCKETIO_PING_INTERVAL": 5,
    "SOCKETIO_PING_TIMEOUT": 5,
    "SOCKETIO_CONNECT_TIMEOUT": 5,
    "SOCKETIO_MAX_BUFFER": 262_144,
}
WORKERS, WALKERS, WANDERERS, VISITORS, SLEEPERS = 3, 8, 6, 4, 2
QUIET, HEALTH = 15.0, 12.0
"""Seconds of a silence, and of health between two faults."""

SLACK = 8.0
"""Seconds by which a line that is narrow or slow delays what it carries."""

MAX_GROWTH, POOLS = 1_000_000, 2_000_000
"""
Bytes by which the memory of a worker may grow in ten minutes, from one silence to the other, and
what it may grow by in any time, as its allocators fill their pools in the beginning.

Between the silences it may have more: what a fault made it hold is freed, but the allocator gives
it back only when nothing that lives on lies above it. That is shown, and judged by nobody.
"""

KEPT_DESCRIPTORS, KEPT_GREENLETS = 8, 64


class Soak:
    """The parts of a soak. The last worker is the one that dies now and then."""

    def __init__(self, carrier: Carrier, proxy: Proxy | None, seed: int) -> None:
        self.carrier, self.proxy = carrier, proxy
        self.chance = random.Random(seed)
        self.seed = seed
        backend = carrier.backend if proxy is None else carrier.through(proxy.port)
        self.workers = 1 if carrier.service is None else WORKERS
        self.cluster = Cluster(backend, workers=self.workers, **SETTINGS)
        self.total = Report()
        self.rounds: list[list[Any]] = []
        self.faults: list[Fault] = []  # that are still to come, before all of them come again
        self.visits: list[str] = []
        self.sampler: gauges.Sampler
        self.quiet: list[list[gauges.Sample]] = []
        self.began = 0.0

    # Who is there

    @contextmanager
    def crowd(self) -> Iterator[Load]:
        """Have clients of all kinds, publishers, and whoever comes, goes, sleeps and attacks."""
        outside = int(self.carrier.service is not None)
        load = Load(
            self.cluster,
            walkers=WALKERS,
            inside=2,
            outside=outside,
            pause=0.05,
            seed=self.seed,
            roams=True,
            slack=SLACK,
        )
        with load:
            wanderers = [self._wanderer(load, number) for number in range(WANDERERS)]
            others = [gevent.spawn(self._wander, wanderer) for wanderer in wanderers]
            others += [gevent.spawn(self._visit) for _ in range(VISITORS)]
            others += [gevent.spawn(self._sleep) for _ in range(SLEEPERS)]
            try:
                yield load
            finally:
                load.pause()
                gevent.killall(others)
                for wanderer in wanderers:
                    wanderer.stop()

    def _wanderer(self, load: Load, number: int) -> Walker:
        address = self.cluster.addresses[number % self.workers]
        return load.walker(f"wanderer {number}", address, KINDS[number % 3], slack=SLACK)

    def _wander(self, walker: Walker) -> None:
        while True:
            gevent.sleep(self.chance.uniform(0.5, 4))
            match self.chance.randrange(3):
                case 0:
                    walker.go(self.chance.choice(MANNERS))
                case 1 if walker.rooms:
                    walker.leave(self.chance.choice(walker.rooms))
                case _:
                    if "green" not in walker.rooms:
                        walker.enter("green")

    def _visit(self) -> None:
        while True:
            address = self.chance.choice(self.cluster.addresses)
            with suppress(*ENDS, AssertionError, TimeoutError):
                if self.chance.random() < 0.1:
                    attack(address, self.chance)
                else:
                    self.visits.append(visit(address, self.chance))
            gevent.sleep(0.05)

    def _sleep(self) -> None:
        """Subscribe, and read nothing, until the worker has had enough; then come again."""
        while True:
            with suppress(*ENDS):
                connection = clients.Connection(
                    open_transport("websocket", self.chance.choice(self.cluster.addresses))
                )
                try:
                    connection.connect().subscribe("red")
                    gevent.sleep(self.chance.uniform(5, 30))
                finally:
                    connection.drop()
            gevent.sleep(1)

    # Its course

    def run(self, minutes: float) -> None:
        with self.cluster:
            self.sampler = gauges.Sampler(self.cluster.servers)
            self.began = monotonic()
            try:
                for share in (0.2, 1):  # what a worker has never done yet makes it larger
                    with self.crowd() as load:
                        self._rounds(load, self.began + 60 * minutes * share)
                    self.silence()
            finally:
                self.sampler.stop()

    def _rounds(self, load: Load, until: float) -> None:
        while monotonic() < until:
            if not self.faults:
                every = FAULTS[self.carrier.name]
                self.faults = self.chance.sample(every, len(every))
            self._round(load, self.faults.pop())

    def _round(self, load: Load, breaks: "Fault") -> None:
        name = breaks.__name__.replace("_", " ")
        with load.flowing():
            gevent.sleep(HEALTH)
            broken = monotonic()
            with load.fault(name, restored=4 * RESTORED) as fault:
                breaks(self)
                healed = monotonic()
            gevent.sleep(2)
        found = load.report()
        self.total += found
        whole = fault.ended - healed
        self.rounds.append([name, broken, healed - broken, whole, found])
        sound = "sound" if found.is_sound() else f"NOT SOUND\n{found}"
        lost = len(found.lost_in_faults)
        print(
            f"{(broken - self.began) / 60:5.1f} min  {name}: {healed - broken:.1f} s, whole after"
            f" {whole:.1f} s, owed {found.owed}, lost in it {lost}, {sound}",
            flush=True,
        )
        for journal in load.checker.journals.values():
            journal.corrupt.clear()
            journal.unexpected.clear()
        load.checker.forget()

    def silence(self) -> None:
        """Wait until nobody is there, and note what the workers hold then."""
        servers = self.cluster.servers

        def alone() -> bool:
            return not any(gauges.ask(server)["sessions"] for server in servers)

        wait_until(alone, 60, "the end of all sessions")
        gevent.sleep(QUIET)
        self.quiet.append([gauges.sample(server, greenlets=True) for server in servers])


Fault = Callable[[Soak], None]

# Of any broker


def the_broker_is_killed(soak: Soak) -> None:
    soak.carrier.service.kill()
    gevent.sleep(soak.chance.choice([0.2, 5]))
    soak.carrier.service.start()


def the_broker_freezes(soak: Soak) -> None:
    soak.carrier.service.freeze()
    gevent.sleep(soak.chance.choice([3, 8]))
    soak.carrier.service.thaw()


def all_lines_are_cut(soak: Soak) -> None:
    for _ in range(6):
        _proxy(soak).cut()
        gevent.sleep(0.5)


def lines_are_slow(soak: Soak) -> None:
    proxy = _proxy(soak)
    proxy.up.delay = proxy.down.delay = 0.05
    gevent.sleep(5)
    proxy.heal()


def lines_are_narrow(soak: Soak) -> None:
    _proxy(soak).down.rate = 200_000
    gevent.sleep(5)
    _proxy(soak).heal()


def replies_are_swallowed(soak: Soak) -> None:
    """What was swallowed leaves a stream in disorder, so the lines are cut as well."""
    proxy = _proxy(soak)
    proxy.down.swallow()
    gevent.sleep(3)
    proxy.cut()
    proxy.heal()


def lines_are_half_open(soak: Soak) -> None:
    proxy = _proxy(soak)
    proxy.up.swallow()
    proxy.down.swallow()
    gevent.sleep(6)
    proxy.cut()
    proxy.heal()


def _proxy(soak: Soak) -> Proxy:
    assert soak.proxy is not None
    return soak.proxy


# Of one of them


def redis_kills_its_clients(soak: Soak) -> None:
    with redis_py.Redis.from_url(soak.carrier.service.url) as admin:
        for kind in ("pubsub", "normal") * 4:
            admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            gevent.sleep(0.5)


def redis_pauses(soak: Soak) -> None:
    with redis_py.Redis.from_url(soak.carrier.service.url, socket_timeout=60) as admin:
        admin.execute_command("CLIENT", "PAUSE", 7000, "ALL")
        gevent.sleep(7)


def rabbitmq_closes_all_connections(soak: Soak) -> None:
    soak.carrier.service.ctl("close_all_connections", "a soak")


def rabbitmq_restarts(soak: Soak) -> None:
    soak.carrier.service.ctl("stop_app")
    soak.carrier.service.ctl("start_app")


# Of workers and clients


def a_worker_is_killed(soak: Soak) -> None:
    soak.cluster.kill(WORKERS - 1)
    gevent.sleep(2)
    soak.cluster.servers[-1].start()


def a_worker_is_told_to_stop(soak: Soak) -> None:
    soak.cluster.servers[-1].stop()
    soak.cluster.servers[-1].start()


def a_worker_stands_still(soak: Soak) -> None:
    server = soak.cluster.servers[-1]
    server.signal(signal.SIGSTOP)
    gevent.sleep(3)
    server.signal(signal.SIGCONT)


def everybody_comes_at_once(soak: Soak) -> None:
    storm = [
        gevent.spawn(visit, soak.chance.choice(soak.cluster.addresses), soak.chance)
        for _ in range(200)
    ]
    gevent.joinall(storm)


def everybody_attacks(soak: Soak) -> None:
    storm = [
        gevent.spawn(attack, soak.chance.choice(soak.cluster.addresses), soak.chance)
        for _ in range(200)
    ]
    gevent.joinall(storm)


def strangers_write_to_the_carrier(soak: Soak) -> None:
    client = clients.connect(soak.cluster.addresses[0])
    try:
        for topic in ("a/", "c/,red", "n"):
            for size in (0, 10, 1000, 100_000):
                client.call("inject", topic, soak.chance.randbytes(size))
    finally:
        client.close()


_CLIENTS: list[Fault] = [
    everybody_comes_at_once,
    everybody_attacks,
    strangers_write_to_the_carrier,
]
_ALL: list[Fault] = [
    the_broker_is_killed,
    the_broker_freezes,
    all_lines_are_cut,
    lines_are_slow,
    lines_are_narrow,
    replies_are_swallowed,
    lines_are_half_open,
    a_worker_is_killed,
    a_worker_is_told_to_stop,
    a_worker_stands_still,
    *_CLIENTS,
]
FAULTS: dict[str, list[Fault]] = {
    "memory": [*_CLIENTS, a_worker_stands_still],
    "redis": [*_ALL, redis_kills_its_clients, redis_pauses],
    "amqp": [*_ALL, rabbitmq_closes_all_connections, rabbitmq_restarts],
}

# The report


def fitted(samples: list[gauges.Sample], since: float, until: float) -> float:
    """Return by how many bytes the memory of a process grows in ten minutes, by a line's fit."""
    points = [
        (sample.at / 600, float(sample.rss)) for sample in samples if since < sample.at < until
    ]
    return gauges.slope(points)


def counted(samples: list[gauges.Sample]) -> list[list[object]]:
    """Return each counter, and what it is at each worker."""
    names = sorted({name for sample in samples for name in sample.counters})
    return [[name, *(sample.counters.get(name, 0) for sample in samples)] for name in names]


def write(soak: Soak, directory: Path, minutes: float) -> bool:
    """Write the report; return whether all is well."""
    directory.mkdir(parents=True, exist_ok=True)
    total = soak.total
    samples = soak.sampler.samples
    names = {address: f"worker {n + 1}" for n, address in enumerate(soak.cluster.addresses)}
    spans = [
        ((broken - soak.began) / 60, (broken + lasted + whole - soak.began) / 60, name)
        for name, broken, lasted, whole, _ in soak.rounds
    ]
    first, last = soak.quiet
    started = first[0].at
    verdicts: list[tuple[str, bool]] = []
    for name in ("lost", *Report.NEVER):
        found = getattr(total, name)
        verdicts.append((f"{name.replace('_', ' ')}: {len(found)}", not found))
    verdicts.append((f"messages owed: {total.owed}", total.owed > 0))
    rows = []
    for number, (address, name) in enumerate(names.items()):
        lives = soak.workers == 1 or number < soak.workers - 1
        then, now = first[number], last[number]
        slope = fitted(samples[address], started, last[0].at - QUIET)
        grown, may = now.rss - then.rss, max(MAX_GROWTH * (now.at - then.at) / 600, POOLS)
        lags = sorted(sample.lag for sample in samples[address]) or [0.0]
        rows.append(
            [
                name if lives else f"{name}, which dies",
                f"{then.rss / 1e6:.1f}",
                f"{now.rss / 1e6:.1f}",
                f"{slope / 1e6:+.2f}" if lives else "",
                f"{then.descriptors} / {now.descriptors}",
                f"{then.greenlets} / {now.greenlets}",
                f"{1e3 * lags[len(lags) // 2]:.0f} / {1e3 * lags[int(len(lags) * 0.99)]:.0f}",
                max((sample.queued for sample in samples[address]), default=0),
                now.counters.get("opened", 0),
                now.counters.get("lost in gaps", 0),
            ]
        )
        if lives:
            verdicts += [
                (f"{name}: {grown / 1e6:+.2f} MB, at most {may / 1e6:.2f}", grown <= may),
                (
                    f"{name}: {then.descriptors} descriptors, then {now.descriptors}",
                    now.descriptors <= then.descriptors + KEPT_DESCRIPTORS,
                ),
                (
                    f"{name}: {then.greenlets} greenlets, then {now.greenlets}",
                    (now.greenlets or 0) <= (then.greenlets or 0) + KEPT_GREENLETS,
                ),
            ]
    shown = {names[address]: line for address, line in samples.items()}
    text = [
        f"# Soak on {soak.carrier.name}: {minutes:g} minutes, seed {soak.seed}\n",
        "\n".join(f"- {'holds' if good else '**FAILS**'}: {what}" for what, good in verdicts),
        "\n## Messages\n",
        f"```\n{total}\n```\n",
        f"{len(soak.visits)} visits of others, which ended in {len(set(soak.visits))} ways.\n",
        "## Faults\n",
        report.table(
            ["minute", "fault", "lasted, s", "whole after, s", "owed", "lost in it", "verdict"],
            [
                [
                    f"{(broken - soak.began) / 60:.1f}",
                    name,
                    f"{lasted:.1f}",
                    f"{whole:.1f}",
                    found.owed,
                    len(found.lost_in_faults),
                    "sound" if found.is_sound() else "**not sound**",
                ]
                for name, broken, lasted, whole, found in soak.rounds
            ],
        ),
        "\n## Workers, in the silence before and in that after\n",
        report.table(
            ["", "RSS, MB", "after", "fitted between, MB in 10 min", "descriptors", "greenlets"]
            + [
                "hub lag, ms: median / p99",
                "most queued, bytes",
                "sessions opened",
                "lost in gaps",
            ],
            rows,
        ),
        "\n## What they counted\n",
        report.table(["", *names.values()], counted(last)),
        "\n",
        report.write_plots(directory, shown, soak.began, spans),
    ]
    (directory / "report.md").write_text("\n".join(text))
    for what, good in verdicts:
        print(f"{'holds' if good else 'FAILS'}: {what}")
    return all(good for _, good in verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10_000)
    parser.add_argument("--backend", choices=carriers.NAMES, default="redis")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    directory = options.report or Path(f"soak-{options.backend}-{options.seed}")
    print(f"seed {options.seed}; the report goes to {directory}", flush=True)
    with ExitStack() as block:
        carrier = block.enter_context(carriers.carrier(options.backend))
        proxy = None
        if carrier.service is not None:
            broker = (carrier.service.place.address, carrier.service.port)
            proxy = block.enter_context(Proxy(broker, options.seed))
        soak = Soak(carrier, proxy, options.seed)
        soak.run(options.minutes)
        return 0 if write(soak, directory, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
