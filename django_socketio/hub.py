"""
The members of every address in this process, and the way to those in others.

There are three kinds of address, each a topic of the backend: everybody in a namespace, a channel,
a session. A fourth, whoever is in any channel, carries what is for several channels at once. The
backend subscribes to a topic while it has a member here.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists

from . import envelope
from .backends import BackendError, BaseBackend
from .engine import Frame, LossyFrame
from .envelope import Envelope, InvalidEnvelope
from .gaps import Gap, Numbering, Reception, Tail
from .slow import Drops, Rules

logger = logging.getLogger(__name__)

_NUMBERED = (envelope.EVENT, envelope.DISCONNECT)


def everybody(namespace: str) -> str:
    return f"a{namespace}"


def channel(namespace: str, name: str) -> str:
    return f"c{namespace},{name}"  # a namespace has no comma, so no two names meet


def subscribers(namespace: str) -> str:
    return f"m{namespace}"


def session(namespace: str, sid: str) -> str:
    return f"s{namespace},{sid}"


def gap(topic: str, lost: int) -> Gap:
    """Return what it means that messages of a topic are lost."""
    kind, (namespace, _, name) = topic[0], topic[1:].partition(",")
    return Gap(
        namespace,
        channel=name if kind == "c" else None,
        session_id=name if kind == "s" else None,
        lost=lost,
    )


def describe(topic: str) -> str:
    """Return the channel that a topic stands for; in brackets, what is none."""
    kind, name = topic[:1], topic[1:].removeprefix("/,")
    if kind == "c":
        return name
    return {"a": "(everybody)", "m": "(several channels)", "s": "(one client)"}.get(kind, "(other)")


def frame_of(letter: Envelope) -> Frame:
    """Return the frame of a message that nobody does without."""
    frame = Frame.message(*letter.packets)
    if letter.flags & envelope.UNCOMPRESSED:
        frame.never_deflate()
    return frame


class Member(Protocol):
    """Whoever can receive: a Socket."""

    @property
    def sid(self) -> str: ...

    def deliver(self, frame: Frame) -> None: ...
    def deliver_lossy(self, frame: LossyFrame) -> None: ...
    def disconnect(self) -> None: ...
    def subscribe(self, channel: str) -> bool: ...
    def unsubscribe(self, channel: str) -> bool: ...
    def revalidate(self, channel: str | None) -> None: ...


class Hub:
    """
    Route between the local members and the backend, on the hub of the thread that starts it.

    `publish()` may be called from anywhere; all else belongs to that one thread. What is neither
    for clients nor for sockets goes to `correspond(topic, letter)`, which must not wait.
    """

    def __init__(self, backend: BaseBackend) -> None:
        self.backend = backend
        backend.interrupted = self.interrupted
        self.counters: Counter[str] = Counter()
        self.rules = Rules()
        self._drops = Drops(self.counters, describe, monotonic)
        self.delivered: Callable[[], None] = lambda: None
        self.correspond: Callable[[str, Envelope], None] = lambda topic, letter: None
        self._members: dict[str, dict[str, Member]] = {}
        self._joining: Counter[str] = Counter()
        self._kept: list[str] = []
        self._home: object = None
        self._numbering: Numbering | None = None
        self._reception = Reception(monotonic, 0)
        self._interruptions: list[float] = []
        self.missed: Callable[[list[Gap], float | None], None] = lambda gaps, interrupted: None

    def start(self) -> None:
        self._home = get_hub()
        if self._kept:  # it has heard answers before, in a process that served nothing yet
            self.backend.stop()
            self._kept.clear()
        self.backend.start(self.deliver)

    def stop(self) -> None:
        self._members.clear()
        self._kept.clear()
        self.backend.stop()

    @property
    def serves(self) -> bool:
        """Tell whether sockets live in this process."""
        return self._home is not None

    # Membership

    def join(self, topics: Sequence[str], member: Member) -> bool:
        """
        Add `member`; return False if it was in all of them. Returns when the carrier has confirmed.

        Raise `BackendError`, and add it to none, if the carrier does not.
        """
        missing = [topic for topic in topics if topic not in self._members]
        if missing:
            self._subscribe(missing, topics)
        joined = False
        for topic in topics:
            members = self._members.setdefault(topic, {})
            if member.sid not in members:
                members[member.sid] = member
                joined = True
        return joined

    def _subscribe(self, missing: Sequence[str], topics: Sequence[str]) -> None:
        """Subscribe; whoever leaves `topics` last meanwhile does not take them with him."""
        self._joining.update(topics)
        confirmed = False
        try:
            self.backend.subscribe(missing)
            if self._numbering is not None:
                self._reception.subscribed(missing)
            confirmed = True
        finally:
            given_up = []
            for topic in topics:
                self._joining[topic] -= 1
                if not self._joining[topic]:
                    del self._joining[topic]
                    if not confirmed and topic not in self._members:
                        given_up.append(topic)
            self._unsubscribe(given_up)

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
                if topic not in self._joining:
                    empty.append(topic)
        self._unsubscribe(empty)

    def _unsubscribe(self, topics: Sequence[str]) -> None:
        if not topics:
            return
        self._reception.unsubscribed(topics)
        try:
            self.backend.unsubscribe(topics)
        except BackendError as error:
            # What still comes for these topics finds nobody here.
            self.counters["failed: unsubscribe"] += 1
            logger.warning("Could not unsubscribe from %d topics: %s", len(topics), error)

    def keep(self, topics: Sequence[str]) -> None:
        """Subscribe this process itself to `topics`, for good."""
        self.backend.subscribe(topics)
        self._kept += topics

    def restart_backend(self) -> None:
        """Start the backend anew with all topics; raise `BackendError` if that does not work."""
        self.backend.stop()
        self.backend.start(self.deliver)
        self.backend.subscribe([*self._kept, *self._members, *self._joining])

    def is_member(self, topic: str, member: Member) -> bool:
        return member.sid in self._members.get(topic, ())

    def members(self, topic: str) -> dict[str, Member]:
        """Return the members by their session ids."""
        return dict(self._members.get(topic, ()))

    def count(self, topic: str) -> int:
        return len(self._members.get(topic, ()))

    def channels(self, namespace: str) -> dict[str, int]:
        """Return the channels that have members here, and how many."""
        start = channel(namespace, "")
        found = list(self._members.items())  # at once: other threads ask, too
        return {name[len(start) :]: len(who) for name, who in found if name.startswith(start)}

    # Messages

    def publish(self, topic: str, letter: Envelope) -> int:
        """Publish as the backend does, and return what it does."""
        if self._numbering is None or letter.kind not in _NUMBERED:
            return self.backend.publish(topic, envelope.encode(letter))
        stamp = self._numbering.stamp(topic)
        try:
            receivers = self.backend.publish(topic, envelope.encode(letter, stamp))
        except BaseException:  # somebody may also have ended the greenlet
            self._numbering.failed(topic, stamp)
            raise
        self._numbering.sent(topic, stamp)
        return receivers

    def deliver(self, topic: str, payload: bytes) -> None:
        """Hand a payload of the backend to the members of its topic, in the thread that is home."""
        self.at_home(self._deliver, topic, payload)

    def at_home(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function in the thread that is home: now, or soon if this is another."""
        if self._home is None or get_hub_if_exists() is self._home:
            function(*args)
        else:
            self._home.loop.run_callback_threadsafe(function, *args)  # type: ignore[attr-defined]

    def _deliver(self, topic: str, payload: bytes) -> None:
        try:
            letter = envelope.decode(payload)
        except InvalidEnvelope as error:
            self.counters["dropped: invalid envelope"] += 1
            logger.warning("Dropped a payload on topic %r: %s", topic, error)
            return
        if letter.stamp is not None and topic in self._members:
            if not self._reception.received(topic, letter.stamp):
                self.counters["dropped: came twice"] += 1
                return
        if letter.kind == envelope.EVENT:
            # A copy: whoever is too slow to take it leaves meanwhile.
            recipients = self._recipients(topic, letter)
            if recipients:
                if letter.is_lossy:
                    lossy = self.lossy_frame(topic, letter)
                    for member in recipients:
                        member.deliver_lossy(lossy)
                else:
                    frame = frame_of(letter)
                    for member in recipients:
                        member.deliver(frame)
                self.delivered()
        elif letter.kind == envelope.DISCONNECT:
            for member in self._recipients(topic, letter):
                member.disconnect()
        else:
            self.correspond(topic, letter)

    def lossy_frame(self, topic: str, letter: Envelope) -> LossyFrame:
        """Return the frame of a message that clients which are behind need not get."""
        # A key is one of its address: the same in another channel is another.
        key = (topic, letter.among, letter.key) if letter.key else None
        dropped = partial(self._drops.count, "coalesced" if letter.key else "volatile", topic)
        frame = LossyFrame(*letter.packets, key=key, dropped=dropped)
        if letter.flags & envelope.UNCOMPRESSED:
            frame.never_deflate()
        return frame

    # Gaps

    def number(self, origin: str, *, grace: float) -> None:
        """
        Number what is published as of `origin`, and miss what does not come for `grace` seconds.
        """
        self._numbering = Numbering(origin, monotonic, grace)
        self._reception = Reception(monotonic, grace)

    def tails(self) -> list[Tail]:
        """Return what a beat has to tell of what was published here since the last one."""
        return [] if self._numbering is None else self._numbering.tails()

    def told(self, origin: str, tails: Iterable[Any]) -> None:
        """Be told by the beat of another process what it has published."""
        self._reception.told(origin, tails, self._members.__contains__)

    def interrupted(self, seconds: float) -> None:
        """Be told that the carrier may not have been heard for so long. From any thread."""
        if self._members:  # else there is nobody here who could miss anything
            self._interruptions.append(seconds)

    def look_for_gaps(self) -> None:
        """Count what is lost, and tell `missed(gaps, interrupted)` of it."""
        while self._interruptions:
            self.counters["interruptions"] += 1
            self.missed([], self._interruptions.pop(0))
        self.counters["arrived late"] = self._reception.late
        gaps = [gap(topic, lost) for topic, lost in self._reception.lost().items()]
        if gaps:
            lost = sum(each.lost for each in gaps)
            self.counters["gaps"] += len(gaps)
            self.counters["lost in gaps"] += lost
            logger.warning("%d messages on %d topics did not come", lost, len(gaps))
            self.missed(gaps, None)

    def _recipients(self, topic: str, letter: Envelope) -> list[Member]:
        """Return whom it is for, each once."""
        if letter.among:
            members: dict[str, Member] = {}
            for name in letter.among:
                members.update(self._members.get(name, ()))
        else:
            members = self._members.get(topic) or {}
        return [member for sid, member in members.items() if sid != letter.exclude]
