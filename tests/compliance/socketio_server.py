"""
A Django project in one file: what the Socket.IO protocol's test suite talks to.

    python tests/compliance/socketio_server.py PORT
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from django.conf import settings
from django.core.management import execute_from_command_line
from django.urls import include, path

settings.configure(
    DEBUG=False,
    SECRET_KEY="compliance",
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF="__main__",
    INSTALLED_APPS=["django_socketio"],
    DATABASES={},
    SOCKETIO_PING_INTERVAL=0.3,
    SOCKETIO_PING_TIMEOUT=0.2,
    SOCKETIO_CONNECT_TIMEOUT=1.0,
    SOCKETIO_MAX_PAYLOAD=1_000_000,
)

from django_socketio.events import on_connect, on_event, on_message

urlpatterns = [path("", include("django_socketio.urls"))]


@on_connect
@on_connect(namespace="/custom")
def auth(request: Any, socket: Any, context: dict[Any, Any]) -> None:
    socket.emit("auth", socket.auth)


@on_message
def message(request: Any, socket: Any, context: dict[Any, Any], message: Any) -> None:
    socket.emit("message-back", *(message if isinstance(message, tuple) else (message,)))


@on_event("message-with-ack")
def message_with_ack(
    request: Any, socket: Any, context: dict[Any, Any], *args: Any
) -> tuple[Any, ...]:
    return args


if __name__ == "__main__":
    execute_from_command_line(
        [sys.argv[0], "runserver_socketio", f"127.0.0.1:{sys.argv[1]}", "--noreload"]
    )
