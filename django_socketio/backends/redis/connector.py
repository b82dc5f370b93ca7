"""How connections to Redis are made: addresses, options, and whom to ask for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..exceptions import BackendError, InvalidBackend
from .wire import Wire

OPTIONS = frozenset(
    {
        "client_name",
        "credential_provider",
        "password",
        "sentinel_password",
        "sentinel_username",
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
        "username",
    }
)
"""What redis-py can be told of a connection, by keyword or in the query of the URL."""

_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_SENTINEL = "sentinel_"

_HANDSHAKE = 2.0
"""Seconds that a host may take to accept a connection, and a sentinel to answer."""

_READ_SIZE = 4096
"""
Bytes of the buffer that redis-py reads a handshake into. A cycle of redis-py's own holds it, so
that of each attempt to connect it waits for the garbage collector.
"""

_REDIRECTS = 5

_OLDEST = (8, 0, 1)
_INSTALL = (
    "RedisBackend needs redis 8.0.1 or later with hiredis: pip install django-socketio[redis]"
)

Address = tuple[str, int]


class Connector:
    """
    Make connections to one Redis, or to whichever the sentinels say is the master of a service.

    `database` is the number in the URL, which SELECT is not told: to pub/sub it means nothing.
    `probe` is a channel of a cluster, if there is one: connections then go to the node that has it.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, Any],
        *,
        timeout: float,
        sentinels: Sequence[Address] = (),
        service: str = "",
    ) -> None:
        _require_client_library()
        found = _parse(url) | options
        self.database: int = found.pop("db", 0)
        self.probe = b""
        self.sentinels = list(sentinels)
        self._service = service
        self._class = found.pop("connection_class")
        tls = {name: found[name] for name in found if name.startswith("ssl_")}
        asking = {name: found.pop(name) for name in list(found) if name.startswith(_SENTINEL)}
        self._options = _defaults(timeout) | found
        self._sentinel_options = _defaults(min(timeout, _HANDSHAKE)) | tls
        for name, value in asking.items():
            self._sentinel_options[name.removeprefix(_SENTINEL)] = value
        self._refuse_what_does_not_fit(bool(asking), bool(tls))

    @property
    def where(self) -> str:
        """What to call it in a message: no password is in it."""
        if self.sentinels:
            return f"{self._service!r} of {', '.join(f'{h}:{p}' for h, p in self.sentinels)}"
        options = self._options
        return str(options.get("path") or f"{options['host']}:{options['port']}")

    def __call__(self) -> Wire:
        """Return a new connection, or raise `BackendError`."""
        from redis.exceptions import RedisError

        try:
            return Wire(self._connection())
        except (RedisError, OSError, ValueError) as error:
            raise BackendError(f"no connection: {error}") from error

    def check(self) -> list[str]:
        """Return a sentence for each file that the options name and nobody finds."""
        return [
            f"RedisBackend: there is no {path}, which {name} names."
            for name in _FILES
            if (path := self._options.get(name)) and not Path(path).exists()
        ]

    def _refuse_what_does_not_fit(self, asks_sentinels: bool, uses_tls: bool) -> None:
        from redis.exceptions import RedisError

        if bool(self.sentinels) != bool(self._service):
            raise InvalidBackend("RedisBackend: sentinels and service go together.")
        if asks_sentinels and not self.sentinels:
            raise InvalidBackend("RedisBackend: there are options for sentinels, but no sentinels.")
        if self.sentinels and "path" in self._options:
            raise InvalidBackend("RedisBackend: sentinels do not tell of Unix sockets.")
        if uses_tls and not _is_tls(self._class):
            raise InvalidBackend("RedisBackend: options that begin with ssl_ need rediss://.")
        try:
            self._class(**self._options)  # does not connect
        except (TypeError, ValueError, RedisError) as error:
            raise InvalidBackend(f"RedisBackend: {error}") from error

    # Connecting

    def _connection(self) -> Any:
        """Return a connection of redis-py, to the node that is meant."""
        from redis.exceptions import MovedError

        address = self._master() if self.sentinels else {}
        for _ in range(_REDIRECTS):
            try:
                return self._open(address)
            except MovedError as moved:
                if "path" in self._options:
                    raise
                host = moved.host or address.get("host", self._options["host"])
                address = {"host": host, "port": moved.port}
        raise BackendError(f"the nodes of the cluster at {self.where} send us in circles")

    def _open(self, address: dict[str, Any]) -> Any:
        connection = self._class(**self._options | address)
        connection.connect()
        try:
            self._verify(connection)
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _verify(self, connection: Any) -> None:
        from redis.exceptions import ConnectionError, ResponseError

        if self.sentinels and _ask(connection, "ROLE")[0] != b"master":
            # One that sentinels have not told each other of yet.
            raise ConnectionError(f"{connection.host}:{connection.port} is no master")
        if self.probe:
            try:
                _ask(connection, "SPUBLISH", self.probe, b"")
            except ResponseError as error:
                if "unknown command" in str(error):
                    raise ConnectionError("sharded pub/sub needs Redis 7 or later") from error
                raise

    def _master(self) -> dict[str, Any]:
        """Return the address that the first sentinel to answer has; the next time ask it first."""
        from redis.exceptions import ConnectionError, RedisError

        troubles = []
        for address in self.sentinels:
            try:
                found = self._ask_sentinel(address)
            except (RedisError, OSError) as error:
                troubles.append(str(error))
                continue
            self.sentinels = [address, *(each for each in self.sentinels if each != address)]
            return {"host": found[0].decode(), "port": int(found[1])}
        raise ConnectionError("no sentinel knows the master: " + "; ".join(troubles))

    def _ask_sentinel(self, address: Address) -> list[bytes]:
        from redis.exceptions import ResponseError

        host, port = address
        connection = self._class(**self._sentinel_options, host=host, port=port)
        connection.connect()
        try:
            found = _ask(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        finally:
            connection.disconnect()
        if not found:
            raise ResponseError(f"{host}:{port} does not know it")
        return list(found)


def _ask(connection: Any, *command: str | bytes) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _defaults(timeout: float) -> dict[str, Any]:
    """Return what redis-py would decide by itself: among others, to try ten times."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return {
        "protocol": 2,
        "driver_info": None,
        "health_check_interval": 0,
        "retry": Retry(NoBackoff(), 0),
        "socket_read_size": _READ_SIZE,
        "socket_timeout": timeout,
        "socket_connect_timeout": min(timeout, _HANDSHAKE),
    }


def _is_tls(connection_class: type) -> bool:
    from redis.connection import SSLConnection

    return issubclass(connection_class, SSLConnection)


def _parse(url: str) -> dict[str, Any]:
    """Return the options that a URL holds, and the class of its connections."""
    from redis.connection import Connection, parse_url

    if not isinstance(url, str) or not re.match("(redis|rediss|unix)://", url):
        raise InvalidBackend("RedisBackend: the URL begins with redis://, rediss:// or unix://.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its message may quote a part of the password
        raise InvalidBackend(
            "RedisBackend: the URL has no valid host and port; are the special characters in its"
            " password percent-encoded?"
        ) from None
    known = OPTIONS - {"credential_provider"} | {"db"}  # a string is no provider
    unknown = sorted(parse_qs(parts.query).keys() - known)
    if unknown:
        raise InvalidBackend(f"RedisBackend does not know {', '.join(unknown)}, which the URL has.")
    if parts.scheme != "unix" and not re.fullmatch("/?[0-9]*", parts.path):
        raise InvalidBackend("RedisBackend: the path of the URL is no database number.")
    if parts.scheme == "unix" and not parts.path:
        raise InvalidBackend("RedisBackend: the URL has no path of a Unix socket.")
    try:
        found: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise InvalidBackend(f"RedisBackend: {error}") from error
    if found.get("db", 0) < 0:
        raise InvalidBackend("RedisBackend: the database number of the URL is negative.")
    if parts.scheme == "unix":
        return found
    network: dict[str, Any] = {"host": "localhost", "port": port or 6379, "socket_keepalive": True}
    return {"connection_class": Connection} | network | found


def _require_client_library() -> None:
    try:
        import hiredis  # noqa: F401
        import redis
    except ImportError as error:
        raise InvalidBackend(f"{_INSTALL} ({error}).") from error
    version = tuple(int(part) for part in re.findall("[0-9]+", redis.__version__)[:3])
    if version < _OLDEST:
        raise InvalidBackend(f"{_INSTALL}; this is redis {redis.__version__}.")
