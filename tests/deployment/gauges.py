"""What a worker holds, and how late its hub is: measured from inside."""

import gc
from time import monotonic

import gevent
from django.http import JsonResponse
from greenlet import greenlet

from django_socketio import runtime

_PERIOD = 0.1


class Lag:
    """How much later than asked a sleep ends: the worst since it was last asked."""

    def __init__(self):
        self._worst = 0.0
        self._greenlet = None

    def take(self):
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self._run)
        worst, self._worst = self._worst, 0.0
        return worst

    def _run(self):
        while True:
            due = monotonic() + _PERIOD
            gevent.sleep(_PERIOD)
            self._worst = max(self._worst, monotonic() - due)


_lag = Lag()


def view(request):
    """Answer with the gauges. Greenlets take long to count: `?greenlets` asks for them."""
    dispatcher = runtime.get_dispatcher()
    engine, hub = dispatcher.engine, dispatcher.hub
    sessions = list(engine.sessions.values())
    gauges = {
        "lag": _lag.take(),
        # One whose client has closed is kept for a GET that may have crossed that on its way.
        "sessions": sum(session.reason is None for session in sessions),
        "queued": sum(session.transport.waiting for session in sessions),
        "topics": len(hub._members),
        "counters": {**engine.counters, **hub.counters, **getattr(hub.backend, "counters", {})},
    }
    if "greenlets" in request.GET:
        gc.collect()
        gauges["greenlets"] = sum(
            isinstance(item, greenlet) and not item.dead for item in gc.get_objects()
        )
    return JsonResponse(gauges)
