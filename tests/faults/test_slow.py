"""Clients that read nothing while everybody is sent to: they end or do without, as was chosen."""

import re
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gevent
import pytest

from tests import clients
from tests.clients import Client
from tests.deployment.cluster import Cluster
from tests.faults.carriers import NAMES, Carrier
from tests.faults.gauges import ask, rss
from tests.faults.load import LONG
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout((16_000 if LONG else 8000) * UNIT)

LIMIT = 2**20
STALLED = 8
"""Clients of a worker that read nothing, over either transport."""
BATCH = 500
"""Messages at once, which those who do read have read before the next ones."""
ROUNDS = dict.fromkeys(NAMES, 200) if LONG else {"memory": 200, "redis": 40, "amqp": 40}
"""Batches of 1 KB messages: a hundred times what a kernel keeps for a connection, or twenty."""


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    settings = {
        "SOCKETIO_SLOW_CONSUMERS": [["volatile", "volatile"], ["coalesce", "coalesce"]],
        "SOCKETIO_MAX_BUFFER": LIMIT,
        # No client is given up for anything but what waits for it.
        "SOCKETIO_WRITE_TIMEOUT": 3000,
        "SOCKETIO_PING_INTERVAL": 3000,
    }
    with Cluster(carrier.backend, workers=min(carrier.workers, 2), **settings) as cluster:
        yield cluster


class Reader:
    """A client that reads all, and keeps the numbers."""

    def __init__(self, address: str, channel: str) -> None:
        self.numbers: list[int] = []
        self._client = clients.connect(address)
        assert self._client.subscribe(channel) == {"ok": True}
        self._sock = self._client.connection.transport.socket  # type: ignore[union-attr]
        self._sock.settimeout(None)
        self._greenlet = gevent.spawn(self._read)

    def _read(self) -> None:
        """Read the frames, all of one size, faster than a client that looks at everything."""
        size, number, data = len(_START) + 1010 + len('"]'), len(_START), b""
        while part := self._sock.recv(1 << 20):
            data += part
            whole = len(data) // size * size
            for start in range(0, whole, size):
                assert data.startswith(_START, start)
                self.numbers.append(int(data[start + number : start + number + 10]))
            data = data[whole:]

    def close(self) -> None:
        self._greenlet.kill()
        self._client.connection.drop()


_START = b"\x81\x7e\x04\x02" + b'42["message","'
"""The beginning of each frame, up to the number: a text of 1026 bytes."""


class Crowd:
    """In one channel: on each worker two that read, and some that do not."""

    def __init__(self, cluster: Cluster, channel: str) -> None:
        self.cluster, self.channel, self.sent = cluster, channel, 0
        self.readers = [Reader(address, channel) for address in cluster.addresses for _ in "ab"]
        self.sender = clients.connect(cluster.addresses[0])
        self.stalled: list[Client] = []

    def begin(self) -> None:
        self.flood(2)
        self.base = [rss(server.pid) for server in self.cluster.servers]
        self.most = list(self.base)
        self.stalled = [
            self._stalled(address, transport)
            for address in self.cluster.addresses
            for transport in ("websocket", "polling")
            for _ in range(STALLED)
        ]

    def _stalled(self, address: str, transport: str) -> Client:
        client = clients.connect(address, transport=transport)
        assert client.subscribe(self.channel) == {"ok": True}
        if transport == "websocket":
            # Not SO_RCVBUF: what does not fit in that is dropped, and the sender's kernel then
            # waits ever longer until it tries again, a minute soon.
            sock: Any = client.connection.transport.socket  # type: ignore[union-attr]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 65_536)
        return client

    def flood(self, rounds: int) -> None:
        for _ in range(rounds):
            answer = self.sender.acked(
                self.sender.request("flood", self.channel, self.sent, BATCH), 2000 * UNIT
            )
            assert answer == ["sent"]
            self.sent += BATCH
            wait_until(
                lambda: all(
                    reader.numbers and reader.numbers[-1] == self.sent - 1
                    for reader in self.readers
                ),
                what="all have read the batch",
            )
            sizes = [rss(server.pid) for server in self.cluster.servers]
            self.most = list(map(max, getattr(self, "most", sizes), sizes))

    def loses_nothing(self) -> None:
        for reader in self.readers:
            assert reader.numbers == list(range(self.sent))

    def is_bounded(self) -> None:
        """See that the workers held no more than may wait for each client."""
        for base, most in zip(self.base, self.most, strict=True):
            assert most < base + LIMIT * (2 * STALLED + 2), f"{(most - base) / 1e6} MB more"

    def finished(self) -> dict[str, str]:
        """Return why sockets have ended, by their session ids."""
        output = "".join(server.output for server in self.cluster.servers)
        return dict(re.findall(r"^finished (\S+) (.*)$", output, re.M))

    def drops(self, kind: str) -> int:
        name = f"dropped: {kind} {self.channel}"
        return sum(ask(server)["counters"].get(name, 0) for server in self.cluster.servers)

    def close(self) -> None:
        for client in (*self.readers, *self.stalled):
            client.close()
        self.sender.close()


@pytest.fixture
def crowd(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Crowd]:
    with closing(Crowd(cluster, request.param)) as crowd:
        crowd.begin()
        yield crowd


@pytest.mark.parametrize("crowd", ["ordinary"], indirect=True)
def test_they_are_disconnected(crowd: Crowd, carrier: Carrier) -> None:
    crowd.flood(ROUNDS[carrier.name])
    wait_until(
        lambda: all(
            crowd.finished().get(client.sid) == "slow consumer" for client in crowd.stalled
        ),
        what="the end of all who are slow",
    )
    crowd.loses_nothing()
    crowd.is_bounded()


@pytest.mark.parametrize("crowd", ["volatile"], indirect=True)
def test_they_do_without(crowd: Crowd, carrier: Carrier) -> None:
    crowd.flood(ROUNDS[carrier.name] // 2)
    crowd.loses_nothing()
    crowd.is_bounded()
    got = check_rest(crowd, last=False)
    assert sum(got) + crowd.drops("volatile") == (crowd.sent - 2 * BATCH) * len(crowd.stalled)


@pytest.mark.parametrize("crowd", ["coalesce"], indirect=True)
def test_they_get_the_latest(crowd: Crowd, carrier: Carrier) -> None:
    crowd.flood(ROUNDS[carrier.name] // 2)
    crowd.loses_nothing()
    crowd.is_bounded()
    got = check_rest(crowd, last=True)
    assert sum(got) + crowd.drops("coalesced") == (crowd.sent - 2 * BATCH) * len(crowd.stalled)


def check_rest(crowd: Crowd, *, last: bool) -> list[int]:
    """Have those who are stalled read, in order; return how many messages each still got."""
    got = []
    for client in crowd.stalled:
        numbers = [int(args[1][:10]) for args in client.fence()]
        assert numbers == sorted(set(numbers))
        assert len(numbers) < (crowd.sent - 2 * BATCH)
        assert not last or numbers[-1] == crowd.sent - 1
        got.append(len(numbers))
    assert not {client.sid for client in crowd.stalled} & crowd.finished().keys()
    return got
