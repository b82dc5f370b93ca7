"""
The parts of this process, put together: one backend, one hub, and in a server one dispatcher.

Everything is made when it is first needed and belongs to the process: after a fork the child makes
its own.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from django.core.exceptions import ImproperlyConfigured
from django.db import close_old_connections, connections, reset_queries
from django.db.backends.signals import connection_created
from django.urls import NoReverseMatch, get_script_prefix, reverse
from django.utils.module_loading import import_string
from gevent.monkey import is_module_patched

from . import conf, origins
from .backends import BaseBackend, InvalidBackend
from .cluster import Cluster
from .dispatch import Dispatcher
from .engine import FRONT, Config, Engine, Response, send_response
from .handoff import Adopt, Handoff
from .hub import Hub
from .messagelog import MessageLog
from .runners import Runners, note_database

WSGIApplication = Callable[..., Iterable[bytes]]

BACKENDS = {
    "memory": "django_socketio.backends.memory.MemoryBackend",
    "redis": "django_socketio.backends.redis.RedisBackend",
    "rediss": "django_socketio.backends.redis.RedisBackend",
    "unix": "django_socketio.backends.redis.RedisBackend",
    "amqp": "django_socketio.backends.amqp.AMQPBackend",
    "amqps": "django_socketio.backends.amqp.AMQPBackend",
}
_MAX_RUNNERS = 1000
_SID = re.compile("(?:^|&)sid=([^&]*)")


@dataclass(slots=True)
class _Process:
    hub: Hub
    cluster: Cluster
    dispatcher: Dispatcher | None = None
    handoff: Handoff | None = None


_current: dict[int, _Process] = {}
"""This process's parts by its pid, alone."""

_parents: list[_Process] = []
"""What was inherited at forks, kept so that nothing closes it: it is the parents'."""


def _disown() -> None:
    _parents.extend(_current.values())
    _current.clear()


os.register_at_fork(after_in_child=_disown)


def make_backend(value: Any) -> BaseBackend:
    """Make the backend that a value of `SOCKETIO_BACKEND` names; raise `ImproperlyConfigured`."""
    problem = conf.SETTINGS["BACKEND"].problem(value)
    if problem:
        raise ImproperlyConfigured(f"SOCKETIO_BACKEND {problem}, not {value!r}.")
    options: dict[str, Any] = {}
    if isinstance(value, dict):
        path, options = value["BACKEND"], value.get("OPTIONS", {})
    elif "://" in value:
        scheme = value.partition("://")[0]
        if scheme not in BACKENDS:
            known = ", ".join(f"{name}://" for name in BACKENDS)
            raise ImproperlyConfigured(f"SOCKETIO_BACKEND: {scheme}:// is none of {known}.")
        path, options = BACKENDS[scheme], {"url": value}
    else:
        path = value
    try:
        backend = import_string(path)(**options)
    except (ImportError, TypeError, InvalidBackend) as error:
        raise ImproperlyConfigured(f"SOCKETIO_BACKEND: no {path}: {error}") from error
    if not isinstance(backend, BaseBackend):
        raise ImproperlyConfigured(f"SOCKETIO_BACKEND: {path} is no BaseBackend.")
    return backend


def get_hub() -> Hub:
    """Return the hub of this process, any process. Safe from any thread and after a fork."""
    return _get_process().hub


def get_cluster() -> Cluster:
    """Return this process's place among the others, as `get_hub()`."""
    return _get_process().cluster


def _get_process() -> _Process:
    pid = os.getpid()
    process = _current.get(pid)
    if process is None:
        hub = Hub(make_backend(conf.get("BACKEND")))
        # No lock, which a fork could inherit: of several at once the first one's stays.
        process = _current.setdefault(pid, _Process(hub, Cluster(hub)))
    return process


def get_dispatcher() -> Dispatcher | None:
    """Return the dispatcher if this process serves sockets."""
    process = _current.get(os.getpid())
    return process.dispatcher if process is not None else None


