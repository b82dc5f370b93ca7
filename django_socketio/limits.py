"""What one client may do to the application: how much of everything, and how fast."""

from collections.abc import Hashable
from dataclasses import dataclass
from time import monotonic

from .engine import Buckets, Rate
from .protocol import socketio


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit. Rates are of events; `channels` is for each socket."""

    packet: socketio.Limits = socketio.Limits()
    channels: int = 1024
    namespaces: int = 32
    event_rate: Rate | None = None
    event_rate_per_user: Rate | None = None

    @property
    def of_events(self) -> bool:
        """Tell whether there is any limit of how fast events may come."""
        return self.event_rate is not None or self.event_rate_per_user is not None


DEFAULTS = Limits()


class EventRates:
    """Watches how fast the events of each connection, and those of each user, come."""

    def __init__(self, limits: Limits) -> None:
        per_user = limits.event_rate_per_user
        self._connections = Buckets(limits.event_rate) if limits.event_rate else None
        self._users = Buckets(per_user) if per_user else None

    def exceeded(self, connection: Hashable, user: str) -> str:
        """
        Count an event; return the name of the limit that it is over, or nothing.

        `user` is empty for whom nobody knows.
        """
        now = monotonic()
        if self._connections is not None and not self._connections.spend(connection, now):
            return "EVENT_RATE"
        if self._users is not None and user and not self._users.spend(user, now):
            return "EVENT_RATE_PER_USER"
        return ""

    def forget(self, connection: Hashable) -> None:
        """Be told that a connection is gone."""
        if self._connections is not None:
            self._connections.forget(connection)
