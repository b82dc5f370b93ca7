"""The AMQP backend in bad times, each of which has cost a neighbour its messages."""

import contextlib
import logging
import math
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import kombu
import pytest

import django_socketio
from django_socketio import runtime
from django_socketio.backends import BackendError
from django_socketio.backends.amqp import AMQPBackend, frames
from django_socketio.backends.amqp.broker import Broker
from django_socketio.backends.amqp.link import Link, Lost
from tests.backends.test_amqp import Inbox, Proxy, listening, rows, run
from tests.services import RabbitMQ
from tests.sites import Site
from tests.support import ROOT, UNIT, wait_until

TIMEOUT = 40 * UNIT
PREFIX = "faults"

Make = Callable[..., AMQPBackend]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def server() -> Iterator[RabbitMQ]:
    """Return a broker of these tests' own, to do it harm."""
    with RabbitMQ() as server:
        yield server


@pytest.fixture
def proxy(server: RabbitMQ) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def make(server: RabbitMQ) -> Iterator[Make]:
    made = []

    def make(url: str = server.url, **options: Any) -> AMQPBackend:
        options = {"prefix": PREFIX, "timeout": TIMEOUT, "heartbeat": 1.0, **options}
        made.append(AMQPBackend(url, **options))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def backend(make: Make, inbox: Inbox) -> AMQPBackend:
    """Return a backend that listens to the topic t, and publishes for the first time here."""
    backend = listening(make(), inbox, "t")
    assert hears(backend, inbox)
    return backend


def hears(backend: AMQPBackend, inbox: Inbox, topic: str = "t") -> bool:
    """Return whether what is published arrives: once the backend has recovered it does."""
    sent = topic, b"%d" % random.getrandbits(64)
    with contextlib.suppress(BackendError, AssertionError):
        return bool(backend.publish(*sent)) and wait_until(lambda: sent in inbox, timeout=TIMEOUT)
    return False


def wait_for(backend: AMQPBackend, counter: str, count: int) -> None:
    wait_until(lambda: backend.counters[counter] >= count, what=f"{count} of {counter!r}")


def failure(call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(BackendError) as caught:
        call(*args)
    return str(caught.value)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def queues(server: RabbitMQ, *columns: str) -> list[list[str]]:
    """Return the queues of these tests."""
    table = rows(server.ctl("list_queues", "name", *columns))
    return [row for row in table if row[0].startswith(PREFIX)]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name.startswith("django_socketio")]


# While the broker is down


def test_callers_wait_a_moment_and_then_fail_at_once(make: Make, proxy: Proxy) -> None:
    backend = make(proxy.url, timeout=100 * TIMEOUT)
    backend.publish("t", b"x")
    proxy.refuse()
    with within(3):
        assert "refused" in failure(backend.publish, "t", b"x")
    with within(TIMEOUT):
        callers = [gevent.spawn(failure, backend.publish, "t", b"x") for _ in range(200)]
        assert all("refused" in caller.get() for caller in callers)
    assert backend.counters["publish failed"] == 201
    wait_until(lambda: not backend._carrier._publisher._calls)
    proxy.restore()
    wait_until(lambda: not failed(backend.publish, "t", b"x"))


def test_a_silent_host_fails_callers_at_once_too(make: Make, proxy: Proxy) -> None:
    backend = make(proxy.url, timeout=TIMEOUT / 2)
    backend.publish("t", b"x")
    proxy.hush()
    failure(backend.publish, "t", b"x")
    wait_until(lambda: backend.counters["publisher disconnected"])
    gevent.sleep(1)
    with within(TIMEOUT / 2):
        assert "confirmed nothing" in failure(backend.publish, "t", b"x")


def failed(call: Callable[..., object], *args: Any) -> bool:
    try:
        call(*args)
    except BackendError:
        return True
    return False


def test_an_outage_is_a_line_and_its_end_another(
    make: Make, inbox: Inbox, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    backend = listening(make(proxy.url), inbox, "t")
    for _ in range(2):
        caplog.clear()
        before = backend.counters["listener disconnected"]
        proxy.refuse()
        wait_until(lambda: lines(caplog))
        gevent.sleep(1)  # of several attempts
        proxy.restore()
        wait_until(lambda: hears(backend, inbox))
        wait_until(lambda: len(lines(caplog)) == 2)
        assert f"listener is cut off from 127.0.0.1:{proxy.port}//: " in lines(caplog)[0]
        assert "listener is connected again after " in lines(caplog)[1]
        assert backend.counters["listener disconnected"] == before + 1


def test_a_name_server_that_hangs_does_not_hold_anybody_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    resolve, hanging = gevent.socket.getaddrinfo, threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: hanging.wait() and resolve(*args))
    for _ in range(2):
        with within(2 * TIMEOUT):
            assert "no answer" in failure(backend.publish, "t", b"x")
    hanging.set()
    assert backend.publish("t", b"x") == 0


