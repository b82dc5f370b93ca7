"""What waits for a client: in order, whole, counted, bounded, and left out where it may be."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import gevent
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from websockets.frames import Opcode

from django_socketio.engine import Frame, LossyFrame, Session, State, polling
from django_socketio.engine.frames import NOOP, Keyed
from django_socketio.engine.latest import Latest
from django_socketio.engine.outbox import Outbox
from django_socketio.engine.polling import PollingTransport
from django_socketio.engine.websocket import WebSocketTransport
from tests.support import UNIT, wait_until

from .clients import PATH, WebSocket, frame
from .served import Served, message

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
MAX = 50_000
SIZES = st.sampled_from([12, 12, 50, 120, 130, 300, 1_000, 5_000, 20_000, MAX, 3 * MAX])
SMALL = st.sampled_from([12, 50, 120, 130, 300, 1_000, 5_000])
KEYS = st.sampled_from(["a", "b", "c"])


# A loop, a kernel and a clock in the hands of the test


class Loop:
    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []
        self.writers: list[Watcher] = []

    def run_callback(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def io(self, fd: int, events: int) -> "Watcher":
        watcher = Watcher()
        if events == 2:
            self.writers.append(watcher)
        return watcher

    def turn(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


class Watcher:
    callback: Callable[[], None] | None = None
    closed = False

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def close(self) -> None:
        self.closed = True


class Stalled:
    """Stands for the lane of those that take nothing."""

    delay = 10.0

    def __init__(self) -> None:
        self.since: dict[Any, int] = {}
        self.starts = itertools.count()

    def add(self, item: Any) -> None:
        self.since[item] = next(self.starts)

    def discard(self, item: Any) -> None:
        self.since.pop(item, None)


class Kernel:
    """A socket that takes as many bytes as it is allowed to."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.room = 0
        self.closed = 0

    def fileno(self) -> int:
        return 99

    def send(self, data: Any) -> int:
        assert len(data), "nothing to send"
        if not self.room:
            raise BlockingIOError
        sent = min(self.room, len(data))
        self.taken += data[:sent]
        self.room -= sent
        return sent

    def close(self) -> None:
        self.closed += 1


class TLS(Kernel):
    """Takes a record as a whole, and one that it has refused must come again as it was."""

    insists = b""

    def pending(self) -> int:
        return 0

    def send(self, data: Any) -> int:
        assert 0 < len(data) <= 16384
        assert bytes(data).startswith(self.insists)
        if self.room < len(data):
            self.insists = bytes(data)
            raise BlockingIOError
        self.insists = b""
        return super().send(data)


class Owner:
    slow: str | None = None

    def too_slow(self, why: str) -> None:
        assert self.slow is None
        self.slow = why


