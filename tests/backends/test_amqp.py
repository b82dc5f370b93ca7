"""The AMQP backend in good times: the contract over every kind of connection, and its options."""

import contextlib
import itertools
import os
import shutil
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self
from unittest import TestCase

import amqp
import gevent
import kombu
import pytest
from gevent.server import StreamServer
from hypothesis import given, strategies

from django_socketio.backends import UNKNOWN, BackendError, InvalidBackend
from django_socketio.backends.amqp import AMQPBackend, frames
from django_socketio.backends.amqp.backend import routing_key
from django_socketio.testing import BackendContract
from tests.services import RabbitMQ
from tests.support import ROOT, free_port, require, wait_until


class Proxy:
    """
    A host between clients and the broker, which can go away by itself.

    `refuse()` is the end of a host that says so, `hush()` that of one whose cable is pulled. What
    `restore()` brings back knows of no earlier connection.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.connections = 0
        self.sent = 0
        """Times that something came from a client."""
        self._sockets: set[socket.socket] = set()
        self._awake = gevent.event.Event()
        self._awake.set()
        self._server = self._listen(0)
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.refuse()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def refuse(self) -> None:
        self._server.stop(timeout=0)
        self.cut()
        self._awake.set()

    def hush(self) -> None:
        self._awake.clear()

    def restore(self) -> None:
        self.cut()
        self._awake.set()
        if not self._server.started:
            self._server = self._listen(self.port)

    def cut(self) -> None:
        """End all connections of the moment."""
        for each in list(self._sockets):
            _shut(each)

    def _listen(self, port: int) -> StreamServer:
        server = StreamServer(("127.0.0.1", port), self._serve)
        server.start()
        return server

    def _serve(self, client: socket.socket, address: object) -> None:
        self.connections += 1
        with contextlib.suppress(OSError), self._known(client):
            self._awake.wait()
            with self._known(socket.create_connection(("127.0.0.1", self.target))) as broker:
                answers = gevent.spawn(self._pump, broker, client)
                self._pump(client, broker)
                answers.join()

    @contextlib.contextmanager
    def _known(self, each: socket.socket) -> Iterator[socket.socket]:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.add(each)
        try:
            with each:
                yield each
        finally:
            self._sockets.discard(each)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._awake.wait()
                self.sent += source.getpeername()[1] != self.target
                target.sendall(data)
        except OSError:
            pass
        finally:
            _shut(source)
            _shut(target)


def _shut(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class SecureRabbitMQ(RabbitMQ):
    """One that speaks TLS on a second port, with a certificate for localhost alone."""

    def __init__(self) -> None:
        super().__init__()
        openssl = require("openssl", shutil.which("openssl"))
        self.secure_port = free_port()
        self.certificate, key = self.directory / "cert.pem", self.directory / "key.pem"
        options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
        names = "-addext subjectAltName=DNS:localhost"
        command = [openssl, "req", "-x509", *options.split(), *names.split()]
        command += ["-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run(command, check=True, capture_output=True)
        settings = {"cacertfile": self.certificate, "certfile": self.certificate, "keyfile": key}
        lines = [f"listeners.ssl.1 = 127.0.0.1:{self.secure_port}"]
        lines += [f"ssl_options.{name} = {path}" for name, path in settings.items()]
        (self.directory / "rabbitmq.conf").write_text("\n".join(lines) + "\n")

    def secure_url(self, host: str = "localhost") -> str:
        return f"amqps://guest:guest@{host}:{self.secure_port}//"


class Contract(BackendContract):
    """The contract with the broker that all tests share, by a host that can go away."""

    url: str
    options: Mapping[str, Any] = {}

    @pytest.fixture(autouse=True)
    def _broker(self, rabbitmq_server: RabbitMQ) -> Iterator[None]:
        self.server = rabbitmq_server
        with Proxy(rabbitmq_server.port) as self.proxy:
            self.url = self.proxy.url
            yield

    def make_backend(self) -> AMQPBackend:
        options = {"prefix": self.unique, "timeout": self.timeout, "heartbeat": 1.0}
        return AMQPBackend(self.url, **{**options, **self.options})

    def break_carrier(self) -> None:
        self.proxy.refuse()

    def heal_carrier(self) -> None:
        self.proxy.restore()

    def test_a_forked_child_uses_nothing_of_its_parent(self) -> None:
        self.url = self.server.url  # of a proxy in this process the child would have half
        super().test_a_forked_child_uses_nothing_of_its_parent()


class TestRefusal(Contract, TestCase):
    """A host that is gone, and says so."""


class TestSilence(Contract, TestCase):
    """A host that answers nothing, and closes nothing."""

    def break_carrier(self) -> None:
        self.proxy.hush()


class TestFreeze(Contract, TestCase):
    """A broker that does nothing, and then does what it was asked for meanwhile."""

    def break_carrier(self) -> None:
        self.server.freeze()

    def heal_carrier(self) -> None:
        self.server.thaw()


class TestTLS(BackendContract, TestCase):
    """A broker that ends properly and starts again, by TLS."""

    server: ClassVar[SecureRabbitMQ]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.server = SecureRabbitMQ()
        cls.server.start()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.server.stop()
        super().tearDownClass()

    def make_backend(self, host: str = "localhost", **ssl: Any) -> AMQPBackend:
        ssl = ssl or {"ca_certs": str(self.server.certificate)}
        url, prefix = self.server.secure_url(host), self.unique
        return AMQPBackend(url, prefix=prefix, timeout=self.timeout, ssl=ssl)

    def break_carrier(self) -> None:
        self.server.ctl("stop_app")

    def heal_carrier(self) -> None:
        self.server.ctl("start_app")

    def test_a_host_must_prove_its_name(self) -> None:
        trusted = {"ca_certs": str(self.server.certificate)}
        for host, options in (("127.0.0.1", trusted), ("localhost", {"keyfile": None})):
            backend = self.make_backend(host, **options)
            self.addCleanup(backend.stop)
            with self.assertRaisesRegex(BackendError, "CERTIFICATE_VERIFY_FAILED"):
                backend.publish("t", b"x")

    def test_unless_it_need_not(self) -> None:
        backend = self.make_backend("127.0.0.1", cert_reqs=ssl.CERT_NONE)
        self.addCleanup(backend.stop)
        self.assertEqual(backend.publish("t", b"x"), 0)


class MemoryBackend(AMQPBackend):
    """What an instance says for `memory://`, as the contract asks the class."""

    supports_receivers = False


class TestMemory(BackendContract, TestCase):
    """kombu's broker in this process, which does not know of receivers."""

    carrier_breaks = False

    def make_backend(self) -> AMQPBackend:
        return MemoryBackend("memory://", prefix=self.unique)


