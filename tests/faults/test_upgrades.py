"""Clients upgrade while messages fly both ways: nothing is lost, doubled or out of order."""

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic

import gevent
import pytest
from gevent.event import Event

from tests import clients
from tests.clients import ACK, EVENT
from tests.deployment.cluster import Cluster
from tests.faults.carriers import Carrier
from tests.faults.load import LONG, SEED
from tests.faults.population import ENDS, Line, Upgrading, reset
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout((12_000 if LONG else 2400) * UNIT)

CLIENTS, EACH = 10, 1000
AT_ONCE = 10
"""Messages that a client sends in one go."""

PATIENCE = (4000 if LONG else 1200) * UNIT
"""Seconds that a client waits for all of them."""


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    with Cluster(carrier.backend, workers=carrier.workers) as cluster:
        yield cluster


class Shooter:
    """
    One of two clients in a room. What both send comes back by the carrier, and is all that comes.

    It sends whatever its transport does meanwhile, and the other goes on anyway.
    """

    def __init__(self, address: str, name: str, room: str, messages: int) -> None:
        self.name, self.room, self.messages = name, room, messages
        self.sent = 0
        self.heard: dict[str, list[int]] = defaultdict(list)
        self.transport = Upgrading(address)
        self.line = Line(self.transport)
        self.client = self.line.connect()
        assert self.client.subscribe(room) == {"ok": True}
        self.lost = Event()
        self._greenlets = [gevent.spawn(self._listen)]

    def _listen(self) -> None:
        try:
            while True:
                packet = self.line.read(inf)
                if packet.type == EVENT:
                    room, name, number = packet.data[1]
                    assert room == self.room
                    self.heard[name].append(number)
                assert packet.type in (EVENT, ACK), packet
        except ENDS:
            self.lost.set()

    def shoot(self) -> None:
        self._greenlets.append(gevent.spawn(self._shoot))

    def _shoot(self) -> None:
        with suppress(*ENDS):
            while self.sent < self.messages:
                for _ in range(AT_ONCE):
                    self.sent += 1
                    self.client.emit("publish", self.room, [self.room, self.name, self.sent])
                gevent.sleep(UNIT / 50)

    def fired(self, share: float) -> None:
        """Wait until so much of what it sends has come back."""
        heard = self.heard[self.name]
        wait_until(lambda: len(heard) >= share * self.messages, PATIENCE, "messages")

    def has_heard_all(self) -> None:
        wait_until(lambda: sum(map(len, self.heard.values())) >= 2 * self.messages, PATIENCE, "all")
        assert len(self.heard) == 2
        for numbers in self.heard.values():
            assert numbers == list(range(1, self.messages + 1))

    def close(self) -> None:
        gevent.killall(self._greenlets)
        self.line.close()
        self.line.drop()


@contextmanager
def shooters(cluster: Cluster, number: int, messages: int = EACH) -> Iterator[list[Shooter]]:
    """Have so many clients shoot, two in each room, and at different workers if there are any."""
    found: list[Shooter] = []
    try:
        for each in range(number):
            address = cluster.addresses[each % len(cluster.addresses)]
            found.append(Shooter(address, f"client {each}", f"room {each // 2}", messages))
        for shooter in found:
            shooter.shoot()
        yield found
    finally:
        for shooter in found:
            shooter.close()


def test_under_fire(cluster: Cluster) -> None:
    chance = random.Random(SEED)

    def upgrade(shooter: Shooter) -> None:
        shooter.fired(chance.uniform(0.05, 0.6))
        shooter.transport.upgrade()

    with shooters(cluster, CLIENTS, EACH * (10 if LONG else 1)) as found:
        gevent.joinall([gevent.spawn(upgrade, each) for each in found], raise_error=True)
        for shooter in found:
            shooter.has_heard_all()
            assert shooter.transport.websocket is not None


def gives_up_unanswered(transport: Upgrading) -> None:
    transport.probe().drop()


def gives_up_answered(transport: Upgrading) -> None:
    websocket = transport.probe()
    websocket.receive(monotonic() + clients.TIMEOUT)
    websocket.drop()


def never_reads_the_answer(transport: Upgrading) -> None:
    """And goes on polling, which is answered at once meanwhile."""
    websocket = transport.probe()
    gevent.sleep(10 * UNIT)
    reset(websocket)
    websocket.drop()


def says_nonsense(transport: Upgrading) -> None:
    websocket = transport.probe()
    websocket.receive(monotonic() + clients.TIMEOUT)
    websocket.send("4hello")
    gevent.sleep(2 * UNIT)
    websocket.drop()


PROBES = [gives_up_unanswered, gives_up_answered, never_reads_the_answer, says_nonsense]


def test_a_probe_that_comes_to_nothing(cluster: Cluster) -> None:
    """However often it is tried: it goes on polling, and upgrades all the same at last."""
    with shooters(cluster, 2) as (shooter, other):
        for number, fails in enumerate(PROBES):
            shooter.fired(number / 10)
            fails(shooter.transport)
        shooter.fired(0.5)
        shooter.transport.upgrade()
        shooter.has_heard_all()
        other.has_heard_all()


def test_the_word_to_upgrade_comes_late(cluster: Cluster) -> None:
    """All waits for it: what the server has in its hand, and what the client has not sent yet."""
    with shooters(cluster, 2) as (shooter, other):
        move = shooter.transport._move

        def late(websocket: clients.WebSocket) -> None:
            gevent.sleep(20 * UNIT)
            move(websocket)

        shooter.transport._move = late  # type: ignore[method-assign]
        shooter.fired(0.1)
        shooter.transport.upgrade()
        shooter.has_heard_all()
        other.has_heard_all()


def test_the_websocket_dies_right_after_the_upgrade(cluster: Cluster) -> None:
    """What came is all there was until then; the session ends, or has never moved."""

    def dies(shooter: Shooter) -> None:
        shooter.fired(0.2)
        move = shooter.transport._move

        def to_its_death(websocket: clients.WebSocket) -> None:
            move(websocket)
            reset(websocket)
            websocket.socket.close()

        shooter.transport._move = to_its_death  # type: ignore[method-assign]
        shooter.transport.upgrade()
        shooter.lost.wait()

    with shooters(cluster, CLIENTS) as found:
        gevent.joinall([gevent.spawn(dies, each) for each in found], raise_error=True)
        for shooter in found:
            for numbers in shooter.heard.values():
                assert numbers == list(range(1, len(numbers) + 1))
