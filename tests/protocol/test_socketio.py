"""Socket.IO protocol v5, as far as it is about packets. Tests name the section they hold."""

import json
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from django_socketio.protocol import socketio
from django_socketio.protocol.exceptions import ProtocolError
from django_socketio.protocol.socketio import (
    ACK,
    CONNECT,
    CONNECT_ERROR,
    DISCONNECT,
    EVENT,
    Assembly,
    Limits,
    Packet,
    PacketType,
)
from tests.protocol import packets as packets_

MAX_ATTACHMENTS = 10

DEEP = 1000
"""Levels of nesting that are read: parsers may stop at 1024."""

LIMITS = Limits(attachments=MAX_ATTACHMENTS, depth=DEEP + 10, name=1_000_000)


def decode(text: str) -> Packet | Assembly:
    return socketio.decode(text, LIMITS)


def assembly(text: str) -> Assembly:
    decoded = decode(text)
    assert isinstance(decoded, Assembly)
    return decoded


def join(text: bytes, attachments: list[bytes]) -> Packet | Assembly | None:
    """Decode a packet as its messages arrive, one by one."""
    # The limit is not what is tested here.
    decoded: Packet | Assembly | None = socketio.decode(text.decode(), Limits(attachments=100))
    for attachment in attachments:
        assert isinstance(decoded, Assembly)
        decoded = decoded.add(attachment) or decoded
    return decoded


def malformed(text: str) -> None:
    with pytest.raises(ProtocolError):
        decode(text)


def nested(levels: int, core: str) -> str:
    return "[" * levels + core + "]" * levels


# Exchange protocol


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("CONNECT", 0),
        ("DISCONNECT", 1),
        ("EVENT", 2),
        ("ACK", 3),
        ("CONNECT_ERROR", 4),
        ("BINARY_EVENT", 5),
        ("BINARY_ACK", 6),
    ],
)
def test_packet_types(name: str, id_: int) -> None:
    """Exchange protocol: "Here is the list of available packet types"."""
    assert PacketType[name] == id_
    assert len(PacketType) == 7


# Packet encoding: Format, and the examples of the document and of its sample session

PLACEHOLDER = '{"_placeholder":true,"num":0}'
SID = {"sid": "oSO0OpakMV_3jnilAAAA"}
REFUSAL = {"message": "Not authorized"}

EXAMPLES: list[tuple[str, Packet, list[bytes]]] = [
    # Connection to a namespace
    ("0", Packet(CONNECT), []),
    ('0/admin,{"sid":"oSO0OpakMV_3jnilAAAA"}', Packet(CONNECT, "/admin", SID), []),
    (
        '4{"message":"Not authorized"}',
        Packet(CONNECT_ERROR, "/", {"message": "Not authorized"}),
        [],
    ),
    # Sending and receiving data
    ('2["foo"]', Packet(EVENT, "/", ["foo"]), []),
    ('2/admin,["bar"]', Packet(EVENT, "/admin", ["bar"]), []),
    (
        f'51-["baz",{PLACEHOLDER}]',
        Packet(EVENT, "/", ["baz", b"\x01\x02\x03\x04"]),
        [b"\x01\x02\x03\x04"],
    ),
    (
        f'52-/admin,["baz",{PLACEHOLDER},{{"_placeholder":true,"num":1}}]',
        Packet(EVENT, "/admin", ["baz", b"\x01\x02", b"\x03\x04"]),
        [b"\x01\x02", b"\x03\x04"],
    ),
    # Acknowledgement; the document ends the second with a stray backquote
    ('212["foo"]', Packet(EVENT, "/", ["foo"], 12), []),
    ('3/admin,13["bar"]', Packet(ACK, "/admin", ["bar"], 13), []),
    (
        f'61-15["bar",{PLACEHOLDER}]',
        Packet(ACK, "/", ["bar", b"\x01\x02\x03\x04"], 15),
        [b"\x01\x02\x03\x04"],
    ),
    # Disconnection from a namespace
    ("1", Packet(DISCONNECT), []),
    ("1/admin,", Packet(DISCONNECT, "/admin"), []),
    # Sample session
    ('0{"sid":"wZX3oN0bSVIhsaknAAAI"}', Packet(CONNECT, "/", {"sid": "wZX3oN0bSVIhsaknAAAI"}), []),
    ('2["hey","Jude"]', Packet(EVENT, "/", ["hey", "Jude"]), []),
    ("0/admin,", Packet(CONNECT, "/admin"), []),
    ('2/admin,1["tellme"]', Packet(EVENT, "/admin", ["tellme"], 1), []),
    (f"61-/admin,1[{PLACEHOLDER}]", Packet(ACK, "/admin", [b"\x00"], 1), [b"\x00"]),
    # Exchange protocol: Connection to a namespace, and Acknowledgement
    ('0/admin,{"token":"123"}', Packet(CONNECT, "/admin", {"token": "123"}), []),
    ("312[]", Packet(ACK, "/", [], 12), []),
    ('3/admin,13["bar"]', Packet(ACK, "/admin", ["bar"], 13), []),
    (
        f'51-14["foo",{PLACEHOLDER}]',
        Packet(EVENT, "/", ["foo", b"\x01\x02\x03\x04"], 14),
        [b"\x01\x02\x03\x04"],
    ),
]


