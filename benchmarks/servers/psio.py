"""
python-socketio on gevent with gevent-websocket: python -m gevent.monkey psio.py PORT

With REDIS_URL it is one of several, joined by the RedisManager.
"""

import os
import sys

import socketio
from gevent import pywsgi
from geventwebsocket.handler import WebSocketHandler

url = os.environ.get("REDIS_URL")
manager = socketio.RedisManager(url) if url else None
sio = socketio.Server(async_mode="gevent", client_manager=manager)


@sio.event
def echo(sid, data):
    sio.emit("echo", data, to=sid)


@sio.event
def broadcast(sid, data):
    sio.emit("broadcast", data)


def main() -> None:
    address = ("127.0.0.1", int(sys.argv[1]))
    pywsgi.WSGIServer(
        address, socketio.WSGIApp(sio), handler_class=WebSocketHandler, log=None
    ).serve_forever()


main()
