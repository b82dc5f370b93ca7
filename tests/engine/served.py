"""An engine behind the package's own front, in this process, and an application that records."""

import dataclasses
import logging
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import gevent

from django_socketio.engine import Config, Engine, Frame, Headers, Session, send_response
from django_socketio.engine.pywsgi import SocketIOServer
from tests.support import UNIT, wait_until

from .clients import Client, Http, Poller, WebSocket

CONFIG = Config(
    # No ping is due while a test runs that is not about pings.
    ping_interval=1200 * UNIT,
    ping_timeout=400 * UNIT,
    max_payload=100_000,
    max_buffer=100_000,
    max_packets=100,
    upgrade_timeout=400 * UNIT,
    close_timeout=400 * UNIT,
)


T = TypeVar("T", bound=Client)


class Application:
    """
    Keeps what the engine tells it.

    `answer(session, data)` is called with each message, `greet(session)` with each new session.
    """

    def __init__(self) -> None:
        self.opened: list[Session] = []
        self.payloads: list[Any] = []
        self.messages: list[str | bytes] = []
        self.closed: list[tuple[Session, str]] = []
        self.requests: list[tuple[str, str, bytes | None]] = []
        self.greet: Callable[[Session], None] = nothing
        self.answer: Callable[[Session, str | bytes], None] = nothing
        self.allow: Callable[[dict[str, Any]], Headers] = lambda environ: []

    def forget(self) -> None:
        for records in (self.opened, self.messages, self.closed, self.requests):
            records.clear()

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.closed]

    def on_open(self, session: Session, payload: Any) -> None:
        self.opened.append(session)
        self.payloads.append(payload)
        self.greet(session)

    def on_message(self, session: Session, data: str | bytes) -> None:
        self.messages.append(data)
        self.answer(session, data)

    def on_close(self, session: Session, reason: str) -> None:
        self.closed.append((session, reason))


class CountingServer(SocketIOServer):
    """Knows how many connections the front has in its hands."""

    connections = 0

    def handle(self, *args: Any) -> None:
        self.connections += 1
        try:
            super().handle(*args)
        finally:
            self.connections -= 1


class Served:
    """
    Serve on a free port of 127.0.0.1 until the end of the block.

    Then all clients are gone, and so must be all that the server kept for them: sessions and
    connections; for each session that the application saw open it must have seen one end; and
    nothing may have been logged as an error.
    """

    def __init__(self, *, tls: dict[str, str] | None = None, **changes: Any) -> None:
        self.app = Application()
        self.config = dataclasses.replace(CONFIG, **changes)
        self.engine = Engine(
            self.config,
            on_open=self.app.on_open,
            on_message=self.app.on_message,
            on_close=self.app.on_close,
            allow=lambda environ: self.app.allow(environ),
        )
        self.context: ssl.SSLContext | None = None
        options = {}
        if tls is not None:
            options["ssl_context"] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            options["ssl_context"].load_cert_chain(**tls)
            self.context = ssl.create_default_context(cafile=tls["certfile"])
            self.context.check_hostname = False
        self.server = CountingServer(("127.0.0.1", 0), self.serve, **options)
        self.clients: list[Client] = []
        self.errors: list[logging.LogRecord] = []
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = self.errors.append  # type: ignore[method-assign]

    def serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer as the engine does; outside its path, with what the request was."""
        if environ["PATH_INFO"] == "/engine.io/":
            return send_response(self.engine.handle(environ), start_response)
        body = None if environ["PATH_INFO"] == "/unread" else environ["wsgi.input"].read()
        self.app.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], body))
        if environ["PATH_INFO"] == "/stream":
            start_response("200 OK", [])
            return iter([b"in ", b"pieces"])
        start_response("200 OK", [("Content-Length", str(len(body or b"")))])
        return [body] if body else []

    def __enter__(self) -> Self:
        logging.getLogger("django_socketio").addHandler(self._handler)
        self.server.start()
        self.address: tuple[str, int] = self.server.address
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        for client in self.clients:
            client.close()
        self.engine.close_all("server shutting down")
        self.engine.stop()
        try:
            if exc_type is None:
                self.check()
        finally:
            self.server.stop()
            logging.getLogger("django_socketio").removeHandler(self._handler)
            self.app.forget()

    def check(self) -> None:
        """Check that nothing is left."""
        assert not self.engine.sessions
        assert Counter(session.sid for session, _ in self.app.closed) == Counter(
            session.sid for session in self.app.opened
        )
        wait_until(lambda: not self.server.connections, what="the end of every connection")
        assert not self.errors, [record.getMessage() for record in self.errors]

    # Clients

    def http(self, **options: Any) -> Http:
        return self._add(Http(self.address, context=self.context, **options))

    def poller(self, **options: Any) -> Poller:
        return self._add(Poller(self.address, context=self.context, **options))

    def websocket(self, **options: Any) -> WebSocket:
        return self._add(WebSocket(self.address, context=self.context, **options))

    def upgrade(self, poller: Poller, **options: Any) -> WebSocket:
        return self._add(poller.upgrade(**options))

    def client(self, transport: str) -> Poller | WebSocket:
        return self.poller() if transport == "polling" else self.websocket()

    def _add(self, client: T) -> T:
        self.clients.append(client)
        return client

    # The other side of a client

    def session(self, client: Poller | WebSocket) -> Session:
        return self.engine.sessions[client.sid]

    def wait_polled(self, poller: Poller) -> Session:
        """Return the session of a client whose GET has arrived and waits."""
        session = self.session(poller)
        wait_until(lambda: session.transport.polled, what="a GET that waits")
        return session

    def wait_closed(self, reason: str) -> None:
        """Wait for the end of one session, and check why it ended."""
        wait_until(lambda: self.app.closed, what=f"the end of a session: {reason}")
        assert self.app.reasons == [reason]
        assert self.app.closed[0][0].reason == reason


def lanes(served: Served) -> int:
    """Return how many things still wait for a time."""
    return sum(map(len, served.engine.deadlines._lanes))


def nothing(*args: object) -> None:
    """Do that."""


def message(data: str | bytes) -> Frame:
    return Frame.message(data.encode()) if isinstance(data, str) else Frame(None, data)


def echo(session: Session, data: str | bytes) -> None:
    session.send(message(data))


def turn() -> None:
    """Let the loop go round, so that all that is ready runs."""
    gevent.sleep(0)
