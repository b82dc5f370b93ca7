"""
The chat as several processes: workers, Celery, Redis and nginx, real ones that end with the tests.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from unittest import SkipTest

from django.test import SimpleTestCase

EXAMPLE = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLE.parent))  # the tests of the package lend their servers and clients

try:
    import pytest  # noqa: F401
    from celery import Celery

    from tests import clients, support
    from tests.services import Redis, Service, redis_binary
    from tests.support import UNIT, Server, free_port, wait_until
except ImportError as missing:
    raise SkipTest(f"for want of the extra test ({missing})") from None

MANAGE = "example_project/manage.py"
PATIENCE = 400 * UNIT  # seconds until what should come counts as lost


def need(name, found):
    """Return `found`, or skip; fail instead where SOCKETIO_TEST_REQUIRE names it."""
    if found:
        return found
    if name in support.REQUIRED:
        raise AssertionError(f"for want of {name}, which SOCKETIO_TEST_REQUIRE names")
    raise SkipTest(f"for want of {name}")


def temporary_directory():
    """A short path, for it has Unix sockets in it."""
    return tempfile.TemporaryDirectory(prefix="chat-", dir="/tmp")


class TaskWorker(Service):
    """A Celery worker with two processes of its own."""

    name = "celery"

    def __init__(self, env):
        super().__init__()
        self.env = {**env, "DJANGO_SETTINGS_MODULE": "project.settings"}

    def _start(self):
        options = ["--workdir", EXAMPLE, "worker", "--pool", "prefork", "--concurrency", "2"]
        options += ["--loglevel", "INFO", "--without-gossip", "--without-mingle"]
        return self._spawn(sys.executable, "-m", "celery", "-A", "project", *options, env=self.env)

    def _answers(self):
        return " ready." in self.log


class Nginx(Service):
    """The one of compose.yaml, but for the addresses: in front of workers on this machine."""

    name = "nginx"
    stop_signal = signal.SIGQUIT

    def __init__(self, *workers):
        self.binary = need("nginx", shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"))
        super().__init__()
        config = (EXAMPLE / "deploy" / "nginx.conf").read_text()
        config = self.replaced(config, "listen 80;", f"listen 127.0.0.1:{self.port};")
        for number, worker in enumerate(workers, start=1):
            config = self.replaced(config, f"app{number}:9000;", f"{worker.address};")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"\n{kind}_temp_path {self.directory}/{kind};" for kind in kinds)
        config = self.replaced(config, "http {", "http {" + paths)
        (self.directory / "nginx.conf").write_text(config)
        self.address = f"127.0.0.1:{self.port}"

    @staticmethod
    def replaced(config, what, by):
        assert config.count(what) == 1, what
        return config.replace(what, by)

    def _start(self):
        place = ["-p", self.directory, "-c", "nginx.conf", "-e", "stderr"]
        return self._spawn(self.binary, *place, "-g", "daemon off; pid pid;")

    def _answers(self):
        return self._ask(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200")

    def routes(self, sid):
        """Return the workers that requests of a session were sent to, in order."""
        return [line.split()[-1] for line in self.log.splitlines() if f"sid={sid}" in line]


class ClusterCase(SimpleTestCase):
    """
    A Redis, a database, and two workers that the tests of a class share: `servers`.

    Each test leaves the rooms empty, and the workers without a complaint.
    """

    hosts = 1  # 2 for workers that see nothing of each other but Redis

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        need("redis", redis_binary())
        cls.redis = cls.enterClassContext(Redis())
        cls.directory = Path(cls.enterClassContext(temporary_directory()))
        cls.env = {
            "CHAT_DATABASE": str(cls.directory / "chat.sqlite3"),
            "SOCKETIO_BACKEND": cls.redis.url,
            "CELERY_BROKER_URL": f"redis://127.0.0.1:{cls.redis.port}/1",
        }
        migrate = [sys.executable, support.ROOT / MANAGE, "migrate", "--verbosity", "0"]
        subprocess.run(migrate, env={**os.environ, **cls.env}, check=True)
        cls.servers = [cls.enterClassContext(cls.server(number)) for number in range(2)]

    @classmethod
    def server(cls, number):
        host = cls.directory / f"host{number % cls.hosts}"
        return Server(MANAGE, env={**cls.env, "XDG_RUNTIME_DIR": str(host)})

    def setUp(self):
        self.addCleanup(self.check_the_end)  # runs after those of setUp and of the test

    def check_the_end(self):
        wait_until(lambda: self.presences() == 0, PATIENCE, "empty rooms")
        for server in self.servers:
            _, failure, details = server.output.partition("Traceback")
            self.assertFalse(failure, details[:4000])

    def presences(self):
        with closing(sqlite3.connect(self.env["CHAT_DATABASE"])) as database:
            return database.execute("SELECT count(*) FROM chat_presence").fetchone()[0]

    def enter(self, server, name, *, token="", room="general", **options):
        """Connect somebody to a worker, and have them join."""
        person = self.visit(server, f"room-{room}", auth={"token": token}, **options)
        (answer,) = person.call("join", {"room": room, "name": name})
        self.assertTrue(answer["ok"], answer)
        person.token = answer["token"]
        person.people = [each["name"] for each in answer["people"]]
        return person

    def visit(self, server, channel, **options):
        person = clients.connect(server.address, **options)
        self.addCleanup(person.close)
        self.assertEqual(person.subscribe(channel), {"ok": True})
        return person

    def say(self, person, text):
        (answer,) = person.call("message", {"text": text, "nonce": str(uuid.uuid4())})
        self.assertTrue(answer["ok"], answer)

    def hears(self, person, **wanted):
        """Wait until a message with these values comes, and return it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            name, data = person.event(deadline - time.monotonic())
            if name == "message" and wanted.items() <= data.items():
                return data


