"""
Send from anywhere: a view, a Celery task, a shell, a cron job.

Every function raises `NoSocket` if nobody is there to receive, and `BackendError` if the carrier is
down. A message that is a tuple is several arguments to JavaScript.
"""

from typing import Any

from . import envelope, hub as topics, runtime
from .envelope import Envelope
from .events import MESSAGE
from .exceptions import NoSocket
from .sockets import arguments, check_channel, encode_event


def send(session_id: str, message: Any, *, namespace: str = "/") -> None:
    """Send a message to one client."""
    if session_id is None:  # which emit() takes for everybody
        raise ValueError("send() needs a session id; broadcast() sends to everybody.")
    emit(MESSAGE, *arguments(message), session_id=session_id, namespace=namespace)


def broadcast(message: Any, *, namespace: str = "/") -> None:
    """Send a message to everybody."""
    emit(MESSAGE, *arguments(message), namespace=namespace)


def broadcast_channel(message: Any, channel: str, *, namespace: str = "/") -> None:
    """Send a message to everybody in a channel."""
    channel = check_channel(channel)  # emit() takes None for everybody
    emit(MESSAGE, *arguments(message), channel=channel, namespace=namespace)


def emit(
    event: str,
    *args: Any,
    channel: str | None = None,
    session_id: str | None = None,
    namespace: str = "/",
) -> None:
    """Send an event to everybody, to a channel, or to one client."""
    if channel is not None and session_id is not None:
        raise ValueError("emit() takes a channel or a session_id, not both.")
    packets = encode_event(namespace, event, args)
    if session_id is not None:
        topic, whom = topics.session(namespace, session_id), f"with the session id {session_id!r}"
    elif channel is not None:
        topic = topics.channel(namespace, check_channel(channel))
        whom = f"in the channel {channel!r}"
    else:
        topic, whom = topics.everybody(namespace), f"in the namespace {namespace!r}"
    _publish(topic, Envelope(packets=packets), whom)


def disconnect(session_id: str, *, namespace: str = "/") -> None:
    """Disconnect one client, whichever process it is connected to."""
    topic = topics.session(namespace, session_id)
    _publish(topic, Envelope(envelope.DISCONNECT), f"with the session id {session_id!r}")


def members(channel: str, *, namespace: str = "/") -> set[str]:
    """Return the session ids of the clients in a channel."""
    return runtime.get_hub().members(topics.channel(namespace, check_channel(channel)))


def _publish(topic: str, letter: Envelope, whom: str) -> None:
    hub = runtime.get_hub()
    if hub.publish([topic], letter) == 0:
        sentence = f"There is no socket {whom}."
        if not hub.serves and not hub.backend.crosses_processes:
            sentence += (
                " This process serves none, and SOCKETIO_BACKEND carries messages inside one"
                " process only: set it to a backend that crosses processes."
            )
        raise NoSocket(sentence)
