"""
Socket.IO protocol v5: packets over Engine.IO messages.

`<type>[<attachments>-][<namespace>,][<ack id>][<JSON>]`, then that many binary messages. See
https://socket.io/docs/v4/socket-io-protocol/.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from . import json
from .exceptions import LimitExceeded, ProtocolError

MAX_ACK_ID = 2**53
"""A JavaScript client cannot count further."""


class PacketType(IntEnum):
    CONNECT = 0
    DISCONNECT = 1
    EVENT = 2
    ACK = 3
    CONNECT_ERROR = 4
    BINARY_EVENT = 5
    BINARY_ACK = 6


RESERVED_EVENTS = frozenset(
    ("connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener")
)
"""Names that every Socket.IO client keeps for its own use; no EVENT may carry one."""

CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = PacketType

# The first character of a packet: its type without attachments, and whether it has any.
_TYPES = {
    "0": (CONNECT, False),
    "1": (DISCONNECT, False),
    "2": (EVENT, False),
    "3": (ACK, False),
    "4": (CONNECT_ERROR, False),
    "5": (EVENT, True),
    "6": (ACK, True),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What a packet may have: attachments, bytes of all of them, levels of JSON, characters of a name.

    A text of at most `harmless` characters can be over neither of the last two.
    """

    attachments: int = 10
    attachment_bytes: int = 1_000_000
    depth: int = 64
    name: int = 255
    harmless: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "harmless", min(2 * self.depth, self.name))


class Packet(NamedTuple):
    """
    One packet; a binary one has the type of its plain twin, and its attachments in `data`.

    `data` is the JSON value: a non-empty list that begins with the name for an EVENT, a list for
    an ACK, a dict or None for a CONNECT.
    """

    type: PacketType
    namespace: str = "/"
    data: Any = None
    id: int | None = None


class Assembly:
    """
    A binary packet whose attachments are still to come ("Packet encoding").

    Feed it each binary message: it returns None until the last, then the packet. Together they
    have at most `maximum` bytes, else it raises `LimitExceeded`.
    """

    __slots__ = ("_count", "_left", "_maximum", "_packet", "_places", "_received")

    def __init__(self, packet: Packet, count: int, maximum: int) -> None:
        self._packet = packet
        self._count = count
        self._places = _find_placeholders(packet.data, count)
        self._received = 0
        self._left = self._maximum = maximum

    @property
    def namespace(self) -> str:
        return self._packet.namespace

    @property
    def size(self) -> int:
        """The bytes of all attachments until now."""
        return self._maximum - self._left

    def add(self, attachment: bytes) -> Packet | None:
        self._left -= len(attachment)
        if self._left < 0:
            text = f"attachments of more than {self._maximum} bytes"
            raise LimitExceeded("MAX_ATTACHMENT_BYTES", text)
        container, key = self._places[self._received]
        container[key] = attachment
        self._received += 1
        return self._packet if self._received == self._count else None


def decode(text: str, limits: Limits) -> Packet | Assembly:
    """
    Decode the text of a packet; return an `Assembly` if attachments belong to it.

    Raise `ProtocolError` for whatever the protocol does not allow, and `LimitExceeded` for what is
    over one of `limits`.
    """
    if text[:2] == "2[":  # an event as most are: nothing stands between its type and its data
        data = json.loads(text[1:])
        if not data or type(data[0]) is not str or data[0] in RESERVED_EVENTS:
            _validate(EVENT, data, None)
        if len(text) > limits.harmless:
            _check_limits(EVENT, "/", data, text, limits)
        return tuple.__new__(Packet, (EVENT, "/", data, None))  # half the price of Packet(…)
    try:
        type_, binary = _TYPES[text[0]]
    except (IndexError, KeyError):
        raise ProtocolError("unknown Socket.IO packet type") from None
    start = 1
    attachments = 0
    if binary:
        attachments, start = _read_attachment_count(text, limits.attachments)
    namespace = "/"
    if text[start : start + 1] == "/":
        end = text.find(",", start)
        end = len(text) if end < 0 else end
        namespace = text[start:end]
        start = end + 1
    id_, start = _read_ack_id(text, start)
    data = None
    if start < len(text):
        data = json.loads(text[start:])
        if data is None:
            raise ProtocolError("a payload of null")
    _validate(type_, data, id_)
    if len(text) > limits.harmless:
        _check_limits(type_, namespace, data, text, limits)
    packet = Packet(type_, namespace, data, id_)
    return Assembly(packet, attachments, limits.attachment_bytes) if attachments else packet


