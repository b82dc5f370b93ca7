"""Realtime messaging for Django over Socket.IO, on gevent, with swappable backends."""

from .api import broadcast, broadcast_channel, disconnect, emit, members, send
from .exceptions import BackendError, ConnectionRefused, EventError, NoSocket

__version__ = "1.0.0.dev0"

__all__ = [
    "BackendError",
    "ConnectionRefused",
    "EventError",
    "NoSocket",
    "broadcast",
    "broadcast_channel",
    "disconnect",
    "emit",
    "members",
    "send",
]
