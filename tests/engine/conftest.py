import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import require

from .served import Served


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Return a function that serves an engine, with these changes to its configuration."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Served(**options))


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """Return an engine whose pings come too late to be seen."""
    return serve()


@pytest.fixture(params=["polling", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    """Have the test run over either transport."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a self-signed certificate and its key, as arguments of the server."""
    openssl = require("openssl", shutil.which("openssl"))
    folder: Path = tmp_path_factory.mktemp("certificate")
    files = {"certfile": str(folder / "cert.pem"), "keyfile": str(folder / "key.pem")}
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    options += ["-subj", "/CN=localhost", "-keyout", files["keyfile"], "-out", files["certfile"]]
    subprocess.run([openssl, "req", "-x509", *options], check=True, capture_output=True)
    return files
