"""Of what waits for one client, the latest of each key."""

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

_FEW = 32
"""Holes, and keys of what has left, that are not worth the work of closing them."""


class Latest(Generic[T]):
    """
    Have one of each key in a list of what waits.

    A later one takes its place behind all others, so that nothing overtakes anything, and leaves
    `hole` where the earlier one was. What has no attribute `key` is left alone. Whoever takes
    `count` items off the front says so with `removed(count)`.
    """

    __slots__ = ("_base", "_hole", "_holes", "_items", "_places")

    def __init__(self, items: list[T], hole: T) -> None:
        self._items = items
        self._hole = hole
        self._holes = 0
        self._base = 0  # of the places: how many items have been removed from the front
        self._places: dict[Hashable, int] = {}

    def index(self, start: int = 0) -> list[T]:
        """Make holes of all but the latest of each key, from `start` on; return what was there."""
        found = []
        for place in range(start, len(self._items)):
            key = getattr(self._items[place], "key", None)
            if key is not None:
                earlier = self._places.get(key)
                if earlier is not None:
                    found.append(self._make_hole(earlier - self._base))
                self._places[key] = place + self._base
        return found

    def append(self, item: T, key: Hashable, start: int = 0) -> list[T]:
        """Append; return those that this makes holes of, which stand at `start` or behind."""
        place = self._places.get(key, -1) - self._base
        found = [self._make_hole(place)] if place >= start else []
        wasted = self._holes + max(len(self._places) - len(self._items), 0)
        if wasted > _FEW and 2 * wasted > len(self._items):
            found += self._close_holes(start)
        self._places[key] = len(self._items) + self._base
        self._items.append(item)
        return found

    def removed(self, count: int) -> None:
        self._base += count

    def _make_hole(self, place: int) -> T:
        earlier, self._items[place] = self._items[place], self._hole
        self._holes += 1
        return earlier

    def _close_holes(self, start: int) -> list[T]:
        """Keep the list short, however often a key is sent, and the places of what is in it."""
        kept = [item for item in self._items[start:] if item is not self._hole]
        self._items[start:] = kept
        self._holes = 0
        self._places.clear()
        return self.index(start)
