"""Engine.IO v4 on gevent: handshake, WebSocket, polling, upgrade, heartbeat. Knows no framework."""

from .admission import AdmissionLimits
from .buckets import Buckets, Rate
from .deflate import Compression
from .frames import Frame, LossyFrame
from .http import (
    FRONT,
    OPENED,
    Front,
    Handover,
    Headers,
    Refused,
    Request,
    Response,
    send_response,
)
from .outbox import Outbox
from .server import RATE_LIMIT, Config, Engine, is_gone
from .session import SID_LENGTH, Session, State, new_sid

__all__ = [
    "FRONT",
    "OPENED",
    "RATE_LIMIT",
    "SID_LENGTH",
    "AdmissionLimits",
    "Buckets",
    "Compression",
    "Config",
    "Engine",
    "Frame",
    "Front",
    "Handover",
    "Headers",
    "LossyFrame",
    "Outbox",
    "Rate",
    "Refused",
    "Request",
    "Response",
    "Session",
    "State",
    "is_gone",
    "new_sid",
    "send_response",
]
