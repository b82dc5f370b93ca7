"""Hosts and lines between them, which can be cut without a word."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.faults.network import Host, Network, Point, ip
from tests.services import Redis
from tests.support import UNIT, wait_until

pytestmark = pytest.mark.timeout(4000 * UNIT)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def reaches(start: Host, end: Point) -> bool:
    """Tell whether one host's pings come back from another."""
    ping = ("python3", "-c", _PING, end.address)
    return not subprocess.run([*start.place.command, *ping], capture_output=True).returncode


_PING = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.settimeout(0.2)
    try:
        probe.connect((sys.argv[1], 9))
    except ConnectionRefusedError:  # by whoever is there
        pass
"""


def test_everybody_reaches_everybody_until_they_are_cut(network: Network) -> None:
    one, other = network.host(), network.host()
    assert reaches(one, other) and reaches(other, one) and reaches(one, network.outside)
    network.cut(one, other)
    assert not reaches(one, other) and not reaches(other, one)
    assert reaches(one, network.outside)
    network.mend()
    assert reaches(one, other)
    network.forwards(False)
    assert not reaches(one, other) and not reaches(one, network.outside)
    network.forwards(True)
    assert reaches(one, other)


def test_a_server_runs_there_and_loses_its_power(network: Network) -> None:
    host = network.host()
    redis = Redis(place=host.place)
    with redis:
        with pytest.raises(TimeoutError), redis.connect() as line:
            line.settimeout(4 * UNIT)
            host.power_off()
            redis.kill()
            line.recv(1)  # neither an end nor a reset
        host.power_on()
        redis.start()
        redis.connect().close()


def test_nothing_is_left(network: Network) -> None:
    network.host()
    network.close()
    # The kernel takes its time with the lines of a host that is gone.
    wait_until(lambda: network.name not in ip("netns") + ip("link") + ip("route"))
