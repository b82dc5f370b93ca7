"""
The events of a socket, which handlers are bound to by decorating them, like signal receivers::

    from django_socketio.events import on_message

    @on_message(channel="^room-")
    def message(request, socket, context, message):
        ...

Every event but `on_connect` takes `channel`, a regular expression that is matched from the start:
the handler is then called for sockets that are subscribed to a matching channel; for `on_subscribe`
and `on_unsubscribe` the channel at hand must match. `namespace` is "/" unless told otherwise.

With `threaded=True` the handler runs in a thread, where it may block without holding up all other
clients; its socket can do there what it can do elsewhere.
"""

import re
from collections.abc import Callable, Iterable
from inspect import iscoroutinefunction
from typing import Any, NamedTuple, TypeVar, overload

from .exceptions import EventError
from .protocol.socketio import RESERVED_EVENTS

__all__ = [
    "EventError",
    "on_connect",
    "on_disconnect",
    "on_error",
    "on_event",
    "on_finish",
    "on_message",
    "on_subscribe",
    "on_unsubscribe",
]

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

SUBSCRIBE = "__subscribe__"
UNSUBSCRIBE = "__unsubscribe__"
MESSAGE = "message"
UNAVAILABLE = RESERVED_EVENTS | {SUBSCRIBE, UNSUBSCRIBE}
"""Names that no application event can have."""


class Handler(NamedTuple):
    function: Function
    pattern: re.Pattern[str] | None
    threaded: bool = False
    event: str = ""

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))

    def hears(self, channels: Iterable[str]) -> bool:
        pattern = self.pattern
        return pattern is None or any(pattern.match(channel) for channel in channels)


class Registry:
    """All handlers of one set of events, by event, name and namespace."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[str, str], list[Handler]] = {}
        self._namespaces = {"/"}

    def add(self, event: str, namespace: str, handler: Handler) -> None:
        self._handlers.setdefault((event, namespace), []).append(handler)
        self._namespaces.add(namespace)

    def remove(self, function: Function) -> None:
        """Forget a handler wherever it is bound; for tests."""
        for handlers in self._handlers.values():
            handlers[:] = [handler for handler in handlers if handler.function is not function]

    def get(self, event: str, namespace: str) -> list[Handler]:
        return self._handlers.get((event, namespace), _NONE)

    def has_namespace(self, namespace: str) -> bool:
        """Tell whether a handler names it; "/" exists always."""
        return namespace in self._namespaces


_NONE: list[Handler] = []

registry = Registry()


class Event:
    """A lifecycle event: decorate with it, bare or called with keyword arguments."""

    def __init__(self, name: str, *, takes_channel: bool = True) -> None:
        self.name = name
        self._takes_channel = takes_channel

    def __repr__(self) -> str:
        return f"<Event {self.name}>"

    @overload
    def __call__(self, handler: F) -> F: ...

    @overload
    def __call__(
        self,
        *,
        channel: str | re.Pattern[str] | None = None,
        namespace: str = "/",
        threaded: bool = False,
    ) -> Callable[[F], F]: ...

    def __call__(
        self,
        handler: F | None = None,
        *,
        channel: str | re.Pattern[str] | None = None,
        namespace: str = "/",
        threaded: bool = False,
    ) -> F | Callable[[F], F]:
        if handler is not None:
            return self._bind(self.name, handler, channel, namespace, threaded)
        return lambda function: self._bind(self.name, function, channel, namespace, threaded)

    def _bind(
        self,
        event: str,
        function: F,
        channel: str | re.Pattern[str] | None,
        namespace: str,
        threaded: bool,
    ) -> F:
        """Register `function`; raise `EventError` for what could never be called."""
        if not callable(function):
            raise EventError(
                f"{self.name} decorates a function, not {function!r}; its arguments are named."
            )
        name = getattr(function, "__qualname__", repr(function))
        if iscoroutinefunction(function):
            raise EventError(f"{name} is async: handlers of {self.name} are plain functions.")
        if channel is not None and not self._takes_channel:
            raise EventError(
                f"{self.name} takes no channel, since a socket subscribes after it has connected:"
                f" bind {name} without one."
            )
        if not namespace.startswith("/") or "," in namespace:
            raise EventError(
                f'{namespace!r} is no namespace for {name}: it begins with "/" and has no comma.'
            )
        try:
            pattern = None if channel is None else re.compile(channel)
        except re.error as error:
            raise EventError(
                f"The channel {channel!r} of {name} is no regular expression: {error}."
            ) from error
        registry.add(event, namespace, Handler(function, pattern, threaded, event))
        return function


class NamedEvent(Event):
    """An event of the application's own, by the name under which the client emits it."""

    def __call__(  # type: ignore[override]
        self,
        name: str,
        *,
        channel: str | re.Pattern[str] | None = None,
        namespace: str = "/",
        threaded: bool = False,
    ) -> Callable[[F], F]:
        if not isinstance(name, str):
            raise EventError('on_event needs the name of the event: @on_event("name").')
        if name in UNAVAILABLE:
            raise EventError(f"{name!r} is an event of the protocol itself: choose another name.")
        return lambda function: self._bind(f"event:{name}", function, channel, namespace, threaded)


on_connect = Event("on_connect", takes_channel=False)
on_message = Event("on_message")
on_event = NamedEvent("on_event")
on_subscribe = Event("on_subscribe")
on_unsubscribe = Event("on_unsubscribe")
on_error = Event("on_error")
on_disconnect = Event("on_disconnect")
on_finish = Event("on_finish")
