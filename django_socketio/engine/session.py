"""
An Engine.IO session: one client, on one transport at a time.

States and what may follow::

    OPEN ──> CLOSING ──> CLOSED
      └────────────────────^

OPEN sends and receives; the application hears of the end when a session leaves it. CLOSING, which
only a polling session without a waiting GET goes through, lives until the next one has fetched
what was sent last. CLOSED knows neither transport nor engine.
"""

import logging
from base64 import urlsafe_b64encode
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from os import urandom
from typing import Any, Protocol

from ..protocol import engineio
from ..protocol.engineio import Packet
from ..protocol.exceptions import LimitExceeded, ProtocolError
from .frames import PING, PONG_PROBE, Frame
from .polling import PollingTransport
from .websocket import NORMAL_CLOSURE, WebSocketTransport

logger = logging.getLogger(__name__)


SID_LENGTH = 22

_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


def new_sid() -> str:
    """Return 128 random bits, in characters that fit a URL."""
    return urlsafe_b64encode(urandom(16))[:SID_LENGTH].decode()


class State(Enum):
    OPEN = auto()
    CLOSING = auto()
    CLOSED = auto()


_OPEN = State.OPEN


class Keeper(Protocol):
    """The engine, as its sessions see it."""

    @property
    def on_message(self) -> Callable[["Session", str | bytes], None]: ...

    def pong_received(self, session: "Session") -> None: ...
    def message_began(self, session: "Session") -> None: ...
    def message_ended(self, session: "Session") -> None: ...
    def over_limit(self, limit: str) -> None: ...
    def resumed(self, session: "Session") -> None: ...
    def upgraded(self, session: "Session") -> None: ...
    def transport_gone(self, transport: WebSocketTransport | PollingTransport) -> None: ...
    def closing(self, session: "Session", reason: str) -> None: ...
    def ended(self, session: "Session", reason: str, *, announce: bool) -> None: ...


