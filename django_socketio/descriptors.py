"""File descriptors: as many as the connections need, and no more connections than there are."""

import logging
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

logger = logging.getLogger(__name__)

_RESERVE = 1024
"""Descriptors for all that is no session: requests, the backend, databases, files."""


def make_room(connections: int) -> int:
    """
    Let this process open the descriptors of so many connections; return how many it can have.

    Raises the soft limit as far as is needed, and as the hard one allows.
    """
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = connections + _RESERVE
    if soft != RLIM_INFINITY and soft < wanted:
        soft = _raise(soft, wanted if hard == RLIM_INFINITY else min(wanted, hard), hard)
    if soft == RLIM_INFINITY or soft >= wanted:
        return connections
    room = min(connections, soft - min(_RESERVE, soft // 4))
    logger.warning(
        "This process may open %d files (ulimit -n), so it takes %d connections, not"
        " SOCKETIO_MAX_CONNECTIONS = %d",
        soft,
        room,
        connections,
    )
    return room


def _raise(soft: int, wanted: int, hard: int) -> int:
    if wanted <= soft:
        return soft
    try:
        setrlimit(RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # there are systems with a limit beside these
        logger.info("The limit of open files stays at %d: %s", soft, error)
        return soft
    return wanted
