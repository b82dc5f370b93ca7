"""What this process tells the project of by Django's signals."""

from collections import deque
from typing import Any

import gevent
from django.db import close_old_connections
from django.dispatch import Signal

from .backends import BaseBackend
from .gaps import Gap

__all__ = ["Gap", "backend_gap"]

backend_gap = Signal()
"""
Messages of other processes, or of this one, may not have come here; the sender is the backend's
class. Receivers run one after the other in a greenlet of their own.

`gaps` is a list of `Gap(namespace, channel, session_id, lost)`, with `channel` and `session_id`
None for what was for all, and `lost` their sum: so many were published and did not come. After an
outage of the backend `gaps` is empty, `lost` is None, and `interrupted` the number of seconds, else
None: that something was lost at the end of a channel's messages may be known by that alone.
"""

_MAX_WAITING = 1000
"""Calls that wait for receivers that take their time; of more the oldest are dropped."""


class GapTeller:
    """Tell the receivers of `backend_gap`, never two at once, in a greenlet of their own."""

    def __init__(self, backend: BaseBackend) -> None:
        self._sender = type(backend)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MAX_WAITING)
        self._busy = False

    def __call__(self, gaps: list[Gap], interrupted: float | None) -> None:
        lost = sum(gap.lost for gap in gaps) if interrupted is None else None
        self._waiting.append({"gaps": gaps, "lost": lost, "interrupted": interrupted})
        if not self._busy:
            self._busy = True
            gevent.spawn(self._tell)

    def _tell(self) -> None:
        try:
            while self._waiting:
                close_old_connections()
                backend_gap.send_robust(self._sender, **self._waiting.popleft())
        finally:
            self._busy = False
            close_old_connections()
