"""The official JavaScript client under Node against our server, and the browser extension."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support

HERE = Path(__file__).resolve().parent
MANAGE = HERE / "server" / "manage.py"
REFRESH = support.ROOT / "tools" / "refresh_client.py"

# A result of node's TAP reporter: its verdict, its name, and what it says about it.
RESULT = re.compile(r"^(not )?ok \d+ - (.*)\n((?: .*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module", params=[{}, {"ROOMS_COMPRESSION": "1"}], ids=["", "compressed"])
def server(request: pytest.FixtureRequest) -> Iterator[support.Server]:
    with support.Server(MANAGE, env=request.param) as server:
        yield server


@pytest.mark.timeout(300)
def test_interop(
    node: str, client: None, server: support.Server, subtests: pytest.Subtests
) -> None:
    # What the tests that restart a server start, on a port of theirs.
    own = [sys.executable, str(MANAGE), "runserver_socketio", "127.0.0.1:{port}", "--noreload"]
    env = {"SOCKETIO_URL": server.url, "SOCKETIO_SERVER_COMMAND": json.dumps(own)}
    run(node, "interop.test.mjs", subtests, server.env | env, server)


def test_extension(node: str, subtests: pytest.Subtests) -> None:
    run(node, "extension.test.mjs", subtests, dict(os.environ))


def run(
    node: str,
    script: str,
    subtests: pytest.Subtests,
    env: dict[str, str],
    server: support.Server | None = None,
) -> None:
    """Run a file of node tests and report each of them as a subtest."""
    command = [node, "--test-reporter=tap", script]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=240)
    results = RESULT.findall(done.stdout)
    assert results, f"{script} reported nothing\n{done.stdout}\n{done.stderr}"
    for failed, name, details in results:
        with subtests.test(name):
            if failed:
                log = f"\n\nThe server's last words:\n{server.output[-5000:]}" if server else ""
                pytest.fail(f"{name}\n{details}{log}", pytrace=False)
    assert "\n# cancelled 0\n# skipped 0\n# todo 0\n" in done.stdout, done.stdout
    assert done.returncode == 0 or any(failed for failed, *_ in results), done.stderr


def test_the_bundled_client_is_the_recorded_one() -> None:
    subprocess.run([sys.executable, REFRESH, "--check"], check=True)


def test_the_bundled_client_is_the_one_tested_here() -> None:
    static = support.ROOT / "django_socketio" / "static" / "django_socketio"
    record = json.loads((static / "socket.io.json").read_text())
    pinned = json.loads((HERE / "package-lock.json").read_text())["packages"]
    installed = pinned["node_modules/socket.io-client"]
    assert (record["version"], record["integrity"]) == (
        installed["version"],
        installed["integrity"],
    )
    assert json.loads((HERE / "package.json").read_text())["dependencies"] == {
        "socket.io-client": record["version"]
    }
