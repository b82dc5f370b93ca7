"""Limits of what one client sends: at the limit it passes, one over ends that client alone."""

import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import gevent
import pytest
from websockets.frames import Opcode

from django_socketio.engine import Session, new_sid
from tests.support import UNIT, wait_until

from .clients import Poller, WebSocket, chunked, frame, payload, text
from .resources import Resources
from .served import Served, echo, lanes
from .test_handshake import BAD_REQUEST

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY


def over(served: Served, limit: str) -> int:
    return served.engine.counters[f"over limit: {limit}"]


@contextmanager
def another(served: Served) -> Iterator[None]:
    """Have a client that is served before and after, whatever happens to others."""
    client, answer = served.websocket(), served.app.answer
    yield
    served.app.answer = echo
    client.send("4still here")
    assert client.receive() == "4still here"
    served.app.answer = answer


# Fragments


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("piece", [b"", b"x"], ids=["empty", "of a byte"])
def test_fragments(serve: Callable[..., Served], opcode: Opcode, piece: bytes) -> None:
    """CVE-2026-62389: the limit is one of number, too, and not only of bytes."""
    served = serve(max_fragments=100)
    client = served.websocket()
    with another(served):
        first, more = frame(opcode, b"4", fin=False), frame(CONT, piece, fin=False)
        client.send_raw(first, more * 98, frame(CONT, piece))
        wait_until(lambda: served.app.messages, what="the message of 100")
        client.send_raw(first, more * 50)
        gevent.sleep(0)
        client.send_raw(more * 49, frame(CONT, piece))
        assert client.closed() == 1008
        assert len(served.app.messages) == 1
        assert (over(served, "MAX_FRAGMENTS"), served.app.reasons) == (1, ["parse error"])


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["empty", "of a byte"])
def test_a_million_fragments(served: Served, piece: bytes) -> None:
    """CVE-2026-48779: it ends early, and costs next to nothing until then."""
    fragments = frame(CONT, piece, fin=False) * 10_000
    client = served.websocket(answers=False)
    with another(served):
        tracemalloc.start()
        try:
            with suppress(ConnectionError):
                client.send_raw(frame(TEXT, b"4", fin=False))
                for _ in range(100):
                    client.send_raw(fragments)
                    gevent.sleep(0)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert served.app.reasons == ["parse error"]
        assert over(served, "MAX_FRAGMENTS") == 1
        assert most < 3_000_000
    assert served.app.messages == ["still here"]


def test_segments_of_a_byte(served: Served) -> None:
    """Whatever is in them: what is kept is what was sent."""
    served.app.answer = echo
    client = served.websocket()
    data = text("4" + "x" * 2_000) + frame(BINARY, b"y" * 2_000)
    client.http.send_in_pieces(data[:100])  # from now on the protocol has it
    tracemalloc.start()
    try:
        client.http.send_in_pieces(data[100:])
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert client.receive() == "4" + "x" * 2_000
    assert client.receive() == b"y" * 2_000
    assert kept < 200_000


# Time for a message


FIRST = frame(TEXT, b"4one ", fin=False)


@pytest.mark.parametrize("more", [b"", frame(CONT, b"", fin=False)], ids=["silent", "goes on"])
def test_a_message_that_never_ends(serve: Callable[..., Served], more: bytes) -> None:
    served = serve(message_timeout=4 * UNIT, max_fragments=1_000_000)
    client = served.websocket()
    with another(served):
        client.send_raw(FIRST)
        started = time.monotonic()
        while not served.app.closed:
            client.send_raw(more)
            gevent.sleep(UNIT / 5)
        assert time.monotonic() - started >= 3 * UNIT
        assert served.app.reasons == ["message timeout"]
        assert client.closed() == 1008
        assert over(served, "MESSAGE_TIMEOUT") == 1


def test_a_message_that_ends_in_time(serve: Callable[..., Served]) -> None:
    served = serve(message_timeout=6 * UNIT)
    served.app.answer = echo
    client = served.websocket()
    before = lanes(served)
    for _ in range(3):
        client.send_raw(FIRST)
        wait_until(lambda: lanes(served) == before + 1, what="a deadline")
        gevent.sleep(3 * UNIT)
        client.send_raw(frame(CONT, b"two"))
        assert client.receive() == "4one two"
        assert lanes(served) == before


