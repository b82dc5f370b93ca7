"""
The Autobahn cases: RFC 6455 (1-10) and RFC 7692 (12 and 13), as `kosoku` runs them.

They talk to the engine's transport, which echoes, behind either front.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import UNIT, Server

HERE = Path(__file__).resolve().parent

OTHERWISE = {
    # That text is no UTF-8 is found when its message or fragment is complete, not on the way.
    **dict.fromkeys(["6.4.1", "6.4.2", "6.4.3", "6.4.4"], ("NON-STRICT", "OK")),
    # What a server does here is up to it: a close amidst much data, and codes that are no one's.
    **dict.fromkeys(["7.1.6", "7.13.1", "7.13.2"], ("INFORMATIONAL", "INFORMATIONAL")),
    # The client wants a window of 512 bytes, where one frame is for all: that offer is declined.
    **dict.fromkeys(
        [f"13.{offer}.{size}" for offer in (3, 5) for size in range(1, 19)], ("UNIMPLEMENTED", "OK")
    ),
}
"""Results other than OK, each for a reason."""

SECTIONS = [f"{number}.*" for number in (1, 2, 3, 4, 5, 6, 7, 9, 10)]
DEFLATED = [f"12.{data}.*" for data in range(1, 6)] + [f"13.{offer}.*" for offer in range(1, 8)]

LARGE = (9, 10, 14, 15, 16, 17, 18)
"""Cases of 12.x and 13.x with a thousand messages over 32 kB: a few minutes, for all of them."""
ALL = os.environ.get("SOCKETIO_TEST_AUTOBAHN") == "all"


@pytest.fixture(scope="module")
def pywsgi() -> Iterator[Server]:
    with Server.script(HERE / "echo_server.py", "pywsgi") as server:
        yield server


@pytest.fixture(scope="module")
def gunicorn() -> Iterator[Server]:
    with Server.script(HERE / "echo_server.py", "gunicorn") as server:
        yield server


def run(server: Server, *patterns: str) -> dict[str, tuple[str, str]]:
    url = f"ws://{server.address}/"
    command = [sys.executable, HERE / "autobahn_client.py", url, *patterns]
    # No patches of gevent's there, which the environment of this process may ask for.
    done = subprocess.run(command, capture_output=True, text=True, env=server.env)
    assert done.returncode == 0, done.stderr
    return {case: (message, close) for case, (message, close) in json.loads(done.stdout).items()}


def check(server: Server, *patterns: str) -> None:
    results = run(server, *patterns)
    assert results
    expected = {case: OTHERWISE.get(case, ("OK", "OK")) for case in results}
    assert results == expected, server.output[-3000:]
    assert "Traceback" not in server.output


@pytest.mark.timeout(4000 * UNIT)
@pytest.mark.parametrize("section", SECTIONS)
def test_websocket(pywsgi: Server, section: str) -> None:
    check(pywsgi, section)


@pytest.mark.timeout(4000 * UNIT)
@pytest.mark.parametrize("section", DEFLATED)
def test_deflate(pywsgi: Server, section: str) -> None:
    number = section.removesuffix(".*")
    check(pywsgi, section, *(f"-{number}.{case}" for case in LARGE if not ALL))


@pytest.mark.timeout(4000 * UNIT)
def test_the_front_of_a_worker(gunicorn: Server) -> None:
    """What comes after the handshake is the same; so is the handshake, and what came with it."""
    check(gunicorn, "1.*", "2.*", "5.*", "7.*", "9.1.*", "12.1.4", "13.7.4")