@pytest.mark.parametrize(
    ("part", "wrong", "why"),
    [("guest:guest@", "guest:wrong@", "ACCESS_REFUSED"), ("//", "//nowhere", "vhost /nowhere")],
)
def test_what_the_broker_refuses_is_told(
    make: Make, server: RabbitMQ, part: str, wrong: str, why: str
) -> None:
    start, _, end = server.url.rpartition(part)
    backend = make(start + wrong + end, timeout=10 * TIMEOUT)
    message = failure(backend.publish, "t", b"x")
    assert why in message
    assert "wrong" not in message


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00"])
def test_a_server_that_speaks_something_else(make: Make, answer: bytes) -> None:
    """The second is what a broker answers that has another version."""

    def serve(client: gevent.socket.socket, address: object) -> None:
        client.recv(8)
        client.sendall(answer)

    other = gevent.server.StreamServer(("127.0.0.1", 0), serve)
    other.start()
    try:
        backend = make(f"amqp://127.0.0.1:{other.server_port}//")
        assert failure(backend.publish, "t", b"x")
    finally:
        other.stop()


# Who is killed


def test_callers_that_are_killed_leave_nothing_behind(
    backend: AMQPBackend, inbox: Inbox, server: RabbitMQ
) -> None:
    """At any moment; the others of their round trip have their answers."""
    for _ in range(20):
        killed = [gevent.spawn(backend.publish, "t", b"killed") for _ in range(10)]
        killed += [gevent.spawn(backend.subscribe, [f"killed {number}"]) for number in range(10)]
        others = [gevent.spawn(backend.publish, "t", b"x") for _ in range(10)]
        others += [gevent.spawn(backend.subscribe, [f"other {number}"]) for number in range(10)]
        gevent.sleep(random.choice([0, 1e-5, 1e-4, 1e-3]))
        gevent.killall(killed)
        assert [other.get(timeout=TIMEOUT) for other in others] == 10 * [1] + 10 * [None]
    assert hears(backend, inbox)
    publisher, consumer = backend._carrier._publisher, backend._carrier._consumer
    wait_until(lambda: not publisher._sent and not publisher._calls)
    wait_until(lambda: not consumer._changes and consumer._asked is None)
    assert len(consumer._topics) == 21


def test_one_that_is_killed_before_its_message_was_sent_has_not_sent_it(
    backend: AMQPBackend, inbox: Inbox
) -> None:
    for _ in range(20):
        killed = gevent.spawn(backend.publish, "t", b"never")
        gevent.sleep(0)  # it has asked for it, and who sends it has not looked yet
        assert backend._carrier._publisher._calls
        killed.kill()
    assert hears(backend, inbox)
    assert ("t", b"never") not in inbox