@pytest.mark.parametrize(("text", "packet", "attachments"), EXAMPLES)
def test_the_examples_are_read(text: str, packet: Packet, attachments: list[bytes]) -> None:
    """Packet encoding, Examples."""
    assert join(text.encode(), attachments) == packet


@pytest.mark.parametrize(("text", "packet", "attachments"), EXAMPLES)
def test_the_examples_are_written(text: str, packet: Packet, attachments: list[bytes]) -> None:
    """Packet encoding, Examples: byte for byte."""
    assert socketio.encode(packet) == (text.encode(), attachments)


@pytest.mark.parametrize(
    ("text", "packet"),
    [
        # The comma may be left out where nothing follows.
        ("0/admin", Packet(CONNECT, "/admin")),
        ("1/admin", Packet(DISCONNECT, "/admin")),
        ("0/", Packet(CONNECT, "/")),
        ("0/,", Packet(CONNECT, "/")),
        ('2/,["a"]', Packet(EVENT, "/", ["a"])),
        ('2//a//,["a"]', Packet(EVENT, "//a//", ["a"])),
        ('2/a?b=c,["a"]', Packet(EVENT, "/a?b=c", ["a"])),
        ('2/ä €,7["a"]', Packet(EVENT, "/ä €", ["a"], 7)),
        ('2/7,7["a"]', Packet(EVENT, "/7", ["a"], 7)),
        ('2/["a"],["b"]', Packet(EVENT, '/["a"]', ["b"])),
        ('2/__proto__,["a"]', Packet(EVENT, "/__proto__", ["a"])),
        ("0/" + "a" * 100_000, Packet(CONNECT, "/" + "a" * 100_000)),
        # What looks like the next field inside the payload is not.
        ('2["a","/b,",3,"1-"]', Packet(EVENT, "/", ["a", "/b,", 3, "1-"])),
    ],
)
def test_where_a_namespace_ends(text: str, packet: Packet) -> None:
    """Format: `[<namespace>,]`."""
    assert decode(text) == packet


@pytest.mark.parametrize(
    "text",
    [
        'admin,["a"]',
        '2admin,["a"]',
        '2,["a"]',
        '2,/admin,["a"]',
        '212/admin,["a"]',  # the id comes after
        '2/admin["a"]',  # a namespace that swallows all
        '5/admin,1-["a"]',  # the number of attachments comes before
        '2/admin,,["a"]',
    ],
)
def test_odd_namespaces(text: str) -> None:
    """Format: the order of the fields."""
    malformed(text)