class Inbox(list[tuple[str, bytes]]):
    """What was delivered, in order."""

    def deliver(self, topic: str, payload: bytes) -> None:
        self.append((topic, payload))


Make = Callable[..., AMQPBackend]


@pytest.fixture
def proxy(rabbitmq_server: RabbitMQ) -> Iterator[Proxy]:
    with Proxy(rabbitmq_server.port) as proxy:
        yield proxy


@pytest.fixture
def make(rabbitmq_server: RabbitMQ) -> Iterator[Make]:
    """Make backends with a prefix of the test's own, which end with it."""
    made = []
    prefix = f"test.{uuid.uuid4().hex}"

    def make(url: str = rabbitmq_server.url, **options: Any) -> AMQPBackend:
        made.append(AMQPBackend(url, **{"prefix": prefix, **options}))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


def listening(backend: AMQPBackend, inbox: Inbox, *topics: str) -> AMQPBackend:
    backend.start(inbox.deliver)
    backend.subscribe(topics)
    return backend


# Topics


def test_a_topic_is_its_own_routing_key() -> None:
    for topic in ("", "c/,room", "c/,größe 漢字 🎈", 254 * "x", 127 * "ü"):
        assert routing_key(topic) == topic.encode()


def test_no_routing_key_is_too_long_and_no_two_are_equal() -> None:
    topics = [start + 255 * "x" + end for start in ("", "a", "ü", "🎈") for end in ("", "a", "b")]
    topics += ["\ud800", "\ud801", "x\ud800", 600 * "🎈", 63 * "🎈" + "xyz", 600 * "~", 255 * "~"]
    keys = {topic: routing_key(topic) for topic in topics}
    assert {len(key) for key in keys.values()} == {255}
    assert all(key.decode() for key in keys.values())
    # None is the key of another topic either, for that would have to be as long.
    assert len({*keys.values(), *(routing_key(key.decode()) for key in keys.values())}) == 2 * len(
        keys
    )


