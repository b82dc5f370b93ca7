"""
Gaps: what the carrier took and did not bring.

A process numbers what it publishes, topic by topic. Whoever hears a topic finds a gap by the number
behind it. Behind the last one there is none, so a node's beats name the numbers of the topics that
it has published on lately. Numbers that never went out, as the carrier refused them, are no gap:
the next stamp says so if they are right before it, and else the beat.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .envelope import Stamp

_MAX_STREAMS = 50_000
"""Topics that a process counts on; at more it begins anew, in another epoch."""

_IDLE = 60
"""Beats, at least, after which a topic on which nothing was published is forgotten."""

_MAX_TAILS = 1000
"""Topics that one beat tells of; the others' turn is the next one's."""

_REPEATS = 4
"""Beats that tell of the same: some may be lost with the messages."""

_YOUNG = _REPEATS + 2
"""
How often the grace must pass until a subscription is certainly older than what a beat tells of from
before it: at most a grace apart are the beats that may do so.
"""

_MAX_RUNS = 1000
"""Runs of numbers that never went out, of one topic, that a beat tells of."""

_MAX_ORIGINS = 256
"""Processes that a topic is heard from; of more the one that came first is forgotten."""

_MAX_MISSING = 10_000
"""Numbers of one origin and topic that may still come late; of more the first are lost at once."""

Tail = tuple[str, int, int, int, Sequence[tuple[int, int]]]
"""
Topic, epoch, the last number that was settled some beats ago (or now, where that is not known), the
last that is now, and those of them that never went out: runs, as pairs of the first number and the
one behind the last.
"""


class Gap(NamedTuple):
    """
    `lost` messages did not come, which were for a channel or a client, or for all in the namespace.
    """

    namespace: str
    channel: str | None
    session_id: str | None
    lost: int


_PATIENCE = 12
"""How often the grace must pass until a number is lost of which no beat says that it went out."""

_NO_RUN = range(0)


class _Runs:
    """
    Numbers, of which most are neighbours: in an outage thousands of them may fail.

    Several threads may add at once, each number once: then runs may touch or overlap, which does no
    harm. Whatever stands in either dict is true at any time.
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self) -> None:
        self._stops: dict[int, int] = {}  # of each run, by its start
        self._starts: dict[int, int] = {}  # and the other way round

    def add(self, number: int) -> None:
        start = self._starts.pop(number, number)
        stop = self._stops.pop(number + 1, number + 1)
        self._stops[start], self._starts[stop] = stop, start
        while len(self._stops) > _MAX_RUNS:
            first = list(self._stops)[0]
            self._starts.pop(self._stops.pop(first, 0), None)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(self._stops.items()))  # at once: other threads add


class _Stream:
    """What this process has published on one topic."""

    __slots__ = ("before", "epoch", "numbers", "refused", "repeats", "run", "settled")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.numbers = itertools.count(1)
        self.settled = 0  # the last number that has gone out, or is known not to
        self.before = (0,) * _REPEATS  # `settled` at the last beats
        self.run = _NO_RUN  # the last failures without a gap
        self.refused: _Runs | None = None  # there may be one of these for each client
        self.repeats = 0

    def skip(self, number: int) -> int:
        """Return how many right before `number` have failed."""
        return len(self.run) if self.run.stop == number else 0

    def settle(self, number: int) -> None:
        if self.settled < number:
            self.settled = number

    def fail(self, number: int) -> None:
        self.settle(number)
        run = self.run
        self.run = range(run.start if run.stop == number else number, number + 1)
        if self.refused is None:
            self.refused = _Runs()
        self.refused.add(number)

    def tail(self, topic: str, steady: bool) -> Tail:
        settled = self.settled
        before = self.before[0] if steady else settled
        self.before = (*self.before[1:], settled)
        tail = (topic, self.epoch, before, settled, list(self.refused or ()))
        self.repeats -= 1
        if not self.repeats:
            self.refused = None
        return tail


