"""The proxy does to connections what it says."""

import socket
from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.server import StreamServer

from tests.faults.proxy import Proxy
from tests.support import UNIT, wait_until


@pytest.fixture
def echo() -> Iterator[StreamServer]:
    def serve(sock: Any, address: Any) -> None:
        try:
            while data := sock.recv(65536):
                sock.sendall(data)
        except OSError:
            pass

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    yield server
    server.stop(timeout=0)


@pytest.fixture
def proxy(echo: StreamServer) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", echo.server_port)) as proxy:
        yield proxy


@pytest.fixture
def line(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=100 * UNIT) as line:
        yield line


def answer(line: socket.socket, question: bytes = b"hello") -> bytes:
    line.sendall(question)
    return line.recv(65536)


def is_silent(line: socket.socket) -> bool:
    line.settimeout(2 * UNIT)
    try:
        return not line.recv(1)
    except TimeoutError:
        return True
    finally:
        line.settimeout(100 * UNIT)


def test_it_passes_both_ways_and_ends_with_either(proxy: Proxy, line: socket.socket) -> None:
    assert answer(line) == b"hello"
    assert (proxy.connections, proxy.up.passed, proxy.down.passed) == (1, 5, 5)
    line.shutdown(socket.SHUT_WR)
    assert line.recv(1) == b""
    wait_until(lambda: not proxy.connections)


def test_a_delay(proxy: Proxy, line: socket.socket) -> None:
    proxy.up.delay = 4 * UNIT
    began = monotonic()
    assert answer(line) == b"hello"
    assert monotonic() - began >= 4 * UNIT


def test_a_rate(proxy: Proxy, line: socket.socket) -> None:
    assert answer(line) == b"hello"
    proxy.down.rate = 100 / UNIT
    line.sendall(bytes(400))
    began = monotonic()
    got = b""
    while len(got) < 400:
        got += line.recv(400)
    assert monotonic() - began > UNIT


def test_what_it_swallows_never_comes(proxy: Proxy, line: socket.socket) -> None:
    proxy.down.swallow()
    line.sendall(b"hello")
    wait_until(lambda: proxy.down.swallowed == 5)
    proxy.heal()
    assert answer(line, b"again") == b"again"


def test_what_it_stops_comes_later(proxy: Proxy, line: socket.socket) -> None:
    proxy.down.stop()
    line.sendall(b"hello")
    assert is_silent(line)
    proxy.heal()
    assert line.recv(5) == b"hello"


def test_a_line_that_is_stopped_fills(proxy: Proxy, line: socket.socket) -> None:
    proxy.up.stop()
    line.settimeout(4 * UNIT)
    with pytest.raises(TimeoutError):
        line.sendall(bytes(50_000_000))


def test_a_cut_is_a_reset(proxy: Proxy, line: socket.socket) -> None:
    assert answer(line) == b"hello"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        line.recv(1)
    wait_until(lambda: not proxy.connections)


def test_half_of_a_cut(proxy: Proxy, line: socket.socket) -> None:
    assert answer(line) == b"hello"
    proxy.down.swallow()
    proxy.cut(client=False)
    assert is_silent(line)


def test_it_refuses(proxy: Proxy, line: socket.socket) -> None:
    assert answer(line) == b"hello"
    proxy.refuses = True
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=100 * UNIT) as other:
        assert other.recv(1) == b""
    assert answer(line) == b"hello"


def test_it_corrupts_a_bit(proxy: Proxy, line: socket.socket) -> None:
    proxy.down.corrupt = 1.0
    changed = answer(line, bytes(100))
    assert len(changed) == 100
    assert sum(byte.bit_count() for byte in changed) == 1
    gevent.sleep(0)
