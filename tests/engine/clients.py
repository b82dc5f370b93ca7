"""
Clients that show every byte: HTTP, long-polling and WebSocket.

Whatever they wait for has a deadline. What they parse, they parse with code that is not the
package's.
"""

import base64
import json
import socket
import ssl
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import gevent
from websockets.client import ClientProtocol
from websockets.extensions import ClientExtensionFactory
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import CONNECTING
from websockets.uri import parse_uri

from tests.support import UNIT

DEADLINE = 100 * UNIT
PATH = "/engine.io/?EIO=4&transport="

Headers = Mapping[str, str]
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def opened(self) -> Any:
        """What the answer to a handshake says."""
        assert self.body[:1] == b"0", self
        return json.loads(self.body[1:])

    @property
    def error(self) -> tuple[int, int, str]:
        """The status, code and message of one of Engine.IO's refusals."""
        assert self.headers["content-type"] == "application/json"
        return self.status, self.json["code"], self.json["message"]

    @property
    def packets(self) -> list[str | bytes]:
        """The packets of a payload, binary ones as bytes."""
        assert self.status == 200, self
        return [
            base64.b64decode(part[1:], validate=True) if part.startswith("b") else part
            for part in self.body.decode().split("\x1e")
        ]


class Http:
    """One connection, on which anything may be sent."""

    def __init__(
        self,
        address: Address,
        *,
        context: ssl.SSLContext | None = None,
        receive_buffer: int | None = None,
    ) -> None:
        sock = socket.socket()
        sock.settimeout(DEADLINE)
        if receive_buffer is not None:  # has a say in the window only before the connection
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        try:
            self.sock = sock if context is None else context.wrap_socket(sock)
        except BaseException:
            sock.close()
            raise

    def send(self, data: bytes) -> Self:
        self.sock.sendall(data)
        return self

    def send_in_pieces(self, data: bytes, size: int = 1) -> Self:
        """Send each piece when the loop has read the one before."""
        for start in range(0, len(data), size):
            self.sock.sendall(data[start : start + size])
            gevent.idle()
        return self

    def request(
        self, method: str, target: str, body: bytes | None = None, headers: Headers | None = None
    ) -> Self:
        return self.send(request(method, target, body, headers))

    def get(self, target: str, headers: Headers | None = None) -> Answer:
        return self.request("GET", target, headers=headers).answer()

    def post(self, target: str, body: bytes, headers: Headers | None = None) -> Answer:
        return self.request("POST", target, body, headers).answer()

    def answer(self) -> Answer:
        """Read the next response, interim ones included."""
        head, _, self._unread = self._read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a header stands twice: {pairs}"
        return Answer(int(status), headers, self._body(int(status), headers))

    def _body(self, status: int, headers: dict[str, str]) -> bytes:
        if status < 200 or status in (204, 304):
            assert not {"content-length", "transfer-encoding"} & headers.keys() or status > 200
            return b""
        assert "transfer-encoding" not in headers
        size = int(headers["content-length"])
        while len(self._unread) < size:
            self._unread += self._receive()
        body, self._unread = self._unread[:size], self._unread[size:]
        return body

    def _read_until(self, end: bytes) -> bytes:
        while end not in self._unread:
            self._unread += self._receive()
        return self._unread

    def _receive(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(f"the server hung up behind {self._unread!r}")
        return data

    def receive(self) -> bytes:
        """Return some bytes, or none at the end of the stream."""
        data, self._unread = self._unread, b""
        return data or self.sock.recv(65536)

    def rest(self) -> bytes:
        """Return what comes until the server closes. A reset is an error."""
        parts = []
        while part := self.receive():
            parts.append(part)
        return b"".join(parts)

    def gone(self) -> bool:
        """Wait until the server has closed, one way or the other; tell if it sent nothing more."""
        try:
            return not self.rest()
        except (ConnectionError, ssl.SSLError):
            return True

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with an RST, as a crash does."""
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def request(
    method: str, target: str, body: bytes | None = None, headers: Headers | None = None
) -> bytes:
    """Return a request as it is sent; `headers` adds to the usual ones, or replaces them."""
    lines = {"Host": "localhost"}
    if body is not None:
        lines |= {"Content-Type": "text/plain;charset=UTF-8", "Content-Length": str(len(body))}
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b"")


def chunked(*chunks: bytes) -> bytes:
    """Return a chunked body, whole."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


class Poller:
    """A session over long-polling. GETs and POSTs have a connection each, as in a browser."""

    def __init__(
        self,
        address: Address,
        *,
        context: ssl.SSLContext | None = None,
        headers: Headers | None = None,
    ) -> None:
        self.address, self.context = address, context
        self.getting = Http(address, context=context)
        self.posting = Http(address, context=context)
        answer = self.getting.get(PATH + "polling", headers)
        assert answer.body[:1] == b"0", answer
        self.handshake = json.loads(answer.body[1:])
        self.sid: str = self.handshake["sid"]
        self.target = f"{PATH}polling&sid={self.sid}"

    def start_get(self) -> None:
        """Send a GET; `end_get()` reads its answer."""
        self.getting.request("GET", self.target)

    def end_get(self) -> list[str | bytes]:
        return self.getting.answer().packets

    def get(self) -> list[str | bytes]:
        self.start_get()
        return self.end_get()

    def post(self, *packets: str | bytes) -> Answer:
        return self.posting.post(self.target, payload(*packets))

    def upgrade(self, **options: Any) -> "WebSocket":
        """Return the WebSocket that may take this session over."""
        return WebSocket(self.address, context=self.context, sid=self.sid, **options)

    def close(self) -> None:
        self.getting.close()
        self.posting.close()

    def reset(self) -> None:
        self.getting.reset()
        self.posting.reset()


def payload(*packets: str | bytes) -> bytes:
    """Return packets as the body of a POST."""
    return b"\x1e".join(
        packet.encode() if isinstance(packet, str) else b"b" + base64.b64encode(packet)
        for packet in packets
    )


MASK = bytes.fromhex("37fa213d")  # that of RFC 6455's examples (5.7)


def frame(
    opcode: int, data: str | bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True
) -> bytes:
    """Return a frame, right or wrong; `rsv` is the three reserved bits (RFC 6455, 5.2)."""
    data = data.encode() if isinstance(data, str) else data
    head, masked, size = fin << 7 | rsv << 4 | opcode, mask << 7, len(data)
    if size < 126:
        start = struct.pack("!BB", head, masked | size)
    elif size < 65536:
        start = struct.pack("!BBH", head, masked | 126, size)
    else:
        start = struct.pack("!BBQ", head, masked | 127, size)
    return start + MASK + masked_with(MASK, data) if mask else start + data


def masked_with(mask: bytes, data: bytes) -> bytes:
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(key) ^ int.from_bytes(data)).to_bytes(len(data))