def test_half_a_surrogate_pair(make: Make, inbox: Inbox) -> None:
    backend = listening(make(), inbox, "\ud800", "\udfff")
    assert [backend.publish(topic, b"x") for topic in ("\ud800", "\ud801", "\udfff")] == [1, 0, 1]
    wait_until(lambda: inbox == [("\ud800", b"x"), ("\udfff", b"x")])


# What the broker sees


def rows(text: str) -> list[list[str]]:
    """Return the rows of a table of rabbitmqctl, without its head."""
    return [line.split("\t") for line in text.splitlines()[1:]]


def test_the_queue_is_its_process_s_and_bounded(
    make: Make, inbox: Inbox, rabbitmq_server: RabbitMQ
) -> None:
    """RabbitMQ 4.3 refuses queues that are neither durable nor exclusive."""
    listening(make(prefix="queues", max_queue_bytes=160_000), inbox, "t")
    columns = ("name", "durable", "auto_delete", "exclusive", "consumers", "arguments")
    queues = rows(rabbitmq_server.ctl("list_queues", *columns))
    mine = sorted(row for row in queues if row[0].startswith("queues."))
    assert [row[1:5] for row in mine] == 2 * [["false", "true", "true", "1"]]
    assert '"x-max-length-bytes",160000' in mine[0][5].replace("{", "").replace("}", "")
    assert '"x-max-length-bytes",10000' in mine[1][5].replace("{", "").replace("}", "")
    exchanges = rows(
        rabbitmq_server.ctl("list_exchanges", "name", "type", "durable", "auto_delete")
    )
    assert ["queues", "direct", "true", "false"] in exchanges


def test_heartbeats_and_names_of_connections(
    make: Make, inbox: Inbox, rabbitmq_server: RabbitMQ
) -> None:
    backend = listening(make(heartbeat=6.5), inbox, "t")
    backend.publish("t", b"x")
    table = rabbitmq_server.ctl("list_connections", "timeout", "client_properties", "channels")
    mine = [row for row in rows(table) if f':{os.getpid()}"' in row[1] and row[0] == "7"]
    assert [row[2] for row in mine] == ["1", "1"]
    assert sorted("listener" in row[1] for row in mine) == [False, True]


def test_a_message_is_bytes_and_not_persistent(make: Make, rabbitmq_server: RabbitMQ) -> None:
    backend = make(prefix="format")
    backend.publish("t", b"the exchange is there")
    with kombu.Connection(rabbitmq_server.url) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).queue
        channel.queue_bind(queue, "format", "t")
        assert backend.publish("t", b"\x00\xff") == 1
        message = wait_until(lambda: channel.basic_get(queue, no_ack=True))
        assert message.body == b"\x00\xff"
        assert message.properties["content_type"] == "application/octet-stream"
        assert message.properties["delivery_mode"] == 1
        assert "application_headers" not in message.properties


def test_virtual_hosts_are_apart(make: Make, rabbitmq_server: RabbitMQ) -> None:
    rabbitmq_server.ctl("add_vhost", "other")
    rabbitmq_server.ctl("set_permissions", "-p", "other", "guest", ".*", ".*", ".*")
    here, there = Inbox(), Inbox()
    a = listening(make(), here, "t")
    b = listening(make(rabbitmq_server.url.removesuffix("//") + "/other"), there, "t")
    assert a.publish("t", b"a") == b.publish("t", b"b") == 1
    wait_until(lambda: here == [("t", b"a")] and there == [("t", b"b")])


