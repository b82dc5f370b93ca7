"""
The tasks of Celery in this process, without a worker; tests_cluster.py has a real one.
"""

import time
from contextlib import contextmanager
from datetime import timedelta
from unittest import SkipTest, mock

from django.core.exceptions import ValidationError
from django.utils import timezone

from chat import events
from chat.tests import Client, RoomCase, connected, recorded_broadcasts
from django_socketio import BackendError, NoSocket

try:
    from project.celery import app

    from chat import tasks
except ImportError as missing:
    raise SkipTest(f"for want of celery ({missing})") from None


@contextmanager
def settings(**values):
    """Have Celery run with these settings."""
    before = {name: app.conf[name] for name in values}
    app.conf.update(values)
    try:
        yield
    finally:
        app.conf.update(before)


class AnnounceTests(RoomCase):
    def announce(self):
        return tasks.announce.apply(("tea-time", "Hello"))

    def test_it_is_heard(self):
        with recorded_broadcasts() as broadcast:
            self.assertIs(self.announce().get(), True)
        message = self.room.messages.get()
        broadcast.assert_called_once_with(message.payload(), "room-tea-time")
        self.assertEqual((message.name, message.text), ("", "Hello"))

    def test_that_nobody_is_there_is_no_failure(self):
        self.assertIs(self.announce().get(), False)
        self.assertEqual(self.room.messages.get().text, "Hello")

    def test_it_is_tried_again_while_the_carrier_is_down(self):
        with recorded_broadcasts() as broadcast:
            broadcast.side_effect = [BackendError("Redis is down."), BackendError("Still."), None]
            self.announce()
        self.assertEqual(broadcast.call_count, 3)
        self.assertEqual(self.room.messages.count(), 1)

    def test_in_the_end_it_fails(self):
        with recorded_broadcasts() as broadcast:
            broadcast.side_effect = BackendError("Redis is down.")
            self.announce()
        self.assertEqual(broadcast.call_count, 1 + tasks.announce.max_retries)


class Clock:
    """Time that passes while somebody sleeps, and `cost` seconds in each `emit()`."""

    def __init__(self):
        self.now = time.time()
        self.cost = 0.0
        self.outcomes = []
        self.heard = []
        self.naps = []

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds

    def emit(self, event, data, *, channel):
        self.now += self.cost
        if self.outcomes and (outcome := self.outcomes.pop(0)):
            raise outcome
        self.heard.append((round(self.now), event, data["left"], channel))


class CountdownTests(RoomCase):
    def setUp(self):
        self.clock = Clock()
        for name in ("time", "sleep", "emit"):
            self.enterContext(mock.patch(f"chat.tasks.{name}", getattr(self.clock, name)))

    def count(self, seconds, late=0.0):
        until = timezone.now() + timedelta(seconds=seconds)
        self.clock.now = until.timestamp() - seconds + late
        tasks.countdown("tea-time", "Ada", until.isoformat())
        return [left for _, _, left, _ in self.clock.heard]

    def test_every_second(self):
        self.assertEqual(self.count(3), [3, 2, 1, 0])
        first, *others = self.clock.heard
        self.assertEqual(first[1::2], ("countdown", "room-tea-time"))
        self.assertEqual([heard[0] - first[0] for heard in others], [1, 2, 3])

    def test_what_it_takes_to_say_it_does_not_add_up(self):
        self.clock.cost = 0.2
        self.assertEqual(self.count(10), list(range(10, -1, -1)))
        self.assertLess(max(self.clock.naps), 0.9)

    def test_a_late_start_leaves_out_the_beginning(self):
        self.assertEqual(self.count(10, late=6.1), [4, 3, 2, 1, 0])
        self.clock.heard.clear()
        self.assertEqual(self.count(10, late=20), [])

    def test_it_ends_when_nobody_listens(self):
        self.clock.outcomes = [None, NoSocket()]
        self.assertEqual(self.count(10), [10])

    def test_what_the_carrier_loses_is_not_said_later(self):
        self.clock.outcomes = [None, BackendError()]
        with self.assertLogs("chat.tasks", "WARNING"):
            self.assertEqual(self.count(4), [4, 2, 1, 0])


class StartTests(RoomCase):
    """From the browser's event to the broker."""

    def setUp(self):
        self.enterContext(self.settings(CELERY_BROKER_URL="any"))
        self.enterContext(connected("s1", "s2"))
        self.ada = Client("s1", self.room.channel)
        self.ada.join("Ada")

    def count(self, seconds=3):
        return self.ada(events.countdown, {"seconds": seconds})

    def test_a_task_is_sent(self):
        with mock.patch.object(tasks.countdown, "apply_async") as sent:
            self.assertEqual(self.count(), {"ok": True})
        ((room, name, until),) = sent.call_args.args
        self.assertEqual((room, name), ("tea-time", "Ada"))
        self.assertEqual(sent.call_args.kwargs["expires"].isoformat(), until)

    def test_a_second_one_has_to_wait(self):
        with mock.patch.object(tasks.countdown, "apply_async") as sent:
            self.count()
            answer = self.count()
        self.assertIn("a countdown in this room already", answer["error"])
        sent.assert_called_once()

    def test_the_broker_is_down(self):
        down = "redis://127.0.0.1:1/0"  # where nothing listens
        with (
            settings(broker_url=down, broker_read_url=down, broker_write_url=down),
            self.assertLogs("chat.tasks", "ERROR"),
        ):
            self.assertIn("did not start", self.count()["error"])
        self.room.refresh_from_db()
        self.assertIsNone(self.room.counting_until)
        with self.assertRaisesMessage(ValidationError, "already"):
            self.room.begin_countdown(3)
            tasks.start_countdown(self.room, "Ada", 3)
