from django.apps import AppConfig
from django.core.checks import register
from django.utils.module_loading import autodiscover_modules

from . import checks


class SocketIOConfig(AppConfig):
    name = "django_socketio"
    verbose_name = "Socket.IO"

    def ready(self) -> None:
        """Import the `events` module of every installed app, whose handlers bind themselves."""
        register(checks.check_settings)
        register(checks.check_origins, deploy=True)
        register(checks.check_backend)
        register(checks.check_urls)
        autodiscover_modules("events")
