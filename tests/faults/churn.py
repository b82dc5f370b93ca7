"""Visits to a worker that end in every way, and attacks on it: nothing of either may stay."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import gevent

from tests import clients
from tests.faults.population import ENDS, Upgrading, hang_up, open_transport

MANNERS = ("close", "drop", "reset")

Visit = Callable[[str, random.Random], Any]
"""Come to an address, and return the connection; whoever called ends it."""


def opens(address: str, chance: random.Random) -> Any:
    """Before CONNECT."""
    return clients.open_connection(address)


def opens_polling(address: str, chance: random.Random) -> Any:
    return clients.open_connection(address, transport="polling")


def asks(address: str, chance: random.Random) -> Any:
    """While CONNECT is answered."""
    connection = opens(address, chance)
    connection.request()
    return connection


def listens(address: str, chance: random.Random) -> Any:
    connection = clients.open_connection(address)
    _enters(connection, chance)
    return connection


def polls(address: str, chance: random.Random) -> Any:
    connection = clients.open_connection(address, transport="polling")
    _enters(connection, chance)
    return connection


def _enters(connection: clients.Connection, chance: random.Random) -> None:
    client = connection.connect()
    for room in ("red", f"room {chance.randrange(1000)}")[: chance.randrange(3)]:
        assert client.subscribe(room) == {"ok": True}


def waits_in_a_get(address: str, chance: random.Random) -> Any:
    connection = polls(address, chance)
    greenlet = gevent.spawn(_quietly, connection)
    gevent.sleep(0.001)
    greenlet.kill()
    return connection


def _quietly(connection: clients.Connection) -> None:
    with suppress(*ENDS):
        connection.read(monotonic() + 60)


def probes(address: str, chance: random.Random) -> Any:
    """In the midst of an upgrade, and mostly without an answer."""
    connection = clients.Connection(Upgrading(address))
    websocket = connection.transport.probe()
    if chance.random() < 0.5:
        websocket.receive(monotonic() + clients.TIMEOUT)
    connection.transport._probed = websocket
    return connection


def upgrades(address: str, chance: random.Random) -> Any:
    connection = clients.Connection(open_transport("polling", address))
    connection.upgrade(clients.WebSocket(address, query={"sid": connection.sid}))
    _enters(connection, chance)
    return connection


VISITS: list[Visit] = [
    opens,
    opens_polling,
    asks,
    listens,
    polls,
    waits_in_a_get,
    probes,
    upgrades,
]


def visit(address: str, chance: random.Random) -> str:
    """Come and go, and return how."""
    comes, goes = chance.choice(VISITS), chance.choice(MANNERS)
    with suppress(*ENDS):
        hang_up(comes(address, chance), goes)
    return f"{comes.__name__}, {goes}"


def _head(target: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


_UPGRADE = [f"{name}: {value}" for name, value in clients.UPGRADE]
_WEBSOCKET = _head("/socket.io/?EIO=4&transport=websocket", *_UPGRADE)


def attack(address: str, chance: random.Random) -> None:
    """Send what nobody should, wait for a moment, and be gone."""
    garbage = chance.randbytes(chance.randrange(1, 2000))
    data = chance.choice(
        [
            garbage,
            _head("/socket.io/?EIO=4&transport=polling")[: chance.randrange(1, 60)],
            _head("/socket.io/?EIO=4&transport=polling&sid=nobody"),
            _head("/socket.io/?EIO=3&transport=nothing"),
            _head("/socket.io/?EIO=4&transport=polling", "Content-Length: 9", method="POST"),
            _WEBSOCKET + garbage,
            _WEBSOCKET + b"\x81\xff" + b"\xff" * 8,
            _WEBSOCKET + b"\x01\x80\x00\x00\x00\x00" + b"\x00\x80\x00\x00\x00\x00" * 2000,
            _WEBSOCKET + b"\x81\x82\x00\x00\x00\x0040" + b"\x81\x85\x00\x00\x00\x0049999",
            _WEBSOCKET + b"\x8a\x80\x00\x00\x00\x00" * 500,
        ]
    )
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(data)
        sock.settimeout(0.2)
        with suppress(TimeoutError):
            while sock.recv(65536):
                pass
