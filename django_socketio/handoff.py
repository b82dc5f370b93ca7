"""
Requests for sessions of other workers: no worker needs its clients to come back to it.

A session's id begins with the name of the worker that owns it. On the same host the connection
itself goes there, through a Unix socket in the runtime directory: what comes behind the request on
it, an upgraded WebSocket included, then costs nothing more. To another host the request is relayed
over the backend, and an upgrade declined, so that the client stays with polling.
"""

import logging
import os
import re
import socket
import stat
from _socket import socket as RawSocket
from collections.abc import Callable
from contextlib import closing, suppress
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from random import shuffle
from typing import Any

from gevent import get_hub
from gevent.event import Event

from .backends import BackendError
from .cluster import NODE_LENGTH, Answer, Cluster, topic_of
from .engine import FRONT, SID_LENGTH, Engine, Refused, Request, Response, is_gone
from .engine.http import HANDLED
from .protocol.engineio import ErrorCode
from .protocol.exceptions import ProtocolError

logger = logging.getLogger(__name__)

Adopt = Callable[[Any, bytes], None]
"""`adopt(sock, data)`: serve a connection that comes from another worker and begins with `data`."""

_SID = re.compile(rf"[A-Za-z0-9_-]{{{NODE_LENGTH + SID_LENGTH}}}")
_DOOR = re.compile(rf"[A-Za-z0-9_-]{{{NODE_LENGTH}}}\.sock")

_DOOR_TIMEOUT = 5.0
"""Seconds that another worker may take to attend to its door."""

_MAX_MESSAGE = 262_144
"""Bytes that go over with a connection: the head of its request and what came with it."""

_AT_ONCE = 16
"""Connections that are taken in at the door in one turn of the loop."""

_MAX_RELAYED = 10_000
"""Requests of other hosts that are served at once. Most of them are polls, which wait."""

_SLACK = 5.0
"""Seconds that a relayed request may take longer than the longest poll."""

_FAREWELL = 1.0
"""Seconds that a worker which stops waits for the answers to what it has relayed."""

