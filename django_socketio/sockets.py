"""The Socket: a client's connection to one namespace, as handlers see it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol, Unpack

from django.core.serializers.json import DjangoJSONEncoder
from gevent.event import AsyncResult

from . import hub as topics
from .engine import Frame, LossyFrame, Session
from .envelope import Envelope
from .events import MESSAGE, UNAVAILABLE, UNSUBSCRIBE
from .exceptions import NoSocket
from .hub import Hub, frame_of
from .protocol.socketio import (
    ACK,
    CONNECT,
    CONNECT_ERROR,
    DISCONNECT,
    EVENT,
    Packet,
    encode,
    encode_parts,
)
from .slow import Delivery, Manner

logger = logging.getLogger(__name__)

MAX_NAME = 255
"""Characters of a channel's name."""

_default = DjangoJSONEncoder().default


class State(Enum):
    """CONNECTING while `on_connect` decides; what is sent meanwhile waits for its word."""

    CONNECTING = auto()
    CONNECTED = auto()
    ENDED = auto()


_CONNECTED = State.CONNECTED  # looked up for every recipient of every message


@dataclass(frozen=True, slots=True)
class SocketSession:
    """`session_id` is what out-of-band sends address; the client knows it as `socket.id`."""

    session_id: str


class Owner(Protocol):
    """The connection that sockets of several namespaces share."""

    @property
    def session(self) -> Session: ...

    @property
    def max_channels(self) -> int: ...

    def socket_ended(self, socket: "Socket") -> None: ...
    def revalidate(self, socket: "Socket", channel: str) -> None: ...
    def call_began(self) -> None: ...
    def call_ended(self) -> None: ...


def encode_event(
    namespace: str, event: str, args: Iterable[Any], id: int | None = None
) -> tuple[bytes, ...]:
    """
    Return the packets of an event: a text and its attachments.

    Raise `TypeError` for an argument that `DjangoJSONEncoder` cannot serialise, and `ValueError`
    for a name that clients keep for themselves.
    """
    if event in UNAVAILABLE:
        raise ValueError(f"{event!r} is an event of the protocol itself and cannot be emitted.")
    text, attachments = encode_parts(EVENT, namespace, [event, *args], id, _default)
    return (text, *attachments) if attachments else (text,)


def arguments(message: Any) -> tuple[Any, ...]:
    """Return what JavaScript sees for a message: a tuple is several arguments."""
    return message if type(message) is tuple else (message,)


def value(args: Sequence[Any]) -> Any:
    """Return the message that stands for JavaScript's arguments; the reverse of `arguments()`."""
    if len(args) == 1:
        return args[0]
    return tuple(args) if args else None


def check_channel(channel: Any) -> str:
    """Return the channel if it can be one; raise `ValueError`, in words fit for clients, if not."""
    if isinstance(channel, str) and 0 < len(channel) <= MAX_NAME and channel.isprintable():
        return channel
    raise ValueError(f"A channel is a printable string of 1 to {MAX_NAME} characters.")