class WorkersTests(ClusterCase):
    def test_people_on_different_workers_are_in_one_room(self):
        first, second = self.servers
        ada, max_ = self.enter(first, "Ada"), self.enter(second, "Max", transport="polling")
        self.assertEqual(max_.people, ["Ada", "Max"])
        self.hears(ada, type="join", name="Max")
        self.say(max_, "Hello")
        self.hears(ada, type="message", name="Max", text="Hello")
        max_.close()
        self.hears(ada, type="leave", name="Max")

    def test_a_name_is_one_persons_whatever_the_worker(self):
        first, second = self.servers
        ada = self.enter(first, "Ada")
        other = self.visit(second, "room-general")
        (answer,) = other.call("join", {"room": "general", "name": "ADA"})
        self.assertIn("has this name already", answer["error"])
        again = self.enter(second, "Ada", token=ada.token)
        self.hears(ada, type="elsewhere")
        ada.disconnected()
        self.assertEqual(again.people, ["Ada"])

    def test_the_front_page_knows_the_people_of_all_workers(self):
        first, second = self.servers
        lobby = self.visit(second, "lobby")
        for number, server in enumerate((first, second), start=1):
            self.enter(server, f"Person {number}", room="random")
            card = self.hears(lobby, type="room", slug="random", count=number)
        (cards,) = lobby.call("rooms")
        self.assertEqual(cards[0], card)

    def test_writes_wait_for_each_other(self):
        # SQLite has one writer at a time, and each of these messages is a transaction.
        people = [self.enter(self.servers[n % 2], f"Person {n}") for n in range(16)]

        def talk(person):
            for number in range(20):
                self.say(person, str(number))

        with ThreadPoolExecutor(len(people)) as threads:
            list(threads.map(talk, people))


