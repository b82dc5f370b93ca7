"""
The parts of this process, put together: one backend, one hub, and in a server one dispatcher.

Everything is made when it is first needed and belongs to the process: after a fork the child makes
its own.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
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
from .dispatch import Dispatcher
from .engine import FRONT, Config, Engine, send_response
from .hub import Hub
from .messagelog import MessageLog
from .runners import Runners, note_database

WSGIApplication = Callable[..., Iterable[bytes]]

BACKENDS = {
    "memory": "django_socketio.backends.memory.MemoryBackend",
}
_MAX_RUNNERS = 1000
_SID = re.compile("(?:^|&)sid=")


@dataclass(slots=True)
class _Process:
    pid: int
    hub: Hub
    dispatcher: Dispatcher | None = None


_process: _Process | None = None
_lock = Lock()


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


def _get_process() -> _Process:
    global _process
    process = _process
    if process is None or process.pid != os.getpid():
        with _lock:
            process = _process
            if process is None or process.pid != os.getpid():
                hub = Hub(make_backend(conf.get("BACKEND")))
                process = _process = _Process(os.getpid(), hub)
    return process


def get_dispatcher() -> Dispatcher | None:
    """Return the dispatcher if this process serves sockets."""
    return _process.dispatcher if _process is not None else None


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
    log_format = conf.get("MESSAGE_LOG_FORMAT")
    connection_created.connect(_connection_created, dispatch_uid="django_socketio")
    process.dispatcher = Dispatcher(
        process.hub,
        Config(
            ping_interval=conf.get("PING_INTERVAL"),
            ping_timeout=conf.get("PING_TIMEOUT"),
            max_payload=int(conf.get("MAX_PAYLOAD")),
            max_buffer=int(conf.get("MAX_BUFFER")),
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
    return process.dispatcher


def stop(timeout: float = 10.0) -> None:
    """End every socket, run what waits for that (`on_finish` last), and let go of the backend."""
    global _process
    process = _process
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
    process.hub.stop()
    _process = None


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
        # As PATH_INFO has it: not quoted, and behind the prefix that a proxy has taken off.
        path = "/" + socketio_path().removeprefix(get_script_prefix())
        self._path = unquote_to_bytes(path).decode("latin-1")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == self._path and not self._opens(environ):
            # It may wait for long: no database connection waits with it.
            connections.close_all()
            return send_response(self._engine.handle(environ), start_response)
        if "HTTP_TRANSFER_ENCODING" in environ:
            # Django reads by Content-Length, and would take the body for empty.
            start_response("411 Length Required", [("Content-Length", "0")])
            return []
        return self._django(environ, start_response)

    @staticmethod
    def _opens(environ: dict[str, Any]) -> bool:
        """Tell whether the request may open a session: whatever does must have passed Django."""
        return environ["REQUEST_METHOD"] == "GET" and not _SID.search(environ["QUERY_STRING"])


def get_engine(environ: dict[str, Any]) -> Engine | None:
    """Return the engine if there is one and the request's server can give it the socket."""
    dispatcher = get_dispatcher()
    return dispatcher.engine if dispatcher is not None and FRONT in environ else None
