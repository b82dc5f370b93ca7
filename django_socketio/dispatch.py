"""
From packets to handlers.

The engine's callbacks run in the thread of the loop, must not wait, and only sort: what needs a
handler goes to the inbox of its connection, and a runner takes it from there, one at a time and in
order. Answers to `call()` do not queue, since the handler that waits for them is what the queue
waits for.
"""

import logging
from asyncio import CancelledError
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from types import FrameType
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import Error as DatabaseError
from django.http import HttpRequest
from gevent import Timeout
from gevent.event import Event

from . import events
from .engine import RATE_LIMIT, Config, Engine, Frame, Headers, Session, new_sid
from .events import MESSAGE, SUBSCRIBE, UNSUBSCRIBE, Handler, Registry
from .exceptions import BackendError, ConnectionRefused
from .hub import Hub
from .identities import Identities, Identity, is_same_visitor
from .limits import DEFAULTS, EventRates, Limits
from .protocol import socketio
from .protocol.exceptions import ProtocolError
from .protocol.socketio import Assembly, Packet
from .runners import Runners, note_database
from .sockets import Socket, arguments, check_channel, value
from .threads import Threads

logger = logging.getLogger(__name__)

_FULL, _LOW = 128, 32
"""Waiting events of one connection at which its reading stops, and goes on."""

_FULL_IN_CALL = 1024
"""The same while a handler waits in `call()` for an answer that has to be read."""

_SMALL = 1024
"""Characters of a packet that counts as one event, whatever is in it; of a larger one the size
counts as well."""

_IN_CALL = _FULL_IN_CALL // _FULL
"""How much more of that may wait during a `call()`."""

_OUR_DOING = ("server namespace disconnect", "slow consumer")
"""Why a socket may have ended while its client still waits for an answer."""

_COUNTED = frozenset("025")
"""How packets begin that count as events: CONNECT, EVENT and BINARY_EVENT."""

_MAX_SHOWN = 60
"""Characters of an event's name in a log."""

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
        "_large",
        "_pending",
        "_scheduled",
        "context",
        "identity",
        "request",
        "session",
        "sockets",
    )

    def __init__(self, session: Session, request: HttpRequest, dispatcher: "Dispatcher") -> None:
        self.session = session
        self.request = request
        self.identity: Identity | None = None
        self.context: dict[Any, Any] = {}
        # None stands for a namespace that was left: what is still under way to it is dropped.
        self.sockets: dict[str, Socket | None] = {}
        self._dispatcher = dispatcher
        self._pending: Assembly | None = None
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
        self._scheduled = False
        self._calls = 0
        self._large = 0  # size of the large packets that wait

    @property
    def max_channels(self) -> int:
        return self._dispatcher.limits.channels

    # On the hub

    def receive(self, data: str | bytes) -> None:
        """Take one message; raise `ProtocolError` if it is none."""
        if isinstance(data, bytes):
            if self._pending is None:
                raise ProtocolError("a binary message that no packet announced")
            packet = self._pending.add(data)
            if packet is None:
                return
            size = self._pending.size
            self._pending = None
            self._dispatcher.attachments.discard(self)
        else:
            if self._pending is not None:
                raise ProtocolError("a text message in the place of an attachment")
            decoded = socketio.decode(data, self._dispatcher.packet_limits)
            if isinstance(decoded, Assembly):
                if decoded.namespace not in self.sockets:
                    raise ProtocolError("attachments before anything is connected")
                self._pending = decoded
                self._dispatcher.attachments.add(self)
                return
            packet = decoded
            size = len(data)
        self._packet_received(packet, size)

    def _packet_received(self, packet: Packet, size: int) -> None:
        type_, namespace, data, id_ = packet
        if type_ is socketio.CONNECT:
            self._connect_received(namespace, data or {}, size)
            return
        try:
            socket = self.sockets[namespace]
        except KeyError:
            raise ProtocolError(f"a packet for {namespace!r}, which is not connected") from None
        if socket is None:
            return
        if type_ is socketio.EVENT:
            if size <= _SMALL:
                self.enqueue(self._dispatcher.event, self, socket, data, id_)
            else:
                self._enqueue_large(size, self._dispatcher.event, self, socket, data, id_)
        elif type_ is socketio.ACK:
            socket.ack_received(id_ or 0, data)
        elif type_ is socketio.DISCONNECT:
            socket.end("client namespace disconnect")
        else:
            raise ProtocolError("a connect error from a client")

    def _connect_received(self, namespace: str, auth: dict[str, Any], size: int) -> None:
        if self.sockets.get(namespace) is not None:
            raise ProtocolError(f"{namespace!r} is connected already")
        if not self._dispatcher.registry.has_namespace(namespace):
            self._dispatcher.refuse_namespace(self, namespace, "Invalid namespace")
            return
        if len(self.sockets) >= self._dispatcher.limits.namespaces and self._is_full():
            self.session.over_limit("MAX_NAMESPACES")
            self._dispatcher.refuse_namespace(self, namespace, "Too many namespaces")
            return
        socket = Socket(new_sid(), namespace, auth, self, self._dispatcher.hub)
        self.sockets[namespace] = socket
        self._dispatcher.connecting(self)
        if size <= _SMALL:
            self.enqueue(self._dispatcher.connect, self, socket)
        else:
            self._enqueue_large(size, self._dispatcher.connect, self, socket)

    def _is_full(self) -> bool:
        """Tell whether there is no room for a further namespace."""
        connected = sum(socket is not None for socket in self.sockets.values())
        return connected >= self._dispatcher.limits.namespaces

    def socket_ended(self, socket: Socket) -> None:
        self.sockets[socket.namespace] = None
        self._dispatcher.socket_ended(self)
        self.enqueue(self._dispatcher.farewell, self, socket)

    def revalidate(self, socket: Socket, channel: str) -> None:
        self.enqueue(self._dispatcher.revalidate, self, socket, channel)

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

    def _enqueue_large(self, size: int, *call: Any) -> None:
        self._large += size
        self.enqueue(self._take_large, size, *call)
        maximum = self._dispatcher.max_waiting * (_IN_CALL if self._calls else 1)
        if self._large > maximum and not self.session.paused:
            self.session.pause()

    @property
    def busy(self) -> bool:
        """Tell whether a handler runs, or something waits for one."""
        return self._scheduled

    @property
    def calling(self) -> bool:
        """Tell whether a handler waits in `call()` for the client."""
        return self._calls > 0

    def waiting(self) -> Iterator[str]:
        """Yield what waits for handlers, by the name under which they are bound."""
        for function, args in self._inbox or ():
            yield from _names(function, args)

    # In a runner

    def _take_large(self, size: int, function: Callable[..., None], *args: Any) -> None:
        self._large -= size
        function(*args)

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
                if self._large <= self._dispatcher.max_waiting // 2:
                    self.session.resume()
        if inbox:
            return True
        self._inbox = None
        self._scheduled = False
        return False


