"""The example of a backend of one's own, with a real PostgreSQL."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar
from unittest import TestCase

import gevent
import psycopg
import pytest

from django_socketio.backends import BackendError
from django_socketio.testing import BackendContract, Cluster, OutageContract
from example_project.backends.postgres import PIECE, PostgresBackend
from tests.services import PostgreSQL
from tests.support import ROOT, UNIT, wait_until

SUBSCRIBER = """
import sys, time
from example_project.backends.postgres import PostgresBackend
backend = PostgresBackend(sys.argv[1])
backend.start(print)
backend.subscribe(["t", "u"])
print("subscribed", flush=True)
time.sleep(1000)
"""

Inbox = list[tuple[str, bytes]]
Make = Callable[[], PostgresBackend]


def schema(server: PostgreSQL, name: str) -> str:
    """Return the URL of a schema of this name; make it if there is none."""
    with psycopg.connect(server.url, autocommit=True) as database:
        database.execute(f"CREATE SCHEMA IF NOT EXISTS {name}")
    return f"{server.url}?options=-csearch_path%3D{name}"


class OnServer(Cluster):
    """A server for each class of tests, as they break it."""

    timeout = 2 * Cluster.timeout  # the server starts processes and writes files
    server: ClassVar[PostgreSQL]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.server = cls.enterClassContext(PostgreSQL())

    def make_backend(self) -> PostgresBackend:
        return PostgresBackend(schema(self.server, self.unique), timeout=self.timeout)


class TestContract(OnServer, BackendContract, TestCase):
    def break_carrier(self) -> None:
        self.server.kill()

    def heal_carrier(self) -> None:
        self.server.start()


class TestSilence(OnServer, OutageContract, TestCase):
    """A host that answers nothing, and closes nothing."""

    def break_carrier(self) -> None:
        self.server.freeze()

    def heal_carrier(self) -> None:
        self.server.thaw()


@pytest.mark.timeout(400)
def test_without_gevent(postgresql_server: PostgreSQL) -> None:
    command = [sys.executable, "-W", "error", "-m", "unittest", f"{__name__}.TestContract"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def make(postgresql_server: PostgreSQL) -> Iterator[Make]:
    """Make backends of one address space."""
    made: list[PostgresBackend] = []
    url = schema(postgresql_server, "test")

    def make() -> PostgresBackend:
        made.append(PostgresBackend(url, timeout=40 * UNIT))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()
    with psycopg.connect(postgresql_server.url) as database:
        database.execute("DROP SCHEMA test CASCADE")


def start(make: Make) -> tuple[PostgresBackend, Inbox]:
    inbox: Inbox = []
    backend = make()
    backend.start(lambda topic, payload: inbox.append((topic, payload)))
    return backend, inbox


def wait_for_more(items: Sequence[object]) -> None:
    count = len(items)
    wait_until(lambda: len(items) > count + 10)


def rows(backend: PostgresBackend) -> int:
    with psycopg.connect(backend.url) as database:
        found = database.execute("SELECT count(*) FROM socketio_subscription").fetchone()
    return int(found[0]) if found else 0


def test_a_process_that_was_killed_does_not_count(make: Make) -> None:
    """Nor do its rows stay for longer than until the next process starts."""
    backend = make()
    command = [sys.executable, "-c", SUBSCRIBER, backend.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as subscriber:
        assert subscriber.stdout
        assert subscriber.stdout.readline() == b"subscribed\n"
        assert backend.publish("t", b"x") == 1
        subscriber.kill()
    wait_until(lambda: backend.publish("t", b"x") == 0)
    assert rows(backend) == 2
    other, _ = start(make)
    other.subscribe(["v"])
    assert rows(backend) == 1


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_long_payloads_are_cut_and_joined(make: Make, size: int) -> None:
    """Also where a piece ends with the payload, and all pieces but their numbers are equal."""
    backend, inbox = start(make)
    backend.subscribe(["t"])
    payloads = [bytes(PIECE * 3 // 4 * size + more) for more in (0, 1, 2, 3)]
    assert [backend.publish("t", payload) for payload in payloads] == [1, 1, 1, 1]
    wait_until(lambda: len(inbox) == 4)
    assert inbox == [("t", payload) for payload in payloads]


def test_the_server_restarts_under_traffic() -> None:
    """Politely, as for a new version: errors meanwhile, nothing twice, and all is back."""
    with PostgreSQL() as server:
        subscriber, publisher = PostgresBackend(server.url), PostgresBackend(server.url)
        inbox: Inbox = []
        subscriber.start(lambda topic, payload: inbox.append((topic, payload)))
        subscriber.subscribe(["t"])
        sent: list[bytes] = []
        failed: list[bytes] = []

        def publish() -> None:
            while True:
                payload = b"%d" % (len(sent) + len(failed))
                try:
                    publisher.publish("t", payload)
                except BackendError:
                    failed.append(payload)
                else:
                    sent.append(payload)
                gevent.sleep(UNIT / 10)

        publishing = gevent.spawn(publish)
        for _ in range(2):
            wait_for_more(inbox)
            server.stop()
            wait_for_more(failed)
            server.start()
        wait_for_more(inbox)
        publishing.kill()
        wait_until(lambda: inbox[-1] == ("t", sent[-1]))
        numbers = [int(payload) for _, payload in inbox]
        assert numbers == sorted(set(numbers))
        subscriber.stop()
        publisher.stop()


def test_an_interruption_is_told(make: Make, postgresql_server: PostgreSQL) -> None:
    backend, interruptions = make(), list[float]()
    backend.interrupted = interruptions.append
    backend.start(lambda topic, payload: None)
    backend.subscribe(["t"])
    assert not interruptions
    with psycopg.connect(postgresql_server.url, autocommit=True) as database:
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
        )
    wait_until(lambda: interruptions)
    assert len(interruptions) == 1 and interruptions[0] > 0
    assert make().publish("t", b"x") == 1


def test_a_connection_that_fell_silent_is_replaced(make: Make) -> None:
    """As if it broke without a word: nobody closes it, and nothing comes any more."""
    backend, inbox = start(make)
    backend.subscribe(["t"])
    with psycopg.connect(backend.url) as database:
        query = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'socketio\\_%'"
        ((pid,),) = database.execute(query).fetchall()
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: backend.publish("t", b"x") and inbox, timeout=400 * UNIT)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_greenlet_that_ends_in_a_publish_leaves_no_answer_behind(make: Make) -> None:
    """The next publish gets its own."""
    backend, inbox = start(make)
    backend.subscribe(["t"])
    with psycopg.connect(backend.url) as database:
        database.execute("LOCK TABLE socketio_subscription")
        publishing = gevent.spawn(backend.publish, "t", b"lost")
        gevent.sleep(UNIT)
        publishing.kill()
    assert backend.publish("t", b"x") == 1
    wait_until(lambda: ("t", b"x") in inbox)


def test_no_server() -> None:
    nowhere = PostgresBackend("postgresql://127.0.0.1:1/none", timeout=UNIT)
    with pytest.raises(BackendError, match="refused"):
        nowhere.publish("t", b"x")
    with pytest.raises(BackendError, match="no connection"):
        nowhere.subscribe(["t"])
    nowhere.stop()
