"""How many sessions there may be, and how fast they may come: on either transport, by address."""

from collections.abc import Callable
from typing import Any

import gevent
import pytest

from django_socketio.engine import AdmissionLimits, Rate
from tests.support import UNIT, wait_until

from .clients import PATH, Answer, Http, Poller, WebSocket, close_all
from .served import Served
from .test_handshake import UPGRADE

SLOW = 0.0001
"""A rate by which nothing comes back while a test runs."""


@pytest.fixture
def limit(serve: Callable[..., Served]) -> Callable[..., Served]:
    """Return a function that serves an engine with these limits."""
    return lambda **limits: serve(admission=AdmissionLimits(**limits))


def ask(served: Served, transport: str, client: Http | None = None) -> Answer:
    """Ask for a session, and return the answer."""
    client = client or served.http()
    return client.get(PATH + transport, UPGRADE if transport == "websocket" else {})


def check_refusal(served: Served, answer: Answer, name: str, status: int, hint: str) -> None:
    assert answer.error == (status, 4, "Forbidden")
    assert answer.json["hint"] == hint
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["connection"] == "close"
    assert answer.headers["cache-control"] == "no-store"
    assert served.engine.counters[f"over limit: {name}"] == 1


FULL = ("MAX_CONNECTIONS", 503, "the server is full")


def test_as_many_as_there_may_be_and_one_more(limit: Callable[..., Served], transport: str) -> None:
    served = limit(connections=3)
    clients = [served.client(transport) for _ in range(3)]
    check_refusal(served, ask(served, transport), *FULL)
    assert len(served.app.opened) == 3
    clients[0].close() if transport == "websocket" else clients[0].post("1")  # type: ignore[union-attr]
    wait_until(lambda: served.app.closed)
    if transport == "polling":
        clients[0].get()  # type: ignore[union-attr]
    assert served.client(transport).sid


def test_both_transports_count(limit: Callable[..., Served]) -> None:
    served = limit(connections=2)
    poller, other = served.poller(), served.websocket()
    upgraded = served.upgrade(poller)
    upgraded.send("2probe", "5")
    assert upgraded.receive() == "3probe"
    check_refusal(served, ask(served, "polling"), *FULL)
    assert ask(served, "websocket").status == 503
    other.send("4still here")
    wait_until(lambda: served.app.messages == ["still here"])


def test_a_websocket_that_will_not_go_still_counts(limit: Callable[..., Served]) -> None:
    """Its descriptor is there until the end."""
    served = limit(connections=1)
    client = served.websocket(answers=False)
    served.session(client).close()
    assert not served.engine.sessions
    check_refusal(served, ask(served, "polling"), *FULL)
    client.close()
    wait_until(lambda: ask(served, "polling").status == 200)


def test_a_place_that_is_taken_during_the_handshake(limit: Callable[..., Served]) -> None:
    """Middleware may take its time, so several may pass the first look."""
    served = limit(connections=1)
    plain, handle = served.engine, served.engine.handle

    def slow(environ: dict[str, Any], payload: Any = None) -> Any:
        response = handle(environ, payload)
        gevent.sleep(UNIT)
        return response

    plain.handle = slow  # type: ignore[method-assign]
    clients = [served.http() for _ in range(3)]
    for client in clients:
        client.request("GET", f"{PATH}websocket", headers=UPGRADE)
    answers = [client.answer() for client in clients]
    assert sorted(answer.status for answer in answers) == [101, 503, 503]
    for client, answer in zip(clients, answers, strict=True):
        if answer.status == 503:
            assert answer.error == (503, 4, "Forbidden")
            assert answer.headers["retry-after"] == "5"
            assert client.gone()
    assert len(served.app.opened) == 1
    assert served.engine.counters["over limit: MAX_CONNECTIONS"] == 2


def test_nobody_is_counted_who_is_not_let_in(limit: Callable[..., Served]) -> None:
    served = limit(connections=1, per_address=1)
    for headers in ({}, {**UPGRADE, "Sec-WebSocket-Version": "8"}):
        for _ in range(3):
            assert served.http().get(f"{PATH}websocket", headers).status == 400
    assert served.websocket().sid


# By address


def address(served: Served) -> Callable[[str], None]:
    """Return a function that says where whoever comes next comes from."""
    handle, there = served.engine.handle, ["1.1.1.1"]

    def elsewhere(environ: dict[str, Any], payload: Any = None) -> Any:
        environ["REMOTE_ADDR"] = there[0]  # as a middleware may
        return handle(environ, payload)

    served.engine.handle = elsewhere  # type: ignore[method-assign]
    return lambda place: there.__setitem__(0, place)