@pytest.mark.parametrize(
    "text", ["", "7", "8", "9", "-", "-1", "a", '["a"]', "/", "²", "２", " 2", "\x00", "\ud800"]
)
def test_no_other_type_is_a_packet(text: str) -> None:
    """Exchange protocol: seven types, 0 to 6."""
    with pytest.raises(ProtocolError, match="packet type"):
        decode(text)


# Exchange protocol: Connection to a namespace

# Numbers with a sign: without one they are an ack id.
JSON_TYPES = ["null", "true", "false", "-1", "-1.5", '"x"', '""', "[]", '["x"]', "{}", '{"x":1}']


@pytest.mark.parametrize("body", sorted({*JSON_TYPES} - {"null", "{}", '{"x":1}'}))
def test_a_connect_payload_is_an_object(body: str) -> None:
    """Connection to a namespace, "with an additional payload"."""
    malformed(f"0/admin,{body}")


@pytest.mark.parametrize("body", ['{"message":"no"}', '{"message":"no","data":[1]}', '"no"'])
def test_a_connect_error_has_a_message(body: str) -> None:
    """Connection to a namespace; version 4's plain strings are read as Node reads them."""
    assert decode(f"4{body}") == Packet(CONNECT_ERROR, "/", json.loads(body))


@pytest.mark.parametrize("text", ["4", "4/admin,", "4null", "4true", "41.5", "4[]", '4["no"]'])
def test_a_connect_error_without_a_message(text: str) -> None:
    """Difference between v5 and v4: "an object instead of a plain string"."""
    malformed(text)


# Exchange protocol: Sending and receiving data


@pytest.mark.parametrize("body", ["", *sorted({*JSON_TYPES} - {'["x"]'})])
def test_an_event_is_a_non_empty_array(body: str) -> None:
    """Sending and receiving data: "The payload is mandatory and MUST be a non-empty array"."""
    malformed(f"2{body}")
    malformed(f"2/admin,12{body}")


@pytest.mark.parametrize("name", [*sorted({*JSON_TYPES} - {'"x"', '""'}), '{"toString":"foo"}'])
def test_the_name_of_an_event_is_a_string(name: str) -> None:
    """CVE-2023-32695: a name with a `toString` of its own."""
    malformed(f"2[{name}]")
    malformed(f'2/admin,0[{name},"x"]')
    malformed(f"51-[{name},{PLACEHOLDER}]")


@pytest.mark.parametrize("name", ["", "message", "__proto__", "constructor", "toString", "\x00"])
def test_any_other_string_is_a_name(name: str) -> None:
    """CVE-2026-59724: to Python, the names of JavaScript's prototypes are like any other."""
    assert decode(f"2[{json.dumps(name)}]") == Packet(EVENT, "/", [name])


@pytest.mark.parametrize(
    "name",
    ["connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"],
)
def test_reserved_names(name: str) -> None:
    """Node's parser refuses these; escapes are no way around it."""
    malformed(f'2["{name}"]')
    malformed(f'2/admin,12["{name}",1]')
    malformed(f'51-["{name}",{PLACEHOLDER}]')
    malformed(f'2["\\u{ord(name[0]):04x}{name[1:]}"]')
    assert decode(f'2["{name}s"]') == Packet(EVENT, "/", [f"{name}s"])


# Exchange protocol: Acknowledgement


@pytest.mark.parametrize("id_", [0, 1, 9, 10, 2**31, 2**53 - 1, 2**53])
def test_ack_ids(id_: int) -> None:
    """Acknowledgement: "an event ID". Python-socketio has ignored 0 (PSIO#1329)."""
    assert decode(f'2{id_}["a"]') == Packet(EVENT, "/", ["a"], id_)
    assert decode(f"3/admin,{id_}[]") == Packet(ACK, "/admin", [], id_)
    assert socketio.encode(Packet(ACK, "/", [], id_)) == (f"3{id_}[]".encode(), [])
    assert socketio.encode(Packet(EVENT, "/", ["a"], id_)) == (f'2{id_}["a"]'.encode(), [])


