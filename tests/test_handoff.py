"""Requests for sessions of other workers: to those of this host, and to those of others."""

import os
import random
import signal
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import gevent
import pytest

from django_socketio import envelope, handoff as module
from django_socketio.cluster import Answer as Told, Cluster, new_node, topic_of
from django_socketio.engine import Refused, new_sid, send_response
from django_socketio.envelope import Envelope
from django_socketio.handoff import Handoff
from django_socketio.hub import Hub
from django_socketio.protocol import json
from django_socketio.protocol.engineio import ErrorCode
from tests import clients
from tests.carrier import Carrier, Net
from tests.clients import Connection
from tests.deployment.cluster import Cluster as Deployment
from tests.engine.clients import PATH, Answer, Http, WebSocket, chunked, payload, request, text
from tests.engine.conftest import certificate as certificate
from tests.engine.resources import KEPT_GREENLETS, Resources
from tests.engine.served import Served, echo, message
from tests.engine.test_handshake import BAD_REQUEST, FORBIDDEN, UNKNOWN_SID, UPGRADE
from tests.services import Redis
from tests.support import UNIT, Server, wait_until

BEAT, SILENCE = UNIT, 12 * UNIT
LONG = 600 * UNIT


class Worker(Served):
    """An engine that is a node, of a host whose workers share a runtime directory."""

    def __init__(self, net: Net, directory: Path, **options: Any) -> None:
        self.carrier = Carrier(net)
        self.hub = Hub(self.carrier)
        self.cluster = Cluster(self.hub, beat=BEAT, silence=SILENCE)
        super().__init__(node=self.cluster.node, **options)
        self.handoff = Handoff(self.engine, self.cluster, directory)

    @property
    def node(self) -> str:
        return self.cluster.node

    def serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        sid = environ["QUERY_STRING"].partition("&sid=")[2].partition("&")[0]
        owner = self.handoff.owner(sid)
        if not (sid or self.engine.accepting) and self.handoff.pass_on(environ):
            return []
        if owner is None:
            return super().serve(environ, start_response)
        response = self.handoff.handle(environ, owner)
        return [] if response is None else send_response(response, start_response)

    def __enter__(self) -> "Worker":
        self.hub.start()
        self.cluster.start()
        super().__enter__()
        self.handoff.open(self.server.adopt)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.carrier.thaw()
        super().__exit__(*exc_info)
        self.stop()

    def stop(self) -> None:
        self.handoff.close()
        self.cluster.stop()
        self.hub.stop()

    def kill(self) -> None:
        """Have this node gone, as far as the carrier and its door tell."""
        self.carrier.kill()
        if self.handoff._door is not None:
            self.handoff._bell.stop()
            self.handoff._door.close()

    @property
    def counters(self) -> dict[str, int]:
        return self.engine.counters


class Workers:
    """Starts workers: those with a `host` in common are on one."""

    def __init__(self, path: Path, block: ExitStack) -> None:
        self.net = Net()
        self._path = path
        self._block = block

    def worker(self, host: str = "one", **options: Any) -> Worker:
        return self._block.enter_context(Worker(self.net, self._path / host, **options))

    def several(self, *hosts: str, **options: Any) -> list[Worker]:
        """Return a worker on each host, which have known each other for a while."""
        workers = [self.worker(host, **options) for host in hosts]
        names = {worker.node for worker in workers}
        wait_until(lambda: all(worker.cluster.nodes() == names for worker in workers))
        wait_until(lambda: not any(worker.cluster.is_alive(new_node()) for worker in workers))
        return workers


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    with ExitStack() as block:
        yield Workers(tmp_path, block)


@pytest.fixture
def two(workers: Workers) -> list[Worker]:
    """Return two workers of one host."""
    return workers.several("one", "one")


@pytest.fixture
def far(workers: Workers) -> list[Worker]:
    """Return two workers of different hosts."""
    return workers.several("one", "two")


APART = pytest.mark.parametrize("hosts", [("one", "one"), ("one", "two")], ids=["near", "far"])


def forgive(workers: list[Worker]) -> None:
    """Forget what was logged as an error, and had to be."""
    for worker in workers:
        worker.errors.clear()


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# Whose session it is


def test_a_sid_names_its_owner(workers: Workers) -> None:
    first, second = workers.several("one", "one")
    sid = first.poller().sid
    assert len(sid) == 30 and sid.startswith(first.node)
    assert (first.handoff.owner(sid), second.handoff.owner(sid)) == (None, first.node)
    assert len({first.poller().sid for _ in range(20)}) == 20


STRANGE_SIDS = [
    "",
    "x",
    "x" * 29,
    "x" * 31,
    "../../../../../../../etc/passwd",
    "../" + "x" * 27,
    "/" + "x" * 29,
    "x" * 29 + "\n",
    "x" * 29 + "\xe4",
    "x" * 29 + ".",
    "x" * 7 + "\x00" + "x" * 22,
    "__proto__" + "_" * 21 + "$",
    "%2e%2e%2f" + "x" * 21,
    "x" * 100_000,
]


@pytest.mark.parametrize("sid", STRANGE_SIDS, ids=range(len(STRANGE_SIDS)))
def test_what_is_no_sid_is_nobodys(workers: Workers, sid: str) -> None:
    assert workers.worker().handoff.owner(sid) is None


