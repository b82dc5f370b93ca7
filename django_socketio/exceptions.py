from typing import Any

from .backends.exceptions import BackendError

__all__ = ["BackendError", "ConnectionRefused", "EventError", "NoSocket"]


class EventError(Exception):
    """A handler was registered in a way that could never work."""


class NoSocket(Exception):
    """Nobody is there to receive what was sent."""


class ConnectionRefused(Exception):
    """
    Raised by an `on_connect` handler to refuse the client.

    `message` and `data`, any JSON value, are what the client's `connect_error` event gets as
    `error.message` and `error.data`.
    """

    def __init__(self, message: str = "Connection refused", data: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.data = data