def _read_attachment_count(text: str, maximum: int) -> tuple[int, int]:
    digits, dash, _ = text[1:16].partition("-")
    if not dash or not (digits.isascii() and digits.isdigit()):
        raise ProtocolError("a binary packet without its number of attachments")
    if int(digits) == 0:
        raise ProtocolError("a binary packet without attachments")
    if int(digits) > maximum:
        raise LimitExceeded("MAX_ATTACHMENTS", f"{int(digits)} attachments, over {maximum}")
    return int(digits), len(digits) + 2


def _read_ack_id(text: str, start: int) -> tuple[int | None, int]:
    end = start
    while "0" <= text[end : end + 1] <= "9":
        end += 1
        if end - start > 16:
            raise ProtocolError("an ack id out of range")
    if end == start:
        return None, start
    id_ = int(text[start:end])
    if id_ > MAX_ACK_ID:
        raise ProtocolError("an ack id out of range")
    return id_, end


def _validate(type_: PacketType, data: Any, id_: int | None) -> None:
    if type_ is EVENT:
        # "The payload is mandatory and MUST be a non-empty array."
        if not (isinstance(data, list) and data and isinstance(data[0], str)):
            raise ProtocolError("an event without a name")
        if data[0] in RESERVED_EVENTS:
            raise ProtocolError("an event with a reserved name")
    elif type_ is ACK:
        if not isinstance(data, list) or id_ is None:
            raise ProtocolError("an ack without an id or arguments")
    elif type_ is CONNECT:
        if not (data is None or isinstance(data, dict)):
            raise ProtocolError("a connect payload that is no object")
    elif type_ is DISCONNECT:
        if data is not None:
            raise ProtocolError("a disconnect with a payload")
    elif not isinstance(data, dict | str):
        raise ProtocolError("a connect error without a message")


def _check_limits(type_: PacketType, namespace: str, data: Any, text: str, limits: Limits) -> None:
    if len(namespace) > limits.name or (type_ is EVENT and len(data[0]) > limits.name):
        raise LimitExceeded("MAX_NAME", f"a name of more than {limits.name} characters")
    json.check_depth(text, data, limits.depth)


def _find_placeholders(data: Any, count: int) -> list[tuple[Any, Any]]:
    """
    Return where each attachment goes, as (container, key), in the order of their numbers.

    Each number from 0 to `count` - 1 must stand exactly once. Walks without recursion: the depth
    is the peer's choice.
    """
    places: dict[int, tuple[Any, Any]] = {}
    stack = [data]
    while stack:
        container = stack.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, dict) and value.get("_placeholder") is True:
                number = value.get("num")
                if type(number) is not int or number in places or not 0 <= number < count:
                    raise ProtocolError("a placeholder that fits no attachment")
                places[number] = (container, key)
            elif isinstance(value, dict | list):
                stack.append(value)
    if len(places) != count:
        raise ProtocolError("an attachment without a placeholder")
    return [places[number] for number in range(count)]


def encode(packet: Packet, default: json.Default = json.refuse) -> tuple[bytes, list[bytes]]:
    """
    Encode a packet as its text and its attachments.

    `default` serialises what JSON does not know. Raise `TypeError` if it does not know it either.
    """
    return encode_parts(*packet, default)


def encode_parts(
    type_: PacketType, namespace: str, data: Any, id_: int | None, default: json.Default
) -> tuple[bytes, list[bytes]]:
    """Encode a packet that nobody has made: see `encode()`."""
    body, attachments = (b"", []) if data is None else json.dumps_binary(data, default)
    if attachments:
        if type_ is not EVENT and type_ is not ACK:
            raise TypeError(f"A {type_.name} packet carries no binary data")
        head = f"{BINARY_EVENT if type_ is EVENT else BINARY_ACK:d}{len(attachments)}-"
    else:
        head = "0123456"[type_]
    if namespace != "/":
        head += f"{namespace},"
    if id_ is not None:
        head += str(id_)
    return head.encode() + body, attachments
