"""Clients come and go: nothing of them stays."""

import gc
import weakref
from collections.abc import Callable

import gevent

from tests.support import UNIT, wait_until

from .clients import PATH, Client, Http, Poller, WebSocket, frame, request
from .resources import KEPT_GREENLETS, Resources
from .served import Served, echo, lanes

CYCLES, AT_ONCE = 2_000, 20


def polls_and_goes(served: Served) -> list[Client]:
    client = Poller(served.address)
    client.start_get()
    return [client]


def never_polls(served: Served) -> list[Client]:
    return [Poller(served.address)]


def posts_and_goes(served: Served) -> list[Client]:
    client = Poller(served.address)
    assert client.post("4hello").body == b"ok"
    return [client]


def posts_by_halves(served: Served) -> list[Client]:
    client = Poller(served.address)
    client.posting.send(request("POST", client.target, b"4hello")[:-3])
    return [client]


def connects(served: Served) -> list[Client]:
    return [WebSocket(served.address)]


def talks(served: Served) -> list[Client]:
    client = WebSocket(served.address)
    client.send("4hello", b"binary")
    assert client.receive() == "4hello"
    return [client]


def closes(served: Served) -> list[Client]:
    client = WebSocket(served.address)
    client.send_raw(frame(8, b"\x03\xe8"))
    return [client]


def stops_in_a_frame(served: Served) -> list[Client]:
    client = WebSocket(served.address)
    client.send_raw(frame(1, "4first", fin=False), frame(0, "4" * 200)[:100])
    return [client]


def fails(served: Served) -> list[Client]:
    client = WebSocket(served.address, answers=False)
    client.send_raw(frame(1, "4hello", mask=False))
    return [client]


def probes(served: Served) -> list[Client]:
    poller = Poller(served.address)
    poller.start_get()
    client = poller.upgrade()
    client.send("2probe")
    return [poller, client]


def upgrades(served: Served) -> list[Client]:
    poller = Poller(served.address)
    client = poller.upgrade()
    client.send("2probe", "5", "4hello")
    return [client, poller]


def is_refused(served: Served) -> list[Client]:
    client = Http(served.address)
    client.request("GET", f"{PATH}polling&sid=unknown")
    return [client]


KINDS: list[Callable[[Served], list[Client]]] = [
    polls_and_goes,
    never_polls,
    posts_and_goes,
    posts_by_halves,
    connects,
    talks,
    closes,
    stops_in_a_frame,
    fails,
    probes,
    upgrades,
    is_refused,
]


def cycle(served: Served, numbers: range) -> None:
    for number in numbers:
        clients = KINDS[number % len(KINDS)](served)
        if number % 7 == 0:
            gevent.sleep(0)
        for client in clients:
            if number % 2 and not isinstance(client, Http):
                client.close()
            else:
                client.reset()


def test_thousands_come_and_go(serve: Callable[..., Served]) -> None:
    served = serve(
        ping_interval=20 * UNIT,
        ping_timeout=20 * UNIT,
        upgrade_timeout=20 * UNIT,
        close_timeout=10 * UNIT,
    )
    served.app.answer = echo
    cycle(served, range(len(KINDS)))
    settle(served)
    before = Resources.now()

    share = CYCLES // AT_ONCE
    shares = [range(start, start + share) for start in range(0, CYCLES, share)]
    gevent.joinall([gevent.spawn(cycle, served, numbers) for numbers in shares], raise_error=True)

    sessions = [weakref.ref(session) for session in served.app.opened]
    assert len(sessions) > CYCLES / 2
    settle(served)
    wait_until(lambda: Resources.now().descriptors <= before.descriptors, what="all descriptors")
    after = Resources.now()
    assert after.greenlets <= before.greenlets + KEPT_GREENLETS
    assert after.watchers <= before.watchers
    gc.collect()
    assert [session() for session in sessions] == [None] * len(sessions)


def settle(served: Served) -> None:
    """Wait until the engine knows nobody any more, and let go of what the tests know."""
    engine = served.engine
    wait_until(lambda: not engine.sessions, what="the end of all sessions")
    wait_until(lambda: not served.server.connections, what="the end of all connections")
    wait_until(lambda: not lanes(served), what="the end of all deadlines")
    assert not engine._held_back
    served.check()
    served.app.opened.clear()
    served.app.closed.clear()
