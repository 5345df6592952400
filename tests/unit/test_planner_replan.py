"""When a plan is changed for traffic, and when it is left alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.planner.replan import (
    Proposal,
    Replanning,
    Traffic,
    TrafficEstimator,
    propose,
    worth,
)

RULES = Replanning()


def plan_that_costs(per_hour: float) -> Plan:
    allocation = Allocation("gpu", 1, 0.1, per_hour, 1.0)
    module = ModulePlan("m", "net", 1, 0, 1, 1, (allocation,))
    return Plan("optimal", "fractional", (ChainPlan("c", 1, 1, 1, (module,)),))


def poisson(random: Random, mean: float) -> int:
    """Arrivals of one second."""
    count, at = 0, random.expovariate(mean)
    while at < 1:
        count, at = count + 1, at + random.expovariate(mean)
    return count


def replans(rates_rps: list[float], planned_rps: float, seed: int) -> list[tuple[int, str, float]]:
    """(second, cause, planned rate) of every change under Poisson traffic of these rates."""
    random, estimator = Random(seed), TrafficEstimator(planned_rps)
    planned, changed_s = Traffic({"c": planned_rps}), -1e9
    found: list[tuple[int, str, float]] = []
    for second, rate_rps in enumerate(rates_rps):
        count = poisson(random, rate_rps) if rate_rps else 0
        estimator.observe(second, count, count, {})
        proposal = propose(planned, Traffic({"c": estimator.rate_rps()}), RULES)
        if proposal is None:
            continue
        now, then = planned.rates_rps["c"], proposal.traffic.rates_rps["c"]
        if worth(
            proposal,
            plan_that_costs(now),
            plan_that_costs(then),
            RULES,
            transition_cost=0.0,
            since_change_s=second - changed_s,
        ):
            planned, changed_s = proposal.traffic, second
            found.append((second, proposal.cause, then))
    return found


@pytest.mark.parametrize("rate_rps", [0.2, 1.0, 10.0, 200.0])
def test_steady_poisson_traffic_at_the_planned_rate_rarely_changes_the_plan(
    rate_rps: float,
) -> None:
    changes = [len(replans([rate_rps] * 600, rate_rps, seed)) for seed in range(20)]
    assert sum(changes) / len(changes) < 2
    assert sum(c > 4 for c in changes) == 0


def test_a_fourfold_rate_is_planned_for_within_seconds_and_a_fall_after_a_minute() -> None:
    found = replans([10.0] * 60 + [40.0] * 120 + [5.0] * 200, 11.0, seed=3)
    up = next(second for second, cause, rate in found if cause == "infeasible" and rate > 30)
    down = next(second for second, cause, rate in found if cause == "cheaper" and rate < 10)
    assert 60 <= up <= 75
    assert 235 <= down <= 310
    assert len(found) <= 9


def test_a_plan_for_headroom_is_within_its_own_band() -> None:
    for rate_rps in (0.5, 3.0, 70.0, 4000.0):
        proposal = propose(Traffic({"c": rate_rps / 9}), Traffic({"c": rate_rps}), RULES)
        assert proposal is not None
        assert propose(proposal.traffic, Traffic({"c": rate_rps}), RULES) is None


def test_silence_is_planned_for_as_a_request_a_minute() -> None:
    estimator = TrafficEstimator(20)
    for second in range(90):
        estimator.observe(second, 0, 0, {})
    assert estimator.rate_rps() == pytest.approx(1 / 60)


def test_a_fan_out_is_believed_after_thirty_requests() -> None:
    estimator = TrafficEstimator(1)
    estimator.observe(0, 29, 29, {"m": 58})
    assert estimator.fan_outs() == {}
    estimator.observe(1, 2, 2, {"m": 4})
    assert estimator.fan_outs() == {"m": pytest.approx(2.0)}


def test_seconds_in_which_nobody_looked_count_as_silent() -> None:
    often, seldom = TrafficEstimator(8), TrafficEstimator(8)
    for second in range(31):
        often.observe(second, 0 if 0 < second < 30 else 300, 0, {})
    seldom.observe(0, 300, 0, {})
    seldom.observe(30.5, 200, 0, {})
    seldom.observe(30.9, 100, 0, {})
    assert seldom.rate_rps() == often.rate_rps()


def test_fan_outs_and_slowdowns_are_reasons_of_their_own_and_name_the_worst() -> None:
    planned = Traffic({"c": 10.0}, {("c", "crops"): 4.0}, {("net", "gpu"): 1.0})
    measured = Traffic({"c": 10.2}, {("c", "crops"): 9.0}, {("net", "gpu"): 1.4})
    proposal = propose(planned, measured, RULES)
    assert proposal == Proposal(
        "infeasible",
        "c/crops: 9 sub-requests per request, planned for 4",
        Traffic({"c": 10.0}, {("c", "crops"): 9.0}, {("net", "gpu"): 1.4}),
    )
    wandering = replace(planned, slowdowns={("net", "gpu"): 1.2})
    assert propose(planned, wandering, RULES) is None


def test_what_is_not_measured_stays_as_planned() -> None:
    planned = Traffic({"a": 10.0, "b": 5.0})
    proposal = propose(planned, Traffic({"a": 1.0}), RULES)
    assert proposal is not None
    assert proposal.cause == "cheaper"
    assert proposal.traffic.rates_rps == {"a": pytest.approx(1.1), "b": 5.0}


def test_a_cheaper_plan_waits_saves_and_pays_for_its_transition() -> None:
    proposal = Proposal("cheaper", "", Traffic())
    now, then = plan_that_costs(10.0), plan_that_costs(4.0)

    def decide(candidate: Plan = then, cost: float = 0.5, since_s: float = 60.0) -> bool:
        return worth(proposal, now, candidate, RULES, transition_cost=cost, since_change_s=since_s)

    assert decide()
    assert not decide(since_s=59.0)
    assert not decide(cost=1.0), "6 an hour saved is 1 in ten minutes"
    assert not decide(candidate=plan_that_costs(9.6))


def test_an_infeasible_plan_is_left_whatever_the_next_one_costs() -> None:
    proposal = Proposal("infeasible", "", Traffic())
    now, then = plan_that_costs(1.0), plan_that_costs(40.0)
    assert worth(proposal, now, then, RULES, transition_cost=9.0, since_change_s=3.0)
    assert not worth(proposal, now, then, RULES, transition_cost=9.0, since_change_s=2.0)


def test_rules_under_which_a_change_would_cause_the_next_cannot_exist() -> None:
    with pytest.raises(AssertionError, match="cheaper one at once"):
        replace(RULES, headroom=0.5)