class Numbering:
    """
    The numbers of what this process publishes. Any thread may ask for one.

    Two threads may put their messages on the carrier in the reverse order of their numbers; a
    number that comes late is therefore no gap, either.
    """

    def __init__(self, origin: str, now: Callable[[], float], grace: float) -> None:
        self.origin = origin
        self._now = now
        self._grace = grace
        self._told = now()  # when the last beat was
        self._steady = _REPEATS  # beats in a row, each within the grace and with all topics
        self._epoch = 1
        self._streams: dict[str, _Stream] = {}
        self._older: dict[str, _Stream] = {}  # not published on since the last time that it aged
        self._beats = 0
        self._recent: dict[str, _Stream] = {}

    def stamp(self, topic: str) -> Stamp:
        """Return the next number on a topic; `sent()` or `failed()` must follow."""
        stream = self._streams.get(topic) or self._begin(topic)
        number = next(stream.numbers)
        return Stamp(self.origin, stream.epoch, number, stream.skip(number))

    def sent(self, topic: str, stamp: Stamp) -> None:
        stream = self._streams.get(topic) or self._older.get(topic)
        if stream is not None and stream.epoch == stamp.epoch:
            stream.settle(stamp.number)
            self._tell(topic, stream)

    def failed(self, topic: str, stamp: Stamp) -> None:
        stream = self._streams.get(topic) or self._older.get(topic)
        if stream is not None and stream.epoch == stamp.epoch:
            stream.fail(stamp.number)
            self._tell(topic, stream)

    def _tell(self, topic: str, stream: _Stream) -> None:
        stream.repeats = _REPEATS
        self._recent[topic] = stream

    def tails(self) -> list[Tail]:
        """Return what there is to tell of with the next beat."""
        self._beats += 1
        if self._beats % _IDLE == 0:
            self._age()
        recent = list(self._recent.items())
        now = self._now()
        # What is older than an outage, or than a time in which this process stood still, may be
        # older than subscriptions that were made meanwhile.
        in_time = now <= self._told + self._grace and len(recent) <= _MAX_TAILS
        self._steady = self._steady + 1 if in_time else 0
        self._told = now
        tails = []
        for topic, stream in recent[:_MAX_TAILS]:
            del self._recent[topic]
            tails.append(stream.tail(topic, self._steady > _REPEATS))
            if stream.repeats:
                self._recent[topic] = stream
        return tails

    def _age(self) -> None:
        """Forget the topics that were not published on since the last time."""
        if self._older:
            self._epoch += 1  # for if they come again
        self._older, self._streams = self._streams, {}

    def _begin(self, topic: str) -> _Stream:
        stream = self._older.pop(topic, None)
        if stream is None:
            if len(self._streams) >= _MAX_STREAMS:
                self._epoch += 1
                self._streams, self._older = {}, {}
                self._recent = {}
            stream = _Stream(self._epoch)
        return self._streams.setdefault(topic, stream)


class _Trace:
    """
    What has come from one origin on one topic.

    `base` is the first number that was heard, until a beat has told what was before it, and `older`
    has those that came later than it. `missing` has when each was missed. Of those up to `told` a
    beat has said which went out.
    """

    __slots__ = ("base", "epoch", "last", "missing", "older", "told")

    def __init__(self, epoch: int, last: int, base: int | None) -> None:
        self.epoch = epoch
        self.last = last
        self.told = 0
        self.base = base
        # Most have neither, and there may be one of these for each client.
        self.older: set[int] | None = None
        self.missing: dict[int, float] | None = None

    def takes_late(self, number: int) -> bool:
        """Take a number that is behind; return False for one that has come before."""
        if self.base is None or number >= self.base:
            return self.finds(number)
        if self.older is None:
            self.older = set()
        if number in self.older or len(self.older) >= _MAX_MISSING:
            return False
        self.older.add(number)
        return True

    def finds(self, number: int) -> bool:
        """Miss `number` no more; return False if it was not missed."""
        return self.missing is not None and self.missing.pop(number, None) is not None

    def finds_run(self, start: int, stop: int) -> None:
        """Miss none of the numbers from `start` on and before `stop`."""
        missing = self.missing or {}
        run = range(max(start, 0), stop)
        for number in run if stop - start < len(missing) else [n for n in missing if n in run]:
            missing.pop(number, None)


