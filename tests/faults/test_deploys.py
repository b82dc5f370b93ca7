"""Workers are told to stop, replaced by others, or killed, and their clients lose nothing."""

import http.client
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest

from tests import clients
from tests.arbiter import gone, workers_of
from tests.clients import PATH, Client, HandshakeFailed, Lost
from tests.deployment.cluster import MANAGE, Cluster
from tests.faults.carriers import Carrier
from tests.faults.harness import ROOM
from tests.faults.roamers import Roamers, busiest
from tests.support import UNIT, Server, wait_until

pytestmark = pytest.mark.timeout(3000 * UNIT)

WORKERS = 3
REASON = "server shutting down"
GRACE = 30
"""Seconds that gunicorn's arbiter gives its workers."""


@pytest.fixture
def deployment(broker: Carrier) -> Cluster:
    """Return the settings of a deployment, and no worker yet."""
    # No fault of the broker is to be noticed here, and least of all one that is none.
    return Cluster(broker.patient, workers=0)


@pytest.fixture
def server(deployment: Cluster) -> Iterator[Server]:
    with Server(MANAGE, "--workers", str(WORKERS), env=deployment.env) as server:
        wait_until(lambda: len(workers_of(server.pid)) == WORKERS)
        yield server


@pytest.fixture
def roamers(server: Server, deployment: Cluster) -> Roamers:
    return Roamers(server.address, deployment.env, listeners=60)


def reloaded(server: Server, before: set[int]) -> None:
    """Wait for the end of the workers that were there before."""
    gone(before)
    wait_until(lambda: len(workers_of(server.pid)) == WORKERS, 600 * UNIT)


def finished(server: Server) -> list[str]:
    return [line.split()[1] for line in server.output.splitlines() if line.startswith("finished")]


def settled(roamers: Roamers) -> None:
    """Wait until all are there, and some traffic."""
    wait_until(lambda: roamers.all_listen, 600 * UNIT, "all listen")
    gevent.sleep(20 * UNIT)


def calm(server: Server) -> None:
    """See that the log complains of nothing, and that nobody was told twice of an end."""
    assert "Traceback" not in server.output and "There was no time" not in server.output
    assert max(Counter(finished(server)).values()) == 1


# Others take over


def test_a_rolling_reload_under_load(server: Server, deployment: Cluster) -> None:
    """Nothing is lost, nobody is told of a failure, and not all come back at once."""
    roamers = Roamers(server.address, deployment.env, listeners=120)
    with roamers.flowing():
        settled(roamers)
        before, since = workers_of(server.pid), monotonic()
        server.signal(signal.SIGHUP)
        reloaded(server, before)
        settled(roamers)
    outcomes = roamers.check()
    assert set(outcomes) <= {"sent", "unknown", "NoSocket"}, outcomes
    assert outcomes["unknown"] <= 2 * len(roamers.senders)
    times = roamers.returns(since)
    assert len(times) == len(roamers.roamers)
    assert times[-1] - times[0] >= 2
    assert busiest(times) < len(times) / 2
    assert all(len(listener.stays) == 2 for listener in roamers.listeners)
    ends = {lost.code for roamer in roamers.roamers for lost in roamer.ends if lost.code}
    assert ends == {1012}
    assert not roamers.sids.difference(finished(server)), server.output
    calm(server)


def test_fewer_and_more_workers_under_load(server: Server, roamers: Roamers) -> None:
    with roamers.flowing():
        settled(roamers)
        for number in (signal.SIGTTOU, signal.SIGTTIN):
            server.signal(number)
            wanted = WORKERS - (number == signal.SIGTTOU)
            wait_until(lambda wanted=wanted: len(workers_of(server.pid)) == wanted, 600 * UNIT)
            settled(roamers)
    assert set(roamers.check()) <= {"sent", "unknown", "NoSocket"}
    calm(server)


def test_a_worker_is_killed_under_load(server: Server, roamers: Roamers) -> None:
    """Its clients are gone with it; the others notice nothing, and nobody stays a ghost."""
    with roamers.flowing():
        settled(roamers)
        victim = min(workers_of(server.pid))
        os.kill(victim, signal.SIGKILL)
        gone({victim})
        wait_until(lambda: len(workers_of(server.pid)) == WORKERS, 600 * UNIT)
        settled(roamers)
        with closing(clients.connect(server.address)) as asker:
            there = {each.client.sid for each in roamers.listeners if each.client}
            wait_until(lambda: set(asker.call("members", ROOM)[0]) == there, what="no ghosts")
    outcomes = roamers.check()
    assert set(outcomes) <= {"sent", "unknown", "NoSocket"}, outcomes
    assert {len(listener.stays) for listener in roamers.listeners} <= {1, 2}


Kept = dict[str, list[http.client.HTTPConnection]]


def kept(server: Server, stack: ExitStack, number: int) -> Kept:
    """Open connections that are kept, so many to each worker; return them by its node."""
    found: Kept = {}
    while len(found) < WORKERS or min(map(len, found.values())) < number:
        connection = http.client.HTTPConnection(server.address, timeout=clients.TIMEOUT)
        stack.callback(connection.close)
        connection.request("GET", f"{PATH}health")
        node = json.load(connection.getresponse())["node"]
        found.setdefault(node, []).append(connection)
    return found


def handshake(connection: http.client.HTTPConnection) -> tuple[int, str]:
    """Open a session; return the status, and the node that has it."""
    connection.request("GET", f"{PATH}?EIO=4&transport=polling")
    answer = connection.getresponse()
    body = answer.read()
    return answer.status, json.loads(body[1:])["sid"][:8] if answer.status == 200 else ""


