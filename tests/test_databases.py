"""Databases in handlers, with a PostgreSQL that allows few connections."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.cookies import SimpleCookie
from types import SimpleNamespace
from typing import Any

import gevent
import psycopg
import pytest
from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from django_socketio import databases
from django_socketio.databases import ConnectionLimit
from tests import clients
from tests.clients import Client
from tests.deployment.cluster import MANAGE
from tests.services import PostgreSQL
from tests.support import ROOT, UNIT, Server, wait_until

CAP = 10
"""Connections that a worker may have."""

ALLOWED = 17
"""
What the server allows: of 20, three are superusers'. More than the cap are for connections that
were closed, and that a busy server ends late.
"""

pytestmark = pytest.mark.timeout(8000 * UNIT)

POOL = {"pool": {"min_size": 0, "max_size": CAP, "max_idle": 10 * UNIT, "timeout": 600 * UNIT}}
APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]


class Database:
    """The server, and a database in it that a project of ours uses as no superuser."""

    def __init__(self, server: PostgreSQL) -> None:
        self.server = server
        self._execute("CREATE ROLE app LOGIN", "CREATE DATABASE app OWNER app")
        manage = [sys.executable, str(ROOT / MANAGE), "migrate", "--verbosity", "0"]
        subprocess.run(manage, env=self.environment(), check=True, cwd=ROOT)

    def settings(self, **options: Any) -> dict[str, Any]:
        address = {"HOST": "127.0.0.1", "PORT": self.server.port, "USER": "app", "NAME": "app"}
        return {"ENGINE": "django.db.backends.postgresql", **address, **options}

    def environment(self, directory: str = "/tmp", **settings: Any) -> dict[str, str]:
        options = settings.pop("DATABASE", {})
        values = {
            "DATABASES": {"default": self.settings(**options)},
            "INSTALLED_APPS": [*APPS, "django_socketio", "tests.deployment", "tests.stored"],
            "MIDDLEWARE": MIDDLEWARE,
            "ROOT_URLCONF": "tests.stored.urls",
            "SOCKETIO_RUNTIME_DIR": directory,
            **settings,
        }
        return {"DEPLOYMENT": json.dumps(values), "PYTHONPATH": str(ROOT)}

    def _execute(self, *statements: str) -> None:
        with psycopg.connect(self.server.url, autocommit=True) as superuser:
            for statement in statements:
                superuser.execute(statement.encode())

    def connections(self, where: str = "true") -> int:
        """Return how many connections the project has."""
        query = f"SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND {where}"
        with psycopg.connect(self.server.url, autocommit=True) as superuser:
            return int(superuser.execute(query.encode()).fetchone()[0])  # type: ignore[index]

    def end_queries(self) -> None:
        """End what the server still does for projects that are gone: it has not noticed."""
        self._execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
        )
        self.wait_for_none()

    def wait_for_none(self) -> None:
        try:
            wait_until(lambda: self.connections() == 0, timeout=400 * UNIT, what="no connection")
        except AssertionError as error:
            error.add_note(f"There are {self._activity()}")
            raise

    def _activity(self) -> list[tuple[Any, ...]]:
        """Return what the project's connections did last, and how long they have been there."""
        query = "SELECT state, now() - backend_start, now() - state_change, query FROM"
        with psycopg.connect(self.server.url, autocommit=True) as superuser:
            rows = superuser.execute(f"{query} pg_stat_activity WHERE usename = 'app'".encode())
            return rows.fetchall()

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Return a list of one number: the most connections that there were."""
        most = [0]

        def look() -> None:
            with psycopg.connect(self.server.url, autocommit=True) as superuser:
                query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'"
                while True:
                    most[0] = max(most[0], superuser.execute(query).fetchone()[0])  # type: ignore[index]
                    gevent.sleep(UNIT / 5)

        looking = gevent.spawn(look)
        try:
            yield most
        finally:
            looking.kill()


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with PostgreSQL("-c", "max_connections=20") as server:
        yield Database(server)


@pytest.fixture
def serve(database: Database) -> Iterator[Callable[..., "Project"]]:
    with ExitStack() as block:

        def serve(*options: str, **settings: Any) -> Project:
            return block.enter_context(Project(database, *options, **settings))

        yield serve
    database.end_queries()


class Project(Server):
    """The project that uses the database, and clients of it."""

    def __init__(self, database: Database, *options: str, **settings: Any) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="django-socketio-", dir="/tmp")
        env = database.environment(self._directory.name, **settings)
        super().__init__(MANAGE, *options, env=env)
        self._clients = ExitStack()

    def __exit__(self, *exc_info: object) -> None:
        self._clients.close()
        super().__exit__(*exc_info)
        self._directory.cleanup()

    def connect(self, **options: Any) -> Client:
        client = clients.connect(self.address, **options)
        self._clients.callback(client.close)
        return client

    def connect_several(self, number: int) -> list[Client]:
        connecting = [gevent.spawn(self.connect) for _ in range(number)]
        gevent.joinall(connecting, raise_error=True)
        return [greenlet.get() for greenlet in connecting]


def ask_all(crowd: list[Client], event: str, *args: Any) -> list[list[Any]]:
    """Have all of them ask at once, and return the answers."""
    ids = [client.request(event, *args) for client in crowd]
    return [client.acked(id_, 2400 * UNIT) for client, id_ in zip(crowd, ids, strict=True)]


# Many sockets, few connections


LIMITED = {"SOCKETIO_MAX_DATABASE_CONNECTIONS": CAP}
POOLED = {"DATABASE": {"OPTIONS": POOL}}


@pytest.mark.parametrize("options", [(), ("--workers", "1")], ids=["one process", "gunicorn"])
@pytest.mark.parametrize("settings", [LIMITED, POOLED], ids=["limit", "pool"])
def test_500_sockets_share_few_connections(
    database: Database, serve: Any, settings: dict[str, Any], options: tuple[str, ...]
) -> None:
    site = serve(*options, **settings)
    with database.peak() as peak:
        crowd = site.connect_several(500)
        crowd[0].call("lag")
        for _ in range(3):
            answers = ask_all(crowd, "query", 0.005)
            assert all(isinstance(pid, int) for (pid,) in answers)
        (lag,) = crowd[0].call("lag")
    assert 2 < peak[0] <= ALLOWED
    assert "error:" not in site.output
    assert lag < 60 * UNIT
    database.wait_for_none()


def test_without_a_limit_there_are_too_many(database: Database, serve: Any) -> None:
    """So the test above can fail; and each client hears of it, but not what."""
    site = serve()
    crowd = site.connect_several(100)
    for client in crowd:
        client.emit("hold", UNIT)
    wait_until(lambda: "too many" in site.output or "remaining connection slots" in site.output)
    for client in crowd:
        assert all(event == ["failed", "OperationalError"] for event in client.fence())
    database.wait_for_none()
    assert all(isinstance(pid, int) for (pid,) in ask_all(crowd[:10], "query"))


def test_handshakes_count(database: Database, serve: Any) -> None:
    """500 at once, each of which asks the session who is there."""
    site = serve(**LIMITED, MIDDLEWARE=[*MIDDLEWARE, "tests.stored.middleware.who"])
    cookie = log_in(site)
    with database.peak() as peak:
        connecting = [gevent.spawn(site.connect, headers=cookie) for _ in range(200)]
        gevent.joinall(connecting, raise_error=True)
    assert peak[0] <= ALLOWED
    database.wait_for_none()


def test_threads_are_few_by_themselves(database: Database, serve: Any) -> None:
    """Also beside a pool, whose locks are not for them."""
    site = serve(**POOLED, SOCKETIO_THREADS=2)
    crowd = site.connect_several(40)
    with database.peak() as peak:
        threaded = gevent.spawn(ask_all, crowd[:20], "threaded query", 0.01)
        plain = gevent.spawn(ask_all, crowd[20:], "query", 0.01)
        assert all(isinstance(pid, int) for (pid,) in threaded.get() + plain.get())
    assert peak[0] <= ALLOWED
    assert "error:" not in site.output
    database.wait_for_none()


# Idle sockets


@pytest.mark.parametrize("age", [0, None])
def test_idle_sockets_hold_no_connection(database: Database, serve: Any, age: int | None) -> None:
    """However long connections may live: a runner that nobody needs lets go of its own."""
    site = serve(DATABASE={"CONN_MAX_AGE": age}, **LIMITED)
    cookie = log_in(site)
    crowd = [site.connect(headers=cookie) for _ in range(5)]
    crowd += [site.connect(headers=cookie, transport="polling") for _ in range(5)]
    polls = [gevent.spawn(client.event) for client in crowd[5:]]
    assert ask_all(crowd[:5], "user") == [[["alice", "green"]]] * 5
    database.wait_for_none()
    gevent.killall(polls)
    assert ask_all(crowd[:5], "user") == [[["alice", "green"]]] * 5


def test_persistent_connections_are_used_again(database: Database, serve: Any) -> None:
    site = serve(DATABASE={"CONN_MAX_AGE": None})
    client = site.connect()
    assert len({client.call("query")[0] for _ in range(20)}) == 1
    database.wait_for_none()


# The server of the database ends


@pytest.mark.parametrize(
    "options",
    [
        {"CONN_MAX_AGE": 0},
        {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True},
        {"CONN_HEALTH_CHECKS": True, "OPTIONS": POOL},
    ],
    ids=["closed", "persistent", "pool"],
)
def test_a_restart_is_survived_by_the_next_event(
    database: Database, serve: Any, options: dict[str, Any]
) -> None:
    site = serve(DATABASE=options)
    crowd = site.connect_several(10)
    ask_all(crowd, "hold", UNIT)
    database.server.kill()
    database.server.start()
    assert all(isinstance(pid, int) for (pid,) in ask_all(crowd, "query"))
    assert "error:" not in site.output


def test_an_outage_is_an_error_of_handlers(database: Database, serve: Any) -> None:
    site = serve(DATABASE={"CONN_MAX_AGE": None}, **LIMITED)
    crowd = site.connect_several(5)
    ask_all(crowd, "hold", UNIT)
    database.server.kill()
    try:
        for client in crowd:
            client.emit("query")
            assert client.event() == ["failed", "OperationalError"]
            assert client.fence() == []
    finally:
        database.server.start()
    for client in crowd:
        assert isinstance(client.call("query")[0], int)


# Transactions


@pytest.mark.parametrize(
    "options", [{"CONN_MAX_AGE": None}, {"OPTIONS": POOL}], ids=["persistent", "pool"]
)
def test_what_a_handler_leaves_behind_harms_nobody(
    database: Database, serve: Any, options: dict[str, Any]
) -> None:
    """What it had not committed is gone; its own next event and those of others are clean."""
    site = serve(DATABASE=options)
    client, other = site.connect_several(2)
    for what in ("transaction", "atomic", "failed", "closed", "interrupted"):
        for number in range(3):
            client.emit("leave", what, f"{what} {number} {sorted(options)}")
            client.fence()
            assert isinstance(other.call("query")[0], int)
            assert isinstance(client.call("query")[0], int)
    (names,) = client.call("groups")
    kept = {name.split()[0] for name in names if name.endswith(f"{sorted(options)}")}
    assert kept == {"closed", "failed", "interrupted"}
    assert database.connections("state LIKE 'idle in transaction%'") == 0


def test_handlers_are_not_atomic_by_themselves(database: Database, serve: Any) -> None:
    """Not even with ATOMIC_REQUESTS, which is about views."""
    site = serve(DATABASE={"ATOMIC_REQUESTS": True})
    client = site.connect()
    for ending in ("raise", "raise in atomic", "wrong query"):
        client.emit("add", f"end: {ending}", ending)
        client.fence()
    (names,) = client.call("groups")
    assert [name for name in names if name.startswith("end")] == ["end: raise"]


def test_atomic_requests_end_with_the_handshake(database: Database, serve: Any) -> None:
    """No transaction waits with a poll or a socket, and the session is there all the same."""
    site = serve(
        DATABASE={"ATOMIC_REQUESTS": True, "CONN_MAX_AGE": None},
        MIDDLEWARE=[*MIDDLEWARE, "tests.stored.middleware.who"],
    )
    cookie = log_in(site)
    client = site.connect(headers=cookie)
    polling = site.connect(headers=cookie, transport="polling")
    poll = gevent.spawn(polling.event)
    assert client.call("user") == [["alice", "green"]]
    assert database.connections("state LIKE 'idle in transaction%'") == 0
    database.wait_for_none()
    poll.kill()


def log_in(site: Project) -> dict[str, str]:
    """Return the headers of somebody with a session."""
    answer = clients.request(site.address, target="/enter/")
    cookies = SimpleCookie()
    for name, value in answer.headers:
        if name.lower() == "set-cookie":
            cookies.load(value)
    return {"Cookie": f"sessionid={cookies['sessionid'].value}"}


# The limit itself


class Wrapper(BaseDatabaseWrapper):
    """Django's part of a connection, without a database."""

    vendor = "none"
    client_class = creation_class = features_class = introspection_class = ops_class = (  # type: ignore[assignment]
        lambda self, wrapper: None
    )
    validation_class = client_class
    broken = False

    def __init__(self) -> None:
        settings = {"CONN_HEALTH_CHECKS": False, "CONN_MAX_AGE": 0, "AUTOCOMMIT": True}
        super().__init__({**settings, "TIME_ZONE": None}, "default")

    def get_connection_params(self) -> dict[str, Any]:
        return {}

    def get_new_connection(self, params: Any) -> Any:
        if self.broken:
            raise OSError("no such server")
        return type("Connection", (), {"close": lambda self: None})()

    def _set_autocommit(self, autocommit: bool) -> None:
        pass

    def init_connection_state(self) -> None:
        pass


