"""When simulated runs stop: as soon as their verdict is known, and not before."""

from __future__ import annotations

import pytest

from paceline.core.chain import Chain, Module, Source
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Options, demand
from paceline.planner.solve import solve
from paceline.sim.results import SimResult
from paceline.sim.screen import Refuted, Screen, spent
from paceline.sim.tally import Tally
from paceline.sim.verify import simulate

PROFILES = Profiles(tuple(ProfileRow("m", "gpu", n, s) for n, s in ((1, 0.05), (8, 0.2))))
REQUESTS = 4000
CHAIN = Chain(
    "c",
    1.0,
    (TensorSpec("x", "UINT8", (1,)),),
    (Module("m", "m", {"x": Source(None, "x")}),),
    {"y": Source("m", "y")},
)


def planned(rate_rps: float) -> Plan:
    """A plan for that rate in whole machines, of which requests come at 30 a second."""
    return solve(
        [demand(CHAIN, rate_rps, PROFILES, {"gpu": Hardware("gpu", 1.0)}, {}, 0.0)],
        Options(policy="optimal", billing="machine"),
    )


def served(plan: Plan, decided: Screen | Refuted | None = None) -> SimResult:
    at_s = instants()
    return simulate([CHAIN], plan, PROFILES, arrivals={"c": at_s}, seed=1, decided=decided)


def instants() -> list[float]:
    """Twice as many at once as come on average, again and again."""
    return [(n // 60) * 2.0 + (n % 60) / 60.0 for n in range(REQUESTS)]


def test_a_plan_that_misses_nothing_passes_screening_on_a_part_of_the_requests() -> None:
    screen = Screen({"c": 0.99}, {"c": 13}, all_=False)
    result = served(planned(120.0), screen)
    assert screen.missed(result) == set()
    assert 760 < result.requests < 1000


def test_a_plan_passes_screening_only_when_the_run_has_lasted_long_enough() -> None:
    screen = Screen({"c": 0.99}, {"c": 13}, all_=False, least={"c": 2000})
    result = served(planned(120.0), screen)
    assert screen.missed(result) == set()
    assert 2000 <= result.requests < 2100
    screen = Screen({"c": 0.99}, {"c": 13}, all_=False, least={"c": 2000})
    assert screen.missed(served(planned(1.0), screen)) == {"c"}


def test_a_plan_that_misses_much_is_rejected_after_a_few_misses() -> None:
    screen, plan = Screen({"c": 0.99}, {"c": 13}, all_=False), planned(1.0)
    result = served(plan, screen)
    assert screen.missed(result) == {"c"}
    assert result.requests < REQUESTS / 10
    assert served(plan).attainment < 0.9


def test_a_confirmation_is_cut_short_only_where_it_fails() -> None:
    bad, good = Refuted({"c": 13}), Refuted({"c": 13})
    assert served(planned(1.0), bad).requests < REQUESTS / 10 and bad.chains == {"c"}
    assert served(planned(120.0), good) == served(planned(120.0))
    assert served(planned(120.0), good).requests == REQUESTS and good.chains == set()


def test_all_chains_that_miss_are_found_where_all_are_wanted() -> None:
    tally = Tally([], Plan("optimal", "machine", ()), 1)
    tally.ended |= {"a": 100, "b": 100}
    tally.missed |= {"a": 50, "b": 0}
    most = {"a": 13, "b": 13}
    targets = dict.fromkeys(most, 0.99)
    assert Screen(targets, most, all_=False)(tally)
    assert not Screen(targets, most, all_=True)(tally)
    tally.missed["b"] = 50
    assert Screen(targets, most, all_=True)(tally)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_however_many_confirmations_err_no_more_often_together_than_stated(
    confidence: float,
) -> None:
    allowed = [1.0 - spent(confidence, attempt) for attempt in range(1000)]
    assert allowed == sorted(allowed, reverse=True)
    assert 0.998 * (1.0 - confidence) < sum(allowed) <= 1.0 - confidence
