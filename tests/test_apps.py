"""The app: what Django does with it at start-up."""

import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

SETTINGS = """
SECRET_KEY = "x"
INSTALLED_APPS = {apps!r}
USE_TZ = True
"""
SHOW = """
import django
django.setup()
from django_socketio.events import registry
for event in ("on_connect", "on_message", "event:go"):
    for namespace in ("/", "/shop"):
        for handler in registry.get(event, namespace):
            print(event, namespace, handler.function.__module__, handler.function.__name__)
"""


def start(folder: Path, *apps: str) -> subprocess.CompletedProcess[str]:
    """Start Django with some apps of `folder`, and list the handlers that are bound."""
    (folder / "made_up_settings.py").write_text(SETTINGS.format(apps=["django_socketio", *apps]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SHOW],
        env={
            "DJANGO_SETTINGS_MODULE": "made_up_settings",
            "PYTHONPATH": f"{folder}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",  # the settings change faster than their times
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )


def make_app(folder: Path, name: str, **modules: str) -> None:
    (folder / name).mkdir()
    for module, source in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(source)


def test_the_events_of_every_installed_app_are_imported(tmp_path: Path) -> None:
    bind = "from django_socketio.events import on_connect, on_event, on_message\n"
    make_app(tmp_path, "chat", events=f"{bind}@on_message\ndef message(*args): pass\n")
    shop = "@on_event('go', namespace='/shop')\n@on_connect\ndef go(*args): pass\n"
    make_app(tmp_path, "shop", events=bind + shop)
    make_app(tmp_path, "quiet", models="")
    make_app(tmp_path, "absent", events=f"{bind}@on_message\ndef never(*args): pass\n")
    run = start(tmp_path, "chat", "shop", "quiet")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "on_connect / shop.events go",
        "on_message / chat.events message",
        "event:go /shop shop.events go",
    ]


def test_the_order_of_the_apps_is_the_order_of_the_handlers(tmp_path: Path) -> None:
    source = "from django_socketio.events import on_message\n@on_message\ndef message(*a): pass\n"
    for name in ("one", "two"):
        make_app(tmp_path, name, events=source)
    for order in (("one", "two"), ("two", "one")):
        run = start(tmp_path, *order)
        assert run.stdout.splitlines() == [f"on_message / {name}.events message" for name in order]


def test_an_error_in_events_is_not_swallowed(tmp_path: Path) -> None:
    make_app(tmp_path, "chat", events="import no_such_module\n")
    run = start(tmp_path, "chat")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'no_such")


def test_a_handler_that_could_never_work_is_told_at_start_up(tmp_path: Path) -> None:
    bind = "from django_socketio.events import on_connect\n"
    make_app(tmp_path, "chat", events=f"{bind}@on_connect(channel='x')\ndef hello(*args): pass\n")
    run = start(tmp_path, "chat")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert "EventError: on_connect takes no channel" in last and "hello" in last


def test_importing_the_package_needs_no_settings() -> None:
    source = "import django_socketio, django_socketio.events"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=ROOT, env={}, capture_output=True
    )
    assert (run.returncode, run.stderr) == (0, b"")
