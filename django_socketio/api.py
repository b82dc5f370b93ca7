"""
Send from anywhere: a view, a Celery task, a shell, a cron job.

Every function raises `NoSocket` if nobody is there to receive, and `BackendError` if the carrier is
down. A message that is a tuple is several arguments to JavaScript.

Clients that are behind do without messages that are `volatile`, and of those with one key in
`coalesce` they get the latest. What is sent with `compress=False` stays as it is, whatever
`SOCKETIO_COMPRESSION` says.
"""

from collections import Counter
from typing import Any, Unpack

from . import accounts, envelope, hub as topics, runtime
from .envelope import Envelope
from .events import MESSAGE
from .exceptions import BackendError, NoSocket
from .slow import Delivery
from .sockets import arguments, check_channel, encode_event

_TIMEOUT = 10.0
"""Seconds that a client's process may take to subscribe it."""

_AGAIN = 0.5
"""Seconds after which it is asked again, lest it has died."""


def send(
    session_id: str, message: Any, *, namespace: str = "/", **delivery: Unpack[Delivery]
) -> None:
    """Send a message to one client."""
    if session_id is None:  # which emit() takes for everybody
        raise ValueError("send() needs a session id; broadcast() sends to everybody.")
    args = arguments(message)
    emit(MESSAGE, *args, session_id=session_id, namespace=namespace, **delivery)


def broadcast(message: Any, *, namespace: str = "/", **delivery: Unpack[Delivery]) -> None:
    """Send a message to everybody."""
    emit(MESSAGE, *arguments(message), namespace=namespace, **delivery)


def broadcast_channel(
    message: Any, channel: str, *, namespace: str = "/", **delivery: Unpack[Delivery]
) -> None:
    """Send a message to everybody in a channel."""
    channel = check_channel(channel)  # emit() takes None for everybody
    emit(MESSAGE, *arguments(message), channel=channel, namespace=namespace, **delivery)


def emit(
    event: str,
    *args: Any,
    channel: str | None = None,
    session_id: str | None = None,
    namespace: str = "/",
    **delivery: Unpack[Delivery],
) -> None:
    """Send an event to everybody, to a channel, or to one client."""
    if channel is not None and session_id is not None:
        raise ValueError("emit() takes a channel or a session_id, not both.")
    packets = encode_event(namespace, event, args)
    channels: tuple[str, ...] = ()
    if session_id is not None:
        topic, whom = topics.session(namespace, session_id), f"with the session id {session_id!r}"
    elif channel is not None:
        topic, channels = topics.channel(namespace, check_channel(channel)), (channel,)
        whom = f"in the channel {channel!r}"
    else:
        topic, whom = topics.everybody(namespace), f"in the namespace {namespace!r}"
    flags, key = runtime.get_hub().rules.manner(channels=channels, **delivery)
    _publish(topic, Envelope(packets=packets, flags=flags, key=key), whom)


def disconnect(session_id: str | None = None, *, user: Any = None, namespace: str = "/") -> None:
    """
    Disconnect one client, or all that a user has, whichever processes they are connected to.

    `user` is one, or the primary key of one.
    """
    if (session_id is None) == (user is None):
        raise ValueError("disconnect() needs a session_id or a user, and not both.")
    if session_id is None:
        name = accounts.name_of(user)
        if not sum(_ask_all("disconnect user", name, namespace)):
            raise _no_socket(f"of the user {name!r}")
        return
    topic = topics.session(namespace, session_id)
    _publish(topic, Envelope(envelope.DISCONNECT), f"with the session id {session_id!r}")


def subscribe(session_id: str, channel: str, *, namespace: str = "/") -> None:
    """
    Subscribe one client to a channel, whichever process it is connected to.

    Returns when the carrier has confirmed it. Calls no `on_subscribe`, and raises `ValueError` for
    one channel too many, as `Socket.subscribe()`.
    """
    _command("subscribe", session_id, channel, namespace)


def unsubscribe(session_id: str, channel: str, *, namespace: str = "/") -> None:
    """Unsubscribe one client from a channel."""
    _command("unsubscribe", session_id, channel, namespace)


def _command(name: str, session_id: str, channel: str, namespace: str) -> None:
    topic, cluster = topics.session(namespace, session_id), runtime.get_cluster()
    channel = check_channel(channel)
    answer = None
    if not _alone():
        answer = cluster.ask_one(topic, name, topic, channel, timeout=_TIMEOUT, again=_AGAIN)
    if answer is None or not answer.value:
        raise _no_socket(f"with the session id {session_id!r}")
    if isinstance(answer.value, str):
        raise ValueError(answer.value)


def members(channel: str, *, namespace: str = "/") -> set[str]:
    """Return the session ids of the clients in a channel, of all processes."""
    topic = topics.channel(namespace, check_channel(channel))
    return set().union(*_ask_all("members", topic))


def count(channel: str | None = None, *, namespace: str = "/") -> int:
    """Return how many clients are in a channel, or in all of the namespace."""
    if channel is None:
        topic = topics.everybody(namespace)
    else:
        topic = topics.channel(namespace, check_channel(channel))
    return sum(_ask_all("count", topic))


def channels(*, namespace: str = "/") -> dict[str, int]:
    """Return the channels that anybody is in, and how many clients are."""
    total: Counter[str] = Counter()
    for found in _ask_all("channels", namespace):
        total.update(found)
    return dict(total)


def revalidate(channel: str | None = None, *, namespace: str = "/") -> int:
    """
    Have `on_subscribe` decide again about everybody in a channel, or in all; return how many.

    Does not wait for the handlers. Who is refused now is unsubscribed and told, as after
    `Socket.revalidate()`.
    """
    if channel is None:
        topic = topics.subscribers(namespace)
    else:
        topic = topics.channel(namespace, check_channel(channel))
    return sum(_ask_all("revalidate", topic, channel))


def health() -> dict[str, Any]:
    """
    Return whether this process can do its part: `{"ok": bool, "reason": str, "node": str}`.

    One that serves sockets is in health while it hears its own heartbeats through the carrier; any
    other, if the carrier takes what it publishes.
    """
    reason = _illness()
    return {"ok": not reason, "reason": reason, "node": runtime.get_cluster().node}


def _illness() -> str:
    hub, cluster, dispatcher = runtime.get_hub(), runtime.get_cluster(), runtime.get_dispatcher()
    if _alone():
        return "no sockets here, and SOCKETIO_BACKEND carries messages inside one process only"
    if dispatcher is None:
        try:
            hub.publish(cluster.topic, Envelope(envelope.DISCONNECT))  # to nobody
        except BackendError:
            return "the backend cannot be reached"
        return ""
    if not dispatcher.engine.accepting:
        return "stopping"
    return "the backend cannot be heard" if cluster.deaf else ""


def _ask_all(name: str, *args: Any) -> list[Any]:
    return [] if _alone() else runtime.get_cluster().ask_all(name, *args)


def _alone() -> bool:
    """Tell whether there can be no sockets here, nor anywhere that this process reaches."""
    hub = runtime.get_hub()
    return not hub.serves and not hub.backend.crosses_processes


def _publish(topic: str, letter: Envelope, whom: str) -> None:
    if runtime.get_hub().publish(topic, letter) == 0:
        raise _no_socket(whom)


def _no_socket(whom: str) -> NoSocket:
    sentence = f"There is no socket {whom}."
    if _alone():
        sentence += (
            " This process serves none, and SOCKETIO_BACKEND carries messages inside one"
            " process only: set it to a backend that crosses processes."
        )
    return NoSocket(sentence)