class Socket:
    """
    One client in one namespace.

    What is sent to a socket that has ended is dropped; broadcasts from it still go out, so that
    `on_disconnect` and `on_finish` can tell the others.

    Clients that are behind do without messages that are `volatile`, and of those with one key in
    `coalesce` they get the latest. See `SOCKETIO_SLOW_CONSUMERS` for what becomes of all others.
    What is sent with `compress=False` stays as it is, whatever `SOCKETIO_COMPRESSION` says.
    """

    __slots__ = (
        "__weakref__",
        "_acks",
        "_channels",
        "_held",
        "_held_size",
        "_hub",
        "_last_ack",
        "_owner",
        "_state",
        "auth",
        "disconnect_reason",
        "greeted",
        "namespace",
        "sid",
    )

    def __init__(self, sid: str, namespace: str, auth: dict[str, Any], owner: Owner, hub: Hub):
        self.sid = sid
        self.namespace = namespace
        self.auth = auth
        self.disconnect_reason: str | None = None
        self.greeted = False  # the on_connect handlers have let it in
        self._owner = owner
        self._hub = hub
        self._state = State.CONNECTING
        self._held: list[Frame] | None = None
        self._held_size = 0
        self._channels: dict[str, str] = {}  # name: topic
        self._acks: dict[int, AsyncResult[Any]] | None = None
        self._last_ack = 0

    def __repr__(self) -> str:
        return f"<Socket {self.sid} {self.namespace} {self._state.name.lower()}>"

    @property
    def session(self) -> SocketSession:
        return SocketSession(self.sid)

    @property
    def transport(self) -> str:
        """The transport of this moment, "websocket" or "polling"."""
        return self._owner.session.transport.name

    @property
    def channels(self) -> list[str]:
        """The channels that this socket is subscribed to; after its end, those that it was."""
        return list(self._channels)

    @property
    def connected(self) -> bool:
        return self._state is State.CONNECTED

    @property
    def ended(self) -> bool:
        return self._state is State.ENDED

    # To this client

    def send(self, message: Any, **delivery: Unpack[Delivery]) -> None:
        """Send the event `message`; a tuple is several arguments."""
        self.emit(MESSAGE, *arguments(message), **delivery)

    def emit(self, event: str, *args: Any, **delivery: Unpack[Delivery]) -> None:
        """Send an event of any name. Raise `TypeError` if an argument cannot be serialised."""
        packets = encode_event(self.namespace, event, args)
        if not delivery:
            self.deliver(Frame.message(*packets))
        else:
            flags, key = self._hub.rules.manner(**delivery)
            letter = Envelope(packets=packets, flags=flags, key=key)
            self._deliver_letter(topics.session(self.namespace, self.sid), letter)

    def call(self, event: str, *args: Any, timeout: float = 60.0) -> Any:
        """
        Send an event and wait for the client's ack; return its argument, a tuple if several.

        Raise `TimeoutError` after `timeout` seconds, and `NoSocket` if the client is or goes away.
        Not for `on_connect`, before whose end the client hears nothing: `RuntimeError`.
        """
        if self._state is State.CONNECTING:
            raise RuntimeError("call() in on_connect would wait for a client that is not in yet.")
        if self._state is State.ENDED:
            raise NoSocket(f"The socket {self.sid} has disconnected.")
        self._last_ack += 1
        id_ = self._last_ack
        result: AsyncResult[Any] = AsyncResult()
        if self._acks is None:
            self._acks = {}
        self._acks[id_] = result
        self._owner.call_began()
        try:
            self.deliver(Frame.message(*encode_event(self.namespace, event, args, id_)))
            if not result.wait(timeout) and not result.ready():
                raise TimeoutError(f"No ack for {event!r} from {self.sid} in {timeout} seconds.")
            return result.get(block=False)
        finally:
            self._owner.call_ended()
            self._acks.pop(id_, None)

    def deliver(self, frame: Frame) -> None:
        """Send a finished frame, now or once the client is let in."""
        if self._state is _CONNECTED:
            self._owner.session.transport.send(frame)
        elif self._state is State.CONNECTING:
            self._hold(frame)

    def deliver_lossy(self, frame: LossyFrame) -> None:
        """Send a finished frame that the client may do without if it is behind."""
        if self._state is _CONNECTED:
            self._owner.session.transport.send_lossy(frame)
        elif self._state is State.CONNECTING:
            if frame.key is None and not self._can_hold(frame):
                frame.dropped()
            else:
                self._hold(frame)

    def _deliver_letter(self, topic: str, letter: Envelope) -> None:
        if letter.is_lossy:
            self.deliver_lossy(self._hub.lossy_frame(topic, letter))
        else:
            self.deliver(frame_of(letter))

    def _hold(self, frame: Frame) -> None:
        """Keep what is sent while `on_connect` decides, within the limit of all that waits."""
        if not self._can_hold(frame):
            limit = self._owner.session.transport.max_buffer
            logger.warning(
                "Session %s: slow consumer: more than SOCKETIO_MAX_BUFFER (%d) bytes wait for"
                " on_connect to let %s in",
                self._owner.session.sid,
                limit,
                self,
            )
            self.end("slow consumer")
            return
        if self._held is None:
            self._held = []
        self._held.append(frame)
        self._held_size += len(frame.websocket)

    def _can_hold(self, frame: Frame) -> bool:
        transport = self._owner.session.transport
        waiting = self._held_size + transport.waiting
        return not waiting or waiting + len(frame.websocket) <= transport.max_buffer

    def disconnect(self) -> None:
        """Disconnect this client from this namespace."""
        if self._state is State.CONNECTED:
            self._send_packet(Packet(DISCONNECT, self.namespace))
        self.end("server namespace disconnect")

    # To others

    def broadcast(self, message: Any, **delivery: Unpack[Delivery]) -> None:
        """Send a message to everybody else in this namespace."""
        self._publish_to_all(message, False, delivery)

    def broadcast_channel(
        self, message: Any, channel: str | None = None, **delivery: Unpack[Delivery]
    ) -> None:
        """Send a message to everybody else in `channel`, or in all channels of this socket."""
        self._publish_to_channel(message, channel, False, delivery)

    def send_and_broadcast(self, message: Any, **delivery: Unpack[Delivery]) -> None:
        """Send a message to everybody in this namespace, this client included."""
        self._publish_to_all(message, True, delivery)

    def send_and_broadcast_channel(
        self, message: Any, channel: str | None = None, **delivery: Unpack[Delivery]
    ) -> None:
        """Send a message to `channel`, or all channels of this socket, and to this client."""
        self._publish_to_channel(message, channel, True, delivery)

    def _publish_to_all(self, message: Any, include: bool, delivery: Delivery) -> None:
        manner = self._hub.rules.manner(**delivery)
        self._publish([topics.everybody(self.namespace)], message, include, manner)

    def _publish_to_channel(
        self, message: Any, channel: str | None, include: bool, delivery: Delivery
    ) -> None:
        targets = self._channels
        if channel is not None:
            targets = {check_channel(channel): topics.channel(self.namespace, channel)}
        manner = self._hub.rules.manner(channels=targets, **delivery)
        self._publish(list(targets.values()), message, include, manner)

    def _publish(self, targets: list[str], message: Any, include: bool, manner: Manner) -> None:
        packets = encode_event(self.namespace, MESSAGE, arguments(message))
        flags, key = manner
        # As a member it gets its copy from the carrier, in the order that all others see.
        member = include and any(self._hub.is_member(topic, self) for topic in targets)
        exclude = "" if member else self.sid
        letter = Envelope(packets=packets, exclude=exclude, flags=flags, key=key)
        topic = targets[0] if len(targets) == 1 else topics.subscribers(self.namespace)
        if len(targets) > 1:
            # One publish, so never half of it: the processes sort out who is meant.
            letter = letter._replace(among=tuple(targets))
        if targets:
            self._hub.publish(topic, letter)
        if include and not member:
            self._deliver_letter(topic, letter)

    # Channels

    def subscribe(self, channel: str) -> bool:
        """
        Subscribe to a channel; return False if it was subscribed already, or has ended.

        Returns when the carrier has confirmed it. Calls no `on_subscribe`: those decide about
        what the client asks for. Raise `ValueError` if it is in as many as it may be.
        """
        topic = topics.channel(self.namespace, check_channel(channel))
        if self._state is State.ENDED or channel in self._channels:
            return False
        self.check_room()
        wanted = [topic, topics.subscribers(self.namespace)]
        self._hub.join(wanted, self)
        if self.ended:  # meanwhile
            self._hub.leave(wanted, self)
            return False
        self._channels[channel] = topic
        return True

    def unsubscribe(self, channel: str) -> bool:
        """Unsubscribe; return False if it was not subscribed."""
        if self._state is State.ENDED:
            return False
        topic = self._channels.pop(channel, None)
        if topic is None:
            return False
        left = [topic] if self._channels else [topic, topics.subscribers(self.namespace)]
        self._hub.leave(left, self)
        return True

    def revalidate(self, channel: str | None = None) -> None:
        """
        Have `on_subscribe` decide again about a channel, or about all that it is subscribed to.

        It does so after the events that have come before. A channel that is refused now is
        unsubscribed, and the client told.
        """
        for name in self.channels if channel is None else [channel]:
            self._owner.revalidate(self, name)

    # For dispatch

    def expelled(self, channel: str, error: str) -> None:
        """Tell the client that it has been unsubscribed."""
        if self._state is State.CONNECTED:
            self._send_packet(Packet(EVENT, self.namespace, [UNSUBSCRIBE, channel, error]))

    def check_room(self) -> None:
        """Raise `ValueError`, in words fit for clients, if there is no room for another channel."""
        maximum = self._owner.max_channels
        if len(self._channels) >= maximum:
            self._owner.session.over_limit("MAX_CHANNELS")
            raise ValueError(f"A socket is in at most {maximum} channels.")

    def remember(self, channel: str) -> None:
        """Count `channel` among those that this socket had when it ended."""
        self._channels[channel] = topics.channel(self.namespace, channel)

    def accept(self) -> None:
        """Let the client in: tell it, and whatever was sent to it meanwhile."""
        self._hub.join(self._own_topics(), self)
        if self.ended:  # meanwhile
            self._hub.leave(self._own_topics(), self)
            return
        self._send_packet(Packet(CONNECT, self.namespace, {"sid": self.sid}))
        self._state = State.CONNECTED
        held, self._held, self._held_size = self._held, None, 0
        for frame in held or ():
            self._owner.session.send(frame)

    def refuse(self, message: str, data: Any = None) -> None:
        """Tell the client that it is not let in, and nothing else."""
        body = {"message": message} if data is None else {"message": message, "data": data}
        self._send_packet(Packet(CONNECT_ERROR, self.namespace, body))
        self.end("refused")

    def acknowledge(self, id_: int, values: tuple[Any, ...]) -> None:
        if self._state is State.CONNECTED:
            self._send_packet(Packet(ACK, self.namespace, list(values), id_))

    def ack_received(self, id_: int, values: Sequence[Any]) -> None:
        """Hand over the answer to a `call()`; one that nobody waits for is dropped."""
        result = self._acks.pop(id_, None) if self._acks else None
        if result is not None:
            result.set(value(values))

    def end(self, reason: str) -> None:
        """Leave everything, once; what is left is to tell the handlers."""
        if self._state is State.ENDED:
            return
        self._state = State.ENDED
        self._held, self._held_size = None, 0
        self.disconnect_reason = reason
        for result in (self._acks or {}).values():
            result.set_exception(NoSocket(f"The socket {self.sid} has disconnected."))
        try:
            left = [*self._own_topics(), *self._channels.values()]
            if self._channels:
                left.append(topics.subscribers(self.namespace))
            self._hub.leave(left, self)
        finally:
            self._owner.socket_ended(self)

    def _own_topics(self) -> tuple[str, str]:
        return topics.everybody(self.namespace), topics.session(self.namespace, self.sid)

    def _send_packet(self, packet: Packet) -> None:
        text, attachments = encode(packet, _default)
        self._owner.session.send(Frame.message(text, *attachments))
