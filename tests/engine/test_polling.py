"""HTTP long-polling: GET waits, POST feeds, and what ends a session ("HTTP long-polling")."""

import time
from collections.abc import Callable

import gevent
import pytest

from django_socketio.engine import Session, State, pywsgi, server
from django_socketio.protocol.exceptions import ProtocolError
from tests.support import UNIT, wait_until

from .clients import PATH, Poller, chunked, payload, request
from .resources import Resources
from .served import Served, echo, lanes, message

GONE = (400, 1, "Session ID unknown")
BAD_REQUEST = (400, 3, "Bad request")


def is_gone(client: Poller) -> bool:
    """Tell whether neither GET nor POST know the session any more."""
    get = client.getting.get(client.target)
    return get.error == client.post("4x").error == GONE


# GET


def test_a_get_waits_for_what_is_sent_meanwhile(served: Served) -> None:
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    session.send(message("hello"))
    assert client.end_get() == ["4hello"]


def test_a_get_takes_what_is_there_already(served: Served) -> None:
    client = served.poller()
    session = served.session(client)
    for number in range(5):
        session.send(message(str(number)))
    assert client.get() == ["40", "41", "42", "43", "44"]


def test_what_is_sent_in_one_turn_leaves_in_one_payload(served: Served) -> None:
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    for number in range(5):
        session.send(message(str(number)))
    assert client.end_get() == ["40", "41", "42", "43", "44"]


def test_a_poll_is_never_from_a_cache(served: Served) -> None:
    client = served.poller()
    served.session(client).send(message("hello"))
    answer = client.getting.get(client.target)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "text/plain; charset=UTF-8"


def test_binary_travels_as_base64_both_ways(served: Served) -> None:
    served.app.answer = echo
    client = served.poller()
    blobs = [b"", b"\x00", b"\x1e\x1e", bytes(range(256)), b"b4"]
    assert client.post(*blobs).body == b"ok"
    assert served.app.messages == blobs
    answer = client.getting.get(client.target)
    assert answer.packets == blobs
    assert answer.body.split(b"\x1e")[1] == b"bAA=="


def test_text_and_binary_keep_their_order(served: Served) -> None:
    served.app.answer = echo
    client = served.poller()
    packets: list[str | bytes] = ["4one", b"two", "4", "4\u2028drei \U0001f600", b"\xff", "4six"]
    assert client.post(*packets).body == b"ok"
    assert served.app.messages == ["one", b"two", "", "\u2028drei \U0001f600", b"\xff", "six"]
    assert client.get() == packets


def test_a_noop_means_nothing(served: Served) -> None:
    client = served.poller()
    assert client.post("6", "4hello", "6").body == b"ok"
    assert served.app.messages == ["hello"]


def test_requests_of_a_session_may_use_any_connection(served: Served) -> None:
    served.app.answer = echo
    client = served.poller()
    for number in range(5):
        assert served.http().post(client.target, f"4{number}".encode()).body == b"ok"
        assert served.http().get(client.target).packets == [f"4{number}"]


def test_each_session_gets_its_own(served: Served) -> None:
    """CVE-2020-35681: an answer that went to another client."""
    clients = [served.poller() for _ in range(50)]
    for client in clients:
        client.start_get()
    for client in clients:
        served.wait_polled(client)
    for client in reversed(clients):
        served.session(client).send(message(client.sid))
    assert [client.end_get() for client in clients] == [[f"4{client.sid}"] for client in clients]


def test_two_gets_at_once_end_the_session(served: Served) -> None:
    client = served.poller()
    client.start_get()
    served.wait_polled(client)
    second = served.http().get(client.target)
    assert second.error == BAD_REQUEST
    assert second.json["hint"] == "two polls at once"
    assert client.end_get() == ["1"]
    served.wait_closed("parse error")
    assert is_gone(client)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_hangs_up_on_its_get_is_gone(served: Served, how: str) -> None:
    client = served.poller()
    client.start_get()
    served.wait_polled(client)
    getattr(client.getting, how)()
    served.wait_closed("transport close")
    assert client.post("4x").error == GONE


def test_a_connection_may_go_once_it_has_been_answered(served: Served) -> None:
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    session.send(message("one"))
    assert client.end_get() == ["4one"]
    client.getting.close()
    wait_until(lambda: served.server.connections == 1, what="the end of the connection")
    assert served.app.closed == []
    session.send(message("two"))
    assert served.http().get(client.target).packets == ["4two"]