def test_a_handshake_on_a_connection_that_was_kept_goes_to_who_stays(
    server: Server, tmp_path: Path
) -> None:
    """A proxy keeps its connections, and does not know which of them lead to the past."""
    before, go_on = workers_of(server.pid), tmp_path / "go on"
    with ExitStack() as stack:
        found = kept(server, stack, 3)
        stack.callback(go_on.touch)
        busy = stack.enter_context(held(server, "wait for", str(go_on)))
        server.signal(signal.SIGHUP)
        for connections in found.values():  # each old worker stops
            probe = connections.pop()
            wait_until(lambda probe=probe: is_stopping(probe), 600 * UNIT)
        gevent.sleep(2 * UNIT)  # and has told the others
        answers = [handshake(each) for connections in found.values() for each in connections]
        assert {status for status, _ in answers} == {200}
        assert not {node for _, node in answers} & found.keys()
        go_on.touch()
        for client in busy:
            assert client.acked(0, 1200 * UNIT) == ["done"]
    reloaded(server, before)


def is_stopping(connection: http.client.HTTPConnection) -> bool:
    """Ask on a connection that is kept as long as the worker does not stop."""
    connection.request("GET", f"{PATH}health")
    state = json.load(connection.getresponse())
    return bool(state["reason"] == "stopping")


@contextmanager
def held(server: Server, event: str, *args: Any) -> Iterator[list[Client]]:
    """Have a client at each worker, with a handler that runs; yield those that wait for it."""
    found: dict[int, Client] = {}
    with ExitStack() as stack:
        while len(found) < WORKERS:
            client = stack.enter_context(closing(clients.connect(server.address)))
            (pid,) = client.call("whoami")
            found[pid] = client
        for client in found.values():
            client._next_id = 0
            client.request(event, *args)
        yield list(found.values())


# The end of all


def end(server: Server, *signals: signal.Signals) -> float:
    """Send signals, two seconds apart; see that it ends well, and return how long that took."""
    started = monotonic()
    for number in signals:
        server.signal(number)
        if number is not signals[-1]:
            gevent.sleep(2)
    assert server.wait(GRACE + 10) == 0
    return monotonic() - started


STOPS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
}


@pytest.mark.parametrize("how", STOPS)
def test_a_stop_under_load(server: Server, roamers: Roamers, how: str) -> None:
    with roamers.flowing():
        settled(roamers)
        assert end(server, *STOPS[how]) < GRACE
        wait_until(lambda: roamers.none_listens)
    outcomes = roamers.check()
    assert set(outcomes) <= {"sent", "unknown", "NoSocket"}, outcomes
    ends = {lost.code for roamer in roamers.roamers for lost in roamer.ends if lost.code}
    assert ends == {1001 if how == "SIGINT" else 1012}
    assert not roamers.sids.difference(finished(server)), server.output
    calm(server)


@pytest.mark.parametrize("workers", [0, 1], ids=["runserver_socketio", "one worker"])
@pytest.mark.parametrize("how", [*STOPS, "the group"])
def test_a_stop_of_one_process_under_load(workers: int, how: str) -> None:
    cluster = Cluster("memory://", workers=0)
    options = ("--workers", str(workers)) if workers else ()
    with Server(MANAGE, *options, env=cluster.env) as server:
        roamers = Roamers(server.address, cluster.env, listeners=30, senders=1)
        with roamers.flowing():
            settled(roamers)
            if how == "the group":  # as systemd has it: each process is told, by all
                for pid in workers_of(server.pid):
                    os.kill(pid, signal.SIGTERM)
                taken = end(server, signal.SIGTERM)
            else:
                taken = end(server, *STOPS[how])
            wait_until(lambda: roamers.none_listens)
        assert taken < (GRACE if workers else 10)
        roamers.publisher.messages.clear()  # it reaches nobody
        outcomes = roamers.check()
        assert set(outcomes) <= {"sent", "unknown", "NoSocket"}, outcomes
        ends = {lost.code for roamer in roamers.roamers for lost in roamer.ends if lost.code}
        assert ends == {1001 if how == "SIGINT" else 1012}
        assert roamers.sids == set(finished(server))
        calm(server)


def test_a_handler_that_hangs_is_cut_and_named(server: Server) -> None:
    """And ends neither later than it may, nor with another status."""
    with held(server, "sleep", 1000), closing(clients.connect(server.address)) as other:
        ended = gevent.spawn(other.connection.wait_for_end)
        taken = end(server, signal.SIGTERM, signal.SIGINT)  # gunicorn's word for now
        assert taken < 10
        assert ended.get().code in (1001, 1012)
    line = "There was no time for the end of 1 handlers (1 'sleep'), and for 1 that waited"
    assert server.output.count(line) == WORKERS
    assert server.output.count("WORKER TIMEOUT") == server.output.count("SIGKILL") == 0


def test_a_deploy_is_waited_for(server: Server) -> None:
    """Old workers serve until the new ones do: there is somebody at any time."""
    tried = served = 0
    before = workers_of(server.pid)
    server.signal(signal.SIGHUP)
    while workers_of(server.pid) & before:
        tried += 1
        try:
            with closing(clients.connect(server.address)) as client:
                assert client.call("fence") == []
                served += 1
        except Lost:
            pass  # by a worker whose turn it was meanwhile
        except HandshakeFailed as refusal:
            assert refusal.status == 503  # one whose turn it was already
        gevent.sleep(UNIT / 5)
    reloaded(server, before)
    assert served > tried / 2