@APART
@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_a_session_whose_worker_is_unknown(
    workers: Workers, hosts: tuple[str, str], transport: str
) -> None:
    """It costs the carrier nothing, however many of them come."""
    worker, _ = workers.several(*hosts)
    before = len(worker.carrier.published)
    answer = worker.http().get(f"{PATH}{transport}&sid={new_node()}{new_sid()}", UPGRADE)
    assert answer.error == UNKNOWN_SID
    assert "gone" in answer.body.decode()
    assert set(worker.carrier.published[before:]) <= {"n"}
    assert not descriptors() - descriptors()


def test_an_unknown_session_of_this_worker(workers: Workers) -> None:
    worker = workers.worker()
    answer = worker.http().get(f"{PATH}polling&sid={worker.node}{new_sid()}")
    assert answer.error == UNKNOWN_SID
    assert "ended" in answer.body.decode()


# Handshakes at a worker that stops


def retire(*leaving: Worker) -> None:
    for worker in leaving:
        worker.engine.stop_accepting()
        worker.cluster.retire()


UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE


def test_a_handshake_goes_to_a_worker_that_stays(workers: Workers) -> None:
    first, second, third, _ = workers.several("one", "one", "one", "two")
    retire(first, second)
    wait_until(lambda: second.node not in first.cluster.staying())
    for _ in range(10):
        client = first.http()
        (opened,) = client.get(f"{PATH}polling").packets
        assert json.loads(opened[1:].encode())["sid"].startswith(third.node)
    assert first.counters["handed over"] == 10 and not second.counters["handed over"]


def test_a_websocket_goes_to_a_worker_that_stays(two: list[Worker]) -> None:
    leaving, staying = two
    retire(leaving)
    leaving.websocket()
    wait_until(lambda: len(staying.engine.sessions) == 1)
    assert not leaving.engine.sessions


@pytest.mark.parametrize("others", ["none", "far", "leaving", "dead"])
def test_a_handshake_without_anybody_who_stays(workers: Workers, others: str) -> None:
    first, second = workers.several("one", "two" if others == "far" else "one")
    retire(first)
    if others == "leaving":
        retire(second)
        wait_until(lambda: not first.cluster.staying())
    elif others == "dead":
        second.kill()
    elif others == "none":
        second.stop()
    answer = first.http().get(f"{PATH}polling")
    assert answer.status == UNAVAILABLE
    assert answer.headers["retry-after"] == "1"
    assert not first.engine.sessions and not second.engine.sessions


# On one host: the connection itself goes over