def test_a_client_may_reuse_the_connection_before_the_answer(served: Served) -> None:
    """A pipelined request is no end of the connection."""
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    client.getting.request("POST", client.target, b"4hello")
    session.send(message("now"))
    assert client.end_get() == ["4now"]
    assert client.getting.answer().body == b"ok"
    assert served.app.messages == ["hello"]


def test_a_client_that_goes_with_a_request_behind_its_get(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be read hides that nothing comes behind it."""
    monkeypatch.setattr(server, "_GLANCE", 2 * UNIT)
    client = served.poller()
    client.start_get()
    served.wait_polled(client)
    client.getting.request("POST", client.target, b"4hello")
    gevent.sleep(UNIT)
    assert served.app.closed == []
    client.getting.close()
    served.wait_closed("transport close")


def test_an_end_wakes_the_get_that_waits(served: Served) -> None:
    client = served.poller()
    client.start_get()
    served.wait_polled(client).end("enough")
    assert client.end_get() == ["6"]
    served.wait_closed("enough")
    assert is_gone(client)


# POST


def test_a_post_feeds_the_session_in_order(served: Served) -> None:
    client = served.poller()
    for start in range(0, 30, 10):
        assert client.post(*(f"4{number}" for number in range(start, start + 10))).body == b"ok"
    assert served.app.messages == [str(number) for number in range(30)]


def test_two_posts_at_once_end_the_session(served: Served) -> None:
    client = served.poller()
    session = served.session(client)
    body = payload("4hello")
    client.posting.send(request("POST", client.target, body)[: -len(body)])
    wait_until(lambda: session.transport.posting, what="the first POST")
    second = served.http().post(client.target, b"4x")
    assert second.error == BAD_REQUEST
    assert second.json["hint"] == "two posts at once"
    served.wait_closed("parse error")
    client.posting.send(body)
    assert client.posting.answer().error == BAD_REQUEST
    assert served.app.messages == []
    assert is_gone(client)


@pytest.mark.parametrize("kind", ["declared", "chunked"])
def test_a_body_over_max_payload(serve: Callable[..., Served], kind: str) -> None:
    """It is refused before it has come, let alone been kept (CVE-2026-48809)."""
    served = serve(max_payload=10_000)
    client, other = served.poller(), served.poller()
    client.start_get()
    served.wait_polled(client)
    if kind == "declared":
        client.posting.send(request("POST", client.target, headers={"Content-Length": "10001"}))
    else:
        head = request("POST", client.target, headers={"Transfer-Encoding": "chunked"})
        client.posting.send(head + b"%x\r\n" % 10**9 + b"4" * 10_001)
    answer = client.posting.answer()
    assert answer.error == (413, 3, "Bad request")
    assert answer.json["hint"] == "the body is over maxPayload (10000 bytes)"
    assert answer.headers["connection"] == "close"
    assert client.posting.rest() == b""
    assert client.end_get() == ["1"]
    served.wait_closed("parse error")
    assert served.app.messages == []
    assert other.post("4x").body == b"ok"


@pytest.mark.parametrize("kind", ["declared", "chunked"])
def test_a_body_of_max_payload(serve: Callable[..., Served], kind: str) -> None:
    served = serve(max_payload=10_000)
    client = served.poller()
    body = payload("4" + "x" * 4_999, "4" + "y" * 4_998)
    assert len(body) == 10_000
    if kind == "declared":
        assert client.posting.post(client.target, body).body == b"ok"
    else:
        head = request("POST", client.target, headers={"Transfer-Encoding": "chunked"})
        parts = chunked(body[:1], body[1:6_000], body[6_000:])
        assert client.posting.send(head + parts).answer().body == b"ok"
    assert served.app.messages == ["x" * 4_999, "y" * 4_998]


def test_a_large_body_is_read_whatever_its_segments(served: Served) -> None:
    client = served.poller()
    data = request("POST", client.target, payload("4" + "x" * 1_000, b"y" * 500))
    assert client.posting.send_in_pieces(data, 7).answer().body == b"ok"
    assert served.app.messages == ["x" * 1_000, b"y" * 500]


def test_a_binary_payload_is_refused_each_time(served: Served) -> None:
    """CVE-2026-59725: such POSTs were never answered and kept their descriptors."""
    headers = {"Content-Type": "application/octet-stream"}
    before = Resources.now()
    for _ in range(100):
        client = Poller(served.address)
        answer = client.posting.post(client.target, b"\x00\x04\xffhello", headers)
        assert answer.error == BAD_REQUEST
        assert is_gone(client)
        client.close()
    assert served.app.reasons == ["parse error"] * 100
    assert served.app.messages == []
    wait_until(lambda: Resources.now().descriptors <= before.descriptors, what="all descriptors")


MALFORMED = {
    "empty": b"",
    "unknown type": b"7",
    "a letter": b"hello",
    "no type between separators": b"4a\x1e\x1e4b",
    "a separator at the end": b"4a\x1e",
    "bad UTF-8": b"4\xff\xfe",
    "a lone surrogate": b"4\xed\xa0\x80",
    "bad base64": b"b*",
    "base64 without padding": b"bAA",
    "base64 with more behind it": b"bAA==AA==",
    "base64 with blanks": b"bAA ==",
    "a ping, which is the server's": b"2",
    "a probe": b"2probe",
    "an open packet": b"0{}",
    "an upgrade": b"5",
    "of version 3": b"2:4x",
    "a NUL": b"\x00",
    "a number of many digits": b"9" * 90_000,
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_payload_ends_the_session(served: Served, body: bytes) -> None:
    client, other = served.poller(), served.poller()
    client.start_get()
    served.wait_polled(client)
    assert client.posting.post(client.target, body).error == BAD_REQUEST
    assert client.end_get() == ["1"]
    served.wait_closed("parse error")
    assert served.app.messages == []
    assert is_gone(client)
    assert other.post("4x").body == b"ok"


def test_the_packets_before_a_misplaced_one_count_and_those_behind_it_do_not(
    served: Served,
) -> None:
    client = served.poller()
    assert client.post("4before", "2", "4behind").error == BAD_REQUEST
    assert served.app.messages == ["before"]


def test_a_message_that_the_application_refuses_ends_the_session(served: Served) -> None:
    def refuse(session: Session, data: str | bytes) -> None:
        raise ProtocolError("not like this")

    served.app.answer = refuse
    client = served.poller()
    assert client.post("4a", "4b").error == BAD_REQUEST
    assert served.app.messages == ["a"]
    served.wait_closed("parse error")


def test_too_many_packets(serve: Callable[..., Served]) -> None:
    served = serve(max_packets=50)
    client = served.poller()
    assert client.post(*["4x"] * 50).body == b"ok"
    assert client.post(*["4x"] * 51).error == BAD_REQUEST
    assert served.app.messages == ["x"] * 50
    served.wait_closed("parse error")


@pytest.mark.parametrize("packet", ["2", "3", "6", "4"])
def test_a_flood_of_packets_costs_little(serve: Callable[..., Served], packet: str) -> None:
    """CVE-2020-36048: as many packets as one POST can hold."""
    served = serve(max_payload=1_000_000, max_packets=10_000)
    client = served.poller()
    body = payload(*[packet] * 500_000)[:1_000_000]
    started = time.process_time()
    assert client.posting.post(client.target, body).error == BAD_REQUEST
    assert time.process_time() - started < 10 * UNIT
    assert served.app.messages == []


def test_a_body_that_stalls(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pywsgi, "BODY_TIMEOUT", 2 * UNIT)
    client = served.poller()
    client.posting.send(request("POST", client.target, headers={"Content-Length": "50"}) + b"4half")
    assert client.posting.answer().error == BAD_REQUEST
    served.wait_closed("parse error")
    # What comes late is no request.
    assert client.posting.gone()
    assert served.app.messages == []


def test_a_stalled_body_that_nobody_reads(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end, when it comes, must not pass for a request: that would be request smuggling."""
    monkeypatch.setattr(pywsgi, "BODY_TIMEOUT", 2 * UNIT)
    client = served.http()
    head = request("POST", f"{PATH}polling&sid=unknown", headers={"Content-Length": "50"})
    assert client.send(head + b"4half").answer().error == GONE
    assert client.gone()
    assert served.app.requests == []


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("kind", ["declared", "chunked"])
def test_a_body_that_breaks_off(served: Served, kind: str, how: str) -> None:
    client = served.poller()
    session = served.session(client)
    framing = {"Content-Length": "50"} if kind == "declared" else {"Transfer-Encoding": "chunked"}
    data = b"4half" if kind == "declared" else b"5\r\n4half"
    client.posting.send(request("POST", client.target, headers=framing) + data)
    wait_until(lambda: session.transport.posting, what="the POST")
    getattr(client.posting, how)()
    served.wait_closed("parse error")
    assert served.app.messages == []


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"6\r\n4hellox",
        b"6 \r\n4hello\r\n0\r\n\r\n",
        b"0x6\r\n4hello\r\n0\r\n\r\n",
        b"6\n4hello\n0\n\n",
        b"ffffffffffffffffff\r\n",
        b"6;" + b"x" * 20_000,
    ],
    ids=repr,
)
def test_chunks_that_are_none(served: Served, body: bytes) -> None:
    client = served.poller()
    head = request("POST", client.target, headers={"Transfer-Encoding": "chunked"})
    client.posting.send(head + body)
    assert client.posting.answer().status == 400
    assert client.posting.gone()
    served.wait_closed("parse error")
    assert served.app.messages == []


