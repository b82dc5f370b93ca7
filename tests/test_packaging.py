"""What is built and published, and whether the files that say what is supported agree."""

import ast
import configparser
import email
import email.message
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "django_socketio"
LEFT_OUT = (".*", "*.egg-info", "*.sqlite3*", "__pycache__", "build", "dist", "node_modules")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with an sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run = subprocess.run([*build, "--outdir", folder, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_is_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "django_socketio/py.typed" in packed
    for folder in ("static", "templates"):
        assert any(name.startswith(f"django_socketio/{folder}/") for name in packed)


def test_the_sdist_has_what_testing_it_takes(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    kept = {"LICENSE", "README.rst", "CHANGELOG.rst", "Makefile", "tox.ini", "tests/conftest.py"}
    assert kept <= names
    assert {"docs/conf.py", "example_project/manage.py", "tools/refresh_client.py"} <= names
    assert not [name for name in names if re.search(r"\.pyc$|\.sqlite3|node_modules|/\.", name)]


def test_the_metadata_says_what_it_is(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "django-socketio"
    assert metadata["Version"] == _version()
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    users, ours = {"redis", "amqp", "workers", "demo"}, {"test", "lint", "docs", "fuzz"}
    assert set(metadata.get_all("Provides-Extra", [])) == users | ours
    assert "Socket.IO" in metadata.get_payload()


def test_the_changelog_speaks_of_this_version() -> None:
    release = re.sub(r"\.dev\d+$", "", _version())
    assert re.search(rf"^{re.escape(release)} \(", (ROOT / "CHANGELOG.rst").read_text(), re.M)


def test_tox_runs_what_the_classifiers_promise(metadata: email.message.Message) -> None:
    classifiers = "\n".join(metadata.get_all("Classifier", []))
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    environments = tox["tox"]["env_list"]
    for pattern, name in ((r"Python :: (3\.\d+)$", r"3\d\d"), (r"Django :: (\d\.\d)$", r"[5-9]\d")):
        promised = {version.replace(".", "") for version in re.findall(pattern, classifiers, re.M)}
        assert promised == set(re.findall(rf"\b{name}\b", environments.replace("py", " ")))


def _version() -> str:
    """Return the version without importing the package, as the build reads it."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("django_socketio.__version__ is not a literal")