@pytest.mark.parametrize(
    "id_",
    [
        str(2**53 + 1),
        str(2**64),
        "9" * 17,
        "9" * 1_000_000,
        "0" * 1_000_000,
        "-1",
        "+1",
        "1.0",
        "1e3",
        "0x1",
        "1_0",
        "１",
        "٣",
        "²",
        "1,",
        "1-",
        "1 2",
    ],
    ids=lambda id_: id_[:20],
)
def test_malformed_ack_ids(id_: str) -> None:
    """Exchange protocol: "an acknowledgment id (integer)", and one that JavaScript can count to."""
    malformed(f'2{id_}["a"]')
    malformed(f"3{id_}[]")
    malformed(f"3/admin,{id_}[]")


def test_an_event_without_an_id_wants_no_ack() -> None:
    """Acknowledgement: "The sender MAY include an event ID"."""
    packet = decode('2["a"]')
    assert isinstance(packet, Packet)
    assert packet.id is None


@pytest.mark.parametrize("body", ["", *sorted({*JSON_TYPES} - {"[]", '["x"]'})])
def test_an_ack_is_an_array(body: str) -> None:
    """Acknowledgement: "The payload is mandatory and MUST be an array (possibly empty)"."""
    malformed(f"312{body}")


@pytest.mark.parametrize("text", ["3[]", '3["a"]', "3/admin,[]", f"61-[{PLACEHOLDER}]"])
def test_an_ack_names_its_event(text: str) -> None:
    """Acknowledgement: "with the same event ID"."""
    malformed(text)


# Exchange protocol: Disconnection from a namespace


@pytest.mark.parametrize("body", sorted({*JSON_TYPES} - {"null"}))
def test_a_disconnect_has_no_payload(body: str) -> None:
    """Disconnection from a namespace."""
    malformed(f"1/admin,{body}")


# Packet encoding: the payload


@pytest.mark.parametrize(
    "body",
    [
        '["a"',
        '["a"]]',
        '["a"] x',
        '["a",]',
        "['a']",
        '["a",NaN]',
        '["a",Infinity]',
        '["a",-Infinity]',
        '["a",undefined]',
        '["a",01]',
        '["a",1e999]',
        '["a","\x00"]',
        '["a","\n"]',
        '["a","\\x41"]',
        '["a","\ud800"]',
        '["a"]\x00',
        "//",
    ],
)
def test_what_is_no_json(body: str) -> None:
    """Format: `[JSON-stringified payload without binary]`."""
    malformed(f"2{body}")


@pytest.mark.parametrize("brackets", ["[", '{"a":', '["a",['])
def test_nesting_without_end(brackets: str) -> None:
    """It ended python-socketio with a RecursionError."""
    malformed("2" + brackets * 300_000)


@pytest.mark.parametrize("prefix", ["2", "51-"])
def test_deep_nesting(prefix: str) -> None:
    """The same, well formed; behind the limit of the parser nothing walks it either."""
    malformed(f'{prefix}["a",{nested(100_000, PLACEHOLDER)}]')


# Packet encoding: binary attachments


@pytest.mark.parametrize("count", ["", "0", "00", "-1", "+1", " 1", "1 ", "1.0", "1e0", "0x1"])
@pytest.mark.parametrize("type_", "56")
def test_malformed_numbers_of_attachments(type_: str, count: str) -> None:
    """CVE-2026-69185 for zero: the parser waited for ever, and kept whatever binary came."""
    malformed(f'{type_}{count}-7["x"]')
    malformed(f'{type_}{count}-7["x",{PLACEHOLDER}]')


@pytest.mark.parametrize("count", ["１", "١", "²", "a", "_1", "1_0", "1,", "1" * 1_000_000])
def test_more_malformed_numbers_of_attachments(count: str) -> None:
    """Format: `<# of binary attachments>-`."""
    malformed(f'5{count}-["x",{PLACEHOLDER}]')


