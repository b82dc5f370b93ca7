from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

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
