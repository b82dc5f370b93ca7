import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import frames


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is, and how to connect. Of several URLs any will do."""

    urls: tuple[str, ...]
    exchange: str
    timeout: float
    heartbeat: int
    ssl: Mapping[str, Any]

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What is raised if the broker cannot be reached, or refuses."""
        client = self.client(self.urls[0])
        return (*client.connection_errors, *client.channel_errors)

    def client(self, url: str, name: str = "") -> Any:
        """Return a connection of kombu's that is not open."""
        from kombu.connection import Connection

        secure = url.startswith("amqps:")
        untyped: Any = Connection
        client = untyped(
            url,
            # By name, for kombu would take librabbitmq for amqp:// where it is installed.
            transport="amqps" if secure else "pyamqp",
            ssl={**self.ssl} if secure else False,
            connect_timeout=self.timeout,
            heartbeat=self.heartbeat,
            transport_options={
                "client_properties": {"connection_name": name},
                "socket_settings": self._socket_settings(),
            },
        )
        if secure and self.ssl.get("cert_reqs") != ssl.CERT_NONE:
            # Without a name py-amqp takes the certificate of any host.
            client.ssl.setdefault("server_hostname", client.hostname)
        return client

    def connect(self, url: str, name: str) -> Any:
        """Return an open connection of py-amqp's, with one channel and our exchange."""
        connection = self.client(url, name).transport.establish_connection()
        connection.sock.settimeout(self.timeout)
        try:
            channel = connection.channel(frames.CHANNEL)
            channel.exchange_declare(self.exchange, "direct", durable=True, auto_delete=False)
        except BaseException:
            connection.collect()
            raise
        return connection

    def _socket_settings(self) -> dict[int, int]:
        """Wait for lost packets as long as for answers; py-amqp gives up after a second."""
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        return {option: int(self.timeout * 1000)} if option else {}
