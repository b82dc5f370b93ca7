"""
Clients that come back by themselves, as the official one does, and what they may complain of.

What is sent counts when the sender's ack, or the publisher's call, says so. A listener's stay lasts
from its subscription to its disconnection: what is sent meanwhile it must hear, once and in order.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from random import uniform
from time import monotonic

import gevent

from tests import clients
from tests.clients import Client, HandshakeFailed, Lost, Refused, WebSocket
from tests.faults.harness import ROOM
from tests.support import ROOT, UNIT

TRANSPORTS = ("websocket", "polling", "upgrade")

MARGIN = 20 * UNIT
"""Seconds that a message may be under way: what is sent this late in a stay need not be heard."""

_PUBLISHER = f"""
import json, time
import django
django.setup()
from tests.deployment.sender import attempt
for number in range(1, 1_000_000):
    begun = time.monotonic()
    outcome = attempt("broadcast_channel", ["publisher", number], {ROOM!r}) or "sent"
    print(json.dumps([number, outcome, begun, time.monotonic()]), flush=True)
    if number % 5 == 0 and isinstance(attempt("members", {ROOM!r}), str):
        print(json.dumps([-number, "no members", begun, time.monotonic()]), flush=True)
    time.sleep({UNIT})
"""


@dataclass
class Message:
    number: int
    outcome: str
    begun: float
    ended: float


@dataclass
class Stay:
    """What a client heard between two connections of its own: pairs of a sender and a number."""

    since: float
    until: float = float("inf")
    heard: list[tuple[str, int]] = field(default_factory=list)


class Roamer:
    """A client that connects again half a second to one and a half after it was disconnected."""

    def __init__(self, address: str, transport: str = "websocket") -> None:
        self.transport = transport
        self.attempts: list[float] = []
        self.sids: set[str] = set()
        self.ends: list[Lost] = []
        self.refused: list[int] = []
        self.surprises: list[str] = []
        self.client: Client | None = None
        self._address = address
        self._greenlet = gevent.spawn(self._roam)

    def _roam(self) -> None:
        while True:
            self.attempts.append(monotonic())
            try:
                self._stay(self._connect())
            except HandshakeFailed as failure:
                self.refused.append(failure.status)
            except Lost as lost:
                self.ends.append(lost)
            except (OSError, HTTPException) as error:  # cut, whatever was under way
                self.ends.append(Lost(repr(error)))
            except (AssertionError, Refused) as error:
                self.surprises.append(repr(error))
            finally:
                self._leave()
            gevent.sleep(uniform(0.5, 1.5))

    def _connect(self) -> Client:
        first = "websocket" if self.transport == "websocket" else "polling"
        self.client = client = clients.connect(self._address, transport=first)
        self.sids.add(client.sid)
        if self.transport == "upgrade":
            query = {"sid": client.connection.sid}
            client.connection.upgrade(WebSocket(self._address, query=query))
        return client

    def _stay(self, client: Client) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        if self.client is not None:
            self.client.connection.drop()
            self.client = None

    @property
    def failures(self) -> list[str]:
        """What a client may not be told: answers of 500 and above, and what it does not expect."""
        told = [str(status) for status in self.refused]
        told += self.surprises
        told += [lost.args[0] for lost in self.ends if lost.args[0][:3].isdigit()]
        return [each for each in told if each >= "500"]  # or in letters

    def close(self) -> None:
        self._greenlet.kill()
        self._leave()


class Listener(Roamer):
    def __init__(self, address: str, transport: str) -> None:
        self.stays: list[Stay] = []
        self.listening = False
        super().__init__(address, transport)

    def _stay(self, client: Client) -> None:
        answer = client.subscribe(ROOM)
        if answer.get("retry"):
            raise Lost("the server cannot say for now")
        assert answer == {"ok": True}, answer
        stay = Stay(monotonic())
        self.stays.append(stay)
        self.listening = True
        try:
            while True:
                _, (sender, number) = client.event(timeout=10_000)
                stay.heard.append((sender, number))
        finally:
            self.listening = False
            stay.until = monotonic()


class Sender(Roamer):
    """Sends numbered messages, one after the other's ack."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.messages: list[Message] = []
        super().__init__(address)

    def _stay(self, client: Client) -> None:
        while True:
            message = Message(len(self.messages) + 1, "unknown", monotonic(), float("inf"))
            self.messages.append(message)
            (message.outcome,) = client.call("publish", ROOM, [self.name, message.number])
            message.ended = monotonic()
            gevent.sleep(2 * UNIT)


