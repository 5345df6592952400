"""What holds for every plan, checked on generated chains, and how far the heuristics are from
brute force on modules small enough to enumerate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise, product
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts.planner_brute import CLOSE, DUMMIES, Dummies, cheapest, least_cost

from paceline.core.errors import PlanError
from paceline.core.plan import ModulePlan, Plan
from paceline.core.profile import Configuration
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.residual import with_dummies
from paceline.planner.schedule import ranked, schedule
from paceline.planner.solve import solve
from paceline.planner.worst_case import (
    DISPATCHES,
    full_machine_s,
    residual_machine_s,
)

ROUNDING = 1e-6


@st.composite
def configurations(draw: st.DrawFn) -> tuple[Configuration, ...]:
    """One or two kinds of hardware, up to four batch sizes each; batch size 1 may be missing."""
    found: list[Configuration] = []
    for hardware in draw(st.sampled_from((("gpu",), ("cpu", "gpu")))):
        price = draw(st.sampled_from((0.5, 1.0, 3.0)))
        duration_s = draw(st.integers(1, 100)) / 1000
        sizes = draw(st.sets(st.sampled_from((1, 2, 4, 8, 16, 32)), min_size=1, max_size=4))
        for size in sorted(sizes):
            found.append(Configuration(hardware, size, round(duration_s, 6), price))
            duration_s *= draw(st.sampled_from((1.0, 1.3, 1.8, 2.5)))
    return tuple(found)


@st.composite
def chains(draw: st.DrawFn) -> PlannedChain:
    """Any DAG of up to four modules; objectives from hopeless to generous."""
    rate_rps = draw(st.integers(1, 400)) / draw(st.sampled_from((1, 3)))
    modules: list[PlannedModule] = []
    for i in range(draw(st.integers(1, 4))):
        parents = tuple(f"m{j}" for j in range(i) if draw(st.booleans()))
        fan_out = draw(st.sampled_from((0.25, 1.0, 3.0)))
        overhead_s = draw(st.sampled_from((0.0, 0.003)))
        modules.append(
            PlannedModule(
                f"m{i}", "model", rate_rps * fan_out, parents, draw(configurations()), overhead_s
            )
        )
    least_s = sum(min(c.duration_s for c in m.configurations) + m.overhead_s for m in modules)
    slo_s = least_s * draw(st.sampled_from((0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)))
    return PlannedChain("chain", slo_s, rate_rps, tuple(modules))


all_options = st.builds(
    Options,
    dispatch=st.sampled_from(DISPATCHES),
    max_tuples=st.sampled_from((None, 1, 2, 3)),
    dummy=st.booleans(),
    reassign=st.booleans(),
    efficiency=st.booleans(),
    node_merger=st.booleans(),
    cost_direct=st.booleans(),
)


def planned(chain: PlannedChain, options: Options) -> Plan | None:
    try:
        return solve([chain], options)
    except PlanError:
        return None


def paths(chain: PlannedChain) -> Iterator[tuple[str, ...]]:
    """Every path from a module without parents to one without children."""
    children = {
        m.name: [c.name for c in chain.modules if m.name in c.parents] for m in chain.modules
    }

    def down(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not children[path[-1]]:
            yield path
        for child in children[path[-1]]:
            yield from down((*path, child))

    for module in chain.modules:
        if not module.parents:
            yield from down((module.name,))


def worst_cases_s(plan: ModulePlan, options: Options) -> Iterator[float]:
    """The bound of every allocation, from the published rules alone, dummy requests included."""
    total_rps = plan.rate_rps + plan.dummy_rps
    left_rps = total_rps
    for a in plan.allocations:
        c = Configuration(a.hardware, a.batch_size, a.duration_s, a.price_per_hour)
        full = int(a.machines + ROUNDING)
        residual_rps = (a.machines - full) * c.throughput_rps
        if full:
            yield full_machine_s(options.dispatch, c, left_rps=left_rps, rate_rps=total_rps)
        if residual_rps > ROUNDING:
            yield residual_machine_s(
                options.dispatch, c, residual_rps=residual_rps, rate_rps=total_rps
            )
        left_rps -= a.rate_rps


@given(chains(), all_options)
@settings(max_examples=150, deadline=None)
def test_every_plan_serves_the_whole_rate_within_its_budgets_and_the_objective(
    chain: PlannedChain, options: Options
) -> None:
    plan = planned(chain, options)
    if plan is None:
        return
    (found,) = plan.chains
    overheads_s = {m.name: m.overhead_s for m in chain.modules}
    for module in found.modules:
        served_rps = sum(a.rate_rps for a in module.allocations)
        assert served_rps == pytest.approx(module.rate_rps + module.dummy_rps, rel=ROUNDING)
        assert options.dummy or module.dummy_rps == 0
        assert options.max_tuples is None or len(module.allocations) <= options.max_tuples
        assert module.latency_worst_s <= module.latency_budget_s + ROUNDING
        own_s = module.latency_worst_s - overheads_s[module.module]
        assert max(worst_cases_s(module, options)) <= own_s + ROUNDING
    budgets_s = {m.module: m.latency_budget_s for m in found.modules}
    worst_s = {m.module: m.latency_worst_s for m in found.modules}
    for path in paths(chain):
        assert sum(budgets_s[name] for name in path) <= chain.slo_s + ROUNDING
    slowest_s = max(sum(worst_s[name] for name in path) for path in paths(chain))
    assert found.latency_worst_s == pytest.approx(slowest_s)


@given(chains(), all_options)
@settings(max_examples=100, deadline=None)
def test_no_plan_costs_less_than_its_lower_bound(chain: PlannedChain, options: Options) -> None:
    plan = planned(chain, options)
    if plan is not None:
        assert plan.cost_per_hour >= plan.lower_bound_per_hour * (1 - ROUNDING)
        without = planned(chain, replace(options, bound=False))
        assert without == replace(plan, lower_bound_per_hour=0.0), "nothing depends on the bound"


Switch = Callable[[Options, bool], Options]
SWITCHES: tuple[Switch, ...] = (
    lambda options, on: replace(options, dummy=on),
    lambda options, on: replace(options, reassign=on),
    lambda options, on: replace(options, node_merger=on),
    lambda options, on: replace(options, cost_direct=on),
)


@given(chains(), all_options, st.sampled_from(SWITCHES))
@settings(max_examples=150, deadline=None)
def test_no_option_makes_a_plan_costlier_by_being_on(
    chain: PlannedChain, options: Options, switch: Switch
) -> None:
    off = planned(chain, switch(options, False))
    on = planned(chain, switch(options, True))
    if off is not None:
        assert on is not None
        assert on.cost_per_hour <= off.cost_per_hour * (1 + ROUNDING)


@given(chains(), all_options)
@settings(max_examples=60, deadline=None)
def test_mixing_any_number_of_tuples_is_never_costlier_than_two(
    chain: PlannedChain, options: Options
) -> None:
    two = planned(chain, replace(options, max_tuples=2))
    many = planned(chain, replace(options, max_tuples=None))
    if two is not None:
        assert many is not None
        assert many.cost_per_hour <= two.cost_per_hour * (1 + ROUNDING)


@given(chains(), all_options)
@settings(max_examples=40, deadline=None)
def test_the_same_demand_gives_the_same_plan_in_whatever_order_configurations_come(
    chain: PlannedChain, options: Options
) -> None:
    turned = replace(
        chain,
        modules=tuple(replace(m, configurations=m.configurations[::-1]) for m in chain.modules),
    )
    assert planned(chain, options) == planned(chain, options) == planned(turned, options)


@given(chains(), all_options)
@settings(max_examples=60, deadline=None)
def test_an_infeasible_chain_becomes_feasible_with_the_time_it_lacks(
    chain: PlannedChain, options: Options
) -> None:
    try:
        solve([chain], options)
    except PlanError as error:
        assert error.lacking_s > 0
        assert error.module in {m.name for m in chain.modules}
        enough = replace(chain, slo_s=chain.slo_s + error.lacking_s + ROUNDING)
        assert solve([enough], options).cost_per_hour > 0


def needed_rps(c: Configuration, budget_s: float) -> float:
    """The collection rate from which on `c` keeps the budget."""
    if c.duration_s > budget_s + ROUNDING:
        return inf
    return 0.0 if c.batch_size == 1 else c.batch_size / max(budget_s - c.duration_s, 1e-12)


MORE = 2


def enumerated_cost(
    rate_rps: float, choices: Sequence[Configuration], budget_s: float, *, dummies: Dummies
) -> float:
    """Least cost over every number of full machines of every configuration, and one residual.

    With `dummies` "any" more than the rate may be served, by full machines and by the residual;
    with "whole" only by full machines without a residual. At most `MORE` machines of each
    are then tried beyond what serves the rate.
    """
    ranks = ranked(choices)
    best = inf
    more = 1 if dummies == "none" else 1 + MORE
    for counts in product(*(range(ceil(rate_rps / c.throughput_rps) + more) for c in ranks)):
        cost = sum(n * c.price_per_hour for n, c in zip(counts, ranks, strict=True))
        served_rps = sum(n * c.throughput_rps for n, c in zip(counts, ranks, strict=True))
        rest_rps = rate_rps - served_rps
        if cost >= best or (rest_rps < -ROUNDING and dummies == "none"):
            continue
        # What the residual must at least serve for the full machines above it to fill in time.
        least_rps = max(rest_rps, 0.0)
        below_rps = served_rps
        for n, c in zip(counts, ranks, strict=True):
            if n:
                least_rps = max(least_rps, needed_rps(c, budget_s) - below_rps)
                below_rps -= n * c.throughput_rps
        if least_rps <= ROUNDING:
            best = cost
            continue
        for c in ranks:
            residual_rps = max(least_rps, needed_rps(c, budget_s))
            if residual_rps > c.throughput_rps or (
                residual_rps > rest_rps + ROUNDING and dummies != "any"
            ):
                continue
            best = min(best, cost + residual_rps / c.throughput_rps * c.price_per_hour)
    return best


def small_modules() -> Iterator[tuple[float, tuple[Configuration, ...], float]]:
    """300 modules of two or three batch sizes whose machines can be enumerated."""
    rng = random.Random(7)
    for _ in range(300):
        duration_s = rng.choice((0.1, 0.2))
        found = []
        for size in sorted(rng.sample((1, 2, 4, 8), rng.choice((2, 3)))):
            found.append(Configuration("gpu", size, round(duration_s, 3), 1.0))
            duration_s *= rng.choice((1.2, 1.5, 1.8))
        yield float(rng.randint(5, 60)), tuple(found), rng.choice((0.3, 0.5, 0.8, 1.2))


@pytest.mark.parametrize(
    ("dummies", "equal_at_least", "mean_gap_at_most", "missed_at_most"),
    [
        # Measured: 98.9 % equal, mean gap 0.11 %. The 2 missed have no batch size 1.
        (False, 0.98, 0.005, 2),
        # Measured: 74.1 % equal, mean gap 7.2 %. The published dummy requests fill whole machines;
        # brute force also tops a residual up by just what it needs to collect in time, and the rate
        # to more machines than it needs to be served. The 3 missed are only in time with those.
        (True, 0.74, 0.072, 3),
    ],
)
def test_one_module_is_never_below_brute_force_and_above_it_by_no_more_than_stated(
    dummies: bool, equal_at_least: float, mean_gap_at_most: float, missed_at_most: int
) -> None:
    gaps: list[float] = []
    missed = 0
    solver = with_dummies if dummies else schedule
    for rate_rps, choices, budget_s in small_modules():
        least = enumerated_cost(rate_rps, choices, budget_s, dummies="any" if dummies else "none")
        found = solver(rate_rps, choices, budget_s)
        if found is None:
            missed += least < inf
            continue
        assert found.cost_per_hour >= least * (1 - ROUNDING)
        gaps.append(found.cost_per_hour / least - 1)
    equal = sum(gap < ROUNDING for gap in gaps) / len(gaps)
    mean_gap = sum(gaps) / len(gaps)
    summary = f"{equal:.1%} equal, mean gap {mean_gap:.2%}, largest {max(gaps):.1%}, {missed=}"
    assert equal >= equal_at_least, summary
    assert mean_gap <= mean_gap_at_most, summary
    assert missed <= missed_at_most, summary


@pytest.mark.parametrize("dummies", DUMMIES)
def test_branch_and_bound_over_a_modules_machines_finds_what_enumeration_finds(
    dummies: Dummies,
) -> None:
    for rate_rps, choices, budget_s in small_modules():
        least = enumerated_cost(rate_rps, choices, budget_s, dummies=dummies)
        found = cheapest(rate_rps, choices, budget_s, dummies)
        assert (inf if found is None else found.cost_per_hour) == pytest.approx(least, rel=ROUNDING)
        if found is None:
            continue
        assert found.worst_s <= budget_s + ROUNDING
        again = cheapest(rate_rps, choices, found.worst_s, dummies)
        assert again is not None, "what is in time is so from its own worst case on"
        assert again.cost_per_hour == pytest.approx(found.cost_per_hour, rel=ROUNDING)


SPLITS = 60


@pytest.mark.parametrize("dummies", DUMMIES)
def test_the_least_cost_of_a_chain_is_that_of_its_cheapest_split(dummies: Dummies) -> None:
    modules = list(islice(small_modules(), 0, 60, 5))
    for (rate_rps, first, first_s), (_, second, second_s) in pairwise(modules):
        slo_s = first_s + second_s
        chain = PlannedChain(
            "chain",
            slo_s,
            rate_rps,
            (
                PlannedModule("first", "first", rate_rps, (), first),
                PlannedModule("second", "second", rate_rps, ("first",), second),
            ),
        )
        costs = [
            [
                enumerated_cost(rate_rps, choices, slo_s * i / SPLITS, dummies=dummies)
                for i in range(SPLITS + 1)
            ]
            for choices in (first, second)
        ]
        # Both rounded down can be had; of every split one of them is rounded up by less than one.
        high = min(costs[0][i] + costs[1][SPLITS - i] for i in range(SPLITS + 1))
        low = min(costs[0][i] + costs[1][SPLITS + 1 - i] for i in range(1, SPLITS + 1))
        found = least_cost(chain, dummies)
        if found is None:
            assert high == inf
            continue
        assert low * (1 - ROUNDING) <= found.high <= found.low * (1 + CLOSE)
        assert found.low <= high * (1 + ROUNDING)
        if dummies != "any":
            assert found.low == pytest.approx(found.high, rel=ROUNDING), "there are only steps"
