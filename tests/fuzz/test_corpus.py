"""Every decoder has an answer to what once was too much for one, and to a little more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from .targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")


def inputs(name: str) -> Iterator[bytes]:
    for path in sorted((CORPUS / name).iterdir()):
        yield path.read_bytes()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    data = list(inputs(name))
    assert data
    for item in data:
        TARGETS[name](item)


def test_the_corpus_is_of_these_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_like_the_corpus(name: str) -> None:
    """Two of it run into each other, one is cut, or a byte is another."""
    known = st.sampled_from(list(inputs(name)))

    @settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    @given(known, known, st.integers(0), st.integers(0), st.integers(0, 255))
    def check(one: bytes, other: bytes, at: int, end: int, byte: int) -> None:
        data = bytearray((one + other)[: end % 200])
        if data:
            data[at % len(data)] = byte
        TARGETS[name](bytes(data))

    check()