class Publisher:
    """A process without sockets that sends numbered messages."""

    name = "publisher"

    def __init__(self, env: dict[str, str]) -> None:
        self.messages: list[Message] = []
        env = {**env, "DJANGO_SETTINGS_MODULE": "tests.deployment.settings"}
        command = [sys.executable, "-c", _PUBLISHER]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE)
        self._greenlet = gevent.spawn(self._read)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.messages.append(Message(*json.loads(line)))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._greenlet.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Roamers:
    """Listeners of all transports, senders, and a publisher, on one address."""

    def __init__(self, address: str, env: dict[str, str], listeners: int, senders: int = 3) -> None:
        kinds = [TRANSPORTS[number % 3] for number in range(listeners)]
        self.publisher = Publisher(env)
        self.listeners = [Listener(address, kind) for kind in kinds]
        self.senders = [Sender(f"sender {number}", address) for number in range(senders)]

    @property
    def all_listen(self) -> bool:
        return all(listener.listening for listener in self.listeners)

    @property
    def none_listens(self) -> bool:
        return not any(listener.listening for listener in self.listeners)

    def close(self) -> None:
        """End it: the senders first, and then, when all is heard, the listeners."""
        for sender in self.senders:
            sender.close()
        self.publisher.close()
        gevent.sleep(MARGIN)
        for listener in self.listeners:
            listener.close()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.close()

    # What must hold

    def check(self) -> Counter[str]:
        """See that every stay heard what it should; return how often which outcome was told."""
        outcomes: Counter[str] = Counter()
        for sender in (*self.senders, self.publisher):
            outcomes.update(message.outcome for message in sender.messages)
            for listener in self.listeners:
                for stay in listener.stays:
                    _check_stay(stay, sender.name, sender.messages)
            for message in sender.messages:
                if message.outcome == "NoSocket":
                    assert not self._somebody_heard(message), f"{sender.name}: {message}"
        failures = [each for roamer in self.roamers for each in roamer.failures]
        assert not failures, failures
        return outcomes

    def _somebody_heard(self, message: Message) -> bool:
        """Tell whether somebody was there all the time that a message took."""
        return any(
            stay.since < message.begun and message.ended < stay.until - MARGIN
            for listener in self.listeners
            for stay in listener.stays
        )

    @property
    def roamers(self) -> list[Roamer]:
        return [*self.listeners, *self.senders]

    @property
    def sids(self) -> set[str]:
        """Those of all who were ever let in."""
        return {sid for roamer in self.roamers for sid in roamer.sids}

    def returns(self, since: float) -> list[float]:
        """Return when clients tried to connect again."""
        attempts = (at for roamer in self.roamers for at in roamer.attempts)
        return sorted(at for at in attempts if at > since)


def _check_stay(stay: Stay, sender: str, messages: list[Message]) -> None:
    heard = [number for name, number in stay.heard if name == sender]
    wrong = [pair for pair in pairwise(heard) if pair[0] >= pair[1]]
    assert not wrong, f"{sender}, doubled or out of order: {wrong[:5]}"
    missed = {m.number for m in messages if _is_due(m, stay, heard)}.difference(heard)
    assert not missed, f"{sender}, lost: {sorted(missed)[:5]} of {len(messages)}"


def _is_due(message: Message, stay: Stay, heard: list[int]) -> bool:
    """Tell whether a message must have been heard: as sent in time, or by what came later."""
    if message.outcome != "sent":
        return False
    in_time = message.begun > stay.since and message.ended < stay.until - MARGIN
    return in_time or bool(heard) and heard[0] < message.number < heard[-1]


def busiest(times: list[float], window: float = 0.1) -> int:
    """Return how many of these times were in one window, at most."""
    return max(sum(start <= time < start + window for time in times) for start in times)
