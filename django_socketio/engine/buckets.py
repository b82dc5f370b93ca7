"""Token buckets: so many at once, and so many a second on average."""

from collections.abc import Hashable
from typing import NamedTuple

_MANY = 1024
"""Buckets from which on it is worth looking for those that are full again."""

_SLACK = 0.001
"""Tokens by which sums of times may be off."""


class Rate(NamedTuple):
    """`burst` tokens fit into a bucket, and `per_second` flow into it."""

    per_second: float
    burst: float


class Buckets:
    """
    A bucket for each key, made when it is first used.

    All that there is to know of one is when it will be full again. One that is full is as good as
    new and forgotten sooner or later, so there are about as many as keys that were used lately.
    """

    __slots__ = ("_full_at", "_rate", "_sweep_at")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._full_at: dict[Hashable, float] = {}
        self._sweep_at = _MANY

    def __len__(self) -> int:
        return len(self._full_at)

    def spend(self, key: Hashable, now: float) -> bool:
        """Take a token from the key's bucket; return False if it has none."""
        per_second, burst = self._rate
        full_at = max(self._full_at.get(key, 0.0), now) + 1 / per_second
        if (full_at - now) * per_second > burst + _SLACK:
            return False
        self._full_at[key] = full_at
        if len(self._full_at) >= self._sweep_at:
            self._sweep(now)
        return True

    def has(self, key: Hashable, now: float) -> bool:
        """Tell whether the key's bucket has a token."""
        per_second, burst = self._rate
        return (self._full_at.get(key, 0.0) - now) * per_second <= burst - 1 + _SLACK

    def forget(self, key: Hashable) -> None:
        self._full_at.pop(key, None)

    def _sweep(self, now: float) -> None:
        """Forget the full ones. Twice as many as are left are allowed before the next time."""
        self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        self._sweep_at = max(2 * len(self._full_at), _MANY)
