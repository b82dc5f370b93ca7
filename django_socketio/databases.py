"""
Databases in handlers: connections go back as they do after a request, and there are only so many.

Django has a connection for each greenlet and each thread. So hundreds of handlers at once would be
hundreds of connections, of which a server allows few.
"""

import logging
import weakref
from collections.abc import Iterator
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, close_old_connections, connections, reset_queries
from django.db.backends.base.base import BaseDatabaseWrapper
from gevent import get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.lock import Semaphore

logger = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds that a connection may be waited for, as in the pool of psycopg."""

_SLOT = "_socketio_slot"
_IDLE = 0
"""The status of libpq for a connection in no transaction. One that is closed has another."""


# What brackets a handler


def begin() -> None:
    reset_queries()
    close_old_connections()


def finish() -> None:
    """Leave the next handler no connection but those that are as good as new."""
    for wrapper in connections.all(initialized_only=True):
        if wrapper.in_atomic_block or not _is_idle(wrapper.connection):
            # Django would not see it, and fail in this greenlet from now on.
            logger.error("A handler has left the database %r in the midst of it", wrapper.alias)
            wrapper.close()
            del connections[wrapper.alias]
    close_old_connections()


def _is_idle(connection: Any) -> bool:
    """Tell whether it waits for a query, as far as it says: psycopg and psycopg2 do."""
    info = getattr(connection, "info", None)
    return info is None or info.transaction_status == _IDLE


def begin_thread() -> None:
    """As `begin()`, with connections of its own: a pool's locks do not work between threads."""
    for alias in connections:
        wrapper = connections[alias]
        options = wrapper.settings_dict["OPTIONS"]
        if "pool" in options:
            own = {name: value for name, value in options.items() if name != "pool"}
            wrapper.settings_dict = {**wrapper.settings_dict, "OPTIONS": own}
    begin()


def finish_thread() -> None:
    """Leave no connection: nobody knows when the thread works again."""
    finish()
    connections.close_all()


# Which drivers wait as greenlets do


def blocking_drivers() -> Iterator[str]:
    """Yield a sentence for each database of the project whose driver blocks the hub."""
    for alias in connections:
        try:
            wrapper: Any = connections[alias]
            driver = wrapper.Database
        except (AttributeError, ImproperlyConfigured):
            continue  # Django says what there is to say about it
        name = driver.__name__
        if name == "MySQLdb":
            yield (
                f"The database {alias!r} is reached by mysqlclient, which blocks all clients for"
                " each query: use PyMySQL, or threaded=True for handlers with slow ones."
            )
        elif name == "psycopg2" and driver.extensions.get_wait_callback() is None:
            yield (
                f"The database {alias!r} is reached by psycopg2, which blocks all clients for each"
                " query: use psycopg 3, or call psycogreen.gevent.patch_psycopg()."
            )


# How many there are


class ConnectionLimit:
    """
    At most `limit` connections to each database, in all greenlets of the hub that makes it.

    Whoever wants one more waits for one that is closed; after `patience` seconds it is an
    `OperationalError`. Threads are not counted: their number is a limit of its own.
    """

    def __init__(self, limit: int, patience: float = _PATIENCE) -> None:
        self._limit = limit
        self._patience = patience
        self._hub = get_hub()
        self._free: dict[str, Semaphore] = {}
        self._connect, self._close = BaseDatabaseWrapper.connect, BaseDatabaseWrapper.close

    def install(self) -> None:
        """Take part in what Django does for a connection: it has a signal for afterwards only."""
        limit = self

        def connect(self: BaseDatabaseWrapper) -> None:
            limit.connect(self)

        def close(self: BaseDatabaseWrapper) -> None:
            limit.close(self)

        BaseDatabaseWrapper.connect = connect  # type: ignore[method-assign]
        BaseDatabaseWrapper.close = close  # type: ignore[method-assign]

    def uninstall(self) -> None:
        BaseDatabaseWrapper.connect = self._connect  # type: ignore[method-assign]
        BaseDatabaseWrapper.close = self._close  # type: ignore[method-assign]

    def connect(self, wrapper: BaseDatabaseWrapper) -> None:
        if get_hub_if_exists() is self._hub and _SLOT not in vars(wrapper):
            self._take_slot(wrapper)
        try:
            self._connect(wrapper)
        except BaseException:
            _free_slot(wrapper)
            raise

    def close(self, wrapper: BaseDatabaseWrapper) -> None:
        try:
            self._close(wrapper)
        finally:
            if wrapper.connection is None or wrapper.closed_in_transaction:
                _free_slot(wrapper)

    def _take_slot(self, wrapper: BaseDatabaseWrapper) -> None:
        free = self._free.setdefault(wrapper.alias, Semaphore(self._limit))
        if not free.acquire(timeout=self._patience):
            raise OperationalError(
                f"None of {self._limit} connections to the database {wrapper.alias!r} became free"
                f" in {self._patience:g} seconds (SOCKETIO_MAX_DATABASE_CONNECTIONS)."
            )
        # A greenlet may end without closing its connection, which goes when it is collected.
        slot = weakref.finalize(wrapper, free.release)
        slot.atexit = False
        setattr(wrapper, _SLOT, slot)


def _free_slot(wrapper: BaseDatabaseWrapper) -> None:
    slot = vars(wrapper).pop(_SLOT, None)
    if slot is not None:
        slot()
