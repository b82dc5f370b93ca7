"""
What clients that are behind do without: decided by whoever sends, counted by whoever delivers.

A message is volatile (a client that is behind does not get it), coalesces by a key (of those that
wait for a client the latest is enough), or neither: then what a client does not take in time ends
it. A call says so itself, or the channel does, by a rule of the setting `SOCKETIO_SLOW_CONSUMERS`.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

from .envelope import UNCOMPRESSED, VOLATILE

logger = logging.getLogger(__name__)

Manner = tuple[int, str]
"""The flags and the key of an envelope."""

_ORDINARY: Manner = (0, "")


class Delivery(TypedDict, total=False):
    """What a call that sends may say about the way: the keywords of all of them."""

    volatile: bool | None
    """A client that is behind does without it. None leaves that to the rule of its channel."""
    coalesce: str | None
    """A key: of those with it that wait for a client the latest is enough."""
    compress: bool
    """False has it stay as it is, whatever `SOCKETIO_COMPRESSION` says."""


POLICIES: dict[str, Manner] = {
    "disconnect": _ORDINARY,
    "volatile": (VOLATILE, ""),
    "coalesce": (0, "\0"),  # no key that a call could give
}

_MAX_KEY = 255
_MAX_CHANNELS = 1000
"""Channels whose rule is remembered, or whose drops are counted apart from all others'."""

_QUIET = 60.0
"""Seconds between two lines of the log about the drops of one channel."""


class Rules:
    """The policies of channels: pairs of a regular expression and a policy. The first counts."""

    def __init__(self, rules: Iterable[Sequence[str]] = ()) -> None:
        self._rules = [(re.compile(pattern), POLICIES[policy]) for pattern, policy in rules]
        self._known: dict[str, Manner] = {}

    def manner(
        self,
        volatile: bool | None = None,
        coalesce: str | None = None,
        channels: Iterable[str] = (),
        *,
        compress: bool = True,
    ) -> Manner:
        """
        Return how a message is to be sent: as the call says, or else as its channels are.

        Raise `ValueError` for what cannot be.
        """
        flags, key = self._manner(volatile, coalesce, channels)
        return (flags if compress else flags | UNCOMPRESSED), key

    def _manner(
        self, volatile: bool | None, coalesce: str | None, channels: Iterable[str]
    ) -> Manner:
        """Return what a client does that is behind. Channels that differ say nothing."""
        if coalesce is not None:
            if volatile:
                raise ValueError("A message is volatile or coalesces, not both.")
            return 0, check_key(coalesce)
        if volatile is not None:
            return (VOLATILE if volatile else 0), ""
        if not self._rules:
            return _ORDINARY
        manners = {self._of(channel) for channel in channels}
        return manners.pop() if len(manners) == 1 else _ORDINARY

    def _of(self, channel: str) -> Manner:
        manner = self._known.get(channel)
        if manner is None:
            found = (manner for pattern, manner in self._rules if pattern.match(channel))
            manner = next(found, _ORDINARY)
            if len(self._known) >= _MAX_CHANNELS:
                self._known.clear()
            self._known[channel] = manner
        return manner


def check_key(key: str) -> str:
    """Return the key if it can be one; raise `ValueError` if not."""
    if isinstance(key, str) and 0 < len(key) <= _MAX_KEY and key.isprintable():
        return key
    raise ValueError(f"coalesce= takes a printable string of 1 to {_MAX_KEY} characters.")


class Drops:
    """Count what clients did without, by channel, in `counters`; log it now and then."""

    def __init__(
        self, counters: Counter[str], describe: Callable[[str], str], now: Callable[[], float]
    ) -> None:
        self._counters = counters
        self._describe = describe
        self._now = now
        self._names: dict[tuple[str, str], str] = {}
        self._logs: dict[str, tuple[float, int]] = {}  # when and at which number the next is due

    def count(self, what: str, topic: str) -> None:
        """Count one message on a topic that a client did without, for being `what`."""
        name = self._names.get((what, topic)) or self._name(what, topic)
        self._counters[name] += 1
        due, logged = self._logs.get(name, (0.0, 0))
        now = self._now()
        if now >= due:
            number = self._counters[name]
            self._logs[name] = (now + _QUIET, number)
            what = name.removeprefix("dropped: ")
            logger.warning("Slow clients did without %d messages: %s", number - logged, what)

    def _name(self, what: str, topic: str) -> str:
        """Return the name of a counter, of which there are not more than a fixed number."""
        name = f"dropped: {what} {self._describe(topic)}"
        if name not in self._logs and len(self._logs) >= _MAX_CHANNELS:
            return f"dropped: {what} (other)"
        if len(self._names) < _MAX_CHANNELS:
            self._names[what, topic] = name
        return name
