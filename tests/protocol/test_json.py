"""JSON as the protocols carry it, and Django's types in it as Django itself renders them."""

import collections
import datetime
import decimal
import enum
import json as standard
import uuid
from typing import Any

import pytest
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.utils.functional import lazystr
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy, override
from hypothesis import example, given, strategies as st

from django_socketio.protocol import json
from django_socketio.protocol.exceptions import ProtocolError
from django_socketio.sockets import encode_event
from tests.protocol import packets


class Point(collections.namedtuple("Point", "x y")):
    """A class of its own, as most named tuples are."""


class Suit(models.TextChoices):
    HEARTS = "h", gettext_lazy("Hearts")
    SPADES = "s", gettext_lazy("Spades")


class Size(models.IntegerChoices):
    SMALL = 1
    LARGE = 2


class Level(enum.IntEnum):
    LOW = -1


class Ratio(float):
    """A float of another library, such as numpy's float64."""


class Reference(DjangoJSONEncoder):
    """Django's encoder, with attachments: what encode_event() is measured by."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.attachments: list[bytes] = []

    def default(self, o: Any) -> Any:
        if isinstance(o, bytes | bytearray | memoryview):
            self.attachments.append(bytes(o))
            return {"_placeholder": True, "num": len(self.attachments) - 1}
        return super().default(o)


def assert_as_django(value: Any) -> None:
    """Compare what `encode_event()` makes of a value with what Django does."""
    reference = Reference()
    expected = standard.loads(reference.encode(["name", value]))
    text, *attachments = encode_event("/", "name", [value])
    payload = text[text.index(b"[") :]
    assert standard.loads(payload) == expected
    assert attachments == reference.attachments


# Decoding


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("[true,false]", [True, False]),
        (' {"a" : [ 1 , -2.5e1 ] }\n', {"a": [1, -25.0]}),
        ('"\\u00e9\\ud83d\\ude00\\n\\/"', "é\N{GRINNING FACE}\n/"),
        ('{"a":1,"a":2}', {"a": 2}),
        ('{"__proto__":{"a":1}}', {"__proto__": {"a": 1}}),
        ("9007199254740993", 2**53 + 1),
        ("-9223372036854775808", -(2**63)),
        (b"[1]", [1]),
        ("é".join('""').encode(), "é"),
    ],
)
def test_what_is_json(text: str | bytes, value: Any) -> None:
    assert json.loads(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "nul",
        "NaN",
        "-Infinity",
        "undefined",
        "[1,]",
        "{a:1}",
        "{'a':1}",
        '{"a"}',
        "{1:2}",
        "01",
        "+1",
        ".5",
        "1.",
        "0x1",
        "1 2",
        "[1]x",
        '"\t"',
        '"\x00"',
        '"\\x41"',
        '"\ud800"',
        '"',
        "\ufeff[]",
        "// comment\n1",
        b'"\xff"',
        b"\xff",
        b'"\xed\xa0\x80"',
        "1e999",
    ],
)
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ProtocolError, match="invalid JSON"):
        json.loads(text)


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_deep_nesting_is_no_json(before: str, after: str) -> None:
    """It must be no RecursionError, and not the stack's overflow."""
    with pytest.raises(ProtocolError):
        json.loads(before * 100_000 + "0" + after * 100_000)
    with pytest.raises(ProtocolError):
        json.loads(before * 100_000)


def test_an_error_does_not_quote_the_peer() -> None:
    """What a client sends stays out of the log."""
    with pytest.raises(ProtocolError) as caught:
        json.loads('{"password": secret}')
    assert "secret" not in str(caught.value)


@given(st.text(st.characters()) | st.binary() | packets.nearly)
@example("[1e400]")
@example('["\\uD800"]')
def test_anything_is_json_or_an_error(text: str | bytes) -> None:
    """And what has been taken from one client can be sent to the next."""
    try:
        value = json.loads(text)
    except ProtocolError:
        return
    encoded, attachments = json.dumps_binary(value)
    assert json.loads(encoded.decode()) == value
    assert not attachments


# Encoding