def frames_in(data: bytes) -> list[bytes]:
    """Return the payloads of whole WebSocket frames, none of them torn."""
    found, at = [], 0
    while at < len(data):
        assert data[at] == 0x81
        size, start = data[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
        elif size == 127:
            size, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
        at = start + size
        found.append(data[start:at])
    assert at == len(data), "half a frame"
    return found


def number_of(payload: bytes) -> int:
    return int(payload[1:11])


class Model:
    """What was sent, and what of it may be missing at the end."""

    def __init__(self) -> None:
        self.sent: list[str | None] = []  # the kind of each: "", "volatile", or its key
        self.dropped: list[int] = []

    def text(self, size: int, kind: str) -> bytes:
        self.sent.append(kind)
        return b"%010d" % (len(self.sent) - 1) + b"x" * (size - 12)

    def frame(self, size: int) -> Frame:
        return Frame.message(self.text(size, ""))

    def lossy(self, size: int, key: str | None) -> LossyFrame:
        text, number = self.text(size, key or "volatile"), len(self.sent) - 1
        return LossyFrame(text, key=key, dropped=lambda: self.dropped.append(number))

    def check(self, received: Iterable[bytes], *, complete: bool) -> None:
        numbers = [number_of(payload) for payload in received]
        assert numbers == sorted(set(numbers)), "out of order, or twice"
        assert not set(numbers) & set(self.dropped)
        assert len(set(self.dropped)) == len(self.dropped)
        for number in self.dropped:
            kind = self.sent[number]
            assert kind == "volatile" or kind in self.sent[number + 1 :], "the latest is missing"
        if complete:
            assert sorted(numbers + self.dropped) == list(range(len(self.sent)))


class WebSocketSends(RuleBasedStateMachine):
    """Whatever is sent and however the kernel takes it."""

    kernel: type[Kernel] = Kernel

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.sock, self.owner, self.model = Loop(), self.kernel(), Owner(), Model()
        self.stalled: Any = Stalled()
        self.transport = WebSocketTransport(
            self.sock,
            self.owner,  # type: ignore[arg-type]
            self.loop,
            Outbox(self.loop),
            self.stalled,
            max_payload=100,
            max_fragments=10,
            max_buffer=MAX,
        )
        self.largest = 0

    @property
    def behind(self) -> bool:
        return bool(self.stalled.since)

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def send(self, sizes: list[int]) -> None:
        for size in sizes:
            if size + 14 > self.largest:
                self.largest = size + 14
            self.transport.send(self.model.frame(size))

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def send_volatile(self, sizes: list[int]) -> None:
        alive, was_behind = not self.transport.closed, self.behind
        for size in sizes:
            if size + 14 > self.largest:
                self.largest = size + 14
            self.transport.send_lossy(self.model.lossy(size, None))
            if was_behind:
                assert not alive or self.model.dropped[-1] == len(self.model.sent) - 1
        assert alive is not self.transport.closed, "a volatile message ends nobody"

    @rule(items=st.lists(st.tuples(SMALL, KEYS), min_size=1, max_size=20))
    def send_keyed(self, items: list[tuple[int, str]]) -> None:
        for size, key in items:
            if size + 14 > self.largest:
                self.largest = size + 14
            self.transport.send_lossy(self.model.lossy(size, key))
        stall = self.transport._stall
        if stall is not None and stall.latest is not None:
            replaceable = self.transport._out[stall.fixed :]
            waiting = [frame.key for frame in replaceable if isinstance(frame, Keyed)]
            assert len(waiting) == len(set(waiting))

    @rule()
    def end_turn(self) -> None:
        self.loop.turn()

    @rule(room=st.sampled_from([0, 1, 5, 100, 10_000, 20_000, 10 * MAX]), turn=st.booleans())
    def take(self, room: int, turn: bool) -> None:
        """Have the kernel take some, and say so."""
        self.sock.room = room
        since = dict(self.stalled.since)
        before = len(self.sock.taken)
        for watcher in self.loop.writers:
            if not watcher.closed:
                assert watcher.callback is not None
                watcher.callback()
        if since and self.behind:
            progress = len(self.sock.taken) > before
            assert progress is (self.stalled.since != since), "progress begins the time anew"
        if turn:
            self.loop.turn()
            self.sock.room = 0

    @invariant()
    def counts_what_waits(self) -> None:
        begun = self.transport._stall.begun if self.transport._stall else 0
        assert self.transport.waiting == sum(map(len, self.transport._out)) - begun
        assert self.transport.waiting <= max(MAX, self.largest)
        assert self.transport.closed == (self.owner.slow is not None) == bool(self.sock.closed)
        watching = [watcher for watcher in self.loop.writers if not watcher.closed]
        assert len(watching) == len(self.stalled.since) == (self.transport._stall is not None)

    @precondition(lambda self: self.transport.closed)
    @rule()
    def gone(self) -> None:
        """Nothing waits, and nothing more is taken."""
        assert not self.transport.waiting and not self.transport._out
        assert not self.behind

    def teardown(self) -> None:
        if self.transport.closed:
            return
        self.loop.turn()
        self.sock.room = 10**9
        for watcher in [watcher for watcher in self.loop.writers if not watcher.closed]:
            watcher.callback()  # type: ignore[misc]
        self.loop.turn()
        assert not self.transport.waiting and not self.behind
        self.model.check(frames_in(bytes(self.sock.taken)), complete=True)


class TLSSends(WebSocketSends):
    kernel = TLS

    @rule()
    def a_small_record_first(self) -> None:
        self.send([12])
        self.end_turn()


class PollingSends(RuleBasedStateMachine):
    """Whatever is sent between and during the GETs."""

    def __init__(self) -> None:
        super().__init__()
        self.why: str | None = None
        self.room, polling._ROOM = polling._ROOM, 2_000
        self.model, self.transport = Model(), PollingTransport(MAX, self._too_slow)
        self.received: list[bytes] = []
        self.get: gevent.Greenlet[..., bytes] | None = None
        self.largest = 0

    def _too_slow(self, why: str) -> None:
        self.why = why
        self.transport.abort()

    def _poll(self) -> bytes:
        self.transport.wait()
        return self.transport.take()

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def send(self, sizes: list[int]) -> None:
        for size in sizes:
            self.largest = max(self.largest, size)
            self.transport.send(self.model.frame(size))

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def send_volatile(self, sizes: list[int]) -> None:
        alive = not self.transport.closed
        for size in sizes:
            self.largest = max(self.largest, size)
            self.transport.send_lossy(self.model.lossy(size, None))
        assert alive is not self.transport.closed, "a volatile message ends nobody"

    @rule(items=st.lists(st.tuples(SMALL, KEYS), min_size=1, max_size=20))
    def send_keyed(self, items: list[tuple[int, str]]) -> None:
        for size, key in items:
            self.largest = max(self.largest, size)
            self.transport.send_lossy(self.model.lossy(size, key))

    @precondition(lambda self: self.get is None)
    @rule()
    def start_get(self) -> None:
        self.get = gevent.spawn(self._poll)
        gevent.sleep(0)

    @precondition(lambda self: self.get is not None)
    @rule(arrives=st.booleans())
    def end_get(self, arrives: bool) -> None:
        assert self.get is not None
        if not self.transport.waiting:
            self.transport.wake()
        payload = self.get.get(timeout=100 * UNIT)
        self.get = None
        self.received += [part for part in payload.split(b"\x1e") if part != NOOP.polling]
        if arrives:
            self.transport.answered()

    @invariant()
    def bounded(self) -> None:
        out = self.transport._out + self.transport._taken
        size = sum(len(frame.polling) for frame in out)
        assert 0 <= size <= self.transport.waiting <= 2 * MAX + 2 * self.largest
        if self.largest <= MAX:
            assert self.transport.waiting <= 2 * MAX
        assert self.transport.closed == (self.why is not None)

    def teardown(self) -> None:
        polling._ROOM = self.room
        if not self.transport.closed:
            if self.get is not None:
                self.end_get(True)
            while self.transport._out:
                self.start_get()
                self.end_get(True)
            self.transport.answered()
            assert self.transport.waiting == 0
            self.model.check(self.received, complete=True)
        elif self.get is not None:
            self.get.get(timeout=100 * UNIT)


for machine in (WebSocketSends, TLSSends, PollingSends):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
    )

