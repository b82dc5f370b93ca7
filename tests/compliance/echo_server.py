"""
WebSockets that echo: the engine's transport without Engine.IO, for the Autobahn cases.

    python tests/compliance/echo_server.py PORT pywsgi|gunicorn
"""

from gevent import monkey

monkey.patch_all()

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent

sys.path.insert(0, str(Path(__file__).parents[2]))

from django_socketio.engine import Config, Engine, Frame, Response, send_response
from django_socketio.engine.deflate import Compression, deflate
from django_socketio.engine.gunicorn import GunicornServer
from django_socketio.engine.http import Request
from django_socketio.engine.pywsgi import SocketIOServer
from django_socketio.engine.websocket import WebSocketTransport
from tests.engine.workers import Worker

MOST = 64 * 2**20
"""Bytes of a message, and those that wait: case 9 sends 16 MB in one."""


class Always(Compression):
    """Compresses every message, so that all cases are about that."""

    def compress(self, data: bytes) -> bytes:
        return deflate(data, self.level)


class Echo:
    """What a session is elsewhere."""

    transport: WebSocketTransport

    def receive_text(self, text: str) -> None:
        self.transport.send(Frame(text.encode()))

    def receive_binary(self, data: bytes) -> None:
        self.transport.send(Frame(None, data))

    def transport_lost(self, reason: str) -> None:
        pass

    def message_began(self) -> None:
        pass

    def message_ended(self) -> None:
        pass

    def over_limit(self, limit: str) -> None:
        pass

    def too_slow(self, why: str) -> None:
        raise AssertionError(why)


class EchoEngine(Engine):
    """Does without sessions: any handshake of a WebSocket will do."""

    def _respond(self, request: Request, payload: Any) -> Response:
        def take(sock: Any, greeting: bytes, data: bytes) -> None:
            echo = Echo()
            echo.transport = self._websocket(sock, echo, request)
            echo.transport.greet(greeting)
            echo.transport.start(data)

        return self._switch_protocols(request, take)


def main() -> None:
    engine = EchoEngine(
        Config(max_payload=MOST, max_fragments=MOST, max_buffer=MOST, compression=Always(level=1)),
        on_open=lambda session, payload: None,
        on_message=lambda session, data: None,
        on_close=lambda session, reason: None,
    )

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return send_response(engine.handle(environ), start_response)

    address = ("127.0.0.1", int(sys.argv[1]))
    fronts: dict[str, Callable[[], Any]] = {
        "pywsgi": lambda: SocketIOServer(address, application),
        "gunicorn": lambda: GunicornServer(address, application, Worker()),
    }
    fronts[sys.argv[2]]().start()
    gevent.get_hub().join()


if __name__ == "__main__":
    main()