@given(packets.values(packets.scalars))
def test_values_round_trip(value: Any) -> None:
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None, True]}, b'{"a":[1,2.5,null,true]}'),
        ("é\N{GRINNING FACE}", '"é\N{GRINNING FACE}"'.encode()),
        ('"\\\n\x00\x1e', b'"\\"\\\\\\n\\u0000\\u001e"'),
        ({2: "a", None: "b", True: "c", 1.5: "d"}, b'{"2":"a","null":"b","true":"c","1.5":"d"}'),
        ((1, (2, 3)), b"[1,[2,3]]"),
        ([], b"[]"),
    ],
)
def test_json_is_compact_and_utf_8(value: Any, text: bytes) -> None:
    assert json.dumps(value) == text
    assert json.dumps_binary(value) == (text, [])


def test_half_a_surrogate_pair_is_taken_as_others_take_it() -> None:
    """A browser sends it of a string that was cut in an emoji."""
    assert json.loads('["\\ud83d", "\\uDE00"]') == ["\ud83d", "\ude00"]
    assert json.dumps_binary(["\ud83d", 2**70, b"!"]) == (
        b'["\\ud83d",1180591620717411303424,{"_placeholder":true,"num":0}]',
        [b"!"],
    )


@pytest.mark.parametrize(
    "text", ['["\\ud83d", NaN]', '["\\ud83d", 1e999]', '["\\ud83d"', "[" * 9999 + '"\\ud83d"']
)
def test_a_surrogate_excuses_nothing_else(text: str) -> None:
    with pytest.raises(ProtocolError, match="invalid JSON"):
        json.loads(text)


@pytest.mark.parametrize("value", [["\ud83d", float("nan")], ["\ud83d", {1, 2}]])
def test_what_even_the_standard_library_does_not_encode(value: list[Any]) -> None:
    with pytest.raises(TypeError):
        json.dumps_binary(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, datetime.date(2026, 1, 1), b""])
def test_plain_json_knows_no_more_than_json(value: Any) -> None:
    with pytest.raises(TypeError):
        json.dumps(value)
    with pytest.raises(TypeError):
        json.dumps({"deep": [value]})


@pytest.mark.parametrize("binary", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
def test_every_bytes_like_object_is_an_attachment(binary: Any) -> None:
    text, attachments = json.dumps_binary(["x", {"deep": (binary,)}])
    assert text == b'["x",{"deep":[{"_placeholder":true,"num":0}]}]'
    assert attachments == [b"\x00\xff"]
    assert type(attachments[0]) is bytes


def test_an_attachment_is_a_copy() -> None:
    """What the caller does with its buffer later does not reach the client."""
    buffer = bytearray(b"before")
    _, attachments = json.dumps_binary([buffer, memoryview(buffer)])
    buffer[:] = b"after!"
    assert attachments == [b"before", b"before"]


def test_attachments_are_numbered_as_they_stand() -> None:
    """Socket.IO's "Packet encoding", "with multiple attachments"."""
    text, attachments = json.dumps_binary([b"0", {"a": b"1", "b": [b"2"]}, Point(b"3", b"0")])
    numbers = [int(part.partition("}")[0]) for part in text.decode().split('"num":')[1:]]
    assert numbers == [0, 1, 2, 3, 4]
    assert attachments == [b"0", b"1", b"2", b"3", b"0"]


def test_the_hook_may_return_bytes() -> None:
    assert json.dumps_binary([object()], lambda value: b"!") == (
        b'[{"_placeholder":true,"num":0}]',
        [b"!"],
    )


# Django's types, through encode_event()

offsets = st.builds(
    datetime.timezone,
    st.integers(-24 * 60 + 1, 24 * 60 - 1).map(lambda minutes: datetime.timedelta(minutes=minutes)),
)
moments = st.datetimes(timezones=st.none() | st.just(datetime.UTC) | offsets)
lazy_texts = st.text().map(lazystr)
choices = st.sampled_from([*Suit, *Size, *Level])

django_scalars = (
    moments
    | moments.map(lambda moment: moment.replace(microsecond=0))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
    | lazy_texts
    | st.text().map(SafeString)
    | choices
    | packets.floats.map(Ratio)
)
everything = packets.scalars | django_scalars
django_keys = packets.keys | st.text().map(SafeString) | packets.integers | st.booleans()
django_values = st.recursive(
    everything | st.binary(max_size=20) | st.binary(max_size=20).map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.builds(Point, inner, inner)
        | st.dictionaries(django_keys | choices | st.none(), inner)
    ),
    max_leaves=10,
)


