"""The servers of the tests: real ones that start, break and end as a test says."""

import os
from collections.abc import Iterator

import kombu
import psycopg
import pytest
import redis
from kombu.exceptions import OperationalError

from tests import services
from tests.services import PostgreSQL, RabbitMQ, Redis, Service
from tests.support import UNIT

FAILURES = (OSError, redis.RedisError, OperationalError, psycopg.Error)


@pytest.fixture(params=[Redis, RabbitMQ, PostgreSQL], ids=lambda each: each.name)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with request.param() as service:
        yield service


def answers(service: Service, timeout: float = 200 * UNIT) -> bool:
    """Tell whether the server answers its own client library within `timeout` seconds."""
    try:
        if isinstance(service, Redis):
            with redis.Redis.from_url(service.url, socket_timeout=timeout, retry=None) as client:
                return bool(client.ping())
        if isinstance(service, RabbitMQ):
            with kombu.Connection(service.url, connect_timeout=timeout) as connection:
                return bool(connection.connect())
        with psycopg.connect(service.url, connect_timeout=int(timeout) + 1) as database:
            return database.execute("SELECT true").fetchone() == (True,)
    except FAILURES:
        return False


@pytest.mark.timeout(400)
def test_it_answers_breaks_and_comes_back(service: Service) -> None:
    """On the same port, in another process, and nothing of it is left in the end."""
    first = service.pid
    assert answers(service)
    service.freeze()
    assert not answers(service, timeout=10 * UNIT)
    service.thaw()
    assert answers(service)
    service.kill()
    assert not answers(service)
    service.start()
    assert service.pid != first
    assert answers(service)
    last = service.pid
    service.freeze()
    service.stop()
    service.stop()
    assert not answers(service)
    for pid in (first, last):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(AssertionError, match="ended with status 1") as caught, Redis("--nonsense"):
        pass
    assert "nonsense" in "".join(caught.value.__notes__)


def test_redis_takes_options_and_a_unix_socket() -> None:
    with Redis("--cluster-enabled", "yes") as server:
        assert redis.Redis.from_url(server.url).info("cluster") == {"cluster_enabled": 1}
        assert redis.Redis.from_url(server.unix).ping()


def test_redis_speaks_tls() -> None:
    with Redis(tls=True) as server:
        assert server.url.startswith("rediss://")
        assert redis.Redis.from_url(server.url).ping()
        with pytest.raises(redis.ConnectionError, match="certificate"):
            redis.Redis.from_url(server.url.partition("?")[0], retry=None).ping()


def test_what_the_machine_lacks_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("redis", "rabbitmq", "postgresql"):
        monkeypatch.setattr(services, f"{name}_binary", lambda: None)
    for each in (Redis, RabbitMQ, PostgreSQL):
        with pytest.raises((pytest.skip.Exception, pytest.fail.Exception), match=each.name):
            each()


def test_rabbitmq_is_controlled() -> None:
    with RabbitMQ() as server:
        assert "guest" in server.ctl("list_users")
        with pytest.raises(AssertionError, match="rabbitmqctl nonsense said"):
            server.ctl("nonsense")
