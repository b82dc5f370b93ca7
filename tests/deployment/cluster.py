"""The workers of the deployment, each a `runserver_socketio` on a port of its own."""

import json
import os
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from tests import clients
from tests.support import ROOT, Server, wait_until

MANAGE = "tests/deployment/manage.py"


class Cluster:
    """
    Some workers on one carrier, from their health to the end of the `with` block.

    `settings` are Django's, on top of the project's. With `hosts` workers cannot see each other:
    each has a runtime directory of its own.
    """

    def __init__(
        self, backend: Any, *, workers: int = 2, hosts: bool = False, **settings: Any
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="django-socketio-", dir="/tmp"))
        self._settings = {"SOCKETIO_BACKEND": backend, **settings}
        self._block = ExitStack()
        directories = [self.directory / (str(number) * hosts) for number in range(workers)]
        self.servers = [Server(MANAGE, env=self._environment(where)) for where in directories]

    def _environment(self, runtime: Path | None = None) -> dict[str, str]:
        settings = {
            **self._settings,
            "SOCKETIO_RUNTIME_DIR": str((runtime or self.directory) / "r"),
        }
        return {"DEPLOYMENT": json.dumps(settings), "PYTHONPATH": str(ROOT)}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that belongs to the deployment."""
        inherited = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        return {**inherited, **self._environment()}

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def __enter__(self) -> Self:
        with ExitStack() as block:
            for server in self.servers:
                block.enter_context(server)
            wait_until(self.healthy, what="the health of all workers")
            self._block = block.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._block.close()

    def healthy(self) -> bool:
        """Tell whether all workers hear what is published."""
        return all(map(is_healthy, self.addresses))

    def kill(self, number: int) -> None:
        """End a worker as a power failure does."""
        self.servers[number].signal(signal.SIGKILL)
        self.servers[number].wait()

    def output(self, name: str) -> IO[bytes]:
        """Return a new file for what a process prints."""
        return (self.directory / f"{name}.log").open("wb")


def is_healthy(address: str) -> bool:
    try:
        return clients.request(address, "GET", "/socket.io/health").status == 200
    except OSError:
        return False
