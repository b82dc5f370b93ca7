"""
Every event of django-socketio at work.

A handler is called like a signal receiver: decorate a function in the
``events.py`` of an installed app. It gets the ``request`` of the handshake, the
``socket``, and ``context``, a dict that lives as long as the connection.

The life of somebody in the chat:

    browser                                      here
    connects                                     on_connect
    socket.subscribe("room-general", fn)         on_subscribe
    socket.emit("join", {room, name}, fn)        on_event("join")
    socket.send({text, nonce}, fn)               on_message
    socket.emit("typing")                        on_event("typing")
    socket.emit("history", {before}, fn)         on_event("history")
    socket.emit("countdown", {seconds}, fn)      on_event("countdown")
    socket.unsubscribe("room-general"), or gone  on_disconnect, on_unsubscribe, on_finish

What a handler of ``on_message`` or ``on_event`` returns is what ``fn`` gets.
"""

import logging
from contextlib import suppress
from functools import wraps

from django.conf import settings
from django.core.exceptions import PermissionDenied, ValidationError

from chat import sweeper
from chat.forms import CountdownForm, HistoryForm, JoinForm, MessageForm
from chat.models import CHANNEL_PREFIX, LOBBY, PEOPLE, NameTaken, Room, lobby_cards
from django_socketio import NoSocket, disconnect, send
from django_socketio.events import (
    on_connect,
    on_disconnect,
    on_error,
    on_event,
    on_finish,
    on_message,
    on_subscribe,
    on_unsubscribe,
)

logger = logging.getLogger(__name__)


# What arrives through a socket deserves no more trust than what arrives by POST,
# and Django's forms check it just as well.


def validated(form_class, data):
    """Return the cleaned data, or raise ValidationError."""
    form = form_class(data if isinstance(data, dict) else {})
    if not form.is_valid():
        raise ValidationError([error for field in form.errors.values() for error in field])
    return form.cleaned_data


def acknowledged(handler):
    """Answer the browser with {"ok": true, …} or {"ok": false, "error": "…"}."""

    @wraps(handler)
    def wrapper(*args):
        try:
            return {"ok": True, **handler(*args)}
        except ValidationError as error:
            return {"ok": False, "error": error.messages[0]}

    return wrapper


def presence(context):
    """Return who this connection is, or raise ValidationError: it never joined."""
    if "presence" not in context:
        raise ValidationError("Please join the room first.")
    return context["presence"]


@on_connect
def connected(request, socket, context):
    """
    The first event of a connection; ``request`` went through all middleware.

    Raise ConnectionRefused here, or PermissionDenied, to turn a client away.
    This chat is open to all, so there is nothing to refuse.
    """
    sweeper.watch()
    logger.info("%s connected as %s", socket.session.session_id, request.user)


@on_subscribe
def allow_channel(request, socket, context, channel):
    """
    A client may ask for any channel whatsoever, so say which there are.

    PermissionDenied is the answer in the client's callback, and no message of
    the channel ever reaches it.
    """
    if channel == LOBBY:
        return
    slug = channel.removeprefix(CHANNEL_PREFIX)
    if slug == channel or not Room.objects.filter(slug=slug).exists():
        raise PermissionDenied("There is no such room.")


@on_event("rooms", channel=f"^{LOBBY}$")
def rooms(request, socket, context):
    """
    An event by name. What it returns is the answer to the browser.

    With ``channel`` a handler is called only for sockets that are subscribed to
    a channel matching the regular expression.
    """
    return lobby_cards()


