"""
What became of each message: ok, lost, duplicated, reordered, corrupt or unexpected.

Publishers register what they send and what became of the call, clients what they hear and from when
to when they were subscribed. A message is owed to a client that was subscribed all the time from
the call to its success and a moment longer. Knows no sockets, and no clock but the one that all who
write here share.
"""

from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from typing import Any, NamedTuple, Self

GRACE = 0.5
"""Seconds that a message may be on its way: those sent so shortly before an end are not owed."""

SENT = "sent"
NOBODY = "NoSocket"
"""The outcome where the carrier has taken a message, and nobody was there."""
UNKNOWN = "unknown"
"""The outcome of a call whose answer never came."""


class Key(NamedTuple):
    origin: str
    number: int


class Corrupt(ValueError):
    """What came is not what anybody sent."""


@dataclass(frozen=True, slots=True)
class Message:
    """What travels; `payload` is JSON, bytes in it included. Numbers of an origin rise by one."""

    origin: str
    number: int
    room: str
    payload: Any

    @property
    def key(self) -> Key:
        return Key(self.origin, self.number)

    @property
    def digest(self) -> str:
        text = repr((self.origin, self.number, self.room, self.payload))
        return b64encode(blake2b(text.encode(), digest_size=9).digest()).decode()

    def wire(self) -> list[Any]:
        return [self.origin, self.number, self.room, self.payload, self.digest]

    @classmethod
    def read(cls, wire: Any) -> Self:
        match wire:
            case [str(origin), int(number), str(room), payload, str(digest)]:
                message = cls(origin, number, room, payload)
                if message.digest == digest:
                    return message
        raise Corrupt(f"{str(wire)[:200]}")


@dataclass(slots=True)
class Sending:
    """A call, and what it returned."""

    room: str
    began: float
    ended: float = inf
    outcome: str = UNKNOWN


@dataclass(slots=True)
class Window:
    """A client's subscription to a room, at one worker."""

    room: str
    worker: str
    since: float
    until: float = inf

    def owes(self, sending: Sending) -> bool:
        return self.since <= sending.began and sending.ended <= self.until - GRACE


@dataclass(slots=True)
class Fault:
    """
    A time in which messages may be lost, as declared by whoever broke something.

    It begins when the last message ended that was heard by all before.
    """

    name: str
    began: float
    ended: float = inf

    def excuses(self, sending: Sending) -> bool:
        return self.began <= sending.ended and sending.began <= self.ended


class Journal:
    """What one client heard, in order, and when it was subscribed to what."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.windows: list[Window] = []
        self.heard: list[tuple[Key, str]] = []
        self.keys: set[Key] = set()
        self.corrupt: list[str] = []
        self.unexpected: list[str] = []
        self._open: dict[str, Window] = {}
        self._highest: dict[tuple[str, str], int] = {}

    def subscribed(self, room: str, worker: str, now: float) -> None:
        self._open[room] = window = Window(room, worker, now)
        self.windows.append(window)

    def leaves(self, room: str, now: float) -> None:
        """Note that the client is about to leave: from now on it is owed nothing."""
        window = self._open.pop(room, None)
        if window is not None:
            window.until = now

    def ends(self, now: float) -> None:
        """Note that the connection is over; `now` is when something last came by it."""
        for room in list(self._open):
            self.leaves(room, now)

    def is_subscribed(self, room: str) -> bool:
        return room in self._open

    def hears(self, wire: Any, rooms: Iterable[str]) -> None:
        """Note a message. `rooms` are those that the client has not heard that it has left."""
        try:
            message = Message.read(wire)
        except Corrupt as error:
            self.corrupt.append(f"{self.name}: {error}")
            return
        if message.room not in rooms:
            self.unexpected.append(f"{self.name} is not in {message.room!r}: {message.key}")
        self.heard.append((message.key, message.room))
        self.keys.add(message.key)

    def disorder(self) -> tuple[list[Key], list[Key]]:
        """Return what came twice, and what came behind something later of its origin and room."""
        twice, late = [], []
        highest = dict(self._highest)
        seen: set[Key] = set()
        for key, room in self.heard:
            before = highest.get((key.origin, room), -1)
            if key in seen or key.number == before:
                twice.append(key)
            elif key.number < before:
                late.append(key)
            else:
                highest[key.origin, room] = key.number
            seen.add(key)
        return twice, late

    def forget(self) -> None:
        for key, room in self.heard:
            mark = (key.origin, room)
            self._highest[mark] = max(self._highest.get(mark, -1), key.number)
        self.heard.clear()
        self.keys.clear()
        self.windows = list(self._open.values())


@dataclass(slots=True)
class Report:
    """The verdict on all that was sent until now. `str()` of it is a table with examples."""

    owed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    lost_in_faults: list[str] = field(default_factory=list)
    half_delivered: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    late_though_refused: list[str] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    """Messages that no client of a worker has heard that was to, by worker; also of nobody's."""
    heard_though_refused: int = 0

    NEVER = ("half_delivered", "duplicated", "reordered", "corrupt", "unexpected")
    KINDS = ("lost", "lost_in_faults", *NEVER, "late_though_refused")

    def __str__(self) -> str:
        rows = [f"{'owed':>20}: {self.owed}", f"{'calls':>20}: {dict(self.outcomes)}"]
        for name in self.KINDS:
            found = getattr(self, name)
            rows.append(f"{name.replace('_', ' '):>20}: {len(found)}  {'; '.join(found[:4])}")
        return "\n".join(rows)

    def __iadd__(self, other: "Report") -> "Report":
        self.owed += other.owed
        self.outcomes += other.outcomes
        self.missed += other.missed
        self.heard_though_refused += other.heard_though_refused
        for name in self.KINDS:
            getattr(self, name).extend(getattr(other, name))
        return self

    def is_sound(self) -> bool:
        return not any(getattr(self, name) for name in ("lost", *self.NEVER))

    def loses_in_faults_only(self) -> None:
        """See that nothing is wrong but what may be lost in a fault."""
        assert self.owed, "nobody was owed anything"
        assert self.is_sound(), f"\n{self}"

    def loses_nothing(self) -> None:
        """See that every message reached everybody, once, whole and in order."""
        self.loses_in_faults_only()
        assert not self.lost_in_faults, f"\n{self}"