_READ = 1
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Handoff:
    """
    Serves what belongs to the sessions of other workers, and takes what they pass on.

    Runs on the hub of `engine`. Without `open()` it can relay, but nothing is handed to it.
    """

    def __init__(self, engine: Engine, cluster: Cluster, directory: Path) -> None:
        self._engine = engine
        self._cluster = cluster
        self._directory = directory
        self._timeout = engine.config.ping_interval + engine.config.ping_timeout + _SLACK
        self._door: RawSocket | None = None
        self._bell: Any = None
        self._adopt: Adopt | None = None
        self._relays: set[_Relay] = set()
        self._no_relays = Event()
        self._closing = False
        cluster.limits["request"] = _MAX_RELAYED
        cluster.answerers["request"] = self._relayed
        cluster.answerers["let go"] = self._let_go
        cluster.answerers["hang up"] = self._hung_up

    # Requests that come here and belong elsewhere

    def owner(self, sid: str) -> str | None:
        """Return the node that owns a session, or None if it is this one, or the sid is none."""
        if sid.startswith(self._cluster.node) or not _SID.fullmatch(sid):
            return None
        return sid[:NODE_LENGTH]

    def handle(self, environ: dict[str, Any], node: str) -> Response | None:
        """Answer a request for a session of `node`; None if its connection has gone over."""
        environ[HANDLED] = True
        if self._hand_over(environ, node):
            return None
        try:
            return self._relay(Request.from_environ(environ), node)
        except Refused as refused:
            return self._engine.refuse(environ, refused)

    def pass_on(self, environ: dict[str, Any]) -> bool:
        """Give a handshake to a worker of this host that is here to stay; False if none is."""
        nodes = list(self._cluster.staying())
        shuffle(nodes)
        return any(self._hand_over(environ, node) for node in nodes)

    def close(self) -> None:
        """Take nothing more, and end what is being relayed."""
        self._closing = True
        if self._door is not None:
            self._close_door()
        for relay in list(self._relays):
            self._tell(relay, "let go")
        if self._relays:
            self._no_relays.wait(_FAREWELL)

    # On this host: out

    def _hand_over(self, environ: dict[str, Any], node: str) -> bool:
        """Send the connection to the node; return False if it has no door, or TLS ends here."""
        if self._door is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            door.settimeout(_DOOR_TIMEOUT)
            try:
                door.connect(str(self._path(node)))
            except OSError:
                return False
            given = environ[FRONT].release()
            if given is None:
                return False
            sock, data = given
            with closing(sock):  # ours; the other worker gets its own
                self._send(door, sock, data, node)
        return True

    def _send(self, door: Any, sock: Any, data: bytes, node: str) -> None:
        try:
            socket.send_fds(door, [data], [sock.fileno()])
        except OSError as error:
            self._engine.counters["lost: could not hand over"] += 1
            logger.warning("Could not hand a connection to node %s: %s", node, error)
            with suppress(OSError):
                sock.send(_UNAVAILABLE)
        else:
            self._engine.counters["handed over"] += 1

    # On this host: in

    def open(self, adopt: Adopt) -> None:
        """Let other workers of this host pass connections to `adopt`."""
        try:
            self._prepare_directory()
            self._door = self._make_door()
        except OSError as error:
            logger.warning("Workers relay instead of handing connections over: %s", error)
            return
        self._adopt = adopt
        self._bell = get_hub().loop.io(self._door.fileno(), _READ)
        self._bell.start(self._attend)

    def _prepare_directory(self) -> None:
        """Make the directory, ours alone, and rid it of the doors of workers that are dead."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            raise PermissionError(f"{self._directory} is not a directory for its owner alone")
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{self._directory} belongs to another user")
        for path in self._directory.iterdir():
            if _DOOR.fullmatch(path.name) and _is_abandoned(path):
                path.unlink(missing_ok=True)

    def _make_door(self) -> RawSocket:
        door = RawSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            door.setblocking(False)
            door.bind(str(self._path(self._cluster.node)))
        except OSError:
            door.close()
            raise
        return door

    def _path(self, node: str) -> Path:
        return self._directory / f"{node}.sock"

    def _attend(self) -> None:
        """Take in some of those who are at the door. Called by the loop."""
        try:
            for _ in range(_AT_ONCE):
                if not self._take_in():
                    return
        except Exception:  # or the loop would not call again
            logger.exception("A connection of another worker was lost")

    def _take_in(self) -> bool:
        """Take in the next connection; return False if nobody is at the door."""
        assert self._door is not None and self._adopt is not None
        try:
            data, fds = _receive(self._door)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning("Could not take in the connection of another worker: %s", error)
            return False
        sock = _as_socket(fds)
        if sock is not None:
            self._adopt(sock, data)
        elif data:
            self._engine.counters["lost: no connection at the door"] += 1
            logger.warning("Another worker has handed over no connection, or it got lost")
        return bool(data or fds)

    def _close_door(self) -> None:
        assert self._door is not None
        self._path(self._cluster.node).unlink(missing_ok=True)
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RD)  # who is on the way finds it shut
        while self._take_in():
            pass
        self._bell.close()
        self._door.close()
        self._door = None

    # To another host

    def _relay(self, request: Request, node: str) -> Response:
        if not self._cluster.is_alive(node):
            raise Refused(ErrorCode.UNKNOWN_SID, "the worker that had this session is gone")
        if request.query.get("transport") != "polling":
            raise Refused(ErrorCode.BAD_REQUEST, "only polling reaches this session from here")
        self._engine.counters["relayed"] += 1
        relay = _Relay(request, node)
        self._relays.add(relay)
        self._no_relays.clear()
        try:
            response = _response(self._ask(relay))
        except Refused:
            self._tell(relay, "hang up")  # or it would go on without what is lost
            raise
        finally:
            self._relays.discard(relay)
            if not self._relays:
                self._no_relays.set()
        if self._closing:
            response.headers.append(("Connection", "close"))
        return response

    def _ask(self, relay: "_Relay") -> Answer:
        try:
            body = relay.request.read_body(self._engine.config.max_payload)
            outages, fd = self._cluster.counters["outages"], relay.request.front.fileno()
            answer = self._cluster.ask_one(
                topic_of(relay.node),
                "request",
                relay.environ,
                attachments=(body,),
                timeout=self._timeout,
                still=lambda: (
                    self._cluster.is_alive(relay.node)
                    and self._cluster.counters["outages"] == outages  # which may swallow the answer
                    and not is_gone(fd)
                ),
            )
        except ProtocolError:
            raise Refused(ErrorCode.BAD_REQUEST) from None
        except BackendError as error:
            logger.info("A request for node %s was not answered: %s", relay.node, error)
            raise _unavailable() from None
        if answer is None:
            raise Refused(ErrorCode.UNKNOWN_SID, "the worker that had this session is gone")
        return answer

    def _tell(self, relay: "_Relay", what: str) -> None:
        try:
            self._cluster.tell(topic_of(relay.node), what, relay.request.query["sid"])
        except BackendError as error:
            logger.debug("Node %s could not be told to %s: %s", relay.node, what, error)

    # From another host

    def _relayed(self, environ: dict[str, Any], attachments: tuple[bytes, ...]) -> Answer:
        body = b"".join(attachments)
        environ = {**environ, "wsgi.input": BytesIO(body), FRONT: _FarFront()}
        environ["CONTENT_LENGTH"] = str(len(body)) if body else ""
        sid = Request.from_environ(environ).query["sid"]  # what opens a session is never relayed
        response = self._engine.handle(environ)
        if response.sent is not None:
            response.sent(True)  # from here on it is the other host's
        return Answer(
            [response.status.value, response.headers],
            (response.body,),
            undelivered=lambda: self._engine.hung_up(sid),
        )

    def _let_go(self, sid: str, attachments: Any) -> Answer:
        self._engine.let_go(sid)
        return Answer(None)

    def _hung_up(self, sid: str, attachments: Any) -> Answer:
        self._engine.hung_up(sid)
        return Answer(None)


class _Relay:
    """A request that another host's node is to answer."""

    def __init__(self, request: Request, node: str) -> None:
        self.request = request
        self.node = node

    @property
    def environ(self) -> dict[str, str]:
        """What JSON has words for."""
        items = self.request.environ.items()
        return {key: value for key, value in items if isinstance(value, str)}


