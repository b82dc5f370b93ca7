"""
Clients that live: they connect, subscribe, listen, and connect again by themselves.

Some poll, some have a WebSocket, and some begin with polling and upgrade while messages come, as
the official client does. Each keeps a journal for the checker.
"""

import http.client
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore

from tests import clients
from tests.clients import ACK, CONNECT, CONNECT_ERROR, DISCONNECT, EVENT, Lost, Packet
from tests.faults.checker import Journal
from tests.support import UNIT

ENDS = (Lost, OSError, http.client.HTTPException, clients.HandshakeFailed, clients.Refused)
"""How a connection may end, or not begin."""

KINDS = ("websocket", "polling", "upgrading")


class Upgrading:
    """
    Polling that moves to a WebSocket when `upgrade()` says so.

    As the official client, it goes on polling while it probes, pauses when the probe is answered,
    and says `5` once its GET and its POST are back: nothing is on two ways at once.
    """

    name = "upgrading"

    def __init__(self, address: str, **options: Any) -> None:
        self.polling = clients.Polling(address, **options)
        self.websocket: clients.WebSocket | None = None
        self._address, self._options = address, options
        self._probed: clients.WebSocket | None = None
        self._turn = BoundedSemaphore()  # whoever writes; the upgrade has it while it pauses

    @property
    def messages(self) -> deque[str | bytes]:
        """What has come and was not asked for yet."""
        return (self.websocket or self.polling).messages

    def send(self, *messages: str | bytes) -> None:
        with self._turn:
            (self.websocket or self.polling).send(*messages)

    def receive(self, deadline: float) -> str | bytes:
        while self.websocket is None:
            if self.polling.messages:
                return self.polling.messages.popleft()
            if self._probed is not None:
                self._move(self._probed)
            else:
                self.polling.poll(deadline)
        return self.websocket.receive(deadline)

    def probe(self) -> clients.WebSocket:
        """Open a WebSocket and send the probe."""
        query = {**self._options.get("query", {}), "sid": self.polling.sid}
        websocket = clients.WebSocket(self._address, **{**self._options, "query": query})
        websocket.send("2probe")
        return websocket

    def upgrade(self) -> None:
        """Move; returns when the probe is answered, and whoever reads does the rest."""
        websocket = self.probe()
        assert websocket.receive(monotonic() + clients.TIMEOUT) == "3probe"
        self._turn.acquire()
        self._probed = websocket

    def _move(self, websocket: clients.WebSocket) -> None:
        try:
            self.polling.drop()
            websocket.send("5")
            self.websocket = websocket
        finally:
            self._turn.release()

    def close(self) -> None:
        for transport in (self.websocket or self.polling, self._probed):
            if transport is not None:
                transport.close()

    def drop(self) -> None:
        for transport in (self.polling, self.websocket, self._probed):
            if transport is not None:
                transport.drop()


def open_transport(kind: str, address: str) -> Any:
    return Upgrading(address) if kind == "upgrading" else clients.TRANSPORTS[kind](address)


class Line(clients.Connection):
    """
    A connection that gives up when no ping comes.

    `heard_at` is when it began to wait for what came last: until then it was certainly well.
    """

    def __init__(self, transport: Any) -> None:
        self.heard_at = self._asked_at = monotonic()
        self.patience = 200 * UNIT
        super().__init__(transport)
        self.patience = (self.opened["pingInterval"] + self.opened["pingTimeout"]) / 1000

    def _receive(self, deadline: float) -> str | bytes:
        if not self.transport.messages:
            self._asked_at = monotonic()
        packet: str | bytes = self.transport.receive(monotonic() + self.patience)
        self.heard_at = self._asked_at
        return packet


