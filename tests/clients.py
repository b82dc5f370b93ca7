"""
A Socket.IO client for tests: WebSocket and polling, one step at a time.

It reads only when a test asks it to, so a client that does not read is one that is not asked. It
shares no code with the package.
"""

import http.client
import json
import re
import socket
import ssl
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self
from urllib.parse import urlencode

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.extensions import ClientExtensionFactory
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from tests.support import UNIT

#: Seconds until a test that waits for a client gives up.
TIMEOUT = 600 * UNIT

PATH = "/socket.io/"
CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)

_PACKET = re.compile(r"([0-6])(?:(\d+)-)?(?:(/[^,]*),?)?(\d+)?(.*)\Z", re.DOTALL)

Headers = Mapping[str, str]


class Lost(Exception):
    """
    The server has ended the connection.

    `code` and `note` are those of its close frame, if it sent one.
    """

    def __init__(self, why: str, code: int | None = None, note: str = "") -> None:
        super().__init__(why, code, note)
        self.code = code
        self.note = note


class HandshakeFailed(Exception):
    """The server answered a handshake with another status than that of success."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.headers = headers
        self.body = body


class Refused(Exception):
    """The namespace did not let the client in; `data` is what it said."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.data = data


@dataclass
class Packet:
    """One packet, its attachments in `data`; a binary one has the type of its plain twin."""

    type: int
    namespace: str
    id: int | None
    data: Any


# Transports


