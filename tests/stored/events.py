import sys

import gevent
from django.contrib.auth.models import Group
from django.db import connection, transaction

from django_socketio import runtime
from django_socketio.events import on_error, on_event


def backend_pid():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@on_event("query")
def query(request, socket, context, seconds=0.0):
    """Take a connection, and its time."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), pg_backend_pid()", [seconds])
        return cursor.fetchone()[1]


on_event("threaded query", threaded=True)(query)


@on_event("hold")
def hold(request, socket, context, seconds):
    """Wait elsewhere, with a connection."""
    pid = backend_pid()
    gevent.sleep(seconds)
    return pid


@on_event("user")
def user(request, socket, context):
    return [request.user.get_username(), request.session.get("colour")]


@on_event("add")
def add(request, socket, context, name, ending):
    """Add a row, and end in one of the ways that handlers should not."""
    if ending == "raise":
        Group.objects.create(name=name)
        raise LookupError(name)
    with transaction.atomic():
        Group.objects.create(name=name)
        if ending == "raise in atomic":
            raise LookupError(name)
        if ending == "wrong query":
            with connection.cursor() as cursor:
                cursor.execute("SELECT nonsense")


@on_event("leave")
def leave(request, socket, context, what, name):
    """Leave the connection in a state."""
    if what == "transaction":
        transaction.set_autocommit(False)
    elif what == "atomic":
        transaction.atomic().__enter__()
    Group.objects.create(name=name)
    if what == "closed":
        connection.connection.close()
    elif what == "interrupted":
        with gevent.Timeout(0.05), connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")
    elif what == "failed":
        transaction.set_autocommit(False)
        with connection.cursor() as cursor:
            cursor.execute("SELECT nonsense")


@on_event("groups")
def groups(request, socket, context):
    return sorted(Group.objects.values_list("name", flat=True))


@on_event("lag")
def lag(request, socket, context):
    return runtime.get_watchdog().worst_lag()


@on_error
def error(request, socket, context, exception):
    print("error:", type(exception).__name__, exception, file=sys.stderr, flush=True)
    socket.emit("failed", type(exception).__name__)
