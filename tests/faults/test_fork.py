"""A handler has a child process, in every way that there is: it is no second worker."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import gevent
import pytest

from tests import clients
from tests.deployment.cluster import Cluster
from tests.faults.carriers import Carrier
from tests.faults.harness import ROOM, Traffic
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(3000 * UNIT)
LIFE = 20 * UNIT


@pytest.fixture(scope="module")
def cluster(carrier: Carrier) -> Iterator[Cluster]:
    with Cluster(carrier.backend, workers=min(carrier.workers, 2)) as cluster:
        yield cluster


@pytest.mark.parametrize("kind", ["subprocess", "multiprocessing", "fork"])
def test_a_child_of_a_handler_is_nobody_elses_business(cluster: Cluster, kind: str) -> None:
    """It has a hub, a backend and a name of its own, and none of the parent's clients."""
    forking = [clients.connect(cluster.addresses[0]) for _ in range(3)]
    polling = clients.connect(cluster.addresses[0], transport="polling")
    with ExitStack() as block:
        for client in [*forking, polling]:
            block.callback(client.close)
        traffic = block.enter_context(Traffic(cluster))
        traffic.recovers()
        with traffic.flowing():
            ids = [client.request("fork", kind, ROOM, LIFE) for client in forking]
            for _ in range(5):
                gevent.sleep(LIFE / 10)
                assert polling.call("whoami") == [cluster.servers[0].pid]
            answers = [
                client.acked(id_, 600 * UNIT)[0] for client, id_ in zip(forking, ids, strict=True)
            ]
            assert polling.call("whoami") == [cluster.servers[0].pid]
        traffic.loses_nothing()
        wait_until(lambda: traffic.lost() == 0, what="all that was sent")
        assert not any(sender.refused for sender in traffic.senders)
        assert not any(listener._greenlet.ready() for listener in traffic.listeners)
        check(cluster, kind, answers, traffic)


def check(cluster: Cluster, kind: str, answers: list[Any], traffic: Traffic) -> None:
    parent = cluster.servers[0].pid
    assert {answer[0] for answer in answers} == {parent}
    if kind == "subprocess":
        assert [answer[2] for answer in answers] == ["1\n"] * 3
        return
    children = [answer[2] for answer in answers]
    names = {answer[1] for answer in answers} | {node for _, node, _, _ in children}
    assert len(names) == 4
    assert parent not in {pid for pid, _, _, _ in children}
    assert not any(dispatcher for _, _, dispatcher, _ in children)
    alone = len(cluster.servers) == 1  # in memory nothing leaves the child
    assert {outcome for _, _, _, outcome in children} == {"NoSocket" if alone else "sent"}
    for listener in traffic.listeners:
        assert listener.numbers("child") == [] if alone else [1, 1, 1]
