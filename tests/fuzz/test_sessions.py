"""
Every request of the protocol in every state of a session, in any order, against a model of both.

Whatever one client does, a bystander's session stays as it is; each message arrives once and in
order, through the upgrade; a refusal is never a 500; and in the end nothing is left.
"""

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from websockets.frames import Opcode

from django_socketio.engine import Session
from tests.engine import served as single, workers
from tests.engine.clients import (
    PATH,
    Answer,
    Http,
    Poller,
    WebSocket,
    chunked,
    frame,
    payload,
    request,
)
from tests.engine.served import Served, message
from tests.engine.test_handshake import UPGRADE
from tests.support import UNIT, wait_until

NONE, POLLING, PROBING, PROBED, WEBSOCKET, CLOSING, CLOSED = (
    "none",
    "polling",
    "probing",
    "probed",
    "websocket",
    "closing",
    "closed",
)
UNKNOWN_SID = (400, 1, "Session ID unknown")
BAD_REQUEST = (400, 3, "Bad request")
OVER_POLLING = (POLLING, PROBING, PROBED)
MAX_PAYLOAD = 2_000

BAD_BODIES = {
    "empty": b"",
    "unknown type": b"7",
    "a ping": b"2",
    "a probe": b"2probe",
    "an upgrade": b"5",
    "bad base64": b"b*",
    "bad UTF-8": b"4\xff",
    "a separator at the end": b"6\x1e",
}

BAD_FRAMES = {
    "no mask": frame(Opcode.TEXT, "4x", mask=False),
    "a reserved bit": frame(Opcode.TEXT, "4x", rsv=2),
    "an unknown opcode": frame(3, "4x"),
    "a continuation of nothing": frame(Opcode.CONT, "4x"),
    "bad UTF-8": frame(Opcode.TEXT, b"4\xff"),
    "too long": frame(Opcode.TEXT, "4" + "x" * MAX_PAYLOAD),
    "more than there can be": b"\x81\xff\x7f" + b"\xff" * 11,
    "an unknown packet": frame(Opcode.TEXT, "9"),
    "a ping": frame(Opcode.TEXT, "2"),
    "nothing": frame(Opcode.TEXT, ""),
}

# Whatever the session, none of these is a request for it.
BAD_REQUESTS = {
    "no EIO": ("GET", "/engine.io/?transport=polling&sid={sid}", {}),
    "EIO=3": ("GET", "/engine.io/?EIO=3&transport=polling&sid={sid}", {}),
    "a POST of EIO=5": ("POST", "/engine.io/?EIO=5&transport=polling&sid={sid}", {}),
    "an upgrade of EIO=3": ("GET", "/engine.io/?EIO=3&transport=websocket&sid={sid}", UPGRADE),
    "an upgrade without EIO": ("GET", "/engine.io/?transport=websocket&sid={sid}", UPGRADE),
    "no transport": ("GET", "/engine.io/?EIO=4&sid={sid}", {}),
    "another transport": ("GET", PATH + "webtransport&sid={sid}", {}),
    "an upgrade that is none": ("GET", PATH + "websocket&sid={sid}", {}),
    "a POST to the websocket": ("POST", PATH + "websocket&sid={sid}", UPGRADE),
    "two sids": ("GET", PATH + "polling&sid={sid}&sid={sid}", {}),
    "another sid": ("GET", PATH + "polling&sid={sid}x", {}),
    "a part of the sid": ("POST", PATH + "polling&sid={part}", {}),
    "__proto__": ("GET", PATH + "polling&sid=__proto__", {}),
    "an upgrade of __class__": ("GET", PATH + "websocket&sid=__class__", UPGRADE),
    "no sid to a POST": ("POST", PATH + "polling", {}),
    "an empty sid": ("GET", PATH + "polling&sid=", {}),
    "a PUT": ("PUT", PATH + "polling&sid=unknown", {}),
    "a DELETE": ("DELETE", PATH + "polling&sid=unknown", {}),
}


