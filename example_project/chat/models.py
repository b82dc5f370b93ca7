import uuid
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta

from django.db import IntegrityError, models, transaction
from django.db.models.signals import post_delete
from django.dispatch import receiver
from django.urls import reverse
from django.utils import timezone
from django.utils.crypto import constant_time_compare, get_random_string

from chat.avatars import avatar
from django_socketio import BackendError, NoSocket, broadcast_channel, members

LOBBY = "lobby"  # the channel of the front page
CHANNEL_PREFIX = "room-"  # those of the rooms are "room-" + the slug
PEOPLE = "people"  # has all that have a name in any room; no client may ask for it
HISTORY = 50  # messages given to those who enter


class NameTaken(Exception):
    """Somebody in the room has this name."""


class Room(models.Model):
    name = models.CharField(max_length=40)
    slug = models.SlugField(max_length=50, unique=True, allow_unicode=True, editable=False)
    created = models.DateTimeField(auto_now_add=True)
    counting_until = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self):
        return self.name

    def get_absolute_url(self):
        return reverse("room", args=[self.slug])

    @property
    def channel(self):
        return CHANNEL_PREFIX + self.slug

    def people(self):
        """Return the presences whose socket is there."""
        return connected(self.presences.all())

    def join(self, session_id, name, token=""):
        """
        Give the name to that socket, or raise NameTaken.

        A name is free if nobody has it, if its socket is gone, or for whoever
        has the token of it: a browser that lost its connection is back before
        the server notices the loss, and must not be shut out by itself. Return
        the presence, and the session id of the socket that it was taken from.
        """
        holder = self.presences.filter(key=name.casefold()).first()
        if holder is None:
            return self._admit(session_id, name), None
        former = holder.session_id
        here = members(PEOPLE)
        if former in here and not constant_time_compare(holder.token, token):
            raise NameTaken
        holder.session_id = session_id
        holder.name = name
        # Only from the socket just looked at: two may try at the same time.
        unchanged = self.presences.filter(pk=holder.pk, session_id=former)
        if not unchanged.update(session_id=session_id, name=name):
            raise NameTaken
        return holder, former if former in here else None

    def _admit(self, session_id, name):
        try:
            with transaction.atomic():
                return self.presences.create(session_id=session_id, name=name)
        except IntegrityError:  # another worker admitted that name just now
            raise NameTaken from None

    def history(self, before=None):
        """Return the newest messages, or those before that id, oldest first."""
        messages = self.messages.order_by("-id")
        if before is not None:
            messages = messages.filter(id__lt=before)
        return list(messages[:HISTORY])[::-1]

    def announce(self, text, nonce=None):
        """
        Say it to the room as the system, from anywhere: a view, a command, a task.

        The message stays in the history even if NoSocket is raised because
        nobody is there to hear it, or BackendError because the carrier is down.
        Whoever tries again gives the same nonce: then it is there only once.
        """
        message, _ = self.messages.get_or_create(
            name="", nonce=nonce or uuid.uuid4(), defaults={"text": text}
        )
        broadcast_channel(message.payload(), self.channel)
        return message

    def begin_countdown(self, seconds):
        """Return when a countdown that begins now ends; None if there is one already."""
        now = timezone.now()
        until = now + timedelta(seconds=seconds)
        # One statement, so of two workers that try at the same time one succeeds.
        idle = models.Q(counting_until=None) | models.Q(counting_until__lt=now)
        begun = Room.objects.filter(idle, pk=self.pk).update(counting_until=until)
        return until if begun else None

    def forget_countdown(self):
        Room.objects.filter(pk=self.pk).update(counting_until=None)

    def card(self, people):
        """What the front page shows of this room."""
        return {
            "type": "room",
            "slug": self.slug,
            **avatar(self.name),
            "url": self.get_absolute_url(),
            "count": len(people),
            "people": [person.payload() for person in people[:4]],
        }

    def tell_lobby(self, people=None):
        """Bring the front pages up to date. That nobody looks at one is fine."""
        with suppress(NoSocket):
            broadcast_channel(self.card(self.people() if people is None else people), LOBBY)


def connected(presences):
    """
    Return those presences whose socket is there, whichever worker has it.

    The database names the people, for every worker alike, and the sockets
    decide who of them is real: a worker that was killed ran no handler, so its
    rows are there until somebody sweeps (see sweeper.py).
    """
    presences = list(presences)
    if not presences:
        return []
    try:
        here = members(PEOPLE)
    except BackendError:
        return presences
    return [presence for presence in presences if presence.session_id in here]


def lobby_cards():
    """All rooms as the front page shows them, the liveliest first."""
    people = defaultdict(list)
    for presence in connected(Presence.objects.all()):
        people[presence.room_id].append(presence)
    cards = [room.card(people[room.pk]) for room in Room.objects.all()]
    return sorted(cards, key=lambda card: -card["count"])


@receiver(post_delete, sender=Room)
def close_room(instance, **kwargs):
    """Tell those inside and the lobby, but not before the deletion is certain."""
    closed = {"type": "closed", "slug": instance.slug}

    def tell():
        for channel in (instance.channel, LOBBY):
            with suppress(NoSocket):
                broadcast_channel(closed, channel)

    transaction.on_commit(tell)


class Presence(models.Model):
    """Somebody in a room: a name held by one socket."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="presences")
    session_id = models.CharField(max_length=128, unique=True)
    name = models.CharField(max_length=24)
    key = models.CharField(max_length=48, editable=False)
    token = models.CharField(max_length=32, editable=False)
    joined = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("key",)
        verbose_name_plural = "presences"
        constraints = [
            models.UniqueConstraint(fields=["room", "key"], name="one_of_a_name_in_a_room")
        ]

    def __str__(self):
        return f"{self.name} in {self.room}"

    def save(self, *args, **kwargs):
        self.key = self.name.casefold()
        self.token = self.token or get_random_string(32)
        super().save(*args, **kwargs)

    def payload(self):
        return avatar(self.name)

    def end(self, tell):
        """
        Give up the name and tell the others by `tell(message, channel)`.

        Return False, and tell nobody, if a newer socket has the name: then
        nobody left.
        """
        if not Presence.objects.filter(pk=self.pk, session_id=self.session_id).delete()[0]:
            return False
        try:
            with suppress(NoSocket):
                tell({"type": "leave", "name": self.name}, self.room.channel)
        except BackendError:
            # Nobody knows it. Whoever sweeps once the carrier is back tells them.
            Presence.objects.bulk_create([self], ignore_conflicts=True)
            raise
        return True


class Message(models.Model):
    """What was said. A message without a name is the system's."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="messages")
    name = models.CharField(max_length=24, blank=True)
    text = models.TextField(max_length=2000)
    # Chosen by the browser, so that sending again after a doubtful connection
    # does not say it twice.
    nonce = models.UUIDField(default=uuid.uuid4, editable=False)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("id",)
        constraints = [
            models.UniqueConstraint(fields=["room", "name", "nonce"], name="said_only_once")
        ]

    def __str__(self):
        return f"{self.name or 'System'}: {self.text[:40]}"

    def payload(self):
        """As sent to browsers; dates and UUIDs are encoded by django-socketio."""
        return {
            "type": "message" if self.name else "system",
            "id": self.id,
            "nonce": self.nonce,
            "at": self.created,
            "text": self.text,
            **avatar(self.name),
        }
