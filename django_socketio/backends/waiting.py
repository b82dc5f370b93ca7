"""
Waiting for one another, of greenlets, of hubs' threads and of threads without a hub.

The locks and events of gevent's patched `threading` are meant for the greenlets of one hub: a
thread of the system that waits for one is now and then forgotten. A native lock in their place
would stop all greenlets of the thread that waits for it. Where nobody has imported gevent it is
not needed here, either.
"""

import _thread
import sys
from collections.abc import Callable
from typing import Any

_monkey = sys.modules.get("gevent.monkey")

Mutex: Callable[[], Any] = (
    _monkey.get_original("_thread", "allocate_lock") if _monkey else _thread.allocate_lock
)
"""A native lock. Nothing that could switch to another greenlet may be done while holding it."""


def _current_hub() -> Any:
    """Return the hub of this thread, or None if it has none."""
    hubs = sys.modules.get("gevent._hub_local")
    return hubs.get_hub_if_exists() if hubs is not None else None


class Signal:
    """
    Something that happens once, for one greenlet or thread to wait for.

    Any thread may `set()` it, also before or after the wait.
    """

    __slots__ = ("_wake", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._wake: Callable[[], object] | None = None

    def set(self) -> None:
        # In this order, and the other one in `wait()`: so one of both sees what the other did.
        self.is_set = True
        if self._wake is not None:
            self._wake()

    def wait(self, seconds: float) -> bool:
        """Return whether it is set, `seconds` later at the most."""
        if not self.is_set:
            hub = _current_hub()
            if hub is None:
                self._wait_in_thread(seconds)
            else:
                self._wait_in_hub(hub, seconds)
        return self.is_set

    def _wait_in_thread(self, seconds: float) -> None:
        lock = Mutex()
        lock.acquire()
        self._wake = lock.release
        if not self.is_set:
            lock.acquire(timeout=max(seconds, 0))

    def _wait_in_hub(self, hub: Any, seconds: float) -> None:
        loop = hub.loop
        waiter = sys.modules["gevent._waiter"].Waiter(hub)  # it is there, as the hub is
        resume = waiter.switch

        def wake() -> None:
            if _current_hub() is hub:
                loop.run_callback(resume, None)
            elif hub.loop is not None:  # else its thread has ended, and whoever waited with it
                loop.run_callback_threadsafe(resume, None)

        timer = loop.timer(max(seconds, 0))
        try:
            self._wake = wake
            if not self.is_set:
                # This loop may not have looked at the clock for long: it runs for waits alone.
                timer.start(resume, None, update=True)
                waiter.get()
        finally:
            timer.close()
