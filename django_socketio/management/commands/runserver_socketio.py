"""
The development server, and the one process of a small site.

Three processes in a row, each exec'd or started by the one before: the supervisor (only with
autoreload) starts a server and starts it again when its code has changed; an unpatched server
executes itself anew under gevent's monkey patching; the patched one serves.

With `--workers` there are two others: the command becomes gunicorn's arbiter, and that starts
workers, which patch themselves.
"""

import errno
import gc
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import django
import gevent
from django.apps import apps
from django.conf import settings
from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.core.servers.basehttp import get_internal_wsgi_application
from django.db import connections
from django.utils import autoreload
from gevent.event import Event
from gevent.monkey import is_module_patched

from django_socketio import __version__, conf, runtime
from django_socketio.engine.pywsgi import SocketIOServer
from django_socketio.management import workers

_ADDRESS = re.compile(
    r"(?:(?P<host>[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[a-fA-F0-9:.%]+\]|[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*):)?"
    r"(?P<port>[0-9]{1,5})\Z"
)
_STOP = 8.0
"""
Seconds for handlers and requests that were begun, in the end. `docker stop` kills after ten.

Where SOCKETIO_DRAIN needs more, there are more.
"""

_REST = 5.0
"""Seconds of that which sockets that leave over a while leave to what they have begun."""

_ANSWERS = 1.0
"""Seconds for requests that were begun, where handlers have taken all the others."""

_LOOK = 0.1
"""Seconds after which it looks again whether there is a hurry."""

_SAME = 1.0
"""Seconds within which a signal may come twice, to the group and from the parent, and mean once."""

_BACKLOG = 1024
"""Connections that the kernel holds until they are accepted."""

_PATCHING = "SOCKETIO_PATCHING"
_SUPERVISED = autoreload.DJANGO_AUTORELOAD_ENV
_RELOAD = 3  # the exit status by which Django's reloader asks for a new process
_FATAL = 2  # no change of code would help

