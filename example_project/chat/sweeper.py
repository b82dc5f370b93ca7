"""
Sees to those who left without a word: their worker was killed, and ran no handler.

Every worker looks after the people of all workers, for any other may be the
one that is killed. It takes one question to all of them each time, and none
while nobody has a name.
"""

import logging

import gevent
from django.db import connections

from chat.models import PEOPLE, Presence
from django_socketio import BackendError, broadcast_channel, members

INTERVAL = 3.0  # seconds

logger = logging.getLogger(__name__)
_greenlet = None


def watch():
    """Begin to sweep in this process, and go on for as long as it lives."""
    global _greenlet
    if _greenlet is None:
        _greenlet = gevent.spawn(_sweep_for_ever)


def _sweep_for_ever():
    suspects = set()
    while True:
        try:
            suspects = sweep(suspects)
        except BackendError:
            suspects = set()  # who has a socket is not to be known just now
        except Exception:
            logger.exception("The sweep failed")
        finally:
            # A greenlet's connections are its own, and nobody else closes them.
            connections.close_all()
        gevent.sleep(INTERVAL)


def sweep(suspects):
    """
    End the presences without a socket that are among the suspects; return the new suspects.

    Twice without a socket is what it takes: a worker that comes back to the
    carrier a moment after this one, or that was too busy to answer, still has its
    people. Should one of them be ended all the same, their browser hears that
    they left, and joins again.
    """
    presences = list(Presence.objects.select_related("room"))
    if not presences:
        return set()
    here = members(PEOPLE)
    missing = [presence for presence in presences if presence.session_id not in here]
    gone = [presence for presence in missing if presence.session_id in suspects]
    # Other workers sweep as well: end() is true for one of them.
    for room in {presence.room for presence in gone if presence.end(broadcast_channel)}:
        room.tell_lobby()
    return {presence.session_id for presence in missing} - {each.session_id for each in gone}
