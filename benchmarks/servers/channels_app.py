"""Django Channels on plain WebSocket: uvicorn --app-dir servers channels_app:application"""

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    SECRET_KEY="benchmark",
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "channels",
    ],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
)
django.setup()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.generic.websocket import AsyncJsonWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.urls import path  # noqa: E402


class Consumer(AsyncJsonWebsocketConsumer):
    groups = ["everybody"]

    async def receive_json(self, content, **kwargs):
        event, data = content
        if event == "echo":
            await self.send_json(["echo", data])
        else:
            await self.channel_layer.group_send("everybody", {"type": "broadcast", "data": data})

    async def broadcast(self, event):
        await self.send_json(["broadcast", event["data"]])


application = ProtocolTypeRouter(
    {"websocket": AuthMiddlewareStack(URLRouter([path("ws/", Consumer.as_asgi())]))}
)