class _FarFront:
    """The front of a request whose connection is another host's."""

    def handover(self, take: Any) -> None:
        raise Refused(ErrorCode.BAD_REQUEST, "there is no connection to upgrade")

    def release(self) -> None:
        return None

    def fileno(self) -> int:
        return -1


def _response(answer: Answer) -> Response:
    try:
        status, headers = answer.value
        headers = [(str(name), str(value)) for name, value in headers]
        return Response(HTTPStatus(status), b"".join(answer.attachments), headers)
    except (TypeError, ValueError):
        logger.warning("A node's answer to a relayed request is none")
        raise _unavailable() from None


def _unavailable() -> Refused:
    hint, status = "its worker did not answer", HTTPStatus.SERVICE_UNAVAILABLE
    return Refused(ErrorCode.BAD_REQUEST, hint, status)


def _receive(door: Any) -> tuple[bytes, list[int]]:
    """Return what is at the door: the beginning of a request, and its connection."""
    data, fds, _, _ = socket.recv_fds(door, _MAX_MESSAGE, 1, _CLOSE_ON_EXEC)
    return data, fds


def _as_socket(fds: list[int]) -> RawSocket | None:
    """Return the socket that has come, if one has, and it is one."""
    try:
        sock = RawSocket(fileno=fds[0]) if fds else None
    except OSError:
        os.close(fds[0])
        return None
    if sock is not None:
        sock.setblocking(False)
    return sock


def _is_abandoned(door: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(door))
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
    return False
