"""Measure what compression gains and costs: bytes on the wire, a process's time, and its memory.

python benchmarks/compression.py

Server and clients share one thread, whose time is taken while the server works: what the kernel
does for a send is in it, what the clients do is not. Plain and compressed take turns.
"""

import argparse
import json
import random
import statistics
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import thread_time
from typing import Any

import gevent
from gevent import socket

from django_socketio.engine import Compression, Config, Engine, Frame, Session, send_response
from django_socketio.engine.pywsgi import SocketIOServer

SIZES = (200, 1_000, 4_000, 16_000)
RECIPIENTS = (1, 10, 100, 500)
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
HANDSHAKE = (
    "GET /?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}\r\n"
)
WORDS = (
    "the quick brown fox jumps over a lazy dog while messages arrive in many channels and"
    " everybody reads them at once, or a little later, wherever they are"
).split()


def typical(size: int) -> bytes:
    """Return an event of about so many bytes: a list of things as an API has them."""
    dice, items = random.Random(size), []
    while len(text := json.dumps(["message", items], separators=(",", ":"))) < size:
        items.append(
            {
                "id": dice.randrange(10**7),
                "user": {"id": dice.randrange(10**5), "name": dice.choice(WORDS).title()},
                "text": " ".join(dice.choices(WORDS, k=8)),
                "created": f"2026-{dice.randrange(1, 13):02}-{dice.randrange(1, 29):02}T12:30:45Z",
                "likes": dice.randrange(100),
            }
        )
    return b"2" + text[:size].encode()


@contextmanager
def serving(compression: Compression | None) -> Iterator[tuple[Engine, tuple[str, int]]]:
    engine = Engine(
        Config(ping_interval=3600, compression=compression),
        on_open=lambda session, payload: None,
        on_message=lambda session, data: None,
        on_close=lambda session, reason: None,
    )
    server = SocketIOServer(
        ("127.0.0.1", 0), lambda *args: send_response(engine.handle(args[0]), args[1])
    )
    server.start()
    try:
        yield engine, server.address
    finally:
        engine.stop()
        server.stop()


def connect(address: tuple[str, int], number: int, lines: str = OFFER) -> list[Any]:
    return [connected(address, lines) for _ in range(number)]


def connected(address: tuple[str, int], lines: str) -> Any:
    sock = socket.create_connection(address)
    sock.sendall(HANDSHAKE.format(lines).encode())
    answer = b""
    while b'"maxPayload"' not in answer:
        answer += sock.recv(4096)
    return sock


def broadcast(sessions: Iterable[Session], clients: Iterable[Any], packet: bytes) -> float:
    """Send to all; return the seconds that it took."""
    began = thread_time()
    frame = Frame.message(packet)
    for session in sessions:
        session.transport.send(frame)
    gevent.sleep(0)  # the end of the turn, at which all is flushed
    took = thread_time() - began
    for client in clients:
        while len(client.recv(262_144)) == 262_144:
            pass
    return took


def costs(rounds: int) -> Iterator[tuple[int, int, float, float]]:
    """Yield size, recipients, and the microseconds of a broadcast plain and compressed."""
    with serving(None) as (plain, there), serving(Compression(threshold=200)) as (on, here):
        clients = {plain: connect(there, RECIPIENTS[-1]), on: connect(here, RECIPIENTS[-1])}
        sessions = {engine: list(engine.sessions.values()) for engine in clients}
        for size in SIZES:
            packet = typical(size)
            for number in RECIPIENTS:
                times: dict[Engine, list[float]] = {plain: [], on: []}
                for _ in range(rounds * 500 // (number + 100)):
                    for engine, taken in times.items():
                        some = clients[engine][:number]
                        taken.append(broadcast(sessions[engine][:number], some, packet))
                yield size, number, *(statistics.median(taken) * 1e6 for taken in times.values())


def memory(compression: Compression | None, number: int, hello: bytes = b"") -> float:
    """Return the bytes of a connection that waits, once it has sent `hello`."""
    with serving(compression) as (engine, address):
        connect(address, 20)
        gevent.sleep(0.1)
        tracemalloc.start()
        clients = connect(address, number)
        for client in clients:
            client.sendall(hello)
        gevent.sleep(0.5)
        of_clients = sum(stat.size for stat in of_this_file(tracemalloc.take_snapshot()))
        total = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return (total - of_clients) / number


def of_this_file(snapshot: tracemalloc.Snapshot) -> Iterable[tracemalloc.Statistic]:
    own = (tracemalloc.Filter(True, __file__), tracemalloc.Filter(True, "*/gevent/_socket*"))
    return snapshot.filter_traces(own).statistics("filename")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    print("bytes of a message, plain and compressed")
    for size in SIZES:
        frame = Frame.message(typical(size))
        deflated = len(frame.deflated(Compression(threshold=0)))
        print(f"  {len(frame.websocket):>6} {deflated:>6} {deflated / len(frame.websocket):>6.0%}")
    print("microseconds of a broadcast: bytes, recipients, plain, compressed")
    for size, number, plain, compressed in costs(rounds):
        print(
            f"  {size:>6} {number:>4} {plain:>8.0f} {compressed:>8.0f} {compressed / plain:>6.2f}"
        )
    print("bytes of an idle connection")
    print(f"  off                                  {memory(None, 1000):>6.0f}")
    print(f"  on                                   {memory(Compression(), 1000):>6.0f}")
    print(f"  on, once it has sent what it had to  {memory(Compression(), 1000, hello()):>6.0f}")


def hello() -> bytes:
    """Return what a browser sends first, "40", compressed and masked with zeros."""
    encoder = zlib.compressobj(wbits=-15)
    data = (encoder.compress(b"40") + encoder.flush(zlib.Z_SYNC_FLUSH))[:-4]
    return bytes((0xC1, 0x80 | len(data), 0, 0, 0, 0)) + data


if __name__ == "__main__":
    main()
