"""A Django project for several workers, and gunicorn as people run it: in processes of its own."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests import clients
from tests.clients import Client
from tests.management import test_runserver_socketio as single
from tests.support import ROOT, UNIT, Server, wait_until

WSGI = """
import os
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")
from django.core.wsgi import get_wsgi_application
application = get_wsgi_application()
"""
MORE_URLS = """
urlpatterns += [path("pid/", views.pid), path("spin/", views.spin), path("upload/", views.upload)]
"""
MORE_VIEWS = """
import os
from django.views.decorators.csrf import csrf_exempt
def pid(request):
    return HttpResponse(str(os.getpid()))
def spin(request):
    while True:
        pass
@csrf_exempt
def upload(request):
    return HttpResponse(str(len(request.body)))
"""
MORE_EVENTS = """
@on_event("pid")
def pid(request, socket, context):
    return os.getpid()

@on_event("spin")
def spin(request, socket, context):
    while True:
        pass

@on_event("block", threaded=True)
def block(request, socket, context, seconds):
    from gevent.monkey import get_original
    note("sleep")
    get_original("time", "sleep")(seconds)

@on_event("echo")
def echo(request, socket, context, data):
    return data

@on_event("tell")
def tell(request, socket, context, what):
    socket.broadcast(what)
"""


class Project(single.Project):
    """A project whose events and views know of their process."""

    def __init__(self, folder: Path, backend: str = "memory://", first: str = "") -> None:
        super().__init__(folder, first)
        self.write("site_settings.py", f"{single.SETTINGS}\nSOCKETIO_BACKEND = {backend!r}\n")
        self.write("site_urls.py", single.URLS + MORE_URLS)
        self.write("wsgi.py", WSGI)
        self.answer("one")

    def answer(self, answer: str) -> None:
        """Have code that answers so."""
        self.write("chat/views.py", single.VIEWS.format(answer=answer) + MORE_VIEWS)
        self.write("chat/events.py", single.EVENTS.format(answer=answer) + MORE_EVENTS)

    @property
    def finished(self) -> list[str]:
        """Why sockets ended, of which the handlers were told."""
        return [line.partition(" ")[2] for line in self.notes if line.startswith("finish")]


class Gunicorn(Server):
    """`gunicorn -k django_socketio.gunicorn.SocketIOWorker OPTIONS wsgi:application`."""

    def __init__(self, project: Project, *options: str, **env: str) -> None:
        super().__init__("", env=env)
        self.env |= {
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SITE_NOTES": str(project.notes_file),
        }
        self.scheme = "https" if "--certfile" in options else "http"
        worker = ("-k", "django_socketio.gunicorn.SocketIOWorker", "-b", self.address)
        self.command = [sys.executable, "-m", "gunicorn", *worker, "--no-control-socket"]
        self.command += ["--chdir", str(project.folder), *options, "wsgi:application"]
        self._number = int(options[options.index("-w") + 1]) if "-w" in options else 1

    def start(self) -> None:
        super().start()
        wait_until(lambda: len(self.workers) == self._number, what=f"{self._number} workers")

    @property
    def workers(self) -> set[int]:
        return workers_of(self.pid)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the arbiter and return its exit status."""
        self.signal(number)
        return self.wait(600 * UNIT)


def workers_of(arbiter: int) -> set[int]:
    """Return the processes that an arbiter has started and that have not ended."""
    children = Path(f"/proc/{arbiter}/task/{arbiter}/children").read_text()
    return {pid for pid in map(int, children.split()) if _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids: set[int]) -> None:
    """Wait until none of these processes runs."""
    wait_until(lambda: not any(map(_runs, pids)), 600 * UNIT, f"the end of {pids}")


def replaced(arbiter: int, before: set[int], number: int) -> set[int]:
    """Wait until so many workers serve that were not there before, and return all that run."""

    def new() -> set[int]:
        now = workers_of(arbiter)
        return now if len(now) == number and now != before else set()

    return wait_until(new, 1200 * UNIT, f"other workers than {before}")


@contextmanager
def connected(address: str, **options: Any) -> Iterator[Client]:
    with closing(clients.connect(address, **options)) as client:
        yield client


@contextmanager
def one_of_each(address: str, pids: set[int], **options: Any) -> Iterator[dict[int, Client]]:
    """Connect clients until each worker has one; yield them by the worker's process."""
    found: dict[int, Client] = {}
    deadline = time.monotonic() + 600 * UNIT
    try:
        while not found.keys() >= pids and time.monotonic() < deadline:
            client = clients.connect(address, **options)
            (pid,) = client.call("pid")
            if pid in found:
                client.close()
            else:
                found[pid] = client
        assert found.keys() == pids
        yield found
    finally:
        for client in found.values():
            client.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