class Walker:
    """
    A client that is subscribed to its rooms whenever it can be.

    The namespace's answer, acks and messages are taken by one greenlet, so that nothing is noted
    before something that came earlier. It connects to the first of its addresses, and to the next
    one after a failure. When it leaves or ends, what it is owed may be behind by `slack`
    seconds.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        addresses: Sequence[str],
        rooms: Sequence[str],
        journal: Journal,
        *,
        chance: random.Random,
        pause: float = 0.1,
        slack: float = 0.0,
    ) -> None:
        self.name, self.kind = name, kind
        self.rooms = list(rooms)
        self.journal = journal
        self.line: Line | None = None
        self.sid = ""
        self.connects = 0
        self.ends: list[str] = []
        self._addresses = list(addresses)
        self._chance = chance
        self._pause, self._slack = pause, slack
        self._entered: set[str] = set()  # rooms whose messages may come
        self._acks: dict[int, Callable[[Any], None]] = {}
        self._asked: dict[str, int] = {}  # the last that was asked about a room
        self._client: clients.Client | None = None
        self._upgrade: gevent.Greenlet[..., Any] | None = None
        self._manner = "drop"
        self._greenlet = gevent.spawn(self._run)

    @property
    def ready(self) -> bool:
        """Tell whether it is subscribed to all that it wants to be."""
        return bool(self.sid) and all(map(self.journal.is_subscribed, self.rooms))

    @property
    def upgraded(self) -> bool:
        line = self.line
        return line is not None and getattr(line.transport, "websocket", None) is not None

    def _run(self) -> None:
        while True:
            address = self._addresses[0]
            try:
                self._live(address)
            except ENDS as error:
                self.ends.append(f"{type(error).__name__}: {error}")
            finally:
                self._end()
            self._addresses.append(self._addresses.pop(0))
            gevent.sleep(self._pause * (0.5 + self._chance.random()))

    def _live(self, address: str) -> None:
        self.line = line = Line(open_transport(self.kind, address))
        self._client = line.request()
        while True:
            self._take(address, line.read(inf))

    def _end(self) -> None:
        line, self.line, self._client, self.sid = self.line, None, None, ""
        self._acks.clear()
        self._asked.clear()
        self._entered.clear()
        if self._upgrade is not None:
            self._upgrade.kill()
            self._upgrade = None
        if line is not None:
            self.journal.ends(line.heard_at - self._slack)
            hang_up(line, self._manner)
        self._manner = "drop"

    def _take(self, address: str, packet: Packet) -> None:
        match packet.type:
            case _ if packet.type == CONNECT:
                self._connected(address, packet.data["sid"])
            case _ if packet.type == ACK and packet.id in self._acks:
                self._acks.pop(packet.id)(packet.data)
            case _ if packet.type == EVENT and packet.data[0] == "message":
                self.journal.hears(packet.data[1], self._entered)
            case _ if packet.type in (CONNECT_ERROR, DISCONNECT):
                raise Lost(f"by a packet: {packet}")

    def _connected(self, address: str, sid: str) -> None:
        self.sid = sid
        self.connects += 1
        own = f"@{sid}"
        self._entered.add(own)
        self.journal.subscribed(own, address, monotonic())
        for room in self.rooms:
            self._ask("__subscribe__", room, address)
        if self.kind == "upgrading":
            self._upgrade = gevent.spawn(self._move)

    def _ask(self, event: str, room: str, address: str) -> None:
        assert self._client is not None
        if event == "__subscribe__":
            self._entered.add(room)  # a message may come just before the word of it

        def answered(data: Any) -> None:
            if event == "__subscribe__" and data != [{"ok": True}]:
                raise Lost(f"not subscribed: {data}")
            if self._asked.get(room) != number:
                return  # it has changed its mind since
            if event == "__subscribe__":
                self.journal.subscribed(room, address, monotonic())
            else:
                self._entered.discard(room)

        self._asked.pop(room, None)  # what is asked next counts, also while it is being written
        number = self._asked[room] = self._client.request(event, room)
        self._acks[number] = answered

    def _move(self) -> None:
        gevent.sleep(self._pause * 2 * self._chance.random())
        line = self.line
        with suppress(*ENDS):
            if line is not None:
                line.transport.upgrade()

    # What it does of its own accord

    def leave(self, room: str) -> None:
        """Unsubscribe, for a while or for good."""
        self.rooms.remove(room)
        self.journal.leaves(room, monotonic() - self._slack)
        with suppress(*ENDS):
            if self._client is not None and room in self._entered:
                self._ask("__unsubscribe__", room, "")

    def enter(self, room: str) -> None:
        self.rooms.append(room)
        with suppress(*ENDS):
            if self._client is not None and self.sid:
                self._ask("__subscribe__", room, self._addresses[0])

    def go(self, how: str) -> None:
        """End the connection, `how` is "close", "drop" or "reset"; it comes back by itself."""
        self.stop(how)
        self._greenlet = gevent.spawn(self._run)

    def stop(self, how: str = "close") -> None:
        self._manner = how
        self._greenlet.kill()


def hang_up(line: clients.Connection, how: str) -> None:
    with suppress(*ENDS):
        if how == "reset":
            reset(line.transport)
        elif how == "close":
            line.close()
        line.drop()


def reset(transport: Any) -> None:
    """End the connections of a transport by RST."""
    for sock in sockets_of(transport):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def sockets_of(transport: Any) -> list[socket.socket]:
    if isinstance(transport, clients.WebSocket):
        return [transport.socket]
    if isinstance(transport, clients.Polling):
        return [sock for sock in transport.sockets if sock is not None]
    parts = (transport.polling, transport.websocket)
    return [sock for part in parts if part is not None for sock in sockets_of(part)]
