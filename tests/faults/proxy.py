"""
A TCP proxy whose lines can be slow, silent, deaf or cut.

    with Proxy(("127.0.0.1", redis.port)) as proxy:
        proxy.down.swallow()     # what the target says reaches nobody
        proxy.heal()

`up` is the direction from whoever connects to the target, `down` the other. What is set holds for
the connections that there are and for those to come.
"""

import random
import socket
import struct
from contextlib import suppress
from typing import Any, Self

import gevent
from gevent.event import Event
from gevent.server import StreamServer

_CHUNK = 65536


class Direction:
    """
    What happens to the bytes that go one way.

    - `delay` holds each piece back for that many seconds, in order;
    - `rate` lets so many bytes pass in a second;
    - `stop()` reads nothing more until `go()`: the sender's window fills;
    - `swallow()` reads all and passes nothing;
    - `corrupt` is the chance that a byte of a piece is changed.
    """

    def __init__(self, chance: random.Random) -> None:
        self.delay = 0.0
        self.rate: float | None = None
        self.corrupt = 0.0
        self.passed = self.swallowed = 0
        self._chance = chance
        self._swallows = False
        self._goes = Event()
        self._goes.set()

    def stop(self) -> None:
        self._goes.clear()

    def go(self) -> None:
        self._goes.set()

    def swallow(self) -> None:
        self._swallows = True

    def heal(self) -> None:
        self.delay, self.rate, self.corrupt, self._swallows = 0.0, None, 0.0, False
        self.go()

    def pump(self, source: Any, sink: Any) -> None:
        """Carry bytes until the source ends, and the end as well."""
        while data := source.recv(_CHUNK if self.rate is None else max(int(self.rate / 10), 1)):
            self._goes.wait()
            if self.delay:
                gevent.sleep(self.delay)
            if self.rate is not None:
                gevent.sleep(len(data) / self.rate)
            self._goes.wait()
            if self._swallows:
                self.swallowed += len(data)
                continue
            self.passed += len(data)
            sink.sendall(self._changed(data))
        sink.shutdown(socket.SHUT_WR)

    def _changed(self, data: bytes) -> bytes:
        if not self.corrupt or self._chance.random() >= self.corrupt:
            return data
        changed = bytearray(data)
        changed[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)


class Proxy:
    def __init__(self, target: tuple[str, int], seed: int = 1) -> None:
        chance = random.Random(seed)
        self.up, self.down = Direction(chance), Direction(chance)
        self.refuses = False
        self.accepted = 0
        self._target = target
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._pairs: dict[int, tuple[Any, Any]] = {}

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop(timeout=0)
        self.cut()

    def heal(self) -> None:
        """Let everything pass again. Connections that were cut stay so."""
        self.refuses = False
        self.up.heal()
        self.down.heal()

    def cut(self, *, client: bool = True, target: bool = True) -> None:
        """End all connections by RST; those of only one side leave the other half-open."""
        for near, far in self._pairs.values():
            for sock in (near,) * client + (far,) * target:
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

    def _serve(self, near: Any, address: Any) -> None:
        self.accepted += 1
        number = self.accepted
        if self.refuses:
            near.close()
            return
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs[number] = near, far
        pumps = [
            gevent.spawn(_quietly, self.up, near, far),
            gevent.spawn(_quietly, self.down, far, near),
        ]
        try:
            gevent.joinall(pumps)
        finally:
            gevent.killall(pumps, block=False)
            del self._pairs[number]
            near.close()
            far.close()


def _quietly(direction: Direction, source: Any, sink: Any) -> None:
    with suppress(OSError):
        direction.pump(source, sink)