TestWebSocketSends = pytest.mark.timeout(4000 * UNIT)(WebSocketSends.TestCase)
TestTLSSends = pytest.mark.timeout(4000 * UNIT)(TLSSends.TestCase)
TestPollingSends = pytest.mark.timeout(4000 * UNIT)(PollingSends.TestCase)


# One case each


def test_places_of_a_list_are_bounded() -> None:
    items: list[Any] = []
    latest = Latest(items, b"")
    for number in range(10_000):
        latest.append(b"%d" % number, key=number)
        if len(items) > 5:
            items.pop(0)
            latest.removed(1)
    assert len(latest._places) < 100
    for _ in range(10_000):
        latest.append(b"x", key="one")
    assert len(items) < 100
    assert [item for item in items if item][-1] == b"x"


def sender(room: int = 0) -> WebSocketSends:
    machine = WebSocketSends()
    machine.sock.room = room
    return machine


def test_what_became_old_in_the_turn_that_found_the_client_behind() -> None:
    """Before it is given up for too much, only the latest of each key waits."""
    machine = sender(room=10)
    for _ in range(3 * MAX // 1000):
        machine.transport.send_lossy(machine.model.lossy(1000, "a"))
    assert not machine.transport.closed and machine.owner.slow is None
    machine.teardown()
    assert len(machine.model.dropped) > 100


def test_a_client_that_keeps_up_does_without_nothing() -> None:
    machine = sender(room=10**6)
    for number in range(100):
        machine.transport.send_lossy(machine.model.lossy(100, "a" if number % 2 else None))
    machine.loop.turn()
    assert not machine.model.dropped
    machine.teardown()


def test_those_who_wait_share_the_frames() -> None:
    """A hundred clients that are behind cost the memory of one."""
    one, two = sender(), sender()
    frames = [one.model.frame(1000) for _ in range(20)]
    for each in frames:
        one.transport.send(each)
        two.transport.send(each)
    one.end_turn()
    two.end_turn()
    for first, second, each in zip(one.transport._out, two.transport._out, frames, strict=True):
        assert first is second is each.websocket


def test_a_polling_client_closes_behind_all_that_a_waiting_get_left() -> None:
    machine = PollingSends()
    machine.start_get()
    machine.send([MAX - 100, 5_000])
    machine.transport.close()
    machine.end_get(True)
    assert [number_of(part) for part in machine.received[:-1]] == [0, 1]
    assert machine.received[-1] == b"1"


# Real sockets


def stop_reading(served: Served, client: WebSocket) -> Session:
    """Send until the kernel takes no more; return the session."""
    session = served.session(client)
    while not served.engine._stalled:
        session.send(message("x" * 1_000))
        gevent.sleep(0)
    return session


def test_who_takes_nothing_is_given_up_in_time(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(write_timeout=4 * UNIT, max_buffer=10_000_000)
    client, other = served.websocket(receive_buffer=4096), served.websocket()
    session = stop_reading(served, client)
    waiting = session.transport.waiting
    served.wait_closed("slow consumer")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == (
        f"Session {session.sid}: slow consumer: took none of {waiting} bytes within"
        f" SOCKETIO_WRITE_TIMEOUT ({4 * UNIT:g} s)"
    )
    assert not len(served.engine._stalled)
    served.session(other).send(message("still here"))
    assert other.receive() == "4still here"


def test_who_takes_something_now_and_then_is_not(serve: Callable[..., Served]) -> None:
    served = serve(write_timeout=20 * UNIT, max_buffer=100_000_000)
    client = served.websocket(receive_buffer=65_536)
    session = stop_reading(served, client)
    data = random.Random(1).randbytes(8_000_000)
    session.send(message(data))
    received: str | bytes = ""
    for _ in range(25):  # much longer than it may take nothing
        for _ in range(40):
            client.http._unread += client.http.sock.recv(8_192)
        gevent.sleep(UNIT)
    assert session.state is State.OPEN
    while received != data:
        received = client.receive()


@TRANSPORTS
def test_the_bound_is_told(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    served = serve(max_buffer=10_000)
    options: dict[str, Any] = {"receive_buffer": 4096} if transport == "websocket" else {}
    client = served.websocket(**options) if options else served.poller()
    session = served.session(client)
    while session.state is State.OPEN:
        session.send(message("x" * 1_000))
        gevent.sleep(0)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(f"Session {session.sid}: slow consumer: 1")
    assert record.getMessage().endswith("bytes wait, more than SOCKETIO_MAX_BUFFER (10000)")
    assert not [record for record in caplog.records if record.levelname == "INFO"]
    served.wait_closed("slow consumer")


def test_who_cannot_be_flushed_is_gone_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: WebSocketTransport) -> None:
        raise ArithmeticError("not now")

    client = served.websocket()
    session = served.session(client)
    monkeypatch.setattr(WebSocketTransport, "flush", fail)
    session.send(message("x"))
    served.wait_closed("transport error")
    assert served.errors.pop().getMessage() == "A connection could not be flushed"


def test_a_burst_while_a_get_waits_is_bounded_as_well(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=10_000)
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    for _ in range(19):
        session.send(message("x" * 999))
    assert session.state is State.OPEN
    for _ in range(3):
        session.send(message("x" * 999))
    served.wait_closed("slow consumer")
    client.end_get()


def test_an_answer_that_has_not_left_counts(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the hands of the front, which waits for the client to read."""
    served = serve(max_buffer=10_000_000)
    slow = served.http(receive_buffer=4096)
    sid = slow.get(f"{PATH}polling").body.split(b'"')[3].decode()
    session = served.engine.sessions[sid]
    session.send(message("x" * 9_000_000))
    slow.request("GET", f"{PATH}polling&sid={sid}")
    wait_until(lambda: not session.transport._out, what="the answer to begin")  # type: ignore[union-attr]
    gevent.sleep(2 * UNIT)
    assert session.transport.waiting > 9_000_000
    session.send(message("y" * 900_000))
    session.send(message("z" * 200_000))
    served.wait_closed("slow consumer")
    slow.reset()


def lossy(data: str, key: str | None, dropped: list[str]) -> LossyFrame:
    return LossyFrame(data.encode(), key=key, dropped=lambda: dropped.append(data))


@TRANSPORTS
def test_lossy_among_ordinary_ones(serve: Callable[..., Served], transport: str) -> None:
    """What arrives is in the order in which it was sent, and all that had to."""
    served = serve(max_buffer=1_000_000, write_timeout=400 * UNIT)
    dropped: list[str] = []
    client: Any = served.poller()
    session = served.session(client)
    if transport == "websocket":
        client = served.websocket(receive_buffer=4096)
        session = stop_reading(served, client)
    else:
        session.send(message("x" * 70_000))
    for number in range(1_000):
        session.send(message(f"o{number}"))
        session.transport.send_lossy(lossy(f"v{number}", None, dropped))
        session.transport.send_lossy(lossy(f"a{number}", "a", dropped))
        session.transport.send_lossy(lossy(f"b{number}", "b", dropped))
        if number % 100 == 0:
            gevent.sleep(0)
    session.send(message("end"))
    expected = [f"4o{number}" for number in range(1_000)]
    expected[-1:] = ["4o999", "4a999", "4b999", "4end"]
    received = []
    while not received or received[-1] != "4end":
        received += client.get() if transport == "polling" else [client.receive()]
    assert [item for item in received if item[1] != "x"] == expected
    assert len(dropped) == 1_000 + 2 * 999


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.timeout(4000 * UNIT)
def test_one_writer_whatever_goes_on(
    serve: Callable[..., Served], tls: bool, certificate: dict[str, str]
) -> None:
    """Five greenlets with 3 MB each, the client's pings, and a close, to one that reads slowly."""
    served = serve(max_buffer=100_000_000, **({"tls": certificate} if tls else {}))
    client = served.websocket(receive_buffer=65_536, answers=False)
    session = served.session(client)
    blobs = [random.Random(seed).randbytes(3_000_000 + seed) for seed in range(5)]
    sent: list[bytes] = []

    def send(blob: bytes) -> None:
        for part in (blob, blob[::-1]):
            if session.state is State.OPEN:
                session.send(message(part))
                sent.append(hashlib.sha256(part).digest())
            gevent.sleep(0)

    greenlets = [gevent.spawn(send, blob) for blob in blobs]
    client.send_raw(*(frame(Opcode.PING, b"%d" % number) for number in range(100)))
    gevent.spawn_later(UNIT / 2, session.close)
    received, pongs = [], []
    while (item := client.receive_frame()).opcode is not Opcode.CLOSE:
        if item.opcode is Opcode.PONG:
            pongs.append(bytes(item.data))
        else:
            received.append(hashlib.sha256(item.data).digest())
            gevent.sleep(UNIT / 10)
    gevent.joinall(greenlets, raise_error=True)
    assert received == sent and len(sent) >= 5
    assert pongs == [b"%d" % number for number in range(len(pongs))]
    served.wait_closed("forced close")