def test_a_gevent_timeout_around_a_publish(
    backend: AMQPBackend, inbox: Inbox, server: RabbitMQ
) -> None:
    server.freeze()
    try:
        with pytest.raises(gevent.Timeout), gevent.Timeout(UNIT):
            backend.publish("t", b"x")
    finally:
        server.thaw()
    wait_until(lambda: hears(backend, inbox))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_publisher_that_is_killed_is_replaced(
    backend: AMQPBackend, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(now: float) -> None:
        raise gevent.GreenletExit

    monkeypatch.setattr(backend._carrier._publisher, "_check", die)
    assert "stopped" in failure(backend.publish, "t", b"x")
    assert hears(backend, inbox)
    assert backend.counters["publisher connected"] == 2


def test_a_defect_is_logged_and_is_not_the_end(
    backend: AMQPBackend,
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object) -> None:
        monkeypatch.undo()
        raise ArithmeticError("a test of what raises")

    for link in (backend._carrier._consumer, backend._carrier._publisher):
        monkeypatch.setattr(link, "_on_method", fail)
        wait_until(lambda: hears(backend, inbox))
        wait_until(lambda: "starts anew" in caplog.text)
        assert "ArithmeticError: a test" in caplog.text
        caplog.clear()


# Connections that go away


def test_a_connection_that_was_closed_costs_no_publish(
    make: Make, inbox: Inbox, proxy: Proxy
) -> None:
    """Neither one that the thread has seen to, nor one of which it has not heard yet."""
    listening(make(), inbox, "t")
    backend = make(proxy.url)
    for number in range(6):
        assert backend.publish("t", b"%d" % number) == 1
        proxy.cut()
        if number % 2:
            wait_for(backend, "publisher connected", number + 2)
    assert backend.counters["publish failed"] == 0


def test_all_connections_are_closed_by_an_operator(
    backend: AMQPBackend, inbox: Inbox, server: RabbitMQ
) -> None:
    """AMQP: a neighbour reconnects with its bindings gone, and sends but never receives."""
    topics = [f"topic {number}" for number in range(1200)]
    backend.subscribe(topics)
    for number in range(3):
        server.ctl("close_all_connections", "a test")
        wait_for(backend, "listener disconnected", number + 1)
        wait_until(lambda: hears(backend, inbox, topics[-1]))
        inbox.clear()
        assert [backend.publish(topic, b"x") for topic in topics] == len(topics) * [1]
        wait_until(lambda: [each[0] for each in inbox] == topics)


def test_whoever_listens_is_told_of_an_interruption(make: Make, inbox: Inbox, proxy: Proxy) -> None:
    backend, interruptions = make(proxy.url), list[float]()
    backend.interrupted = interruptions.append
    listening(backend, inbox, "t")
    assert not interruptions
    proxy.cut()
    wait_until(lambda: interruptions)
    assert backend.publish("t", b"x") == 1
    assert len(interruptions) == 1 and interruptions[0] > 0


def test_two_quick_losses_cost_no_subscription(make: Make, inbox: Inbox, proxy: Proxy) -> None:
    """The second comes before everything is bound again."""
    backend, publisher = make(proxy.url, timeout=20 * TIMEOUT), make()
    topics = [f"topic {number}" for number in range(3000)]
    listening(backend, inbox, *topics)
    for _ in range(5):
        before = backend.counters["listener connected"]
        proxy.cut()
        wait_for(backend, "listener connected", before + 1)
        gevent.sleep(random.uniform(0, 0.1))
    wait_until(lambda: not failed(backend.subscribe, ["done"]))
    assert [publisher.publish(topic, b"x") for topic in topics] == len(topics) * [1]
    wait_until(lambda: [each[0] for each in inbox] == topics)


def test_a_subscribe_while_the_listener_reconnects_just_works(
    make: Make, inbox: Inbox, proxy: Proxy
) -> None:
    backend, publisher = listening(make(proxy.url), inbox, "t"), make()
    for number in range(5):
        proxy.cut()
        backend.subscribe([str(number)])
        assert publisher.publish(str(number), b"x") == 1
        assert publisher.publish("t", b"x") == 1
        wait_until(lambda: len(inbox) == 2)
        inbox.clear()


def test_what_is_subscribed_in_the_end_counts_whatever_happened(
    make: Make, inbox: Inbox, proxy: Proxy
) -> None:
    """Many subscribe and unsubscribe while connections come and go."""
    backend, publisher = listening(make(proxy.url), inbox, "t"), make()
    topics = [str(number) for number in range(30)]
    ended = threading.Event()

    def change(mine: list[str]) -> set[str]:
        subscribed: set[str] = set()
        while not ended.is_set():
            topic = random.choice(mine)
            if topic in subscribed:
                backend.unsubscribe([topic])
                subscribed.remove(topic)
            elif failed(backend.subscribe, [topic]):
                backend.unsubscribe([topic])
            else:
                subscribed.add(topic)
        return subscribed

    changing = [gevent.spawn(change, topics[start::5]) for start in range(5)]
    for _ in range(8):
        gevent.sleep(random.uniform(0, 0.3))
        proxy.cut()
    ended.set()
    subscribed = set().union(*(each.get() for each in changing))
    wait_until(lambda: not failed(backend.subscribe, ["done"]))
    heard = {topic for topic in topics if publisher.publish(topic, b"x")}
    assert heard == subscribed
    wait_until(lambda: {topic for topic, _ in inbox} == heard)


def test_the_queue_is_deleted(backend: AMQPBackend, inbox: Inbox, server: RabbitMQ) -> None:
    (name,) = (name for (name,) in queues(server) if not name.endswith(".dropped"))
    server.ctl("delete_queue", name)
    wait_for(backend, "listener disconnected", 1)
    wait_until(lambda: hears(backend, inbox))


def delete_exchange(server: RabbitMQ) -> None:
    with kombu.Connection(server.url) as connection:
        connection.channel().exchange_delete(PREFIX)


@pytest.mark.parametrize("canary", [False, True])
def test_the_exchange_is_deleted(
    make: Make, server: RabbitMQ, monkeypatch: pytest.MonkeyPatch, canary: bool
) -> None:
    """Whoever publishes learns of it, unless a canary has, and it is made anew."""
    backend = make()
    assert backend.publish("t", b"x") == 0
    delete_exchange(server)
    monkeypatch.setattr("django_socketio.backends.amqp.publisher._FRESH", TIMEOUT)
    if canary:
        backend._carrier._publisher._confirmed_at = -math.inf
    else:
        assert "NOT_FOUND" in failure(backend.publish, "t", b"x")
    assert backend.publish("t", b"x") == 0
    assert backend.counters["publisher disconnected"] == 1


def test_a_node_whose_exchange_was_deleted_binds_its_topics_again(server: RabbitMQ) -> None:
    """Nothing tells a listener that its bindings are gone; the node notices that it is deaf."""
    path = "django_socketio.backends.amqp.AMQPBackend"
    options = {"url": server.url, "prefix": PREFIX}
    with Site(SOCKETIO_BACKEND={"BACKEND": path, "OPTIONS": options}) as site:
        client = site.connect()
        assert client.subscribe("room") == {"ok": True}
        delete_exchange(server)
        cluster = runtime.get_cluster()
        wait_until(lambda: cluster.counters["restarts of a deaf backend"] == 1)
        wait_until(lambda: not cluster.deaf)
        django_socketio.broadcast_channel("again", "room")
        assert client.event() == ["message", "again"]


def test_workers_that_start_before_the_broker(make: Make, inbox: Inbox, proxy: Proxy) -> None:
    proxy.refuse()
    backend = make(proxy.url)
    backend.start(inbox.deliver)
    failure(backend.subscribe, ["t"])
    proxy.restore()
    wait_until(lambda: not failed(backend.subscribe, ["t"]))
    wait_until(lambda: hears(backend, inbox))


def test_a_process_that_ends_does_not_wait_for_a_silent_host(make: Make, proxy: Proxy) -> None:
    backend = listening(make(proxy.url, timeout=100 * TIMEOUT), Inbox(), "t")
    backend.publish("t", b"x")
    proxy.hush()
    threads = [link._thread for link in (backend._carrier._publisher, backend._carrier._consumer)]
    with within(2.5):
        backend.stop()
    wait_until(lambda: not any(thread.is_alive() for thread in threads), timeout=5)


@pytest.mark.timeout(400)
def test_restarts_during_traffic(make: Make, inbox: Inbox, server: RabbitMQ) -> None:
    """Nothing arrives twice or out of order, and after each of them all arrives."""
    backend, publisher = listening(make(), inbox, "t"), make()
    ended = threading.Event()
    published: list[bytes] = []

    def publish() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            try:
                if publisher.publish("t", b"%d" % number):
                    published.append(b"%d" % number)
            except BackendError:
                gevent.sleep(UNIT / 10)

    publishing = gevent.spawn(publish)
    for number in range(4):
        wait_until(lambda: len(published) > 50)
        if number == 3:
            server.kill()
            server.start()
        else:
            server.ctl("stop_app")
            server.ctl("start_app")
        wait_until(lambda: not failed(backend.subscribe, ["u"]), timeout=10 * TIMEOUT)
        wait_until(lambda: hears(backend, inbox), timeout=10 * TIMEOUT)
        published.clear()
    ended.set()
    publishing.get()
    numbers = [int(payload) for topic, payload in inbox if len(payload) < 10]
    assert numbers == sorted(set(numbers))
    wait_until(lambda: {("t", payload) for payload in published} <= set(inbox))


def test_a_frozen_broker_is_noticed_by_its_silence(
    backend: AMQPBackend, inbox: Inbox, server: RabbitMQ
) -> None:
    server.freeze()
    try:
        wait_until(lambda: backend.counters["listener disconnected"], timeout=10)
        wait_until(lambda: backend.counters["publisher disconnected"], timeout=10)
    finally:
        server.thaw()
    wait_until(lambda: hears(backend, inbox), timeout=10)


def test_whoever_works_for_long_has_not_heard_silence() -> None:
    """Two heartbeats of work on what was read: meanwhile nobody listened."""

    class Slow(Link):
        role = "slow"

        def _on_frame(self, kind: int, payload: bytes) -> None:
            gevent.sleep(3 * UNIT)

        def _check(self, now: float) -> None:
            pass

    link = Slow(Broker(("amqp://",), PREFIX, TIMEOUT, 1, {}), Counter())
    link._heartbeat = UNIT
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link._sock = ours
        theirs.send(frames.frame(frames.HEARTBEAT, b"", channel=0))
        link._read()
        link._tick()
        gevent.sleep(3 * UNIT)
        with pytest.raises(Lost, match="silent"):
            link._tick()


def test_heartbeats_are_sent_while_nothing_happens(
    make: Make, inbox: Inbox, proxy: Proxy, server: RabbitMQ
) -> None:
    """AMQP: kombu#463. The broker ends a connection after two seconds without one."""
    backend = listening(make(proxy.url), inbox, "t")
    backend.publish("t", b"x")
    before = proxy.sent
    gevent.sleep(4)
    assert proxy.sent - before >= 8
    assert hears(backend, inbox)
    assert backend.counters["listener disconnected"] == 0
    assert backend.counters["publisher disconnected"] == 0


@pytest.mark.timeout(400)
def test_workers_that_restart_leave_no_queue(server: RabbitMQ) -> None:
    """AMQP: queues without consumers that fill up. Half of the workers are killed."""
    script = (
        "import sys, time\n"
        "from django_socketio.backends.amqp import AMQPBackend\n"
        "backend = AMQPBackend(sys.argv[1], prefix=sys.argv[2])\n"
        "backend.start(print)\n"
        "backend.subscribe(['t'])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "backend.stop()\n"
    )
    command = [sys.executable, "-c", script, server.url, PREFIX]
    wait_until(lambda: not queues(server))
    for _ in range(5):
        workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
            for _ in range(4)
        ]
        assert [worker.stdout.readline() for worker in workers] == 4 * [b"ready\n"]
        assert [row[1] for row in queues(server, "consumers")] == 8 * ["1"]
        for number, worker in enumerate(workers):
            if number % 2:
                worker.send_signal(signal.SIGKILL)
            worker.communicate()
        wait_until(lambda: not queues(server))


