"""The backend itself: options, topics and channels."""

import re
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from ..base import BaseBackend, Deliver
from ..exceptions import BackendError, InvalidBackend
from .connector import OPTIONS, Address, Connector
from .publisher import Publisher
from .subscriber import Subscriber, Verbs
from .wire import pack


class RedisBackend(BaseBackend):
    """
    Carry payloads over the pub/sub of Redis, or of Valkey.

    A process has one connection that listens, once it is started, and one that publishes, once it
    has to. What is published is at most a message in the memory of Redis: nobody who is not
    connected when it comes will ever see it.

    - `url` begins with `redis://`, `rediss://` or `unix://`. User and password are in it, or in
      options. An ACL user needs `+@pubsub` and `&socketio:*`, and nothing else.
    - `prefix` and the database number of the URL isolate: topic `t` is the channel
      `prefix:database/t`. Two deployments hear each other if both are the same, and only then;
      Redis itself has one pub/sub for all of its databases.
    - `timeout` is how many seconds a publish or a subscribe may take in all. While there is no
      connection, a publish fails as soon as an attempt to connect does; a subscribe waits for one
      second, which is as long as the listener ever rests between two attempts. Half of it is how
      long Redis may be silent until the listener asks it for a sign of life.
    - `sentinels`, pairs of host and port, and `service`: connections go to the master that these
      know, and follow a failover. The host in the URL then means nothing. What else the URL and
      the options say holds for the master; sentinels speak TLS if it does, and have a user and a
      password of their own. The ACL user needs `+role`, too.
    - `sharded` is for Redis Cluster, with Redis 7 or later: all topics of a deployment are in one
      slot, as `{prefix:database}/t`, and connections go to the node that has it, wherever it moves.
      Without, all nodes of a cluster carry all that is published, and receivers are counted on the
      node that the URL names: processes that name different ones hear each other all the same.

    `connector.OPTIONS` are the options of connections, by their names in redis-py. Those that are
    strings may be in the query of the URL as well.
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        prefix: str = "socketio",
        timeout: float = 5.0,
        sharded: bool = False,
        sentinels: Sequence[Address] | None = None,
        service: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(url, **{name: options[name] for name in options.keys() - OPTIONS})
        _check_prefix(prefix)
        _check_timeout(timeout)
        self.counters: Counter[str] = Counter()
        self._timeout = timeout
        self._sharded = sharded
        self._connector = Connector(
            url,
            options,
            timeout=timeout,
            sentinels=_addresses(sentinels),
            service=service or "",
        )
        space = f"{prefix}:{self._connector.database}"
        if sharded:
            space = f"{{{space}}}"  # the slot is that of what is in braces
            self._connector.probe = space.encode()
        self._space = f"{space}/".encode()
        self._verb = b"SPUBLISH" if sharded else b"PUBLISH"
        self._publisher = Publisher(self._connector, timeout, self.counters)
        self._subscriber: Subscriber | None = None

    def start(self, deliver: Deliver) -> None:
        if self._subscriber is not None:
            return
        self._subscriber = Subscriber(
            self._connector,
            deliver,
            self.interrupted,
            verbs=Verbs.SHARDED if self._sharded else Verbs.PLAIN,
            where=self._connector.where,
            timeout=self._timeout,
            counters=self.counters,
        )
        self._subscriber.start()

    def stop(self) -> None:
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            subscriber.stop()
        self._publisher.close()

    def subscribe(self, topics: Sequence[str]) -> None:
        if not topics:
            return
        if self._subscriber is None:
            raise BackendError("the Redis backend is not started")
        self._subscriber.subscribe({self._channel(topic): topic for topic in topics})

    def unsubscribe(self, topics: Sequence[str]) -> None:
        if self._subscriber is not None:
            self._subscriber.unsubscribe([self._channel(topic) for topic in topics])

    def publish(self, topic: str, payload: bytes) -> int:
        return self._publisher.publish(pack(self._verb, self._channel(topic), payload))

    def check(self) -> list[str]:
        problems = self._connector.check()
        if self._sharded and self._connector.sentinels:
            problems.append("RedisBackend: sharded is for a Redis Cluster, which has no sentinels.")
        return problems

    def _channel(self, topic: str) -> bytes:
        return self._space + topic.encode("utf-8", "surrogatepass")


def _check_prefix(prefix: object) -> None:
    # A "/" would be ambiguous, and braces mean something to a cluster.
    if not isinstance(prefix, str) or not re.fullmatch("[A-Za-z0-9_.:@-]{1,100}", prefix):
        raise InvalidBackend(
            "RedisBackend: prefix is up to 100 letters, digits and _ . : @ -,"
            f" which {prefix!r} is not."
        )


def _check_timeout(timeout: object) -> None:
    good = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (good and isfinite(timeout) and timeout > 0):  # type: ignore[arg-type,operator]
        raise InvalidBackend(f"RedisBackend: timeout is a number of seconds, not {timeout!r}.")


def _addresses(sentinels: Any) -> list[Address]:
    try:
        return [(str(host), int(port)) for host, port in sentinels or ()]
    except (TypeError, ValueError):
        raise InvalidBackend(
            'RedisBackend: sentinels are pairs such as ("sentinel-1.example.com", 26379),'
            f" which {sentinels!r} are not."
        ) from None
