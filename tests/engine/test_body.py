"""Chunked bodies are read in one way only, and no body takes for ever."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from django_socketio.engine.body import Chunks, MalformedBody, Pace

from .clients import chunked


def read(data: bytes, size: int = 8192, piece: int = 1_000_000) -> tuple[bytes, bytes]:
    """Return what a body says, and what is behind it; it comes in pieces."""
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    behind: list[bytes] = []
    chunks = Chunks(lambda: pieces.pop(0) if pieces else b"", behind.append)
    parts = list(iter(lambda: chunks.read(size), b""))
    assert chunks.ended
    assert all(len(part) <= size for part in parts)
    assert chunks.read(size) == b""
    return b"".join(parts), b"".join(behind + pieces)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"5\r\nhello\r\n0\r\n\r\n",
        b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n",
        b"5;a\r\nhello\r\n00;b=c\r\n\r\n",
        b'0005 ; a="b c" \t;d\r\nhello\r\n0\r\n\r\n',
        b"5\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\n",
    ],
)
def test_a_body(data: bytes, size: int, piece: int) -> None:
    assert read(data + b"GET /", size, piece) == (b"hello", b"GET /")


def test_the_data_may_be_anything() -> None:
    data = b"0\r\n\r\n" + bytes(range(256))
    assert read(chunked(data, data)) == (data * 2, b"")
    assert read(b"0\r\n\r\n") == (b"", b"")
    assert read(b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n")[0] == b"0123456789" * 2


MALFORMED = {
    "nothing": b"",
    "no size": b"\r\n",
    "only an extension": b";a\r\n",
    "not hexadecimal": b"g\r\n",
    "a sign": b"+5\r\nhello\r\n",
    "an underscore": b"1_0\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "a blank before": b" 5\r\nhello\r\n",
    "a blank behind": b"5 \r\nhello\r\n",
    "a digit of another script": b"\xb2\r\nhi\r\n",
    "more digits than there are bytes": b"f" * 16 + b"\r\n",
    "a bare LF": b"5\nhello\n0\n\n",
    "a bare CR": b"5\rhello\r\n",
    "a bare LF in an extension": b"5;a\nb\r\nhello\r\n",
    "a bare CR in an extension": b"5;a\rb\r\nhello\r\n",
    "a NUL in an extension": b"5;\x00\r\nhello\r\n",
    "a NEL in an extension": b"5;\x85\r\nhello\r\n",
    "longer than its size": b"5\r\nhellox\r\n0\r\n\r\n",
    "longer by a CR": b"5\r\nhello\r\r\n0\r\n\r\n",
    "shorter than its size": b"5\r\nhell\r\n0\r\n\r\n",
    "a bare LF behind it": b"5\r\nhello\n0\r\n\r\n",
    "cut in its data": b"5\r\nhel",
    "cut behind its data": b"5\r\nhello",
    "cut before the last": b"5\r\nhello\r\n",
    "cut before the end": b"5\r\nhello\r\n0\r\n",
    "cut in a trailer": b"5\r\nhello\r\n0\r\nX: y\r\n",
    "a trailer without a colon": b"0\r\nnothing\r\n\r\n",
    "a trailer with a blank": b"0\r\nX : y\r\n\r\n",
    "a folded trailer": b"0\r\nX: y\r\n z\r\n\r\n",
    "a bare LF in a trailer": b"0\r\nX: y\nZ: a\r\n\r\n",
    "an endless extension": b"5;" + b"x" * 10_000,
    "endless digits": b"0" * 10_000,
    "an endless trailer": b"0\r\nX: " + b"x" * 10_000,
    "trailers without an end": b"0\r\n" + b"X: yyyyyyyyyyyy\r\n" * 1_000 + b"\r\n",
    "an extension for each": b"1;%b\r\nx\r\n" % (b"x" * 100) * 100 + b"0\r\n\r\n",
}


@pytest.mark.parametrize("piece", [1, 5, 10_000])
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_body(data: bytes, piece: int) -> None:
    with pytest.raises(MalformedBody):
        read(data, piece=piece)


@pytest.mark.parametrize("data", [b"x", b"5\n", b"5x", b"-", b"5;\x00", b"1\r\nxy", b" "])
def test_what_can_never_become_a_chunk_is_refused_at_once(data: bytes) -> None:
    pieces = iter([data])
    with pytest.raises(MalformedBody):
        Chunks(lambda: next(pieces), bytes).read(1000)


def test_extensions_are_bounded_but_chunks_are_not() -> None:
    """Many small ones are odd, and allowed; their sizes are no more than six times their data."""
    assert read(chunked(*[b"x"] * 50_000))[0] == b"x" * 50_000
    assert read(b"1;a=b\r\nx\r\n" * 1_000 + b"0\r\n\r\n")[0] == b"x" * 1_000


def test_small_chunks_cost_no_more_than_they_are() -> None:
    """Each byte of the buffer is copied once, not once for each chunk in it."""
    data = chunked(*[b"x"] * 100_000)
    started = time.process_time()
    assert read(data, 65_536, 8192)[0] == b"x" * 100_000
    assert time.process_time() - started < 4  # 0.2 s; it would be minutes


_lines = st.sampled_from(
    [b"\r\n", b"\r", b"\n", b"0", b"1", b"5", b"a", b";", b"hello", b" ", b"X: y", b"X", b"\xff"]
)


@given(st.binary() | st.lists(_lines, max_size=20).map(b"".join), st.integers(1, 10))
def test_any_bytes_are_a_body_or_malformed(data: bytes, piece: int) -> None:
    def outcome(piece: int) -> tuple[bytes, bytes] | None:
        try:
            return read(data, piece=piece)
        except MalformedBody:
            return None

    # Whatever its segments, it is the same.
    assert outcome(piece) == outcome(1_000_000)


@given(st.lists(st.binary(min_size=1)), st.binary(), st.integers(1, 100), st.integers(1, 100))
def test_round_trip(parts: list[bytes], behind: bytes, size: int, piece: int) -> None:
    assert read(chunked(*parts) + behind, size, piece) == (b"".join(parts), behind)


# The pace


def waits(pace: Pace, seconds: float, size: int) -> Iterator[float]:
    """Yield how patient it is, while `size` bytes come every `seconds` seconds."""
    while True:
        try:
            patience = pace.patience()
        except TimeoutError:
            return
        yield patience
        if seconds > patience:
            return
        pace.waited(seconds, size)


def test_a_byte_now_and_then_is_too_slow() -> None:
    """It was enough to stay for ever once: 19 seconds for each."""
    assert len(list(waits(Pace(20, 1000), 19, 1))) == 2
    assert 20 <= len(list(waits(Pace(20, 1000), 1, 1))) <= 22
    assert 40 <= len(list(waits(Pace(20, 1000), 1, 500))) <= 42


def test_what_keeps_the_pace_has_as_long_as_it_needs() -> None:
    patience = waits(Pace(20, 1000), 1, 1000)
    assert {next(patience) for _ in range(10_000)} == {20}


def test_much_at_once_is_no_licence_to_stall() -> None:
    pace = Pace(20, 1000)
    pace.waited(0, 1_000_000)
    assert pace.patience() == 20
    assert len(list(waits(pace, 21, 0))) == 1