# The end


def test_a_client_closes_by_post_while_its_get_waits(served: Served) -> None:
    client = served.poller()
    client.start_get()
    served.wait_polled(client)
    assert client.post("1").body == b"ok"
    assert client.end_get() == ["6"]
    served.wait_closed("transport close")
    assert is_gone(client)


def test_a_client_closes_by_post_without_a_get(served: Served) -> None:
    client = served.poller()
    served.session(client).send(message("too late"))
    assert client.post("4last", "1", "4behind").body == b"ok"
    served.wait_closed("transport close")
    assert served.app.messages == ["last"]
    # A GET that crossed the close on its way is no error; the next one is.
    assert client.get() == ["6"]
    assert is_gone(client)
    assert served.app.reasons == ["transport close"]


def test_a_pong_behind_the_close_starts_nothing(served: Served) -> None:
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    session.ping()
    assert client.end_get() == ["2"]
    client.start_get()
    served.wait_polled(client)
    assert client.post("1", "3").body == b"ok"
    served.wait_closed("transport close")
    assert lanes(served) == 0


def test_the_server_closes_while_a_get_waits(served: Served) -> None:
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    session.send(message("last words"))
    session.close()
    assert session.state is State.CLOSED
    assert client.end_get() == ["4last words", "1"]
    served.wait_closed("forced close")
    assert is_gone(client)


