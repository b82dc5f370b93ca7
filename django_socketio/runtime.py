"""
The parts of this process, put together: one backend, one hub, and in a server one dispatcher.

Everything is made when it is first needed and belongs to the process: after a fork the child makes
its own.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import unquote_to_bytes

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.signals import connection_created
from django.urls import NoReverseMatch, get_script_prefix, reverse
from django.utils.module_loading import import_string
from gevent import sleep
from gevent._hub_local import get_hub_if_exists, set_hub, set_loop
from gevent.monkey import is_module_patched

from . import conf, databases, descriptors, origins
from .backends import BaseBackend, InvalidBackend
from .cluster import Cluster
from .databases import ConnectionLimit
from .dispatch import Dispatcher, find_handler
from .drain import Drain
from .engine import (
    FRONT,
    OPENED,
    AdmissionLimits,
    Compression,
    Config,
    Engine,
    Rate,
    Response,
    send_response,
)
from .handoff import Adopt, Handoff
from .hub import Hub
from .identities import Identities, user_of_handshake
from .limits import Limits
from .messagelog import MessageLog
from .protocol import socketio
from .runners import Runners, note_database, uses_database
from .signals import GapTeller
from .slow import Rules
from .threads import Threads
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

WSGIApplication = Callable[..., Iterable[bytes]]

BACKENDS = {
    "memory": "django_socketio.backends.memory.MemoryBackend",
    "redis": "django_socketio.backends.redis.RedisBackend",
    "rediss": "django_socketio.backends.redis.RedisBackend",
    "unix": "django_socketio.backends.redis.RedisBackend",
    "amqp": "django_socketio.backends.amqp.AMQPBackend",
    "amqps": "django_socketio.backends.amqp.AMQPBackend",
}
_LOOK = 0.01
_SID = re.compile("(?:^|&)sid=([^&]*)")


@dataclass(slots=True)
class _Process:
    hub: Hub
    cluster: Cluster
    dispatcher: Dispatcher | None = None
    handoff: Handoff | None = None
    watchdog: Watchdog | None = None
    connection_limit: ConnectionLimit | None = None
    drain: Drain | None = None


_current: dict[int, _Process] = {}
"""This process's parts by its pid, alone."""

_parents: list[Any] = []
"""What was inherited at forks, kept so that nothing closes it: it is the parents'."""


def _disown() -> None:
    if any(process.dispatcher is not None for process in _current.values()):
        _abandon_hub()
    _parents.extend(_current.values())
    _current.clear()


def _abandon_hub() -> None:
    """
    Leave the parent's hub, with its greenlets and its clients.

    They would all go on here as soon as this child waits for anything, and take what the parent's
    clients send. What waits in this child has a hub of its own.
    """
    hub = get_hub_if_exists()
    if hub is not None:
        _parents.append(hub)
        set_hub(None)  # type: ignore[arg-type]
        set_loop(None)  # type: ignore[arg-type]
        hub.loop.destroy()


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


def make_rules(value: Any) -> Rules:
    """Make what a value of `SOCKETIO_SLOW_CONSUMERS` asks for; raise `ImproperlyConfigured`."""
    problem = conf.SETTINGS["SLOW_CONSUMERS"].problem(value)
    if problem:
        raise ImproperlyConfigured(f"SOCKETIO_SLOW_CONSUMERS {problem}, not {value!r}.")
    return Rules(value)


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
        hub.rules = make_rules(conf.get("SLOW_CONSUMERS"))
        # No lock, which a fork could inherit: of several at once the first one's stays.
        process = _current.setdefault(pid, _Process(hub, Cluster(hub)))
    return process


def get_dispatcher() -> Dispatcher | None:
    """Return the dispatcher if this process serves sockets."""
    process = _current.get(os.getpid())
    return process.dispatcher if process is not None else None


def get_watchdog() -> Watchdog | None:
    """Return what watches the hub, if this process serves sockets and the settings want it."""
    process = _current.get(os.getpid())
    return process.watchdog if process is not None else None


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
    process.hub.missed = GapTeller(process.hub.backend)
    process.hub.start()
    process.cluster.start()
    log_format = conf.get("MESSAGE_LOG_FORMAT")
    identities = Identities(process.hub, process.cluster, conf.get("REAUTH_INTERVAL"))
    identities.start()
    connection_created.connect(_connection_created, dispatch_uid="django_socketio")
    process.dispatcher = Dispatcher(
        process.hub,
        _config(process.cluster.node),
        connect_timeout=conf.get("CONNECT_TIMEOUT"),
        allow=origins.allow,
        identities=identities,
        log=None if log_format is None else MessageLog(log_format),
        limits=_limits(),
        user_of=user_of_handshake if conf.get("MAX_CONNECTIONS_PER_USER") is not None else None,
        runners=Runners(
            limit=int(conf.get("MAX_HANDLERS")),
            before=databases.begin,
            after=databases.finish,
            end=connections.close_all,
        ),
        threads=Threads(
            int(conf.get("THREADS")), before=databases.begin_thread, after=databases.finish_thread
        ),
    )
    if process.hub.backend.crosses_processes:
        outbox = process.dispatcher.engine.outbox
        outbox.moderate()
        process.hub.delivered = outbox.delivered
    process.handoff = Handoff(process.dispatcher.engine, process.cluster, runtime_directory())
    _limit_connections(process)
    _watch(process, process.dispatcher)
    return process.dispatcher


def _compression(value: Any) -> Compression | None:
    options = value if isinstance(value, dict) else {}
    return None if value in (None, False) else Compression(**options)


def _limit_connections(process: _Process) -> None:
    for problem in databases.blocking_drivers():
        logger.warning("%s", problem)
    if conf.get("MAX_DATABASE_CONNECTIONS") is not None:
        process.connection_limit = ConnectionLimit(int(conf.get("MAX_DATABASE_CONNECTIONS")))
        process.connection_limit.install()


