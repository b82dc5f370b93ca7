"""The carriers of the matrix: each with its broker, if it has one, and the backend's settings."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.services import RabbitMQ, Redis, Service
from tests.support import HERE, UNIT, Place

TIMEOUT = 20 * UNIT
HEARTBEAT = 2  # whole seconds: less the protocol cannot say


def redis_backend(redis: Redis, *, port: int | None = None) -> dict[str, Any]:
    """Return the settings; with a port, for a proxy of this host there."""
    url = redis.url if port is None else f"redis://127.0.0.1:{port}/0"
    path = "django_socketio.backends.redis.RedisBackend"
    return {"BACKEND": path, "OPTIONS": {"url": url, "timeout": TIMEOUT}}


def amqp_backend(rabbitmq: RabbitMQ, *, port: int | None = None) -> dict[str, Any]:
    url = rabbitmq.url if port is None else f"amqp://guest:guest@127.0.0.1:{port}//"
    path = "django_socketio.backends.amqp.AMQPBackend"
    options = {"url": url, "timeout": TIMEOUT, "heartbeat": HEARTBEAT}
    return {"BACKEND": path, "OPTIONS": options}


@dataclass(frozen=True, slots=True)
class Carrier:
    name: str
    service: Any
    """A Redis, a RabbitMQ, or None."""
    settings: Callable[..., Any]

    @property
    def workers(self) -> int:
        """How many make sense."""
        return 1 if self.service is None else 3

    @property
    def backend(self) -> Any:
        return self.settings()

    @property
    def patient(self) -> Any:
        """Return the settings of a backend with the timeout that it has by itself."""
        backend = self.settings()
        options = {k: v for k, v in backend["OPTIONS"].items() if k not in ("timeout", "heartbeat")}
        return {**backend, "OPTIONS": options}

    def through(self, port: int) -> Any:
        """Return the settings of a backend whose broker is behind a proxy."""
        return self.settings(port=port)


NAMES = ("memory", "redis", "amqp")
BROKERS = NAMES[1:]


@contextmanager
def carrier(name: str, place: Place = HERE) -> Iterator[Carrier]:
    with ExitStack() as block:
        if name == "memory":
            yield Carrier(name, None, lambda: "memory://")
            return
        service: Service = Redis(place=place) if name == "redis" else RabbitMQ(place)
        block.enter_context(service)
        make: Any = redis_backend if name == "redis" else amqp_backend

        def settings(**options: Any) -> Any:
            return make(service, **options)

        yield Carrier(name, service, settings)
