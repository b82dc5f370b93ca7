import re
import uuid
from contextlib import suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path
from unittest import mock

from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.core.management import CommandError, call_command
from django.test import SimpleTestCase, TestCase
from django.urls import reverse

from chat import events, sweeper
from chat.avatars import HUES, avatar
from chat.forms import JoinForm, MessageForm, RoomForm
from chat.models import HISTORY, LOBBY, PEOPLE, NameTaken, Presence, Room, lobby_cards
from django_socketio import BackendError, NoSocket

SCRIPT = "<script>alert(1)</script>"


def connected(*session_ids):
    """Let these be the sockets that have a name."""
    return mock.patch("chat.models.members", return_value=set(session_ids))


def recorded_broadcasts():
    """Let somebody be there to hear what is said out of band."""
    return mock.patch("chat.models.broadcast_channel")


class RoomCase(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.room = Room.objects.create(name="Tea time", slug="tea-time")


class AvatarTests(SimpleTestCase):
    def test_initials_are_letters_of_the_first_and_the_last_word(self):
        names = {"ada": "A", "Ada King Lovelace": "AL", "<b>世界</b> !": "B", "": ""}
        for name, initials in names.items():
            with self.subTest(name):
                self.assertEqual(avatar(name)["initials"], initials)

    def test_one_colour_whatever_the_case(self):
        self.assertEqual(avatar("ADA")["hue"], avatar("ada")["hue"])
        self.assertIn(avatar("Ada")["hue"], range(HUES))


class RoomFormTests(RoomCase):
    def test_the_slug_is_made_of_the_name(self):
        for name, slug in {"  Late   Night ": "late-night", "世界": "世界"}.items():
            with self.subTest(name):
                self.assertEqual(RoomForm({"name": name}).save().slug, slug)

    def test_what_is_refused(self):
        errors = {
            "": "needs a name",
            "!?": "at least one letter or digit",
            "TEA Time": "already a room of that name",
            "a\u202eb": "visible characters",
            "x" * 41: "at most 40",
        }
        for name, error in errors.items():
            with self.subTest(name):
                self.assertIn(error, str(RoomForm({"name": name}).errors))

    def test_a_room_that_is_renamed_keeps_its_address(self):
        room = RoomForm({"name": "Coffee time"}, instance=self.room).save()
        self.assertEqual(str(room), "Coffee time")
        self.assertEqual(room.get_absolute_url(), "/rooms/tea-time/")


class JoinFormTests(SimpleTestCase):
    def test_spaces_and_compatible_characters_are_folded(self):
        form = JoinForm({"name": " \uff21da \t L "})
        self.assertTrue(form.is_valid())
        self.assertEqual(form.cleaned_data, {"name": "Ada L"})

    def test_what_is_refused(self):
        for name in ("", " ", "x" * 25, "a\u200bb", "a\x00b"):
            with self.subTest(name):
                self.assertFalse(JoinForm({"name": name}).is_valid())


class MessageFormTests(SimpleTestCase):
    def test_limits(self):
        nonce = str(uuid.uuid4())
        for text, valid in {"a\nb": True, " \n ": False, "x" * 2001: False}.items():
            with self.subTest(text[:10]):
                form = MessageForm({"text": text, "nonce": nonce})
                self.assertEqual(form.is_valid(), valid)
        self.assertFalse(MessageForm({"text": "a", "nonce": "b"}).is_valid())


class PeopleTests(RoomCase):
    def test_a_name_is_given_once_whatever_its_case(self):
        self.room.join("s1", "Ada")
        with connected("s1", "s2"), self.assertRaises(NameTaken):
            self.room.join("s2", "ADA")

    def test_the_same_name_in_another_room(self):
        other = Room.objects.create(name="Other", slug="other")
        self.room.join("s1", "Ada")
        with connected("s1", "s2"):
            _, former = other.join("s2", "Ada")
        self.assertIsNone(former)

    def test_a_name_without_a_socket_is_free(self):
        self.room.join("ghost", "Ada")
        with connected("s2"):
            here, former = self.room.join("s2", "ada")
            self.assertEqual(self.room.people(), [here])
        self.assertIsNone(former)

    def test_the_token_moves_the_name_to_a_new_socket(self):
        first, _ = self.room.join("s1", "Ada")
        with connected("s1", "s2"):
            second, former = self.room.join("s2", "Ada", first.token)
        self.assertEqual(former, "s1")
        self.assertEqual((second.pk, second.session_id), (first.pk, "s2"))
        self.assertEqual(second.token, first.token)

    def test_a_wrong_token_does_not(self):
        self.room.join("s1", "Ada")
        with connected("s1", "s2"), self.assertRaises(NameTaken):
            self.room.join("s2", "Ada", "x" * 32)

    def test_only_those_with_a_socket_are_here(self):
        for session_id, name in (("s1", "Zoe"), ("ghost", "Max"), ("s2", "ada")):
            self.room.join(session_id, name)
        with connected("s1", "s2", "without a name"):
            self.assertEqual([p.name for p in self.room.people()], ["ada", "Zoe"])

    def test_the_rows_are_believed_while_the_carrier_is_down(self):
        self.room.join("s1", "Ada")
        with mock.patch("chat.models.members", side_effect=BackendError):
            self.assertEqual([p.name for p in self.room.people()], ["Ada"])

    def test_an_empty_room_asks_nobody(self):
        with connected() as members:
            self.assertEqual(self.room.people(), [])
        members.assert_not_called()

    def test_the_front_page_asks_once_for_all_rooms(self):
        other = Room.objects.create(name="Other", slug="other")
        for session_id, room in (("s1", self.room), ("s2", other), ("ghost", other)):
            room.join(session_id, session_id)
        with connected("s1", "s2") as members:
            counts = {card["slug"]: card["count"] for card in lobby_cards()}
        members.assert_called_once_with(PEOPLE)
        self.assertEqual((counts["tea-time"], counts["other"]), (1, 1))


class SweeperTests(RoomCase):
    """What ends the presences of a worker that was killed; see also tests_cluster.py."""

    def setUp(self):
        self.here = self.enterContext(mock.patch("chat.sweeper.members", return_value={"s1"}))
        self.told = self.enterContext(mock.patch("chat.sweeper.broadcast_channel"))
        self.lobby = self.enterContext(mock.patch("chat.models.broadcast_channel"))
        self.enterContext(connected("s1"))
        self.room.join("s1", "Ada")
        self.room.join("ghost", "Max")

    def names(self):
        return [presence.name for presence in Presence.objects.all()]

    def test_a_ghost_is_ended_and_the_others_are_told(self):
        suspects = sweeper.sweep(set())
        self.assertEqual(suspects, {"ghost"})
        self.assertEqual(self.names(), ["Ada", "Max"])
        self.told.assert_not_called()
        self.assertEqual(sweeper.sweep(suspects), set())
        self.assertEqual(self.names(), ["Ada"])
        self.told.assert_called_once_with({"type": "leave", "name": "Max"}, "room-tea-time")
        card, channel = self.lobby.call_args.args
        self.assertEqual((card["count"], channel), (1, LOBBY))

    def test_who_is_back_is_no_ghost(self):
        suspects = sweeper.sweep(set())
        self.here.return_value = {"s1", "ghost"}
        self.assertEqual(sweeper.sweep(suspects), set())
        self.assertEqual(self.names(), ["Ada", "Max"])

    def test_who_has_come_back_on_another_socket_has_not_left(self):
        with mock.patch("chat.sweeper.Presence.objects.select_related") as seen:
            seen.return_value = list(Presence.objects.all())
            self.room.join("s2", "Max")
            sweeper.sweep({"ghost"})
        self.assertEqual(self.names(), ["Ada", "Max"])
        self.told.assert_not_called()

    def test_nobody_is_ended_while_the_carrier_is_down(self):
        self.here.side_effect = BackendError
        with self.assertRaises(BackendError):
            sweeper.sweep({"s1", "ghost"})
        self.assertEqual(self.names(), ["Ada", "Max"])

    def test_a_ghost_whose_end_nobody_heard_stays_for_the_next_sweep(self):
        self.told.side_effect = BackendError
        with self.assertRaises(BackendError):
            sweeper.sweep({"ghost"})
        self.assertEqual(self.names(), ["Ada", "Max"])
        self.told.side_effect = NoSocket
        sweeper.sweep({"ghost"})
        self.assertEqual(self.names(), ["Ada"])

    def test_without_anybody_no_question_is_asked(self):
        Presence.objects.all().delete()
        sweeper.sweep({"ghost"})
        self.here.assert_not_called()


class HistoryTests(RoomCase):
    def test_the_newest_come_first_and_in_order(self):
        for number in range(HISTORY + 5):
            self.room.messages.create(name="Ada", text=str(number))
        newest = self.room.history()
        self.assertEqual([m.text for m in newest], [str(n) for n in range(5, 55)])
        earlier = self.room.history(before=newest[0].id)
        self.assertEqual([m.text for m in earlier], list("01234"))

    def test_an_announcement_is_heard(self):
        with recorded_broadcasts() as broadcast:
            message = self.room.announce("Hello")
        broadcast.assert_called_once_with(message.payload(), "room-tea-time")
        self.assertEqual(message.payload()["type"], "system")

    def test_an_announcement_to_nobody_is_kept(self):
        with self.assertRaises(NoSocket):
            self.room.announce("Hello")
        self.assertEqual([m.text for m in self.room.history()], ["Hello"])

    def test_an_announcement_that_is_tried_again_is_kept_once(self):
        nonce = uuid.uuid4()
        for outcome in (BackendError, None):
            with recorded_broadcasts() as broadcast, suppress(BackendError):
                broadcast.side_effect = outcome
                self.room.announce("Hello", nonce)
            broadcast.assert_called_once_with(self.room.messages.get().payload(), "room-tea-time")

    def test_one_countdown_at_a_time(self):
        until = self.room.begin_countdown(10)
        self.assertIsNone(self.room.begin_countdown(1))
        self.assertIsNotNone(Room.objects.create(name="O", slug="o").begin_countdown(1))
        with mock.patch("chat.models.timezone.now", return_value=until + timedelta(seconds=1)):
            self.assertIsNotNone(self.room.begin_countdown(1))
        self.room.forget_countdown()
        self.assertIsNotNone(self.room.begin_countdown(1))

    def test_a_deleted_room_is_closed_once_that_is_certain(self):
        with recorded_broadcasts() as broadcast:
            with self.captureOnCommitCallbacks(execute=True):
                self.room.delete()
                broadcast.assert_not_called()
        closed = {"type": "closed", "slug": "tea-time"}
        self.assertEqual(
            broadcast.mock_calls,
            [mock.call(closed, "room-tea-time"), mock.call(closed, LOBBY)],
        )


class PageTests(RoomCase):
    def test_the_liveliest_room_is_first(self):
        busy = Room.objects.create(name="Zoo", slug="zoo")
        busy.join("s1", "Ada")
        with connected("s1"):
            response = self.client.get("/")
        self.assertEqual(response.context["cards"][0]["slug"], "zoo")
        self.assertContains(response, "1 here now", count=1)
        self.assertContains(response, 'href="/rooms/tea-time/"')

    def test_a_new_room(self):
        with recorded_broadcasts() as broadcast:
            response = self.client.post("/", {"name": "Late night"})
        self.assertRedirects(response, "/rooms/late-night/")
        card, channel = broadcast.call_args.args
        self.assertEqual((card["name"], channel), ("Late night", LOBBY))

    def test_a_new_room_that_nobody_watches(self):
        self.assertRedirects(self.client.post("/", {"name": "A"}), "/rooms/a/")

    def test_an_error_is_shown_beside_what_was_typed(self):
        response = self.client.post("/", {"name": "tea  TIME"})
        self.assertContains(response, "There is already a room of that name.")
        self.assertContains(response, 'value="tea  TIME"')
        self.assertContains(response, "aria-invalid")

    def test_a_countdown_is_offered_where_there_is_celery(self):
        for broker, offers in (("", 0), ("redis://localhost/1", 1)):
            with self.settings(CELERY_BROKER_URL=broker):
                response = self.client.get("/rooms/tea-time/")
                self.assertContains(response, 'id="count"', count=offers)

    def test_an_unknown_room(self):
        self.assertEqual(self.client.get("/rooms/none/").status_code, 404)

    def test_names_are_escaped(self):
        room = Room.objects.create(name=SCRIPT, slug="x")
        room.join("s1", SCRIPT[:24])
        with connected("s1"):
            pages = [self.client.get("/"), self.client.get("/rooms/x/")]
        pages.append(self.client.post("/", {"name": SCRIPT + '"' * 20}))
        for page in pages:
            self.assertNotContains(page, "<script>")
            self.assertNotContains(page, '"""')
            self.assertContains(page, "&lt;script&gt;")

    def test_nothing_is_inline(self):
        for url in ("/", "/rooms/tea-time/"):
            response = self.client.get(url)
            policy = response.headers["Content-Security-Policy"]
            self.assertIn("default-src 'self';", policy)
            self.assertNotIn("unsafe", policy)
            page = response.content.decode()
            self.assertNotRegex(page, r"<style|\sstyle=|\son\w+=")
            for tag, body in re.findall(r"<script([^>]*)>(.*?)</script>", page):
                self.assertIn(" src=", tag)
                self.assertEqual(body, "")

    def test_the_scripts_never_make_markup_of_data(self):
        for script in (Path(__file__).parent / "static/chat").glob("*.js"):
            code = script.read_text()
            self.assertNotRegex(code, r"innerHTML|outerHTML|insertAdjacent|\.write\(")


class AdminTests(RoomCase):
    @classmethod
    def setUpTestData(cls):
        super().setUpTestData()
        cls.staff = get_user_model().objects.create_superuser("admin")
        cls.rooms_url = reverse("admin:chat_room_changelist")
        cls.presences_url = reverse("admin:chat_presence_changelist")

    def setUp(self):
        self.client.force_login(self.staff)

    def announce(self, **data):
        data = {"action": "announce", "_selected_action": self.room.pk, **data}
        return self.client.post(self.rooms_url, data, follow=True)

    def test_the_action_asks_for_the_text(self):
        Room.objects.filter(pk=self.room.pk).update(name=SCRIPT)
        response = self.announce(index=0)
        self.assertContains(response, '<textarea name="text"')
        self.assertNotContains(response, SCRIPT)

    def test_an_announcement(self):
        with recorded_broadcasts() as broadcast:
            response = self.announce(text=" Hello ")
        self.assertContains(response, "“Tea time” has heard it.")
        payload, channel = broadcast.call_args.args
        self.assertEqual((payload["text"], channel), ("Hello", "room-tea-time"))

    def test_an_announcement_to_an_empty_room(self):
        response = self.announce(text="Hello")
        self.assertContains(response, "Nobody is in “Tea time”.")
        self.assertEqual(self.room.messages.get().text, "Hello")

    def test_an_announcement_without_a_carrier(self):
        with recorded_broadcasts() as broadcast:
            broadcast.side_effect = BackendError("Redis is down.")
            response = self.announce(text="Hello")
        self.assertContains(response, "did not hear it: Redis is down.")

    def test_an_empty_announcement_is_not_sent(self):
        self.assertContains(self.announce(text=" "), "This field is required.")
        self.assertFalse(self.room.messages.exists())

    def test_it_takes_the_permission_to_change(self):
        self.client.force_login(get_user_model().objects.create_user("u", is_staff=True))
        self.announce(text="Hello")
        self.assertFalse(self.room.messages.exists())

    def test_removing_somebody_whose_socket_is_gone(self):
        here, _ = self.room.join("ghost", "Ada")
        data = {"action": "remove", "_selected_action": here.pk}
        self.client.post(self.presences_url, data)
        self.assertFalse(self.room.presences.exists())

    def test_the_lists(self):
        self.room.join("s1", "Ada")
        self.room.messages.create(name="Ada", text=SCRIPT)
        for model in ("room", "presence", "message"):
            response = self.client.get(reverse(f"admin:chat_{model}_changelist"))
            self.assertNotContains(response, SCRIPT)


class CommandTests(RoomCase):
    def test_it_is_heard(self):
        out = StringIO()
        with recorded_broadcasts() as broadcast:
            call_command("announce", "tea-time", "Hello", stdout=out)
        self.assertEqual(broadcast.call_args.args[0]["text"], "Hello")
        self.assertIn("has heard it", out.getvalue())

    def test_an_unknown_room(self):
        with self.assertRaisesMessage(CommandError, "There is no room “x”. There are: "):
            call_command("announce", "x", "Hello")

    def test_an_empty_text(self):
        with self.assertRaisesMessage(CommandError, "This field is required."):
            call_command("announce", "tea-time", " ")

    def test_nobody_hears_it(self):
        # As from a shell beside the server: this process has no sockets.
        with self.assertRaisesMessage(CommandError, "It is in the history"):
            call_command("announce", "tea-time", "Hello")
        self.assertEqual(self.room.messages.get().text, "Hello")

    def test_the_carrier_is_down(self):
        with (
            recorded_broadcasts() as broadcast,
            self.assertRaisesMessage(CommandError, "did not hear it: Redis is down."),
        ):
            broadcast.side_effect = BackendError("Redis is down.")
            call_command("announce", "tea-time", "Hello")


class Socket:
    """A socket that writes down what it is asked to do."""

    disconnect_reason = "transport close"

    def __init__(self, session_id, *channels):
        self.session = mock.Mock(session_id=session_id)
        self.channels = list(channels)
        self.auth = {}
        self.sent = []
        self.heard_by_others = []
        self.heard_by_all = []

    def send(self, message):
        self.sent.append(message)

    def subscribe(self, channel):
        self.channels.append(channel)

    def unsubscribe(self, channel):
        if channel in self.channels:
            self.channels.remove(channel)

    def broadcast_channel(self, message, channel):
        self.heard_by_others.append((channel, message))

    def send_and_broadcast_channel(self, message, channel):
        self.heard_by_all.append((channel, message))


class Client:
    """One connection: calls the handlers as django-socketio does."""

    def __init__(self, session_id, channel):
        self.socket = Socket(session_id, channel)
        self.connection = (mock.Mock(user="somebody"), self.socket, {})

    def __call__(self, handler, *args):
        return handler(*self.connection, *args)

    def join(self, name, room="tea-time"):
        return self(events.join, {"room": room, "name": name})

    def say(self, text, nonce=None):
        return self(events.say, {"text": text, "nonce": nonce or str(uuid.uuid4())})

    def go(self):
        self(events.disconnected)
        for channel in list(self.socket.channels):
            self(events.left, channel)
        self(events.finished)


class EventTests(RoomCase):
    def setUp(self):
        self.enterContext(connected("s1", "s2", "s3"))
        self.enterContext(mock.patch("chat.sweeper.watch"))
        self.ada = Client("s1", self.room.channel)
        self.max = Client("s2", self.room.channel)

    def refused(self, answer, error):
        self.assertFalse(answer["ok"])
        self.assertIn(error, answer["error"])

    def test_channels_that_exist(self):
        for channel in (LOBBY, "room-tea-time"):
            self.ada(events.allow_channel, channel)
        for channel in ("room-", "room-none", "tea-time", "lobby2", "", PEOPLE):
            with self.subTest(channel), self.assertRaises(PermissionDenied):
                self.ada(events.allow_channel, channel)

    def test_the_lobby_asks_for_the_rooms(self):
        self.assertEqual(self.ada(events.rooms), lobby_cards())

    def test_joining(self):
        self.room.messages.create(name="Eve", text="Hi")
        self.ada(events.connected)
        answer = self.ada.join("Ada")
        self.assertTrue(answer["ok"])
        self.assertEqual(answer["me"], avatar("Ada"))
        self.assertEqual(answer["people"], [avatar("Ada")])
        self.assertEqual([m["text"] for m in answer["messages"]], ["Hi"])
        self.assertEqual(
            self.ada.socket.heard_by_others,
            [("room-tea-time", {"type": "join", **avatar("Ada")})],
        )
        self.assertEqual(self.ada.socket.channels, ["room-tea-time", PEOPLE])

    def test_joining_in_vain(self):
        self.ada.join("Ada")
        self.refused(self.max.join("ada"), "has this name already")
        self.refused(self.max.join(" "), "enter a name")
        self.refused(self.max.join("x" * 25), "at most 24")
        for data in (None, [], "Max", 1, {"room": {}, "name": "Max"}):
            with self.subTest(data):
                self.assertFalse(self.max(events.join, data)["ok"])
        self.assertEqual(self.max.socket.heard_by_others, [])

    def test_a_room_must_be_subscribed_to(self):
        Room.objects.create(name="Other", slug="other")
        self.refused(self.ada.join("Ada", room="other"), "subscribe to the channel")

    def test_a_room_that_was_deleted(self):
        self.room.delete()
        self.refused(self.ada.join("Ada"), "no such room")

    def test_joining_again_under_another_name(self):
        self.ada.join("Ada")
        self.assertTrue(self.ada.join("Eve")["ok"])
        self.assertEqual([p.name for p in self.room.people()], ["Eve"])

    def test_coming_back_before_the_loss_is_noticed(self):
        token = self.ada.join("Ada")["token"]
        again = Client("s3", self.room.channel)
        again.socket.auth = {"token": token}
        with (
            mock.patch("chat.events.send") as send,
            mock.patch("chat.events.disconnect") as disconnect,
        ):
            self.assertTrue(again.join("Ada")["ok"])
        send.assert_called_once_with("s1", {"type": "elsewhere"})
        disconnect.assert_called_once_with("s1")
        self.ada.socket.heard_by_others.clear()
        self.ada.go()
        self.assertEqual(self.ada.socket.heard_by_others, [])  # she did not leave
        self.assertEqual(again.socket.heard_by_others, [])  # and did not come
        self.assertEqual([p.session_id for p in self.room.people()], ["s3"])

    def test_saying_something(self):
        self.ada.join("Ada")
        answer = self.ada.say(f" {SCRIPT}\n")
        payload = self.room.messages.get().payload()
        self.assertEqual(answer, {"ok": True, "message": payload})
        self.assertEqual(self.ada.socket.heard_by_all, [("room-tea-time", payload)])
        self.assertEqual(payload["text"], SCRIPT)  # the browser makes text of it

    def test_saying_it_twice(self):
        self.ada.join("Ada")
        nonce = str(uuid.uuid4())
        self.assertEqual(self.ada.say("Hi", nonce), self.ada.say("Hi", nonce))
        first, again = self.ada.socket.heard_by_all
        self.assertEqual(first, again)  # the browsers know it by its nonce
        self.assertEqual(self.room.messages.count(), 1)
        self.max.join("Max")
        self.assertEqual(self.max.say("Ho", nonce)["message"]["text"], "Ho")

    def test_saying_it_in_vain(self):
        self.refused(self.ada.say("Hi"), "join the room first")
        self.ada.join("Ada")
        self.refused(self.ada.say(" "), "empty")
        self.refused(self.ada.say("x" * 2001), "at most 2000")
        for data in (None, [], "Hi", {"text": "Hi"}, {"text": "Hi", "nonce": 1}):
            with self.subTest(data):
                self.assertFalse(self.ada(events.say, data)["ok"])
        self.assertFalse(self.room.messages.exists())

    def test_typing(self):
        self.ada(events.typing)
        self.assertEqual(self.ada.socket.heard_by_others, [])
        self.ada.join("Ada")
        self.assertIsNone(self.ada(events.typing, "anything", {"more": 1}))
        self.assertEqual(
            self.ada.socket.heard_by_others[-1],
            ("room-tea-time", {"type": "typing", "name": "Ada"}),
        )

    def test_earlier_messages(self):
        first, second = (self.room.messages.create(name="Eve", text=text) for text in "ab")
        self.refused(self.ada(events.history, {"before": 1}), "join the room first")
        self.ada.join("Ada")
        answer = self.ada(events.history, {"before": second.id})
        self.assertEqual(answer, {"ok": True, "messages": [first.payload()]})
        self.assertTrue(self.ada(events.history, {"before": 10**30})["ok"])
        for data in (None, {}, {"before": "x"}, {"before": -1}, {"before": []}):
            with self.subTest(data):
                self.assertFalse(self.ada(events.history, data)["ok"])

    def test_leaving_is_told_once(self):
        self.ada.join("Ada")
        self.ada.socket.heard_by_others.clear()
        self.ada.go()
        self.assertEqual(
            self.ada.socket.heard_by_others,
            [("room-tea-time", {"type": "leave", "name": "Ada"})],
        )
        self.assertFalse(self.room.presences.exists())

    def test_leaving_that_nobody_heard_of_is_left_to_the_sweeper(self):
        self.ada.join("Ada")
        with mock.patch.object(Socket, "broadcast_channel", side_effect=BackendError):
            with self.assertRaises(BackendError):
                self.ada(events.left, self.room.channel)
            self.ada(events.finished)
        self.assertEqual(self.room.presences.get().name, "Ada")

    def test_leaving_the_people_is_leaving(self):
        self.ada.join("Ada")
        self.ada(events.left, PEOPLE)
        self.assertFalse(self.room.presences.exists())

    def test_a_countdown_takes_celery(self):
        self.refused(self.ada(events.countdown, {"seconds": 3}), "join the room first")
        self.ada.join("Ada")
        self.refused(self.ada(events.countdown, {"seconds": 3}), "that takes Celery")
        for seconds, error in ((0, "at least 1"), (61, "at most 60"), ("x", "how many")):
            self.refused(self.ada(events.countdown, {"seconds": seconds}), error)

    def test_leaving_another_channel_is_not_leaving(self):
        self.ada.join("Ada")
        self.ada(events.left, "room-other")
        self.assertTrue(self.room.presences.exists())

    def test_an_error_is_told_to_its_user(self):
        self.ada(events.failed, ValueError("secret"))
        self.assertEqual(self.ada.socket.sent[0]["type"], "error")
        self.assertNotIn("secret", str(self.ada.socket.sent))
