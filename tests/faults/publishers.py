"""Those who send: clients, whose handlers do, and processes that serve no sockets."""

import json
import random
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore

from tests import clients
from tests.faults.checker import NOBODY, SENT, UNKNOWN, Checker, Message
from tests.faults.population import ENDS, Line, hang_up, open_transport
from tests.support import ROOT

_SIZES = (0, 1, 10, 100, 100, 1000, 1000, 5000, 20_000)


def random_payload(chance: random.Random) -> Any:
    """Return text, bytes, or both in a structure."""
    size = chance.choice(_SIZES)
    match chance.randrange(4):
        case 0:
            return chance.randbytes(size)
        case 1:
            return {"list": [1, None, chance.randbytes(size // 2), "é\u2028"], "of": size}
        case _:
            return "".join(chance.choices('abc é\n"\\{}[]', k=size))


class Publisher:
    """Publish one message after the other, each for a room that `choose()` returns."""

    def __init__(
        self,
        name: str,
        checker: Checker,
        choose: Callable[[], str],
        *,
        chance: random.Random,
        pause: float,
    ) -> None:
        self.name = name
        self.outcomes: list[tuple[float, str]] = []
        """When each call began, and what became of it."""
        self._fine: list[bool] = []
        self._checker, self._choose = checker, choose
        self._chance, self._pause = chance, pause
        self._number = 0
        self._turn = BoundedSemaphore()
        self._greenlet: gevent.Greenlet[..., Any] | None = None

    def publish(self) -> str:
        """Publish one message; return what became of it."""
        with self._turn:
            self._number += 1
            payload = random_payload(self._chance)
            message = Message(self.name, self._number, self._choose(), payload)
            sending = self._checker.sends(message, monotonic())
            try:
                sending.outcome = self._publish(message)
            finally:
                sending.ended = monotonic()
            self.outcomes.append((sending.began, sending.outcome))
            # One client may be gone; in a room there is always somebody.
            alone = sending.outcome == NOBODY and message.room[0] == "@"
            self._fine.append(sending.outcome == SENT or alone)
            return sending.outcome

    def is_fine(self, since: float, times: int = 3) -> bool:
        """Tell whether all has gone well lately, and more than once."""
        lately = self.outcomes[-times:]
        recent = len(lately) == times and lately[0][0] > since
        return recent and all(self._fine[-times:])

    def start(self) -> None:
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            self.publish()
            gevent.sleep(self._pause * (0.5 + self._chance.random()))

    def stop(self) -> None:
        """Send no more; what is under way has an outcome when this returns."""
        if self._greenlet is not None:
            with self._turn:
                self._greenlet.kill()
            self._greenlet = None

    def close(self) -> None:
        self.stop()

    def _publish(self, message: Message) -> str:
        raise NotImplementedError


def call_of(message: Message) -> tuple[str, Any, str]:
    """Return the call of the API that sends a message: a room is a channel, or one client's."""
    if message.room[0] == "@":
        return "send", message.room[1:], message.wire()  # type: ignore[return-value]
    return "broadcast_channel", message.wire(), message.room


class Inside(Publisher):
    """A client that has its worker's handlers publish, and connects again if it has to."""

    def __init__(self, *args: Any, kind: str, addresses: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._kind, self._addresses = kind, list(addresses)
        self._client: clients.Client | None = None

    def _publish(self, message: Message) -> str:
        try:
            if self._client is None:
                line = Line(open_transport(self._kind, self._addresses[0]))
                self._client = line.connect()
            outcome = self._client.acked(self._client.request("call", *call_of(message)))
        except ENDS:
            self._hang_up("drop")
            self._addresses.append(self._addresses.pop(0))
            return UNKNOWN
        return str(outcome[0]) if outcome else SENT

    def _hang_up(self, how: str) -> None:
        client, self._client = self._client, None
        if client is not None:
            hang_up(client.connection, how)

    def close(self) -> None:
        self.stop()
        self._hang_up("close")


class Outside(Publisher):
    """A process that belongs to the deployment and serves no sockets."""

    def __init__(self, *args: Any, env: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._process = subprocess.Popen(
            [sys.executable, "tests/deployment/ask.py"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _publish(self, message: Message) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(call_of(message), default=_base64), file=self._process.stdin, flush=True)
        outcome = json.loads(self._process.stdout.readline())
        return SENT if outcome is None else str(outcome)

    def close(self) -> None:
        self.stop()
        with self._process as process:
            process.terminate()


def _base64(value: bytes) -> dict[str, str]:
    return {"base64": b64encode(value).decode()}
