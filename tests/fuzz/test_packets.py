"""
Socket.IO packets in any order, against the handlers: whoever is let in is told good-bye once.

A bystander on a connection of its own is served all the time.
"""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings, strategies as st

from django_socketio import events
from django_socketio.exceptions import ConnectionRefused
from tests.clients import Connection, Lost
from tests.sites import Site
from tests.support import UNIT, wait_until

NAMESPACES = ("/", "/a", "/refuses", "/unknown")

PACKETS = st.one_of(
    st.builds("40{},".format, st.sampled_from(["", "/a", "/refuses", "/unknown"])),
    st.just("40"),
    st.sampled_from(["40/a,{}", "41", "41/a,", "41/unknown,"]),
    st.sampled_from(
        ['42["hello"]', '42/a,["hello",1]', '42["fence"]', '421["hello"]', '42/a,9["x"]']
    ),
    st.sampled_from(['42["message","x"]', '42["__subscribe__","c"]', '422["__unsubscribe__","c"]']),
    st.sampled_from(
        ["430[]", "43/a,7[1]", '44{"message":"x"}', '42["connect"]', "42[]", "4", "49"]
    ),
    st.sampled_from(['451-["hello",{"_placeholder":true,"num":0}]', '452-["hello"]', "450-[]"]),
    st.sampled_from(['461-0[{"_placeholder":true,"num":0}]', '42["raises"]', '42["leaves"]']),
    st.sampled_from([b"attachment", b"", "3", "6", "2"]),
)


class Told:
    """What the handlers have been told of each socket."""

    def __init__(self) -> None:
        self.heard: dict[int, Counter[str]] = {}
        self.total: Counter[str] = Counter()
        self.sockets: list[Any] = []  # so that no other gets the id of one
        for namespace in ("/", "/a", "/refuses"):
            self._bind(namespace)

    def _bind(self, namespace: str) -> None:
        def note(what: str) -> Any:
            def handler(request: Any, socket: Any, *args: Any) -> None:
                self.heard.setdefault(id(socket), Counter())[what] += 1
                self.total[what] += 1
                self.sockets.append(socket)

            return handler

        events.on_disconnect(note("disconnect"), namespace=namespace)
        events.on_finish(note("finish"), namespace=namespace)
        events.on_subscribe(note("subscribe"), namespace=namespace)
        events.on_unsubscribe(note("unsubscribe"), namespace=namespace)
        events.on_event("hello", namespace=namespace)(note("event"))

        @events.on_connect(namespace=namespace)
        def connect(request: Any, socket: Any, context: Any) -> None:
            if namespace == "/refuses":
                raise ConnectionRefused("not here")
            note("connect")(request, socket)

        @events.on_event("raises", namespace=namespace)
        def raises(request: Any, socket: Any, context: Any) -> None:
            raise ArithmeticError("on purpose")

        @events.on_event("leaves", namespace=namespace)
        def leaves(request: Any, socket: Any, context: Any) -> None:
            socket.disconnect()

    def check(self) -> None:
        for told in self.heard.values():
            assert told["connect"] == told["disconnect"] == told["finish"] == 1, told
            assert told["subscribe"] == told["unsubscribe"], told
        self.heard.clear()
        self.sockets.clear()


def play(connection: Connection, packets: list[str | bytes]) -> None:
    """Send packets until the server has had enough."""
    for packet in packets:
        try:
            connection.transport.send(packet)
        except (Lost, OSError):
            return


@pytest.mark.timeout(4000 * UNIT)
@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_packets(site: Site, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="django_socketio")
    told = Told()
    bystander = site.connect()
    engine = site.dispatcher.engine

    @settings(
        max_examples=60,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @example(['42["hello"]'], "/", True)  # what chance brings may all be refused
    @given(st.lists(PACKETS, max_size=25), st.sampled_from(["", "/", "/a"]), st.booleans())
    def check(packets: list[str | bytes], namespace: str, closes: bool) -> None:
        connection = site.open(transport)
        sid = connection.sid
        if namespace:
            connection.connect(namespace)
        play(connection, packets)
        assert bystander.fence() == []
        if closes:
            connection.close()
        else:
            connection.drop()
            session = engine.sessions.get(sid)
            if transport == "polling" and session is not None:
                session.end("transport close")  # else it would be the heartbeat
        assert bystander.fence() == []
        wait_until(
            lambda: sid not in engine.sessions or engine.sessions[sid].reason, what="its end"
        )
        wait_until(lambda: len(site.dispatcher.connections) == 1, what="the end of its handlers")
        told.check()

    told.heard.clear()  # of the bystander
    check()
    assert told.total["connect"] > 10 and told.total["event"], told.total
