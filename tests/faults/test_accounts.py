"""A login ends in one process, and its connections in all workers."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import clients
from tests.clients import PATH, Client
from tests.deployment.cluster import MANAGE, Cluster
from tests.faults import carriers
from tests.faults.carriers import Carrier
from tests.support import ROOT, UNIT, wait_until

pytestmark = pytest.mark.timeout(2000 * UNIT)

NEVER = 3600
"""An interval at which nobody is asked about: word alone must do."""

STORES = ("db", "cached_db", "cache", "file", "signed_cookies")
PASSWORD = "a password"
MAKE_USERS = f"""
from django.contrib.auth.models import User
for number in range(20):
    User.objects.create_user(f"user{{number}}", password={PASSWORD!r})
    print(f"user{{number}}")
"""


def settings(directory: Path, store: str, interval: float) -> dict[str, Any]:
    """Return what a deployment with users needs; the workers share what is in `directory`."""
    for name in ("sessions", "cache"):
        (directory / name).mkdir()
    cache = "django.core.cache.backends.filebased.FileBasedCache"
    return {
        "INSTALLED_APPS": [
            *(f"django.contrib.{name}" for name in ("auth", "contenttypes", "sessions")),
            "django_socketio",
            "tests.deployment",
        ],
        "MIDDLEWARE": [
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
        ],
        "DATABASES": {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(directory / "database"),
                "OPTIONS": {"timeout": 60},
            }
        },
        "CACHES": {"default": {"BACKEND": cache, "LOCATION": str(directory / "cache")}},
        "SESSION_ENGINE": f"django.contrib.sessions.backends.{store}",
        "SESSION_FILE_PATH": str(directory / "sessions"),
        "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
        "ROOT_URLCONF": "tests.deployment.accounts",
        "SOCKETIO_REAUTH_INTERVAL": interval,
    }


class Accounts(Cluster):
    """Two workers of a project whose users are made as somebody asks for them."""

    def __init__(
        self,
        backend: Any,
        directory: Path,
        *,
        store: str = "db",
        interval: float = NEVER,
        **options: Any,
    ) -> None:
        super().__init__(backend, **options, **settings(directory, store, interval))
        self.manage("migrate", "--verbosity", "0")
        self._users = iter(re.findall(r"user\d+", self.manage("shell", "-c", MAKE_USERS)))

    def manage(self, *arguments: str) -> str:
        """Run a command of the project in a process that serves nothing; return what it prints."""
        command = [sys.executable, str(ROOT / MANAGE), *arguments]
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def run(self, *lines: str) -> str:
        """Run some Python there, which calls a user by its name."""
        names = "user = lambda name: User.objects.get(username=name)"
        first = "from django.contrib.auth.models import User; import django_socketio"
        return self.manage("shell", "-c", "\n".join((first, names, *lines)))

    def user(self) -> str:
        """Return the name of a user that no other test has."""
        return next(self._users)

    def log_in(self, name: str, worker: int = 0) -> dict[str, str]:
        """Log in as a browser does; return the cookie as a header."""
        body = json.dumps({"username": name, "password": PASSWORD}).encode()
        answer = clients.request(self.addresses[worker], "POST", "/login/", {}, body)
        assert answer.status == 200, answer.body
        return {"Cookie": (answer.header("Set-Cookie") or "").partition(";")[0]}

    def log_out(self, cookie: dict[str, str], worker: int = 0) -> None:
        answer = clients.request(self.addresses[worker], "POST", "/logout/", cookie, b"x")
        assert answer.status == 200, answer.body

    def connect(self, cookie: dict[str, str], worker: int, transport: str = "websocket") -> Client:
        """Connect a client to a worker; it is closed at the end of the block."""
        client = clients.connect(self.addresses[worker], headers=cookie, transport=transport)
        self._block.callback(client.close)
        return client

    def says(self, worker: int, client: Client, reason: str) -> bool:
        """Wait until a worker's `on_finish` has told the reason of a client's end."""
        line = f"finished {client.sid} {reason}\n"
        wait_until(lambda: line in self.servers[worker].output, what=line)
        return True


@pytest.fixture(scope="module")
def redis() -> Iterator[Carrier]:
    with carriers.carrier("redis") as carrier:
        yield carrier


@pytest.fixture(scope="module")
def site(broker: Carrier, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    """Serve a project with users on each carrier, its sessions in the database."""
    with Accounts(broker.backend, tmp_path_factory.mktemp("accounts")) as site:
        yield site


def is_closed(client: Client) -> bool:
    client.connection.wait_for_end()
    return True


def test_a_logout_reaches_the_other_worker(site: Accounts) -> None:
    _log_out(site, site.user(), site.user())


@pytest.mark.parametrize("store", STORES)
def test_and_with_every_store_of_sessions(redis: Carrier, tmp_path: Path, store: str) -> None:
    with Accounts(redis.backend, tmp_path, store=store) as site:
        _log_out(site, site.user(), site.user(), alone=store != "signed_cookies")


def _log_out(site: Accounts, mole: str, rat: str, *, alone: bool = True) -> None:
    """Log a user out who is logged in twice; `alone`, if the other session stays."""
    here, there, other = site.log_in(mole), site.log_in(mole, 1), site.log_in(rat)
    gone = [
        site.connect(here, worker, transport)
        for worker in (0, 1)
        for transport in ("websocket", "polling")
    ]
    stays, others = site.connect(there, 1), site.connect(other, 1)
    assert stays.call("who") == [[mole, False]]
    site.log_out(here)
    assert all(map(is_closed, gone))
    assert all(site.says(n // 2, client, "session ended") for n, client in enumerate(gone))
    if alone:
        assert stays.call("who") == [[mole, False]]
        assert site.connect(here, 1).call("who") == [["", False]]
    else:  # nobody can tell their sessions apart
        assert is_closed(stays)
    assert others.call("who") == [[rat, False]]


def test_what_a_process_without_sockets_does_to_users(site: Accounts) -> None:
    """A cron job, a Celery task, a shell: it is told to all workers, and no more than was."""
    names = mole, rat, toad, badger = [site.user() for _ in range(4)]
    cookies = {name: site.log_in(name) for name in names}
    ours = {name: [site.connect(cookies[name], worker) for worker in (0, 1)] for name in names}
    site.run(
        "import asyncio",
        "from django.db import transaction",
        f"mole, rat, toad, badger = map(user, {names})",
        "mole.set_password('new')",
        "mole.save()",
        "rat.is_active = False",
        "asyncio.run(rat.asave())",
        "try:",
        "    with transaction.atomic():",
        "        toad.delete()",
        "        raise ZeroDivisionError",
        "except ZeroDivisionError:",
        "    pass",
        "badger.delete()",
    )
    for name in (mole, rat, badger):
        for worker, client in enumerate(ours[name]):
            assert is_closed(client) and site.says(worker, client, "login revoked")
    for client in ours[toad]:
        assert client.call("who") == [[toad, False]]


def test_a_right_that_is_lost(site: Accounts) -> None:
    otter, mole = site.user(), site.user()
    site.run(f"User.objects.filter(username={otter!r}).update(is_staff=True)")
    cookie = site.log_in(otter)
    staff = [site.connect(cookie, worker) for worker in (0, 1)]
    for client in staff:
        assert client.subscribe("staff") == {"ok": True}
        assert client.subscribe("hall") == {"ok": True}
    other = site.connect(site.log_in(mole), 0)
    assert other.subscribe("staff") == {"ok": False, "error": "staff only"}
    again = "print(django_socketio.revalidate('staff'))"
    assert "2\n" in site.run(
        again, f"otter = user({otter!r})", "otter.is_staff = False", "otter.save()"
    )
    for client in staff:
        wait_until(lambda client=client: client.call("who") == [[otter, False]])
        assert client.fence() == []
    assert "2\n" in site.run(again)
    for client in staff:
        assert client.event() == ["__unsubscribe__", "staff", "staff only"]
    assert "set()\n" in site.run("print(django_socketio.members('staff'))")


def test_a_user_is_disconnected_from_a_process_without_sockets(site: Accounts) -> None:
    mole, rat = site.user(), site.user()
    cookie = site.log_in(mole)
    gone = [site.connect(cookie, worker) for worker in (0, 1)]
    stays = site.connect(site.log_in(rat), 1)
    printed = site.run(
        f"mole = user({mole!r})",
        "django_socketio.disconnect(user=mole)",
        "try:",
        "    django_socketio.disconnect(user=mole.pk)",
        "except django_socketio.NoSocket as error:",
        "    print(error)",
    )
    assert "There is no socket of the user" in printed
    for worker, client in enumerate(gone):
        client.disconnected()
        assert site.says(worker, client, "server namespace disconnect")
    assert stays.call("who") == [[rat, False]]


def test_requests_of_another_login_by_way_of_another_worker(site: Accounts) -> None:
    _come_with_another_login(site)


def test_and_from_another_host(redis: Carrier, tmp_path: Path) -> None:
    with Accounts(redis.backend, tmp_path, hosts=True) as site:
        _come_with_another_login(site)


def _come_with_another_login(site: Accounts) -> None:
    name = site.user()
    mole, rat = site.log_in(name), site.log_in(site.user())
    client = site.connect(mole, 0, "polling")
    target = f"{PATH}?EIO=4&transport=polling&sid={client.connection.sid}"
    for cookie, status in ((rat, 403), ({}, 403), (mole, 200)):
        answer = clients.request(site.addresses[1], "POST", target, cookie, b"3")
        assert answer.status == status, answer.body
        assert status == 200 or b"another login" in answer.body
    for cookie in (rat, {}):
        assert clients.request(site.addresses[1], "GET", target, cookie).status == 403
    assert client.call("who") == [[name, False]]


def test_a_broker_that_is_down_raises_into_no_save(tmp_path: Path) -> None:
    """Nobody can be told; the workers find out by themselves."""
    with carriers.carrier("redis") as redis:
        with Accounts(redis.backend, tmp_path, interval=20 * UNIT) as site:
            names = [site.user() for _ in range(3)]
            cookies = [site.log_in(name) for name in names]
            mole, rat, toad = (site.connect(cookie, 1) for cookie in cookies)
            redis.service.stop()
            site.log_out(cookies[1])
            printed = site.run(
                f"mole = user({names[0]!r})",
                "mole.is_active = False",
                "mole.save()",
                "print('saved')",
            )
            assert "saved" in printed
            assert "Nobody was told to check user, for the backend is down" in printed
            assert is_closed(mole) and is_closed(rat)
            redis.service.start()
            wait_until(site.healthy, what="the health of all workers")
            assert toad.call("who") == [[names[2], False]]