class GhostTests(ClusterCase):
    """A worker that is killed runs no handler, and leaves the names of its people behind."""

    def setUp(self):
        super().setUp()
        first, second = self.servers
        self.ada, self.max = self.enter(first, "Ada"), self.enter(second, "Max")
        self.lobby = self.visit(first, "lobby")
        self.hears(self.ada, type="join", name="Max")
        second.signal(signal.SIGKILL)
        second.wait()
        self.addCleanup(second.start)

    def test_the_others_see_them_go(self):
        self.hears(self.ada, type="leave", name="Max")
        card = self.hears(self.lobby, type="room", slug="general", count=1)
        self.assertEqual([person["name"] for person in card["people"]], ["Ada"])

    def test_whoever_enters_does_not_see_them(self):
        self.assertEqual(self.enter(self.servers[0], "Eve").people, ["Ada", "Eve"])

    def test_their_names_are_free_at_once(self):
        self.assertEqual(self.enter(self.servers[0], "max").people, ["Ada", "max"])

    def test_who_comes_back_to_another_worker_has_not_left(self):
        back = self.enter(self.servers[0], "Max", token=self.max.token)
        self.say(back, "Where was I?")
        before = []
        while (data := self.ada.event(PATIENCE)[1])["type"] != "message":
            before.append(data["type"])
        self.assertNotIn("leave", before)


class TaskTests(ClusterCase):
    """What a Celery worker says reaches the clients of every worker."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tasks = cls.enterClassContext(TaskWorker(cls.env))
        cls.celery = Celery(broker=cls.env["CELERY_BROKER_URL"])
        cls.addClassCleanup(cls.celery.close)

    def test_an_announcement(self):
        people = [self.enter(server, f"Person {n}") for n, server in enumerate(self.servers)]
        self.celery.send_task("chat.tasks.announce", ("general", "Back at noon"))
        heard = [self.hears(person, type="system") for person in people]
        self.assertEqual(heard[0]["text"], "Back at noon")
        self.assertEqual(heard[0], heard[1])

    def test_an_announcement_to_nobody(self):
        task = self.celery.send_task("chat.tasks.announce", ("random", "Anybody?"))
        done = f"{task.id}] succeeded"
        wait_until(lambda: done in self.tasks.log, PATIENCE, f"{done} in {self.tasks.log}")
        late = self.visit(self.servers[0], "room-random")
        (answer,) = late.call("join", {"room": "random", "name": "Late"})
        self.assertEqual([said["text"] for said in answer["messages"]], ["Anybody?"])

    def test_a_countdown(self):
        first, second = self.servers
        ada, max_ = self.enter(first, "Ada"), self.enter(second, "Max")
        self.assertEqual(ada.call("countdown", {"seconds": 3}), [{"ok": True}])
        (refusal,) = max_.call("countdown", {"seconds": 3})
        self.assertIn("a countdown in this room already", refusal["error"])
        for person in (ada, max_):
            numbers = []
            while 0 not in numbers:
                name, data = person.event(PATIENCE)
                if name == "countdown":
                    self.assertEqual(data["name"], "Ada")
                    numbers.append(data["left"])
            # A busy machine may begin late, and then begins with less.
            self.assertEqual(numbers, [3, 2, 1, 0][-len(numbers) :])


class ProxyTests(ClusterCase):
    """Round robin by nginx, whose next request goes to the worker that has not got the session."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.nginx = cls.enterClassContext(Nginx(*cls.servers))

    def talk(self, *people):
        for number, person in enumerate(people):
            for text in (f"{number}-{n}" for n in range(3)):
                self.say(person, text)
                for other in people:
                    self.hears(other, type="message", text=text)

    def both_workers_were_asked(self, person):
        return set(self.nginx.routes(person.connection.sid)) == {s.address for s in self.servers}

    def test_polling(self):
        ada, max_ = (self.enter(self.nginx, name, transport="polling") for name in ("Ada", "Max"))
        self.talk(ada, max_)
        for person in (ada, max_):
            self.assertTrue(self.both_workers_were_asked(person))

    def test_websockets(self):
        ada, max_ = (self.enter(self.nginx, name) for name in ("Ada", "Max"))
        self.talk(ada, max_)

    def test_an_upgrade(self):
        people = [self.enter(self.nginx, name, transport="polling") for name in ("Ada", "Max")]
        upgraded = [self.upgrade(person.connection) for person in people]
        self.talk(*people)
        self.check_upgrades(upgraded)

    def upgrade(self, connection):
        """Upgrade, if the worker that is asked can do it; return whether it could."""
        query = {"sid": connection.sid}
        try:
            transport = clients.WebSocket(self.nginx.address, query=query)
        except clients.HandshakeFailed as refused:
            self.assertEqual(refused.status, 400)
            return False
        connection.upgrade(transport)
        return True

    def check_upgrades(self, upgraded):
        self.assertEqual(upgraded, [True, True])


