"""
Realtime messaging for Django over Socket.IO, on gevent, with swappable backends.

The API is imported when somebody asks for it: what imports this package before gevent has patched
the standard library, as gunicorn does for its workers, must get nothing that is bound to it.
"""

# ruff: noqa: F403, F405
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0.dev0"

# What is listed here is found in `api` or in `exceptions`.
__all__ = [
    "BackendError",
    "ConnectionRefused",
    "EventError",
    "NoSocket",
    "broadcast",
    "broadcast_channel",
    "channels",
    "count",
    "disconnect",
    "emit",
    "health",
    "members",
    "revalidate",
    "send",
    "subscribe",
    "unsubscribe",
]

if TYPE_CHECKING:
    from .api import *
    from .exceptions import *
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import api, exceptions

        value = globals()[name] = getattr(exceptions if hasattr(exceptions, name) else api, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