# What the broker does not take


@contextlib.contextmanager
def alarm(server: RabbitMQ) -> Iterator[None]:
    server.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        yield
    finally:
        server.ctl("set_vm_memory_high_watermark", "0.4")


def test_a_broker_that_is_short_of_memory(
    backend: AMQPBackend, inbox: Inbox, make: Make, server: RabbitMQ
) -> None:
    """Nothing of what it did not take arrives later, and subscribing goes on."""
    idle = make()
    gevent.sleep(0.3)  # as long as it is taken to be well without a question
    with alarm(server):
        with within(TIMEOUT + 1):
            assert "low on memory" in failure(backend.publish, "t", b"not taken")
        with within(TIMEOUT / 2):
            assert "low on memory" in failure(backend.publish, "t", b"not taken")
        assert failure(idle.publish, "t", b"not taken")
        backend.subscribe(["u"])
        gevent.sleep(3)  # longer than without heartbeats
        assert failure(backend.publish, "t", b"not taken")
        assert backend.counters["listener disconnected"] == 0
        inbox.clear()
    wait_until(lambda: hears(backend, inbox, "u"))
    wait_until(lambda: hears(idle, inbox, "t"))
    assert ("t", b"not taken") not in inbox


def test_an_alarm_of_a_moment_costs_nothing(backend: AMQPBackend, inbox: Inbox) -> None:
    publisher = backend._carrier._publisher
    publisher._on_method(frames.CONNECTION_BLOCKED, bytes(4) + frames.short(b"low on disk"))
    publishing = gevent.spawn(backend.publish, "t", b"late")
    gevent.sleep(UNIT)
    assert not publishing.ready()
    publisher._on_method(frames.CONNECTION_UNBLOCKED, bytes(4))
    publisher.ring()
    assert publishing.get() == 1
    wait_until(lambda: ("t", b"late") in inbox)


