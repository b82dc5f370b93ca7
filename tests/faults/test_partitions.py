"""Lines between hosts are cut without a word, and hosts lose their power."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import monotonic

import gevent
import pytest

from tests import clients
from tests.deployment.cluster import Cluster, is_healthy
from tests.faults import carriers
from tests.faults.carriers import Carrier
from tests.faults.load import LONG, RESTORED, Load
from tests.faults.network import Host, Network
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout((8000 if LONG else 2400) * UNIT)

PING = {"SOCKETIO_PING_INTERVAL": 20 * UNIT, "SOCKETIO_PING_TIMEOUT": 20 * UNIT}
"""Small, so that whoever is gone is found out within two seconds."""

DETECTED = 200 * UNIT
"""Seconds within which a worker knows that its broker is gone: ten."""

SHORT, BEYOND = 20 * UNIT, 160 * UNIT
"""One that nobody need notice, and one that all must."""


@dataclass(frozen=True, slots=True)
class Town:
    """Each on a host of its own: a broker, and two workers."""

    network: Network
    carrier: Carrier
    broker: Host
    workers: list[Host]
    cluster: Cluster


@contextmanager
def town_of(name: str) -> Iterator[Town]:
    with ExitStack() as block:
        network = block.enter_context(Network())
        broker, *workers = [network.host() for _ in range(3)]
        carrier = block.enter_context(carriers.carrier(name, broker.place))
        places = [worker.place for worker in workers]
        settings = {"hosts": True, "ALLOWED_HOSTS": ["*"], **PING}
        cluster = Cluster(carrier.backend, places=places, **settings)
        yield Town(network, carrier, broker, workers, block.enter_context(cluster))


@pytest.fixture(scope="module", params=carriers.BROKERS)
def town(request: pytest.FixtureRequest) -> Iterator[Town]:
    with town_of(request.param) as town:
        yield town


def is_red(town: Town, *numbers: int) -> bool:
    return not any(is_healthy(town.cluster.addresses[number]) for number in numbers)


@pytest.mark.parametrize("seconds", [SHORT, BEYOND, *([2400 * UNIT] if LONG else [])])
@pytest.mark.parametrize("way", ["both", "to the broker", "from the broker"])
def test_a_worker_is_cut_off_from_the_broker(town: Town, seconds: float, way: str) -> None:
    """It knows, and says so; the other goes on; afterwards they know what is lost."""
    worker, broker = town.workers[0], town.broker
    with Load(town.cluster, walkers=4, private=0, outside=0) as load:
        with load.flowing():
            load.is_known()
            with load.fault(f"{way} for {seconds:g} s"):
                cut(town, worker, broker, way)
                if seconds == SHORT:
                    gevent.sleep(seconds)
                else:
                    wait_until(lambda: is_red(town, 0), DETECTED, "red health")
                    gevent.sleep(seconds)
                    assert is_healthy(town.cluster.addresses[1])
                    wait_until(lambda: fails(load), DETECTED, "an error to who sends")
                    wait_until(lambda: not lingering(town), 40 * UNIT, "no more than was said")
                town.network.mend()
            load.is_known()
            wait_until(town.cluster.healthy, RESTORED, "health")
        load.report().loses_in_faults_only()
        load.notices_its_losses()
        assert not any(walker.ends for walker in load.walkers)


def cut(town: Town, one: Host, other: Host, way: str) -> None:
    if way == "from the broker":
        one, other = other, one
    town.network.cut(one, other, back=way == "both")


def lingering(town: Town) -> str:
    """
    Return the connections that a worker has closed and whose bytes its kernel would still send.

    They would arrive when the line is mended: messages that were refused, behind later ones.
    """
    ss = [*town.workers[0].place.command, "ss", "-tnH", "state", "fin-wait-1"]
    port = f":{town.carrier.service.port}"
    found = subprocess.run(ss, check=True, capture_output=True, text=True).stdout
    return "".join(line for line in found.splitlines() if port in line)


def fails(load: Load) -> bool:
    return load.publishers[0].outcomes[-1][1] == "BackendError"


def test_the_broker_loses_its_power(town: Town) -> None:
    """No FIN and no RST, and what comes back knows of no connection: nobody waits for ever."""
    with Load(town.cluster, walkers=4, private=0, outside=0) as load:
        with load.flowing():
            load.is_known()
            with load.fault("power"):
                town.broker.power_off()
                town.carrier.service.kill()
                gevent.sleep(40 * UNIT)
                town.broker.power_on()
                town.carrier.service.start()
            load.is_known()
            wait_until(town.cluster.healthy, RESTORED, "health")
        load.report().loses_in_faults_only()
        load.notices_its_losses()
        assert not any(walker.ends for walker in load.walkers)


# Clients. The carrier does not matter to these.


@pytest.fixture(scope="module")
def redis_town() -> Iterator[Town]:
    with town_of("redis") as town:
        yield town


def finished(town: Town) -> dict[str, list[str]]:
    """Return why sockets of the first worker have ended, by session: as their handlers heard."""
    found: dict[str, list[str]] = {}
    for sid, reason in re.findall(r"^finished (\S+) (.*)$", town.cluster.servers[0].output, re.M):
        found.setdefault(sid, []).append(reason)
    return found


@pytest.mark.parametrize("transport", ["websocket", "polling", "upgraded"])
def test_a_client_vanishes(redis_town: Town, transport: str) -> None:
    """Half-open: it is gone by its ping, once, and whoever else is there goes on."""
    town = redis_town
    vanish(town, transport)


def vanish(town: Town, transport: str) -> None:
    address = town.cluster.addresses[0]
    connection = clients.open_connection(
        address, transport="polling" if transport == "upgraded" else transport
    )
    if transport == "upgraded":
        connection.upgrade(clients.WebSocket(address, query={"sid": connection.sid}))
    client = connection.connect()
    assert client.subscribe("red") == {"ok": True}
    wait = gevent.spawn(connection.wait_for_end)  # a GET waits, if it polls
    began = monotonic()
    try:
        gevent.sleep(2 * UNIT)
        town.network.cut(town.workers[0], town.network.outside)
        gevent.sleep(100 * UNIT)
        town.network.mend()
        wait_until(lambda: client.sid in finished(town), what="the end of its socket")
        assert finished(town)[client.sid] == ["ping timeout"]
        assert monotonic() - began > 20 * UNIT
        with clients.open_connection(address) as other:
            (present,) = other.connect().call("members", "red")
            assert client.sid not in present
    finally:
        wait.kill()
        connection.drop()
    assert finished(town)[client.sid] == ["ping timeout"]


@pytest.mark.parametrize("seconds", [100 * UNIT, *([800 * UNIT, 4000 * UNIT] if LONG else [])])
def test_all_clients_of_a_worker_are_cut_off(redis_town: Town, seconds: float) -> None:
    """They come back when they can; each old socket has ended once, and the others lost nothing."""
    town = redis_town
    with Load(town.cluster, walkers=6, private=0) as load:
        cut_off = load.walkers[:6]
        before = {walker.sid for walker in cut_off}
        with load.flowing():
            gevent.sleep(10 * UNIT)
            town.network.cut(town.workers[0], town.network.outside)
            gevent.sleep(seconds)
            town.network.mend()
            wait_until(lambda: all(w.connects > 1 for w in cut_off), RESTORED, "clients are back")
            load.is_whole()
        load.report().loses_nothing()
        assert not any(walker.ends for walker in load.walkers[6:])
        wait_until(lambda: before <= finished(town).keys(), what="the ends of old sockets")
        assert all(len(finished(town)[sid]) == 1 for sid in before)


def test_a_short_cut_is_not_even_noticed(redis_town: Town) -> None:
    town = redis_town
    with Load(town.cluster, walkers=6) as load:
        with load.flowing():
            town.network.cut(town.workers[0], town.network.outside)
            gevent.sleep(8 * UNIT)
            town.network.mend()
            load.is_whole()
        load.report().loses_nothing()
        assert not any(walker.ends for walker in load.walkers)