def start() -> Dispatcher:
    """Begin to serve sockets in this process; raise `ImproperlyConfigured` if it cannot."""
    if not is_module_patched("socket"):
        raise ImproperlyConfigured(
            "gevent has not patched the standard library, so one handler that waits would stop all:"
            " start with `manage.py runserver_socketio`, or call gevent.monkey.patch_all() before"
            " Django is imported."
        )
    problems = conf.problems()
    if problems:
        raise ImproperlyConfigured(problems[0][1])
    process = _get_process()
    process.hub.start()
    process.cluster.start()
    log_format = conf.get("MESSAGE_LOG_FORMAT")
    connection_created.connect(_connection_created, dispatch_uid="django_socketio")
    process.dispatcher = Dispatcher(
        process.hub,
        Config(
            ping_interval=conf.get("PING_INTERVAL"),
            ping_timeout=conf.get("PING_TIMEOUT"),
            max_payload=int(conf.get("MAX_PAYLOAD")),
            max_buffer=int(conf.get("MAX_BUFFER")),
            node=process.cluster.node,
        ),
        connect_timeout=conf.get("CONNECT_TIMEOUT"),
        allow=origins.allow,
        log=None if log_format is None else MessageLog(log_format),
        runners=Runners(
            limit=_MAX_RUNNERS,
            before=_before_handler,
            after=close_old_connections,
            end=connections.close_all,
        ),
    )
    if process.hub.backend.crosses_processes:
        outbox = process.dispatcher.engine.outbox
        outbox.moderate()
        process.hub.delivered = outbox.delivered
    process.handoff = Handoff(process.dispatcher.engine, process.cluster, runtime_directory())
    return process.dispatcher


def runtime_directory() -> Path:
    """Return the directory in which the workers of this host, if they are ours, find each other."""
    directory = conf.get("RUNTIME_DIR")
    if directory is not None:
        return Path(directory)
    if "XDG_RUNTIME_DIR" in os.environ:
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "django-socketio"
    return Path(tempfile.gettempdir()) / f"django-socketio-{os.geteuid()}"


def accept_from_others(adopt: Adopt) -> None:
    """Have other workers of this host hand over the connections of sessions that live here."""
    process = _get_process()
    if process.handoff is not None and process.hub.backend.crosses_processes:
        process.handoff.open(adopt)


def stop(timeout: float = 10.0) -> None:
    """End every socket, run what waits for that (`on_finish` last), and let go of the backend."""
    process = _current.get(os.getpid())
    if process is None:
        return
    dispatcher = process.dispatcher
    if dispatcher is not None:
        dispatcher.engine.stop_accepting()
        dispatcher.engine.close_all("server shutting down")
        dispatcher.wait_empty(timeout)
        dispatcher.engine.stop()
        dispatcher.runners.stop()
        process.dispatcher = None
    if process.handoff is not None:
        process.handoff.close()
    process.cluster.stop()
    process.hub.stop()
    _current.pop(os.getpid(), None)


def _before_handler() -> None:
    reset_queries()
    close_old_connections()


def _connection_created(**kwargs: Any) -> None:
    note_database()


def socketio_path() -> str:
    """Return the path that the URL conf gives to the engine; raise `ImproperlyConfigured`."""
    try:
        return reverse("socketio")
    except NoReverseMatch:
        raise ImproperlyConfigured(
            'The URL conf has no Socket.IO: add path("", include("django_socketio.urls")) to'
            " urlpatterns."
        ) from None


class Application:
    """
    The WSGI application of a server: the engine's, and Django's for all the rest.

    A handshake goes through Django and its middleware to the view; what belongs to a session goes
    straight to the engine, since its request ended with the handshake.
    """

    def __init__(self, django: WSGIApplication, dispatcher: Dispatcher) -> None:
        self._django = django
        self._engine = dispatcher.engine
        handoff = _get_process().handoff
        assert handoff is not None
        self._handoff = handoff
        # As PATH_INFO has it: not quoted, and behind the prefix that a proxy has taken off.
        path = "/" + socketio_path().removeprefix(get_script_prefix())
        self._path = unquote_to_bytes(path).decode("latin-1")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == self._path:
            sid = _SID.search(environ["QUERY_STRING"])
            # Whatever may open a session must have passed Django.
            if sid is not None or environ["REQUEST_METHOD"] != "GET":
                # It may wait for long: no database connection waits with it.
                connections.close_all()
                response = self._respond(environ, sid[1] if sid else "")
                return [] if response is None else send_response(response, start_response)
        if "HTTP_TRANSFER_ENCODING" in environ:
            # Django reads by Content-Length, and would take the body for empty.
            start_response("411 Length Required", [("Content-Length", "0")])
            return []
        return self._django(environ, start_response)

    def _respond(self, environ: dict[str, Any], sid: str) -> Response | None:
        """Answer for whichever worker has the session; None if the connection has gone there."""
        owner = self._handoff.owner(sid)
        if owner is None:
            return self._engine.handle(environ)
        return self._handoff.handle(environ, owner)


def get_engine(environ: dict[str, Any]) -> Engine | None:
    """Return the engine if there is one and the request's server can give it the socket."""
    dispatcher = get_dispatcher()
    return dispatcher.engine if dispatcher is not None and FRONT in environ else None
