"""What a grant lets through, on a clock driven by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core.errors import ErrorKind, RequestError
from paceline.edge.pacing import BURST_BYTES, Upload


@given(
    sizes=st.lists(st.integers(0, 300_000), min_size=1, max_size=30),
    pauses=st.lists(st.floats(0, 5), min_size=30, max_size=30),
    rate=st.floats(1e3, 1e8),
)
def test_by_any_time_at_most_the_rate_and_the_burst_are_through(
    sizes: list[int], pauses: list[float], rate: float
) -> None:
    upload = Upload("m", rate, sum(sizes), starts_s=float("inf"), deadline_s=float("inf"))
    now_s, through = 100.0, 0
    for size, pause_s in zip(sizes, pauses, strict=False):
        through += size
        now_s += upload.take(size, now_s)
        allowed = BURST_BYTES + rate * (now_s - 100.0)
        assert through <= allowed * (1 + 1e-9) + 1e-3
        now_s += pause_s


def test_a_slow_client_never_waits() -> None:
    upload = Upload("m", 1000.0, 10_000, starts_s=1000.0, deadline_s=1000.0)
    assert [upload.take(100, float(second)) for second in range(10)] == [0.0] * 10


def test_more_than_was_granted_is_refused() -> None:
    upload = Upload("m", 1e9, 100, starts_s=1.0, deadline_s=1.0)
    upload.take(100, 0.0)
    with pytest.raises(RequestError, match="for 100 bytes") as refused:
        upload.take(1, 0.0)
    assert refused.value.kind is ErrorKind.INVALID


def test_what_cannot_be_there_in_time_is_refused_at_once_with_how_late_it_is() -> None:
    upload = Upload("m", 1e5, 1 << 20, starts_s=1.0, deadline_s=2.0)
    with pytest.raises(RequestError, match="500 ms late") as refused:
        upload.take(BURST_BYTES + 150_000, 0.0)
    assert refused.value.kind is ErrorKind.DEADLINE