@pytest.fixture
def limit() -> Iterator[ConnectionLimit]:
    Wrapper.wrap_database_errors = ExitStack()  # type: ignore[assignment]
    limit = ConnectionLimit(2, patience=4 * UNIT)
    limit.install()
    yield limit
    limit.uninstall()


def test_who_wants_one_more_waits(limit: ConnectionLimit) -> None:
    first, second, third = Wrapper(), Wrapper(), Wrapper()
    first.connect()
    second.connect()
    waiting = gevent.spawn(third.connect)
    gevent.sleep(UNIT)
    assert third.connection is None
    first.close()
    first.close()
    waiting.get()
    assert third.connection is not None


def test_who_waits_for_too_long_is_told_why(limit: ConnectionLimit) -> None:
    wrappers = [Wrapper(), Wrapper()]
    for wrapper in wrappers:
        wrapper.connect()
    with pytest.raises(OperationalError, match="None of 2 .*SOCKETIO_MAX_DATABASE_CONNECTIONS"):
        Wrapper().connect()


def test_one_that_cannot_be_made_does_not_count(limit: ConnectionLimit) -> None:
    wrapper = Wrapper()
    wrapper.broken = True
    for _ in range(5):
        with pytest.raises(OSError, match="no such server"):
            wrapper.connect()
    others = [Wrapper(), Wrapper()]
    for other in others:
        other.connect()