def text(data: str | bytes, *, fin: bool = True, rsv: int = 0, mask: bool = True) -> bytes:
    return frame(Opcode.TEXT, data, fin=fin, rsv=rsv, mask=mask)


class WebSocket:
    """
    A WebSocket that checks every frame of the server with `websockets`' client.

    `behind` is sent in the same segment as the request. Pings and the server's close frame are
    answered when they are read, unless `answers` is false. `offers` are the extensions that it
    offers, and uses as far as they are agreed on.
    """

    def __init__(
        self,
        address: Address,
        *,
        path: str = "/engine.io/",
        sid: str | None = None,
        behind: bytes = b"",
        answers: bool = True,
        headers: Headers | None = None,
        offers: Sequence[ClientExtensionFactory] = (),
        **options: Any,
    ) -> None:
        self.http = Http(address, **options)
        self.answers = answers
        self._events: list[Frame] = []
        query = "EIO=4&transport=websocket" + (f"&sid={sid}" if sid else "")
        uri = parse_uri(f"ws://{address[0]}:{address[1]}{path}?{query}")
        self._protocol = ClientProtocol(uri, extensions=list(offers), max_size=None)
        opening = self._protocol.connect()
        for name, value in (headers or {}).items():
            opening.headers[name] = value
        self._protocol.send_request(opening)
        self.http.send(b"".join(self._protocol.data_to_send()) + behind)
        while self._protocol.state is CONNECTING:
            self._feed()
            if self._protocol.handshake_exc is not None:
                self.close()
                raise self._protocol.handshake_exc
        del self._events[0]  # the response
        if sid is None:
            opened = self.receive()
            assert isinstance(opened, str) and opened[0] == "0", opened
            self.handshake = json.loads(opened[1:])
            self.sid: str = self.handshake["sid"]

    def send(self, *messages: str | bytes) -> None:
        """Send messages, all in one segment."""
        kinds = {str: Opcode.TEXT, bytes: Opcode.BINARY}
        self.http.send(b"".join(frame(kinds[type(item)], item) for item in messages))

    def send_raw(self, *parts: bytes) -> None:
        self.http.send(b"".join(parts))

    def receive(self) -> str | bytes:
        """Return the next message."""
        while True:
            received = self.receive_frame()
            assert received.opcode is not Opcode.CLOSE, Close.parse(received.data)
            if received.opcode in (Opcode.TEXT, Opcode.BINARY):
                assert received.fin  # this server has no need of fragments
                data = bytes(received.data)
                return data.decode() if received.opcode is Opcode.TEXT else data

    def receive_frame(self) -> Frame:
        """Return the next frame of any kind."""
        while not self._events:
            self._feed()
        return self._events.pop(0)

    def closed(self) -> int | None:
        """Wait until the server has closed, and return its code; None if it just went away."""
        closes = [item.data for item in self.rest() if item.opcode is Opcode.CLOSE]
        return Close.parse(closes[0]).code if closes else None

    def rest(self) -> list[Frame]:
        """Return the frames that come until the server closes."""
        with suppress(EOFError):
            while True:
                self._feed()
        return self._events

    def _feed(self) -> None:
        data = self.http.receive()
        if not data:
            raise EOFError("the server hung up")
        self._protocol.receive_data(data)
        self._events += self._protocol.events_received()
        if self._protocol.parser_exc is not None:
            raise self._protocol.parser_exc
        answer = b"".join(self._protocol.data_to_send())
        if self.answers and answer:
            with suppress(ConnectionError):
                self.http.send(answer)

    def close(self) -> None:
        self.http.close()

    def reset(self) -> None:
        self.http.reset()


Client = Http | Poller | WebSocket


def close_all(clients: Iterable[Client]) -> None:
    for client in clients:
        client.close()