class Sessions(RuleBasedStateMachine):
    """One session after the other; `state` and what follows is what the client knows."""

    front: type[Served] = single.Served

    def __init__(self) -> None:
        super().__init__()
        self.served = self.front(max_payload=MAX_PAYLOAD).__enter__()
        self.served.app.answer = self._answer
        self.bystander = self.served.websocket()
        self.polling_bystander = self.served.poller()
        self.state = NONE
        self.number = 0
        self.refused = 0
        self._forget()

    def _forget(self) -> None:
        self.poller: Poller | None = None
        self.websocket: WebSocket | None = None
        self.sid = ""
        self.waits = False  # for the answer to a GET
        self.sent: list[str | bytes] = []
        self.received: list[str | bytes] = []
        self.due: list[str | bytes] = []  # of the server's, for the client to fetch
        self.last: list[str | bytes] = []  # what comes behind it

    def _answer(self, session: Session, data: str | bytes) -> None:
        if session.sid in (self.bystander.sid, self.polling_bystander.sid):
            session.send(message(data))
        else:
            self.received.append(data)

    def teardown(self) -> None:
        for sid in (self.bystander.sid, self.polling_bystander.sid):
            assert sid in self.served.engine.sessions
        self.served.__exit__(None)
        assert not self.served.engine.sessions

    # What must always be so

    @invariant()
    def nobody_else_is_touched(self) -> None:
        self.number += 1
        self.bystander.send(f"4{self.number}")
        assert self.bystander.receive() == f"4{self.number}"
        assert self.polling_bystander.post(f"4{self.number}").body == b"ok"
        assert self.polling_bystander.get() == [f"4{self.number}"]

    @invariant()
    def what_was_sent_has_arrived(self) -> None:
        wait_until(lambda: len(self.received) >= len(self.sent), what="all messages")
        assert self.received == self.sent

    @invariant()
    def the_state_is_that(self) -> None:
        served = self.served
        assert not served.errors, served.errors
        if self.state == CLOSED:
            wait_until(lambda: self.sid not in served.engine.sessions, what="its end")
        ends = [session.sid for session, _ in served.app.closed]
        assert len(set(ends)) == len(ends)
        if self.sid:
            assert (self.sid in ends) is (self.state in (CLOSING, CLOSED)), (self.state, ends)
            assert (self.sid in served.engine.sessions) is (self.state != CLOSED)
        counters = served.engine.counters
        closed = sum(count for name, count in counters.items() if name.startswith("closed: "))
        assert counters["opened"] == len(served.app.opened)
        assert closed == len(ends)
        refused = sum(count for name, count in counters.items() if name.startswith("refused: "))
        assert refused == self.refused

    # Opening

    @initialize(over=st.sampled_from([NONE, POLLING, POLLING, WEBSOCKET]))
    def begin(self, over: str) -> None:
        if over != NONE:
            self.open(over)

    @precondition(lambda self: self.state in (NONE, CLOSED))
    @rule(over=st.sampled_from([POLLING, WEBSOCKET]))
    def open(self, over: str) -> None:
        self._forget()
        if over == POLLING:
            self.poller = self.served.poller()
            self.sid = self.poller.sid
        else:
            self.websocket = self.served.websocket()
            self.sid = self.websocket.sid
        self.state = over

    # Polling

    def _session(self) -> Session:
        return self.served.engine.sessions[self.sid]

    def _http(self) -> Http:
        http = self.served.http()
        self.served.clients.remove(http)
        return http

    def _target(self) -> str:
        return f"{PATH}polling&sid={self.sid}"

    def _post(self, body: bytes, **options: Any) -> Answer:
        http = self._http()
        try:
            return http.post(self._target(), body, **options)
        finally:
            http.close()

    def _refusal(self) -> tuple[int, int, str]:
        """What a request to this session is refused with if it is no polling session."""
        self.refused += 1
        return UNKNOWN_SID if self.state == CLOSED else BAD_REQUEST

    def _ended(self, *last: str | bytes) -> None:
        """Note the end, of which a GET that waits hears by `last`."""
        if self.waits:
            assert self.poller is not None
            assert self.poller.end_get() == list(last)
            self.waits = False
        self._drop_probe()
        self.state = CLOSED

    def _drop_probe(self) -> None:
        if self.state in (PROBING, PROBED):
            assert self.websocket is not None
            self.websocket.rest()
            self.websocket.close()
            self.websocket = None

    @precondition(lambda self: self.sid)
    @rule(
        packets=st.lists(st.sampled_from(["4a", "4b", "4", b"c", b"", "6", "3"]), min_size=1),
        in_chunks=st.booleans(),
    )
    def post(self, packets: list[str | bytes], in_chunks: bool) -> None:
        body = payload(*packets)
        if in_chunks:
            data = request("POST", self._target(), headers={"Transfer-Encoding": "chunked"})
            http = self._http()
            answer = http.send(data + chunked(body)).answer()
            http.close()
        else:
            answer = self._post(body)
        if self.state in (*OVER_POLLING, CLOSING):
            assert (answer.status, answer.body) == (200, b"ok")
        else:
            assert answer.error == self._refusal()
        if self.state in OVER_POLLING:
            self.sent += [
                item[1:] if isinstance(item, str) else item
                for item in packets
                if item[:1] == "4" or isinstance(item, bytes)
            ]

    @precondition(lambda self: self.sid)
    @rule(body=st.sampled_from(sorted(BAD_BODIES)))
    def post_nonsense(self, body: str) -> None:
        self._check_bad_post(self._post(BAD_BODIES[body]))

    @precondition(lambda self: self.sid)
    @rule()
    def post_binary(self) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        self._check_bad_post(self._post(b"\x00\x04\xffhello", headers=headers))

    @precondition(lambda self: self.sid)
    @rule(in_chunks=st.booleans())
    def post_too_much(self, in_chunks: bool) -> None:
        body = b"4" + b"x" * MAX_PAYLOAD
        http = self._http()
        if in_chunks:
            data = request("POST", self._target(), headers={"Transfer-Encoding": "chunked"})
            data += chunked(body)
        else:
            data = request("POST", self._target(), body)
        answer = http.send(data).answer()
        http.close()
        if self.state in (*OVER_POLLING, CLOSING):
            assert answer.status == 413
        self._check_bad_post(answer)

    def _check_bad_post(self, answer: Answer) -> None:
        if self.state in (*OVER_POLLING, CLOSING) and self._is_ignored(answer):
            return
        expected = self._refusal()
        assert answer.error[1:] == expected[1:]
        assert answer.status in (400, 413)
        if self.state in OVER_POLLING:
            self._ended("1")

    def _is_ignored(self, answer: Answer) -> bool:
        """Tell whether a closing session took well-formed packets, out of place, for nothing."""
        return self.state == CLOSING and answer.status == 200

    @precondition(lambda self: self.state in OVER_POLLING)
    @rule()
    def post_twice_at_once(self) -> None:
        body = b"4never"
        first = self._http().send(request("POST", self._target(), body)[:-3])
        wait_until(lambda: self._session().transport.posting, what="the first POST")
        assert self._post(b"4x").error == BAD_REQUEST
        first.send(body[-3:])
        assert first.answer().error == BAD_REQUEST
        first.close()
        self.refused += 2
        self._ended("1")

    @precondition(lambda self: self.state in (POLLING, PROBING) and not self.due and not self.waits)
    @rule()
    def begin_to_poll(self) -> None:
        assert self.poller is not None
        self.poller.start_get()
        self.served.wait_polled(self.poller)
        self.waits = True

    @precondition(lambda self: self.waits)
    @rule()
    def poll_twice_at_once(self) -> None:
        http = self._http()
        assert http.get(self._target()).error == BAD_REQUEST
        http.close()
        self.refused += 1
        self._ended("1")

    @precondition(lambda self: self.sid and not self.waits)
    @rule()
    def poll(self) -> None:
        if self.state in (POLLING, PROBING) and not self.due:
            self.send_from_the_server(2)
        http = self._http()
        answer = http.get(self._target())
        http.close()
        if self.state == CLOSING:
            assert answer.packets == self.due + self.last
            self.due, self.state = [], CLOSED
        elif self.state in OVER_POLLING:
            assert answer.packets == (self.due or ["6"])
            self.due = []
        else:
            assert answer.error == self._refusal()

    # What is no request

    @rule(kind=st.sampled_from(sorted(BAD_REQUESTS)))
    def ask_for_nonsense(self, kind: str) -> None:
        method, target, headers = BAD_REQUESTS[kind]
        sid = self.sid or "unknown"
        http = self._http()
        body = b"4x" if method in ("POST", "PUT") else None
        http.request(method, target.format(sid=sid, part=sid[:-1]), body, headers)
        answer = http.answer()
        http.close()
        assert answer.status == 400, answer
        self.refused += 1

    # The server

    @precondition(lambda self: self.state in (*OVER_POLLING, WEBSOCKET))
    @rule(count=st.integers(1, 3))
    def send_from_the_server(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            data: str | bytes = f"s{self.number}" if self.number % 3 else b"%d" % self.number
            self._session().send(message(data))
            self.due.append(f"4{data}" if isinstance(data, str) else data)
        if self.waits:
            assert self.poller is not None
            assert self.poller.end_get() == self.due
            self.waits, self.due = False, []

    @precondition(lambda self: self.state in (*OVER_POLLING, WEBSOCKET))
    @rule()
    def close_from_the_server(self) -> None:
        self._session().close()
        if self.state == WEBSOCKET:
            self._fetch()
            assert self.websocket is not None
            assert self.websocket.closed() == 1000
            self.state = CLOSED
        elif self.waits:
            self._ended("1")
        else:
            self._drop_probe()
            self.state, self.last = CLOSING, ["1"]

    # The WebSocket

    @precondition(lambda self: self.sid)
    @rule()
    def open_a_websocket(self) -> None:
        if self.state == CLOSED:
            answer = self._http_upgrade()
            assert answer.error == self._refusal()
            return
        websocket = self.served._add(WebSocket(self.served.address, sid=self.sid))
        if self.state == POLLING:
            self.websocket, self.state = websocket, PROBING
            wait_until(lambda: self._session().probe is not None, what="the probe")
        else:
            assert websocket.closed() == 1008
            websocket.close()

    def _http_upgrade(self) -> Answer:
        http = self._http()
        try:
            return http.get(f"{PATH}websocket&sid={self.sid}", UPGRADE)
        finally:
            http.close()

    @precondition(lambda self: self.state == PROBING)
    @rule()
    def probe(self) -> None:
        assert self.websocket is not None
        self.websocket.send("2probe")
        assert self.websocket.receive() == "3probe"
        self.state = PROBED
        if self.waits:
            assert self.poller is not None
            assert self.poller.end_get() == ["6"]
            self.waits = False

    @precondition(lambda self: self.state in (PROBING, PROBED))
    @rule(
        how=st.sampled_from(["close", "reset", *sorted(BAD_FRAMES)]), text=st.sampled_from("4612")
    )
    def fail_the_upgrade(self, how: str, text: str) -> None:
        assert self.websocket is not None
        if how in ("close", "reset"):
            getattr(self.websocket, how)()
        else:
            self.websocket.answers = False
            self.websocket.send(text)
            self.websocket.send_raw(BAD_FRAMES[how])
            self.websocket.http.gone()
            self.websocket.close()
        wait_until(lambda: self._session().probe is None, what="the end of the probe")
        self.state, self.websocket = POLLING, None

    @precondition(lambda self: self.state == PROBED)
    @rule(at_once=st.lists(st.sampled_from(["4u", b"v"])))
    def upgrade(self, at_once: list[str | bytes]) -> None:
        assert self.websocket is not None
        self.websocket.send("5", *at_once)
        self.sent += [item[1:] if isinstance(item, str) else item for item in at_once]
        wait_until(lambda: self._session().transport.name == WEBSOCKET, what="the upgrade")
        self.state = WEBSOCKET

    @precondition(lambda self: self.state == POLLING)
    @rule(counts=st.tuples(*[st.integers(0, 4)] * 4))
    def upgrade_while_sending(self, counts: tuple[int, ...]) -> None:
        """All steps of it, with messages both ways between them."""
        steps = (self.open_a_websocket, self.probe, lambda: self.upgrade(["4u"] * counts[3]))
        for step, count in zip(steps, counts, strict=False):
            if count:
                self.post(["4p"] * count, False)
                self.send_from_the_server(count)
            step()
        self._fetch()

    @precondition(lambda self: self.state == WEBSOCKET)
    @rule(items=st.lists(st.sampled_from(["4w", b"x", "3", "6"]), min_size=1))
    def send(self, items: list[str | bytes]) -> None:
        assert self.websocket is not None
        self.websocket.send(*items)
        self.sent += ["w" if item == "4w" else item for item in items if item in ("4w", b"x")]

    @precondition(lambda self: self.state == WEBSOCKET)
    @rule()
    def fetch(self) -> None:
        self._fetch()

    def _fetch(self) -> None:
        assert self.websocket is not None
        assert [self.websocket.receive() for _ in self.due] == self.due
        self.due = []

    @precondition(lambda self: self.state == WEBSOCKET)
    @rule(frame_=st.sampled_from(sorted(BAD_FRAMES)))
    def break_the_protocol(self, frame_: str) -> None:
        assert self.websocket is not None
        self._fetch()
        self.websocket.send_raw(BAD_FRAMES[frame_])
        assert self.websocket.closed() in (1000, 1002, 1007, 1009)
        self.websocket.close()
        self.state = CLOSED

    # The client goes

    @precondition(lambda self: self.state == WEBSOCKET)
    @rule(how=st.sampled_from(["close", "reset", "frame", "packet"]))
    def leave(self, how: str) -> None:
        assert self.websocket is not None
        self._fetch()
        self.what_was_sent_has_arrived()
        if how == "frame":
            self.websocket.send_raw(frame(Opcode.CLOSE, struct.pack("!H", 1001)))
            assert self.websocket.closed() == 1001
        elif how == "packet":
            self.websocket.send("1")
            self.websocket.closed()
        else:
            getattr(self.websocket, how)()
        self.state = CLOSED

    @precondition(lambda self: self.waits)
    @rule(how=st.sampled_from(["close", "reset"]))
    def hang_up(self, how: str) -> None:
        assert self.poller is not None
        getattr(self.poller.getting, how)()
        self.waits = False
        self._ended()

    @precondition(lambda self: self.state in OVER_POLLING)
    @rule()
    def post_a_close(self) -> None:
        assert self._post(b"1").body == b"ok"
        if self.waits:
            self._ended("6")
        else:
            self._drop_probe()
            self.state, self.due, self.last = CLOSING, [], ["6"]


@pytest.mark.timeout(2400 * UNIT)
@pytest.mark.parametrize("front", [single.Served, workers.Served], ids=["pywsgi", "gunicorn"])
def test_sessions(front: type[Served]) -> None:
    machine = type("Sessions", (Sessions,), {"front": front})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            # Not made shorter, which takes minutes: the steps that it prints are few.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
