"""An engine behind the front of a worker, in this process: `Served`, but for who reads its HTTP."""

from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger

from django_socketio.engine.gunicorn import GunicornServer

from . import served

SETTINGS = {"keepalive": 75, "limit_request_line": 0, "limit_request_field_size": 16_384}


class Worker:
    """What the front asks of its worker, which is no process here."""

    def __init__(self, **settings: Any) -> None:
        self.cfg = Config()
        for name, value in {**SETTINGS, **settings}.items():
            self.cfg.set(name, value)
        self.log = Logger(self.cfg)
        self.requests = 0

    def request_began(self) -> None:
        self.requests += 1


class CountingServer(GunicornServer):
    """Knows how many connections the front has in its hands."""

    connections = 0

    def handle(self, *args: Any) -> None:
        self.connections += 1
        try:
            super().handle(*args)
        finally:
            self.connections -= 1


class Served(served.Served):
    """`gunicorn` are settings of the worker."""

    def __init__(
        self,
        *,
        tls: dict[str, str] | None = None,
        gunicorn: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(tls=tls, **changes)
        self.worker = Worker(**(gunicorn or {}))
        server = CountingServer(("127.0.0.1", 0), self.serve, self.worker)
        if tls is not None:
            server.wrap_socket, server.ssl_args = self.server.wrap_socket, self.server.ssl_args
        self.server: Any = server