def test_the_server_closes_without_a_get(served: Served) -> None:
    client = served.poller()
    session = served.session(client)
    session.send(message("one"))
    session.send(message("two"))
    session.close()
    assert session.state is State.CLOSING
    assert served.app.reasons == ["forced close"]  # the application need not wait
    session.send(message("three"))
    assert client.post("4crossed it").body == b"ok"
    assert served.app.messages == []
    assert client.get() == ["4one", "4two", "1"]
    assert session.state is State.CLOSED
    assert served.app.reasons == ["forced close"]
    assert is_gone(client)


def test_nobody_waits_for_ever_for_a_last_get(serve: Callable[..., Served]) -> None:
    served = serve(ping_timeout=2 * UNIT)
    client = served.poller()
    served.session(client).close()
    wait_until(lambda: not served.engine.sessions, what="the end of the session")
    assert served.app.reasons == ["forced close"]
    assert is_gone(client)
    assert lanes(served) == 0


def test_a_malformed_payload_to_a_session_that_closes(served: Served) -> None:
    client = served.poller()
    served.session(client).close()
    assert client.post("7").error == BAD_REQUEST
    assert served.app.reasons == ["forced close"]


def test_a_reason_of_the_applications_own(served: Served) -> None:
    client = served.poller()
    client.start_get()
    served.wait_polled(client).close("kicked")
    assert client.end_get() == ["1"]
    served.wait_closed("kicked")
    assert served.engine.counters == {"opened": 1, "closed: kicked": 1}


def test_it_is_closed_once(served: Served) -> None:
    client = served.poller()
    session = served.session(client)
    session.close("first")
    session.close("second")
    session.end("third")
    session.fail("fourth")
    session.send(message("fifth"))
    session.pause()
    session.resume()
    assert served.app.reasons == ["first"]
    assert is_gone(client)


