import logging
import math
import struct
import time
from collections import Counter, deque
from typing import Any

from . import frames
from .broker import Broker
from .frames import Name
from .link import Call, Link, Lost

CONTENT_TYPE = b"application/octet-stream"

_FLAGS = frames.CONTENT_TYPE | frames.DELIVERY_MODE | frames.MESSAGE_ID
_PROPERTIES = struct.pack(">H", _FLAGS) + frames.short(CONTENT_TYPE) + b"\x01"  # not persistent
_MANDATORY = b"\x01"

_NOBODY = 255 * b"~"
"""A routing key that no topic has."""

_FRESH = 0.25
"""Seconds after a confirm in which the broker is taken to be well."""

_MUCH = 1 << 18
"""Bytes that wait to be sent, at most, apart from the last message."""

_LONG = 1 << 20
"""Bytes of a payload that is published by itself: more than the broker takes costs the channel."""


class Publish(Call):
    """A payload; how many receive it is known with the answer."""

    __slots__ = ("key", "payload", "receivers", "sent_at")

    def __init__(self, key: bytes, payload: bytes) -> None:
        super().__init__()
        self.key = key
        self.payload = payload
        self.receivers = 1
        self.sent_at = 0.0


class Publisher(Link):
    """
    Publish with confirms: all who call at once share a write and a read.

    What was sent when the connection is lost has failed, as nobody can tell what became of it. What
    was not may go out on the next. To have little in between, a broker that was not heard of for a
    while is sent a canary first: one that is short of memory does not say so to who only connects,
    and would keep what it gets, for later.
    """

    role = "publisher"
    log_level = logging.INFO  # the callers know

    def __init__(self, broker: Broker, counters: Counter[str]) -> None:
        super().__init__(broker, counters)
        self._calls: deque[Publish] = deque()
        self._sent: dict[int, Publish] = {}
        self._tag = 0
        self._alone = False
        self._blocked = False
        self._unblocked_at = 0.0
        self._confirmed_at = -math.inf
        self._exchange = frames.short(broker.exchange.encode())

    def _enqueue(self, call: Publish) -> None:
        self._calls.append(call)

    def _declare(self, channel: Any) -> None:
        channel.confirm_select()

    def _connected(self) -> None:
        self._tag = 0
        self._confirmed_at = -math.inf
        self._end_outage(self.log_level)

    def _write(self) -> None:
        if not self._calls or self._blocked:
            return
        if time.monotonic() - self._confirmed_at > _FRESH:
            if not self._sent:
                self._send(Publish(_NOBODY, b""))
            return
        while self._calls and len(self.out) < _MUCH:
            alone = len(self._calls[0].payload) > _LONG
            if self._sent and (alone or self._alone):
                return
            call = self._calls.popleft()
            if not call.given_up:
                self._alone = alone
                self._send(call)

    def _send(self, call: Publish) -> None:
        self._tag += 1
        self._sent[self._tag] = call
        where = bytes(2) + self._exchange + frames.short(call.key)
        head = struct.pack(">HHQ", 60, 0, len(call.payload)) + _PROPERTIES
        self.out += frames.method(frames.BASIC_PUBLISH, where + _MANDATORY)
        self.out += frames.frame(frames.HEADER, head + frames.short(b"%d" % self._tag))
        size = self.frame_max - 8
        for start in range(0, len(call.payload), size):
            self.out += frames.frame(frames.BODY, call.payload[start : start + size])
        call.payload = b""
        call.sent_at = time.monotonic()

    def _on_method(self, name: Name, payload: bytes) -> None:
        if name in (frames.BASIC_ACK, frames.BASIC_NACK):
            tag, bits = struct.unpack_from(">QB", payload, 4)
            error = "" if name == frames.BASIC_ACK else "The AMQP broker did not take it."
            self._settle(tag, bool(bits & 1), error)
        elif name == frames.CONNECTION_BLOCKED:
            self._blocked = True
            why = frames.read_short(payload, 4)[0].decode(errors="replace")
            self._begin_outage(f"the broker blocks: {why}", time.monotonic(), logging.WARNING)
        elif name == frames.CONNECTION_UNBLOCKED:
            self._blocked = False
            self._unblocked_at = time.monotonic()
            self._end_outage(logging.WARNING)

    def _settle(self, tag: int, multiple: bool, error: str) -> None:
        sent = self._sent
        self._confirmed_at = time.monotonic()
        if multiple:
            while sent and (first := next(iter(sent))) <= (tag or self._tag):
                sent.pop(first).answer(error)
        elif tag in sent:
            sent.pop(tag).answer(error)

    def _wants(self, header: bytes) -> bool:
        """Note whose message comes back: nobody receives it. Its confirm follows."""
        tag = frames.read_property(header, frames.MESSAGE_ID)
        if tag.isdigit() and (call := self._sent.get(int(tag))):
            call.receivers = 0
        return False

    def _check(self, now: float) -> None:
        if self._sent and not self._blocked:
            since = max(next(iter(self._sent.values())).sent_at, self._unblocked_at)
            if now - since > self.broker.timeout:
                raise Lost(f"the broker confirmed nothing for {self.broker.timeout:g} s")

    def _lost(self, why: str) -> None:
        self._blocked = False
        sent, self._sent = self._sent, {}
        for call in sent.values():
            call.answer(why)

    def _despair(self, why: str) -> None:
        self._lost(why)
        while self._calls:
            self._calls.popleft().answer(why)
