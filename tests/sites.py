"""The tests' Django project, served in this process on a free port."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pytest
from django.core.wsgi import get_wsgi_application
from django.test import override_settings

from django_socketio import events, runtime
from django_socketio.dispatch import Dispatcher
from django_socketio.engine.pywsgi import SocketIOServer
from tests import clients
from tests.clients import Client, Connection


@contextmanager
def no_handlers() -> Iterator[None]:
    """Begin without any handler, and forget those that are bound meanwhile."""
    registry = events.registry
    before = vars(registry).copy()
    vars(registry).update(vars(events.Registry()))
    try:
        yield
    finally:
        vars(registry).clear()
        vars(registry).update(before)


class Site:
    """
    Serve the project with some settings, and with the handlers that are bound in its block.

    Clients that it connects are closed at its end. The namespaces know the event `fence`, which
    `Client.fence()` waits for. There is a watchdog only where the settings have its threshold: the
    hub is that of the tests, which work on it for as long as they like.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = override_settings(**{"SOCKETIO_BLOCKING_THRESHOLD": None, **settings})
        self._block = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as block:
            block.enter_context(no_handlers())
            block.enter_context(self._settings)
            self._start()
            block.callback(self.stop)
            self._block = block.pop_all()
        return self

    def _start(self) -> None:
        self.namespace("/")
        self.dispatcher: Dispatcher = runtime.start()
        application = runtime.Application(get_wsgi_application(), self.dispatcher)
        self.server = SocketIOServer(("127.0.0.1", 0), application)
        self.server.start()
        runtime.accept_from_others(self.server.adopt)

    def __exit__(self, *exc_info: object) -> None:
        self._block.close()

    def stop(self) -> None:
        """End the server and everything in it; twice is fine."""
        self.server.stop(timeout=1)
        runtime.stop()
        assert not self.dispatcher.connections
        assert not self.dispatcher.engine.sessions

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    def namespace(self, name: str) -> None:
        """Have a namespace by that name."""

        @events.on_event("fence", namespace=name)
        def fence(request: Any, socket: Any, context: Any) -> tuple[()]:
            return ()

    def open(self, transport: str = "websocket", **options: Any) -> Connection:
        """Open a session that is connected to no namespace."""
        connection = clients.open_connection(self.address, transport=transport, **options)
        return self._block.enter_context(connection)

    def connect(
        self,
        namespace: str = "/",
        auth: Any = None,
        *,
        transport: str = "websocket",
        **options: Any,
    ) -> Client:
        """Connect a client of its own to a namespace."""
        return self.open(transport, **options).connect(namespace, auth)

    def connect_several(self, number: int, namespace: str = "/") -> list[Client]:
        return [self.connect(namespace) for _ in range(number)]


def settings(**values: Any) -> pytest.MarkDecorator:
    """Have the fixture `site` serve with these settings."""
    return pytest.mark.parametrize("site", [values], indirect=True, ids=["settings"])


Handler = Callable[..., Any]
