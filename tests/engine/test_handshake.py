"""Handshakes and refusals: "Handshake" in the protocol, and what Engine.IO's servers answer."""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest

from django_socketio.engine import Headers, Refused
from django_socketio.protocol.engineio import ErrorCode

from .clients import PATH, Answer, Http, request
from .served import Served, echo, message, nothing

UNKNOWN_TRANSPORT = (400, 0, "Transport unknown")
UNKNOWN_SID = (400, 1, "Session ID unknown")
BAD_METHOD = (400, 2, "Bad handshake method")
BAD_REQUEST = (400, 3, "Bad request")
FORBIDDEN = (403, 4, "Forbidden")
BAD_VERSION = (400, 5, "Unsupported protocol version")

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def ask(served: Served, method: str, query: str, headers: dict[str, str] | None = None) -> Answer:
    body = b"4x" if method == "POST" else None
    return served.http().request(method, f"/engine.io/?{query}", body, headers).answer()


def test_the_open_packet_over_polling(serve: Callable[..., Served]) -> None:
    served = serve(ping_interval=7.25, ping_timeout=3.5, max_payload=12345)
    answer = served.http().get(f"{PATH}polling")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=UTF-8"
    assert answer.headers["cache-control"] == "no-store"
    (packet,) = answer.packets
    assert packet[:2] == "0{"
    handshake = Answer(0, {}, answer.body[1:]).json
    sid = handshake.pop("sid")
    assert handshake == {
        "upgrades": ["websocket"],
        "pingInterval": 7250,
        "pingTimeout": 3500,
        "maxPayload": 12345,
    }
    assert served.engine.sessions[sid] is served.app.opened[0]


def test_the_open_packet_over_websocket(serve: Callable[..., Served]) -> None:
    served = serve(ping_interval=7.25, ping_timeout=3.5, max_payload=12345)
    client = served.websocket()
    handshake = dict(client.handshake)
    sid = handshake.pop("sid")
    assert handshake == {
        "upgrades": [],
        "pingInterval": 7250,
        "pingTimeout": 3500,
        "maxPayload": 12345,
    }
    assert served.engine.sessions[sid] is served.app.opened[0]


def test_the_payload_of_a_handshake_reaches_the_application(served: Served) -> None:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "EIO=4&transport=polling"}
    served.engine.handle(environ, "a user")
    assert served.app.payloads == ["a user"]


def test_a_sid_cannot_be_guessed(served: Served) -> None:
    client = served.http()
    sids = {client.get(f"{PATH}polling").body for _ in range(50)}
    sids = {re.search(rb'"sid":"([^"]+)"', body)[1] for body in sids}  # type: ignore[index]
    assert len(sids) == 50
    # 96 bits at least, in letters of 6 bits; no two share a counter or a clock.
    assert all(re.fullmatch(rb"[A-Za-z0-9_-]{16,}", sid) for sid in sids)
    assert len({sid[:4] for sid in sids}) == len({sid[-5:-1] for sid in sids}) == 50


def test_an_application_may_end_a_session_that_opens(served: Served, transport: str) -> None:
    served.app.greet = lambda session: session.close("not today")
    served.client(transport)
    served.wait_closed("not today")


def test_an_application_may_drop_a_session_that_opens(served: Served, transport: str) -> None:
    served.app.greet = lambda session: session.end("not today")
    client = served.http().request("GET", PATH + transport, headers=UPGRADE)
    if transport == "websocket":
        assert client.gone()  # what waited was dropped, the answer too
    else:
        assert client.answer().status == 200
    served.wait_closed("not today")
    # Nothing watches its descriptor, which is the next client's now.
    served.app.greet = nothing
    served.app.answer = echo
    for _ in range(3):
        client = served.websocket()
        client.send("4hello")
        assert client.receive() == "4hello"