@on_event("join", channel="^room-")
@acknowledged
def join(request, socket, context, data=None):
    """
    Somebody says their name, on entering and again after each reconnect.

    The subscription came first, so nothing that is said while the history is
    being read gets lost: the browser may hear it twice, and can tell by the id.
    ``socket.auth`` is what the browser gave along with the connection.
    """
    name = validated(JoinForm, data)["name"]
    token = str(socket.auth.get("token", ""))
    slug = str(data.get("room"))
    if CHANNEL_PREFIX + slug not in socket.channels:
        raise ValidationError("Please subscribe to the channel of the room first.")
    room = Room.objects.filter(slug=slug).first()
    if room is None:
        raise ValidationError("There is no such room.")
    leave(socket, context)
    # Not the client's doing, so no on_subscribe. It comes before the name: who
    # has a name and is not in there has lost the connection.
    socket.subscribe(PEOPLE)
    try:
        here, former = room.join(socket.session.session_id, name, token)
    except NameTaken:
        raise ValidationError("Somebody here has this name already.") from None
    context["presence"] = here
    people = room.people()
    if former is not None:
        dismiss(former)
    else:
        # broadcast_channel reaches everyone else in the channel.
        socket.broadcast_channel({"type": "join", **here.payload()}, room.channel)
        room.tell_lobby(people)
    return {
        "me": here.payload(),
        "token": here.token,
        "people": [person.payload() for person in people],
        "messages": [message.payload() for message in room.history()],
    }


def dismiss(session_id):
    """
    End another connection, which may belong to another worker.

    These functions of the package need no socket of their own; NoSocket means
    that the other one is gone, which is what we want.
    """
    with suppress(NoSocket):
        send(session_id, {"type": "elsewhere"})
        disconnect(session_id)


@on_message(channel="^room-")
@acknowledged
def say(request, socket, context, message):
    """
    ``socket.send(data)`` in the browser, from a socket that is in a room.

    What was sent as an object is a dict here.
    """
    here = presence(context)
    cleaned = validated(MessageForm, message)
    said, _ = here.room.messages.get_or_create(
        name=here.name, nonce=cleaned["nonce"], defaults={"text": cleaned["text"]}
    )
    # The sender too: all see the same messages in the same order. One that is
    # sent again goes out again, as the carrier may have failed the first time;
    # browsers know it by its nonce.
    socket.send_and_broadcast_channel(said.payload(), here.room.channel)
    return {"message": said.payload()}


@on_event("typing", channel="^room-")
def typing(request, socket, context, *args):
    """What is not kept needs no answer either."""
    if "presence" in context:
        here = context["presence"]
        socket.broadcast_channel({"type": "typing", "name": here.name}, here.room.channel)


@on_event("history", channel="^room-")
@acknowledged
def history(request, socket, context, data=None):
    """What was said before the message of that id."""
    room = presence(context).room
    before = validated(HistoryForm, data)["before"]
    return {"messages": [message.payload() for message in room.history(before)]}


@on_event("countdown", channel="^room-")
@acknowledged
def countdown(request, socket, context, data=None):
    """
    Have somebody else do what takes longer than a moment: a task in a Celery
    worker. What it has to say reaches the room from there, see tasks.py.
    """
    here = presence(context)
    seconds = validated(CountdownForm, data)["seconds"]
    if not settings.CELERY_BROKER_URL:
        raise ValidationError("Nobody is here to count: that takes Celery.")
    from chat import tasks  # Celery is optional

    tasks.start_countdown(here.room, here.name, seconds)
    return {}


@on_error
def failed(request, socket, context, exception):
    """
    A handler raised. It is logged already and the connection lives on; ``send``
    reaches this one socket, so that its user knows.
    """
    socket.send({"type": "error", "text": "Something went wrong. Please try again."})


@on_disconnect
def disconnected(request, socket, context):
    """The connection is gone, whatever the reason; the channels are still known."""
    logger.info("%s is gone: %s", socket.session.session_id, socket.disconnect_reason)


@on_unsubscribe(channel=f"^(room-|{PEOPLE}$)")
def left(request, socket, context, channel):
    """The client unsubscribed, or is gone: then this runs for each channel it had."""
    if "presence" in context and channel in (PEOPLE, context["presence"].room.channel):
        leave(socket, context)


@on_finish
def finished(request, socket, context):
    """
    The very last event of a connection: clean up what belongs to it.

    Nothing is left to do, unless a handler above raised.
    """
    leave(socket, context)


def leave(socket, context):
    """Give up the name and tell the others."""
    here = context.pop("presence", None)
    if here is None:
        return
    socket.unsubscribe(PEOPLE)
    if here.end(socket.broadcast_channel):
        here.room.tell_lobby()