@pytest.mark.parametrize("text", ["5", "51", "5-", "51-", '5["x"]', '51["x"]', "5/a,", "51/a,1-[]"])
def test_no_number_of_attachments(text: str) -> None:
    """Format: a binary packet says how many attachments it has."""
    malformed(text)


@pytest.mark.parametrize("limit", [1, 2, 10, 50])
def test_the_limit_of_attachments_is_an_argument(limit: int) -> None:
    """CVE-2026-33151: "unbounded number of attachments"."""

    def text(count: int) -> str:
        places = "".join(f',{{"_placeholder":true,"num":{num}}}' for num in range(count))
        return f'5{count}-["x"{places}]'

    assert isinstance(socketio.decode(text(limit), Limits(attachments=limit)), Assembly)
    with pytest.raises(ProtocolError, match=f"{limit + 1} attachments"):
        socketio.decode(text(limit + 1), Limits(attachments=limit))


@pytest.mark.parametrize("count", ["11", "1000", "999999999", "99999999999999", "9" * 1_000_000])
def test_too_many_attachments(count: str) -> None:
    """CVE-2026-33151: refused before a single one has come."""
    malformed(f'5{count}-["x",{PLACEHOLDER}]')


def place(num: Any) -> str:
    return json.dumps({"_placeholder": True, "num": num})


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [place(-1)]),
        (1, [place(1)]),
        (1, [place(10**9)]),
        (1, [place(10**30)]),
        (1, [place("0")]),
        (1, [place("x")]),
        (1, [place("length")]),
        (1, [place(None)]),
        (1, [place(True)]),
        (1, [place(False)]),
        (1, [place(0.0)]),
        (1, [place([0])]),
        (1, [place({"_placeholder": True, "num": 0})]),
        (1, ['{"_placeholder":true}']),
        (1, [place(0), place(0)]),
        (2, [place(0), place(0)]),
        (2, [place(0)]),
        (2, [place(0), place(2)]),
        (2, [place(1), place(2)]),
        (2, [place(0), place(1), place(1)]),
        (1, [place(0), place(1)]),
        (1, []),
        (1, ['"x"']),
        (1, ['{"_placeholder":false,"num":0}']),
        (1, ['{"_placeholder":1,"num":0}']),
        (1, ['{"_placeholder":"true","num":0}']),
        (1, ['{"num":0}']),
        (1, ["[[[[]]]]"]),
        (1, [json.dumps(PLACEHOLDER)]),
    ],
)
def test_placeholders_that_fit_no_attachment(count: int, places: list[str]) -> None:
    """CVE-2022-2421: each number from 0 stands exactly once, as an integer."""
    inside = ",".join(['"x"', *places])
    malformed(f"5{count}-[{inside}]")
    malformed(f"5{count}-/admin,7[{inside}]")
    malformed(f'6{count}-7[{{"deep":[{inside}]}}]')


@pytest.mark.parametrize("body", ["", "null", PLACEHOLDER, f'{{"0":"x","1":{PLACEHOLDER}}}', '"x"'])
def test_a_binary_packet_is_an_array_too(body: str) -> None:
    """Sending and receiving data, and Acknowledgement."""
    malformed(f"51-{body}")
    malformed(f"61-7{body}")


def test_attachments_come_in_the_order_of_their_numbers() -> None:
    """Packet encoding, "with multiple attachments": by number, wherever the placeholders stand."""
    packet = assembly(f'53-["x",{place(2)},{{"b":[{place(0)}]}},[[{place(1)}]]]')
    assert packet.add(b"zero") is None
    assert packet.add(b"one") is None
    assert packet.add(b"two") == Packet(EVENT, "/", ["x", b"two", {"b": [b"zero"]}, [[b"one"]]])


