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
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any

import gevent

from .backends import BackendError
from .cluster import NODE_LENGTH, Answer, Cluster, topic_of
from .engine import FRONT, SID_LENGTH, Engine, Refused, Request, Response, is_gone
from .protocol.engineio import ErrorCode
from .protocol.exceptions import ProtocolError

logger = logging.getLogger(__name__)

Adopt = Callable[[Any, bytes], None]
"""`adopt(sock, data)`: serve a connection that comes from another worker and begins with `data`."""

_SID = re.compile(rf"[A-Za-z0-9_-]{{{NODE_LENGTH + SID_LENGTH}}}\Z")
_DOOR_TIMEOUT = 5.0
"""Seconds that another worker may take to attend to its door."""

_MAX_MESSAGE = 262_144
"""Bytes that go over with a connection: the head of its request and what came with it."""

_SLACK = 5.0
"""Seconds that a relayed request may take longer than the longest poll."""


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
        self._door: Any = None
        self._adopt: Adopt | None = None
        self._doorman: gevent.Greenlet[..., Any] | None = None
        self._neighbours: dict[str, Any] = {}  # node: a socket that is connected to its door
        cluster.answerers["request"] = self._relayed
        cluster.answerers["hangup"] = self._hung_up

    # Requests that come here and belong elsewhere

    def owner(self, sid: str) -> str | None:
        """Return the node that owns a session, or None if it is this one, or the sid is none."""
        if sid.startswith(self._cluster.node) or not _SID.match(sid):
            return None
        return sid[:NODE_LENGTH]

    def handle(self, environ: dict[str, Any], node: str) -> Response | None:
        """Answer a request for a session of `node`; None if its connection has gone over."""
        neighbour = self._neighbour(node)
        if neighbour is not None and self._hand_over(environ, neighbour, node):
            return None
        self._engine.counters["relayed"] += 1
        try:
            return self._relay(Request.from_environ(environ), node)
        except Refused as refused:
            return self._engine.refuse(environ, refused)

    # On this host

    def _neighbour(self, node: str) -> Any:
        """Return a socket that leads to the node's door; None if it has none on this host."""
        neighbour = self._neighbours.get(node)
        if neighbour is None and self._adopt is not None:
            neighbour = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            neighbour.settimeout(_DOOR_TIMEOUT)
            try:
                neighbour.connect(str(self._path(node)))
            except OSError:
                neighbour.close()
                return None
            self._neighbours[node] = neighbour
        return neighbour

    def _hand_over(self, environ: dict[str, Any], neighbour: Any, node: str) -> bool:
        """Send the connection to the neighbour; return False if it cannot be passed on."""
        given = environ[FRONT].release()
        if given is None:
            return False
        sock, data = given
        try:
            socket.send_fds(neighbour, [data], [sock.fileno()])
        except OSError as error:
            self._could_not(node, error, sock, data)
        else:
            self._engine.counters["handed over"] += 1
            sock.close()  # ours; the other worker has its own
        return True

    def _could_not(self, node: str, error: OSError, sock: Any, data: bytes) -> None:
        neighbour = self._neighbours.pop(node, None)
        if neighbour is not None:
            neighbour.close()
        if isinstance(error, ConnectionError) and self._adopt is not None:
            self._adopt(sock, data)  # the worker is dead: next time there is no door
            return
        self._engine.counters["lost: could not hand over"] += 1
        logger.warning("Could not hand a connection to node %s: %s", node, error)
        sock.close()

    def open(self, adopt: Adopt) -> None:
        """Let other workers of this host pass connections to `adopt`."""
        try:
            self._prepare_directory()
            door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            door.bind(str(self._path(self._cluster.node)))
        except OSError as error:
            logger.warning("Workers relay instead of handing connections over: %s", error)
            return
        self._door, self._adopt = door, adopt
        self._doorman = gevent.spawn(self._attend, door, adopt)

    def _prepare_directory(self) -> None:
        """Make the directory, ours alone, and rid it of the doors of workers that are dead."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            raise PermissionError(f"{self._directory} is not a directory for its owner alone")
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{self._directory} belongs to another user")
        for path in self._directory.glob("*.sock"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)

    def _path(self, node: str) -> Path:
        return self._directory / f"{node}.sock"

    def _attend(self, door: Any, adopt: Adopt) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(door, _MAX_MESSAGE, 1)
                for descriptor in descriptors:
                    sock = RawSocket(fileno=descriptor)
                    sock.setblocking(False)
                    adopt(sock, data)
            except Exception:
                logger.exception("A connection of another worker was lost")
                gevent.sleep(0.01)

    def close(self) -> None:
        """Take nothing more, and forget the neighbours."""
        if self._door is not None:
            self._path(self._cluster.node).unlink(missing_ok=True)
            if self._doorman is not None:
                self._doorman.kill()
            self._door.close()
            self._door = self._adopt = None
        while self._neighbours:
            self._neighbours.popitem()[1].close()

    # To another host

    def _relay(self, request: Request, node: str) -> Response:
        if request.query.get("transport") != "polling":
            raise Refused(
                ErrorCode.BAD_REQUEST,
                "the session lives on another host, where only polling reaches it",
            )
        environ = request.environ
        try:
            body = request.read_body(self._engine.config.max_payload)
        except ProtocolError:
            raise Refused(ErrorCode.BAD_REQUEST) from None
        fd = environ[FRONT].fileno()
        try:
            answer = self._cluster.ask_one(
                topic_of(node),
                "request",
                {key: value for key, value in environ.items() if isinstance(value, str)},
                attachments=(body,),
                timeout=self._timeout,
                still=lambda: self._cluster.is_alive(node) and not is_gone(fd),
            )
        except BackendError as error:
            logger.info("A request for node %s was not answered: %s", node, error)
            self._hang_up(node, request.query["sid"])
            raise Refused(
                ErrorCode.BAD_REQUEST, "its worker did not answer", HTTPStatus.SERVICE_UNAVAILABLE
            ) from None
        if answer is None:
            raise Refused(ErrorCode.UNKNOWN_SID, "the worker that had this session is gone")
        status, headers = answer.value
        body = b"".join(answer.attachments)
        return Response(HTTPStatus(status), body, [(name, value) for name, value in headers])

    def _hang_up(self, node: str, sid: str) -> None:
        """Tell the session's worker that nobody waits for its answer any more."""
        try:
            self._cluster.tell(topic_of(node), "hangup", sid)
        except BackendError as error:
            logger.debug("Nor could node %s be told: %s", node, error)

    # From another host

    def _relayed(self, environ: dict[str, Any], attachments: tuple[bytes, ...]) -> Answer:
        body = b"".join(attachments)
        environ = {**environ, "wsgi.input": BytesIO(body), FRONT: _FarFront()}
        environ["CONTENT_LENGTH"] = str(len(body)) if body else ""
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        response = self._engine.handle(environ)
        sid = Request.from_environ(environ).query.get("sid", "")
        return Answer(
            [response.status.value, response.headers],
            (response.body,),
            undelivered=lambda: self._engine.hung_up(sid),
        )

    def _hung_up(self, sid: str, attachments: Any) -> Answer:
        self._engine.hung_up(sid)
        return Answer(None)


class _FarFront:
    """The front of a request whose connection is another host's."""

    def handover(self, take: Any) -> None:
        raise Refused(ErrorCode.BAD_REQUEST, "there is no connection to upgrade")

    def release(self) -> None:
        return None

    def fileno(self) -> int:
        return -1
