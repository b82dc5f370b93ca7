"""
Hosts of their own, as network namespaces around a router, whose lines can be cut.

    with Network() as network:
        broker, worker = network.host(), network.host()
        Redis(place=broker.place)
        network.cut(worker, broker)       # silently: no FIN, no RST, no ICMP
        network.mend()
        broker.power_off()                # its sockets end without a word
        broker.power_on()

The tests' own process is at the router, too, as `network.outside`. All names begin with the pid of
this process, so nothing of another run is touched.
"""

import functools
import itertools
import os
import shutil
import subprocess
from contextlib import suppress
from typing import Self

from tests.support import Place, require

_SUBNETS = 50
"""Of 10.x.y.0/24, by x: so many runs may share a machine."""

_numbers = itertools.count()


class Point:
    """Whatever has a line to the router."""

    def __init__(self, network: "Network", number: int) -> None:
        self._network = network
        self._number = number
        self.subnet = f"{network.base}.{number}"

    @property
    def address(self) -> str:
        return f"{self.subnet}.2"

    def _connect(self, inside: tuple[str, ...]) -> None:
        """Lay the line. `inside` is how `ip` is told to work at this end."""
        router, near, far = self._network.router, f"{self._line}n", f"{self._line}f"
        ip("-n", router, "link", "add", far, "type", "veth", "peer", "name", near)
        ip("-n", router, "link", "set", near, "netns", inside[1] if inside else str(os.getpid()))
        for where, name, last in ((("-n", router), far, 1), (inside, near, 2)):
            ip(*where, "address", "add", f"{self.subnet}.{last}/24", "dev", name)
            ip(*where, "link", "set", name, "up")
        every = f"{self._network.base}.0.0/16"
        ip(*inside, "route", "add", every, "via", f"{self.subnet}.1")

    @property
    def _line(self) -> str:
        return f"{self._network.name}{self._number}"


class Outside(Point):
    """The tests' own process."""

    def __init__(self, network: "Network", number: int) -> None:
        super().__init__(network, number)
        self._connect(())


class Host(Point):
    """A namespace. What is started by the command of its `place` runs in it."""

    def __init__(self, network: "Network", number: int) -> None:
        super().__init__(network, number)
        self.power_on()

    @property
    def name(self) -> str:
        return f"{self._network.name}h{self._number}"

    @property
    def place(self) -> Place:
        return Place(self.address, ("ip", "netns", "exec", self.name))

    def power_on(self) -> None:
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")
        self._connect(("-n", self.name))

    def power_off(self) -> None:
        """Be gone: what its kernel says of connections that end now reaches nobody."""
        ip("-n", self._network.router, "link", "del", f"{self._line}f")
        ip("netns", "del", self.name)


class Network:
    def __init__(self) -> None:
        require("netns", _works())
        number = next(_numbers)
        # The names of interfaces have 15 characters.
        self.name = f"ds{os.getpid()}{chr(97 + number % 26)}"
        self.base = f"10.{200 + (os.getpid() + number) % _SUBNETS}"
        self.router = f"{self.name}r"
        self._hosts: list[Host] = []
        self._rules: list[tuple[str, ...]] = []

    def __enter__(self) -> Self:
        try:
            ip("netns", "add", self.router)
            self.forwards(True)
            self.outside = Outside(self, 1)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        for name in [*(host.name for host in self._hosts), self.router]:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)  # and the lines with it, and the routes with those

    def host(self) -> Host:
        host = Host(self, len(self._hosts) + 2)
        self._hosts.append(host)
        return host

    def forwards(self, yes: bool) -> None:
        """Have the router pass anything on, or nothing."""
        write = f"echo {int(yes)} > /proc/sys/net/ipv4/ip_forward"
        ip("netns", "exec", self.router, "sh", "-c", write)

    def cut(self, one: Point, other: Point, *, back: bool = True) -> None:
        """Drop what goes from one to the other, and `back` as well."""
        for start, end in [(one, other), (other, one)][: 1 + back]:
            rule = ("from", f"{start.subnet}.0/24", "to", f"{end.subnet}.0/24", "blackhole")
            ip("-n", self.router, "rule", "add", *rule)
            self._rules.append(rule)

    def mend(self) -> None:
        """Undo every `cut()`."""
        while self._rules:
            ip("-n", self.router, "rule", "del", *self._rules.pop())


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    return done.stdout


@functools.cache
def _works() -> bool:
    """Tell whether namespaces can be made here, which takes root and iproute2."""
    name = f"ds{os.getpid()}t"
    if os.geteuid() or not shutil.which("ip"):
        return False
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", f"{name}n", "type", "veth", "peer", "name", f"{name}f")
    except subprocess.CalledProcessError:
        return False
    finally:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)
    return True
