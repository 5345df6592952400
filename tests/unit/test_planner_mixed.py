"""The cheapest mix of hardware within what there is, held against trying everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from paceline.core.profile import Configuration
from paceline.planner.mixed import GAP, mixed
from paceline.planner.problem import PlannedChain, PlannedModule
from paceline.planner.schedule import Schedule
from paceline.planner.worst_case import pooled_s

KINDS = ("small", "big")


@st.composite
def modules(draw: st.DrawFn, name: str, parents: tuple[str, ...]) -> PlannedModule:
    rate_rps = draw(st.floats(5.0, 200.0))
    found = []
    for kind in draw(st.sampled_from([KINDS, KINDS[:1], KINDS[1:]])):
        price = draw(st.floats(0.2, 5.0))
        took_s = 0.0
        for size in (1, 2, 8)[: draw(st.integers(1, 3))]:
            took_s += draw(st.floats(0.005, 0.1))
            found.append(Configuration(kind, size, took_s, price))
    overhead_s = draw(st.sampled_from([0.0, 0.003]))
    return PlannedModule(name, name, rate_rps, parents, tuple(found), overhead_s)


@st.composite
def problems(draw: st.DrawFn) -> tuple[PlannedChain, dict[str, float]]:
    first = draw(modules("a", ()))
    found = (first, draw(modules("b", ("a",)))) if draw(st.booleans()) else (first,)
    chain = PlannedChain("c", draw(st.floats(0.05, 1.0)), first.rate_rps, found)
    return chain, {kind: draw(st.sampled_from([0.0, 0.5, 1.0, 3.0, 20.0])) for kind in KINDS}


def least_cost(chain: PlannedChain, capacity: Mapping[str, float]) -> float:
    """By every way to split the objective at a module's worst cases, a linear program each."""
    worst = [
        [pooled_s(c, m.rate_rps) + m.overhead_s for c in m.configurations] for m in chain.modules
    ]
    best = inf
    for limits in product(*worst):
        if sum(limits) > chain.slo_s:
            continue
        used = [
            (at, c)
            for at, (module, limit_s) in enumerate(zip(chain.modules, limits, strict=True))
            for c, worst_s in zip(module.configurations, worst[at], strict=True)
            if worst_s <= limit_s
        ]
        answer = linprog(
            [c.price_per_hour for _, c in used],
            A_ub=[[float(c.hardware == kind) for _, c in used] for kind in KINDS],
            b_ub=[capacity[kind] for kind in KINDS],
            A_eq=[
                [c.throughput_rps if at == of else 0.0 for at, c in used]
                for of in range(len(chain.modules))
            ],
            b_eq=[module.rate_rps for module in chain.modules],
        )
        if answer.x is not None:
            best = min(best, answer.fun)
    return best


def check(
    chain: PlannedChain, capacity: Mapping[str, float], schedules: Sequence[Schedule]
) -> None:
    """It serves the whole rate, in time, on what there is."""
    used = dict.fromkeys(KINDS, 0.0)
    for module, found in zip(chain.modules, schedules, strict=True):
        assert sum(p.rate_rps for p in found.placements) == pytest.approx(module.rate_rps)
        for placement in found.placements:
            assert placement.worst_s == pooled_s(placement.configuration, module.rate_rps)
            used[placement.configuration.hardware] += placement.machines
    took_s = sum(s.worst_s + m.overhead_s for s, m in zip(schedules, chain.modules, strict=True))
    assert took_s <= chain.slo_s + 1e-6
    assert all(machines <= capacity[kind] + 1e-5 for kind, machines in used.items())


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_a_mix_costs_no_more_than_the_best_of_all_splits(
    problem: tuple[PlannedChain, dict[str, float]],
) -> None:
    chain, capacity = problem
    least = least_cost(chain, capacity)
    found = mixed([chain], capacity)
    if found is None:
        assert least == inf
        return
    check(chain, capacity, found[0])
    cost = sum(schedule.cost_per_hour for schedule in found[0])
    assert least * (1 - 1e-4) - 1e-6 <= cost <= least * (1 + GAP) + 1e-6


def one(name: str, rate_rps: float) -> PlannedChain:
    configurations = tuple(
        Configuration(kind, size, took_s / speed, price)
        for kind, speed, price in (("small", 1.0, 1.0), ("big", 2.0, 3.0))
        for size, took_s in ((1, 0.1), (8, 0.4))
    )
    module = PlannedModule(name, name, rate_rps, (), configurations)
    return PlannedChain(name, 1.0, rate_rps, (module,))


def test_the_cheap_kind_is_used_up_before_the_dear_one_helps() -> None:
    found = mixed([one("a", 50.0)], {"small": 2.0, "big": 2.0})
    assert found is not None
    ((schedule,),) = found
    used = {p.configuration.hardware: p.machines for p in schedule.placements}
    assert used == {"small": pytest.approx(2.0), "big": pytest.approx(0.25)}


def test_chains_share_what_there_is_and_too_little_is_nothing() -> None:
    capacity = {"small": 2.0, "big": 1.0}
    found = mixed([one("a", 40.0), one("b", 40.0)], capacity)
    assert found is not None
    used = dict.fromkeys(KINDS, 0.0)
    for placement in (p for chain in found for schedule in chain for p in schedule.placements):
        used[placement.configuration.hardware] += placement.machines
    assert used == {"small": pytest.approx(2.0), "big": pytest.approx(1.0)}
    assert mixed([one("a", 40.0), one("b", 41.0)], capacity) is None
