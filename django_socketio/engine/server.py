"""The engine: sessions, and every request that opens, feeds, polls or upgrades one."""

import logging
import socket
from _socket import socket as RawSocket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from socket import AF_INET, AF_INET6, IPPROTO_TCP, MSG_DONTWAIT, MSG_PEEK
from time import monotonic
from typing import Any

from gevent import get_hub, sleep
from gevent.event import Event

from ..protocol import engineio
from ..protocol.engineio import ErrorCode
from ..protocol.exceptions import LimitExceeded, ProtocolError
from . import deflate, websocket
from .admission import Admission, AdmissionLimits
from .deadlines import Deadlines
from .deflate import Compression, DeflatedTransport
from .frames import Frame
from .http import (
    HANDLED,
    OPENED,
    Handover,
    Headers,
    Refused,
    Request,
    Response,
    send_at_once,
    send_last,
)
from .outbox import Outbox
from .polling import PollingTransport
from .session import Probe, Session, State, new_sid
from .websocket import WebSocketTransport

logger = logging.getLogger(__name__)

_ORDINARY = frozenset(
    ("transport close", "transport error", "server shutting down", "slow consumer")
)
"""Ends that happen all the time, or have been told of: no line of theirs is for a console."""

_BATCH = 1000
"""Packets of a payload that are taken without giving the loop a turn."""

_LATE = 0.05
"""Seconds that the timer may run late in health."""

RATE_LIMIT = "rate limit"
"""Why a session ends whose client sends too fast."""

_GLANCE = 1.0
"""Seconds between two looks at a connection that has something to read, and not to be read yet."""

TRANSPORTS = ("polling", "websocket")
_READ = 1
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_ESTABLISHED = 1  # the state at the beginning of Linux's `struct tcp_info`


@dataclass(frozen=True, slots=True)
class Config:
    """Times in seconds, sizes in bytes. The ids of sessions begin with `node`."""

    ping_interval: float = 25.0
    ping_timeout: float = 20.0
    max_payload: int = 1_000_000
    max_buffer: int = 1_048_576
    max_packets: int = 10_000
    max_fragments: int = 1024
    message_timeout: float = 30.0
    upgrade_timeout: float = 10.0
    close_timeout: float = 5.0
    write_timeout: float = 10.0
    admission: AdmissionLimits = AdmissionLimits()
    node: str = ""
    compression: Compression | None = None


