"""Who may open a session: limits of how many there are, and of how fast they come."""

from collections import Counter
from collections.abc import Callable, Hashable, Sized
from dataclasses import dataclass
from http import HTTPStatus

from ..protocol.engineio import ErrorCode
from .buckets import Buckets, Rate
from .http import Refused

_RETRY_AFTER = 5
"""Seconds after which whoever is refused may try again."""

_ALL = None
"""The key of the one bucket that all handshakes share."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """None is no limit. Rates are of handshakes."""

    connections: int | None = None
    per_address: int | None = None
    per_user: int | None = None
    rate: Rate | None = None
    rate_per_address: Rate | None = None


class Admission:
    """
    Count those who are in by address and user, as far as there are limits for it.

    Those who are `inside`, of two kinds, are all that there are.
    """

    def __init__(
        self, limits: AdmissionLimits, inside: tuple[Sized, Sized], now: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._open, self._closing = inside
        self._now = now
        self._rate = Buckets(limits.rate) if limits.rate else None
        self._rates = Buckets(limits.rate_per_address) if limits.rate_per_address else None
        self._addresses: Counter[str] = Counter()
        self._users: Counter[str] = Counter()
        self._inside: dict[Hashable, tuple[str, str | None]] = {}

    def check(self) -> None:
        """Raise `Refused` if nobody can be admitted now."""
        self._check_room()
        if self._rate is not None and not self._rate.has(_ALL, self._now()):
            raise _refused("HANDSHAKE_RATE", "too many handshakes at once", _BUSY)

    def _check_room(self) -> None:
        limit = self._limits.connections
        if limit is not None and len(self._open) + len(self._closing) >= limit:
            raise _refused("MAX_CONNECTIONS", "the server is full", _BUSY)

    def check_place(self, address: str, user: str | None) -> None:
        """Raise `Refused` if there is no place for one more from `address`, or of `user`."""
        self._check_room()
        limits = self._limits
        if limits.per_address is not None and self._addresses[address] >= limits.per_address:
            raise _refused("MAX_CONNECTIONS_PER_ADDRESS", "too many connections of one address")
        if user is not None and limits.per_user is not None:
            if self._users[user] >= limits.per_user:
                raise _refused("MAX_CONNECTIONS_PER_USER", "too many connections of one user")

    def admit(self, address: str, user: str | None) -> None:
        """Raise `Refused`, or count a handshake."""
        self.check_place(address, user)
        now = self._now()
        # First the address's own, or who is over that would use up what is for all.
        if self._rates is not None and not self._rates.spend(address, now):
            raise _refused("HANDSHAKE_RATE_PER_ADDRESS", "too many handshakes of one address")
        if self._rate is not None and not self._rate.spend(_ALL, now):
            raise _refused("HANDSHAKE_RATE", "too many handshakes at once", _BUSY)

    def entered(self, who: Hashable, address: str, user: str | None) -> None:
        """Be told that `who` was let in."""
        limits = self._limits
        if limits.per_address is None and limits.per_user is None:
            return
        self._inside[who] = address, user
        self._addresses[address] += 1
        if user is not None:
            self._users[user] += 1

    def left(self, who: Hashable) -> None:
        """Be told that `who` is gone; twice is fine."""
        if who not in self._inside:
            return
        address, user = self._inside.pop(who)
        _subtract(self._addresses, address)
        if user is not None:
            _subtract(self._users, user)


_BUSY = HTTPStatus.SERVICE_UNAVAILABLE


def _subtract(counter: Counter[str], key: str) -> None:
    """Count one less, and keep nothing of whoever has none."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _refused(limit: str, hint: str, status: HTTPStatus = HTTPStatus.TOO_MANY_REQUESTS) -> Refused:
    return Refused(ErrorCode.FORBIDDEN, hint, status, limit=limit, retry_after=_RETRY_AFTER)
