"""The documentation names tests as proof: they exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = sorted((ROOT / "docs").glob("*.rst"))
CONTRACT = ROOT / "django_socketio" / "testing.py"
_REFERENCE = re.compile(r"``((?:tests|example_project)/[\w/.]+?\.py)?(?:::)?((?:test_|Test)\w+)?``")


@cache
def names(path: Path) -> frozenset[str]:
    """Return what a module defines, methods included."""
    tree = ast.parse(path.read_text())
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, defined)}
    assigned = (
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    return frozenset(functions.union(assigned))


def references(page: Path) -> list[tuple[str, str]]:
    found = _REFERENCE.findall(page.read_text())
    return [(path, name) for path, name in found if path or name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_is_named_exists(page: Path) -> None:
    missing = []
    for path, name in references(page):
        module = ROOT / path if path else CONTRACT
        if not module.is_file() or (name and name not in names(module)):
            missing.append(f"{path}::{name}")
    assert not missing


def test_the_promises_name_tests() -> None:
    assert len(references(ROOT / "docs" / "promises.rst")) > 20
