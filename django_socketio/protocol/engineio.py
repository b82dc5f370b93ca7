"""
Engine.IO protocol v4: packets, and the payloads that carry several of them over HTTP.

Text packets are one character for the type and the rest for the data. A binary packet is always a
message and has no type of its own: bytes as they are in a WebSocket frame, `b` and base64 in a
payload. See https://socket.io/docs/v4/engine-io-protocol/.
"""

import binascii
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from . import json
from .exceptions import LimitExceeded, ProtocolError

VERSION = "4"
SEPARATOR = b"\x1e"

OPEN = "0"
CLOSE = "1"
PING = "2"
PONG = "3"
MESSAGE = "4"
UPGRADE = "5"
NOOP = "6"
PACKET_TYPES = frozenset((OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP))

PROBE = "probe"
"""The data of the ping and pong that try out a WebSocket before an upgrade."""


class Packet(NamedTuple):
    """`data` is `str`, or `bytes` for a binary message."""

    type: str
    data: str | bytes = ""


class ErrorCode(IntEnum):
    """Why a request was refused, as every Engine.IO server numbers it."""

    UNKNOWN_TRANSPORT = 0
    UNKNOWN_SID = 1
    BAD_HANDSHAKE_METHOD = 2
    BAD_REQUEST = 3
    FORBIDDEN = 4
    UNSUPPORTED_PROTOCOL_VERSION = 5


ERROR_MESSAGES = {
    ErrorCode.UNKNOWN_TRANSPORT: "Transport unknown",
    ErrorCode.UNKNOWN_SID: "Session ID unknown",
    ErrorCode.BAD_HANDSHAKE_METHOD: "Bad handshake method",
    ErrorCode.BAD_REQUEST: "Bad request",
    ErrorCode.FORBIDDEN: "Forbidden",
    ErrorCode.UNSUPPORTED_PROTOCOL_VERSION: "Unsupported protocol version",
}


def error_body(code: ErrorCode, hint: str = "") -> bytes:
    """Return the JSON body of a refusal: the code, its fixed message and, where one helps, why."""
    body: dict[str, int | str] = {"code": int(code), "message": ERROR_MESSAGES[code]}
    if hint:
        body["hint"] = hint
    return json.dumps(body)


def open_packet(
    sid: str,
    *,
    upgrades: Sequence[str],
    ping_interval: float,
    ping_timeout: float,
    max_payload: int,
) -> bytes:
    """Return the packet that answers a handshake. Times are in seconds here, not on the wire."""
    return OPEN.encode() + json.dumps(
        {
            "sid": sid,
            "upgrades": list(upgrades),
            "pingInterval": round(ping_interval * 1000),
            "pingTimeout": round(ping_timeout * 1000),
            "maxPayload": max_payload,
        }
    )


def decode_packet(text: str) -> Packet:
    """Decode the text of one packet. Raise `ProtocolError` if it is empty or of no known type."""
    if text[:1] not in PACKET_TYPES:  # the empty string is not in the set either
        raise ProtocolError("unknown Engine.IO packet type")
    return Packet(text[0], text[1:])


def decode_payload(body: bytes, *, max_packets: int) -> list[Packet]:
    """
    Decode the body of a POST ("HTTP long-polling").

    Raise `ProtocolError` if any packet of it is malformed, or there are more than `max_packets`:
    a payload is taken whole or not at all.
    """
    if body.count(SEPARATOR) >= max_packets:
        raise LimitExceeded("MAX_PACKETS", f"more than {max_packets} packets in one payload")
    return [decode_payload_packet(part) for part in body.split(SEPARATOR)]


def decode_payload_packet(part: bytes) -> Packet:
    """Decode what stands between two separators of a payload."""
    if part[:1] == b"b":
        try:
            return Packet(MESSAGE, binascii.a2b_base64(part[1:], strict_mode=True))
        except binascii.Error:
            raise ProtocolError("invalid base64 in a payload") from None
    try:
        text = part.decode()
    except UnicodeDecodeError:
        raise ProtocolError("invalid UTF-8 in a payload") from None
    return decode_packet(text)


def encode_binary(data: bytes) -> bytes:
    """Encode a binary message as one packet of a payload."""
    return b"b" + binascii.b2a_base64(data, newline=False)


def encode_payload(packets: Iterable[bytes]) -> bytes:
    """Join packets, binary ones encoded already, into the body of a poll's answer."""
    return SEPARATOR.join(packets)
