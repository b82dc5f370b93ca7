"""What the Node and browser tests ask the server to do."""

import gevent
from django.core.exceptions import PermissionDenied

from django_socketio import ConnectionRefused
from django_socketio.events import on_connect, on_event, on_message, on_subscribe

# Messages


@on_message
def echo_message(request, socket, context, message):
    """Send a message of no room back to its sender, and acknowledge it with itself."""
    if not socket.channels:
        socket.send(message)
    return message


@on_message(channel="^room-")
def say(request, socket, context, message):
    """Pass a message on to the sender's rooms, as a chat does."""
    socket.send_and_broadcast_channel(message)


# Events and acknowledgements


@on_event("echo")
def echo(request, socket, context, *args):
    socket.emit("echoed", *args)


@on_event("answer")
def answer(request, socket, context, *args):
    return args


@on_event("length")
def length(request, socket, context, text):
    return len(text)


@on_event("silent")
def silent(request, socket, context, *args):
    """Return nothing: a client that asks for an acknowledgement gets an empty one."""


@on_event("call me")
def call_me(request, socket, context, *args):
    """Ask the client, and acknowledge with what it said."""
    return {"said": socket.call("question", *args, timeout=10)}


@on_event("who am i")
def who_am_i(request, socket, context):
    return {
        "id": socket.session.session_id,
        "transport": socket.transport,
        "namespace": socket.namespace,
        "channels": sorted(socket.channels),
        "auth": socket.auth,
    }


@on_event("disconnect me")
def disconnect_me(request, socket, context):
    socket.disconnect()


# Two streams, for what happens to them when the transport changes


@on_event("note")
def note(request, socket, context, number):
    context.setdefault("notes", []).append(number)


@on_event("notes")
def notes(request, socket, context):
    return context.pop("notes", [])


@on_event("start ticking")
def start_ticking(request, socket, context):
    context["ticks"] = 0
    context["ticking"] = True
    gevent.spawn(tick, socket, context)


def tick(socket, context):
    while context["ticking"]:
        socket.emit("tick", context["ticks"])
        context["ticks"] += 1
        gevent.sleep(0.001)


@on_event("stop ticking")
def stop_ticking(request, socket, context):
    context["ticking"] = False
    return context["ticks"]


# Channels


@on_subscribe(channel="^secret")
def refuse_with_a_reason(request, socket, context, channel):
    raise PermissionDenied("members only")


@on_subscribe(channel="^closed")
def refuse_without_a_reason(request, socket, context, channel):
    return False


@on_subscribe(channel="^probation")
def refuse_next_time(request, socket, context, channel):
    if channel in socket.channels:
        raise PermissionDenied("no longer")


@on_event("decide again")
def decide_again(request, socket, context):
    socket.revalidate()


@on_event("broadcast")
def broadcast(request, socket, context, message):
    socket.broadcast(message)


@on_event("broadcast channel")
def broadcast_channel(request, socket, context, message, channel=None):
    socket.broadcast_channel(message, channel)


@on_event("put me out")
def put_me_out(request, socket, context, channel):
    socket.unsubscribe(channel)


# Namespaces


@on_event("who am i", namespace="/second")
def who_am_i_there(request, socket, context):
    return who_am_i(request, socket, context)


@on_message(namespace="/second")
def echo_message_there(request, socket, context, message):
    socket.send(message)


@on_connect(namespace="/refused")
def refuse(request, socket, context):
    raise ConnectionRefused("not today", {"retry": False, "after": [1, 2]})


@on_connect(namespace="/denied")
def deny(request, socket, context):
    raise PermissionDenied("not you")


@on_connect(namespace="/falsy")
def refuse_silently(request, socket, context):
    return False
