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
from .server import Config, Engine
from .session import Session, State, new_sid

__all__ = [
    "FRONT",
    "Config",
    "Engine",
    "Frame",
    "Front",
    "Handover",
    "Headers",
    "Refused",
    "Request",
    "Response",
    "Session",
    "State",
    "new_sid",
    "send_response",
]
