"""
The members of every address in this process, and the way to those in others.

There are three kinds of address, each a topic of the backend: everybody in a namespace, a channel,
a session. The backend subscribes to a topic while it has a member here.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists

from . import envelope
from .backends import BackendError, BaseBackend
from .engine import Frame
from .envelope import Envelope, InvalidEnvelope

logger = logging.getLogger(__name__)


def everybody(namespace: str) -> str:
    return f"a{namespace}"


def channel(namespace: str, name: str) -> str:
    return f"c{namespace},{name}"  # a namespace has no comma, so no two names meet


def session(namespace: str, sid: str) -> str:
    return f"s{namespace},{sid}"


class Member(Protocol):
    """Whoever can receive: a Socket."""

    @property
    def sid(self) -> str: ...

    def deliver(self, frame: Frame) -> None: ...
    def disconnect(self) -> None: ...


class Hub:
    """
    Route between the local members and the backend, on the hub of the thread that starts it.

    `publish()` may be called from anywhere; all else belongs to that one thread.
    """

    def __init__(self, backend: BaseBackend) -> None:
        self.backend = backend
        self.counters: Counter[str] = Counter()
        self._members: dict[str, dict[str, Member]] = {}
        self._home: object = None
        self._last_frame: tuple[tuple[bytes, ...], Frame] = ((), Frame(None))

    def start(self) -> None:
        self._home = get_hub()
        self.backend.start(self.deliver)

    def stop(self) -> None:
        self._members.clear()
        self.backend.stop()

    @property
    def serves(self) -> bool:
        """Tell whether sockets live in this process."""
        return self._home is not None

    # Membership

    def join(self, topic: str, member: Member) -> bool:
        """Add `member`; return False if it was one. Returns when the carrier has confirmed it."""
        members = self._members.get(topic)
        if members is None:
            self.backend.subscribe([topic])
            members = self._members.setdefault(topic, {})
        if member.sid in members:
            return False
        members[member.sid] = member
        return True

    def leave(self, topics: Iterable[str], member: Member) -> None:
        """Remove `member` from `topics`; it need not be in all of them."""
        empty = []
        for topic in topics:
            members = self._members.get(topic)
            if members is None or member.sid not in members:
                continue
            del members[member.sid]
            if not members:
                del self._members[topic]
                empty.append(topic)
        if empty:
            try:
                self.backend.unsubscribe(empty)
            except BackendError as error:
                # What still comes for these topics finds nobody here.
                self.counters["failed: unsubscribe"] += 1
                logger.warning("Could not unsubscribe from %d topics: %s", len(empty), error)

    def is_member(self, topic: str, member: Member) -> bool:
        return member.sid in self._members.get(topic, ())

    def members(self, topic: str) -> set[str]:
        return set(self._members.get(topic, ()))

    # Messages

    def publish(self, topics: Sequence[str], letter: Envelope) -> int:
        """
        Publish to all topics, one copy to whoever is in several; return the number of processes.

        Raise `BackendError` if the carrier is down.
        """
        receivers = 0
        for index, topic in enumerate(topics):
            addressed = letter._replace(skip=tuple(topics[:index])) if index else letter
            receivers += self.backend.publish(topic, envelope.encode(addressed))
        return receivers

    def deliver(self, topic: str, payload: bytes) -> None:
        """Hand a payload of the backend to the members of its topic, in the thread that is home."""
        if get_hub_if_exists() is self._home:
            self._deliver(topic, payload)
        elif self._home is not None:
            self._home.loop.run_callback_threadsafe(self._deliver, topic, payload)  # type: ignore[attr-defined]

    def _deliver(self, topic: str, payload: bytes) -> None:
        try:
            letter = envelope.decode(payload)
        except InvalidEnvelope as error:
            self.counters["dropped: invalid envelope"] += 1
            logger.warning("Dropped a payload on topic %r: %s", topic, error)
            return
        members = self._members.get(topic)
        if not members:
            return
        # A copy: whoever is too slow to take it leaves meanwhile.
        recipients = [member for sid, member in members.items() if sid != letter.exclude]
        if letter.skip:
            had = set().union(*(self._members.get(skipped, ()) for skipped in letter.skip))
            recipients = [member for member in recipients if member.sid not in had]
        if letter.kind == envelope.DISCONNECT:
            for member in recipients:
                member.disconnect()
            return
        frame = self._frame(letter)
        for member in recipients:
            member.deliver(frame)

    def _frame(self, letter: Envelope) -> Frame:
        """Return the frame of an envelope: one for all envelopes that a single call has made."""
        packets, frame = self._last_frame
        if not letter.skip or packets != letter.packets:
            frame = Frame.message(*letter.packets)
            self._last_frame = letter.packets, frame
        return frame
