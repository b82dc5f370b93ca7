"""The checker finds what it is there to find: it is shown each, and nothing else."""

import random
from collections.abc import Callable
from math import inf

import pytest

from tests.faults.checker import GRACE, SENT, Checker, Fault, Journal, Message

WORKER, OTHER = "worker 1", "worker 2"


class World:
    """Two clients at one worker and one at another, in a room; ten messages, a second apart."""

    def __init__(self, outcome: str = SENT) -> None:
        self.checker = Checker()
        self.rooms = {"room"}
        self.clients = [self.checker.journal(name) for name in ("ann", "bob", "eve")]
        for client, worker in zip(self.clients, (WORKER, WORKER, OTHER), strict=True):
            client.subscribed("room", worker, 0.5)
        self.messages = [Message("origin", number, "room", b"\x00") for number in range(1, 11)]
        for message in self.messages:
            sending = self.checker.sends(message, float(message.number))
            sending.ended, sending.outcome = message.number + 0.1, outcome

    def hears(self, client: Journal, *numbers: int) -> None:
        for number in numbers:
            client.hears(self.messages[number - 1].wire(), self.rooms)

    def all_hear_all(self, *clients: Journal) -> None:
        for client in clients or self.clients:
            self.hears(client, *range(1, 11))


def wrong(checker: Checker) -> dict[str, int]:
    report = checker.report()
    return {name: len(getattr(report, name)) for name in report.KINDS if getattr(report, name)}


def test_all_is_well() -> None:
    world = World()
    world.all_hear_all()
    assert world.checker.missing() == 0
    report = world.checker.report()
    assert report.owed == 30
    report.loses_nothing()


def lost(world: World, ann: Journal) -> None:
    for client in world.clients[:2]:
        world.hears(client, 1, 2, 3, 4, 5, 6, 7, 8, 9)


def half(world: World, ann: Journal) -> None:
    world.hears(world.clients[1], *range(1, 11))
    world.hears(ann, *range(2, 11))


def twice(world: World, ann: Journal) -> None:
    world.all_hear_all(*world.clients[:2])
    world.hears(ann, 10)


def late(world: World, ann: Journal) -> None:
    world.all_hear_all(world.clients[1])
    world.hears(ann, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10)


def changed(world: World, ann: Journal) -> None:
    world.all_hear_all(*world.clients[:2])
    wire = world.messages[4].wire()
    ann.hears([*wire[:3], b"\x01", wire[4]], world.rooms)


def elsewhere(world: World, ann: Journal) -> None:
    world.all_hear_all(*world.clients[:2])
    ann.hears(Message("origin", 11, "another room", None).wire(), world.rooms)


def invented(world: World, ann: Journal) -> None:
    world.all_hear_all(*world.clients[:2])
    ann.hears(Message("origin", 11, "room", None).wire(), world.rooms)


def misdirected(world: World, ann: Journal) -> None:
    """Sent to another room than the one that it says it is for."""
    world.all_hear_all(*world.clients[:2])
    world.checker.sends(Message("origin", 11, "room", None), 20.0)
    world.rooms.add("another")
    ann.hears(Message("origin", 11, "another", None).wire(), world.rooms)


@pytest.mark.parametrize(
    ("happens", "found"),
    [
        (lost, {"lost": 2}),
        (half, {"lost": 1, "half_delivered": 1}),
        (twice, {"duplicated": 1}),
        (late, {"reordered": 1}),
        (changed, {"corrupt": 1}),
        (elsewhere, {"unexpected": 2}),  # nobody sent it, either
        (invented, {"unexpected": 1}),
        (misdirected, {"unexpected": 1}),
    ],
)
def test_it_finds(happens: Callable[[World, Journal], None], found: dict[str, int]) -> None:
    world = World()
    world.all_hear_all(world.clients[2])
    happens(world, world.clients[0])
    assert wrong(world.checker) == found
    with pytest.raises(AssertionError):
        world.checker.report().loses_in_faults_only()


