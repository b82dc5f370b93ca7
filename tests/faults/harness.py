"""
Traffic that notices everything: lost, doubled or reordered messages, and who does not hear.

Each worker has listeners, all in one channel, and a sender, whose messages are numbered. A message
counts as sent when the sender's ack says so. What may be lost in an outage is what a listener did
not hear of it; after it, nothing.
"""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import gevent
from gevent.lock import Semaphore

from tests import clients
from tests.deployment.cluster import Cluster
from tests.support import UNIT, wait_until

ROOM = "room"
SOON = 40 * UNIT
"""Seconds within which all hear again when a broker is reachable: two."""


class Listener:
    """A client that keeps all that it hears: pairs of a sender's name and a number."""

    def __init__(self, address: str) -> None:
        self.client = clients.connect(address)
        self.heard: list[tuple[str, int]] = []
        assert self.client.subscribe(ROOM) == {"ok": True}
        self._greenlet = gevent.spawn(self._listen)

    def _listen(self) -> None:
        while True:
            try:
                _, (sender, number) = self.client.event(timeout=10_000)
            except clients.Lost:
                return
            self.heard.append((sender, number))

    def numbers(self, sender: str) -> list[int]:
        return [number for who, number in self.heard if who == sender]

    def close(self) -> None:
        self._greenlet.kill()
        self.client.close()


class Sender:
    """A client that sends numbered messages while it is told to, one after the other's ack."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.sent: list[int] = []
        self.refused: dict[str, int] = {}
        self._client = clients.connect(address)
        self._number = 0
        self._turn = Semaphore()
        self._greenlet: gevent.Greenlet[..., Any] | None = None

    def send(self) -> str:
        """Send one message; return the server's word for what became of it."""
        with self._turn:
            self._number += 1
            (outcome,) = self._client.acked(
                self._client.request("publish", ROOM, [self.name, self._number]), 1000 * UNIT
            )
            if outcome == "sent":
                self.sent.append(self._number)
            else:
                self.refused[outcome] = self.refused.get(outcome, 0) + 1
            return str(outcome)

    def start(self) -> None:
        def run() -> None:
            while True:
                self.send()
                gevent.sleep(UNIT / 20)

        self._greenlet = gevent.spawn(run)

    def stop(self) -> None:
        if self._greenlet is not None:
            with self._turn:
                self._greenlet.kill()
            self._greenlet = None

    def close(self) -> None:
        self.stop()
        self._client.close()


class Traffic:
    """The listeners and senders of a cluster."""

    def __init__(self, cluster: Cluster, listeners: int = 3) -> None:
        self.cluster = cluster
        self._block = ExitStack()
        with ExitStack() as block:
            self.listeners = [
                block.enter_context(closing(Listener(address)))
                for address in cluster.addresses
                for _ in range(listeners)
            ]
            self.senders = [
                block.enter_context(closing(Sender(f"sender {number}", address)))
                for number, address in enumerate(cluster.addresses)
            ]
            self._block = block.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._block.close()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Send all the time."""
        for sender in self.senders:
            sender.start()
        try:
            yield
        finally:
            for sender in self.senders:
                sender.stop()

    def flows(self) -> bool:
        """Send one message from each worker; tell whether all went out and all are heard."""
        if {sender.send() for sender in self.senders} != {"sent"}:
            return False
        try:
            wait_until(self._all_heard_the_last, timeout=5 * UNIT)
        except AssertionError:
            return False
        return True

    def _all_heard_the_last(self) -> bool:
        last = {(sender.name, sender.sent[-1]) for sender in self.senders if sender.sent}
        return all(last <= set(listener.heard[-200:]) for listener in self.listeners)

    def recovers(self, timeout: float = SOON) -> None:
        """Wait until every worker hears every other again, and then see that nothing is lost."""
        wait_until(self.flows, timeout=timeout, what="all workers hear each other")
        wait_until(self.cluster.healthy, timeout=timeout, what="health")
        self.loses_nothing()

    def loses_nothing(self, messages: int = 20) -> None:
        """Send some messages; each listener gets each, in order. Traffic may go on."""
        since = {sender.name: len(sender.sent) for sender in self.senders}
        for _ in range(messages):
            assert {sender.send() for sender in self.senders} == {"sent"}
        sent = {sender.name: sender.sent[since[sender.name] :] for sender in self.senders}
        wait_until(self._all_heard_the_last, what="the last message")
        for name, expected in sent.items():
            for listener in self.listeners:
                heard = listener.numbers(name)
                assert [n for n in heard if expected[0] <= n <= expected[-1]] == expected
        self.holds()

    def holds(self) -> None:
        """See that nothing came twice, or out of order, whatever happened."""
        for listener in self.listeners:
            for sender in self.senders:
                numbers = listener.numbers(sender.name)
                wrong = [pair for pair in pairwise(numbers) if pair[0] >= pair[1]]
                assert not wrong, f"{sender.name}: {wrong[:5]}"

    def lost(self) -> int:
        """Return how many messages that went well did not reach somebody."""
        return sum(
            len(set(sender.sent) - set(listener.numbers(sender.name)))
            for sender in self.senders
            for listener in self.listeners
        )


def rss(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        thing.close()
