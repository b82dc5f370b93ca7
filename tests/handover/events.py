from django_socketio import runtime
from django_socketio.events import on_event


@on_event("is polled")
def is_polled(request, socket, context, sid):
    """Tell whether a GET of a session waits."""
    session = runtime.get_dispatcher().engine.sessions.get(sid)
    return session is not None and session.transport.polled
