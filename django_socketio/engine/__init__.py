"""Engine.IO v4 on gevent: handshake, WebSocket, polling, upgrade, heartbeat. Knows no framework."""

from .frames import Frame
from .http import (
    FRONT,
    Front,
    Handover,
    Headers,
    Refused,
    Request,
    Response,
    send_response,
)
from .outbox import Outbox
from .server import Config, Engine, is_gone
from .session import SID_LENGTH, Session, State, new_sid

__all__ = [
    "FRONT",
    "SID_LENGTH",
    "Config",
    "Engine",
    "Frame",
    "Front",
    "Handover",
    "Headers",
    "Outbox",
    "Refused",
    "Request",
    "Response",
    "Session",
    "State",
    "is_gone",
    "new_sid",
    "send_response",
]
