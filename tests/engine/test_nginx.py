"""
Both fronts behind nginx, which keeps its connections to them for whoever comes next.

Each request that nginx lets through is one request here and has one answer, and nobody gets what
is another's.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import gevent
import pytest
from websockets.frames import Opcode

from tests.services import Nginx
from tests.support import ROOT, UNIT, wait_until

from . import served as single, workers
from .clients import Http, Poller, WebSocket, chunked, frame, request
from .served import Served, echo, message
from .test_body import MALFORMED
from .test_handshake import UPGRADE
from .test_pywsgi import AMBIGUOUS, SECOND

STREAMED = "proxy_request_buffering off;"


@pytest.fixture(params=[single.Served, workers.Served], ids=["pywsgi", "gunicorn"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with request.param(max_payload=50_000) as served:
        served.app.answer = echo
        yield served


@pytest.fixture(params=["", STREAMED], ids=["whole bodies", "streamed bodies"])
def nginx(request: pytest.FixtureRequest, served: Served) -> Iterator[Nginx]:
    with Nginx(served.server.server_port, request.param) as nginx:
        yield nginx


class Behind:
    """Clients of nginx."""

    def __init__(self, nginx: Nginx) -> None:
        self.address = ("127.0.0.1", nginx.port)
        self._stack = ExitStack()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _open(self, kind: Callable[..., Any], **options: Any) -> Any:
        client = kind(self.address, **options)
        self._stack.callback(client.close)
        return client

    def http(self) -> Http:
        client: Http = self._open(Http)
        return client

    def poller(self) -> Poller:
        client: Poller = self._open(Poller)
        return client

    def websocket(self, **options: Any) -> WebSocket:
        client: WebSocket = self._open(WebSocket, **options)
        return client


@pytest.fixture
def behind(nginx: Nginx) -> Iterator[Behind]:
    with Behind(nginx) as behind:
        yield behind


class Bystanders:
    """Clients who want nothing but their own answers, over the connections that are there."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind
        self._client = behind.http()
        self.asked = 0

    def check(self) -> None:
        for client in (self._client, self._behind.http()):
            for _ in range(3):
                self.asked += 1
                token = b"token %d" % self.asked
                answer = client.post("/mine", token)
                assert (answer.status, answer.body) == (200, token)


def body_of(data: bytes) -> list[bytes]:
    return [
        request("POST", "/page", headers={"Transfer-Encoding": "chunked"}) + data + SECOND,
        request("POST", "/unread", headers={"Transfer-Encoding": "chunked"}) + data + SECOND,
    ]