def test_one_that_nobody_closes_counts_until_it_is_collected(limit: ConnectionLimit) -> None:
    for _ in range(5):
        wrapper = Wrapper()
        wrapper.connect()
        del wrapper


def test_one_that_is_closed_within_a_transaction_does_not_count(limit: ConnectionLimit) -> None:
    wrappers = [Wrapper() for _ in range(4)]
    for wrapper in wrappers:
        wrapper.connect()
        wrapper.in_atomic_block = True
        wrapper.close()


def test_whoever_is_killed_while_he_waits_takes_nothing(limit: ConnectionLimit) -> None:
    wrappers = [Wrapper(), Wrapper()]
    for wrapper in wrappers:
        wrapper.connect()
    waiting = gevent.spawn(Wrapper().connect)
    gevent.sleep(0)
    waiting.kill()
    wrappers[0].close()
    Wrapper().connect()


# Drivers that block


def driver(name: str, **attributes: Any) -> Any:
    wrapper = type("Wrapper", (), {"Database": type(name, (), {"__name__": name, **attributes})()})
    return wrapper()


@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        (driver("MySQLdb"), "use PyMySQL"),
        (
            driver("psycopg2", extensions=SimpleNamespace(get_wait_callback=lambda: None)),
            "use psycopg 3",
        ),
        (driver("pymysql"), None),
        (driver("psycopg"), None),
        (driver("sqlite3"), None),
    ],
)
def test_a_driver_that_blocks_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, wrapper: Any, advice: str | None
) -> None:
    monkeypatch.setattr(databases, "connections", {"default": wrapper})
    problems = list(databases.blocking_drivers())
    assert len(problems) == (advice is not None)
    assert all(advice in problem and "'default'" in problem for problem in problems if advice)


def test_the_tests_own_database_is_none() -> None:
    assert list(databases.blocking_drivers()) == []