def test_a_session_that_ends_has_no_deadline_left(served: Served) -> None:
    client = served.websocket()
    before = lanes(served)
    client.send_raw(FIRST)
    wait_until(lambda: lanes(served) == before + 1, what="a deadline")
    client.reset()
    wait_until(lambda: served.app.closed)
    assert lanes(served) == 0


def test_a_message_that_we_do_not_read_is_not_late(serve: Callable[..., Served]) -> None:
    served = serve(message_timeout=2 * UNIT)
    client = served.websocket()
    session = served.session(client)
    client.send_raw(FIRST)
    wait_until(lambda: session.transport._message is not None)
    session.pause()
    client.send_raw(frame(CONT, b"two"))
    gevent.sleep(6 * UNIT)
    assert not served.app.closed
    session.resume()
    wait_until(lambda: served.app.messages == ["one two"], what="the message")


def test_a_probe_in_fragments_has_the_time_of_the_upgrade(serve: Callable[..., Served]) -> None:
    served = serve(message_timeout=UNIT, upgrade_timeout=4 * UNIT)
    poller = served.poller()
    client = served.upgrade(poller)
    client.send_raw(frame(TEXT, b"2pr", fin=False))
    gevent.sleep(2 * UNIT)
    client.send_raw(frame(CONT, b"obe"))
    assert client.receive() == "3probe"
    client.closed()
    assert over(served, "UPGRADE_TIMEOUT") == 1 and not over(served, "MESSAGE_TIMEOUT")
    assert poller.post("4still here").body == b"ok"


# Size


@pytest.mark.parametrize("kind", ["declared", "chunked", "websocket", "fragments"])
def test_max_payload_has_a_counter(serve: Callable[..., Served], kind: str) -> None:
    served = serve(max_payload=10_000)
    too_much = "4" + "x" * 10_000
    with another(served):
        if kind == "websocket":
            client = served.websocket()
            client.send(too_much)
            assert client.closed() == 1009
        elif kind == "fragments":
            client = served.websocket()
            client.send_raw(FIRST, frame(CONT, too_much))
            assert client.closed() == 1009
        else:
            poller = served.poller()
            if kind == "chunked":
                headers, body = {"Transfer-Encoding": "chunked"}, chunked(too_much.encode())
                poller.posting.request("POST", poller.target, headers=headers).send(body)
                answer = poller.posting.answer()
            else:
                answer = poller.post(too_much)
            assert answer.error == (413, 3, "Bad request")
            assert answer.json["hint"] == "the body is over maxPayload (10000 bytes)"
        assert over(served, "MAX_PAYLOAD") == 1
        assert served.app.reasons == ["parse error"]


def test_an_endless_chunked_body_is_refused_while_it_comes(served: Served) -> None:
    """CVE-2026-48809: also where no Content-Length says how much there will be."""
    client = served.poller()
    client.posting.request("POST", client.target, headers={"Transfer-Encoding": "chunked"})
    chunk, sent = b"%x\r\n%b\r\n" % (1000, b"4" * 1000), 0
    with suppress(ConnectionError):
        while not served.app.closed:
            client.posting.send(chunk)
            sent += 1000
            gevent.sleep(0)
    assert sent <= 2_000_000  # what the sockets between us hold, beside the limit of 100,000
    assert over(served, "MAX_PAYLOAD") == 1
    assert served.app.messages == []


def test_max_packets_says_why(serve: Callable[..., Served]) -> None:
    served = serve(max_packets=50)
    client = served.poller()
    with another(served):
        assert client.post(*["4x"] * 50).body == b"ok"
        answer = client.post(*["4x"] * 51)
        assert answer.error == BAD_REQUEST
        assert answer.json["hint"] == "more than 50 packets in one payload"
        assert over(served, "MAX_PACKETS") == 1
        assert len(served.app.messages) == 50


# Held back in the middle of what has come


def take_until(number: int) -> Callable[[Session, str | bytes], None]:
    """Return an application that pauses the session after each so many messages."""
    taken = 0

    def take(session: Session, data: str | bytes) -> None:
        nonlocal taken
        taken += 1
        if taken % number == 0:
            session.pause()

    return take


