"""Measure several workers joined by a carrier, and the carriers themselves.

python benchmarks/cluster.py --parts fanout,connects,publish --seconds 3

fanout    two processes of each peer on one core, 500 clients split over both on the other, and a
          Redis between them: the first client emits, all receive 128 bytes, four are on their way
connects  one process of ours with each backend: what does the subscribing of a new client cost
publish   one process that publishes 200 bytes to a topic that one other process is subscribed to,
          one by one and from 64 greenlets
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cores import LOAD_CORE, pinned
from peers import BUILD, HERE, PEERS, Failed, Peer, serving
from run import FANOUT, Rounds, attempt, measure_load, median, prepare, say
from table import Figure, as_rst, ratios, thousands

sys.path.insert(0, str(HERE.parent))
from tests.services import RabbitMQ, Redis, Service

PARTS = ("fanout", "connects", "publish")
JOINED = ("ours", "node", "psio")
FANOUT_4 = {"2 workers, fan-out @4": [*FANOUT, "4"]}
CONNECTS = {"connects": ["connects", "--clients", "50"]}
WAYS = {
    "one by one with redis-py": ["redis-py", "1"],
    "redis, one by one": ["redis", "1"],
    "redis, 64 greenlets": ["redis", "64"],
    "amqp with confirms, one by one": ["amqp", "1"],
    "amqp with confirms, 64 greenlets": ["amqp", "64"],
}


def main() -> None:
    options = read_options()
    peers = [peer for peer in PEERS if peer.name in JOINED]
    prepare(peers if "fanout" in options.parts else peers[:1])
    text = []
    with carriers(options.parts) as services:
        if "fanout" in options.parts:
            text.append(fanout(peers, services["redis"], options))
        if "connects" in options.parts:
            text.append(connects(services, options))
        if "publish" in options.parts:
            text.append(publish(services, options))
    print("\n" + "\n\n".join(text))
    if options.out:
        options.out.write_text("\n\n".join(text) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure several workers, and their carriers.")
    add = parser.add_argument
    add("--parts", type=lambda text: text.split(","), default=PARTS, help=",".join(PARTS))
    add("--seconds", type=float, default=3)
    add("--warmup", type=float, default=1)
    add("--rounds", type=int, default=3)
    add("--out", type=Path, help="write the tables to this file")
    return parser.parse_args()


@contextmanager
def carriers(parts: list[str]) -> Iterator[dict[str, Service]]:
    """Start what the parts need, on whichever core the kernel finds for it."""
    services: dict[str, Service] = {"redis": Redis("--appendonly", "no")}
    if set(parts) & {"connects", "publish"}:
        services["amqp"] = RabbitMQ()
    try:
        for service in services.values():
            service.start()
        yield services
    finally:
        for service in services.values():
            service.stop()


def fanout(peers: list[Peer], redis: Service, options: argparse.Namespace) -> str:
    rounds: Rounds = {peer.name: {title: [] for title in FANOUT_4} for peer in peers}
    environment = {"BACKEND": redis.url, "REDIS_URL": redis.url}
    for number in range(options.rounds):
        for peer in peers:
            say(f"round {number + 1} of {options.rounds}: {peer.title}, 2 processes")
            with serving(peer, 2, environment, [redis.pid]) as server:
                measure(rounds[peer.name], server, FANOUT_4, options)
    return as_rst(medians(rounds), list(FANOUT_4))


def connects(services: dict[str, Service], options: argparse.Namespace) -> str:
    ours = next(peer for peer in PEERS if peer.name == "ours")
    names = ["memory", *services]
    rounds: Rounds = {name: {title: [] for title in CONNECTS} for name in names}
    for number in range(options.rounds):
        for name in names:
            say(f"round {number + 1} of {options.rounds}: connects with {name}")
            service = services.get(name)
            environment = {"BACKEND": service.url} if service else {}
            with serving(ours, 1, environment, [service.pid] if service else []) as server:
                measure(rounds[name], server, CONNECTS, options)
    results = medians(rounds)
    lines = [as_rst(results, list(CONNECTS))]
    for name, figures in results.items():
        ratio = ratios(figures.get("connects"), results["memory"].get("connects")).get("rate", 0)
        lines.append(f"connects with {name}: {ratio:.2f} of the rate with memory")
    return "\n".join(lines)


def measure(rounds: dict, server, scenarios: dict, options: argparse.Namespace) -> None:
    durations = ["--seconds", str(options.seconds), "--warmup", str(options.warmup)]
    for title, load in scenarios.items():
        try:
            for _, figure in attempt(title, measure_load, server, [*load, *durations]):
                rounds[title].append(figure)
        except Failed as failure:
            say(f"  {server.peer.name} {failure}")


def medians(rounds: Rounds) -> dict[str, dict[str, Figure]]:
    return {
        name: {title: median(figures) for title, figures in measured.items() if figures}
        for name, measured in rounds.items()
    }


def publish(services: dict[str, Service], options: argparse.Namespace) -> str:
    rates: dict[str, list[float]] = {title: [] for title in WAYS}
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}: publish")
        for title, (carrier, greenlets) in WAYS.items():
            url = services[carrier.partition("-")[0]].url
            rates[title].append(publish_rate(carrier, url, greenlets, options.seconds))
    width = max(map(len, rates))
    lines = ["publishes of 200 bytes per second: median (each round)"]
    for title, measured in rates.items():
        median, each = sorted(measured)[len(measured) // 2], ", ".join(map(thousands, measured))
        lines.append(f"{title:{width}}  {thousands(median)}  ({each})")
    return "\n".join(lines)


def publish_rate(carrier: str, url: str, greenlets: str, seconds: float) -> float:
    done = subprocess.run(
        [sys.executable, str(HERE / "publish.py"), carrier, url, greenlets, str(seconds)],
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=pinned(LOAD_CORE),
        cwd=HERE.parent,
    )
    rate: float = json.loads(done.stdout)["rate"]
    return rate


if __name__ == "__main__":
    BUILD.mkdir(exist_ok=True)
    main()
