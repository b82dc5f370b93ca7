"""Hypothesis strategies for Socket.IO packets, shared by the tests of every codec of theirs."""

from typing import Any

from hypothesis import strategies as st

from django_socketio.protocol.socketio import (
    ACK,
    CONNECT,
    CONNECT_ERROR,
    DISCONNECT,
    EVENT,
    MAX_ACK_ID,
    RESERVED_EVENTS,
    Packet,
    PacketType,
)

#: What JavaScript's numbers hold without loss.
SAFE_INTEGER = 2**53

# From there to 1e21 JavaScript writes a float as an integer, but not as the one that it is.
floats = st.floats(allow_nan=False, allow_infinity=False).filter(
    lambda number: not SAFE_INTEGER < abs(number) < 1e21
)
integers = st.integers(-SAFE_INTEGER, SAFE_INTEGER)
scalars = st.none() | st.booleans() | integers | floats | st.text()

# An application's own object of this key is taken for a placeholder, by every parser; and to
# JavaScript `__proto__` is more than a key.
keys = st.text().filter(lambda key: key not in ("_placeholder", "__proto__"))


def values(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return JSON values with such leaves."""
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=10
    )


objects = st.dictionaries(keys, values(scalars), max_size=3)
namespaces = st.just("/") | st.text().map(lambda text: "/" + text.replace(",", ";"))
names = st.text().filter(lambda name: name not in RESERVED_EVENTS)
ids = st.integers(0, MAX_ACK_ID)


def events_and_acks(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Packet]:
    """Return the packets that have arguments, with such leaves in them."""
    arguments = st.lists(values(leaves), max_size=4)
    named = st.builds(lambda name, rest: [name, *rest], names, arguments)
    events = st.builds(Packet, st.just(EVENT), namespaces, named, st.none() | ids)
    return events | st.builds(Packet, st.just(ACK), namespaces, arguments, ids)


def _without_id(type_: PacketType, data: st.SearchStrategy[Any]) -> st.SearchStrategy[Packet]:
    return st.builds(Packet, st.just(type_), namespaces, data, st.none())


plain = (
    events_and_acks(scalars)
    | _without_id(CONNECT, st.none() | objects)
    | _without_id(DISCONNECT, st.none())
    | _without_id(CONNECT_ERROR, objects | st.text())
)

#: Packets of every type; those with arguments may have bytes anywhere in them.
packets = plain | events_and_acks(scalars | st.binary(max_size=40))

# Text that is nearly a packet: what a parser may stumble over is far from random.
_FIRST, _SECOND = '{"_placeholder":true,"num":0}', '{"_placeholder":true,"num":1}'
_BINARY = [f'["a",{_FIRST}]', f'["a",{_FIRST},[{_SECOND}]]', f'["a",{_SECOND},{{"b":{_FIRST}}}]']
_FIELDS = (
    [*"0123456"],
    ["", "", "1-", "1-", "2-", "0-", "-", "01-", "99999-"],
    ["", "", "/a,", "/a", "/,", "/\x1eé?b=c,", ","],
    ["", "", "0", "12", "007", str(MAX_ACK_ID), "9" * 17, "-1"],
    ["", '["a"]', '["a"', '["connect"]', "[]", '{"a":1}', '"a"', "null", "[0]", '["\\ud800"]']
    + [*_BINARY, f'["a",{_FIRST},{_FIRST}]', f"[{_FIRST}]"],
)
_ordered = st.tuples(*map(st.sampled_from, _FIELDS)).map("".join)
_binary = st.tuples(*map(st.sampled_from, ("56", ["1-", "2-"], *_FIELDS[2:4], _BINARY)))
_shuffled = st.lists(st.sampled_from(sorted(set().union(*_FIELDS))), max_size=8).map("".join)
nearly = _ordered | _binary.map("".join) | _shuffled