class Session:
    """
    `data` belongs to the application, which sets it in `on_open`.

    All methods run in the thread of the loop, and none waits.
    """

    __slots__ = (
        "__weakref__",
        "_engine",
        "awaits_pong",
        "data",
        "paused",
        "probe",
        "reason",
        "sid",
        "state",
        "transport",
    )

    def __init__(self, sid: str, engine: Keeper) -> None:
        self._engine = engine
        self.awaits_pong = False
        self.sid = sid
        self.state = State.OPEN
        self.transport: WebSocketTransport | PollingTransport
        self.probe: Probe | None = None
        self.paused = False
        self.reason: str | None = None
        self.data: Any = None

    # Sending

    def send(self, frame: Frame) -> None:
        """Send; what is sent to a session that has ended is dropped."""
        if self.state is State.OPEN:
            self.transport.send(frame)

    def ping(self) -> None:
        self.awaits_pong = True
        self.transport.send(PING)

    # Receiving

    def receive_text(self, text: str) -> None:
        """Take the text packet of a WebSocket message."""
        if text[:1] == "4" and self.state is _OPEN:  # most are: as _receive_message(), uncalled
            try:
                self._engine.on_message(self, text[1:])
            except ProtocolError as error:
                self.fail(error)
            return
        try:
            packet = engineio.decode_packet(text)
        except ProtocolError as error:
            self.fail(error)
            return
        self.receive(packet)

    def receive_binary(self, data: bytes) -> None:
        self._receive_message(data)

    def receive(self, packet: Packet) -> None:
        match packet.type:
            case engineio.MESSAGE:
                self._receive_message(packet.data)
            case engineio.PONG:
                # One that nobody asked for means nothing and starts nothing.
                if self.awaits_pong and self.state is State.OPEN:
                    self.awaits_pong = False
                    self._engine.pong_received(self)
            case engineio.CLOSE:
                self._close_with(self.transport.finish, "transport close")
            case engineio.NOOP:
                pass
            case _:
                # v4: pings come from the server; open and upgrade have no place here.
                self.fail(ProtocolError(f"unexpected Engine.IO packet of type {packet.type}"))

    def _receive_message(self, data: str | bytes) -> None:
        if self.state is not State.OPEN:
            return
        try:
            self._engine.on_message(self, data)
        except ProtocolError as error:
            self.fail(error)

    def fail(self, error: ProtocolError | str) -> None:
        """End the session for what the client sent."""
        if self.state is State.OPEN:
            logger.info("Session %s: %s", self.sid, error)
            if isinstance(error, LimitExceeded):
                self.over_limit(error.limit)
            self.stop_probe()
            self.transport.close()
            self._end("parse error")

    def message_began(self) -> None:
        """Be told that a message comes in fragments, or one with attachments."""
        self._engine.message_began(self)

    def message_ended(self) -> None:
        """Be told that it is complete."""
        self._engine.message_ended(self)

    def over_limit(self, limit: str) -> None:
        self._engine.over_limit(limit)

    # Back-pressure

    def pause(self) -> None:
        """Take nothing more from the client until `resume()`."""
        self.paused = True
        self.transport.pause()

    def resume(self) -> None:
        self.paused = False
        self.transport.resume()
        self._engine.resumed(self)

    # Upgrade ("Upgrade" in the protocol)

    def upgraded(self, transport: WebSocketTransport) -> None:
        """Move to the WebSocket for good, with what the client has not fetched yet."""
        polling = self.transport
        assert isinstance(polling, PollingTransport)
        frames = polling.drain()
        self.transport, self.probe = transport, None
        polling.abort()
        for frame in frames:
            transport.send(frame)
        if self.paused:
            transport.pause()

    def stop_probe(self) -> None:
        if self.probe is not None:
            probe, self.probe = self.probe, None
            probe.transport.abort()

    # Ending

    def close(
        self, reason: str = "forced close", *, code: int = NORMAL_CLOSURE, note: str = ""
    ) -> None:
        """
        End the session from this side, behind what was sent before.

        A WebSocket is closed with `code` and `note`, which polling has no place for.
        """
        self._close_with(partial(self.transport.close, code, note), reason)

    def refuse(self, limit: str, reason: str) -> None:
        """End the session because its client is over a limit, and tell it so where that is said."""
        if self.state is State.OPEN:
            self.over_limit(limit)
            self.close(reason, code=_POLICY_VIOLATION, note=reason)

    def _close_with(self, close: Callable[[], None], reason: str) -> None:
        if self.state is not State.OPEN:
            return
        self.stop_probe()
        polling = isinstance(self.transport, PollingTransport) and not self.transport.polled
        close()
        if polling:
            # The next GET fetches the rest. One that crossed the close on its way is no error.
            self.state = State.CLOSING
            self._engine.closing(self, reason)
        else:
            self._end(reason)

    def end(self, reason: str) -> None:
        """End the session at once, and drop what waits."""
        if self.state is not State.CLOSED:
            self.stop_probe()
            self.transport.abort()
            self._end(reason)

    def transport_lost(self, reason: str) -> None:
        """Be told by the transport that it is closed, or closes by itself."""
        if self.state is not State.CLOSED:
            self._end(reason)
        elif self.transport.closed:
            self._engine.transport_gone(self.transport)

    def too_slow(self, why: str) -> None:
        """Be told by the transport that the client does not take what waits for it."""
        if self.state is not State.CLOSED:
            logger.warning("Session %s: slow consumer: %s", self.sid, why)
            self.end("slow consumer")

    def _end(self, reason: str) -> None:
        if self.state is not State.CLOSED:
            was_open = self.state is State.OPEN
            self.state = State.CLOSED
            self._engine.ended(self, reason, announce=was_open)


class Probe:
    """
    A WebSocket that tries to take over from polling.

    It first answers `2probe` with `3probe`, then waits for `5`; whatever else comes or fails ends
    it alone, and the session goes on polling.
    """

    __slots__ = ("_engine", "_session", "answered", "transport")

    def __init__(self, session: Session, engine: Keeper) -> None:
        self._session = session
        self._engine = engine
        self.answered = False
        self.transport: WebSocketTransport

    def receive_text(self, text: str) -> None:
        session = self._session
        if text == engineio.PING + engineio.PROBE and not self.answered:
            self.answered = True
            self.transport.send(PONG_PROBE)
            if isinstance(session.transport, PollingTransport):
                session.transport.wake()  # the client pauses once its GET has ended
        elif text == engineio.UPGRADE and self.answered:
            self.transport.owner = session
            session.upgraded(self.transport)
            self._engine.upgraded(session)
        else:
            self.transport_lost("unexpected packet")

    def receive_binary(self, data: bytes) -> None:
        self.transport_lost("unexpected packet")

    def message_began(self) -> None:
        """Have no deadline for a message: that of the upgrade is earlier."""

    def message_ended(self) -> None:
        """See `message_began()`."""

    def over_limit(self, limit: str) -> None:
        self._engine.over_limit(limit)

    def transport_lost(self, reason: str) -> None:
        if self._session.probe is self:
            logger.info("Session %s: upgrade given up: %s", self._session.sid, reason)
            self._session.stop_probe()
        else:
            self.transport.abort()
            self._engine.transport_gone(self.transport)

    def too_slow(self, why: str) -> None:
        self.transport_lost(f"slow consumer: {why}")
