from django_socketio import emit
from django_socketio.events import on_event


@on_event("echo")
def echo(request, socket, context, data):
    socket.emit("echo", data)


@on_event("broadcast")
def broadcast(request, socket, context, data):
    emit("broadcast", data)