def test_any_of_several_hosts_will_do(make: Make, inbox: Inbox, rabbitmq_server: RabbitMQ) -> None:
    url = f"amqp://127.0.0.1:{free_port()}//;{rabbitmq_server.url}"
    backend = listening(make(url), inbox, "t")
    assert backend.publish("t", b"x") == 1


# Round trips


def test_those_who_publish_at_once_share_a_write(make: Make, inbox: Inbox, proxy: Proxy) -> None:
    """And each learns of its own message whether there is anybody."""
    listening(make(), inbox, "some")
    backend = make(proxy.url)
    backend.publish("some", b"connected")
    before = proxy.sent

    def publish(number: int) -> list[int]:
        topics = ["some", "none", "some"] if number % 2 else ["none", "some", "none"]
        return [backend.publish(topic, b"%d" % number) for topic in topics]

    greenlets = [gevent.spawn(publish, number) for number in range(64)]
    gevent.joinall(greenlets)
    assert [each.get() for each in greenlets] == 32 * [[0, 1, 0], [1, 0, 1]]
    assert proxy.sent - before < 64
    assert backend.counters == {"publisher connected": 1}
    wait_until(lambda: len(inbox) == 1 + 32 + 64)


def test_those_who_subscribe_at_once_share_a_round_trip(
    make: Make, inbox: Inbox, proxy: Proxy
) -> None:
    backend = listening(make(proxy.url), inbox, "t")
    before = proxy.sent
    gevent.joinall([gevent.spawn(backend.subscribe, [str(n)]) for n in range(64)], raise_error=True)
    assert proxy.sent - before < 16
    publisher = make()
    assert [publisher.publish(str(number), b"x") for number in range(64)] == 64 * [1]


def test_one_connection_publishes_all(make: Make, proxy: Proxy) -> None:
    """Not one connection each, as neighbours have it."""
    backend = make(proxy.url)
    for number in range(100):
        backend.publish("t", b"%d" % number)
    assert backend.counters == {"publisher connected": 1}
    assert proxy.connections == 1


# Options


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidBackend, match="AMQPBackend does not know .* vhost"):
        AMQPBackend(vhost="x")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prefix": ""}, "prefix has 1 to 200 bytes"),
        ({"prefix": 101 * "ü"}, "prefix has 1 to 200 bytes"),
        ({"prefix": "amq.direct"}, "does not begin with amq"),
        ({"timeout": 0}, "timeout is more than 0"),
        ({"heartbeat": -1}, "heartbeat is a number of seconds"),
        ({"heartbeat": 70_000}, "heartbeat is a number of seconds"),
        ({"max_queue_bytes": 0}, "max_queue_bytes is a number up to"),
        ({"max_queue_bytes": 1 << 31}, "max_queue_bytes is a number up to"),
        ({"url": "redis://localhost"}, "begins with amqp://, amqps:// or memory://"),
        ({"url": "localhost"}, "begins with amqp://"),
        ({"url": "amqp://a;memory://"}, "begins with amqp://"),
        ({"url": "amqp://localhost:port"}, "no URL of a broker: .*port"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidBackend, match=problem):
        AMQPBackend(**options)


def test_without_kombu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kombu", "kombu.connection"):
        monkeypatch.setitem(sys.modules, name, None)
    for url in ("amqp://localhost", "memory://"):
        with pytest.raises(InvalidBackend, match=r"pip install django-socketio\[amqp\]"):
            AMQPBackend(url)


def test_kombu_is_imported_by_who_needs_it() -> None:
    script = "import sys, django_socketio.backends.amqp; print({'kombu', 'amqp'} & {*sys.modules})"
    assert run(script) == "set()\n"


def test_its_memory_is_one_process_s() -> None:
    backend = AMQPBackend("memory://")
    assert not backend.supports_receivers
    assert not backend.crosses_processes
    assert backend.publish("t", b"x") == UNKNOWN
    assert AMQPBackend().supports_receivers
    assert AMQPBackend().crosses_processes
    assert AMQPBackend().check() == []