@pytest.mark.parametrize("kind", [TEXT, BINARY], ids=["text", "binary"])
@pytest.mark.parametrize("behind", [False, True], ids=["", "behind the handshake"])
def test_no_message_is_taken_while_paused(served: Served, kind: Opcode, behind: bool) -> None:
    """Of thousands in one segment: it stays as it came, which is the least that it can cost."""
    served.app.answer = take_until(10)
    data = b"".join(frame(kind, f"4{number}") for number in range(1_000))
    expected: list[str | bytes] = [
        str(number) if kind is TEXT else f"4{number}".encode() for number in range(1_000)
    ]
    client = served.websocket(behind=data if behind else b"")
    if not behind:
        client.send_raw(data)
    (session,) = served.app.opened
    # Of what the protocol has, a piece is taken apart at once.
    most = 10 if kind is TEXT else 1_000
    while len(served.app.messages) < 1_000:
        wait_until(lambda: session.paused, what="the pause")
        taken = len(served.app.messages)
        gevent.sleep(0)
        gevent.sleep(0)
        assert len(served.app.messages) == taken
        session.resume()
        wait_until(lambda: len(served.app.messages) > taken, what="more")  # noqa: B023
        assert len(served.app.messages) - taken <= most
    assert served.app.messages == expected


def test_little_is_taken_apart_that_waits(served: Served) -> None:
    """A full read of small binary messages, of a client that is held back at once."""
    served.app.answer = take_until(1)
    client = served.websocket()
    client.send_raw(frame(BINARY, b"xxxx") * 6_500)
    (session,) = served.app.opened
    wait_until(lambda: session.transport._unread, what="something unread")
    assert len(served.app.messages) <= 1_000
    assert len(session.transport._unread) > 30_000


def test_a_paused_session_that_ends_keeps_nothing(served: Served) -> None:
    served.app.answer = take_until(1)
    client = served.websocket()
    client.send_raw(text("4x") * 1_000)
    (session,) = served.app.opened
    wait_until(lambda: session.transport._unread, what="something unread")
    session.end("forced close")
    session.resume()
    gevent.sleep(0)
    assert session.transport._unread is None
    assert served.app.messages == ["x"]


def test_a_paused_session_that_closes_reads_the_clients_close(served: Served) -> None:
    served.app.answer = take_until(1)
    client = served.websocket()
    client.send_raw(text("4x") * 1_000)
    (session,) = served.app.opened
    wait_until(lambda: session.transport._unread, what="something unread")
    session.close()
    assert client.closed() == 1000
    wait_until(lambda: session.transport.closed, what="the end of the handshake")
    assert served.app.messages == ["x"]
    assert lanes(served) == 0


def test_the_upgrade_of_a_paused_session_takes_nothing_yet(served: Served) -> None:
    poller = served.poller()
    session = served.session(poller)
    client = served.upgrade(poller)
    session.pause()
    client.send("2probe", "5", *[f"4{number}" for number in range(100)])
    assert client.receive() == "3probe"
    gevent.sleep(0)
    gevent.sleep(0)
    assert served.app.messages == []
    session.resume()
    wait_until(lambda: len(served.app.messages) == 100, what="the messages")
    assert served.app.messages == [str(number) for number in range(100)]


def test_a_post_is_taken_as_far_as_there_is_room(serve: Callable[..., Served]) -> None:
    """Many packets in one POST do not pile up behind each other."""
    served = serve(max_packets=1_000)
    served.app.answer = take_until(10)
    client = served.poller()
    client.posting.request("POST", client.target, payload(*[f"4{n}" for n in range(995)]))
    session = served.session(client)
    for taken in range(10, 1_000, 10):
        wait_until(lambda: session.paused, what="the pause")
        gevent.sleep(0)
        assert len(served.app.messages) == taken
        session.resume()
    assert client.posting.answer().body == b"ok"
    assert served.app.messages == [str(number) for number in range(995)]


