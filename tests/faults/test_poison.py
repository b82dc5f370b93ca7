"""Strangers write to the carrier: what is nobody's is dropped, and everybody else is served."""

import json
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from django_socketio import envelope
from django_socketio.envelope import Envelope, Stamp
from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults import gauges
from tests.faults.carriers import Carrier
from tests.faults.load import RESTORED, SEED, Load
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(2400 * UNIT)

STRANGER = "stranger"
"""The name of a node, as it would be."""

GOOD = Envelope(packets=(b'2["message",["stranger",1,"red",null,"forged"]]',))


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    with Cluster(carrier.backend, workers=carrier.workers) as cluster:
        yield cluster


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit",)


def control(kind: int, body: bytes, *attachments: bytes) -> bytes:
    return envelope.encode(Envelope(kind, (body, *attachments)))


def payloads(chance: random.Random) -> list[bytes]:
    """What is no envelope, or one that means nothing."""
    good = envelope.encode(GOOD)
    stamped = envelope.encode(GOOD, Stamp(STRANGER, 1, 1))
    found = [b"", b"\x00", b"garbage", pickle.dumps(Bomb()), b"x" * 100_000]
    found += [chance.randbytes(chance.randrange(1, 200)) for _ in range(20)]
    found += [bytes([version]) + good[1:] for version in (0, 2, 127, 255)]
    found += [bytes([good[0], kind]) + good[2:] for kind in (0, 6, 255)]
    found += [good[:length] for length in range(0, len(good), 3)]
    found += [stamped[:length] for length in range(0, len(stamped), 7)]
    found += [good + b"\x00", good[:-60] + b"\xff" * 60]
    return found


BODIES: list[Any] = [
    None,
    True,
    1,
    "text",
    [],
    {},
    [1, 2],
    [1, 2, 3, 4],
    [STRANGER, 1, 1, []],
    [STRANGER, "alive", "1", []],
    [STRANGER, "alive", -1, {}],
    [STRANGER, "alive", 2**70, [["c/,red", "1", 2, 3, []], [], None, ["c/,red", 1, 2, 3, [None]]]],
    ["x" * 100_000, "alive", 1, []],
    ["1", STRANGER, "no such request", []],
    ["1", STRANGER, "members", []],
    ["1", STRANGER, "members", [1, 2, 3]],
    ["1", STRANGER, "members", [{"a": [1]}]],
    ["1", STRANGER, "count", [None]],
    ["1", STRANGER, "channels", [7]],
    ["1", STRANGER, "subscribe", ["c/,red", {}]],
    ["1", STRANGER, "subscribe", ["c/,red", ""]],
    ["1", STRANGER, "unsubscribe", [[], []]],
    ["1", "not a node!!", "members", ["c/,red"]],
    ["1", STRANGER, [], True, True, None],
    ["1", STRANGER, [1, None], True, True, None],
    ["no question", STRANGER, [], True, True, {"a": 1}],
]
KINDS = (envelope.REQUEST, envelope.REPLY, envelope.BEAT)


def controls() -> list[bytes]:
    """Letters between nodes, of each kind, of every shape."""
    found = [control(kind, json.dumps(body).encode()) for kind in KINDS for body in BODIES]
    for kind in KINDS:
        bodies = (b"", b"{", b"[" * 100_000, b"NaN", b'"\xff"', b'"\\ud800"', b"1" * 10_000)
        found += [control(kind, body) for body in bodies]
        found.append(control(kind, b"[]", b"attachment"))
    return found


Inject = Callable[..., None]


@pytest.fixture
def inject(cluster: Cluster) -> Iterator[Inject]:
    client = clients.connect(cluster.addresses[0])

    def inject(topic: str, *payloads: bytes, times: int = 1) -> None:
        for start in range(0, len(payloads), 10):  # as many as attachments of one packet
            some = list(payloads[start : start + 10])
            assert client.call("inject", topic, some, times) in (["sent"], ["BackendError"])

    yield inject
    client.close()


def topics_of(load: Load) -> list[str]:
    """Return the topics of everybody, of channels, of a client, of all nodes and of one."""
    walker = load.walkers[0]
    assert walker.line is not None
    return ["a/", "m/", "c/,red", f"s/,{walker.sid}", "n", f"n{walker.line.sid[:8]}"]


def dropped(cluster: Cluster) -> int:
    return sum(
        count
        for server in cluster.servers
        for name, count in gauges.ask(server)["counters"].items()
        if name.startswith("dropped:")
    )


def load_of(cluster: Cluster) -> Load:
    alone = len(cluster.servers) == 1
    return Load(cluster, walkers=6, inside=3 if alone else 1, outside=0 if alone else 1)


@pytest.mark.parametrize("poison", [lambda: payloads(random.Random(SEED)), controls])
def test_what_is_nobodys_is_dropped(
    cluster: Cluster, inject: Inject, poison: Callable[[], list[bytes]]
) -> None:
    before = dropped(cluster)
    found = poison()
    with load_of(cluster) as load:
        with load.flowing():
            for topic in topics_of(load):
                inject(topic, *found)
            load.is_whole()
        load.report().loses_nothing()
        assert not any(walker.ends for walker in load.walkers)
    wait_until(lambda: dropped(cluster) - before > len(found), what="the counters")


def test_fifty_megabytes(cluster: Cluster, inject: Inject) -> None:
    """More than a broker wants to hold for a worker: it may cut off who does not read so fast."""
    with load_of(cluster) as load:
        with load.flowing(), load.fault("50 MB"):
            for piece in (b"\x01", b"\x01\x01\x00\x00", random.Random(SEED).randbytes(1000)):
                inject("c/,red", piece, times=50_000_000 // len(piece))
        load.report().loses_in_faults_only()
        assert not any(walker.ends for walker in load.walkers)


def test_what_a_stranger_says_in_our_name(cluster: Cluster, inject: Inject) -> None:
    """An old number of a node's is a copy, and that a node is gone is believed until it beats."""
    with load_of(cluster) as load:
        with load.flowing():
            load.is_known()
            gevent.sleep(60 * UNIT)  # in which beats have told of all that was
            walker = load.walkers[0]
            assert walker.line is not None
            node = walker.line.sid[:8]
            for _ in range(5):
                inject("c/,red", envelope.encode(GOOD, Stamp(node, 1, 1)))
                inject("n", control(envelope.BEAT, json.dumps([node, "gone", 0, []]).encode()))
                gevent.sleep(2 * UNIT)
            load.is_whole()
        wait_until(cluster.healthy, RESTORED)
        report = load.report()
        if len(cluster.servers) > 1:  # alone, nobody counts
            report.loses_nothing()
