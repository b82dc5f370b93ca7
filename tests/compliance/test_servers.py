"""The servers that the public protocol test suites are pointed at start, and speak."""

import json
from collections.abc import Iterator

import pytest
from websockets.frames import Opcode

from tests.engine.clients import Poller, WebSocket
from tests.support import Server


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[str, int]]:
    with Server.script("tests/compliance/engine_server.py") as server:
        yield "127.0.0.1", server.port


@pytest.fixture(scope="module")
def project() -> Iterator[tuple[str, int]]:
    with Server.script("tests/compliance/socketio_server.py") as server:
        yield "127.0.0.1", server.port


def test_the_engine_alone(engine: tuple[str, int]) -> None:
    poller = Poller(engine)
    poller.handshake.pop("sid")
    assert poller.handshake == {
        "upgrades": ["websocket"],
        "pingInterval": 300,
        "pingTimeout": 200,
        "maxPayload": 1_000_000,
    }
    assert poller.post("4hello", b"\x01").body == b"ok"
    assert poller.get() == ["4hello", b"\x01"]
    poller.close()


def test_the_engine_alone_over_websocket(engine: tuple[str, int]) -> None:
    client = WebSocket(engine)
    client.send("4hello", b"\x01")
    assert [client.receive(), client.receive()] == ["4hello", b"\x01"]
    client.close()


def packet(client: WebSocket) -> tuple[str, object]:
    """Return the head and the JSON of the next Socket.IO packet."""
    while (received := client.receive()) == "2":
        client.send("3")
    assert isinstance(received, str)
    start = min(position for mark in "{[" if (position := received.find(mark)) >= 0)
    return received[:start], json.loads(received[start:])


@pytest.mark.parametrize("namespace", ["", "/custom,"])
def test_the_project(project: tuple[str, int], namespace: str) -> None:
    client = WebSocket(project, path="/socket.io/")
    client.send(f'40{namespace}{{"token":"123"}}')
    head, body = packet(client)
    assert head == f"40{namespace}" and isinstance(body, dict) and body["sid"]
    assert packet(client) == (f"42{namespace}", ["auth", {"token": "123"}])
    if not namespace:
        client.send('42["message",1,"2",{"3":[true]}]', '421["message-with-ack",1,"2",{"3":null}]')
        assert packet(client) == ("42", ["message-back", 1, "2", {"3": [True]}])
        assert packet(client) == ("431", [1, "2", {"3": None}])
    client.close()


def test_the_project_ends_those_who_connect_to_no_namespace(project: tuple[str, int]) -> None:
    client = WebSocket(project, path="/socket.io/")
    while (item := client.receive_frame()).opcode is not Opcode.CLOSE:
        assert item.data == b"2"
        client.send("3")
    client.close()