class Engine:
    """
    Serve Engine.IO v4 on the hub of the thread that constructs it.

    The application is three callables, which run on the hub, must not wait, and raise nothing but
    `ProtocolError` from `on_message`::

        on_open(session, payload)       the handshake has been answered
        on_message(session, data)       str, or bytes for a binary message
        on_close(session, reason)       exactly once for each that was opened

    `allow` decides about every request by its WSGI environ: it returns the headers that let the
    browser read the answer, or raises `Refused`. `recognise` tells whether one for a session comes
    from whom its handshake came from. `user_of(payload)` says who opens a session, for limits per
    user; None for nobody. It may wait.
    """

    def __init__(
        self,
        config: Config,
        *,
        on_open: Callable[[Session, Any], None],
        on_message: Callable[[Session, str | bytes], None],
        on_close: Callable[[Session, str], None],
        allow: Callable[[dict[str, Any]], Headers] = lambda environ: [],
        recognise: Callable[[Session, dict[str, Any]], bool] = lambda session, environ: True,
        user_of: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.config = config
        self._on_open = on_open
        self.on_message = on_message
        self._on_close = on_close
        self._allow = allow
        self._recognise = recognise
        self._user_of = user_of
        self._loop = get_hub().loop
        self.outbox = Outbox(self._loop)
        self._held_back: dict[Session, Event] = {}
        self.accepting = True
        self.sessions: dict[str, Session] = {}
        self.counters: Counter[str] = Counter()
        self.deadlines = Deadlines(self._loop, monotonic)
        lane = self.deadlines.lane
        self._pings = lane(config.ping_interval, self._ping_due)
        self._pongs = lane(config.ping_timeout, self._pong_missed)
        self._upgrades = lane(config.upgrade_timeout, self._upgrade_missed)
        self._messages = lane(config.message_timeout, self._message_missed)
        self._closing_sessions = lane(config.ping_timeout, self._last_poll_missed)
        self._closing_transports = lane(config.close_timeout, self._close_missed)
        self._stalled = lane(config.write_timeout, self._took_nothing)
        inside = self.sessions, self._closing_transports
        self._admission = Admission(config.admission, inside, monotonic)
        self._lanes = (
            self._pings,
            self._pongs,
            self._upgrades,
            self._messages,
            self._closing_sessions,
        )

    # Requests

    def handle(self, environ: dict[str, Any], payload: Any = None) -> Response:
        """
        Answer any request to the engine's path; a GET that polls waits here.

        `payload` goes to `on_open` if the request is a handshake.
        """
        self.deadlines.run()  # whoever is late finds the session gone, not about to go
        environ[HANDLED] = True
        headers: Headers = []
        try:
            headers = self._allow(environ)
            response = self._respond(Request.from_environ(environ), payload)
        except Refused as refused:
            response = self._refusal(environ, refused)
        response.headers += headers
        return response

    def turn_away(self, environ: dict[str, Any]) -> Response | None:
        """Answer a handshake that is sure to be refused, before anybody has spent much on it."""
        try:
            self._admission.check()
        except Refused as refused:
            environ[HANDLED] = True
            return self.refuse(environ, refused)
        return None

    def refuse(self, environ: dict[str, Any], refused: Refused) -> Response:
        """Answer any request with a refusal that was decided elsewhere."""
        headers: Headers = []
        try:
            headers = self._allow(environ)
        except Refused as worse:
            refused = worse
        response = self._refusal(environ, refused)
        response.headers += headers
        return response

    def _refusal(self, environ: dict[str, Any], refused: Refused) -> Response:
        """Count and log a refusal, and return its answer."""
        self.counters[f"refused: {refused.code.name.lower()}"] += 1
        if refused.limit:
            self.over_limit(refused.limit)
        logger.info(
            "Refused %s from %s: %s%s",
            environ.get("REQUEST_METHOD"),
            environ.get("REMOTE_ADDR"),
            engineio.ERROR_MESSAGES[refused.code],
            f" ({refused.hint})" if refused.hint else "",
        )
        return Response.refusal(refused)

    def _respond(self, request: Request, payload: Any) -> Response:
        if request.method == "OPTIONS":
            return Response(HTTPStatus.NO_CONTENT)
        query = request.query
        transport = query.get("transport", "")
        if transport not in TRANSPORTS:
            raise Refused(ErrorCode.UNKNOWN_TRANSPORT)
        sid = query.get("sid")
        if sid is None and request.method != "GET":
            raise Refused(ErrorCode.BAD_HANDSHAKE_METHOD)
        if query.get("EIO") != engineio.VERSION:
            raise Refused(ErrorCode.UNSUPPORTED_PROTOCOL_VERSION, "this server speaks EIO=4")
        if sid is None:
            return self._handshake(request, transport, payload)
        session = self.sessions.get(sid)
        if session is None:
            raise Refused(
                ErrorCode.UNKNOWN_SID,
                "the session has ended, or belongs to another process of this server",
            )
        if not self._recognise(session, request.environ):
            self.counters["refused: another login"] += 1
            hint = "the session was opened with another login"
            raise Refused(ErrorCode.FORBIDDEN, hint, HTTPStatus.FORBIDDEN)
        if session.probe is not None:
            # What the client sent there first may be read last: the loop keeps no order between
            # connections that became readable together.
            session.probe.transport.read()
        if transport == "websocket":
            return self._upgrade(request, session)
        if not isinstance(session.transport, PollingTransport):
            raise Refused(ErrorCode.BAD_REQUEST, "the session has been upgraded to websocket")
        if request.method == "GET":
            return self._poll(request, session, session.transport)
        if request.method == "POST":
            return self._post(request, session, session.transport)
        raise Refused(ErrorCode.BAD_REQUEST, "polling is GET and POST")

    # Handshake

    def _handshake(self, request: Request, transport: str, payload: Any) -> Response:
        if not self.accepting:
            raise Refused(
                ErrorCode.FORBIDDEN, "the server is stopping", HTTPStatus.SERVICE_UNAVAILABLE
            )
        user = self._user_of(payload) if self._user_of is not None else None
        address = request.environ.get("REMOTE_ADDR", "")
        self._admission.admit(address, user)
        if transport == "websocket":

            def take(sock: Any, greeting: bytes, data: bytes) -> None:
                try:
                    self._admission.check_place(address, user)  # others have come meanwhile
                except Refused as refused:
                    send_last(sock, self._refusal(request.environ, refused))
                    return
                session = Session(self.config.node + new_sid(), self)
                session.transport = self._websocket(sock, session, request)
                session.transport.greet(greeting)
                session.transport.send(Frame(self._open_packet(session, upgrades=())))
                self._admission.entered(session, address, user)
                self._open(session, payload)
                session.transport.start(data)

            return self._switch_protocols(request, take)
        session = Session(self.config.node + new_sid(), self)
        session.transport = PollingTransport(self.config.max_buffer, session.too_slow)
        self._admission.entered(session, address, user)
        self._open(session, payload)
        request.environ[OPENED] = session.sid
        return Response.text(self._open_packet(session, upgrades=("websocket",)))

    def _open(self, session: Session, payload: Any) -> None:
        self.sessions[session.sid] = session
        self.counters["opened"] += 1
        self._pings.add(session)
        self._on_open(session, payload)

    def _open_packet(self, session: Session, upgrades: tuple[str, ...]) -> bytes:
        config = self.config
        return engineio.open_packet(
            session.sid,
            upgrades=upgrades,
            ping_interval=config.ping_interval,
            ping_timeout=config.ping_timeout,
            max_payload=config.max_payload,
        )

    def _switch_protocols(self, request: Request, take: Handover) -> Response:
        headers = websocket.handshake(request)
        if headers is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no WebSocket handshake")
        if self._compression(request) is not None:
            headers.append(("Sec-WebSocket-Extensions", deflate.ANSWER))
        request.front.handover(take)
        return Response(HTTPStatus.SWITCHING_PROTOCOLS, headers=headers)

    def _compression(self, request: Request) -> Compression | None:
        """Return what to compress with, if that is wanted here and offered by the client."""
        if self.config.compression is None:
            return None
        try:
            offered = deflate.accepts(request.environ.get("HTTP_SEC_WEBSOCKET_EXTENSIONS", ""))
        except deflate.InvalidOffer:
            raise Refused(ErrorCode.BAD_REQUEST, "no valid Sec-WebSocket-Extensions") from None
        return self.config.compression if offered else None

    def _websocket(self, sock: Any, owner: websocket.Owner, request: Request) -> WebSocketTransport:
        send_at_once(sock)
        make: Callable[..., WebSocketTransport] = WebSocketTransport
        compression = self._compression(request)
        if compression is not None:
            make = partial(DeflatedTransport, compression=compression)
        return make(
            sock,
            owner,
            self._loop,
            self.outbox,
            self._stalled,
            max_payload=self.config.max_payload,
            max_fragments=self.config.max_fragments,
            max_buffer=self.config.max_buffer,
        )

    # Polling

    def _poll(self, request: Request, session: Session, transport: PollingTransport) -> Response:
        if transport.polled:
            # "HTTP long-polling": one GET at a time, else the session is closed.
            session.fail("two polls at once")
            raise Refused(ErrorCode.BAD_REQUEST, "two polls at once")
        if session.probe is not None and session.probe.answered:
            return self._answer(session, transport)
        fd = request.front.fileno()
        if fd < 0:  # the client is another host's, which tells of its going away
            transport.wait()
        else:
            vigil = _Vigil(self._loop, fd, session)
            try:
                transport.wait()
            finally:
                vigil.close()
        response = self._answer(session, transport)
        if session.state is State.CLOSING:
            session.end("forced close")
        return response

    def _answer(self, session: Session, transport: PollingTransport) -> Response:
        """Answer a GET. A session of which a part is lost cannot go on."""

        def sent(whole: bool) -> None:
            if session.transport is transport:
                if whole:
                    transport.answered()
                else:
                    session.end("transport close")

        response = Response.text(transport.take())
        response.sent = sent
        return response

    def _post(self, request: Request, session: Session, transport: PollingTransport) -> Response:
        if transport.posting:
            session.fail("two posts at once")
            raise Refused(ErrorCode.BAD_REQUEST, "two posts at once")
        transport.posting = True
        try:
            for number, packet in enumerate(self._read_payload(request)):
                session.receive(packet)
                if number % _BATCH == _BATCH - 1:
                    sleep(1e-6)  # a turn of the loop
                if session.paused:
                    self._hold_back(session)
        except Refused as refused:
            session.fail(refused.hint)
            raise
        except ProtocolError as error:
            session.fail(error)
            hint = str(error) if isinstance(error, LimitExceeded) else ""
            raise Refused(ErrorCode.BAD_REQUEST, hint) from None
        finally:
            transport.posting = False
        if session.reason == "parse error":
            raise Refused(ErrorCode.BAD_REQUEST)
        if session.reason == RATE_LIMIT:
            raise Refused(ErrorCode.BAD_REQUEST, RATE_LIMIT, HTTPStatus.TOO_MANY_REQUESTS)
        return Response.text(b"ok")

    def _read_payload(self, request: Request) -> list[engineio.Packet]:
        if request.environ.get("CONTENT_TYPE", "").startswith("application/octet-stream"):
            raise ProtocolError("a binary payload, which v4 does not have")
        if request.environ.get("HTTP_CONTENT_ENCODING", "identity") != "identity":
            # No client does that, and what it comes to could be any size.
            status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
            raise Refused(ErrorCode.BAD_REQUEST, "the body is compressed", status)
        body = request.read_body(self.config.max_payload)
        return engineio.decode_payload(body, max_packets=self.config.max_packets)

    def _hold_back(self, session: Session) -> None:
        """Take nothing more of a POST, and answer it later, while the application is behind."""
        if session.paused and session.state is State.OPEN:
            event = self._held_back[session] = Event()
            event.wait()

    def resumed(self, session: Session) -> None:
        event = self._held_back.pop(session, None)
        if event is not None:
            event.set()
        if session.state is State.OPEN and session.awaits_pong:
            self._pongs.add(session)  # it had no chance to answer before now

    def hung_up(self, sid: str) -> None:
        """Be told that the client of a polling session has not got its answer."""
        session = self.sessions.get(sid)
        if session is not None and isinstance(session.transport, PollingTransport):
            session.end("transport close")

    def let_go(self, sid: str) -> None:
        """Have the GET that a polling session has waiting answered, with whatever there is."""
        session = self.sessions.get(sid)
        if session is not None and isinstance(session.transport, PollingTransport):
            session.transport.wake()

    # Upgrade

    def _upgrade(self, request: Request, session: Session) -> Response:
        def take(sock: Any, greeting: bytes, data: bytes) -> None:
            probe = Probe(session, self)
            probe.transport = self._websocket(sock, probe, request)
            probe.transport.greet(greeting)
            if (
                session.state is State.OPEN
                and isinstance(session.transport, PollingTransport)
                and session.probe is None
            ):
                session.probe = probe
                self._upgrades.add(session)
                probe.transport.start(data)
            else:
                # "A client MUST NOT open more than one WebSocket connection per session."
                probe.transport.start(b"")
                probe.transport.close(1008, "one WebSocket per session")
                self._closing_transports.add(probe.transport)

        return self._switch_protocols(request, take)

    def upgraded(self, session: Session) -> None:
        self._upgrades.discard(session)
        self.counters["upgraded"] += 1

    def _upgrade_missed(self, session: Session, due: float) -> None:
        if session.probe is not None:
            self.over_limit("UPGRADE_TIMEOUT")
            session.probe.transport_lost("timeout")

    # Limits

    def over_limit(self, limit: str) -> None:
        """Count a client that went over a limit, by the name of the setting."""
        self.counters[f"over limit: {limit}"] += 1

    def message_began(self, session: Session) -> None:
        self._messages.add(session)

    def message_ended(self, session: Session) -> None:
        self._messages.discard(session)

    def _message_missed(self, session: Session, due: float) -> None:
        if session.paused:
            self._messages.add(session)  # we do not read, so it cannot have completed it
        else:
            session.refuse("MESSAGE_TIMEOUT", "message timeout")

    # Heartbeat

    def _ping_due(self, session: Session, due: float) -> None:
        session.ping()
        if session.state is State.OPEN:
            # From when it was due, so that nothing drifts; but a ping that a stall of ours has
            # held back is not the client's fault.
            now = self.deadlines.now()
            self._pongs.add(session, since=due if now - due < _LATE else now)

    def pong_received(self, session: Session) -> None:
        self._pongs.discard(session)
        self._pings.add(session)

    def _pong_missed(self, session: Session, due: float) -> None:
        if session.paused:
            self._pongs.add(session)  # we do not read, so it cannot have answered
        else:
            session.end("ping timeout")

    # Ending

    def closing(self, session: Session, reason: str) -> None:
        """Be told that a polling session is only kept for its last GET."""
        self._forget(session, reason)
        self.sessions[session.sid] = session
        self._closing_sessions.add(session)
        self._on_close(session, reason)

    def ended(self, session: Session, reason: str, *, announce: bool) -> None:
        """Be told that a session is over; `announce` it unless `closing()` has."""
        self._forget(session, reason)
        transport = session.transport
        if isinstance(transport, WebSocketTransport) and not transport.closed:
            self._closing_transports.add(transport)
        if announce:
            self._on_close(session, reason)

    def _forget(self, session: Session, reason: str) -> None:
        if session.reason is None:
            session.reason = reason
            self.counters[f"closed: {reason}"] += 1
            level = logging.DEBUG if reason in _ORDINARY else logging.INFO
            logger.log(level, "Session %s closed: %s", session.sid, reason)
        self.sessions.pop(session.sid, None)
        for lane in self._lanes:
            lane.discard(session)
        self._admission.left(session)
        self.resumed(session)

    def transport_gone(self, transport: WebSocketTransport | PollingTransport) -> None:
        """Be told that the transport of a session that is over is closed, too."""
        self._closing_transports.discard(transport)

    def _last_poll_missed(self, session: Session, due: float) -> None:
        session.end("forced close")

    def _close_missed(self, transport: WebSocketTransport, due: float) -> None:
        transport.abort()

    def _took_nothing(self, transport: WebSocketTransport, due: float) -> None:
        transport.took_nothing()

    def stop_accepting(self) -> None:
        """Refuse handshakes from now on."""
        self.accepting = False

    def close_all(self, reason: str) -> None:
        for session in list(self.sessions.values()):
            session.close(reason)

    def unfetched(self) -> int:
        """Count the clients that have ended here and not got all that was sent to them before."""
        polling: int = sum(session.state is State.CLOSING for session in self.sessions.values())
        websockets: int = sum(each.waiting > 0 for each in self._closing_transports)
        return polling + websockets

    def unanswered(self) -> int:
        """Count the WebSockets whose client has not answered our close yet."""
        return sum(not transport.closed for transport in self._closing_transports)

    def stop(self) -> None:
        """Drop whatever is left, at once."""
        for session in list(self.sessions.values()):
            session.end("server shutting down")
        for transport in list(self._closing_transports):
            transport.abort()
        self.deadlines.stop()


class _Vigil:
    """Ends a session whose client hangs up on the GET that waits."""

    __slots__ = ("_fd", "_loop", "_session", "_watcher")

    def __init__(self, loop: Any, fd: int, session: Session) -> None:
        self._loop, self._fd, self._session = loop, fd, session
        self._watcher = loop.io(fd, _READ)
        self._watcher.start(self._readable)

    def _readable(self) -> None:
        gone = is_gone(self._fd)
        if gone:
            self._session.end("transport close")
        if gone is not None:
            self.close()
        if gone is False:
            # A pipelined request waits, or TLS's good-bye: an end behind it is not to be seen so.
            self._watcher = self._loop.timer(_GLANCE, _GLANCE)
            self._watcher.start(self._glance)

    def _glance(self) -> None:
        if is_gone(self._fd):
            self.close()
            self._session.end("transport close")

    def close(self) -> None:
        self._watcher.close()


def is_gone(fd: int) -> bool | None:
    """Tell whether the peer of a connection has hung up; None if there is nothing to tell by."""
    try:
        sock = RawSocket(fileno=fd)
        try:
            return not sock.recv(1, MSG_PEEK | MSG_DONTWAIT) or _is_ended(sock)
        finally:
            sock.detach()  # the descriptor is the front's
    except BlockingIOError:
        return None
    except OSError:
        return True


def _is_ended(sock: RawSocket) -> bool:
    """Tell whether nothing comes behind what is still to be read, where the system says so."""
    if _TCP_INFO is None or sock.family not in (AF_INET, AF_INET6):
        return False
    return sock.getsockopt(IPPROTO_TCP, _TCP_INFO, 1)[0] != _ESTABLISHED