# Back-pressure


def test_the_answer_to_a_post_waits_while_the_session_is_paused(served: Served) -> None:
    client = served.poller()
    session = served.session(client)
    served.app.answer = lambda session, data: session.pause()
    client.posting.request("POST", client.target, b"4one")
    wait_until(lambda: served.app.messages == ["one"], what="the message")
    # The POST is not answered, which any other request is in the meantime.
    session.send(message("hello"))
    assert client.get() == ["4hello"]
    assert session.transport.posting
    session.resume()
    assert client.posting.answer().body == b"ok"
    assert not session.transport.posting


def test_the_end_of_a_paused_session_answers_its_post(served: Served) -> None:
    client = served.poller()
    served.app.answer = lambda session, data: session.pause()
    client.posting.request("POST", client.target, b"4one")
    wait_until(lambda: served.app.messages, what="the message")
    served.session(client).close()
    assert client.posting.answer().body == b"ok"


def test_a_client_that_fetches_nothing_is_a_slow_consumer(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=10_000)
    client, other = served.poller(), served.poller()
    session = served.session(client)
    most = 0
    while session.state is State.OPEN:
        session.send(message("x" * 1_000))
        most = max(most, session.transport.waiting)
    assert 9_000 < most <= 10_000
    assert session.transport.waiting == 0
    served.wait_closed("slow consumer")
    assert is_gone(client)
    assert other.post("4x").body == b"ok"


def test_a_message_that_is_larger_than_the_buffer_arrives_whole(
    serve: Callable[..., Served],
) -> None:
    served = serve(max_buffer=10_000)
    client = served.poller()
    served.session(client).send(message("x" * 50_000))
    assert client.get() == ["4" + "x" * 50_000]
    client.start_get()
    served.wait_polled(client).send(message(b"y" * 50_000))
    assert client.end_get() == [b"y" * 50_000]


def test_what_comes_behind_a_message_larger_than_the_buffer(serve: Callable[..., Served]) -> None:
    """A client between two GETs is not slow, be it only for a ping."""
    served = serve(max_buffer=10_000)
    client = served.poller()
    session = served.session(client)
    session.send(message("x" * 50_000))
    session.ping()
    session.send(message("y" * 9_000))
    assert client.get() == ["4" + "x" * 50_000, "2", "4" + "y" * 9_000]
    # It is no licence for the next ones.
    session.send(message("x" * 50_000))
    session.send(message("y" * 9_000))
    session.send(message("z" * 2_000))
    served.wait_closed("slow consumer")


def test_a_handler_that_sends_much_while_a_get_waits(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=10_000)
    client = served.poller()
    client.start_get()
    session = served.wait_polled(client)
    for number in range(19):
        session.send(message(f"{number:>999}"))
    received = client.end_get() + client.get()
    assert received == [f"4{number:>999}" for number in range(19)]
    wait_until(lambda: session.transport.waiting == 0, what="an empty buffer")


def test_what_was_fetched_waits_no_more(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=10_000)
    client = served.poller()
    session = served.session(client)
    for _ in range(5):
        for _ in range(9):
            session.send(message("x" * 1_000))
        assert client.get() == ["4" + "x" * 1_000] * 9
    assert session.transport.waiting == 0


def test_a_client_that_never_reads_its_answer_keeps_nothing(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """peers.md: memory and greenlet of a stalled writer kept after the timeout."""
    monkeypatch.setattr(pywsgi, "SEND_TIMEOUT", 4 * UNIT, raising=False)
    served = serve()
    slow = served.http(receive_buffer=4096)
    sid = slow.get(f"{PATH}polling").body.split(b'"')[3].decode()
    session = served.engine.sessions[sid]
    session.send(message("x" * 20_000_000))
    slow.request("GET", f"{PATH}polling&sid={sid}")
    served.wait_closed("transport close")
    wait_until(lambda: not served.server.connections, what="the end of the connection")


def test_an_answer_of_any_size_arrives(serve: Callable[..., Served]) -> None:
    served = serve(max_buffer=30_000_000)
    client = served.poller()
    served.session(client).send(message(b"\x00\xff" * 5_000_000))
    (packet,) = client.get()
    assert packet == b"\x00\xff" * 5_000_000
