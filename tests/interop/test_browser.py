"""A page in the style of django-socketio 0.3 in a real browser; see browser_session.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import support

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("transports", "compression"),
    [("", ""), ("", "permessage-deflate"), ("polling", "")],
    ids=["defaults", "compressed", "polling"],
)
def test_people_in_rooms(chromium: str, tmp_path: Path, transports: str, compression: str) -> None:
    screenshot = tmp_path / "room.png"
    session = [sys.executable, HERE / "browser_session.py", chromium]
    port = support.free_port()
    env = {"ROOMS_TRUSTED_ORIGINS": f"http://localhost:{port}"}
    if compression:
        env["ROOMS_COMPRESSION"] = "1"
    with support.Server(HERE / "server" / "manage.py", port=port, env=env) as server:
        done = subprocess.run(
            [*session, server.url, transports, compression, screenshot],
            capture_output=True,
            text=True,
            env=server.env,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\nThe server:\n{server.output}"
    assert screenshot.stat().st_size > 0