@pytest.mark.parametrize("query", ["", "EIO=4", "EIO=4&transport=", "EIO=4&transport=webtransport"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize("headers", [{}, UPGRADE], ids=["plain", "upgrade"])
def test_an_unknown_transport(
    served: Served, query: str, method: str, headers: dict[str, str]
) -> None:
    assert ask(served, method, query, headers).error == UNKNOWN_TRANSPORT
    assert ask(served, method, f"{query}&sid=whatever", headers).error == UNKNOWN_TRANSPORT


@pytest.mark.parametrize("name", ["__proto__", "POLLING", "polling%00", "websocket,"])
def test_an_odd_transport(served: Served, name: str) -> None:
    assert ask(served, "GET", f"EIO=4&transport={name}", UPGRADE).error == UNKNOWN_TRANSPORT


@pytest.mark.parametrize("version", ["", "EIO=&", "EIO=3&", "EIO=5&", "EIO=abc&", "EIO=4%20&"])
def test_an_unsupported_version(served: Served, transport: str, version: str) -> None:
    answer = ask(served, "GET", f"{version}transport={transport}", UPGRADE)
    assert answer.error == BAD_VERSION
    assert answer.json["hint"] == "this server speaks EIO=4"
    assert not served.app.opened


@pytest.mark.parametrize("version", ["", "EIO=3&", "EIO=5&"])
@pytest.mark.parametrize("headers", [{}, UPGRADE], ids=["plain", "upgrade"])
def test_another_version_does_no_harm_to_a_session(
    served: Served, transport: str, version: str, headers: dict[str, str]
) -> None:
    served.app.answer = echo
    client = served.poller()
    for method in ("GET", "POST"):
        query = f"{version}transport={transport}&sid={client.sid}"
        assert ask(served, method, query, headers).error == BAD_VERSION
    assert client.post("4still here").body == b"ok"
    assert client.get() == ["4still here"]


@pytest.mark.parametrize(
    "query",
    [
        "EIO=4&EIO=4&transport=polling",
        "EIO=4&transport=polling&transport=websocket",
        "EIO=4&transport=polling&sid=a&sid=b",
        "EIO=4&transport=polling&other=&other=",
        "EIO=4&transport=polling&" + "&".join(f"p{i}" for i in range(100)),
    ],
)
def test_a_query_with_two_readings(served: Served, query: str) -> None:
    answer = ask(served, "GET", query)
    assert answer.error == BAD_REQUEST
    assert answer.json["hint"]
    assert not served.app.opened


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_handshake_is_a_get(served: Served, transport: str, method: str) -> None:
    assert ask(served, method, f"EIO=4&transport={transport}", UPGRADE).error == BAD_METHOD
    assert not served.app.opened


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_polling_is_get_and_post(served: Served, method: str) -> None:
    served.app.answer = echo
    client = served.poller()
    query = f"EIO=4&transport=polling&sid={client.sid}"
    assert ask(served, method, query).error == BAD_REQUEST
    assert client.post("4still here").body == b"ok"


@pytest.mark.parametrize(
    "sid",
    [
        "unknown",
        "",
        "__proto__",
        "__class__",
        "%00",
        "%ff%fe",
        "%F0%9F%98%80",
        "a" * 8000,
        "..%2f..%2fetc",
        "%0d%0aSet-Cookie:x",
        "*",
    ],
    ids=lambda sid: sid[:12],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_sid_says_why(served: Served, transport: str, method: str, sid: str) -> None:
    headers = UPGRADE if transport == "websocket" else {}
    answer = ask(served, method, f"EIO=4&transport={transport}&sid={sid}", headers)
    assert answer.error == UNKNOWN_SID
    assert answer.json["hint"] == (
        "the session has ended, or belongs to another process of this server"
    )
    assert not served.app.opened


WRONG_UPGRADES = [
    ("no headers", {}),
    ("no Upgrade", {**UPGRADE, "Upgrade": "h2c"}),
    ("no Connection", {**UPGRADE, "Connection": "keep-alive"}),
    ("no version", {**UPGRADE, "Sec-WebSocket-Version": ""}),
    ("version 8", {**UPGRADE, "Sec-WebSocket-Version": "8"}),
    ("two versions", {**UPGRADE, "Sec-WebSocket-Version": "13, 13"}),
    ("no key", {**UPGRADE, "Sec-WebSocket-Key": ""}),
    ("a short key", {**UPGRADE, "Sec-WebSocket-Key": "c2hvcnQ="}),
    ("a long key", {**UPGRADE, "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==" * 2}),
    ("no base64", {**UPGRADE, "Sec-WebSocket-Key": "?" * 22 + "=="}),
]


@pytest.mark.parametrize(
    "headers", [h for _, h in WRONG_UPGRADES], ids=[name for name, _ in WRONG_UPGRADES]
)
def test_no_websocket_handshake(served: Served, headers: dict[str, str]) -> None:
    """RFC 6455, 4.2.1."""
    query = "EIO=4&transport=websocket"
    assert ask(served, "GET", query, headers).error == BAD_REQUEST
    assert not served.app.opened
    served.app.answer = echo
    client = served.poller()
    assert ask(served, "GET", f"{query}&sid={client.sid}", headers).error == BAD_REQUEST
    assert client.post("4still here").body == b"ok"
    assert client.get() == ["4still here"]


def test_a_websocket_handshake_needs_http_1_1(served: Served) -> None:
    old = request("GET", f"{PATH}websocket", headers=UPGRADE).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert served.http().send(old).answer().error == BAD_REQUEST


def test_the_accept_key_and_tokens_in_any_case(served: Served) -> None:
    """RFC 6455, 1.3 has the key and its answer; 4.2.1: the tokens are case-insensitive."""
    headers = {**UPGRADE, "Upgrade": "WebSocket", "Connection": "keep-alive, upgrade"}
    answer = served.http().get(f"{PATH}websocket", headers)
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (answer.headers["upgrade"], answer.headers["connection"]) == ("websocket", "Upgrade")
    # What was not asked for, or not granted, is not in the answer (4.2.2).
    assert not {"sec-websocket-extensions", "sec-websocket-protocol"} & answer.headers.keys()


def test_extensions_and_subprotocols_are_declined(served: Served) -> None:
    offers = {
        "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Protocol": "chat, superchat",
    }
    answer = served.http().get(f"{PATH}websocket", {**UPGRADE, **offers})
    assert answer.status == 101
    assert not {"sec-websocket-extensions", "sec-websocket-protocol"} & answer.headers.keys()


@pytest.mark.parametrize("name", ["Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"])
def test_long_offers_cost_nothing(served: Served, name: str) -> None:
    """ReDoS in the parsers of others (CVE-2021-32640); here nobody parses them."""
    for filler in (",", " ", '"', "; a=", "\\"):
        offer = "x" + filler * (8000 // len(filler)) + "x"
        assert served.http().get(f"{PATH}websocket", {**UPGRADE, name: offer}).status == 101


def test_too_many_headers_on_an_upgrade(served: Served) -> None:
    """CVE-2024-37890."""
    for count in (101, 3000):
        many = {f"X-{i}": "" for i in range(count)}
        answer = served.http().get(f"{PATH}websocket", {**UPGRADE, **many})
        assert answer.status in (400, 431)
    assert served.websocket().sid


def test_a_server_that_stops_takes_no_more_sessions(served: Served, transport: str) -> None:
    served.app.answer = echo
    client = served.poller()
    served.engine.stop_accepting()
    answer = ask(served, "GET", f"EIO=4&transport={transport}", UPGRADE)
    assert answer.error == (503, 4, "Forbidden")
    client.post("4still here")
    assert client.get() == ["4still here"]


# Who may talk to it


def allow(environ: dict[str, Any]) -> Headers:
    origin = environ.get("HTTP_ORIGIN")
    if origin == "https://evil.example":
        raise Refused(ErrorCode.FORBIDDEN, "the origin is none of ours", HTTPStatus.FORBIDDEN)
    return [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")] if origin else []


FRIEND = {"Origin": "https://friend.example"}
FOE = {"Origin": "https://evil.example"}


def cors(answer: Answer) -> tuple[str | None, str | None]:
    return answer.headers.get("access-control-allow-origin"), answer.headers.get("vary")


def test_an_allowed_origin_may_read_every_answer(served: Served) -> None:
    served.app.allow = allow
    answers = [
        ask(served, "OPTIONS", "EIO=4&transport=polling", FRIEND),
        ask(served, "GET", "EIO=4&transport=polling", FRIEND),
        ask(served, "GET", "EIO=4&transport=polling&sid=unknown", FRIEND),
        ask(served, "GET", "EIO=4", FRIEND),
        ask(served, "GET", "EIO=4&EIO=4", FRIEND),
        ask(served, "GET", "EIO=4&transport=websocket", {**UPGRADE, **FRIEND}),
    ]
    client = served.poller()
    served.session(client).send(message("hello"))
    answers.append(served.http().get(client.target, FRIEND))
    answers.append(served.http().post(client.target, b"4hello", FRIEND))
    assert [answer.status for answer in answers] == [204, 200, 400, 400, 400, 101, 200, 200]
    assert [cors(answer) for answer in answers] == [("https://friend.example", "Origin")] * 8


def test_without_an_origin_there_are_no_cors_headers(served: Served) -> None:
    served.app.allow = allow
    for query in ("EIO=4&transport=polling", "EIO=4&transport=polling&sid=unknown"):
        assert cors(ask(served, "GET", query)) == (None, None)


def test_options_needs_no_session(served: Served) -> None:
    answer = ask(served, "OPTIONS", "")
    assert (answer.status, answer.body) == (204, b"")
    assert not served.app.opened


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST", "PUT"])
@pytest.mark.parametrize("kind", ["", "polling", "websocket"])
@pytest.mark.parametrize("with_sid", [False, True])
def test_a_refused_origin_is_refused_everywhere(
    served: Served, method: str, kind: str, with_sid: bool
) -> None:
    served.app.allow = allow
    served.app.answer = echo
    client = served.poller()
    sid = f"&sid={client.sid}" if with_sid else ""
    answer = ask(served, method, f"EIO=4&transport={kind}{sid}", {**UPGRADE, **FOE})
    assert answer.error == FORBIDDEN
    assert answer.json["hint"] == "the origin is none of ours"
    assert cors(answer) == (None, None)
    assert len(served.app.opened) == 1
    # The session is not the one to pay for it.
    assert client.post("4still here").body == b"ok"
    assert client.get() == ["4still here"]
    assert served.app.messages == ["still here"]


def test_every_refusal_is_counted(served: Served) -> None:
    ask(served, "GET", "")
    ask(served, "GET", "EIO=3&transport=polling")
    ask(served, "GET", "EIO=3&transport=polling")
    assert served.engine.counters == {
        "refused: unknown_transport": 1,
        "refused: unsupported_protocol_version": 2,
    }


def test_a_refusal_keeps_the_connection(served: Served) -> None:
    client: Http = served.http()
    for _ in range(3):
        assert client.get("/engine.io/?EIO=4").error == UNKNOWN_TRANSPORT
    assert client.get(f"{PATH}polling").status == 200