class Checker:
    def __init__(self) -> None:
        self.journals: dict[str, Journal] = {}
        self.sendings: dict[Key, Sending] = {}
        self.faults: list[Fault] = []
        self._forgotten: dict[str, int] = {}

    def journal(self, name: str) -> Journal:
        """Return a new journal, for a client of that name."""
        journal = self.journals[name] = Journal(name)
        return journal

    def sends(self, message: Message, now: float) -> Sending:
        """Register a message that is about to be sent; its outcome is for the caller to note."""
        sending = self.sendings[message.key] = Sending(message.room, now)
        return sending

    def missing(self, since: float = -inf, until: float = inf) -> int:
        """Return how many messages of that time, from call to success, somebody has not heard."""
        return sum(
            key not in journal.keys
            for key, sending, owed in self._wanted()
            if since <= sending.began and sending.ended < until and sending.outcome == SENT
            for journal, _ in owed
        )

    def _wanted(self) -> Iterator[tuple[Key, Sending, list[tuple[Journal, Window]]]]:
        windows: dict[str, list[tuple[Journal, Window]]] = defaultdict(list)
        for journal in self.journals.values():
            for window in journal.windows:
                windows[window.room].append((journal, window))
        for key, sending in list(self.sendings.items()):
            if sending.outcome in (SENT, NOBODY):
                room = windows.get(sending.room, ())
                yield key, sending, [(who, window) for who, window in room if window.owes(sending)]

    def report(self) -> Report:
        report = Report(outcomes=Counter(s.outcome for s in self.sendings.values()))
        for key, sending, owed in self._wanted():
            self._judge(report, key, sending, owed)
        for journal in self.journals.values():
            twice, late = journal.disorder()
            report.duplicated += [f"{journal.name}: {key}" for key in twice]
            for key in late:
                kind = report.late_though_refused if self._was_refused(key) else report.reordered
                kind.append(f"{journal.name}: {key}")
            report.corrupt += journal.corrupt
            report.unexpected += journal.unexpected + list(self._invented(journal))
            report.heard_though_refused += sum(
                self.sendings[key].outcome != SENT for key in journal.keys & self.sendings.keys()
            )
        return report

    def _was_refused(self, key: Key) -> bool:
        """Tell whether a call has failed, which may be wrong: then it is in no order."""
        return key in self.sendings and self.sendings[key].outcome not in (SENT, NOBODY)

    def _judge(
        self, report: Report, key: Key, sending: Sending, owed: list[tuple[Journal, Window]]
    ) -> None:
        missed = [(who, window) for who, window in owed if key not in who.keys]
        heard_at = {window.worker for who, window in owed if key in who.keys}
        missed_at = {window.worker for _, window in missed}
        report.missed.update(missed_at - heard_at)
        if sending.outcome != SENT:
            return
        report.owed += len(owed)
        excused = any(fault.excuses(sending) for fault in self.faults)
        lost = report.lost_in_faults if excused else report.lost
        lost += [f"{key} in {sending.room!r} for {who.name}" for who, _ in missed]
        for worker in missed_at & heard_at:
            report.half_delivered.append(f"{key} in {sending.room!r} at {worker}")

    def _invented(self, journal: Journal) -> Iterator[str]:
        for key, room in journal.heard:
            sending = self.sendings.get(key)
            if sending is None and key.number > self._forgotten.get(key.origin, -1):
                yield f"{journal.name}: nobody sent {key}"
            elif sending is not None and sending.room != room:
                yield f"{journal.name}: {key} was for {sending.room!r}, not {room!r}"

    def forget(self) -> None:
        """Let go of all that was judged; what comes of it later is out of order."""
        for key in self.sendings:
            self._forgotten[key.origin] = max(self._forgotten.get(key.origin, -1), key.number)
        self.sendings.clear()
        self.faults = [fault for fault in self.faults if fault.ended == inf]
        for journal in self.journals.values():
            journal.forget()
