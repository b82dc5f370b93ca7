"""Token buckets: so many at once, so many a second, and nothing kept of whoever rests."""

import pytest
from hypothesis import given, strategies as st

from django_socketio.engine import Buckets, Rate

NOW = 1_000_000.0  # a machine that has been up for days


@pytest.mark.parametrize(("per_second", "burst"), [(10, 10), (10, 1), (0.5, 3), (1000, 1), (3, 7)])
def test_a_burst_and_then_the_rate(per_second: float, burst: int) -> None:
    buckets = Buckets(Rate(per_second, burst))
    assert [buckets.spend("a", NOW) for _ in range(burst)] == [True] * burst
    assert not buckets.spend("a", NOW)
    assert not buckets.spend("a", NOW + 0.9 / per_second)
    assert buckets.spend("a", NOW + 1 / per_second)
    assert not buckets.spend("a", NOW + 1 / per_second)


def test_who_is_refused_pays_nothing() -> None:
    buckets = Buckets(Rate(1, 1))
    assert buckets.spend("a", NOW)
    assert not any(buckets.spend("a", NOW + 0.5) for _ in range(1000))
    assert buckets.spend("a", NOW + 1)


def test_a_rest_is_worth_no_more_than_a_burst() -> None:
    buckets = Buckets(Rate(10, 5))
    assert [buckets.spend("a", NOW + day * 86400) for day in range(3)] == [True] * 3
    assert [buckets.spend("a", NOW + 3 * 86400) for _ in range(6)] == [True] * 5 + [False]


def test_each_has_its_own() -> None:
    buckets = Buckets(Rate(1, 1))
    assert [buckets.spend(key, NOW) for key in "abcabc"] == [True] * 3 + [False] * 3


def test_looking_takes_nothing() -> None:
    buckets = Buckets(Rate(1, 2))
    assert all(buckets.has("a", NOW) for _ in range(10)) and not len(buckets)
    assert buckets.spend("a", NOW) and buckets.has("a", NOW)
    assert buckets.spend("a", NOW) and not buckets.has("a", NOW)
    assert buckets.has("a", NOW + 1)


def test_who_is_forgotten_begins_anew() -> None:
    buckets = Buckets(Rate(1, 1))
    buckets.spend("a", NOW)
    buckets.forget("a")
    buckets.forget("never seen")
    assert not len(buckets)
    assert buckets.spend("a", NOW)


def test_full_buckets_are_not_kept() -> None:
    """A million clients that come once each, a hundred a second, of which each rests soon."""
    buckets = Buckets(Rate(1, 5))
    most = 0
    for number in range(1_000_000):
        assert buckets.spend(number, NOW + number / 100)
        most = max(most, len(buckets))
    assert most <= 1024


def test_those_in_debt_are_kept() -> None:
    buckets = Buckets(Rate(0.001, 1))
    for number in range(5000):
        assert buckets.spend(number, NOW)
    assert len(buckets) == 5000
    assert not any(buckets.spend(number, NOW) for number in range(5000))


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.floats(0, 2, allow_subnormal=False), max_size=200),
)
def test_never_more_than_the_rate_and_a_burst(
    per_second: int, burst: int, pauses: list[float]
) -> None:
    buckets, now, granted = Buckets(Rate(per_second, burst)), NOW, []
    for pause in pauses:
        now += pause
        if buckets.spend("a", now):
            granted.append(now)
    for start in range(len(granted)):
        for end in range(start, len(granted)):
            most = burst + (granted[end] - granted[start]) * per_second
            assert end - start + 1 <= most + 0.01