# Runs a program as Python itself would, but patched before it imports anything.
_PATCHED = """
from gevent.monkey import patch_all
patch_all()
import runpy, sys
from pathlib import Path
_, kind, program, *arguments = sys.argv
sys.argv = [program, *arguments]
if kind == "path":
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""

_LISTEN_ERRORS = {
    errno.EACCES: "is not for this user to take: ports below 1024 need privileges",
    errno.EADDRINUSE: "is taken by another process",
    errno.EADDRNOTAVAIL: "is no address of this machine",
}


class Command(BaseCommand):
    help = "Serve the project with Socket.IO on gevent, and reload it when its code changes."
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("addrport", nargs="?", help="port, or address:port")
        parser.add_argument("--noreload", action="store_true", help="do not watch the code")
        parser.add_argument("--nostatic", action="store_true", help="serve no static files")
        parser.add_argument(
            "--insecure", action="store_true", help="serve static files without DEBUG too"
        )
        parser.add_argument("--certfile", help="serve TLS with this certificate (PEM)")
        parser.add_argument("--keyfile", help="the key of the certificate, if it is not with it")
        parser.add_argument(
            "--workers",
            type=_number_of_workers,
            metavar="N",
            help="serve with N processes under gunicorn. Implies --noreload: the signal HUP has"
            " the workers replaced, one after the other, by ones with the code as it is then",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        address = self._address(options["addrport"])
        if options["workers"] is not None:
            self._become_arbiter(address, options)
        if not options["noreload"] and os.environ.get(_SUPERVISED) != "true":
            sys.exit(self._supervise())
        if not is_module_patched("socket"):
            _execute_patched()
        try:
            status = self._serve(address, options)
        except ImproperlyConfigured as error:
            raise CommandError(str(error), returncode=1) from error
        sys.exit(status)

    def _address(self, addrport: str | None) -> tuple[str, int]:
        if not addrport:
            return conf.get("HOST"), conf.get("PORT")
        match = _ADDRESS.match(addrport)
        if match is None or int(match["port"]) > 65535:
            raise CommandError(
                f'"{addrport}" is no port and no address:port pair.', returncode=_FATAL
            )
        return (match["host"] or conf.get("HOST")).strip("[]"), int(match["port"])

    # The supervisor

    def _supervise(self) -> int:
        """Start the server and start it again whenever it asks for that; return its status."""
        child: subprocess.Popen[bytes] | None = None
        stopping = False

        def stop(number: int, frame: Any) -> None:
            nonlocal stopping
            stopping = True
            if child is not None:
                child.terminate()

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        arguments = autoreload.get_child_arguments()
        while not stopping:
            child = subprocess.Popen(arguments, env={**os.environ, _SUPERVISED: "true"})
            if stopping:  # asked for while the child came into being
                child.terminate()
            code = _snapshot()  # before the server fails, or its fix may come unnoticed
            status = child.wait()
            if stopping:
                return max(status, 0)
            if status in (0, _FATAL) or status < 0:
                return abs(status)
            if status != _RELOAD:
                self.stderr.write("The server did not start. It is tried again after a change.")
                while not stopping and _snapshot() == code:
                    time.sleep(autoreload.StatReloader.SLEEP_TIME)
        return 0

    # The server

    def check_migrations(self) -> None:
        """Compare them, and keep no connection to the database for that."""
        super().check_migrations()
        connections.close_all()

    def _serve(self, address: tuple[str, int], options: dict[str, Any]) -> int:
        _check_hosts()
        _show_logs()
        stop = _Stop()
        if not options["noreload"]:
            stop.watch()  # before all else, so as to miss no change meanwhile
        self.check(display_num_errors=True)
        self.check_migrations()
        tls = self._tls(options)
        with self._listen(address) as listener:
            dispatcher = runtime.start()
            application = runtime.Application(self._wsgi_application(options), dispatcher)
            server = SocketIOServer(listener, application, **runtime.front_options(), **tls)
            server.start()
            runtime.accept_from_others(server.adopt)
            gc.freeze()  # what is there now stays, and need not be looked through again and again
            gc.set_threshold(10_000)  # a handshake makes much and leaves next to no garbage
            stop.on_signals()
            self._report_parts("gevent", "websockets")
            scheme = "https" if tls else "http"
            self.stdout.write(
                f"Serving on {scheme}://{_shown(listener.getsockname())}/ (Ctrl-C stops)"
            )
            self.stdout.flush()
            try:
                return stop.wait()
            finally:
                # A developer has no time for it.
                gently = stop.is_gentle and options["noreload"]
                _end(server, stop, conf.get("DRAIN") if gently else 0)

    def _tls(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the server's options for TLS. The files are read here, once and for all."""
        if not options["certfile"]:
            if options["keyfile"]:
                raise CommandError("--keyfile needs --certfile.", returncode=_FATAL)
            return {}
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(options["certfile"], options["keyfile"])
        except OSError as error:
            files = " with ".join(filter(None, (options["certfile"], options["keyfile"])))
            problem = f"{files} cannot be used for TLS: {error}."
            raise CommandError(problem, returncode=_FATAL) from error
        return {"ssl_context": context}

    def _listen(self, address: tuple[str, int]) -> Any:
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            listener = socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            reason = _LISTEN_ERRORS.get(error.errno or 0, f"cannot be served: {error}")
            raise CommandError(f"{_shown(address)} {reason}.", returncode=_FATAL) from error
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            # Connections come with the first bytes of their request, so nobody waits for those.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        return listener

    def _wsgi_application(self, options: dict[str, Any]) -> Any:
        application = get_internal_wsgi_application()
        static = "django.contrib.staticfiles" in settings.INSTALLED_APPS
        if static and not options["nostatic"] and (settings.DEBUG or options["insecure"]):
            return StaticFilesHandler(application)
        return application

    def _report_parts(self, *libraries: str) -> None:
        versions = "".join(f", {name} {version(name)}" for name in libraries)
        backend = type(runtime.get_hub().backend)
        self.stdout.write(
            f"django-socketio {__version__}, Django {django.get_version()}{versions},"
            f" Python {sys.version.split()[0]}\n"
            f"Settings {settings.SETTINGS_MODULE},"
            f" backend {backend.__module__}.{backend.__name__}"
        )

    # The arbiter

    def _become_arbiter(self, address: tuple[str, int], options: dict[str, Any]) -> NoReturn:
        """Check what can be checked before there is a worker, and have them started."""
        if not workers.installed():
            raise CommandError(
                '--workers needs gunicorn: pip install "django-socketio[workers]".',
                returncode=_FATAL,
            )
        try:
            self._check_project(options["workers"])
        except ImproperlyConfigured as error:
            raise CommandError(str(error), returncode=_FATAL) from error
        tls = {name: os.path.abspath(options[name]) for name in self._tls_files(options)}
        listener = self._listen(address)
        listener.set_inheritable(True)
        self._report_parts("gevent", "websockets", "gunicorn")
        workers.execute(
            _interpreter(),
            {
                "workers": options["workers"],
                "bind": [f"fd://{listener.fileno()}"],
                "limit_request_field_size": int(conf.get("MAX_HEAD")),
                **tls,
            },
            {name: options[name] for name in ("nostatic", "insecure")},
        )

    def _check_project(self, number: int) -> None:
        _check_hosts()
        if "DJANGO_SETTINGS_MODULE" not in os.environ:
            raise ImproperlyConfigured("--workers needs settings in a module of their own.")
        self.check(display_num_errors=True)
        self.check_migrations()
        runtime.socketio_path()
        workers.check_backend(number)

    def _tls_files(self, options: dict[str, Any]) -> list[str]:
        """Return the names of the options that name a file."""
        self._tls(options)
        return [name for name in ("certfile", "keyfile") if options[name]]