def test_a_fault_excuses_what_is_lost_in_it_alone() -> None:
    world = World()
    world.checker.faults.append(Fault("fault", 4.05, 5.5))
    world.hears(world.clients[0], 1, 2, 3, 7, 8, 9, 10)  # 6 began later
    world.hears(world.clients[1], 1, 2, 3, 7, 8, 9, 10)
    world.all_hear_all(world.clients[2])
    report = world.checker.report()
    assert (len(report.lost_in_faults), len(report.lost)) == (4, 2)
    assert report.missed == {WORKER: 3}
    with pytest.raises(AssertionError):
        report.loses_nothing()


def test_a_fault_excuses_nothing_that_was_sent_before() -> None:
    world = World()
    world.checker.faults.append(Fault("fault", 4.15, 5.5))
    world.hears(world.clients[0], 1, 2, 3, 6, 7, 8, 9, 10)
    world.hears(world.clients[1], 1, 2, 3, 6, 7, 8, 9, 10)
    world.all_hear_all(world.clients[2])
    assert (world.checker.missing(until=4.05), world.checker.missing(until=4.15)) == (0, 2)
    report = world.checker.report()
    assert (len(report.lost_in_faults), len(report.lost)) == (2, 2)


def test_a_fault_excuses_no_half_of_a_delivery() -> None:
    world = World()
    world.checker.faults.append(Fault("fault", 0.0, inf))
    world.hears(world.clients[0], 1)
    with pytest.raises(AssertionError):
        world.checker.report().loses_in_faults_only()


def test_what_was_refused_is_owed_to_nobody_and_may_come() -> None:
    world = World(outcome="BackendError")
    world.hears(world.clients[0], 1, 2)
    report = world.checker.report()
    assert (report.owed, report.heard_though_refused) == (0, 2)
    assert report.is_sound()
    world.hears(world.clients[0], 2)
    assert wrong(world.checker) == {"duplicated": 1}


def test_what_was_refused_is_in_no_order() -> None:
    world = World()
    world.checker.sendings[world.messages[2].key].outcome = "BackendError"
    for client in world.clients:
        world.hears(client, 1, 2, 4, 5, 3, 6, 7, 8, 9, 10)
    assert wrong(world.checker) == {"late_though_refused": 3}
    world.checker.report().loses_nothing()


def test_who_leaves_or_comes_late_is_owed_the_rest() -> None:
    world = World()
    ann, bob, eve = world.clients
    ann.leaves("room", 5.0)  # 4 ended at 4.1, and 5 at 5.1
    assert not ann.is_subscribed("room")
    bob.ends(4.1 + GRACE / 2)
    world.all_hear_all(eve)
    world.hears(ann, 1, 2, 3, 4)
    assert world.checker.missing() == 3
    world.hears(bob, 1, 2, 3)
    bob.subscribed("room", OTHER, 8.5)
    assert world.checker.missing() == 2
    assert world.checker.missing(since=10.0) == 1
    world.hears(bob, 9, 10)
    world.checker.report().loses_nothing()


def test_what_it_forgets_may_not_come_again() -> None:
    world = World()
    world.all_hear_all()
    world.checker.forget()
    assert world.checker.report().owed == 0
    ann, bob, eve = world.clients
    world.hears(ann, 10)
    assert wrong(world.checker) == {"duplicated": 1}
    world.hears(bob, 5)
    assert wrong(world.checker) == {"duplicated": 1, "reordered": 1}
    message = Message("origin", 11, "room", None)
    sending = world.checker.sends(message, 11.0)
    sending.ended, sending.outcome = 11.1, SENT
    eve.hears(message.wire(), world.rooms)
    assert world.checker.missing() == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_shuffle_of_two_origins_is_fine_if_each_is_in_order(seed: int) -> None:
    chance = random.Random(seed)
    checker = Checker()
    ann = checker.journal("ann")
    ann.subscribed("room", WORKER, 0.0)
    queues = {name: [Message(name, n, "room", {"n": n}) for n in range(20)] for name in "ab"}
    for message in (*queues["a"], *queues["b"]):
        sending = checker.sends(message, 1.0)
        sending.ended, sending.outcome = 2.0, SENT
    while any(queues.values()):
        queue = chance.choice([queue for queue in queues.values() if queue])
        ann.hears(queue.pop(0).wire(), {"room"})
    checker.report().loses_nothing()