def test_the_rest_of_a_post_whose_session_ends_is_dropped(served: Served) -> None:
    served.app.answer = take_until(10)
    client = served.poller()
    client.posting.request("POST", client.target, payload(*["4x"] * 50))
    session = served.session(client)
    wait_until(lambda: session.paused, what="the pause")
    session.end("forced close")
    assert client.posting.answer().status == 200
    assert len(served.app.messages) == 10


# A mass of clients


def test_thousands_of_binary_posts_keep_no_descriptor(served: Served) -> None:
    """CVE-2026-59725."""
    headers = {"Content-Type": "application/octet-stream"}
    clients = [Poller(served.address) for _ in range(20)]
    before = Resources.now()

    def post(client: Poller) -> None:
        for _ in range(250):
            sid = client.getting.get("/engine.io/?EIO=4&transport=polling").opened["sid"]
            target = f"/engine.io/?EIO=4&transport=polling&sid={sid}"
            assert client.posting.post(target, b"\x00\x04\xffhi", headers).error == BAD_REQUEST

    gevent.joinall([gevent.spawn(post, client) for client in clients], raise_error=True)
    assert served.app.reasons == ["parse error"] * 5_000
    assert served.app.messages == []
    assert Resources.now().descriptors <= before.descriptors
    for client in clients:
        client.close()
    served.engine.close_all("forced close")


def upgraded(served: Served) -> WebSocket:
    poller = served.poller()
    client = served.upgrade(poller)
    client.send("2probe")
    assert client.receive() == "3probe"
    client.send("5")
    client.sid = poller.sid
    return client


CONNECT: dict[str, Callable[[Served], Poller | WebSocket]] = {
    "polling": Served.poller,
    "websocket": Served.websocket,
    "upgraded": upgraded,
}


@pytest.mark.parametrize("connect", CONNECT.values(), ids=CONNECT.keys())
def test_two_hundred_clients_get_their_own(
    served: Served, connect: Callable[[Served], Poller | WebSocket]
) -> None:
    """CVE-2020-35681: all at once, each only what is meant for it."""
    served.app.answer = echo

    def talk(number: int) -> None:
        client = connect(served)
        for turn in range(5):
            token = f"4{client.sid} {number} {turn}"
            if isinstance(client, WebSocket):
                client.send(token)
                assert client.receive() == token
            else:
                client.post(token)
                assert client.get() == [token]

    talks = [gevent.spawn(talk, number) for number in range(200)]
    gevent.joinall(talks, raise_error=True)
    assert len({session.sid for session in served.app.opened}) == 200
    assert len(served.app.messages) == 1_000


def test_ten_thousand_sids(served: Served) -> None:
    """CVE-2017-16031: none twice, and nothing to count in them."""
    clients = [served.http() for _ in range(10)]
    sids: list[str] = []
    for client in clients:
        for _ in range(1_000):
            sids.append(client.get("/engine.io/?EIO=4&transport=polling").opened["sid"])
    assert len(set(sids)) == 10_000
    # As random letters are, in every place: each of 64 comes, and none much more often.
    for place in range(21):
        counts = [sum(sid[place] == letter for sid in sids) for letter in set(sids[0])]
        assert max(counts) < 400
    served.engine.close_all("forced close")
    assert len({new_sid() for _ in range(100_000)}) == 100_000  # where these came from


def test_the_kernel_holds_back_who_is_not_read(served: Served) -> None:
    """Back-pressure is TCP's: a client that goes on sending comes to a stop."""
    served.app.answer = take_until(1)
    client = served.websocket()
    client.http.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    client.http.sock.settimeout(5 * UNIT)
    sent = 0
    with pytest.raises(TimeoutError):
        for _ in range(100_000):
            client.send("4" + "x" * 1_000)
            sent += 1
    assert sent < 20_000
    assert served.app.messages == ["x" * 1_000]


# No memory


def test_no_memory_for_a_message(served: Served) -> None:
    def fail(session: Session, data: str | bytes) -> None:
        if data == "too much":
            raise MemoryError

    served.app.answer = fail
    with another(served):
        client = served.websocket()
        client.send("4too much", "4behind")
        assert client.closed() is None
        assert served.app.reasons == ["transport error"]
    (record,) = served.errors
    assert record.getMessage() == "There is no memory for what a client sent"
    served.errors.clear()