HOSTILE = [data + SECOND for data in AMBIGUOUS.values()]
HOSTILE += [item for data in MALFORMED.values() for item in body_of(data)]
HOSTILE += body_of(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n") + body_of(b"5;x=y\r\nhello\r\n0\r\n\r\n")


@pytest.mark.timeout(4000 * UNIT)
def test_smuggling(served: Served, nginx: Nginx, behind: Behind) -> None:
    """What nginx takes for one request is one here, whatever else could be made of it."""
    bystanders = Bystanders(behind)
    for data in HOSTILE:
        logged = len(nginx.access)
        client = behind.http().send(data)
        client.sock.settimeout(UNIT)
        with suppress(OSError):
            client.receive()
        asked = bystanders.asked
        bystanders.check()
        client.close()
        expected = logged + bystanders.asked - asked
        wait_until(lambda expected=expected: len(nginx.access) > expected, what=repr(data))  # type: ignore[misc]
        gevent.sleep(0)
    check_one_for_one(served, nginx)


_LINE = re.compile(r'\d+ "(.*)" (\d+) (\S+)$')


def check_one_for_one(served: Served, nginx: Nginx) -> None:
    """Compare what nginx has sent on with what has been seen: the same, and each once."""
    sent: Counter[tuple[str, ...]] = Counter()
    given_up: Counter[tuple[str, ...]] = Counter()
    for line in nginx.access:
        match = _LINE.match(line)
        assert match, line
        what = tuple(match[1].partition("?")[0].split()[:2])
        if match[3] == "200":
            sent[what] += 1
        elif match[2] == "499":  # by its client, who may have been answered or not
            given_up[what] += 1
        elif match[3] != "-":
            assert match[3] in ("400", "431"), line
    seen = Counter((method, path) for method, path, _ in served.app.requests)
    assert not sent - seen
    assert not seen - sent - given_up


def aborts_a_body(behind: Behind) -> None:
    client = behind.http().send(request("POST", "/page", bytes(40_000))[:20_000])
    gevent.sleep(UNIT / 5)
    client.reset()


def aborts_chunks(behind: Behind) -> None:
    head = request("POST", "/page", headers={"Transfer-Encoding": "chunked"})
    client = behind.http().send(head + b"ffff\r\nhello")
    gevent.sleep(UNIT / 5)
    client.reset()


def is_answered_before_its_body(behind: Behind) -> None:
    client = behind.http().send(request("POST", "/unread", bytes(60_000))[:20_000])
    gevent.sleep(UNIT / 5)
    client.reset()


def sends_what_nobody_reads(behind: Behind) -> None:
    for size in (10, 60_000, 900_000):
        with suppress(ConnectionError, EOFError):
            assert behind.http().post("/unread", SECOND + bytes(size)).status == 200


def sends_chunks_that_nobody_reads(behind: Behind) -> None:
    head = request("POST", "/unread", headers={"Transfer-Encoding": "chunked"})
    assert behind.http().send(head + chunked(SECOND, SECOND)).answer().status == 200


def expects_100(behind: Behind) -> None:
    for target in ("/unread", "/page"):
        headers = {"Expect": "100-continue", "Content-Length": str(len(SECOND))}
        client = behind.http().send(request("POST", target, headers=headers) + SECOND)
        answer = client.answer()
        assert (answer if answer.status != 100 else client.answer()).status == 200


def wants_heads(behind: Behind) -> None:
    client = behind.http()
    for _ in range(3):
        client.request("HEAD", "/page")
        assert client._read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        client._unread = b""


def sends_too_much(behind: Behind) -> None:
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        poller = behind.poller()
        body = bytes(60_000) if not headers else chunked(bytes(30_000), bytes(30_000))
        data = request("POST", poller.target, None if headers else body, headers)
        answer = poller.posting.send(data + (body if headers else b"")).answer()
        assert answer.status == 413


def hangs_up_on_a_poll(behind: Behind) -> None:
    poller = behind.poller()
    poller.start_get()
    gevent.sleep(UNIT / 5)
    poller.close()


def is_refused_an_upgrade(behind: Behind) -> None:
    for target in ("/engine.io/?EIO=4&transport=websocket&sid=x", "/page"):
        answer = behind.http().get(target, {**UPGRADE, "Content-Length": "0"})
        assert answer.status in (200, 400)


def drops_a_websocket(behind: Behind) -> None:
    client = behind.websocket()
    client.send_raw(frame(Opcode.TEXT, "4half")[:5])
    client.reset()


def closes_a_websocket(behind: Behind) -> None:
    client = behind.websocket()
    client.send_raw(frame(Opcode.CLOSE, struct.pack("!H", 1000)) + SECOND)
    with suppress(ConnectionResetError):  # nginx may have closed with the answer still to come
        assert client.closed() == 1000


UNPLEASANT = [
    aborts_a_body,
    aborts_chunks,
    is_answered_before_its_body,
    sends_what_nobody_reads,
    sends_chunks_that_nobody_reads,
    expects_100,
    wants_heads,
    sends_too_much,
    hangs_up_on_a_poll,
    is_refused_an_upgrade,
    drops_a_websocket,
    closes_a_websocket,
]


@pytest.mark.timeout(4000 * UNIT)
def test_no_connection_is_poisoned(served: Served, nginx: Nginx, behind: Behind) -> None:
    """Whatever one client does, the next has its own answers on the same connection."""
    bystanders = Bystanders(behind)
    for number, act in enumerate(UNPLEASANT * 2):
        act(behind)
        if number % 2:
            gevent.sleep(UNIT / 10)
        bystanders.check()
    assert "/smuggled" not in {path for _, path, _ in served.app.requests}
    wait_until(lambda: not served.engine.sessions or end_polls(served), what="the end of sessions")


def end_polls(served: Served) -> bool:
    """End those sessions of which nginx does not know that they are over."""
    served.engine.close_all("server shutting down")
    served.engine.stop()
    return not served.engine.sessions


def test_each_gets_its_own(served: Served, behind: Behind) -> None:
    """CVE-2020-35681: an answer that went to another client."""
    pollers = [behind.poller() for _ in range(20)]
    websockets = [behind.websocket() for _ in range(20)]
    for poller in pollers:
        poller.start_get()
    for poller in pollers:
        served.wait_polled(poller)
    for client in reversed([*pollers, *websockets]):
        served.session(client).send(message(client.sid))
    assert [client.end_get() for client in pollers] == [[f"4{client.sid}"] for client in pollers]
    assert [client.receive() for client in websockets] == [f"4{item.sid}" for item in websockets]


def use(served: Served, behind: Behind) -> None:
    """Do what a client does: poll, post, upgrade, talk, leave."""
    poller = behind.poller()
    assert poller.post("4hello", b"binary").body == b"ok"
    assert poller.get() == ["4hello", b"binary"]
    poller.start_get()
    session = served.wait_polled(poller)
    websocket = behind.websocket(sid=poller.sid)
    websocket.send("2probe")
    assert websocket.receive() == "3probe"
    assert poller.end_get() == ["6"]
    websocket.send("5", "4over there")
    assert websocket.receive() == "4over there"
    session.send(message(b"x" * 40_000))
    assert websocket.receive() == b"x" * 40_000
    websocket.answers = False  # or nginx, which has closed then, might reset
    websocket.send_raw(frame(Opcode.CLOSE, struct.pack("!H", 1000)))
    assert websocket.closed() == 1000
    served.wait_closed("transport close")


def test_a_session(served: Served, behind: Behind) -> None:
    use(served, behind)


def test_a_client_that_hangs_up_on_its_get(served: Served, behind: Behind) -> None:
    poller = behind.poller()
    poller.start_get()
    served.wait_polled(poller)
    poller.close()
    served.wait_closed("transport close")


@pytest.mark.parametrize("served", [single.Served, workers.Served], indirect=True)
def test_the_configuration_of_the_example(served: Served) -> None:
    """It is for several hosts; here all of them are this one."""
    example = (ROOT / "example_project/deploy/nginx.conf").read_text()
    text = example[example.index("http {") :]
    text = re.sub(
        r"server app\d:9000", f"server 127.0.0.1:{served.server.server_port}", text, count=1
    )
    text = re.sub(r"\n *server app\d:9000;", "", text)
    text = text.replace("listen 80;", "listen 127.0.0.1:{port};").replace("/dev/stdout", "access")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {kind};\n" for kind in kinds)
    with Nginx(0, configuration=text.replace("http {", f"http {{\n{paths}")) as nginx:
        with Behind(nginx) as behind:
            use(served, behind)
