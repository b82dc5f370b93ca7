"""
The engine alone under /engine.io/, echoing: what the Engine.IO protocol's test suite talks to.

    python tests/compliance/engine_server.py PORT
"""

from gevent import monkey

monkey.patch_all()

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gevent

sys.path.insert(0, str(Path(__file__).parents[2]))

from django_socketio.engine import Config, Engine, Frame, Session, send_response
from django_socketio.engine.pywsgi import SocketIOServer


def echo(session: Session, data: str | bytes) -> None:
    session.send(Frame.message(data.encode()) if isinstance(data, str) else Frame(None, data))


def main() -> None:
    engine = Engine(
        Config(ping_interval=0.3, ping_timeout=0.2, max_payload=1_000_000),
        on_open=lambda session, payload: None,
        on_message=echo,
        on_close=lambda session, reason: None,
    )

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/engine.io/":
            start_response("404 Not Found", [("Content-Length", "0")])
            return []
        return send_response(engine.handle(environ), start_response)

    server = SocketIOServer(("127.0.0.1", int(sys.argv[1])), application)
    server.start()
    print(f"Engine.IO on http://127.0.0.1:{server.address[1]}/engine.io/", flush=True)
    gevent.get_hub().join()


if __name__ == "__main__":
    main()
