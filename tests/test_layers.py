"""The layers hold: what a module may import, from the sources alone."""

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_socketio

FLOORS = (
    {"protocol"},
    {"engine", "backends"},
    {"envelope", "gaps", "hub", "slow", "cluster"},
    {"exceptions", "events", "sockets", "limits", "runners", "logins", "identities", "dispatch"}
    | {"databases", "threads", "watchdog", "drain", "handoff"},
    {"conf", "descriptors", "messagelog", "origins", "signals", "runtime", "accounts", "api"},
    # The empty name is the package's own __init__, which the floors below do without.
    {"", "apps", "checks", "urls", "views", "admin", "management", "templatetags", "testing"}
    | {"gunicorn"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SIBLINGS = 1
CLIENT_LIBRARIES = {"redis", "hiredis", "kombu", "amqp", "psycopg"}
ROOT_IMPORTS = {"api", "exceptions"}
FORBIDDEN = {
    "protocol": {"gevent", "django", "socket", "_socket", "select", "ssl", "threading", "time"},
    "engine": {"django"},
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def broken_rules(package: Path) -> list[str]:
    """Return a sentence for each import in the package that breaks a rule."""
    modules = {_dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    imports, broken = {}, []
    for module, path in modules.items():
        if (name := _name(module)) not in FLOOR:
            broken.append(f"{path}:1: {name} has no floor: give it one in the table")
            continue
        for line, target, in_function in _imports(path, module, modules):
            sorter.add(module, target)
            imports[module, target] = f"{path}:{line}: {module} imports {target}"
            if rule := _broken_rule(package.name, module, target, in_function):
                broken.append(f"{imports[module, target]}: {rule}")
    try:
        sorter.prepare()
    except graphlib.CycleError as exc:
        cycle = itertools.pairwise(reversed(exc.args[1]))
        broken.append("a cycle of imports: " + "; ".join(imports[pair] for pair in cycle))
    return broken


def _dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _name(module: str) -> str:
    """Return what the table calls a module: the name below the package."""
    return (*module.split(".")[1:], "")[0]


def _imports(path: Path, module: str, modules: dict[str, Path]) -> Iterator[tuple[int, str, bool]]:
    """Yield line, target and whether it is inside a function, for each import of a module."""
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
    inside = {node for function in functions for node in ast.walk(function)}
    here = module.split(".") + ["__init__"] * (path.name == "__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else base for name in full]
        else:
            continue
        yield from ((node.lineno, target, node in inside) for target in targets)


def _broken_rule(package: str, module: str, target: str, in_function: bool) -> str | None:
    name, target_name, top = _name(module), _name(target), target.partition(".")[0]
    if in_function and top not in CLIENT_LIBRARIES and not (name == "" and top == package):
        return "only an optional client library is imported inside a function"
    if top in FORBIDDEN.get(name, ()):
        return f"{name} does without {top}"
    if top != package or target_name not in FLOOR:
        return None
    if FLOOR[target_name] > FLOOR[name]:
        return f"floor {FLOOR[name]} does not import from floor {FLOOR[target_name]}, above it"
    if FLOOR[name] == SIBLINGS and FLOOR[target_name] == SIBLINGS and name != target_name:
        return "siblings do not import each other"
    if name == "" and target_name not in ROOT_IMPORTS:
        return f"the package itself imports from {' and '.join(sorted(ROOT_IMPORTS))} only"
    return None


def test_the_package_keeps_its_layers() -> None:
    broken = broken_rules(Path(django_socketio.__file__).parent)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("protocol/json.py", "from ..hub import Hub", "floor 0 does not import from floor 2"),
        ("hub.py", "if True:\n    from django_socketio import api", "hub.py:2: "),
        ("conf.py", "from . import __version__", "floor 4 does not import from floor 5"),
        ("engine/server.py", "from ..backends import base", "siblings do not import each other"),
        ("backends/base.py", "import django_socketio.engine.server", "siblings do not"),
        ("hub.py", "def f():\n    from . import envelope", "inside a function"),
        ("hub.py", "f = lambda: 0\nasync def g():\n    import json", "hub.py:3: "),
        ("protocol/engineio.py", "import time as clock", "protocol does without time"),
        ("protocol/engineio.py", "from django.utils import timezone", "does without django"),
        ("engine/__init__.py", "import django.conf", "engine does without django"),
        ("__init__.py", "from .hub import Hub", "imports from api and exceptions only"),
        ("surprise.py", "import json", "surprise has no floor"),
        ("hub.py", "from . import envelope", "a cycle of imports"),
        ("protocol/__init__.py", "from .json import loads", "a cycle of imports"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, file: str, source: str, rule: str) -> None:
    package = _made_up(tmp_path)
    assert not broken_rules(package)
    (package / file).write_text(source)
    named = [sentence for sentence in broken_rules(package) if rule in sentence]
    assert any(f"{package / file}:" in sentence for sentence in named)


def _made_up(folder: Path) -> Path:
    sources = {
        "__init__.py": "from .api import send\ndef f():\n    from . import exceptions",
        "protocol/__init__.py": "",
        "protocol/json.py": "import orjson\nfrom django_socketio.protocol import LIMIT",
        "protocol/engineio.py": "from . import json\nfrom .json import loads",
        "engine/__init__.py": "",
        "engine/server.py": "import gevent\nfrom ..protocol import engineio",
        "backends/__init__.py": "",
        "backends/base.py": "import abc",
        "backends/redis.py": "from . import base\ndef f():\n    import redis.client",
        "envelope.py": "from .hub import Hub",
        "hub.py": "import django.conf",
        "exceptions.py": "",
        "conf.py": "from django.conf import settings",
        "api.py": "from . import conf, hub\nfrom .backends.base import Base",
        "views.py": "from . import __version__\nimport django_socketio.api",
    }
    for name, source in sources.items():
        path = folder / "django_socketio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "django_socketio"