def test_a_queue_that_rejects_is_an_error_of_its_own_messages(
    backend: AMQPBackend, inbox: Inbox, server: RabbitMQ
) -> None:
    with kombu.Connection(server.url) as connection:
        channel = connection.channel()
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        queue = channel.queue_declare("", exclusive=True, arguments=arguments).queue
        channel.queue_bind(queue, PREFIX, "full")
        assert backend.publish("full", b"x") == 1
        good = [gevent.spawn(backend.publish, "t", b"%d" % number) for number in range(10)]
        bad = [gevent.spawn(failure, backend.publish, "full", b"x") for _ in range(10)]
        assert [each.get() for each in good] == 10 * [1]
        assert all("did not take it" in each.get() for each in bad)


def test_a_payload_that_is_too_long_is_nobody_else_s_trouble(
    make: Make, inbox: Inbox, server: RabbitMQ
) -> None:
    server.ctl("eval", "application:set_env(rabbit, max_message_size, 2000000).")
    try:
        backend = listening(make(), inbox, "t")
        small = [gevent.spawn(backend.publish, "t", b"%d" % number) for number in range(10)]
        long = gevent.spawn(failure, backend.publish, "t", bytes(3_000_000))
        small += [gevent.spawn(backend.publish, "t", b"%d" % number) for number in range(10, 20)]
        assert "larger than" in long.get()
        assert [each.get() for each in small] == 20 * [1]
        assert backend.publish("t", bytes(1_900_000)) == 1
    finally:
        server.ctl("eval", "application:set_env(rabbit, max_message_size, 134217728).")
    assert hears(backend, inbox)


