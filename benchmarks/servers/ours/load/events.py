from gevent import sleep

from django_socketio import emit
from django_socketio.events import on_event


@on_event("echo")
def echo(request, socket, context, data):
    socket.emit("echo", data)


@on_event("broadcast")
def broadcast(request, socket, context, data):
    emit("broadcast", data)


@on_event("volatile")
def volatile(request, socket, context, data):
    socket.send_and_broadcast(data, volatile=True)


@on_event("coalesce")
def coalesce(request, socket, context, data):
    socket.send_and_broadcast(data, coalesce="data")


@on_event("stall")
def stall(request, socket, context, size):
    """Send to a client that does not read: more than the kernel takes, less than ends it."""
    for _ in range(size // 10_000):
        socket.send("x" * 10_000, volatile=True)
        sleep(0)
