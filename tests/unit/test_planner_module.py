"""Harpagon levels 1 and 2: dispatch bounds, multi-tuple schedules, dummy requests."""

from __future__ import annotations

import pytest

from paceline.core.profile import Configuration
from paceline.planner.residual import top_ups_rps, with_dummies
from paceline.planner.schedule import ranked, schedule, show
from paceline.planner.worst_case import (
    Dispatch,
    full_machine_s,
    pooled_s,
    residual_machine_s,
    residual_s,
    round_robin_s,
    throughput_cost_s,
)


def gpu(batch_size: int, duration_s: float, price_per_hour: float = 1.0) -> Configuration:
    return Configuration("gpu", batch_size, duration_s, price_per_hour)


M3 = (gpu(2, 0.1), gpu(8, 0.25), gpu(32, 0.8))


def test_a_full_machine_waits_for_its_batch_at_the_rate_its_dispatch_gives_it() -> None:
    b8 = gpu(8, 0.25)
    assert round_robin_s(b8) == pytest.approx(0.5)
    assert throughput_cost_s(b8, 40.0) == pytest.approx(0.45)
    assert pooled_s(b8, 200.0) == pytest.approx(0.29)
    assert residual_s(b8, 10.0) == pytest.approx(1.05)


@pytest.mark.parametrize("dispatch", ["round-robin", "throughput-cost", "pooled"])
def test_a_batch_of_one_never_waits_to_be_collected(dispatch: Dispatch) -> None:
    one = gpu(1, 0.05)
    assert full_machine_s(dispatch, one, left_rps=20.0, rate_rps=20.0) == 0.05
    assert residual_machine_s(dispatch, one, residual_rps=0.001, rate_rps=0.001) == 0.05


def test_a_residual_machine_collects_its_own_rate_unless_batches_are_pooled() -> None:
    b2 = gpu(2, 0.1)
    for dispatch in ("round-robin", "throughput-cost"):
        assert residual_machine_s(dispatch, b2, residual_rps=4.0, rate_rps=100.0) == pytest.approx(
            0.6
        )
    assert residual_machine_s("pooled", b2, residual_rps=4.0, rate_rps=100.0) == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("dispatch", "max_tuples", "expected"),
    [
        ("round-robin", 2, "6 x b8 + 0.3 x b2 = 6.3"),
        ("throughput-cost", 2, "4 x b32 + 1.9 x b2 = 5.9"),
        ("throughput-cost", None, "4 x b32 + 1 x b8 + 0.3 x b2 = 5.3"),
        ("pooled", None, "4.95 x b32 = 4.95"),
    ],
)
def test_m3_gets_the_published_schedule(
    dispatch: Dispatch, max_tuples: int | None, expected: str
) -> None:
    for strict in (False, True):
        found = schedule(198.0, M3, 1.0, dispatch=dispatch, max_tuples=max_tuples, strict=strict)
        assert show(found) == expected


def test_m3_gets_five_whole_machines_from_two_dummy_requests_a_second() -> None:
    found = with_dummies(198.0, M3, 1.0)
    assert found is not None
    assert (show(found), found.dummy_rps) == ("5 x b32 = 5", 2.0)


def test_a_batch_waits_for_real_requests_rather_than_for_dummies_when_the_budget_allows() -> None:
    relaxed = with_dummies(198.0, M3, 1.0)
    tight = with_dummies(198.0, M3, 0.9605)
    assert relaxed is not None and tight is not None
    assert relaxed.worst_s == pytest.approx(0.8 + 32 / 198)
    assert show(relaxed) == show(tight) == "5 x b32 = 5"
    assert tight.worst_s == pytest.approx(0.8 + 32 / 200)


def test_the_worst_case_is_that_of_the_slowest_tuple() -> None:
    found = schedule(198.0, M3, 1.0)
    assert found is not None
    assert [p.worst_s for p in found.placements] == pytest.approx(
        [0.8 + 32 / 198, 0.25 + 8 / 38, 0.1 + 2 / 6]
    )
    assert found.worst_s == pytest.approx(0.8 + 32 / 198)


def test_the_last_tuple_allowed_takes_everything_or_is_not_used() -> None:
    assert show(schedule(198.0, M3, 1.0, max_tuples=1)) == "9.9 x b2 = 9.9"
    assert show(schedule(200.0, M3, 1.0, max_tuples=1)) == "5 x b32 = 5"


def test_the_walk_backs_up_when_the_best_configuration_leaves_a_rest_that_nothing_serves() -> None:
    # One full b8 leaves 1 request/s: b2 would wait 2 s for its second request.
    configurations = (gpu(2, 0.1), gpu(8, 0.25))
    assert show(schedule(33.0, configurations, 0.6)) == "1.65 x b2 = 1.65"
    assert schedule(33.0, configurations, 0.6, strict=True) is None
    assert show(schedule(33.0, configurations, 2.2)) == "1 x b8 + 0.05 x b2 = 1.05"


def test_dummy_requests_make_a_rate_servable_that_is_too_low_to_fill_a_batch() -> None:
    configurations = (gpu(4, 0.1),)
    assert schedule(10.0, configurations, 0.25) is None
    found = with_dummies(10.0, configurations, 0.25)
    assert found is not None
    assert (show(found), found.dummy_rps) == ("1 x b4 = 1", 30.0)


def test_nothing_fits_a_budget_below_every_duration() -> None:
    assert schedule(198.0, M3, 0.09) is None
    assert with_dummies(198.0, M3, 0.09) is None


def test_top_ups_reach_whole_machines_for_the_rate_and_for_each_rest_of_the_walk() -> None:
    # The rests of 198 are 38 after 4 x b32 and 6 after 1 x b8; each is topped up to 20, 32 or 40.
    found = top_ups_rps(198.0, ranked(M3), 1.0, "throughput-cost")
    assert found == [2.0, 14.0, 26.0, 34.0]


def test_a_dearer_machine_is_taken_only_for_its_throughput_cost_ratio() -> None:
    slow, fast = gpu(8, 0.4, 1.0), gpu(8, 0.1, 5.0)
    assert ranked([fast, slow]) == (slow, fast)
    assert show(schedule(20.0, (slow, fast), 0.8)) == "1 x b8 = 1"
    assert show(schedule(20.0, (slow, fast), 0.6)) == "0.25 x b8 = 1.25"


def test_equal_ratios_rank_by_duration_and_then_by_name() -> None:
    first, second, third = gpu(2, 0.1), gpu(4, 0.2), Configuration("tpu", 4, 0.2, 1.0)
    assert ranked([third, second, first]) == (first, second, third)