@given(django_scalars)
def test_a_type_of_django(value: Any) -> None:
    assert_as_django(value)


@given(django_values)
def test_types_of_django_anywhere(value: Any) -> None:
    assert_as_django(value)


UTC = datetime.UTC
INDIA = datetime.timezone(datetime.timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    ("value", "rendered"),
    [
        (datetime.datetime(2026, 11, 23, 7, 30), "2026-11-23T07:30:00"),
        (datetime.datetime(2026, 11, 23, 7, 30, 1, 999999), "2026-11-23T07:30:01.999"),
        (datetime.datetime(2026, 11, 23, 7, 30, tzinfo=UTC), "2026-11-23T07:30:00Z"),
        (datetime.datetime(2026, 11, 23, 7, 30, 0, 1, tzinfo=UTC), "2026-11-23T07:30:00.000Z"),
        (datetime.datetime(2026, 11, 23, 7, 30, tzinfo=INDIA), "2026-11-23T07:30:00+05:30"),
        (datetime.date(2026, 11, 23), "2026-11-23"),
        (datetime.time(7, 30), "07:30:00"),
        (datetime.time(7, 30, 0, 123456), "07:30:00.123"),
        (datetime.timedelta(days=1, hours=2, seconds=3), "P1DT02H00M03S"),
        (datetime.timedelta(microseconds=-1), "-P0DT00H00M00.000001S"),
        (decimal.Decimal("10.10"), "10.10"),
        (decimal.Decimal("1E+3"), "1E+3"),
        (decimal.Decimal("NaN"), "NaN"),
        (uuid.UUID(int=10), "00000000-0000-0000-0000-00000000000a"),
        (lazystr("lazy"), "lazy"),
        (Suit.HEARTS.label, "Hearts"),
        (SafeString("<b>"), "<b>"),
        (Suit.SPADES, "s"),
        (Size.LARGE, 2),
        (Level.LOW, -1),
        (Ratio(1.5), 1.5),
        (Point(1, Point(2, decimal.Decimal(3))), [1, [2, "3"]]),
        ({1: Suit.HEARTS, Suit.SPADES: (), SafeString("s"): 1}, {"1": "h", "s": 1}),
        ({Size.SMALL: {None: 1, True: 2, 1.5: 3}}, {"1": {"null": 1, "true": 2, "1.5": 3}}),
    ],
)
def test_types_of_django_by_example(value: Any, rendered: Any) -> None:
    """The rendering itself, should Django's change."""
    (text,) = encode_event("/", "name", [value])
    assert standard.loads(text[1:]) == ["name", rendered]
    assert_as_django(value)


def test_a_translation_is_that_of_the_sender() -> None:
    """A lazy string is evaluated in the call, not when somebody reads it."""
    with override("de"):
        (text,) = encode_event("/", "name", [gettext_lazy("Yes")])
    assert standard.loads(text[1:]) == ["name", "Ja"]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1j,
        iter([]),
        datetime.time(7, 30, tzinfo=UTC),
        {(1, 2): 3},
        {b"key": 1},
        {lazystr("key"): 1},
        models.F("field"),
        ValueError("no"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_django_does_not_know_is_a_type_error(value: Any) -> None:
    """It is raised where the message is sent, before anybody has received it."""
    for argument in (value, [value], {"deep": (1, value)}):
        with pytest.raises(TypeError):
            encode_event("/", "name", [argument])


def test_a_value_in_itself_is_a_type_error() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError):
        encode_event("/", "name", [value])


@pytest.mark.parametrize(
    ("args", "packets"),
    [
        ([], [b'2/admin,7["name"]']),
        ([1, "two"], [b'2/admin,7["name",1,"two"]']),
        ([b"one"], [b'51-/admin,7["name",{"_placeholder":true,"num":0}]', b"one"]),
    ],
)
def test_an_event_has_its_arguments_in_order(args: list[Any], packets: list[bytes]) -> None:
    assert encode_event("/admin", "name", args, 7) == tuple(packets)


@pytest.mark.parametrize(
    "name",
    ["connect", "disconnect", "newListener", "__subscribe__", "__unsubscribe__", "connect_error"],
)
def test_a_reserved_name_cannot_be_sent(name: str) -> None:
    """The official parser would close the connection of whoever receives it."""
    with pytest.raises(ValueError, match=name):
        encode_event("/", name, [])
