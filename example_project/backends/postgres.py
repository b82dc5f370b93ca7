"""
A backend of one's own: LISTEN and NOTIFY of PostgreSQL, through psycopg 3.

Each process listens on a channel of its own. A table has the topics that it subscribes to, and to
publish is to notify the channels that the table has for a topic.
"""

import base64
import logging
import os
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Any, Self

import psycopg

from django_socketio.backends import BackendError, BaseBackend, Deliver

logger = logging.getLogger(__name__)

PIECE = 7_900  # characters; a notification has less than 8,000 bytes

# A process that is killed leaves its rows here, but not the connection with its channel's name: so
# rows without a connection do not count, and whoever connects deletes them.
SET_UP = """
    SELECT pg_advisory_xact_lock(hashtext('socketio_subscription'));
    CREATE UNLOGGED TABLE IF NOT EXISTS socketio_subscription (
        topic text, channel text, PRIMARY KEY (topic, channel)
    );
    DELETE FROM socketio_subscription
    WHERE channel NOT IN (SELECT application_name FROM pg_stat_activity)
"""
SUBSCRIBE = """
    INSERT INTO socketio_subscription (topic, channel)
    SELECT unnest(%s::text[]), %s ON CONFLICT DO NOTHING
"""
UNSUBSCRIBE = "DELETE FROM socketio_subscription WHERE topic = ANY(%s) AND channel = %s"
PUBLISH = """
    SELECT pg_notify(channel, part)
    FROM socketio_subscription JOIN pg_stat_activity ON application_name = channel
    CROSS JOIN unnest(%s::text[]) WITH ORDINALITY AS parts (part, number)
    WHERE topic = %s ORDER BY number
"""


