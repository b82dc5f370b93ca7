"""Envelopes: what one process writes, every other of the same version reads, and nothing else."""

import struct

import pytest
from hypothesis import example, given, strategies as st

from django_socketio import envelope
from django_socketio.envelope import (
    DISCONNECT,
    EVENT,
    UNCOMPRESSED,
    VOLATILE,
    Envelope,
    InvalidEnvelope,
    Stamp,
)

sids = st.text(max_size=60)
topics = st.text(max_size=300)
packets = st.lists(st.binary(max_size=300), min_size=1, max_size=4).map(tuple)
amongs = st.lists(topics, max_size=4).map(tuple)
flags = st.integers(0, VOLATILE | UNCOMPRESSED)
stamps = st.none() | st.builds(
    Stamp,
    st.text(min_size=1, max_size=60),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
)
whom = (sids, amongs, flags, topics, stamps)
events = st.builds(Envelope, st.just(EVENT), packets, *whom)
disconnects = st.builds(Envelope, st.just(DISCONNECT), st.just(()), *whom)
envelopes = events | disconnects

LETTER = Envelope(
    EVENT,
    (b'2["x"]', b"\x00\x01"),
    "sid",
    ("a/", "c/,é"),
    VOLATILE,
    "key",
    Stamp("node", 1, 2, 3),
)
_SHORTEST = b"\x01\x02" + bytes(18)
"""A DISCONNECT up to the length of `exclude`."""


@given(envelopes)
@example(Envelope(EVENT, (b"",)))
@example(Envelope(EVENT, (b"x" * 100_000,), "s" * 255, ("c/," + "é" * 255,) * 100))
def test_envelopes_round_trip(letter: Envelope) -> None:
    assert envelope.decode(envelope.encode(letter)) == letter


def test_the_layout() -> None:
    """Processes of the next release read this: a change is a new version."""
    assert envelope.encode(LETTER) == (
        b"\x01\x01\x01"
        b"\x04"
        b"\x00\x00\x00\x01"
        b"\x00\x00\x00\x00\x00\x00\x00\x02"
        b"\x00\x00\x00\x03"
        b"node"
        b"\x03sid"
        b"\x00\x03key"
        b"\x00\x02"
        b"\x00\x02a/"
        b"\x00\x05c/,\xc3\xa9"
        b"\x00\x02"
        b'\x00\x00\x00\x062["x"]'
        b"\x00\x00\x00\x02\x00\x01"
    )
    assert envelope.encode(Envelope(DISCONNECT)) == _SHORTEST + bytes(7)


def test_the_publishers_stamp_goes_before_the_envelopes() -> None:
    stamp = Stamp("other", 4, 5, 6)
    assert envelope.decode(envelope.encode(LETTER, stamp)) == LETTER._replace(stamp=stamp)


@given(st.binary() | st.binary().map(lambda data: _SHORTEST + data))
@example(b"")
@example(b"\x80\x04\x95.")  # a pickle is only bytes
@example(b'{"kind": 1}')
def test_any_bytes_are_an_envelope_or_invalid(data: bytes) -> None:
    try:
        letter = envelope.decode(data)
    except InvalidEnvelope:
        return
    assert envelope.encode(letter) == data


@given(envelopes, st.data())
def test_one_byte_that_is_another(letter: Envelope, data: st.DataObject) -> None:
    """Whatever a carrier does to it, the listener lives."""
    payload = bytearray(envelope.encode(letter))
    place = data.draw(st.integers(0, len(payload) - 1))
    payload[place] ^= data.draw(st.integers(1, 255))
    try:
        changed = envelope.decode(bytes(payload))
    except InvalidEnvelope:
        return
    assert changed != letter


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version(version: int) -> None:
    """While a deployment rolls, both are on the carrier."""
    payload = bytes([version]) + envelope.encode(LETTER)[1:]
    with pytest.raises(InvalidEnvelope, match=f"version {version}, not 1"):
        envelope.decode(payload)


@pytest.mark.parametrize("kind", [0, 6, 255])
def test_an_unknown_kind(kind: int) -> None:
    payload = bytearray(envelope.encode(LETTER))
    payload[1] = kind
    with pytest.raises(InvalidEnvelope, match=f"kind {kind}"):
        envelope.decode(bytes(payload))


@pytest.mark.parametrize("flags", [4, 128, 255])
def test_unknown_flags(flags: int) -> None:
    """Of a release that can do more: what it means by them is not known here."""
    payload = bytearray(envelope.encode(LETTER))
    payload[2] = flags
    with pytest.raises(InvalidEnvelope, match=f"flags {flags}"):
        envelope.decode(bytes(payload))


@pytest.mark.parametrize("place", [7, 15, 19], ids=["epoch", "number", "skipped"])
def test_a_number_of_nobody(place: int) -> None:
    payload = bytearray(envelope.encode(Envelope(DISCONNECT)))
    payload[place] = 1
    with pytest.raises(InvalidEnvelope, match="of nobody"):
        envelope.decode(bytes(payload))


def test_truncated_at_every_byte() -> None:
    payload = envelope.encode(LETTER)
    for length in range(len(payload)):
        with pytest.raises(InvalidEnvelope):
            envelope.decode(payload[:length])


def test_something_behind_its_end() -> None:
    with pytest.raises(InvalidEnvelope, match="behind its end"):
        envelope.decode(envelope.encode(LETTER) + b"\x00")


def test_an_event_without_a_packet() -> None:
    with pytest.raises(InvalidEnvelope, match="nothing in it"):
        envelope.decode(b"\x01\x01" + bytes(25))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x01\x02\x00\x01" + bytes(16) + b"\xff" + bytes(7),  # origin
        _SHORTEST + b"\x01\xff" + bytes(6),  # exclude
        _SHORTEST + b"\x00\x00\x01\xff" + bytes(4),  # key
        _SHORTEST + b"\x00\x00\x00\x00\x01\x00\x01\xff",  # among
        _SHORTEST + b"\x00\x00\x00\x00\x01\x00\x03\xed\xa0\x80",  # half a character
    ],
)
def test_names_are_utf_8(payload: bytes) -> None:
    with pytest.raises(InvalidEnvelope, match="malformed"):
        envelope.decode(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x01\x02\x00\xff" + bytes(23),  # origin
        _SHORTEST + b"\xff" + bytes(6),  # exclude
        _SHORTEST + b"\x00\xff\xff" + bytes(4),  # key
        _SHORTEST + b"\x00\x00\x00\xff\xff" + bytes(2),  # among
        _SHORTEST + b"\x00\x00\x00\x00\x01\xff\xff" + bytes(2),
        _SHORTEST + bytes(5) + b"\xff\xff",  # packets
        _SHORTEST + bytes(5) + b"\x00\x01" + struct.pack("!I", 2**32 - 1) + b"x",
        _SHORTEST + bytes(5) + b"\x00\x01" + struct.pack("!I", 2) + b"x",
    ],
)
def test_a_length_beyond_the_end(payload: bytes) -> None:
    """It is compared with what there is before anything of that size is made."""
    with pytest.raises(InvalidEnvelope):
        envelope.decode(payload)
