"""Sends from every kind of process to a client of another: prefork, shell, threads, ASGI."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest

from tests import clients
from tests.deployment.cluster import Cluster
from tests.services import Redis
from tests.support import ROOT, UNIT, Server, wait_until

Call = Callable[..., Any]
"""`call(name, *args)`: call a function of the API in that process, and return the outcome."""


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module")
def broker() -> Iterator[Redis]:
    """Celery's own, so that it lives while ours is down."""
    with Redis() as broker:
        yield broker


@pytest.fixture(scope="module")
def cluster(redis: Redis) -> Iterator[Cluster]:
    with Cluster(redis.url, workers=2) as cluster:
        yield cluster


@contextmanager
def lines(script: list[str], env: dict[str, str]) -> Iterator[Call]:
    """A script that reads calls, a line of JSON each, and prints what they return."""
    with subprocess.Popen(
        [sys.executable, *script],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(name: str, *args: Any) -> Any:
            print(json.dumps([name, *args]), file=process.stdin, flush=True)
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


@contextmanager
def shell(cluster: Cluster, broker: Redis) -> Iterator[Call]:
    program = (
        "import json, sys; from tests.deployment.sender import attempt\n"
        "for line in sys.stdin: print(json.dumps(attempt(*json.loads(line))), flush=True)"
    )
    command = ["tests/deployment/manage.py", "shell", "-v", "0", "-c", program]
    with lines(command, cluster.env) as call:
        yield call


@contextmanager
def celery(cluster: Cluster, broker: Redis) -> Iterator[Call]:
    """A Celery worker that forks: the parent has django_socketio imported, the children send."""
    env = {**cluster.env, "CELERY_BROKER_URL": broker.url}
    options = ["--pool", "prefork", "--concurrency", "2", "--without-gossip", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "-A", "tests.deployment.tasks"]
    with cluster.output("celery") as log:
        process = subprocess.Popen(
            [*command, "worker", *options], cwd=ROOT, env=env, stdout=log, stderr=log
        )
    try:
        with lines(["tests/deployment/ask_celery.py"], env) as call:
            yield call
    finally:
        process.terminate()
        process.wait(600 * UNIT)


@contextmanager
def served(cluster: Cluster, path: str, *command: str) -> Iterator[Call]:
    server = Server("tests/deployment/manage.py", env=cluster.env)
    arguments = [part.format(host="127.0.0.1", port=server.port) for part in command]
    server.command = [sys.executable, "-m", *arguments]

    def call(name: str, *args: Any) -> Any:
        query = urlencode({"call": json.dumps([name, *args])})
        answer = clients.request(server.address, "GET", f"{path}?{query}")
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    with server:
        yield call


@contextmanager
def threaded_wsgi(cluster: Cluster, broker: Redis) -> Iterator[Call]:
    options = ["-k", "gthread", "--threads", "4", "-b", "{host}:{port}"]
    with served(cluster, "/call/", "gunicorn", *options, "tests.deployment.wsgi") as call:
        yield call


@contextmanager
def asgi(cluster: Cluster, broker: Redis) -> Iterator[Call]:
    options = ["--host", "{host}", "--port", "{port}"]
    application = "tests.deployment.asgi:application"
    with served(cluster, "/async-call/", "uvicorn", *options, application) as call:
        yield call


KINDS = [celery, shell, threaded_wsgi, asgi]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def call(request: pytest.FixtureRequest, cluster: Cluster, broker: Redis) -> Iterator[Call]:
    with request.param(cluster, broker) as call:
        yield call


@pytest.fixture
def client(cluster: Cluster) -> Iterator[clients.Client]:
    client = clients.connect(cluster.addresses[1])
    client.subscribe("room")
    yield client
    client.close()


@pytest.mark.timeout(4000 * UNIT)
def test_it_sends_to_clients_of_any_worker(
    call: Call, cluster: Cluster, client: clients.Client
) -> None:
    other = clients.connect(cluster.addresses[0])
    try:
        assert call("send", client.sid, "to you") is None
        assert call("broadcast_channel", "to the room", "room") is None
        assert call("broadcast", "to all") is None
        assert [client.event()[1] for _ in range(3)] == ["to you", "to the room", "to all"]
        assert other.event() == ["message", "to all"]
    finally:
        other.close()


@pytest.mark.timeout(4000 * UNIT)
def test_it_acts_on_clients_of_any_worker(call: Call, client: clients.Client) -> None:
    assert call("count", "room") == 1
    assert call("channels") == {"room": 1}
    assert call("subscribe", client.sid, "hall") is None
    assert call("broadcast_channel", "hello", "hall") is None
    assert client.event() == ["message", "hello"]
    assert call("unsubscribe", client.sid, "hall") is None
    # The worker itself leaves the topic soon after its last member.
    wait_until(lambda: call("broadcast_channel", "bye", "hall") == "NoSocket", what="nobody")
    assert call("disconnect", client.sid) is None
    client.disconnected()


@pytest.mark.timeout(4000 * UNIT)
def test_nobody_there(call: Call) -> None:
    assert call("send", "nobody", "x") == "NoSocket"
    assert call("broadcast_channel", "x", "nowhere") == "NoSocket"
    assert call("subscribe", "nobody", "room") == "NoSocket"
    assert call("disconnect", "nobody") == "NoSocket"
    assert call("count", "nowhere") == 0


@pytest.mark.timeout(2400 * UNIT)
def test_the_carrier_is_down(
    call: Call, cluster: Cluster, client: clients.Client, redis: Redis
) -> None:
    """The sender is told at once, and goes on by itself when the carrier is back."""
    redis.stop()
    try:
        assert call("send", client.sid, "lost") == "BackendError"
        assert call("broadcast_channel", "lost", "room") == "BackendError"
        assert call("count", "room") == "BackendError"
    finally:
        redis.start()
    wait_until(cluster.healthy, what="the workers' health")
    wait_until(lambda: call("send", client.sid, "back") is None, what="a send")
    assert client.event() == ["message", "back"]
