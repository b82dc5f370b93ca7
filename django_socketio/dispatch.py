"""
From packets to handlers.

The engine's callbacks run in the thread of the loop, must not wait, and only sort: what needs a
handler goes to the inbox of its connection, and a runner takes it from there, one at a time and in
order. Answers to `call()` do not queue, since the handler that waits for them is what the queue
waits for.
"""

import logging
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from gevent import Timeout
from gevent.event import Event

from . import events
from .engine import Config, Engine, Frame, Headers, Session, new_sid
from .events import MESSAGE, SUBSCRIBE, UNSUBSCRIBE, Handler, Registry
from .exceptions import BackendError, ConnectionRefused
from .hub import Hub
from .protocol import socketio
from .protocol.exceptions import ProtocolError
from .protocol.socketio import Assembly, Packet
from .runners import Runners
from .sockets import Socket, arguments, check_channel, value

logger = logging.getLogger(__name__)

_FULL, _LOW = 128, 32
"""Waiting events of one connection at which its reading stops, and goes on."""

_FULL_IN_CALL = 1024
"""The same while a handler waits in `call()` for an answer that has to be read."""

_MAX_ATTACHMENTS = 10
_OUR_DOING = ("server namespace disconnect", "slow consumer")
"""Why a socket may have ended while its client still waits for an answer."""

_FAILURES = (Exception, Timeout, CancelledError, SystemExit)
"""What a handler may raise without harm to anybody: all but the end of its own greenlet."""

_FAILED = object()
"""The outcome of handlers of which one raised and none returned anything."""
_NOTHING = object()
"""The outcome where no handler heard."""

MessageLog = Callable[[HttpRequest, str, Any], None]


class Connection:
    """One client: its request, context and sockets, and what waits for a handler."""

    __slots__ = (
        "_calls",
        "_dispatcher",
        "_inbox",
        "_pending",
        "_scheduled",
        "context",
        "request",
        "session",
        "sockets",
    )

    def __init__(self, session: Session, request: HttpRequest, dispatcher: "Dispatcher") -> None:
        self.session = session
        self.request = request
        self.context: dict[Any, Any] = {}
        # None stands for a namespace that was left: what is still under way to it is dropped.
        self.sockets: dict[str, Socket | None] = {}
        self._dispatcher = dispatcher
        self._pending: Assembly | None = None
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
        self._scheduled = False
        self._calls = 0

    # On the hub

    def receive(self, data: str | bytes) -> None:
        """Take one message; raise `ProtocolError` if it is none."""
        if isinstance(data, bytes):
            if self._pending is None:
                raise ProtocolError("a binary message that no packet announced")
            packet = self._pending.add(data)
            if packet is None:
                return
            self._pending = None
        else:
            if self._pending is not None:
                raise ProtocolError("a text message in the place of an attachment")
            decoded = socketio.decode(data, max_attachments=_MAX_ATTACHMENTS)
            if isinstance(decoded, Assembly):
                if decoded.namespace not in self.sockets:
                    raise ProtocolError("attachments before anything is connected")
                self._pending = decoded
                return
            packet = decoded
        self._packet_received(packet)

    def _packet_received(self, packet: Packet) -> None:
        type_, namespace, data, id_ = packet
        if type_ is socketio.CONNECT:
            self._connect_received(namespace, data or {})
            return
        try:
            socket = self.sockets[namespace]
        except KeyError:
            raise ProtocolError(f"a packet for {namespace!r}, which is not connected") from None
        if socket is None:
            return
        if type_ is socketio.EVENT:
            self.enqueue(self._dispatcher.event, self, socket, data, id_)
        elif type_ is socketio.ACK:
            socket.ack_received(id_ or 0, data)
        elif type_ is socketio.DISCONNECT:
            socket.end("client namespace disconnect")
        else:
            raise ProtocolError("a connect error from a client")

    def _connect_received(self, namespace: str, auth: dict[str, Any]) -> None:
        if self.sockets.get(namespace) is not None:
            raise ProtocolError(f"{namespace!r} is connected already")
        if not self._dispatcher.registry.has_namespace(namespace):
            self._dispatcher.refuse_namespace(self, namespace)
            return
        socket = Socket(new_sid(), namespace, auth, self, self._dispatcher.hub)
        self.sockets[namespace] = socket
        self._dispatcher.connecting(self)
        self.enqueue(self._dispatcher.connect, self, socket)

    def socket_ended(self, socket: Socket) -> None:
        self.sockets[socket.namespace] = None
        self._dispatcher.socket_ended(self)
        self.enqueue(self._dispatcher.farewell, self, socket)

    def end(self, reason: str) -> None:
        """Be told that the client is gone."""
        self._pending = None
        for socket in list(self.sockets.values()):
            if socket is not None:
                socket.end(reason)
        self.enqueue(self._dispatcher.finished, self)

    def enqueue(self, function: Callable[..., None], *args: Any) -> None:
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append((function, args))
        if not self._scheduled:
            self._scheduled = True
            self._dispatcher.runners.schedule(self)
        elif len(self._inbox) >= _FULL and not self.session.paused:
            if not self._calls or len(self._inbox) >= _FULL_IN_CALL:
                self.session.pause()

    # In a runner

    def call_began(self) -> None:
        """Read on, however much waits: the answer to the call is behind it."""
        self._calls += 1
        if self.session.paused:
            self.session.resume()

    def call_ended(self) -> None:
        self._calls -= 1

    def step(self) -> bool:
        """Do what has waited longest; return whether more waits."""
        inbox = self._inbox
        if inbox:
            function, args = inbox.popleft()
            function(*args)
            if self.session.paused and len(inbox) <= _LOW:
                self.session.resume()
        if inbox:
            return True
        self._inbox = None
        self._scheduled = False
        return False


