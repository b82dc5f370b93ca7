"""
Handlers in threads: what `threaded=True` asks for, and what a socket is there.

A runner waits for the thread as for anything else, so the events of a connection keep their order.
All that belongs to the hub is done on the hub: a thread that wants it done waits for that. So is
what a thread logs: the locks of the log are gevent's, and do not work between threads.
"""

import logging
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any, NamedTuple

from gevent import get_hub, spawn
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original
from gevent.threadpool import ThreadPool

from .sockets import Socket

_IDLE = 60
"""Seconds after which a thread without work ends."""

_allocate_lock = get_original("_thread", "allocate_lock")


class Threads:
    """
    At most `size` threads, which begin when they are needed. Belongs to the thread of the hub.

    `before` and `after` bracket each call, in its thread: connections to databases are a thread's.
    """

    def __init__(self, size: int, *, before: Callable[[], None], after: Callable[[], None]) -> None:
        # Not the hub's own, where names are looked up: they would wait for handlers.
        self._pool = ThreadPool(size, idle_task_timeout=_IDLE)
        self._before = before
        self._after = after
        self._log: list[_LogOnHub] | None = None

    @property
    def busy(self) -> int:
        """How many handlers run in threads, or wait for one."""
        return len(self._pool)

    def run(self, function: Callable[..., Any], request: Any, socket: Socket, *args: Any) -> Any:
        """Call a handler in a thread, wait for it, and return or raise what it does."""
        if self._log is None:
            self._log = [_LogOnHub(handler) for handler in _log_handlers()]
        work = partial(function, request, ThreadedSocket(socket), *args)
        outcome: Any = self._pool.spawn(self._call, work).get()
        return outcome.get()

    def _call(self, work: Callable[[], Any]) -> "_Outcome":
        outcome = _attempt(self._before)
        if outcome.error is None:
            outcome = _attempt(partial(Context().run, work))
        after = _attempt(self._after)
        return outcome if outcome.error is not None or after.error is None else after

    def stop(self) -> None:
        """Take no more work; a thread that works ends after it."""
        self._pool.maxsize = 0
        self._pool.fork_watcher.close()
        for each in self._log or ():
            each.remove()


class ThreadedSocket:
    """
    A Socket, for a handler that runs in a thread.

    It has all that the Socket has. A method runs in a greenlet of the hub; the thread waits for its
    end, and gets what it returns or raises.
    """

    __slots__ = ("_hub", "_socket")

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._hub = get_hub()

    def __repr__(self) -> str:
        return repr(self._socket)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._socket, name)
        return partial(self._on_hub, value) if callable(value) else value

    def _on_hub(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if get_hub_if_exists() is self._hub:  # a handler that is not threaded has come by it
            return method(*args, **kwargs)
        errand = _Errand(partial(method, *args, **kwargs))
        self._hub.loop.run_callback_threadsafe(spawn, errand.do)
        return errand.wait()


class _Outcome(NamedTuple):
    """What a call has returned or raised, on its way between threads."""

    value: Any
    error: BaseException | None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def _attempt(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work(), None)
    except BaseException as error:  # whoever waits for it decides
        return _Outcome(None, error)


class _Errand:
    """Work of which a thread wants to know the outcome, and waits as threads do."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._outcome: _Outcome | None = None
        self._done = _allocate_lock()
        self._done.acquire()

    def do(self) -> None:
        try:
            self._outcome = _attempt(self._work)
        finally:
            self._done.release()

    def wait(self) -> Any:
        self._done.acquire()
        assert self._outcome is not None
        return self._outcome.get()


class _LogOnHub(logging.Filter):
    """A filter that takes what a thread logs out of its hands: the hub gives it to the handler."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._hub = get_hub()
        handler.addFilter(self)

    def remove(self) -> None:
        self._handler.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        here = get_hub_if_exists() is self._hub
        if not here:
            self._hub.loop.run_callback_threadsafe(spawn, self._handler.handle, record)
        return here


def _log_handlers() -> set[logging.Handler]:
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    return {handler for each in [logging.root, *loggers] for handler in each.handlers}