def _watch(process: _Process, dispatcher: Dispatcher) -> None:
    threshold = conf.get("BLOCKING_THRESHOLD")
    if threshold is not None:
        process.watchdog = Watchdog(threshold, find_handler, dispatcher.engine.counters)
        process.watchdog.start()


def _config(node: str) -> Config:
    return Config(
        ping_interval=conf.get("PING_INTERVAL"),
        ping_timeout=conf.get("PING_TIMEOUT"),
        max_payload=int(conf.get("MAX_PAYLOAD")),
        max_buffer=int(conf.get("MAX_BUFFER")),
        max_packets=int(conf.get("MAX_PACKETS")),
        max_fragments=int(conf.get("MAX_FRAGMENTS")),
        message_timeout=conf.get("MESSAGE_TIMEOUT"),
        upgrade_timeout=conf.get("UPGRADE_TIMEOUT"),
        write_timeout=conf.get("WRITE_TIMEOUT"),
        admission=AdmissionLimits(
            connections=descriptors.make_room(int(conf.get("MAX_CONNECTIONS"))),
            per_address=conf.get("MAX_CONNECTIONS_PER_ADDRESS"),
            per_user=conf.get("MAX_CONNECTIONS_PER_USER"),
            rate=_rate("HANDSHAKE_RATE"),
            rate_per_address=_rate("HANDSHAKE_RATE_PER_ADDRESS"),
        ),
        node=node,
        compression=_compression(conf.get("COMPRESSION")),
    )


def _limits() -> Limits:
    attachment_bytes = conf.get("MAX_ATTACHMENT_BYTES")
    return Limits(
        packet=socketio.Limits(
            attachments=int(conf.get("MAX_ATTACHMENTS")),
            attachment_bytes=int(attachment_bytes or conf.get("MAX_PAYLOAD")),
            depth=int(conf.get("MAX_JSON_DEPTH")),
            name=int(conf.get("MAX_NAME")),
        ),
        channels=int(conf.get("MAX_CHANNELS")),
        namespaces=int(conf.get("MAX_NAMESPACES")),
        event_rate=_rate("EVENT_RATE"),
        event_rate_per_user=_rate("EVENT_RATE_PER_USER"),
    )


def _rate(name: str) -> Rate | None:
    rate = conf.get_rate(name)
    return None if rate is None else Rate(*rate)


def front_options() -> dict[str, Any]:
    """Return what either front is told of the settings."""
    dispatcher = get_dispatcher()
    assert dispatcher is not None
    return {
        "head_timeout": conf.get("HEAD_TIMEOUT"),
        "max_head": int(conf.get("MAX_HEAD")),
        "over_limit": dispatcher.engine.over_limit,
    }


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


def wait_until_heard(timeout: float) -> bool:
    """Wait until this process hears what it publishes itself; return whether it does."""
    until, cluster = monotonic() + timeout, get_cluster()
    while cluster.deaf and monotonic() < until:
        sleep(_LOOK)
    return not cluster.deaf


def drain(over: float, timeout: float, *, lingering: bool = True) -> None:
    """
    End every socket, over some seconds, and run what waits for that (`on_finish` last).

    What is asked by HTTP, and messages of other processes, are served on until `stop()`.
    """
    process = _current.get(os.getpid())
    if process is None or process.dispatcher is None or process.drain is not None:
        return
    process.cluster.retire()
    process.drain = Drain(process.dispatcher, over=over, timeout=timeout, lingering=lingering)
    process.drain.run()
    if process.handoff is not None:
        process.handoff.close()


def hurry() -> None:
    """Have a `drain()` that runs be done soon."""
    process = _current.get(os.getpid())
    if process is not None and process.drain is not None:
        process.drain.hurry()


def stop(timeout: float = 10.0) -> None:
    """End what serves here, at once where there was no `drain()`, and let go of the backend."""
    drain(0, timeout, lingering=False)
    process = _current.get(os.getpid())
    if process is None:
        return
    dispatcher = process.dispatcher
    if dispatcher is not None:
        dispatcher.engine.stop()
        dispatcher.identities.stop()
        dispatcher.runners.stop()
        dispatcher.threads.stop()
        process.dispatcher = None
    if process.watchdog is not None:
        process.watchdog.stop()
    if process.connection_limit is not None:
        process.connection_limit.uninstall()
    process.cluster.stop()
    process.hub.stop()
    _current.pop(os.getpid(), None)


def _connection_created(**kwargs: Any) -> None:
    note_database()


def _close_connections() -> None:
    """Close what the running greenlet has; most never had any, which is quicker to tell."""
    if uses_database():
        connections.close_all()


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
                _close_connections()
                response = self._respond(environ, sid[1] if sid else "")
                return [] if response is None else send_response(response, start_response)
            if not self._engine.accepting and self._handoff.pass_on(environ):
                return []
            turned_away = self._engine.turn_away(environ)
            if turned_away is not None:
                return send_response(turned_away, start_response)
            answer = self._django(environ, self._check_answer(environ, start_response))
            _close_connections()  # persistent or not: what becomes a socket has none
            return answer
        if "HTTP_TRANSFER_ENCODING" in environ:
            # Django reads by Content-Length, and would take the body for empty.
            start_response("411 Length Required", [("Content-Length", "0")])
            return []
        return self._django(environ, start_response)

    def _check_answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Have a session end whose handshake is refused by a middleware, behind the view."""

        def start(status: str, *args: Any) -> Any:
            sid = environ.pop(OPENED, None)
            if sid is not None and not status.startswith("200 "):
                self._engine.hung_up(sid)
            return start_response(status, *args)

        return start

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
