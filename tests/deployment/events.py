import os

from django_socketio.events import on_event, on_finish
from tests.deployment.sender import attempt


@on_event("fence")
def fence(request, socket, context):
    return ()


@on_event("whoami")
def whoami(request, socket, context):
    return os.getpid()


@on_event("publish")
def publish(request, socket, context, channel, message):
    """Send to everybody in a channel; the ack says whether that went well."""
    return attempt("broadcast_channel", message, channel) or "sent"


@on_event("members")
def members(request, socket, context, channel):
    return list(attempt("members", channel))


@on_event("enrol")
def enrol(request, socket, context, sid, channel):
    return attempt("subscribe", sid, channel) or "done"


@on_event("disconnect_other")
def disconnect(request, socket, context, sid):
    return attempt("disconnect", sid) or "done"


@on_finish
def finish(request, socket, context):
    print("finished", socket.session.session_id, socket.disconnect_reason, flush=True)
