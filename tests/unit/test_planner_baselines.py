"""The systems that are compared with, on modules small enough to work out by hand; and that none
of the policies plans for less than `optimal`."""

from __future__ import annotations

import random

import pytest

from paceline.core.errors import PlanError
from paceline.core.plan import Plan
from paceline.core.profile import Configuration
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.solve import POLICIES, solve
from paceline.planner.worst_case import DISPATCHES

M3 = tuple(Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8)))


def module(name: str, rate_rps: float, parents: str, *points: tuple[int, float]) -> PlannedModule:
    configurations = tuple(Configuration("gpu", b, d, 1.0) for b, d in points)
    return PlannedModule(name, name, rate_rps, tuple(parents.split()), configurations)


def shown(plan: Plan) -> list[str]:
    return [
        " + ".join(f"{a.machines:.6g} x b{a.batch_size}" for a in m.allocations)
        for m in plan.chains[0].modules
    ]


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        ("nexus", "6 x b8 + 0.3 x b2"),
        ("scrooge", "4 x b32 + 1.9 x b2"),
        ("inferline", "9.9 x b2"),
        ("clipper", "9.9 x b2"),
        ("harpagon", "5 x b32"),
        ("optimal", "4.95 x b32"),
    ],
)
def test_m3_alone_shows_what_each_policy_can_mix(policy: str, schedule: str) -> None:
    chain = PlannedChain("m3", 1.0, 198.0, (PlannedModule("m3", "m3", 198.0, (), M3),))
    assert shown(solve([chain], Options(policy=policy))) == [schedule]


TWO = PlannedChain(
    "two",
    1.0,
    40.0,
    (
        module("a", 40.0, "", (1, 0.1), (4, 0.2), (16, 0.4)),
        module("b", 40.0, "a", (1, 0.1), (4, 0.35), (16, 1.0)),
    ),
)


def test_clipper_splits_evenly_where_nexus_finds_that_one_module_gains_more() -> None:
    # Half of 1 s allows 2d for b4 of a (0.4 s), and only b1 for b; b16 of a needs 0.8 s.
    assert shown(solve([TWO], Options(policy="clipper"))) == ["2 x b4", "4 x b1"]
    nexus = solve([TWO], Options(policy="nexus")).cost_per_hour
    assert nexus <= solve([TWO], Options(policy="clipper")).cost_per_hour


def test_clipper_says_by_how_much_a_module_misses_its_even_share() -> None:
    chain = PlannedChain(
        "c", 0.5, 10.0, (module("a", 10.0, "", (1, 0.1)), module("b", 10.0, "a", (1, 0.3)))
    )
    with pytest.raises(PlanError, match="module b needs 50 ms more than its even share of 250 ms"):
        solve([chain], Options(policy="clipper"))
    assert solve([chain], Options(policy="inferline")).cost_per_hour == pytest.approx(4.0)


def test_inferline_starts_fastest_and_makes_the_change_that_saves_most() -> None:
    # a's b16 saves 3 of 4 and takes 0.8 s (2d), which leaves b nothing but batches of one.
    assert shown(solve([TWO], Options(policy="inferline"))) == ["1 x b16", "4 x b1"]


def random_chain(rng: random.Random) -> PlannedChain:
    rate_rps = rng.choice((1.0, 8.0, 40.0, 400.0))
    modules: list[PlannedModule] = []
    for i in range(rng.randint(1, 4)):
        configurations: list[Configuration] = []
        for hardware, price in (("cpu", 0.4), ("gpu", 1.0))[: rng.randint(1, 2)]:
            duration_s = rng.choice((0.01, 0.04))
            for size in sorted(rng.sample((1, 2, 3, 4, 8, 16), rng.randint(1, 4))):
                configurations.append(Configuration(hardware, size, duration_s, price))
                duration_s *= rng.choice((1.0, 1.3, 1.8))
        parents = tuple(f"m{j}" for j in range(i) if rng.random() < 0.5)
        fan_out = rng.choice((0.25, 1.0, 3.0))
        modules.append(
            PlannedModule(f"m{i}", "m", rate_rps * fan_out, parents, tuple(configurations))
        )
    least_s = sum(min(c.duration_s for c in m.configurations) for m in modules)
    return PlannedChain("c", least_s * rng.choice((1.0, 1.4, 2.5, 5.0)), rate_rps, tuple(modules))


@pytest.mark.parametrize("seed", range(40))
def test_no_policy_and_no_dispatch_plans_for_less_than_the_optimum(seed: int) -> None:
    chain = random_chain(random.Random(seed))
    others = [Options(policy=policy) for policy in POLICIES[1:]]
    others += [Options(dispatch=dispatch) for dispatch in DISPATCHES]  # type: ignore[arg-type]
    costs: list[float] = []
    for options in others:
        try:
            plan = solve([chain], options)
        except PlanError:
            continue
        costs.append(plan.cost_per_hour)
        assert plan.chains[0].latency_worst_s <= chain.slo_s + 1e-6
    if costs:
        best = solve([chain], Options(policy="optimal"))
        assert best.cost_per_hour <= min(costs) * (1 + 1e-6)
        assert best.chains[0].latency_worst_s <= chain.slo_s + 1e-6