def open_socket(address: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.settimeout(TIMEOUT)
        sock.connect((host, int(port)))
        return tls.wrap_socket(sock, server_hostname=host) if tls else sock
    except BaseException:  # also where somebody ends the greenlet
        sock.close()
        raise


class WebSocket:
    """
    The WebSocket transport, connected directly; `headers` go with its handshake, as do `offers`, of
    extensions.
    """

    name = "websocket"

    def __init__(
        self,
        address: str,
        *,
        headers: Headers | None = None,
        query: Mapping[str, str] | None = None,
        path: str = PATH,
        tls: ssl.SSLContext | None = None,
        offers: Sequence[ClientExtensionFactory] = (),
    ) -> None:
        query = {"EIO": "4", "transport": "websocket", **(query or {})}
        uri = f"{'wss' if tls else 'ws'}://{address}{path}?{urlencode(query)}"
        extensions = list(offers)
        self.protocol = ClientProtocol(parse_uri(uri), extensions=extensions, max_size=None)
        self.answer: Response | None = None
        self.messages: deque[str | bytes] = deque()
        self._fragments: list[Frame] = []
        self._writing = Lock()
        self.socket = open_socket(address, tls)
        request = self.protocol.connect()
        for name, value in (headers or {}).items():
            request.headers[name] = value
        self.protocol.send_request(request)
        try:
            self._write()
            while self.answer is None:
                self._read(time.monotonic() + TIMEOUT)
        except BaseException:
            self.socket.close()
            raise

    def headers(self, name: str) -> list[str]:
        """Return the values of a header of the handshake's answer."""
        assert self.answer is not None
        return self.answer.headers.get_all(name)

    def send(self, *messages: str | bytes) -> None:
        if self.protocol.state is not OPEN:
            raise self._end()
        for message in messages:
            if isinstance(message, str):
                self.protocol.send_text(message.encode())
            else:
                self.protocol.send_binary(message)
        self._write()

    def receive(self, deadline: float) -> str | bytes:
        """Return the next message; raise `Lost` or `TimeoutError`."""
        while not self.messages:
            self._read(deadline)
        return self.messages.popleft()

    def close(self) -> None:
        """Close as a browser does, with a close frame, without waiting for the answer."""
        if self.protocol.state is OPEN and self.socket.fileno() >= 0:
            self.protocol.send_close(CloseCode.NORMAL_CLOSURE)
            with suppress(OSError):
                self._write()
        self.socket.close()

    def drop(self) -> None:
        """Be gone, without a word of the protocol."""
        self.socket.close()

    def _write(self) -> None:
        with self._writing:  # of whoever reads, and answers a ping, and whoever sends
            for data in self.protocol.data_to_send():
                if data:
                    self.socket.sendall(data)

    def _read(self, deadline: float) -> None:
        self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self.socket.recv(65536)
        except ConnectionError as error:
            raise Lost(str(error)) from None
        if data:
            self.protocol.receive_data(data)
        else:
            self.protocol.receive_eof()
        for event in self.protocol.events_received():
            self._take(event)
        if self.protocol.handshake_exc is not None and self.answer is None:
            self._refused(self.protocol.handshake_exc)
        self._write()
        if not data and not self.messages:
            raise self._end()

    def _end(self) -> Lost:
        close = self.protocol.close_rcvd
        if close is None:
            return Lost("closed by the server")
        return Lost("closed by the server", close.code, close.reason)

    def _refused(self, error: Exception) -> None:
        if isinstance(error.__cause__, EOFError):
            raise Lost("closed by the server within the handshake")
        if not isinstance(error, InvalidStatus):
            raise error
        answer = error.response
        headers = list(answer.headers.raw_items())
        raise HandshakeFailed(answer.status_code, headers, bytes(answer.body))

    def _take(self, event: Any) -> None:
        if isinstance(event, Response):
            if self.protocol.handshake_exc is None:
                self.answer = event
        elif event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments.append(event)
            if event.fin:
                data = b"".join(bytes(frame.data) for frame in self._fragments)
                text = self._fragments[0].opcode is Opcode.TEXT
                self._fragments = []
                self.messages.append(data.decode() if text else data)


class Polling:
    """The polling transport. Its GET that finds nothing waits until it is told something."""

    name = "polling"

    def __init__(
        self,
        address: str,
        *,
        headers: Headers | None = None,
        query: Mapping[str, str] | None = None,
        path: str = PATH,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._address, self._tls, self._path = address, tls, path
        self._query = {"EIO": "4", "transport": "polling", **(query or {})}
        self._headers = dict(headers or {})
        self.messages: deque[str | bytes] = deque()
        self._posting = Lock()
        self._polls = self._connect()
        self._posts = self._connect()
        try:
            self.poll(time.monotonic() + TIMEOUT)
            opened = self.messages[0]
            assert isinstance(opened, str)
            self._query["sid"] = json.loads(opened[1:])["sid"]
        except BaseException:
            self.drop()
            raise

    def headers(self, name: str) -> list[str]:
        return [value for key, value in self.answer if key.lower() == name.lower()]

    def send(self, *messages: str | bytes) -> None:
        packets = (
            item.encode() if isinstance(item, str) else b"b" + b64encode(item) for item in messages
        )
        with self._posting:
            status, _, body = self._request(self._posts, "POST", b"\x1e".join(packets))
        if status != 200:
            raise Lost(f"{status} {body!r}")

    def receive(self, deadline: float) -> str | bytes:
        while not self.messages:
            self.poll(deadline)
        return self.messages.popleft()

    def close(self) -> None:
        """Close as the official client does, with the packet that says so."""
        with suppress(Lost, OSError, http.client.HTTPException):
            self.send("1")
        self.drop()

    def drop(self) -> None:
        self._polls.close()
        self._posts.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls:
            return http.client.HTTPSConnection(self._address, timeout=TIMEOUT, context=self._tls)
        return http.client.HTTPConnection(self._address, timeout=TIMEOUT)

    def poll(self, deadline: float) -> None:
        """Send one GET, and add what it brings to `messages`."""
        if self._polls.sock is not None:
            self._polls.sock.settimeout(max(deadline - time.monotonic(), 0.001))
        status, headers, body = self._request(self._polls, "GET")
        if status != 200 and "sid" not in self._query:
            raise HandshakeFailed(status, headers, body)
        if status != 200:
            raise Lost(f"{status} {body!r}")
        self.answer = headers
        for packet in body.split(b"\x1e"):
            binary = packet[:1] == b"b"
            self.messages.append(b64decode(packet[1:]) if binary else packet.decode())

    @property
    def sid(self) -> str:
        return self._query["sid"]

    @property
    def sockets(self) -> list[socket.socket | None]:
        """Those of GET and POST, which the server may have closed."""
        return [self._polls.sock, self._posts.sock]

    def _request(
        self, connection: http.client.HTTPConnection, method: str, body: bytes | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        target = f"{self._path}?{urlencode(self._query)}"
        connection.request(method, target, body, self._headers)
        with connection.getresponse() as answer:
            return answer.status, answer.getheaders(), answer.read()


TRANSPORTS = {"websocket": WebSocket, "polling": Polling}


# Socket.IO


class Connection:
    """An Engine.IO session, and the namespaces on it. Pings are answered while it reads."""

    def __init__(self, transport: WebSocket | Polling) -> None:
        self.transport = transport
        self.answers_pings = True
        self.clients: dict[str, Client] = {}
        opened = transport.receive(time.monotonic() + TIMEOUT)
        assert isinstance(opened, str) and opened[0] == "0", opened
        self.opened: dict[str, Any] = json.loads(opened[1:])

    @property
    def sid(self) -> str:
        return str(self.opened["sid"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def connect(self, namespace: str = "/", auth: Any = None) -> "Client":
        """Connect to a namespace; raise `Refused` if it does not let the client in."""
        client = self.request(namespace, auth)
        client.accepted()
        return client

    def request(self, namespace: str = "/", auth: Any = None) -> "Client":
        """Ask to connect to a namespace, and do not wait for the answer."""
        client = self.clients[namespace] = Client(self, namespace)
        self.write(CONNECT, namespace, None, auth)
        return client

    def upgrade(self, transport: WebSocket) -> None:
        """Move from polling to a WebSocket that was opened with this session's id."""
        try:
            transport.send("2probe")
            assert transport.receive(time.monotonic() + TIMEOUT) == "3probe"
        except BaseException:
            transport.drop()
            raise
        polling, self.transport = self.transport, transport
        try:
            transport.send("5")
        finally:
            polling.drop()

    def write(self, type: int, namespace: str, id: int | None = None, data: Any = None) -> None:
        """Send a packet; what is bytes in `data` goes as an attachment."""
        self.transport.send(*encode(type, namespace, id, data))

    def read(self, deadline: float) -> Packet:
        """Return the next packet of any namespace, in the order in which they came."""
        text = self._message(deadline)
        assert isinstance(text, str), text
        match = _PACKET.match(text)
        assert match is not None, text
        type_, count, namespace, id_, body = match.groups()
        attachments = [self._attachment(deadline) for _ in range(int(count or 0))]
        data = _fill_in(json.loads(body), attachments) if body else None
        plain = {BINARY_EVENT: EVENT, BINARY_ACK: ACK}.get(int(type_), int(type_))
        return Packet(plain, namespace or "/", int(id_) if id_ else None, data)

    def _message(self, deadline: float) -> str | bytes:
        """Return the next message of the session; raise `Lost` at its end."""
        while True:
            packet = self._receive(deadline)
            if isinstance(packet, bytes):
                return packet
            match packet[0]:
                case "4":
                    return packet[1:]
                case "1":
                    raise Lost("closed by a packet")
                case "2" if self.answers_pings:
                    self.transport.send("3")

    def _receive(self, deadline: float) -> str | bytes:
        return self.transport.receive(deadline)

    def _attachment(self, deadline: float) -> bytes:
        data = self._message(deadline)
        assert isinstance(data, bytes), data
        return data

    def wait_for_end(self, timeout: float = TIMEOUT) -> Lost:
        """Read until the server ends the connection, and return how."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.read(deadline)
        except Lost as lost:
            return lost

    def close(self) -> None:
        self.transport.close()

    def drop(self) -> None:
        self.transport.drop()


class Client:
    """One namespace of a connection: what JavaScript calls a socket."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self.connection = connection
        self.namespace = namespace
        self.sid = ""
        self._packets: deque[Packet] = deque()
        self._next_id = 0

    def accepted(self) -> None:
        """Wait for the answer to the request to connect; raise `Refused` if that is a no."""
        packet = self.packet()
        if packet.type == CONNECT_ERROR:
            raise Refused(packet.data)
        assert packet.type == CONNECT, packet
        self.sid = packet.data["sid"]

    def emit(self, event: str, *args: Any) -> None:
        self.connection.write(EVENT, self.namespace, None, [event, *args])

    def send(self, *args: Any) -> None:
        self.emit("message", *args)

    def request(self, event: str, *args: Any) -> int:
        """Emit an event that wants an ack; return its id, for `acked()`."""
        id_, self._next_id = self._next_id, self._next_id + 1
        self.connection.write(EVENT, self.namespace, id_, [event, *args])
        return id_

    def acked(self, id: int, timeout: float = TIMEOUT) -> list[Any]:
        """Return the arguments of an ack; the events that come before it stay."""
        return self._find(lambda packet: packet.type == ACK and packet.id == id, timeout).data

    def call(self, event: str, *args: Any) -> list[Any]:
        """Emit an event and return the arguments of its ack."""
        return self.acked(self.request(event, *args))

    def subscribe(self, channel: Any) -> Any:
        (answer,) = self.call("__subscribe__", channel)
        return answer

    def unsubscribe(self, channel: Any) -> Any:
        (answer,) = self.call("__unsubscribe__", channel)
        return answer

    def event(self, timeout: float = TIMEOUT) -> list[Any]:
        """Return the next event: its name and arguments."""
        return self._find(lambda packet: packet.type == EVENT, timeout).data

    def asked(self, timeout: float = TIMEOUT) -> Packet:
        """Return the next event that wants an ack, for `ack()`."""
        return self._find(lambda packet: packet.type == EVENT and packet.id is not None, timeout)

    def ack(self, packet: Packet, *args: Any) -> None:
        self.connection.write(ACK, self.namespace, packet.id, list(args))

    def fence(self) -> list[list[Any]]:
        """
        Return the events that came and were not asked for yet, all of them: when this returns, the
        server has handled what this client sent before, and this client has what was sent to it.
        """
        assert self.call("fence") == []
        events = [packet.data for packet in self._packets if packet.type == EVENT]
        self._packets = deque(packet for packet in self._packets if packet.type != EVENT)
        return events

    def disconnect(self) -> None:
        """Leave this namespace."""
        self.connection.write(DISCONNECT, self.namespace)

    def disconnected(self, timeout: float = TIMEOUT) -> None:
        """Wait until the server disconnects this client from this namespace."""
        self._find(lambda packet: packet.type == DISCONNECT, timeout)

    def packet(self, timeout: float = TIMEOUT) -> Packet:
        """Return the next packet of whatever type."""
        return self._find(lambda packet: True, timeout)

    def close(self) -> None:
        self.connection.close()

    def _find(self, wanted: Any, timeout: float) -> Packet:
        """Take the first packet that is wanted; those before it stay in their order."""
        deadline = time.monotonic() + timeout
        for packet in self._packets:
            if wanted(packet):
                self._packets.remove(packet)
                return packet
        while True:
            packet = self.connection.read(deadline)
            client = self.connection.clients[packet.namespace]
            if client is self and wanted(packet):
                return packet
            client._packets.append(packet)


def connect(
    address: str,
    namespace: str | None = "/",
    auth: Any = None,
    *,
    transport: str = "websocket",
    **options: Any,
) -> Client:
    """Connect to a namespace over a transport of its own; `options` are the transport's."""
    connection = open_connection(address, transport=transport, **options)
    try:
        return connection.connect(namespace or "/", auth)
    except BaseException:
        connection.close()
        raise


def open_connection(address: str, *, transport: str = "websocket", **options: Any) -> Connection:
    """Open a session, and connect to no namespace."""
    carrier = TRANSPORTS[transport](address, **options)
    try:
        return Connection(carrier)
    except BaseException:
        carrier.drop()
        raise


def encode(
    type: int, namespace: str = "/", id: int | None = None, data: Any = None
) -> list[str | bytes]:
    """Return the Engine.IO packets of a Socket.IO packet."""
    attachments: list[bytes] = []
    body = "" if data is None else json.dumps(_take_out(data, attachments))
    head = str(type)
    if attachments:
        head = f"{BINARY_EVENT if type == EVENT else BINARY_ACK}{len(attachments)}-"
    space = "" if namespace == "/" else f"{namespace},"
    return [f"4{head}{space}{'' if id is None else id}{body}", *attachments]


def _take_out(value: Any, attachments: list[bytes]) -> Any:
    if isinstance(value, bytes):
        attachments.append(value)
        return {"_placeholder": True, "num": len(attachments) - 1}
    if isinstance(value, dict):
        return {key: _take_out(item, attachments) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(item, attachments) for item in value]
    return value


def _fill_in(value: Any, attachments: list[bytes]) -> Any:
    if isinstance(value, dict):
        if value.get("_placeholder"):
            return attachments[value["num"]]
        return {key: _fill_in(item, attachments) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item, attachments) for item in value]
    return value


# Plain HTTP, where the answer itself is the point


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) < 2, values
        return values[0] if values else None


def request(
    address: str,
    method: str = "GET",
    target: str = "/",
    headers: Iterable[tuple[str, str]] | Headers = (),
    body: bytes = b"",
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Send one request with exactly these headers (and a Host, if they have none)."""
    items = list(headers.items() if isinstance(headers, Mapping) else headers)
    if not any(name.lower() == "host" for name, _ in items):
        items.insert(0, ("Host", address))
    if body:
        items.append(("Content-Length", str(len(body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in items)
    with open_socket(address, tls) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
        answer = http.client.HTTPResponse(sock, method=method)
        try:
            answer.begin()
            content = b"" if answer.status == 101 else answer.read()
            return Answer(answer.status, answer.getheaders(), content)
        finally:
            answer.close()


UPGRADE = (
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
)
"""The headers of a WebSocket's handshake (RFC 6455, 1.3)."""
