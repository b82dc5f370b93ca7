"""Measure what clients that read nothing, or hardly send anything, cost the others and the server.

python benchmarks/slow.py --clients 1000 --stalled 100 --seconds 3 --rounds 5
"""

import argparse
import base64
import itertools
import json
import os
import resource
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial

from cores import LOAD_CORE, cpu_seconds, memory, pinned
from peers import BUILD, PEERS, Failed, Server, compile_c, serving

SLOWLORIS = "slowloris"
POLICIES = {
    "disconnect": "broadcast",
    "volatile": "volatile",
    "coalesce": "coalesce",
    SLOWLORIS: "broadcast",
}
"""The events of the benchmark's server, by what becomes of those who are slow."""
MAX_BUFFER = 65_536  # so that a client which is to be disconnected is so while we look
KERNEL = 8_000_000  # bytes, of which a kernel keeps the first for a client that does not read


def main() -> None:
    options = read_options()
    compile_c("load")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    os.sched_setaffinity(0, {LOAD_CORE})
    (ours,) = (peer for peer in PEERS if peer.name == "ours")
    for kind in options.kinds:
        event = POLICIES[kind]
        with serving(ours, environment={"MAX_BUFFER": str(MAX_BUFFER)}) as server:
            measure_load(server, event, options)  # what is allocated once
            if kind == SLOWLORIS:
                slow = partial(dawdling, server, options.dawdling)
            else:
                slow = partial(stalled, server, options.stalled)
            rounds = [measure_round(server, event, options, slow) for _ in range(options.rounds)]
        report(kind, rounds)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure clients that read nothing.")
    parser.add_argument("--clients", type=int, default=1000, help="that read")
    parser.add_argument("--stalled", type=int, default=100, help="that do not")
    parser.add_argument("--dawdling", type=int, default=1000, help="that send a byte a second")
    parser.add_argument("--seconds", type=float, default=3, help="measured each time")
    parser.add_argument("--kinds", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--rounds", type=int, default=5, help="without and with; medians count")
    return parser.parse_args()


def measure_round(
    server: Server,
    event: str,
    options: argparse.Namespace,
    slow: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    without = measure_load(server, event, options)
    with slow():
        behind = measure_load(server, event, options)
    again = measure_load(server, event, options)  # so that a trend of the machine cancels out
    names = ("p50", "p99", "rate", "cpu", "memory")
    plain = {name: (without[name] + again[name]) / 2 for name in names}
    return {
        **{name: plain[name] for name in names},
        **{f"{name}, stalled": behind[name] for name in names},
        **{f"{name}, ratio": behind[name] / plain[name] for name in names},
    }


def measure_load(server: Server, event: str, options: argparse.Namespace) -> dict[str, float]:
    """
    Return the figures of the load generator, the most memory that the server had, and its processor
    time in microseconds for each message that was measured.
    """
    load = [BUILD / "load", "fanout", "--inflight", "1", "--event", event]
    load += [f"--clients={options.clients}", f"--seconds={options.seconds}", "--warmup=1"]
    pid = server.processes[0].pid
    most, done, before = 0, threading.Event(), cpu_seconds(pid)

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, memory(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        finished = subprocess.run(
            [*map(str, load), f"--port={server.ports[0]}"],
            capture_output=True,
            text=True,
            timeout=600,
            preexec_fn=pinned(LOAD_CORE),
        )
    finally:
        done.set()
        watcher.join()
    if finished.returncode:
        raise Failed(finished.stderr.strip())
    figures = json.loads(finished.stdout)
    cpu = (cpu_seconds(pid) - before) / (figures["rate"] * options.seconds)
    return {**figures, "memory": most, "cpu": cpu * 1e6}


@contextmanager
def stalled(server: Server, number: int) -> Iterator[None]:
    """Have clients connected for which something waits in the server, and which read nothing."""
    clients = [connect(server.ports[0]) for _ in range(number)]
    wait_until_idle(server.processes[0].pid)  # then all are behind
    try:
        yield
    finally:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


@contextmanager
def dawdling(server: Server, number: int) -> Iterator[None]:
    """Have connections on which a head comes byte by byte, until the server gives them up."""
    socks = [socket.create_connection(("127.0.0.1", server.ports[0])) for _ in range(number)]
    done = threading.Event()

    def dawdle() -> None:
        for byte in itertools.chain(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", itertools.repeat(120)
        ):
            for sock in socks:
                with suppress(OSError):
                    sock.send(bytes([byte]))
            if done.wait(1):
                return

    thread = threading.Thread(target=dawdle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for sock in socks:
            sock.close()


def wait_until_idle(pid: int) -> None:
    before = -1.0
    while (now := cpu_seconds(pid)) - before > 0.02:
        before = now
        time.sleep(0.5)


def connect(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    sock.sendall(
        "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    for text in ("40", f'42["stall",{KERNEL}]'):
        data = text.encode()
        sock.sendall(bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data)
    return sock


def report(kind: str, rounds: list[dict[str, float]]) -> None:
    middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print(
        f"{kind:>10}: p50 {middle['p50']:.2f} ms, with slow clients"
        f" {middle['p50, stalled']:.2f} ms (x {middle['p50, ratio']:.2f});"
        f" p99 {middle['p99']:.2f} ms, {middle['p99, stalled']:.2f} ms"
        f" (x {middle['p99, ratio']:.2f});"
        f" rate x {middle['rate, ratio']:.2f};"
        f" processor time of a message x {middle['cpu, ratio']:.2f};"
        f" memory {middle['memory'] / 1e6:.1f} MB,"
        f" {middle['memory, stalled'] / 1e6:.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
