"""Time that passes is measured with the monotonic clock: what the wall clock does is no matter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_socketio

WALL = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
    ("timezone", "now"),
}
ALLOWED = {
    "messagelog.py": "what a log calls TIME",
    "logins.py": "the date until which a session in the database is good",
    "engine/gunicorn.py": "gunicorn's log of requests wants a datetime and a timedelta",
    "engine/pywsgi.py": "compared with the loop's own clock, within a turn",
}


def wall_clocks(source: str) -> Iterator[int]:
    """Yield the lines that ask the wall clock."""
    tree = ast.parse(source)
    names = {name for module, name in WALL if module == "time"}
    direct = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "time"
        for alias in node.names
        if alias.name in names
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in WALL:
                yield node.lineno
            case ast.Attribute(value=ast.Attribute(attr=module), attr=name) if (
                module,
                name,
            ) in WALL:
                yield node.lineno
            case ast.Name(id=name) if name in direct:
                yield node.lineno


def test_nothing_is_measured_with_the_wall_clock() -> None:
    package = Path(django_socketio.__file__).parent
    found = {
        path.relative_to(package).as_posix(): list(wall_clocks(path.read_text()))
        for path in package.rglob("*.py")
    }
    assert {name for name, lines in found.items() if lines} == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "from time import monotonic, time\ntime()",
        "from time import time as clock\nclock()",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.utcnow()",
        "from django.utils import timezone\ntimezone.now()",
    ],
)
def test_a_wall_clock_is_found(source: str) -> None:
    assert list(wall_clocks(source)) == [2]
