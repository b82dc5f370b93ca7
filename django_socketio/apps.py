from django.apps import AppConfig
from django.core.checks import register
from django.utils.module_loading import autodiscover_modules

from . import accounts, checks


class SocketIOConfig(AppConfig):
    name = "django_socketio"
    verbose_name = "Socket.IO"

    def ready(self) -> None:
        """
        Import the `events` module of every installed app, whose handlers bind themselves.

        From now on this process tells the servers whose login has ended.
        """
        register(checks.check_settings)
        register(checks.check_origins, deploy=True)
        register(checks.check_backend)
        register(checks.check_urls)
        accounts.watch()
        autodiscover_modules("events")
