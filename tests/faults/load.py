"""
Workers under load: clients of all kinds, publishers inside and outside, and what must hold.

    with Load(cluster, seed=7) as load:
        with load.flowing():
            with load.fault("the broker is killed"):
                redis.kill()
                redis.start()
        load.report().loses_in_faults_only()

The end of a fault's block is its healing: from then on the load must be whole within `RESTORED`
seconds, when the time ends in which something may be lost.
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Self

import gevent

from tests.deployment.cluster import Cluster
from tests.faults import gauges
from tests.faults.checker import SENT, Checker, Fault, Report
from tests.faults.population import KINDS, Walker
from tests.faults.publishers import Inside, Outside, Publisher
from tests.support import UNIT, wait_until

RESTORED = 200 * UNIT
"""Seconds within which service must be restored after healing: ten."""

ROOMS = ("red", "green", "blue")
LONG = bool(os.environ.get("SOCKETIO_TEST_LONG"))
"""Whether tests take the time that a night has."""

SEED = int(os.environ.get("SOCKETIO_TEST_SEED", "1"))


class Load:
    """
    Each worker has `walkers` clients, of all kinds and each in some rooms, and `inside` publishers;
    `outside` more are processes without sockets. Of their messages the share `private` is for one
    client alone.

    `addresses` are those of the workers to use, all of the cluster's if not given. A client stays
    with its worker unless it `roams`: then it goes to the next when it is disconnected. `slack` is
    how many seconds the carrier may be late, where a fault makes it so.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        walkers: int = 6,
        inside: int = 1,
        outside: int = 1,
        pause: float = UNIT / 2,
        seed: int = SEED,
        kinds: Sequence[str] = KINDS,
        roams: bool = False,
        private: float = 0.15,
        slack: float = 0.0,
        addresses: Sequence[str] | None = None,
    ) -> None:
        self.cluster = cluster
        self.checker = Checker()
        self.chance = random.Random(seed)
        self.seed = seed
        self.walkers: list[Walker] = []
        self.publishers: list[Publisher] = []
        self._pause = pause
        self._kinds, self._roams, self._private = kinds, roams, private
        self._slack = slack
        self._lost_before: dict[str, int] = {}
        self._numbers = (walkers, inside, outside)
        self._addresses = list(addresses or cluster.addresses)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        walkers, inside, outside = self._numbers
        for address in self._addresses:
            for other in range(walkers):
                self.add(address, self._kinds[other % len(self._kinds)])
            for _ in range(inside):
                kind = KINDS[len(self.publishers) % 2]
                self._publisher(Inside, kind=kind, addresses=self._from(address))
        for _ in range(outside):
            self.add_outside()
        wait_until(self.ready, RESTORED, "all clients are subscribed")
        self._lost_before = lost_in_gaps(self.cluster)

    def _from(self, address: str) -> list[str]:
        where = self._addresses.index(address)
        every = self._addresses[where:] + self._addresses[:where]
        return every if self._roams else [address]

    def add(self, address: str, kind: str) -> Walker:
        """Have one more client that stays."""
        walker = self.walker(f"{kind} {len(self.walkers)}", address, kind, self._slack)
        self.walkers.append(walker)
        return walker

    def walker(self, name: str, address: str, kind: str, slack: float = 0.0) -> Walker:
        """Return a client that is the caller's, and need not be there all the time."""
        return Walker(
            name,
            kind,
            self._from(address),
            self.chance.sample(ROOMS, self.chance.randrange(1, len(ROOMS) + 1)),
            self.checker.journal(name),
            chance=self._random(),
            pause=2 * UNIT,
            slack=slack,
        )

    def add_outside(self, env: Mapping[str, str] | None = None) -> Publisher:
        """Have one more process that publishes."""
        return self._publisher(Outside, env=env or self.cluster.env)

    def _publisher(self, make: Any, **options: Any) -> Publisher:
        name = f"{make.__name__.lower()} {len(self.publishers)}"
        chance = self._random()
        publisher: Publisher = make(
            name,
            self.checker,
            lambda: self._choose(chance),
            chance=chance,
            pause=self._pause,
            **options,
        )
        self.publishers.append(publisher)
        return publisher

    def _random(self) -> random.Random:
        return random.Random(self.chance.random())

    def _choose(self, chance: random.Random) -> str:
        if chance.random() < self._private:
            walker = chance.choice(self.walkers)
            if walker.sid:
                return f"@{walker.sid}"
        return chance.choice(ROOMS)

    def close(self) -> None:
        for publisher in self.publishers:
            publisher.close()
        for walker in self.walkers:
            walker.stop()

    # Its course

    def ready(self) -> bool:
        """Tell whether every client is subscribed to all its rooms."""
        return all(walker.ready for walker in self.walkers)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Publish all the time; at the end see that all has come that is owed."""
        for publisher in self.publishers:
            publisher.start()
        try:
            yield
        finally:
            self.pause()

    def is_known(self) -> None:
        """Wait until every publisher has been heard in every room, so that gaps show."""
        since = monotonic()

        def known() -> bool:
            sent = {
                (key.origin, sending.room)
                for key, sending in list(self.checker.sendings.items())
                if sending.began > since and sending.outcome == SENT
            }
            return all((who.name, room) in sent for who in self.publishers for room in ROOMS)

        wait_until(known, RESTORED, "all publishers are known")

    def pause(self) -> None:
        for publisher in self.publishers:
            publisher.stop()

    @contextmanager
    def fault(self, name: str, restored: float = RESTORED) -> Iterator[Fault]:
        """Break something; afterwards wait until all is well again, while messages flow."""
        fault = Fault(name, self._all_heard())
        self.checker.faults.append(fault)
        yield fault
        self.is_whole(timeout=restored)
        fault.ended = monotonic()

    def _all_heard(self) -> float:
        """Wait until all has come that was sent until now; return when that was."""
        healthy = max((fault.ended for fault in self.checker.faults), default=0.0)
        now = monotonic()
        with suppress(AssertionError):  # the report will say it better
            wait_until(lambda: not self.checker.missing(healthy, now), RESTORED)
        return now

    def is_whole(self, timeout: float = RESTORED) -> None:
        """Wait until everybody sends, and everybody hears all of it."""
        healed = monotonic()
        deadline = healed + timeout
        while True:
            left = max(deadline - monotonic(), 0)
            wait_until(self.ready, left, "all clients are subscribed")
            wait_until(lambda: self._all_send(healed), left, "all publishers succeed")
            if self._all_hear(monotonic()):
                return
            assert monotonic() < deadline, f"not restored: \n{self.checker.report()}"

    def _all_send(self, since: float) -> bool:
        return all(publisher.is_fine(since) for publisher in self.publishers)

    def _all_hear(self, since: float) -> bool:
        """Tell whether all comes to all that is sent in the next moment."""
        gevent.sleep(4 * UNIT)
        try:
            wait_until(lambda: not self.checker.missing(since), 20 * UNIT)
        except AssertionError:
            return False
        return self._all_send(since - RESTORED) and self.ready()

    def notices_its_losses(self) -> int:
        """
        See that each worker counts what did not come, all of it and no more; return how many.

        To be asked after `report()`. Only those count who are known to the worker, before and
        after a fault: see `is_known()`. Those without sockets have no beats to tell of what was
        refused, so that may be counted, too.
        """
        missed = self.checker.report().missed
        doubtful = sum(
            outcome == "BackendError"
            for publisher in self.publishers
            if isinstance(publisher, Outside)
            for _, outcome in publisher.outcomes
        )

        def counted() -> bool:
            lost = self._lost_in_gaps()
            return all(
                missed[each] <= lost[each] <= missed[each] + doubtful for each in self._addresses
            )

        try:
            wait_until(counted, timeout=RESTORED)
        except AssertionError:
            found = f"missed {missed}, counted {self._lost_in_gaps()}, doubtful {doubtful}"
            raise AssertionError(found) from None
        return sum(missed.values())

    def _lost_in_gaps(self) -> dict[str, int]:
        lost = lost_in_gaps(self.cluster)
        return {address: lost[address] - self._lost_before[address] for address in lost}

    def report(self, drain: float = RESTORED) -> Report:
        """Wait until all has come that was sent outside of faults, and judge."""
        excused = max((fault.ended for fault in self.checker.faults), default=0.0)
        with suppress(AssertionError):  # the report says it better
            wait_until(lambda: not self.checker.missing(excused), drain)
        gevent.sleep(4 * UNIT)  # for what comes twice
        return self.checker.report()


def lost_in_gaps(cluster: Cluster) -> dict[str, int]:
    """Return how many messages each worker has counted as lost since its start."""
    return {
        server.address: gauges.ask(server)["counters"].get("lost in gaps", 0)
        for server in cluster.servers
    }
