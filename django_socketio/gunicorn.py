"""
Several workers: gunicorn's arbiter, with a worker that serves Socket.IO.

The arbiter imports this module, and forks. So nothing here may import Django, the project, or what
is bound to the standard library before gevent has patched it: that is the worker's, after the fork.
"""

import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from mmap import mmap
from struct import Struct
from time import monotonic
from types import FrameType
from typing import Any

from gevent import get_hub, signal_handler, sleep, spawn_later
from gevent.event import Event
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

_MARGIN = 1.0
"""Seconds for the last answers, and as many by which a worker is done before it would be killed."""

_QUICK = 1.0
"""Seconds that a worker takes for its end when it is told to hurry. The arbiter gives it two."""

_HEARD = 5.0
"""Seconds that a worker waits for the backend before it serves without."""

_SUCCEEDED = 20.0
"""Seconds that a worker which is to be replaced serves on until its successors do."""

_LOOK = 0.1
"""Seconds after which it looks for them again."""

_BEHIND = 5.0
"""Seconds that a worker that cannot serve leaves it to another to say so."""

_BEAT = 1.0
"""Seconds between two signs of life to the arbiter."""


def _ours(name: str) -> Any:
    """Return a module that only the worker may import."""
    return import_module(f"{__package__}.{name}")


class Roster:
    """
    Which workers of an arbiter serve, in memory that all of them share: made before any fork.

    Its first word is the age of the newest worker, then each has a slot which it alone writes: its
    age and, until it serves, its process.
    """

    _NEWEST = Struct("=Q")
    _SLOT = Struct("=II")
    _SIZE = 4096

    def __init__(self) -> None:
        self._memory = mmap(-1, self._SIZE)

    def enlist(self, age: int) -> None:
        """Note in the arbiter that there is to be a worker."""
        self._NEWEST.pack_into(self._memory, 0, age)

    def begin(self, age: int) -> None:
        self._SLOT.pack_into(self._memory, self._offset(age), age, os.getpid())

    def serve(self, age: int) -> None:
        self._SLOT.pack_into(self._memory, self._offset(age), age, 0)

    def awaits_younger(self, age: int) -> bool:
        """Tell whether a worker that came after this one is alive and does not serve yet."""
        (newest,) = self._NEWEST.unpack_from(self._memory)
        return any(map(self._is_awaited, range(age + 1, newest + 1)))

    def _is_awaited(self, age: int) -> bool:
        found, pid = self._SLOT.unpack_from(self._memory, self._offset(age))
        return bool(found < age or (found == age and pid and _runs(pid)))

    def _offset(self, age: int) -> int:
        slots = self._SIZE // self._SLOT.size - 1
        return self._SLOT.size * (1 + age % slots)