def load(options: dict[str, Any]) -> Any:
    """Return the project as a WSGI application; called in each worker."""
    django.setup()
    _show_logs()
    return Command()._wsgi_application(options)


def _end(server: SocketIOServer, stop: "_Stop", over: float) -> None:
    """End every socket, answer what was asked, and let go of the backend."""
    timeout = max(_STOP, over + _REST)
    until = time.monotonic() + timeout
    server.close()
    runtime.drain(over, timeout)
    until = max(until, time.monotonic() + _ANSWERS)
    while not server.drain(_LOOK) and time.monotonic() < until and not stop.hurried:
        pass
    runtime.stop()
    server.stop(timeout=1)


class _Stop:
    """Why and when the server ends: a signal, or a change of its code."""

    def __init__(self) -> None:
        self._event = Event()
        self._status = 0
        self._terminated: float | None = None
        self.hurried = False

    @property
    def is_gentle(self) -> bool:
        """Tell whether whoever wants the end has time for it."""
        return self._terminated is not None

    def on_signals(self) -> None:
        gevent.signal_handler(signal.SIGTERM, self._terminate)
        gevent.signal_handler(signal.SIGINT, self._interrupted)

    def wait(self) -> int:
        self._event.wait()
        return self._status

    def watch(self) -> None:
        """Look out for changes in a greenlet: patched threads are such."""
        threading.Thread(target=self._watch, name="autoreload", daemon=True).start()

    def _watch(self) -> None:
        try:
            autoreload.get_reloader().run(threading.main_thread())
        except SystemExit as exit:
            self._status = _RELOAD if exit.code == _RELOAD else 1
        self._event.set()

    def _terminate(self) -> None:
        now = time.monotonic()
        if self._event.is_set() and now - (self._terminated or 0) > _SAME:
            self.hurried = True
            runtime.hurry()
        elif not self._event.is_set():
            self._terminated = now
        self._event.set()

    def _interrupted(self) -> None:
        if self._event.is_set():  # asked for it twice
            os._exit(130)
        self._event.set()


def _execute_patched() -> None:
    """Replace this process by one that patches before it imports anything else."""
    if os.environ.pop(_PATCHING, None):
        raise CommandError(
            "gevent's monkey patching did not take effect: call gevent.monkey.patch_all() at the"
            " top of manage.py.",
            returncode=_FATAL,
        )
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        kind, program = "path", sys.argv[0]
    else:
        kind = "module"
        program = spec.parent if spec.name.endswith("__main__") and spec.parent else spec.name
    os.environ[_PATCHING] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*_interpreter(), "-c", _PATCHED, kind, program, *sys.argv[1:]])


def _interpreter() -> list[str]:
    """Return what starts a Python like this one."""
    flags = [f"-W{option}" for option in sys.warnoptions]
    for key, value in sys._xoptions.items():
        flags.append(f"-X{key}" if value is True else f"-X{key}={value}")
    return [sys.executable, *flags]


def _snapshot() -> dict[Path, float]:
    """
    Return the times of the project's code: of the modules of this process, and of all that is in
    its apps and beside its settings, since the URL conf and the views are the server's alone.
    """
    reloader = autoreload.StatReloader()
    for config in apps.get_app_configs():
        reloader.watch_dir(Path(config.path), "**/*.py")
    module = sys.modules.get(settings.SETTINGS_MODULE or "")
    if module is not None and module.__file__:
        reloader.watch_dir(Path(module.__file__).parent, "*.py")
    return dict(reloader.snapshot_files())


def _number_of_workers(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,3}", text, re.ASCII):
        raise ArgumentTypeError(f"{text!r} is no number of workers.")
    return int(text)


def _check_hosts() -> None:
    if not settings.DEBUG and not settings.ALLOWED_HOSTS:
        raise CommandError(
            "You must set settings.ALLOWED_HOSTS if DEBUG is False.", returncode=_FATAL
        )


def _show_logs() -> None:
    """Show our log on the console unless the project's LOGGING does something with it."""
    logger = logging.getLogger("django_socketio")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def _shown(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
