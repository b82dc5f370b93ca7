"""The workers of the deployment, each a `runserver_socketio` on a port of its own."""

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from tests import clients
from tests.support import HERE, ROOT, Place, Server, wait_until

MANAGE = "tests/deployment/manage.py"


class Cluster:
    """
    Some workers on one carrier, from their health to the end of the `with` block.

    `settings` are Django's, on top of the project's. With `hosts` workers cannot see each other:
    each has a runtime directory of its own. `places` say where they run, if not all here.
    """

    def __init__(
        self,
        backend: Any,
        *,
        workers: int = 2,
        hosts: bool = False,
        places: Sequence[Place] = (),
        **settings: Any,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="django-socketio-", dir="/tmp"))
        self._settings = {"SOCKETIO_BACKEND": backend, **settings}
        self._block = ExitStack()
        directories = [self.directory / (str(number) * hosts) for number in range(workers)]
        self.servers = [
            Server(MANAGE, env=self._environment(where), place=place)
            for where, place in zip(directories, places or [HERE] * workers, strict=True)
        ]

    def _environment(self, runtime: Path | None = None, **settings: Any) -> dict[str, str]:
        settings = {
            **self._settings,
            **settings,
            "SOCKETIO_RUNTIME_DIR": str((runtime or self.directory) / "r"),
        }
        return {"DEPLOYMENT": json.dumps(settings), "PYTHONPATH": str(ROOT)}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that belongs to the deployment."""
        return self.env_with()

    def env_with(self, **settings: Any) -> dict[str, str]:
        """The same, for a process with some settings of its own."""
        inherited = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        return {**inherited, **self._environment(**settings)}

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
        for server in self.servers:  # side by side
            server.terminate()
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