class PostgresBackend(BaseBackend):
    """
    Carry payloads through a database, to which all processes connect as the same user::

        SOCKETIO_BACKEND = {
            "BACKEND": "backends.postgres.PostgresBackend",
            "OPTIONS": {"url": "postgresql://user:password@host/name"},
        }

    Sites that share a database have a schema each: `?options=-csearch_path%3Dsite`.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, **options: Any) -> None:
        super().__init__(url, **options)
        self.timeout = timeout
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._listener: Listener | None = None

    def start(self, deliver: Deliver) -> None:
        self._listener = Listener(self, deliver)
        self._listener.start()

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.stop()
        with suppress(BackendError), held(self._sending, self.timeout):
            self._hang_up()

    def subscribe(self, topics: Sequence[str]) -> None:
        if self._listener is None or not self._listener.listening.wait(self.timeout):
            raise BackendError("There is no connection to PostgreSQL.")
        self._listener.subscribe(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        if self._listener is not None:
            self._listener.unsubscribe(topics)

    def publish(self, topic: str, payload: bytes) -> int:
        text = base64.b64encode(topic.encode() + b"\0" + payload).decode()
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        # Each says how many follow. What one statement notifies of arrives together, but what is
        # equal only once.
        parts = [f"{len(pieces) - number} {piece}" for number, piece in enumerate(pieces, 1)]
        return self.execute(PUBLISH, parts, topic) // len(parts)

    def execute(self, statement: str, *parameters: object) -> int:
        """Return how many rows the statement has returned or changed."""
        with held(self._sending, self.timeout):
            try:
                if self._connection is None:
                    self._connection = Connection.open(self, "socketio")
                return self._connection.execute(statement, parameters).rowcount
            except BaseException as error:
                self._hang_up()  # an answer may be under way, which would be taken for the next
                if isinstance(error, psycopg.Error):
                    raise BackendError(f"PostgreSQL: {error}") from error
                raise

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Listener(threading.Thread):
    """What receives from start to stop, over as many connections as that takes."""

    def __init__(self, backend: PostgresBackend, deliver: Deliver) -> None:
        super().__init__(name="socketio-listener", daemon=True)
        self.listening = threading.Event()
        self._stopped = threading.Event()
        self._backend = backend
        self._deliver = deliver
        self._connection: Connection | None = None
        self._channel = ""
        self._topics: set[str] = set()
        self._left: set[str] = set()  # of which the table has some still
        self._changing = threading.Lock()

    def stop(self) -> None:
        self._stopped.set()
        if self._connection is not None:
            self._connection.limit = 0.0
        self.join(self._backend.timeout)

    def subscribe(self, topics: Sequence[str]) -> None:
        with held(self._changing, self._backend.timeout):
            if left := list(self._left):
                self._backend.execute(UNSUBSCRIBE, left, self._channel)
                self._left.difference_update(left)
            self._topics.update(topics)
            self._backend.execute(SUBSCRIBE, list(topics), self._channel)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self._topics.difference_update(topics)
        self._left.update(topics)

    def run(self) -> None:
        pause, lost = 0.1, None
        while not self._stopped.is_set():
            try:
                with self._connected() as connection:
                    if lost is not None:
                        self._backend.interrupted(monotonic() - lost)
                    pause, lost = 0.1, None
                    self._hear(connection)
            except (psycopg.Error, BackendError) as error:
                if not self._stopped.is_set():
                    logger.warning("PostgreSQL is lost, next attempt in %g s: %s", pause, error)
            except Exception:
                logger.exception("The listener failed, next attempt in %g s", pause)
            lost = lost or monotonic()
            self._stopped.wait(pause)
            pause = min(2 * pause, 1)

    @contextmanager
    def _connected(self) -> Iterator["Connection"]:
        channel = f"socketio_{uuid.uuid4().hex}"
        self._connection = connection = Connection.open(self._backend, channel)
        try:
            connection.execute(f"LISTEN {channel}")
            with held(self._changing, self._backend.timeout):
                self._channel = channel
                connection.execute(SUBSCRIBE, (list(self._topics), channel))
            self.listening.set()
            yield connection
        finally:
            self.listening.clear()
            connection.close()

    def _hear(self, connection: "Connection") -> None:
        parts: list[str] = []
        while not self._stopped.is_set():
            for notification in connection.notifies(timeout=self._backend.timeout / 2):
                following, _, part = notification.payload.partition(" ")
                parts.append(part)
                if following == "0":
                    self._take("".join(parts))
                    parts.clear()
            connection.execute("SELECT 1")  # a server may be gone without a word
            if self._left:
                self.subscribe([])

    def _take(self, text: str) -> None:
        name, _, payload = base64.b64decode(text).partition(b"\0")
        topic = name.decode()
        if topic in self._topics and not self._stopped.is_set():
            try:
                self._deliver(topic, payload)
            except Exception:
                logger.exception("Could not deliver what was published on %r", topic)


class Connection(psycopg.Connection[Any]):
    """One that waits `limit` seconds at most, and only in the process that opened it."""

    limit = 0.0
    pid = 0

    @classmethod
    def open(cls, backend: PostgresBackend, name: str) -> Self:
        seconds = max(2, int(backend.timeout))  # psycopg knows no less
        connection = cls.connect(
            backend.url, autocommit=True, application_name=name, connect_timeout=seconds
        )
        connection.limit = backend.timeout
        connection.pid = os.getpid()
        connection.execute(SET_UP)
        return connection

    def close(self) -> None:
        if self.pid == os.getpid():
            super().close()

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **options: Any) -> Any:
        """Override what waits in every method of psycopg."""
        return super().wait(self._limited(gen), *args, **options)

    def _limited(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        since = monotonic()
        try:
            step = next(steps)
            while True:
                ready = yield step
                if self.pid != os.getpid():
                    raise SystemExit  # from a greenlet that a fork has taken along
                if not ready and monotonic() - since > self.limit:
                    raise psycopg.OperationalError(f"no answer in {self.limit:g} s")
                step = steps.send(ready)
        except StopIteration as end:
            return end.value


@contextmanager
def held(lock: threading.Lock, seconds: float) -> Iterator[None]:
    """Hold the lock; raise `BackendError` if somebody else holds it for too long."""
    deadline = monotonic() + seconds
    while not lock.acquire(blocking=False):  # for gevent's does not wake other threads
        if monotonic() > deadline:
            raise BackendError("PostgreSQL does not answer.")
        sleep(0.001)
    try:
        yield
    finally:
        lock.release()