class Reception:
    """
    What has come in, and what has not. Belongs to one thread.

    A number is lost once it has been missing for `grace` seconds; of an origin that beats, a beat
    must have told since that it went out, for the carrier may have refused it. The first that is
    heard of an origin on a topic tells nothing of those before it, as they may be older than the
    subscription: of those the beat tells, to whoever has been subscribed for long enough.
    """

    def __init__(self, now: Callable[[], float], grace: float) -> None:
        self._now = now
        self._grace = grace
        self._traces: dict[str, dict[str, _Trace]] = {}
        # Those that miss something, with their topics and whether their origins beat.
        self._gaping: dict[_Trace, tuple[str, bool]] = {}
        self._beating: dict[str, None] = {}
        self._lost: dict[str, int] = {}
        self._young: deque[set[str]] = deque([set()], maxlen=_YOUNG)  # a set for each grace
        self._aged = now()
        self.late = 0

    def subscribed(self, topics: Iterable[str]) -> None:
        self._young[-1].update(topics)

    def unsubscribed(self, topics: Iterable[str]) -> None:
        for topic in topics:
            for trace in self._traces.pop(topic, _NO_TRACES).values():
                self._gaping.pop(trace, None)
            self._lost.pop(topic, None)

    def received(self, topic: str, stamp: Stamp) -> bool:
        """Take note of a message; return False for one that has come before."""
        origin, epoch, number, skipped = stamp
        trace = self._traces.get(topic, _NO_TRACES).get(origin)
        if trace is None:
            self._add(topic, origin, _Trace(epoch, number, number))
        elif epoch != trace.epoch:
            if epoch > trace.epoch:
                self._begin_epoch(topic, trace, epoch)
                self._come_to(topic, origin, trace, number, skipped)
        elif number == trace.last + 1:
            trace.last = number
        elif number > trace.last:
            self._come_to(topic, origin, trace, number, skipped)
        elif trace.takes_late(number):
            self.late += 1
        else:
            return False
        return True

    def told(self, origin: str, tails: Iterable[Any], follows: Callable[[str], bool]) -> None:
        """
        Be told by a beat what its origin has published; of topics that `follows()` is true for.

        Skip what is not well-formed.
        """
        self._beating[origin] = None
        if len(self._beating) > _MAX_ORIGINS:
            del self._beating[next(iter(self._beating))]
        for tail in tails:
            match tail:
                case [str(topic), int(epoch), int(before), int(settled), list(failed)]:
                    if follows(topic):
                        self._take_tail(topic, origin, epoch, before, settled, failed)

    def lost(self) -> dict[str, int]:
        """Return how many are lost since the last time, by topic. To be called once a beat."""
        now = self._now()
        # Not by the clock alone: where this process stood still, there are old beats to be heard.
        if now >= self._aged + self._grace:
            self._aged = now
            self._young.append(set())
        before, long_before = now - self._grace, now - _PATIENCE * self._grace
        for trace, (topic, beats) in list(self._gaping.items()):
            missing, told = trace.missing or {}, trace.told
            gone = [
                number
                for number, since in missing.items()
                if since <= (before if number <= told or not beats else long_before)
            ]
            for number in gone:
                del missing[number]
            self._lose(topic, len(gone))
            if not missing:
                trace.missing = None
                del self._gaping[trace]
        lost, self._lost = self._lost, {}
        return lost

    def _add(self, topic: str, origin: str, trace: _Trace) -> None:
        traces = self._traces.setdefault(topic, {})
        if len(traces) >= _MAX_ORIGINS:
            self._gaping.pop(traces.pop(next(iter(traces))), None)
        traces[origin] = trace

    def _take_tail(
        self, topic: str, origin: str, epoch: int, before: int, settled: int, failed: list[Any]
    ) -> None:
        trace = self._traces.get(topic, _NO_TRACES).get(origin)
        young = any(topic in topics for topics in self._young)
        if trace is None:
            trace = _Trace(epoch, settled if young else before, None)
            self._add(topic, origin, trace)
        elif epoch < trace.epoch:
            return
        elif epoch > trace.epoch:
            self._begin_epoch(topic, trace, epoch)
        elif trace.base is not None:
            if not young:
                self._miss(topic, origin, trace, before + 1, trace.base)
                for number in trace.older or ():
                    trace.finds(number)
            trace.base = trace.older = None
        if settled > trace.last:
            self._miss(topic, origin, trace, trace.last + 1, settled + 1)
            trace.last = settled
        trace.told = settled
        for run in failed:  # which may be anything
            match run:
                case [int(start), int(stop)]:
                    trace.finds_run(start, stop)

    def _begin_epoch(self, topic: str, trace: _Trace, epoch: int) -> None:
        trace.epoch, trace.last, trace.base, trace.told = epoch, 0, None, 0
        self._lose(topic, len(trace.missing or ()))  # which cannot be told from the new epoch's
        trace.missing = None

    def _come_to(self, topic: str, origin: str, trace: _Trace, number: int, skipped: int) -> None:
        self._miss(topic, origin, trace, trace.last + 1, number - skipped)
        trace.last = number

    def _miss(self, topic: str, origin: str, trace: _Trace, first: int, end: int) -> None:
        """Miss the numbers from `first` on and before `end`."""
        surplus = max(end - first - _MAX_MISSING, 0)
        self._lose(topic, surplus)
        if end > first + surplus:
            if trace.missing is None:
                trace.missing = {}
            trace.missing.update(dict.fromkeys(range(first + surplus, end), self._now()))
            self._gaping[trace] = (topic, origin in self._beating)

    def _lose(self, topic: str, count: int) -> None:
        if count:
            self._lost[topic] = self._lost.get(topic, 0) + count


_NO_TRACES: dict[str, _Trace] = {}