class HostsProxyTests(ProxyTests):
    """The same with workers on different hosts: an upgrade at the wrong one is declined."""

    hosts = 2

    def check_upgrades(self, upgraded):
        pass  # as the turn has it


class DemoTests(SimpleTestCase):
    """`cluster.py`, as `make demo-cluster` starts it."""

    def setUp(self):
        need("redis", redis_binary())
        directory = self.enterContext(temporary_directory())
        self.log = Path(directory, "log")
        self.address = f"127.0.0.1:{free_port()}"
        env = {**os.environ, "CHAT_DATABASE": f"{directory}/chat.sqlite3"}
        env["XDG_RUNTIME_DIR"] = directory
        command = [sys.executable, EXAMPLE / "cluster.py", self.address]
        with open(self.log, "wb") as log:
            self.demo = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self.addCleanup(self.end_all)
        self.family = [self.demo.pid]
        wait_until(self.started, 1200 * UNIT, "the address")
        wait_until(lambda: " ready." in self.output, PATIENCE, "Celery")
        self.family += descendants(self.demo.pid)

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def started(self):
        self.assertIsNone(self.demo.poll(), self.output)
        return f"The chat is on http://{self.address}/" in self.output

    def end_all(self):
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.demo.wait()

    def left(self):
        running = {pid for pid, _, state, _ in processes() if state not in "ZX"}
        return [pid for pid in self.family if pid in running]

    def pid_of(self, *words):
        """Return the first of the demo's processes whose command has these words."""
        for pid, _, _, command in processes():
            if pid in self.family and all(word in command for word in words):
                return pid
        raise AssertionError(f"no {words} in {self.family}")

    def ends_with(self, status):
        self.assertEqual(self.demo.wait(PATIENCE), status, self.output)
        wait_until(lambda: not self.left(), PATIENCE, f"the end of {self.family}")

    def test_two_workers_serve_it_and_ctrl_c_ends_it(self):
        nodes = set()

        def another_node():
            with clients.open_connection(self.address) as connection:
                nodes.add(connection.sid[:8])
            return len(nodes) == 2

        wait_until(another_node, PATIENCE, "a session on another worker")
        self.assertGreater(len(self.family), 6, self.family)
        self.demo.send_signal(signal.SIGINT)
        self.ends_with(0)

    def test_none_is_left_when_one_dies(self):
        os.kill(self.pid_of("redis-server"), signal.SIGKILL)
        self.ends_with(1)
        self.assertIn("Redis ended with status -9.", self.output)

    def test_none_is_left_when_celery_dies_and_leaves_its_children(self):
        os.kill(self.pid_of("-m celery"), signal.SIGKILL)
        self.ends_with(1)
        self.assertIn("Celery ended with status -9.", self.output)


def processes():
    """Return pid, parent, state and command of all processes."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,state=,args="]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=3) for line in table.splitlines())
    return [(int(pid), int(parent), state, args) for pid, parent, state, args in rows]


def descendants(pid):
    children = [child for child, parent, *_ in processes() if parent == pid]
    return children + [each for child in children for each in descendants(child)]