def test_what_is_not_started_does_not_subscribe(make: Make) -> None:
    for backend in (make(), make("memory://")):
        with pytest.raises(BackendError, match="not started"):
            backend.subscribe(["t"])
        backend.unsubscribe(["t"])


# Threads


def run(script: str, *arguments: str) -> str:
    """Return what a script prints in a process where nothing is patched."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


UNPATCHED = """
import sys
from unittest import TestCase, main
from django_socketio.backends.amqp import AMQPBackend
from django_socketio.testing import BackendContract

class Test(BackendContract, TestCase):
    carrier_breaks = False

    def make_backend(self):
        return AMQPBackend(URL, prefix=self.unique, timeout=self.timeout)

URL = sys.argv.pop()
main(verbosity=0)
"""


@pytest.mark.timeout(400)
def test_the_contract_with_real_threads(rabbitmq_server: RabbitMQ) -> None:
    run(UNPATCHED, rabbitmq_server.url)


def test_what_was_started_does_not_end_with_the_first_to_publish(make: Make, inbox: Inbox) -> None:
    """A thread of the system takes its greenlets with it."""
    backend = listening(make(), inbox, "t")
    assert gevent.get_hub().threadpool.spawn(backend.publish, "t", b"x").get() == 1
    assert backend.publish("t", b"y") == 1


def test_a_thread_of_the_system_may_be_the_first_and_end(make: Make) -> None:
    """It takes the greenlet with it that has the connection; the next to publish makes another."""
    backend = make()
    assert gevent.get_hub().threadpool.spawn(backend.publish, "t", b"x").get() == 0

    def publishes() -> bool:
        try:
            return backend.publish("t", b"x") == 0
        except BackendError:
            return False

    wait_until(publishes)


def test_a_delivery_may_publish_unsubscribe_and_stop(make: Make) -> None:
    backend, other = make(), make()
    seen = Inbox()

    def deliver(topic: str, payload: bytes) -> None:
        seen.append((topic, payload))
        if topic == "first":
            backend.unsubscribe(["first"])
            backend.publish("last", payload)
        elif payload == b"x":
            backend.stop()

    backend.start(deliver)
    backend.subscribe(["first", "last"])
    assert other.publish("first", b"x") == 1
    wait_until(lambda: other.publish("last", b"y") == 0)
    assert [each for each in seen if each[1] == b"x"] == [("first", b"x"), ("last", b"x")]
    assert other.publish("first", b"x") == 0


# Frames


@given(
    payloads=strategies.lists(strategies.binary(max_size=40)),
    cuts=strategies.lists(strategies.integers(min_value=0, max_value=800)),
)
def test_frames_arrive_in_any_pieces(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(frames.frame(frames.BODY, payload) for payload in payloads)
    reader = frames.Reader(40)
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise(ends)]
    read = [each for piece in pieces for each in reader.read(piece)]
    assert read == [(frames.BODY, payload) for payload in payloads]


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n", frames.frame(1, b"ab")[:-1] + b"\0", 41 * b"\1"]
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(frames.NotAMQP):
        list(frames.Reader(40).read(data))


def test_properties_are_found_after_any_others() -> None:
    """Brokers may add some, such as the time."""
    message = amqp.Message(b"", application_headers={"a": 1, "b": "c"}, priority=3, message_id="17")
    message.properties |= {"content_type": "text/plain", "delivery_mode": 2, "reply_to": "me"}
    header = bytes(12) + message._serialize_properties()
    assert frames.read_property(header, frames.CONTENT_TYPE) == b"text/plain"
    assert frames.read_property(header, frames.MESSAGE_ID) == b"17"
    assert frames.read_property(bytes(14), frames.MESSAGE_ID) == b""


@given(strategies.binary(max_size=60))
def test_properties_of_garbage(header: bytes) -> None:
    for flag in (frames.CONTENT_TYPE, frames.MESSAGE_ID):
        assert isinstance(frames.read_property(header, flag), bytes)