ROSTER = Roster()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class SocketIOWorker(GeventWorker):
    """
    A process that serves the project and its sockets until the arbiter, or its age, ends it.

    Its heart beats in the hub: when that is blocked the arbiter hears nothing more, ends the worker
    and starts another.
    """

    # In the arbiter

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse what cannot work before there is any worker. gunicorn tells the error and ends."""
        problem = _problem(cfg)
        if problem:
            raise RuntimeError(problem)

    def __init__(self, age: int, *args: Any, **options: Any) -> None:
        super().__init__(age, *args, **options)
        ROSTER.enlist(age)

    # In the worker

    def init_process(self) -> None:
        """Become a worker: patch, then import the project, then serve."""
        ROSTER.begin(self.age)
        # Until it serves there is nothing to be ended with care.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # What a terminal sends to all: the arbiter tells its workers what to do.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._end = Event()
        self._hurried = Event()
        self._until = 0.0
        self._servers: list[Any] = []
        self._status = 0

    def load_wsgi(self) -> None:
        """Import the project and begin to serve sockets."""
        problem = _problem(self.cfg)  # of a configuration that was reloaded
        if problem:
            self._refuse(problem)
        super().load_wsgi()
        if self.app.callable is None:  # a SyntaxError, which gunicorn shows while it waits for code
            return
        runtime = _ours("runtime")
        try:
            _ours("management.workers").check_backend(self.cfg.workers)
            dispatcher = runtime.start()
            self.wsgi = runtime.Application(self.wsgi, dispatcher)
        except import_module("django.core.exceptions").ImproperlyConfigured as error:
            self._refuse(str(error))
        runtime.accept_from_others(self.adopt)

    def _refuse(self, problem: str) -> None:
        """Have the arbiter end, rather than start one worker after the other."""
        # One says so for all: an arbiter that hears it of another while it ends fails over that.
        if (self.age - 1) % self.cfg.workers:
            sleep(_BEHIND)
        self.log.error("%s", problem)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def adopt(self, sock: Any, data: bytes) -> None:
        """Serve a connection that another worker gave up, and whose first bytes are `data`."""
        if self._servers:
            self._servers[0].adopt(sock, data)
        else:
            sock.close()

    def run(self) -> None:
        beat = get_hub().loop.timer(_BEAT, min(_BEAT, self.timeout or _BEAT))
        beat.start(self.notify)
        self.notify()
        if not _ours("runtime").wait_until_heard(_HEARD):
            self.log.warning("The worker begins to serve, and cannot hear the others yet")
        self._start()
        # The arbiter repeats SIGTERM while it has more workers than it should.
        signal_handler(signal.SIGTERM, self._end.set)
        signal_handler(signal.SIGQUIT, self._hurry)
        ROSTER.serve(self.age)
        try:
            self._end.wait()
            self._wait_for_successors()
        finally:
            self._finish()
        sys.exit(self._status)

    def _start(self) -> None:
        server = _ours("engine.gunicorn").GunicornServer
        options = _ours("runtime").front_options()
        if self.cfg.is_ssl:
            options["ssl_context"] = ssl_context(self.cfg)
        for sock in self.sockets:
            self._servers.append(server(sock, self.wsgi, self, **options))
        for server in self._servers:
            server.start()
        gc.freeze()  # what is there now stays, and need not be looked through again and again
        gc.set_threshold(10_000)  # a handshake makes much and leaves next to no garbage

    def request_began(self) -> None:
        """Count a request: gunicorn may want the worker to end after so many."""
        self.nr += 1
        if self.nr >= self.max_requests and not self._end.is_set():
            self.log.info("Autorestarting worker after current request.")
            self._end.set()

    # The end

    def _wait_for_successors(self) -> None:
        """Serve on until those do that the arbiter has started in the place of this one."""
        until = monotonic() + min(_SUCCEEDED, self.cfg.graceful_timeout)
        while ROSTER.awaits_younger(self.age) and monotonic() < until:
            if self._hurried.wait(_LOOK):
                return

    def _finish(self) -> None:
        """End every socket with its handlers, and answer what was asked, while there is time."""
        self.alive = False
        runtime, quick = _ours("runtime"), self._hurried.is_set()
        seconds = _QUICK if quick else max(self.cfg.graceful_timeout - 2 * _MARGIN, _QUICK)
        self._expect_the_end_in(seconds)
        for server in self._servers:
            server.close()
        runtime.drain(0 if quick else _ours("conf").get("DRAIN"), seconds)
        for server in self._servers:
            while not server.drain(_LOOK) and monotonic() < self._until:
                pass
        runtime.stop()
        for server in self._servers:
            server.stop()

    def _expect_the_end_in(self, seconds: float) -> None:
        """Set the time, and end whatever hangs a little later, before the arbiter would."""
        self._until = monotonic() + seconds
        spawn_later(seconds + _MARGIN / 2, sys.exit, self._status)

    def _hurry(self) -> None:
        """End as ever, but soon."""
        if not self._hurried.is_set():
            self.cfg.worker_int(self)
            self._hurried.set()
            self._expect_the_end_in(_QUICK)
            self._end.set()
            _ours("runtime").hurry()

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """
        Be told by the arbiter that it has heard nothing for too long.

        The frame is whose turn it is: what blocks the hub is named, and ended.
        """
        stack = "".join(traceback.format_stack(frame))
        self.log.critical("The worker hangs, and so do all of its clients, in\n%s", stack)
        self._status = 1
        self._hurried.set()  # it is killed a second later
        self._end.set()
        super().handle_abort(sig, frame)


def _problem(cfg: Any) -> str:
    """Return what keeps the worker from serving with this configuration, as a sentence."""
    name = SocketIOWorker.__name__
    if cfg.preload_app:
        return (
            f"{name} cannot serve with preload_app: the project would be imported before gevent has"
            " patched the standard library. Turn it off."
        )
    if "h2" in getattr(cfg, "http_protocols", ()):
        return f"{name} speaks HTTP/1.1 only: take h2 out of http_protocols."
    if getattr(cfg, "protocol", "http") != "http":
        return f"{name} speaks HTTP only: take {cfg.protocol} out of protocol."
    return ""


class ManagedApplication(BaseApplication):
    """
    What `runserver_socketio --workers` has the arbiter serve.

    It reads no configuration but `settings`: the same that one process would be served with.
    """

    def __init__(self, settings: dict[str, Any], options: dict[str, Any]) -> None:
        self._settings = settings
        self._options = options
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)
        self.cfg.set("worker_class", SocketIOWorker)
        self.cfg.set("when_ready", _report)

    def load(self) -> Any:
        return _ours("management.commands.runserver_socketio").load(self._options)


def _report(arbiter: Arbiter) -> None:
    host, port = arbiter.LISTENERS[0].getsockname()[:2]
    scheme = "https" if arbiter.cfg.is_ssl else "http"
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    workers = arbiter.cfg.workers
    plural = "s" if workers > 1 else ""
    print(
        f"Serving on {scheme}://{address}/ with {workers} worker{plural} (Ctrl-C stops)", flush=True
    )
