"""Measure this project and its peers, each alone on one core, the load generator on the other.

python benchmarks/run.py --peers ours,node --scenarios fanout,echo --seconds 3
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cores import LOAD_CORE, SERVER_CORE, busy_seconds, cpu_seconds, memory, pinned
from peers import BUILD, PEERS, Failed, Peer, Server, compile_c, serving
from table import Figure, as_rst, is_quiet, strangers, verdicts

IDLE_CLIENTS = 5000
IDLE_SECONDS = 32  # more than any peer's ping interval: each client has been pinged once
TRIES = 3  # of a figure that is not quiet
FANOUT = ["fanout", "--clients", "500", "--inflight"]
SCENARIOS: dict[str, dict[str, list[str]]] = {
    "fanout": {f"fan-out @{inflight}": [*FANOUT, str(inflight)] for inflight in (1, 4, 16)},
    "echo": {"echo": ["echo", "--clients", "100"]},
    "connects": {"connects": ["connects", "--clients", "50"]},
    "idle": {"idle": ["idle", "--clients", str(IDLE_CLIENTS)]},
}

Rounds = dict[str, dict[str, list[Figure]]]


def main() -> None:
    options = read_options()
    prepare(options.peers)
    scenarios = {title: load for name in options.scenarios for title, load in name.items()}
    rounds: Rounds = {peer.name: {title: [] for title in scenarios} for peer in options.peers}
    for number in range(1, options.rounds + 1):
        for peer in options.peers:
            say(f"round {number} of {options.rounds}: {peer.title}")
            now = {title: load for title, load in scenarios.items() if in_round(number, title)}
            for title, figure in measure_peer(peer, now, options):
                rounds[peer.name][title].append(figure)
    report(rounds, list(scenarios), options.out)


def in_round(number: int, title: str) -> bool:
    """Idle clients take long and vary little: the first round has them."""
    return number == 1 or title != "idle"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this project and its peers.")
    peers = {peer.name: peer for peer in PEERS}
    add = parser.add_argument
    add("--peers", type=choice_of(peers), default=list(PEERS), help=",".join(peers))
    add(
        "--scenarios",
        type=choice_of(SCENARIOS),
        default=list(SCENARIOS.values()),
        help=",".join(SCENARIOS),
    )
    add("--seconds", type=float, default=2, help="measured in each scenario and round")
    add("--warmup", type=float, default=1, help="seconds of load before them")
    add("--rounds", type=int, default=3, help="of all peers in turn; the median counts")
    add("--out", type=Path, help="write the result to this .json or .rst file")
    return parser.parse_args()


def choice_of(known: dict[str, Any]) -> Any:
    """Return an argument type: names from `known`, separated by commas."""

    def choose(text: str) -> list[Any]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return [known[name] for name in text.split(",")]

    return choose


def prepare(peers: list[Peer]) -> None:
    """Allow many files, and compile and install what is not there yet."""
    if not {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        sys.exit("The benchmark needs two cores: one for the server, one for the load.")
    if any(peer.name == "ours" for peer in peers) and not find_spec("django_socketio"):
        sys.exit("django_socketio is not installed for this Python: use `make bench`.")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    say("compiling the load generator and installing the peers")
    compile_c("load")
    for peer in peers:
        peer.install()


def measure_peer(
    peer: Peer, scenarios: dict[str, list[str]], options: argparse.Namespace
) -> Iterator[tuple[str, Figure]]:
    """Yield a figure for each scenario that succeeds; idle clients have a server of their own."""
    durations = ["--seconds", str(options.seconds), "--warmup", str(options.warmup)]
    busy = {title: load for title, load in scenarios.items() if title != "idle"}
    try:
        if busy:
            with serving(peer) as server:
                for title, load in busy.items():
                    yield from attempt(title, measure_load, server, [*load, *durations])
        if "idle" in scenarios:
            with serving(peer) as server:
                yield from attempt("idle", measure_idle, server, scenarios["idle"])
    except Failed as failure:
        say(f"  {peer.name} {failure}")


def attempt(title: str, measure: Any, server: Server, load: list[str]) -> Iterator[Any]:
    try:
        figure = quietest(measure(server, load) for _ in range(TRIES))
    except Failed as failure:
        say(f"  {title} failed: {failure}")
    else:
        say(f"  {title}: {json.dumps(figure)}")
        yield title, figure


def quietest(figures: Iterator[Figure]) -> Figure:
    """Take figures until one is quiet; return the quietest."""
    taken = []
    for figure in figures:
        taken.append(figure)
        if is_quiet(figure):
            break
    return min(taken, key=strangers)


def load_command(server: Server, load: list[str]) -> list[str]:
    plain = ["--plain"] if server.peer.plain else []
    ports = [f"--port={port}" for port in server.ports]
    return [str(BUILD / "load"), *load, *ports, *plain]


def measure_load(server: Server, load: list[str]) -> Figure:
    started, before = time.monotonic(), strangers_seconds(server)
    finished = subprocess.run(
        load_command(server, load),
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=pinned(LOAD_CORE),
    )
    if finished.returncode:
        raise Failed(finished.stderr.strip())
    share = (strangers_seconds(server) - before) / (time.monotonic() - started)
    return {**json.loads(finished.stdout), "strangers": round(max(share, 0), 3)}


def strangers_seconds(server: Server) -> float:
    """Return what both cores have worked for others than the server and the load generator."""
    load = resource.getrusage(resource.RUSAGE_CHILDREN)
    known = load.ru_utime + load.ru_stime
    return busy_seconds() - known - sum(map(cpu_seconds, server.pids))


def measure_idle(server: Server, load: list[str]) -> Figure:
    with idle_clients(server, ["idle", "--clients", "50"]):
        pass  # what the first clients make the server import belongs to no client
    time.sleep(2)
    before = memory(server.processes[0].pid)
    with idle_clients(server, load):
        time.sleep(IDLE_SECONDS)
        return {"bytes": (memory(server.processes[0].pid) - before) / IDLE_CLIENTS}


@contextmanager
def idle_clients(server: Server, load: list[str]) -> Iterator[None]:
    """Hold open clients that do nothing but answer pings."""
    with subprocess.Popen(
        load_command(server, load),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=pinned(LOAD_CORE),
    ) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline():
                yield
        finally:
            errors = process.communicate(timeout=10)[1]
    if process.returncode:
        raise Failed(errors.strip())


def report(rounds: Rounds, scenarios: list[str], out: Path | None) -> None:
    results = {
        peer: {title: median(figures) for title, figures in measured.items() if figures}
        for peer, measured in rounds.items()
    }
    text = as_rst(results, scenarios)
    print(f"\n{text}", *verdicts(results), sep="\n")
    if out:
        as_json = {"median": results, "rounds": rounds, "verdicts": verdicts(results)}
        out.write_text(json.dumps(as_json, indent=1) if out.suffix == ".json" else text)


def median(figures: list[Figure]) -> Figure:
    """Return the median of the quiet figures, or the quietest when there are none."""
    figures = list(filter(is_quiet, figures)) or [min(figures, key=strangers)]
    return {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