class Dispatcher:
    """
    The application side of the engine: connections, and the handlers that they call.

    `allow` is the engine's; `log` hears of every message that clients send.
    """

    def __init__(
        self,
        hub: Hub,
        config: Config,
        *,
        connect_timeout: float,
        allow: Callable[[dict[str, Any]], Headers],
        log: MessageLog | None,
        runners: Runners,
        registry: Registry = events.registry,
    ) -> None:
        self.hub = hub
        self.runners = runners
        self.engine = Engine(
            config,
            on_open=self._opened,
            on_message=self._received,
            on_close=self._closed,
            allow=allow,
        )
        self.connections: set[Connection] = set()
        self.registry = registry
        self._log = log
        self._unconnected = self.engine.deadlines.lane(connect_timeout, self._connect_missed)
        self._empty = Event()
        self._empty.set()

    # On the hub

    def _opened(self, session: Session, request: HttpRequest) -> None:
        connection = session.data = Connection(session, request, self)
        self.connections.add(connection)
        self._empty.clear()
        self._unconnected.add(connection)

    @staticmethod
    def _received(session: Session, data: str | bytes) -> None:
        session.data.receive(data)

    def _closed(self, session: Session, reason: str) -> None:
        self._unconnected.discard(session.data)
        session.data.end(reason)

    def connecting(self, connection: Connection) -> None:
        self._unconnected.discard(connection)

    def socket_ended(self, connection: Connection) -> None:
        """Give a client without any namespace the time that a new one has to connect to one."""
        if connection.session.reason is None and not any(connection.sockets.values()):
            self._unconnected.add(connection)

    def _connect_missed(self, connection: Connection, due: float) -> None:
        connection.session.close("connect timeout")

    def refuse_namespace(self, connection: Connection, namespace: str) -> None:
        packet = Packet(socketio.CONNECT_ERROR, namespace, {"message": "Invalid namespace"})
        text, _ = socketio.encode(packet)
        connection.session.send(Frame.message(text))

    # In a runner

    def connect(self, connection: Connection, socket: Socket) -> None:
        if socket.ended:
            return
        refusal = self._decide(connection, socket)
        if refusal is None and socket.disconnect_reason not in _OUR_DOING:
            socket.greeted = True
            try:
                socket.accept()
                return
            except BackendError as error:
                # Not refused, which a client takes for final: it connects again by itself.
                logger.error("%s could not be let in, the backend is down: %s", socket, error)
                connection.session.close("backend down")
                return
        self._refuse(socket, refusal or ConnectionRefused())

    def _decide(self, connection: Connection, socket: Socket) -> ConnectionRefused | None:
        """Ask the `on_connect` handlers; return the first refusal."""
        for handler in self.registry.get("on_connect", socket.namespace):
            try:
                if self._run(handler, connection, socket) is False:
                    return ConnectionRefused()
            except ConnectionRefused as error:
                return error
            except PermissionDenied as error:
                return ConnectionRefused(str(error)) if str(error) else ConnectionRefused()
            except _FAILURES as error:
                # A handler that could not decide has not let the client in.
                self._failed(connection, socket, handler, error)
                return ConnectionRefused()
        return None

    def _refuse(self, socket: Socket, refusal: ConnectionRefused) -> None:
        logger.info("Refused a socket in %s: %s", socket.namespace, refusal.message)
        try:
            socket.refuse(refusal.message, refusal.data)
        except TypeError:
            logger.exception("The data of a refusal cannot be serialised")
            socket.refuse(refusal.message)

    def event(
        self, connection: Connection, socket: Socket, data: list[Any], id_: int | None
    ) -> None:
        if not socket.greeted:
            return
        name = data[0]
        if name == SUBSCRIBE or name == UNSUBSCRIBE:
            self._membership(connection, socket, data, id_)
            return
        args = data[1:]
        handlers = self.registry.get(f"event:{name}", socket.namespace)
        if self._log is not None:
            self._log(connection.request, name, value(args))
        result = self._call(handlers, connection, socket, args)
        if name == MESSAGE:
            listeners = self.registry.get("on_message", socket.namespace)
            result = self._call(listeners, connection, socket, (value(args),), result)
        if id_ is not None and result is not _NOTHING and result is not _FAILED:
            self._acknowledge(connection, socket, id_, result)

    def _acknowledge(self, connection: Connection, socket: Socket, id_: int, result: Any) -> None:
        try:
            socket.acknowledge(id_, () if result is None else arguments(result))
        except TypeError as error:
            self._failed(connection, socket, None, error)

    def _membership(
        self, connection: Connection, socket: Socket, data: list[Any], id_: int | None
    ) -> None:
        if socket.ended:
            return  # it is in no channel any more, and farewell() says so
        subscribe, retry = data[0] == SUBSCRIBE, {}
        try:
            channel = check_channel(data[1] if len(data) == 2 else None)
            if self._log is not None:
                self._log(connection.request, data[0].strip("_"), channel)
            if subscribe:
                self._subscribe(connection, socket, channel)
            else:
                self._unsubscribe(connection, socket, channel)
        except ValueError as error:
            reason = str(error)
        except PermissionDenied as error:
            reason = str(error) or "Permission denied"
            logger.info("Refused %s the channel %r: %s", socket.sid, channel, reason)
        except BackendError as error:
            logger.error("%s could not subscribe, the backend is down: %s", socket.sid, error)
            reason, retry = "The server cannot reach its backend", {"retry": True}
        else:
            reason = ""
        if id_ is not None:
            answer = {"ok": False, "error": reason, **retry} if reason else {"ok": True}
            socket.acknowledge(id_, (answer,))

    def _subscribe(self, connection: Connection, socket: Socket, channel: str) -> None:
        if channel in socket.channels:
            return
        for handler in self.registry.get("on_subscribe", socket.namespace):
            if not handler.hears((channel,)):
                continue
            try:
                if self._run(handler, connection, socket, channel) is False:
                    raise PermissionDenied
            except PermissionDenied:
                raise
            except _FAILURES as error:
                self._failed(connection, socket, handler, error)
                raise PermissionDenied("The server could not decide") from None
        if not socket.subscribe(channel) and socket.ended:
            socket.remember(channel)  # those who were told of it hear of its end

    def _unsubscribe(self, connection: Connection, socket: Socket, channel: str) -> None:
        if channel in socket.channels:
            socket.unsubscribe(channel)
            self._call_for_channel("on_unsubscribe", connection, socket, channel)

    def farewell(self, connection: Connection, socket: Socket) -> None:
        """Tell the handlers that a socket has ended, if they had let it in."""
        if not socket.greeted:
            return
        namespace = socket.namespace
        self._call(self.registry.get("on_disconnect", namespace), connection, socket, ())
        for channel in socket.channels:
            self._call_for_channel("on_unsubscribe", connection, socket, channel)
        self._call(self.registry.get("on_finish", namespace), connection, socket, ())

    def finished(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def wait_empty(self, timeout: float) -> bool:
        """Wait until the last handler of the last connection has run."""
        return self._empty.wait(timeout)

    # Handlers

    def _run(self, handler: Handler, connection: Connection, socket: Socket, *args: Any) -> Any:
        # A context of its own: nothing that one call sets leaks into the next.
        return Context().run(
            handler.function, connection.request, socket, connection.context, *args
        )

    def _call(
        self,
        handlers: list[Handler],
        connection: Connection,
        socket: Socket,
        args: Any,
        result: Any = _NOTHING,
    ) -> Any:
        """
        Call the handlers that hear this socket; return the first result that is not None.

        `result` is that of those who were called before.
        """
        request, context = connection.request, connection.context
        for handler in handlers:
            if handler.pattern is not None and not handler.hears(socket.channels):
                continue
            try:  # as _run() does, for every event that there is
                returned = Context().run(handler.function, request, socket, context, *args)
            except _FAILURES as error:
                self._failed(connection, socket, handler, error)
                returned = _FAILED
            if result is _NOTHING or result is None or (result is _FAILED and returned is not None):
                result = returned
        return result

    def _call_for_channel(
        self, event: str, connection: Connection, socket: Socket, channel: str
    ) -> None:
        handlers = self.registry.get(event, socket.namespace)
        heard = [
            handler._replace(pattern=None) for handler in handlers if handler.hears((channel,))
        ]
        self._call(heard, connection, socket, (channel,))

    def _failed(
        self, connection: Connection, socket: Socket, handler: Handler | None, error: BaseException
    ) -> None:
        name = getattr(handler and handler.function, "__qualname__", "the ack of a handler")
        logger.error("%s failed for %s", name, socket.sid, exc_info=error)
        for listener in self.registry.get("on_error", socket.namespace):
            if not listener.hears(socket.channels):
                continue
            try:
                self._run(listener, connection, socket, error)
            except _FAILURES:
                logger.exception("An on_error handler failed for %s", socket.sid)