def test_as_many_of_an_address_as_there_may_be(
    limit: Callable[..., Served], transport: str
) -> None:
    served = limit(per_address=2)
    come_from = address(served)
    clients = [served.client(transport) for _ in range(2)]
    answer = ask(served, transport)
    check_refusal(
        served,
        answer,
        "MAX_CONNECTIONS_PER_ADDRESS",
        429,
        "too many connections of one address",
    )
    come_from("2.2.2.2")
    other = served.client(transport)
    come_from("1.1.1.1")
    served.session(clients[0]).end("transport close")
    again = served.client(transport)
    assert ask(served, transport).status == 429
    close_all([*clients, other, again])
    served.engine.close_all("")
    served.engine.stop()
    assert not served.engine._admission._inside
    assert not served.engine._admission._addresses


def test_an_address_ends_its_places_whatever_ends_its_sessions(
    limit: Callable[..., Served],
) -> None:
    served = limit(per_address=3)
    for number in range(30):
        client: Poller | WebSocket = served.poller() if number % 2 else served.websocket()
        if number % 3 == 0:
            client.reset()
            served.session(client).end("transport error")
        elif number % 3 == 1:
            served.session(client).close()
            served.session(client).end("") if client.sid in served.engine.sessions else None
        elif isinstance(client, Poller):
            client.post("garbage")
        else:
            client.send("garbage")
        wait_until(lambda number=number: len(served.app.closed) == number + 1)  # type: ignore[misc]
    assert not served.engine._admission._addresses


# How fast


def test_handshakes_of_one_address(limit: Callable[..., Served], transport: str) -> None:
    served = limit(rate_per_address=Rate(SLOW, 3))
    come_from = address(served)
    for _ in range(3):
        served.client(transport).close()
    check_refusal(
        served,
        ask(served, transport),
        "HANDSHAKE_RATE_PER_ADDRESS",
        429,
        "too many handshakes of one address",
    )
    come_from("2.2.2.2")
    assert served.client(transport).sid


def test_handshakes_of_all(limit: Callable[..., Served], transport: str) -> None:
    served = limit(rate=Rate(SLOW, 3))
    come_from = address(served)
    clients = [served.client(transport) for _ in range(3)]
    come_from("2.2.2.2")
    check_refusal(
        served, ask(served, transport), "HANDSHAKE_RATE", 503, "too many handshakes at once"
    )
    # Those who are in are in.
    for client in clients:
        client.send("4hello") if isinstance(client, WebSocket) else client.post("4hello")
    wait_until(lambda: served.app.messages == ["hello"] * 3)


def test_one_address_does_not_use_up_what_is_for_all(limit: Callable[..., Served]) -> None:
    served = limit(rate=Rate(SLOW, 5), rate_per_address=Rate(SLOW, 2))
    come_from = address(served)
    assert [ask(served, "polling").status for _ in range(20)] == [200] * 2 + [429] * 18
    come_from("2.2.2.2")
    assert [ask(served, "polling").status for _ in range(3)] == [200, 200, 429]


def test_the_rate_lets_in_again(limit: Callable[..., Served]) -> None:
    served = limit(rate=Rate(1 / UNIT, 1))
    assert ask(served, "polling").status == 200
    assert ask(served, "polling").status == 503
    wait_until(lambda: ask(served, "polling").status == 200)


# Before anybody has spent anything


def test_who_is_sure_to_be_refused_is_turned_away(limit: Callable[..., Served]) -> None:
    served = limit(connections=1, rate=Rate(SLOW, 2))
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": ""}
    assert all(served.engine.turn_away(dict(environ)) is None for _ in range(10))
    client = served.poller()
    answer = served.engine.turn_away(dict(environ))
    assert answer is not None and answer.status == 503 and b"full" in answer.body
    served.session(client).end("transport close")
    assert served.engine.turn_away(dict(environ)) is None
    served.poller()
    served.engine.close_all("")
    served.engine.stop()
    answer = served.engine.turn_away(dict(environ))
    assert answer is not None and answer.status == 503 and b"handshakes" in answer.body


# By user


def test_users_are_asked_for_once_each(serve: Callable[..., Served], transport: str) -> None:
    served = serve(admission=AdmissionLimits(per_user=2))
    asked: list[Any] = []
    names = iter(["ann", "ann", "ann", "bob", None, None, None])
    served.engine._user_of = lambda payload: asked.append(payload) or next(names)  # type: ignore[func-returns-value]
    first = served.client(transport), served.client(transport)
    answer = ask(served, transport)
    check_refusal(
        served, answer, "MAX_CONNECTIONS_PER_USER", 429, "too many connections of one user"
    )
    others = [served.client(transport) for _ in range(4)]  # bob, and three of whom nobody knows who
    assert len(asked) == 7
    assert served.engine._admission._users == {"ann": 2, "bob": 1}
    for client in (*first, *others):
        served.session(client).end("transport close")
    assert not served.engine._admission._users