def test_a_placeholder_may_stand_deep() -> None:
    """Whatever the parser lets through is walked without recursion."""
    complete = assembly(f'51-["x",{nested(DEEP, PLACEHOLDER)}]').add(b"\x00")
    assert isinstance(complete, Packet)
    value = complete.data[1]
    for _ in range(DEEP):
        (value,) = value
    assert value == b"\x00"


@pytest.mark.parametrize("attachment", [b"", b"\x00", b"4text", b"\xff" * 100_000])
def test_an_attachment_is_taken_as_it_is(attachment: bytes) -> None:
    """Packet encoding: "binary attachments extracted"."""
    packet = assembly(f"61-/admin,0[{PLACEHOLDER}]").add(attachment)
    assert packet == Packet(ACK, "/admin", [attachment], 0)


def test_without_attachments_a_placeholder_is_data() -> None:
    """Packet encoding: only a binary packet has any; Node's parser does the same."""
    assert decode(f'2["x",{PLACEHOLDER}]') == Packet(EVENT, "/", ["x", json.loads(PLACEHOLDER)])


# Encoding


def test_a_type_without_arguments_carries_no_binary() -> None:
    """Exchange protocol: there is no binary CONNECT_ERROR, so it cannot be sent as one."""
    for type_ in (CONNECT, CONNECT_ERROR):
        with pytest.raises(TypeError, match=f"{type_.name} packet carries no binary"):
            socketio.encode(Packet(type_, "/", {"data": b"\x00"}))


def test_what_json_does_not_know_goes_to_the_hook() -> None:
    class Unknown:
        pass

    with pytest.raises(TypeError, match="Unknown is not JSON serializable"):
        socketio.encode(Packet(EVENT, "/", ["x", Unknown()]))
    text, attachments = socketio.encode(Packet(EVENT, "/", ["x", Unknown()]), lambda value: [b"!"])
    assert text == f'51-["x",[{PLACEHOLDER}]]'.encode()
    assert attachments == [b"!"]


def test_encoding_leaves_the_arguments_as_they_are() -> None:
    """What is sent may be sent again: attachments are taken out of the JSON, not of the value."""
    data = ["x", {"deep": [b"\x00"]}]
    assert socketio.encode(Packet(EVENT, "/", data)) == socketio.encode(Packet(EVENT, "/", data))
    assert data == ["x", {"deep": [b"\x00"]}]


# Properties


@given(packets_.packets)
def test_packets_round_trip(packet: Packet) -> None:
    assert join(*socketio.encode(packet)) == packet


@given(packets_.events_and_acks(packets_.scalars | st.binary(max_size=40)))
def test_a_binary_packet_says_so(packet: Packet) -> None:
    """Exchange protocol: a packet is BINARY_EVENT or BINARY_ACK if it has attachments."""
    text, attachments = socketio.encode(packet)
    plain, binary = ("2", "5") if packet.type is EVENT else ("3", "6")
    start = f"{binary}{len(attachments)}-" if attachments else plain
    assert text.startswith(start.encode())


@given(st.lists(packets_.values(packets_.scalars)))
def test_an_event_never_has_the_record_separator(data: list[Any]) -> None:
    """Engine.IO's "this assumes the record separator is not used in the data"."""
    text, _ = socketio.encode(Packet(EVENT, "/", ["\x1e", {"\x1e": "\x1e"}, *data]))
    assert b"\x1e" not in text


@given(st.text() | packets_.nearly, st.binary())
@example(f'52-["x",{PLACEHOLDER},{{"_placeholder":true,"num":1}}]', b"")
def test_any_text_is_a_packet_or_an_error(text: str, attachment: bytes) -> None:
    try:
        decoded: Packet | Assembly | None = decode(text)
    except ProtocolError:
        return
    added = 0
    while isinstance(decoded, Assembly):
        added += 1
        assert added <= MAX_ATTACHMENTS
        decoded = decoded.add(attachment) or decoded
    assert isinstance(decoded, Packet)
    # What was read can be written, and says the same.
    assert join(*socketio.encode(decoded)) == decoded