def test_a_process_that_is_too_slow_loses_the_oldest_and_counts(
    make: Make, server: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    slow = make(max_queue_bytes=1_000_000, heartbeat=0)  # it will not read, nor send any
    quick, publisher = Inbox(), make(timeout=10 * TIMEOUT)
    may, heard = threading.Event(), Inbox()

    def deliver(topic: str, payload: bytes) -> None:
        may.wait()
        heard.deliver(topic, payload)

    slow.start(deliver)
    slow.subscribe(["t"])
    # Or the kernel may take all of it, where it has 32 MB for a connection.
    link_socket = slow._carrier._consumer._sock
    link_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 65_536)
    listening(make(), quick, "t")
    body = bytes(10_000)

    def publish(start: int) -> None:
        for number in range(start, 2000, 20):
            assert publisher.publish("t", b"%d " % number + body) == 1

    gevent.joinall([gevent.spawn(publish, start) for start in range(20)], raise_error=True)
    sizes = [int(row[1]) for row in queues(server, "message_bytes")]
    assert max(sizes) <= 1_000_000
    assert sum(sizes) > 500_000
    wait_until(lambda: len(quick) == 2000)
    may.set()
    publisher.publish("t", b"last")
    wait_until(lambda: heard[-1:] == [("t", b"last")])
    assert 0 < slow.counters["dropped: queue full"] <= 2001 - len(heard)
    assert [payload for _, payload in heard] == [p for _, p in quick if ("t", p) in set(heard)]
    assert sum("queue was full" in line for line in lines(caplog)) == 1


STRANGER = """
import re, sys
from threading import Event
from django_socketio.backends.amqp import AMQPBackend

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

heard = []
backend = AMQPBackend(sys.argv[1], prefix=sys.argv[2], max_queue_bytes=100 << 20)
backend.start(lambda topic, payload: heard.append(payload))
backend.subscribe(["t"])
before = peak()
print("ready", flush=True)
sys.stdin.readline()
while backend.publish("t", b"ours") != 1 or b"ours" not in heard:
    Event().wait(0.01)
counters = backend.counters
print(peak() - before, counters["dropped: of a stranger"], counters["listener connected"])
print({each for each in heard if each != b"ours"})
backend.stop()
"""


