"""
What runs in a Celery worker and speaks to the rooms from there.

The functions of django-socketio are the same in every process. They need no socket and no event
loop, they raise NoSocket if nobody is there to hear, and BackendError if the carrier is down.
"""

import logging
import uuid
from datetime import datetime
from time import sleep, time

from celery import shared_task
from django.core.exceptions import ValidationError
from kombu.exceptions import OperationalError

from chat.models import Room
from django_socketio import BackendError, NoSocket, emit

logger = logging.getLogger(__name__)


@shared_task(bind=True, autoretry_for=(BackendError,), retry_backoff=True, max_retries=6)
def announce(self, room, text):
    """
    Say it to the room of that slug, as the system; return whether anybody heard it.

    That nobody is there is no failure: it is in the history. If the carrier is down it is tried
    again, after up to 1, 2, 4 … seconds. It is in the history once all the same, for the id of the
    task stays what it was.
    """
    try:
        Room.objects.get(slug=room).announce(text, nonce=uuid.UUID(self.request.id))
    except NoSocket:
        return False
    return True


def start_countdown(room, name, seconds):
    """Have a worker count down in the room, one countdown at a time; or raise ValidationError."""
    until = room.begin_countdown(seconds)
    if until is None:
        raise ValidationError("There is a countdown in this room already.")
    try:
        # Nobody wants to hear of it afterwards.
        countdown.apply_async((room.slug, name, until.isoformat()), expires=until)
    except OperationalError as error:
        logger.error("Celery's broker is down: %s", error)
        room.forget_countdown()
        raise ValidationError("The countdown did not start. Please try again.") from None


@shared_task
def countdown(room, name, until):
    """Tell the room of that slug the seconds until then, one by one: 3… 2… 1… go."""
    end = datetime.fromisoformat(until).timestamp()
    channel = Room(slug=room).channel
    while (left := round(end - time())) >= 0:
        try:
            emit("countdown", {"left": left, "name": name}, channel=channel)
        except NoSocket:
            return  # nor will anybody hear the rest
        except BackendError as error:
            logger.warning("%s did not hear that %d seconds are left: %s", room, left, error)
        if left == 0:
            return
        sleep(max(0, end - (left - 1) - time()))