class Dispatcher:
    """
    The application side of the engine: connections, and the handlers that they call.

    `allow` and `user_of` are the engine's; `log` hears of every message that clients send.
    """

    def __init__(
        self,
        hub: Hub,
        config: Config,
        *,
        connect_timeout: float,
        allow: Callable[[dict[str, Any]], Headers],
        identities: Identities,
        log: MessageLog | None,
        runners: Runners,
        threads: Threads,
        limits: Limits = DEFAULTS,
        user_of: Callable[[Any], str | None] | None = None,
        registry: Registry = events.registry,
    ) -> None:
        self.hub = hub
        self.runners = runners
        self.threads = threads
        self.limits = limits
        self.packet_limits = limits.packet
        self.max_waiting = config.max_payload
        self._rates = EventRates(limits) if limits.of_events else None
        self.engine = Engine(
            config,
            on_open=self._opened,
            on_message=self._received if self._rates is None else self._received_with_rates,
            on_close=self._closed,
            allow=allow,
            recognise=is_same_visitor,
            user_of=user_of,
        )
        runners.over_limit = self.engine.over_limit
        self.identities = identities
        self.connections: set[Connection] = set()
        self.registry = registry
        self._log = log
        lane = self.engine.deadlines.lane
        self._unconnected = lane(connect_timeout, self._connect_missed)
        self.attachments = lane(config.message_timeout, self._attachments_missed)
        self._empty = Event()
        self._empty.set()

    # On the hub

    def _opened(self, session: Session, request: HttpRequest) -> None:
        connection = session.data = Connection(session, request, self)
        self.connections.add(connection)
        self.identities.add(connection)
        self._empty.clear()
        self._unconnected.add(connection)

    @staticmethod
    def _received(session: Session, data: str | bytes) -> None:
        session.data.receive(data)

    def _received_with_rates(self, session: Session, data: str | bytes) -> None:
        """Be `_received()` where there are limits of how fast events may come."""
        if data[:1] in _COUNTED:
            identity = session.data.identity
            user = identity.user if identity is not None else ""
            limit = self._rates.exceeded(session, user) if self._rates is not None else ""
            if limit:
                session.refuse(limit, RATE_LIMIT)
                return
        session.data.receive(data)

    def _closed(self, session: Session, reason: str) -> None:
        self._unconnected.discard(session.data)
        self.identities.discard(session.data)
        self.attachments.discard(session.data)
        if self._rates is not None:
            self._rates.forget(session)
        session.data.end(reason)

    def connecting(self, connection: Connection) -> None:
        self._unconnected.discard(connection)

    def socket_ended(self, connection: Connection) -> None:
        """Give a client without any namespace the time that a new one has to connect to one."""
        if connection.session.reason is None and not any(connection.sockets.values()):
            self._unconnected.add(connection)

    def _connect_missed(self, connection: Connection, due: float) -> None:
        connection.session.refuse("CONNECT_TIMEOUT", "connect timeout")

    def _attachments_missed(self, connection: Connection, due: float) -> None:
        if connection.session.paused:
            self.attachments.add(connection)  # we do not read, so they cannot have come
        else:
            connection.session.refuse("MESSAGE_TIMEOUT", "message timeout")

    def refuse_namespace(self, connection: Connection, namespace: str, reason: str) -> None:
        logger.info("Refused the namespace %r to %s: %s", namespace, connection.session.sid, reason)
        packet = Packet(socketio.CONNECT_ERROR, namespace, {"message": reason})
        text, _ = socketio.encode(packet)
        connection.session.send(Frame.message(text))

    # In a runner

    def connect(self, connection: Connection, socket: Socket) -> None:
        if socket.ended:
            return
        refusal = self._decide(connection, socket)
        if refusal is None and socket.disconnect_reason not in _OUR_DOING:
            socket.greeted = True
            if self.registry.get("on_connect", socket.namespace):
                self.identities.add(connection)  # again: a handler may have said who it is
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
            if len(channel) > self.packet_limits.name:
                connection.session.over_limit("MAX_NAME")
                raise ValueError(f"A channel has at most {self.packet_limits.name} characters.")
            if self._log is not None:
                self._log(connection.request, data[0].strip("_"), channel)
            if subscribe:
                self._subscribe(connection, socket, channel)
            else:
                self._unsubscribe(connection, socket, channel)
        except ValueError as error:
            reason = str(error)
            logger.info("Refused %s a channel: %s", socket.sid, reason)
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
        socket.check_room()  # before anybody is asked
        self._check_permission(connection, socket, channel)
        if not socket.subscribe(channel) and socket.ended:
            socket.remember(channel)  # those who were told of it hear of its end

    def _check_permission(self, connection: Connection, socket: Socket, channel: str) -> None:
        """Ask the `on_subscribe` handlers; raise `PermissionDenied` if one refuses."""
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

    def _unsubscribe(self, connection: Connection, socket: Socket, channel: str) -> None:
        if channel in socket.channels:
            socket.unsubscribe(channel)
            self._call_for_channel("on_unsubscribe", connection, socket, channel)

    def revalidate(self, connection: Connection, socket: Socket, channel: str) -> None:
        """Ask about a channel that the socket is subscribed to as if it were to subscribe now."""
        if socket.ended or channel not in socket.channels:
            return
        try:
            self._check_permission(connection, socket, channel)
        except PermissionDenied as error:
            reason = str(error) or "Permission denied"
            if socket.unsubscribe(channel):
                self.engine.counters["unsubscribed: permission revoked"] += 1
                logger.info("Unsubscribed %s from %r: %s", socket.sid, channel, reason)
                socket.expelled(channel, reason)
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

    def unfinished(self) -> tuple[Counter[str], Counter[str]]:
        """Count what runs in handlers, and what waits for them, by their names."""
        running: Counter[str] = Counter()
        for frame in self.runners.frames():
            step = _step_in(frame)
            if step is not None:
                running.update(_names(step.f_locals["function"], step.f_locals["args"]))
        return running, Counter(name for each in self.connections for name in each.waiting())

    # Handlers

    def _run(self, handler: Handler, connection: Connection, socket: Socket, *args: Any) -> Any:
        # A context of its own: nothing that one call sets leaks into the next.
        run = self.threads.run if handler.threaded else Context().run
        return run(handler.function, connection.request, socket, connection.context, *args)

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
                run = self.threads.run if handler.threaded else Context().run
                returned = run(handler.function, request, socket, context, *args)
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
        name = handler or "the ack of a handler"
        logger.error("%s failed for %s", name, socket.sid, exc_info=error)
        if isinstance(error, DatabaseError):
            note_database()  # a connection that was only half made may be left
        for listener in self.registry.get("on_error", socket.namespace):
            if not listener.hears(socket.channels):
                continue
            try:
                self._run(listener, connection, socket, error)
            except _FAILURES:
                logger.exception("An on_error handler failed for %s", socket.sid)


_CALLERS = (Dispatcher._run.__code__, Dispatcher._call.__code__)


def find_handler(frame: FrameType | None) -> str | None:
    """Return which handler runs in a stack, given by its innermost frame, and for whom."""
    while frame is not None and frame.f_code not in _CALLERS:
        frame = frame.f_back
    handler = frame.f_locals.get("handler") if frame is not None else None
    if frame is None or handler is None:
        return None
    return f"{handler}, which handles {handler.event} of {frame.f_locals['socket']}"


def _names(function: Callable[..., None], args: Sequence[Any]) -> list[str]:
    """Return for which handlers a piece of work is."""
    match function.__name__:
        case "event":
            return [repr(args[2][0])[:_MAX_SHOWN]]
        case "connect":
            return ["on_connect"]
        case "revalidate":
            return ["on_subscribe"]
        case "_take_large":
            return _names(args[1], args[2:])
        case "farewell":
            return ["on_finish"] if args[1].greeted else []
    return []  # what is for no handler


def _step_in(frame: FrameType | None) -> FrameType | None:
    """Return the frame of `Connection.step()` that has led to `frame`."""
    while frame is not None and frame.f_code is not Connection.step.__code__:
        frame = frame.f_back
    return frame