def test_a_stranger_s_message_neither_kills_nor_bloats(server: RabbitMQ) -> None:
    command = [sys.executable, "-c", STRANGER, server.url, PREFIX]
    pipe = subprocess.PIPE
    wait_until(lambda: not queues(server))
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        (name,) = (name for (name,) in queues(server) if not name.endswith(".dropped"))
        with kombu.Connection(server.url) as connection:
            channel = connection.channel()
            producer = connection.Producer(channel)
            ours = {"content_type": "application/octet-stream", "content_encoding": "binary"}
            big = bytes(40_000_000)
            producer.publish(big, exchange="", routing_key=name)
            producer.publish(big, exchange="", routing_key=name, **ours)
            producer.publish(big, exchange=PREFIX, routing_key="t")
            producer.publish({"a": 1}, exchange=PREFIX, routing_key="t", headers={"x": 1})
            producer.publish(b"\x80\x04garbage", exchange=PREFIX, routing_key="t", **ours)
        process.stdin.write("go\n")
        process.stdin.flush()
        bloat, strangers, connections = map(int, process.stdout.readline().split())
        assert process.stdout.readline() == "{b'\\x80\\x04garbage'}\n"  # for the hub to judge
        process.communicate()
    assert (strangers, connections) == (4, 1)
    assert bloat < 20


# The other greenlets


@pytest.mark.timeout(300)
def test_others_have_their_turn_in_a_flood(make: Make, proxy: Proxy) -> None:
    """Of messages whose delivery costs time, on a connection that always has more to read."""
    backend, publisher = make(), make(timeout=10 * TIMEOUT)
    served = 0

    def deliver(topic: str, payload: bytes) -> None:
        nonlocal served
        served += 1
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.002:
            pass

    backend.start(deliver)
    backend.subscribe(["t"])
    flood = [gevent.spawn(publisher.publish, "t", bytes(100)) for _ in range(1500)]
    wait_until(lambda: served > 20)
    longest, echoes = 0.0, 0
    left, right = gevent.socket.socketpair()
    with left, right:
        echo = gevent.spawn(lambda: [right.sendall(x) for x in iter(lambda: right.recv(1), b"")])
        while served < 1400:
            begin = time.perf_counter()
            left.sendall(b"x")
            left.recv(1)
            longest, echoes = max(longest, time.perf_counter() - begin), echoes + 1
        left.shutdown(gevent.socket.SHUT_WR)
        gevent.joinall([*flood, echo], raise_error=True)
    assert echoes > 20
    assert longest < 20 * UNIT


# Without gevent

UNPATCHED = """
import sys, threading
import django_socketio
from django_socketio import runtime
from django_socketio.backends import BackendError
from django_socketio.backends.amqp import AMQPBackend

heard, ended, errors = set(), threading.Event(), []
backend = AMQPBackend(sys.argv[1], prefix=sys.argv[2], timeout=1, heartbeat=1)
backend.start(lambda topic, payload: heard.add(payload))
backend.subscribe(["t"])

def work(number):
    count = 0
    while not ended.is_set():
        count += 1
        topic = f"{number} {count}"
        try:
            backend.subscribe([topic])
            backend.publish("t", topic.encode())
        except BackendError as error:
            errors.append(error)
        except BaseException as error:
            print("wrong", repr(error), flush=True)
        backend.unsubscribe([topic])

threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.readline()
ended.set()
for thread in threads:
    thread.join(10)
print(sum(thread.is_alive() for thread in threads), flush=True)
token = 0
while b"%d" % token not in heard:
    token += 1
    try:
        backend.publish("t", b"%d" % token)
    except BackendError:
        pass
    ended.wait() and threading.Event().wait(0.1)
print("heard", len(backend._carrier._consumer._topics), flush=True)
backend.stop()
print(threading.active_count(), flush=True)
"""


def test_real_threads_survive_outages(server: RabbitMQ) -> None:
    command = [sys.executable, "-W", "error", "-c", UNPATCHED, server.url, PREFIX]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            gevent.sleep(0.3)
            server.ctl("close_all_connections", "a test")
        server.ctl("stop_app")
        server.ctl("start_app")
        output, _ = process.communicate("end\n")
    assert output == "0\nheard 1\n1\n"


def test_a_script_that_publishes_and_ends(server: RabbitMQ) -> None:
    """It waits for nothing at its end, and may publish there."""
    script = (
        "import atexit, sys\n"
        "from django_socketio.backends.amqp import AMQPBackend\n"
        "backend = AMQPBackend(sys.argv[1])\n"
        "atexit.register(lambda: print(backend.publish('t', b'last')))\n"
        "print(backend.publish('t', b'x'))\n"
    )
    assert run(script, server.url) == "0\n0\n"