def test_a_poll(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    client = other.http()
    assert client.get(poller.target).packets == ["4hello"]
    assert other.counters["handed over"] == 1
    # It stays there: with requests for this session, and with others.
    client.request("GET", poller.target)
    owner.wait_polled(poller).send(message(b"binary"))
    assert client.answer().packets == [b"binary"]
    assert client.get("/page").status == 200
    assert owner.app.requests == [("GET", "/page", b"")]
    assert other.counters["handed over"] == 1 and not other.app.requests


def test_the_connection_of_a_page(two: list[Worker]) -> None:
    """Whatever was asked on it before was the other worker's."""
    owner, other = two
    poller, theirs = owner.poller(), other.poller()
    client = other.http()
    for number in range(3):
        assert client.post("/page", b"%d" % number).body == b"%d" % number
    owner.session(poller).send(message("one"))
    assert client.get(poller.target).packets == ["4one"]
    other.session(theirs).send(message("two"))
    assert client.get(theirs.target).packets == ["4two"]
    assert client.get("/page").status == 200
    assert len(other.app.requests) == 4 and not owner.app.requests


def messages(packets: list[str | bytes]) -> list[str | bytes]:
    """Return what the application gets of the packets."""
    return [packet[1:] if isinstance(packet, str) else packet for packet in packets]


BODIES: dict[str, list[str | bytes]] = {
    "small": ["4hello"],
    "several": ["4hello", b"binary", "4", b"", "4\U0001f600"],
    "large": ["4" + "x" * 90_000],
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("parts", [1, 10, 1000], ids=["at once", "in parts", "bytewise"])
def test_a_post(two: list[Worker], name: str, parts: int) -> None:
    owner, other = two
    poller = owner.poller()
    data = request("POST", poller.target, payload(*BODIES[name]))
    client = other.http().send_in_pieces(data, -(-len(data) // parts))
    assert client.answer().body == b"ok"
    assert owner.app.messages == messages(BODIES[name])
    assert other.counters["handed over"] == 1


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_body_that_comes_behind_its_head(two: list[Worker], cut: int) -> None:
    owner, other = two
    poller = owner.poller()
    data = request("POST", poller.target, b"4hello")
    client = other.http().send(data[:-cut])
    wait_until(lambda: other.counters["handed over"], what="the handover")
    assert client.send(data[-cut:]).answer().body == b"ok"
    assert owner.app.messages == ["hello"]


def test_a_chunked_body(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()
    head = request("POST", poller.target, headers={"Transfer-Encoding": "chunked"})
    answer = other.http().send_in_pieces(head + chunked(b"4hel", b"lo"), 20).answer()
    assert answer.body == b"ok"
    assert owner.app.messages == ["hello"]


@APART
def test_expect_100_continue(workers: Workers, hosts: tuple[str, str]) -> None:
    owner, other = workers.several(*hosts)
    poller = owner.poller()
    headers = {"Expect": "100-continue", "Content-Length": "6"}
    client = other.http().send(request("POST", poller.target, headers=headers))
    assert client.answer().status == 100
    assert client.send(b"4hello").answer().body == b"ok"
    assert owner.app.messages == ["hello"]


@APART
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_connection_that_is_to_be_closed(
    workers: Workers, hosts: tuple[str, str], version: str
) -> None:
    owner, other = workers.several(*hosts)
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    headers = {"Connection": "close"} if version == "1.1" else {}
    data = request("GET", poller.target, headers=headers)
    client = other.http().send(data.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
    assert client.answer().packets == ["4hello"]
    assert client.gone()


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT"])
def test_other_methods(two: list[Worker], method: str) -> None:
    owner, other = two
    poller = owner.poller()
    client = other.http()
    client.request(method, poller.target, headers={"Connection": "close"})
    head, _, body = client.rest().partition(b"\r\n\r\n")
    assert head[:12] == (b"HTTP/1.1 204" if method == "OPTIONS" else b"HTTP/1.1 400")
    assert bool(body) is (method == "PUT")
    assert other.counters["handed over"] == 1


@APART
def test_pipelined_requests_of_several_sessions(workers: Workers, hosts: tuple[str, str]) -> None:
    """What stands behind the head goes with it, and back, each to its owner, in order."""
    first, second = workers.several(*hosts)
    mine, theirs = first.poller(), second.poller()
    client = second.http()
    for number in range(10):
        client.send(
            request("POST", mine.target, b"4first %d" % number)
            + request("POST", theirs.target, b"4second %d" % number)
            + request("GET", "/page")
        )
    answers = [client.answer().body for _ in range(30)]
    assert answers == [b"ok", b"ok", b""] * 10
    assert first.app.messages == [f"first {number}" for number in range(10)]
    assert second.app.messages == [f"second {number}" for number in range(10)]
    assert len(first.app.requests) + len(second.app.requests) == 10


def test_an_upgrade(two: list[Worker]) -> None:
    owner, other = two
    owner.app.answer = echo
    poller = owner.poller()
    session = owner.session(poller)
    session.send(message("queued"))
    client = other._add(WebSocket(other.address, sid=poller.sid, behind=text("2probe")))
    assert client.receive() == "3probe"
    client.send("5", "4hello", b"binary")
    assert [client.receive() for _ in range(3)] == ["4queued", "4hello", b"binary"]
    assert session.transport.name == "websocket"
    assert owner.counters["upgraded"] == 1 and not other.engine.sessions


def test_an_upgrade_of_what_is_upgraded(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()
    client = owner.upgrade(poller)
    client.send("2probe", "5")
    second = other._add(WebSocket(other.address, sid=poller.sid))
    assert second.closed() == 1008


@pytest.mark.parametrize("how", ["at once", "close", "reset"])
def test_a_client_that_hangs_up_on_its_poll(two: list[Worker], how: str) -> None:
    owner, other = two
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    if how != "at once":
        owner.wait_polled(poller)
    client.reset() if how == "reset" else client.close()
    owner.wait_closed("transport close")


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_hangs_up_in_the_middle_of_its_post(two: list[Worker], how: str) -> None:
    owner, other = two
    poller = owner.poller()
    client = other.http().send(request("POST", poller.target, b"4" + b"x" * 50_000)[:20_000])
    getattr(client, how)()
    wait_until(lambda: other.counters["handed over"])
    other_poller = owner.poller()
    owner.session(other_poller).send(message("still here"))
    assert other.http().get(other_poller.target).packets == ["4still here"]


def test_a_worker_that_has_no_door_yet(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot hand over it relays, on one host too."""
    with monkeypatch.context() as patch:
        patch.setattr(Handoff, "open", lambda self, adopt: None)
        owner = workers.worker()
    other = workers.worker()
    for there, here in ((owner, other), (other, owner)):
        poller = there.poller()
        there.session(poller).send(message("hello"))
        assert here.http().get(poller.target).packets == ["4hello"]
        assert (here.counters["handed over"], here.counters["relayed"]) == (0, 1)


def test_requests_that_are_handed_over_are_not_logged(
    two: list[Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """The owner does that, or not, as for any request of its sessions."""
    owner, other = two
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    client = other.http()
    client.get("/page")
    with caplog.at_level("INFO", logger="django_socketio"):
        client.get(poller.target)
        client.get("/page")
        wait_until(lambda: len(owner.app.requests) == 1)
    assert [record.name for record in caplog.records] == ["django_socketio.engine.pywsgi"]
    assert '"GET /page HTTP/1.1" 200' in caplog.text


def test_requests_that_are_handed_over_do_not_hold_up_the_end(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    session = owner.wait_polled(poller)
    assert other.server.drain(0)
    assert not owner.server.drain(0)
    session.send(message("hello"))
    assert client.answer().packets == ["4hello"]


def test_a_failure_behind_a_handover(
    two: list[Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is sent into the connection that is another's."""
    owner, other = two
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    serve = other.serve

    def fail(environ: dict[str, Any], start_response: Any) -> Any:
        serve(environ, start_response)
        raise ZeroDivisionError

    monkeypatch.setattr(other.server, "application", fail)
    client = other.http()
    assert client.get(poller.target).packets == ["4hello"]
    assert client.get("/page").status == 200
    assert "ZeroDivisionError" in caplog.text
    forgive(two)


# The door


def test_who_is_at_the_door_of_a_worker_that_stops_is_served(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()
    owner.session(poller).send(message("last words"))
    owner.handoff._bell.stop()  # it is busy with something
    clients = [other.http().request("GET", poller.target) for _ in range(5)]
    wait_until(lambda: other.counters["handed over"] == 5)
    owner.session(poller).close()
    owner.handoff.close()
    assert clients[0].answer().packets == ["4last words", "1"]
    for client in clients[1:]:
        assert client.answer().error == UNKNOWN_SID


def test_a_door_that_is_shut(two: list[Worker]) -> None:
    """Whoever was on the way gets an answer."""
    owner, other = two
    poller = owner.poller()
    owner.handoff._bell.stop()
    owner.handoff._door.shutdown(socket.SHUT_RD)  # type: ignore[union-attr]
    answer = other.http().get(poller.target)
    assert answer.status == 503
    assert other.counters["lost: could not hand over"] == 1


def test_nobody_gets_into_a_door_that_is_being_closed(workers: Workers) -> None:
    """Or he would stay there unseen."""
    worker = workers.worker()
    outcomes: list[type[OSError] | None] = []
    with door_of(worker) as door:

        def come_again(sock: Any, data: bytes) -> None:
            sock.close()
            try:
                socket.send_fds(door, [b"again"], [door.fileno()])
                outcomes.append(None)
            except OSError as error:
                outcomes.append(type(error))

        worker.handoff._adopt = come_again
        worker.handoff._bell.stop()
        socket.send_fds(door, [b"once"], [door.fileno()])
        worker.handoff.close()
    assert outcomes == [BrokenPipeError]


def test_a_worker_that_stops_removes_its_door(two: list[Worker], tmp_path: Path) -> None:
    first, second = two
    doors = {f"{worker.node}.sock" for worker in two}
    assert {path.name for path in (tmp_path / "one").iterdir()} == doors
    for worker in two:
        assert stat.S_ISSOCK((tmp_path / "one" / f"{worker.node}.sock").stat().st_mode)
    first.handoff.close()
    first.handoff.close()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [f"{second.node}.sock"]


def test_doors_of_the_dead_are_removed(workers: Workers, tmp_path: Path) -> None:
    dead, living = workers.several("one", "one")
    directory = tmp_path / "one"
    dead.kill()
    dead.handoff._door = None
    (directory / "a note").touch()
    (directory / "other.sock").touch()
    (directory / f"{new_node()}.sock.d").mkdir()
    kept = {path.name for path in directory.iterdir()} - {f"{dead.node}.sock"}
    newcomer = workers.worker()
    assert {path.name for path in directory.iterdir()} == kept | {f"{newcomer.node}.sock"}
    assert f"{living.node}.sock" in kept


def test_the_directory_is_for_its_owner_alone(workers: Workers, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        workers.worker("deep/in/it")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "deep/in/it").stat().st_mode) == 0o700


def make_open(path: Path) -> None:
    path.mkdir()
    path.chmod(0o750)


def make_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o702)


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [make_open, make_writable, make_link, Path.touch])
def test_a_directory_that_cannot_be_trusted(
    workers: Workers, tmp_path: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "one")
    owner, other = workers.several("one", "one")
    assert caplog.text.count("Workers relay instead") == 2
    assert not (tmp_path / "one").is_dir() or not list((tmp_path / "one").iterdir())
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    assert other.http().get(poller.target).packets == ["4hello"]
    assert other.counters["relayed"] == 1


def test_a_directory_of_another_user(
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "one").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    workers.worker()
    assert "belongs to another user" in caplog.text
    assert not list((tmp_path / "one").iterdir())


def test_a_directory_whose_name_is_too_long(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    before = descriptors()
    worker = workers.worker("x" * 100)
    assert "Workers relay instead" in caplog.text
    worker.server.stop()
    assert len(descriptors() - before) <= 1


def door_of(worker: Worker) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.connect(str(worker.handoff._path(worker.node)))
    return sock


def open_file() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def open_directory() -> int:
    return os.open("/", os.O_RDONLY)


def open_pipe() -> int:
    end, other = os.pipe()
    os.close(other)
    return end


def open_listener() -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def open_datagrams() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()


def open_pair() -> int:
    sock, other = socket.socketpair()
    other.close()
    return sock.detach()


OPENERS = [open_file, open_directory, open_pipe, open_listener, open_datagrams, open_pair]


@pytest.mark.parametrize("number", [0, 1, 2, 30])
@pytest.mark.parametrize("data", [b"", b"GET", b"x" * 100_000, request("GET", "/stranger")])
def test_strangers_at_the_door(
    workers: Workers, number: int, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """They are of our own user at most, and may be mad nevertheless."""
    worker = workers.worker()
    before = descriptors()
    with door_of(worker) as door:
        for opener in OPENERS:
            fds = [opener() for _ in range(number)]
            socket.send_fds(door, [data], fds)
            for fd in fds:
                os.close(fd)
            assert worker.http().get("/page").status == 200
    for client in worker.clients:
        client.close()
    wait_until(lambda: not descriptors() - before, what="all descriptors")
    assert not worker.errors
    lost = 0 if not data else len(OPENERS) if not number else 3
    assert worker.counters["lost: no connection at the door"] == lost


def test_a_neighbour_that_hangs_holds_up_nobody_else(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DOOR_TIMEOUT", 6 * UNIT)
    worker, other = workers.several("one", "one")
    hung, poller = new_node(), other.poller()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(tmp_path / "one" / f"{hung}.sock"))
        clients = []
        for _ in range(600):  # more than a Unix socket holds
            clients.append(worker.http().request("GET", f"{PATH}polling&sid={hung}{new_sid()}"))
            if len(clients) % 50 == 0:
                assert worker.http().get("/page").status == 200
                assert worker.http().post(poller.target, b"4hello").body == b"ok"
        wait_until(lambda: worker.counters["lost: could not hand over"], what="a timeout")
        handed = worker.counters["handed over"] - len(other.app.messages)
        for client in clients[handed:]:
            assert client.answer().status == 503
    for client in clients[:handed]:
        assert client.gone()  # with the neighbour


def test_thousands_of_handovers_leave_nothing(two: list[Worker]) -> None:
    owner, other = two
    poller = owner.poller()

    def cycle(times: int) -> None:
        for number in range(times):
            with closing(Http(other.address)) as client:
                target = poller.target if number % 3 else poller.target + "x"
                answer = client.post(target, b"4hello")
                assert answer.status == (200 if number % 3 else 400)
            if number % 2:
                with closing(Http(other.address)) as client:
                    client.request("POST", poller.target, b"4")
                    client.reset()

    cycle(100)
    wait_until(lambda: Resources.now() == Resources.now(), what="peace")
    before = Resources.now()
    cycle(2000)
    wait_until(lambda: Resources.now().descriptors <= before.descriptors, what="all descriptors")
    after = Resources.now()
    assert after.greenlets <= before.greenlets + 2 * KEPT_GREENLETS
    assert after.watchers <= before.watchers
    assert other.counters["handed over"] >= 2000


# Between hosts: requests are relayed


def test_a_poll_from_another_host(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    session = owner.session(poller)
    client = other.http()
    session.send(message("hello"))
    session.send(message(b"\x00\xff binary"))
    assert client.get(poller.target).packets == ["4hello", b"\x00\xff binary"]
    client.request("GET", poller.target)
    owner.wait_polled(poller).send(message("later"))
    assert client.answer().packets == ["4later"]
    assert other.counters["relayed"] == 2 and not other.engine.sessions


@pytest.mark.parametrize("name", BODIES)
def test_a_post_from_another_host(far: list[Worker], name: str) -> None:
    owner, other = far
    poller = owner.poller()
    client = other.http()
    for _ in range(3):
        assert client.post(poller.target, payload(*BODIES[name])).body == b"ok"
    assert owner.app.messages == messages(BODIES[name]) * 3


def test_a_chunked_post_from_another_host(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    head = request("POST", poller.target, headers={"Transfer-Encoding": "chunked"})
    answer = other.http().send_in_pieces(head + chunked(b"4hel", b"lo"), 20).answer()
    assert answer.body == b"ok"
    assert owner.app.messages == ["hello"]


@APART
@pytest.mark.parametrize("declared", [True, False])
def test_more_than_the_maximal_payload(
    workers: Workers, hosts: tuple[str, str], declared: bool
) -> None:
    """It ends the session, wherever it arrives."""
    owner, other = workers.several(*hosts, max_payload=1000)
    poller = owner.poller()
    assert other.http().post(poller.target, b"4" + b"x" * 999).body == b"ok"
    if declared:
        client = other.http().request("POST", poller.target, b"4" + b"x" * 1000)
    else:
        head = request("POST", poller.target, headers={"Transfer-Encoding": "chunked"})
        client = other.http().send(head + chunked(*[b"x" * 400] * 3))
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    wait_until(lambda: owner.app.closed, what="the end of the session")


def test_an_upgrade_from_another_host_is_declined(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    answer = other.http().get(f"{PATH}websocket&sid={poller.sid}", UPGRADE)
    assert answer.error == BAD_REQUEST
    assert "polling" in answer.body.decode()
    assert other.http().get(poller.target).packets == ["4hello"]
    assert not owner.app.closed


@pytest.mark.parametrize("host", ["one", "two"])
def test_where_tls_ends_a_connection_stays(
    workers: Workers, certificate: dict[str, str], host: str
) -> None:
    """What has been decrypted cannot be handed over: the request is relayed, on one host too."""
    (owner,) = workers.several("one")
    other = workers.worker(host, tls=certificate)
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    client = other.http()
    assert client.get(poller.target).packets == ["4hello"]
    assert client.post(poller.target, b"4hello").body == b"ok"
    assert client.get(f"{PATH}websocket&sid={poller.sid}", UPGRADE).error == BAD_REQUEST
    client.request("GET", poller.target)
    owner.wait_polled(poller)
    client.close()
    owner.wait_closed("transport close")


@pytest.mark.parametrize("query", ["&transport=polling", "&sid=x", "&x=" * 200])
def test_a_query_that_can_be_read_in_two_ways(far: list[Worker], query: str) -> None:
    owner, other = far
    poller = owner.poller()
    answer = other.http().get(poller.target + query)
    assert answer.error == BAD_REQUEST
    assert not other.counters["relayed"] and not owner.app.closed


def allow_page(environ: dict[str, Any]) -> list[tuple[str, str]]:
    """Let https://page in, and what comes from no page."""
    origin = environ.get("HTTP_ORIGIN")
    if origin not in (None, "https://page"):
        raise Refused(ErrorCode.FORBIDDEN, "not this one", HTTPStatus.FORBIDDEN)
    return [("Access-Control-Allow-Origin", origin)] if origin else []


@APART
def test_the_page_may_read_the_answer(workers: Workers, hosts: tuple[str, str]) -> None:
    """Refusals, too: once, or the browser does not show it at all."""
    owner, other = workers.several(*hosts)
    owner.app.allow = other.app.allow = allow_page
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    page = {"Origin": "https://page"}
    unknown = f"{PATH}polling&sid={new_node()}{new_sid()}"
    for method, target, body, status in (
        ("GET", poller.target, None, 200),
        ("POST", poller.target, b"4hello", 200),
        ("OPTIONS", poller.target, None, 204),
        ("GET", unknown, None, 400),
        ("GET", f"{PATH}websocket&sid={poller.sid}x", None, 400),
        ("POST", poller.target, b"x" * 100_001, 413),
    ):
        answer = other.http().request(method, target, body, page).answer()
        assert answer.status == status, answer
        assert answer.headers["access-control-allow-origin"] == "https://page"
        if target is not poller.target or method == "OPTIONS":
            answer = other.http().request(method, target, body).answer()
            assert "access-control-allow-origin" not in answer.headers


@APART
def test_the_owner_decides_about_origins(workers: Workers, hosts: tuple[str, str]) -> None:
    owner, other = workers.several(*hosts)
    owner.app.allow = allow_page
    poller = owner.poller()
    elsewhere = {"Origin": "https://elsewhere"}
    for method, body in (("GET", None), ("POST", b"4hello")):
        answer = other.http().request(method, poller.target, body, elsewhere).answer()
        assert answer.error == FORBIDDEN
    assert owner.app.messages == [] and not owner.app.closed
    other.app.allow = allow_page
    unknown = f"{PATH}polling&sid={new_node()}{new_sid()}"
    assert other.http().get(unknown, elsewhere).error == FORBIDDEN


def test_what_the_owner_sees_of_a_relayed_request(far: list[Worker]) -> None:
    owner, other = far
    seen: list[dict[str, Any]] = []
    owner.app.allow = lambda environ: seen.append(environ) or []  # type: ignore[func-returns-value]
    poller = owner.poller()
    headers = {"Cookie": "a=b", "X-Name": "caf\xe9", "Host": "page:80"}
    other.http().post(poller.target, b"4hello", headers)
    here, environ = seen
    assert environ["HTTP_COOKIE"] == "a=b"
    assert environ["HTTP_X_NAME"] == "caf\xe9"
    assert environ["HTTP_HOST"] == "page:80"
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert (environ["SERVER_NAME"], environ["REQUEST_METHOD"]) == (here["SERVER_NAME"], "POST")


def test_a_young_worker_relays_at_once(workers: Workers) -> None:
    """It has not heard the owner yet, which is no word on its life."""
    (owner,) = workers.several("one")
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    other = workers.worker("two")
    assert other.http().get(poller.target).packets == ["4hello"]


def test_a_worker_that_stops_relays_what_still_comes(two: list[Worker]) -> None:
    """Its clients are asked to go elsewhere."""
    owner, other = two
    poller = owner.poller()
    owner.session(poller).send(message("hello"))
    client = other.http()
    client.get("/page")
    other.handoff.close()
    answer = client.get(poller.target)
    assert answer.packets == ["4hello"]
    assert answer.headers["connection"] == "close"
    assert other.counters["relayed"] == 1


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_hangs_up_on_a_relayed_poll(far: list[Worker], how: str) -> None:
    owner, other = far
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    owner.wait_polled(poller)
    getattr(client, how)()
    owner.wait_closed("transport close")
    wait_until(lambda: not sum(owner.cluster._busy.values()), what="the end of the poll")


def test_a_client_that_hangs_up_in_a_relayed_post(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    client = other.http().send(request("POST", poller.target, b"4" + b"x" * 50_000)[:20_000])
    client.close()
    wait_until(lambda: owner.app.closed, what="the end of the session")
    assert owner.app.messages == []


def test_the_owner_dies_during_a_relayed_poll(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    owner.wait_polled(poller)
    owner.kill()
    assert client.answer().status == 503
    assert client.get(poller.target).error == UNKNOWN_SID


def test_the_owner_says_good_bye_during_a_relayed_poll(far: list[Worker]) -> None:
    owner, other = far
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    owner.wait_polled(poller)
    owner.engine.close_all("server shutting down")
    assert client.answer().packets == ["1"]
    owner.stop()
    assert client.get(poller.target).error == UNKNOWN_SID


def test_the_relaying_worker_dies(far: list[Worker]) -> None:
    """What the session sends next is not delivered, so the session ends."""
    owner, other = far
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    session = owner.wait_polled(poller)
    other.carrier.kill()
    session.send(message("lost"))
    owner.wait_closed("transport close")
    client.close()


def test_an_outage_during_a_relayed_poll(workers: Workers) -> None:
    """It may have swallowed the answer, so nobody waits for it any longer."""
    owner, other = workers.several("one", "two")
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    owner.wait_polled(poller)
    workers.net.down = True
    wait_until(lambda: owner.hub.counters["outages"] and other.hub.counters["outages"])
    workers.net.down = False
    assert client.answer().status == 503
    forgive([owner, other])


def test_the_carrier_is_down_for_a_request(workers: Workers) -> None:
    owner, other = workers.several("one", "two")
    poller = owner.poller()
    workers.net.down = True
    assert other.http().get(poller.target).status == 503
    workers.net.down = False
    forgive([owner, other])


def test_a_worker_that_stops_lets_its_relayed_polls_go(workers: Workers) -> None:
    """The client goes on elsewhere, and misses nothing."""
    owner, other, third = workers.several("one", "two", "three")
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    session = owner.wait_polled(poller)
    other.stop()
    answer = client.answer()
    assert answer.packets == ["6"]
    assert answer.headers["connection"] == "close"
    session.send(message("hello"))
    assert third.http().get(poller.target).packets == ["4hello"]
    assert not owner.app.closed


def test_a_worker_that_stops_does_not_wait_long(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FAREWELL", 2 * UNIT)
    owner, other = workers.several("one", "two")
    poller = owner.poller()
    client = other.http().request("GET", poller.target)
    owner.wait_polled(poller)
    owner.carrier.freeze()
    other.stop()
    assert client.answer().status == 503


def test_two_polls_at_once_through_two_workers(workers: Workers) -> None:
    owner, *others = workers.several("one", "two", "three")
    poller = owner.poller()
    first = others[0].http().request("GET", poller.target)
    owner.wait_polled(poller)
    assert others[1].http().get(poller.target).error == BAD_REQUEST
    assert first.answer().packets == ["1"]
    owner.wait_closed("parse error")


def test_relayed_polls_are_not_logged(far: list[Worker], caplog: pytest.LogCaptureFixture) -> None:
    owner, other = far
    poller = owner.poller()
    with caplog.at_level("INFO", logger="django_socketio"):
        assert other.http().post(poller.target, b"4hello").body == b"ok"
        other.http().get("/page")
        wait_until(lambda: len(other.app.requests) == 1)
    assert [record.name for record in caplog.records] == ["django_socketio.engine.pywsgi"]


# What strangers on the carrier may say


def relay(worker: Worker, environ: Any, **options: Any) -> Any:
    """Return what the worker answers to a request that comes over the carrier."""
    asker = Cluster(Hub(Carrier(worker.carrier.net)))
    return asker.ask_one(topic_of(worker.node), "request", environ, timeout=LONG, **options)


@pytest.mark.parametrize(
    "environ",
    [
        None,
        [],
        {},
        {"REQUEST_METHOD": "GET", "QUERY_STRING": ""},
        {"REQUEST_METHOD": "GET", "QUERY_STRING": "EIO=4&transport=polling"},
        {"REQUEST_METHOD": "GET", "QUERY_STRING": "EIO=4&transport=websocket"},
        {"QUERY_STRING": "EIO=4&transport=polling&sid=x"},
        {"REQUEST_METHOD": "GET", "QUERY_STRING": 5},
    ],
)
def test_no_session_is_opened_over_the_carrier(workers: Workers, environ: Any) -> None:
    """It would be one that has not passed Django."""
    (worker,) = workers.several("one")
    with pytest.raises(Exception, match="could not"):
        relay(worker, environ)
    assert not worker.app.opened
    forgive([worker])
    assert worker.http().get("/page").status == 200


def test_no_socket_comes_over_the_carrier(far: list[Worker]) -> None:
    owner, _ = far
    poller = owner.poller()
    environ = {
        "REQUEST_METHOD": "GET",
        "QUERY_STRING": f"EIO=4&transport=websocket&sid={poller.sid}",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "page",
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in UPGRADE.items()},
    }
    assert relay(owner, environ).value[0] == 400
    assert not owner.app.closed


@pytest.mark.parametrize(
    "value",
    [None, [], [200], [200, [], 3], ["200", []], [999, []], [200, [["a"]]], [200, 5], {}, "ok"],
    ids=repr,
)
def test_an_answer_that_is_none(far: list[Worker], value: Any) -> None:
    owner, other = far
    poller = owner.poller()
    owner.cluster.answerers["request"] = lambda environ, attachments: Told(value)
    assert other.http().get(poller.target).status == 503
    wait_until(lambda: owner.app.closed)


def test_nonsense_about_sessions(far: list[Worker]) -> None:
    owner, _ = far
    poller = owner.poller()
    stranger = Carrier(owner.carrier.net)
    for name in ("hang up", "let go"):
        for args in ([], ["x"], [None], [poller.sid, 2], [owner.node + new_sid()]):
            body = json.dumps(["", "stranger", name, args])
            letter = envelope.encode(Envelope(envelope.REQUEST, (body,)))
            stranger.publish(topic_of(owner.node), letter)
    wait_until(lambda: owner.hub.counters["requests that failed"] == 4)
    forgive(far)
    owner.session(poller).send(message("still here"))
    assert owner.http().get(poller.target).packets == ["4still here"]


# Everything at once


class Roamer:
    """A polling client whose every request goes to some worker, on a connection new or old."""

    def __init__(self, workers: list[Worker], home: Worker, seed: int) -> None:
        self._random = random.Random(seed)
        self._workers = workers
        self._idle: list[Http] = []
        self._poller = home.poller()
        self.session = home.session(self._poller)
        self.received: list[str | bytes] = []

    def post(self, *packets: str | bytes) -> None:
        client = self._connect()
        size = self._random.choice([30, 1000, 10**6])
        data = request("POST", self._poller.target, payload(*packets))
        assert client.send_in_pieces(data, size).answer().body == b"ok"
        self._idle.append(client)

    def poll(self) -> None:
        client = self._connect()
        answer = client.get(self._poller.target)
        self.received += [item for item in answer.packets if item != "6"]
        self._idle.append(client)

    def _connect(self) -> Http:
        if self._idle and self._random.random() < 0.7:
            return self._idle.pop(self._random.randrange(len(self._idle)))
        return self._random.choice(self._workers).http()


def numbered(number: int) -> str | bytes:
    return f"4{number}" if number % 3 else b"%d" % number


@pytest.mark.parametrize(
    "hosts", [("one",) * 3, ("one", "two", "three"), ("one", "one", "two")], ids=repr
)
def test_nothing_is_lost_doubled_or_reordered(workers: Workers, hosts: tuple[str, ...]) -> None:
    several = workers.several(*hosts)
    total = 3000
    roamers = [Roamer(several, worker, seed) for seed, worker in enumerate(several)]

    def send(roamer: Roamer) -> None:
        for number in range(total):
            roamer.session.send(message(*messages([numbered(number)])))
            if number % 7 == 0:
                gevent.sleep(UNIT / 50)

    def post(roamer: Roamer) -> None:
        for start in range(0, total, 20):
            roamer.post(*map(numbered, range(start, start + 20)))

    def poll(roamer: Roamer) -> None:
        while len(roamer.received) < total:
            roamer.poll()

    jobs = [gevent.spawn(job, roamer) for roamer in roamers for job in (send, post, poll)]
    gevent.joinall(jobs, raise_error=True)
    for roamer, worker in zip(roamers, several, strict=True):
        assert roamer.received == [numbered(number) for number in range(total)]
        assert worker.app.messages == messages(roamer.received)
        assert not worker.app.closed
    apart, ways = len(set(hosts)), Counter[str]()
    for worker in several:
        ways += worker.counters
    assert bool(ways["handed over"]) is (apart < 3) and bool(ways["relayed"]) is (apart > 1)


# Processes


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@contextmanager
def cluster(redis: Redis, *hosts: str) -> Iterator[list[Server]]:
    apps = ["django_socketio", "tests.deployment", "tests.handover"]
    apart = len(set(hosts)) > 1
    with Deployment(redis.url, workers=len(hosts), hosts=apart, INSTALLED_APPS=apps) as deployment:
        yield deployment.servers


def is_polled(home: Server, connection: Connection) -> bool:
    """Tell whether a GET of the session waits at its worker."""
    with clients.open_connection(home.address) as asking:
        (answer,) = asking.connect().call("is polled", connection.sid)
        return bool(answer)


def poll(address: str, connection: Connection) -> Answer:
    with closing(start_poll(address, connection)) as client:
        return client.answer()


def start_poll(address: str, connection: Connection) -> Http:
    """Send a GET of a session to any worker."""
    host, _, port = address.partition(":")
    target = f"/socket.io/?EIO=4&transport=polling&sid={connection.sid}"
    return Http((host, int(port))).request("GET", target, headers={"Host": address})


@pytest.mark.timeout(2000 * UNIT)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_handed_over_does_not_need_the_other_worker(
    redis: Redis, number: signal.Signals
) -> None:
    with cluster(redis, "one", "one") as (home, other), ExitStack() as block:
        websocket = block.enter_context(clients.open_connection(home.address, transport="polling"))
        upgraded = websocket.connect()
        query = {"sid": websocket.sid}
        websocket.upgrade(clients.WebSocket(other.address, query=query))
        polling = block.enter_context(clients.open_connection(home.address, transport="polling"))
        polling.connect()
        waiting = block.enter_context(closing(start_poll(other.address, polling)))
        wait_until(lambda: upgraded.call("whoami") == [home.pid])
        other.signal(number)
        assert other.wait() == (0 if number is signal.SIGTERM else -number)
        assert upgraded.call("whoami") == [home.pid]
        polling.write(clients.EVENT, "/", 7, ["whoami"])
        assert waiting.answer().packets == [f"437[{home.pid}]"]


@pytest.mark.timeout(2000 * UNIT)
def test_a_relaying_worker_is_told_to_stop(redis: Redis) -> None:
    """Its clients go on through another, and miss nothing."""
    with cluster(redis, "one", "two") as (home, other), ExitStack() as block:
        polling = block.enter_context(clients.open_connection(home.address, transport="polling"))
        polling.connect()
        waiting = block.enter_context(closing(start_poll(other.address, polling)))
        wait_until(lambda: is_polled(home, polling), what="the relayed poll")
        other.signal(signal.SIGTERM)
        assert waiting.answer().packets == ["6"]
        assert other.wait() == 0
        polling.write(clients.EVENT, "/", 7, ["whoami"])
        assert poll(home.address, polling).packets == [f"437[{home.pid}]"]


@pytest.mark.timeout(2000 * UNIT)
def test_the_owner_is_told_to_stop(redis: Redis) -> None:
    """The relayed poll brings the end, as any other would."""
    with cluster(redis, "one", "two") as (home, other), ExitStack() as block:
        polling = block.enter_context(clients.open_connection(home.address, transport="polling"))
        polling.connect()
        waiting = block.enter_context(closing(start_poll(other.address, polling)))
        wait_until(lambda: is_polled(home, polling), what="the relayed poll")
        home.signal(signal.SIGTERM)
        assert waiting.answer().packets[-1] == "1"
        assert home.wait() == 0
        assert poll(other.address, polling).error == UNKNOWN_SID


@pytest.mark.timeout(2000 * UNIT)
def test_a_worker_that_is_frozen_keeps_its_sessions(redis: Redis) -> None:
    """Others serve theirs meanwhile, and what was handed over is served when it wakes."""
    with cluster(redis, "one", "one") as (home, other), ExitStack() as block:
        polling = block.enter_context(clients.open_connection(home.address, transport="polling"))
        polling.connect()
        polling.write(clients.EVENT, "/", 7, ["whoami"])
        home.signal(signal.SIGSTOP)
        try:
            waiting = block.enter_context(closing(start_poll(other.address, polling)))
            theirs = block.enter_context(clients.open_connection(other.address)).connect()
            for _ in range(20):
                assert theirs.call("whoami") == [other.pid]
        finally:
            home.signal(signal.SIGCONT)
        assert waiting.answer().packets == [f"437[{home.pid}]"]


@pytest.mark.timeout(2000 * UNIT)
def test_a_worker_that_starts_again_is_another(redis: Redis) -> None:
    with cluster(redis, "one", "one") as (home, other), ExitStack() as block:
        polling = clients.open_connection(home.address, transport="polling")
        home.signal(signal.SIGKILL)
        home.wait()
        home.start()
        for server in (home, other):
            assert poll(server.address, polling).error == UNKNOWN_SID
        again = block.enter_context(clients.open_connection(home.address, transport="polling"))
        assert again.sid[:8] != polling.sid[:8]
        polling.drop()
