"""The optimum against brute force on every shape of DAG up to four modules."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import inf

import numpy as np
import pytest

from paceline.core.errors import PlanError
from paceline.core.profile import Configuration
from paceline.planner.branch import by_branching
from paceline.planner.compose import compose
from paceline.planner.frontier import Frontier
from paceline.planner.optimal import GAP
from paceline.planner.paths import Graph
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.relaxed import latency_prices
from paceline.planner.series_parallel import tree
from paceline.planner.solve import solve

ROUNDING = 1e-6

WIDEST_GAP = 0.002
"""Where modules trade latency on dummy requests, the bound may end this far below the plan."""


def shapes() -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every DAG of up to four modules in topological order, redundant edges included."""
    for count in range(1, 5):
        edges = list(combinations(range(count), 2))
        for used in product((False, True), repeat=len(edges)):
            yield tuple(
                tuple(a for (a, b), there in zip(edges, used, strict=True) if there and b == i)
                for i in range(count)
            )


def paths(parents: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Every path from a module without parents to one without children."""
    found: list[tuple[int, ...]] = []

    def down(path: tuple[int, ...]) -> None:
        below = [i for i, above in enumerate(parents) if path[-1] in above]
        if not below:
            found.append(path)
        for child in below:
            down((*path, child))

    for i, above in enumerate(parents):
        if not above:
            down((i,))
    return found


def brute_force(
    parents: Sequence[Sequence[int]],
    offers: Sequence[Sequence[tuple[float, float]]],
    slo_s: float,
) -> float:
    """Least cost over all combinations of (latency, cost), every path checked."""
    all_paths = paths(parents)
    best = inf
    for picked in product(*offers):
        if all(sum(picked[i][0] for i in path) <= slo_s + 1e-9 for path in all_paths):
            best = min(best, sum(cost for _, cost in picked))
    return best


@pytest.mark.parametrize("parents", list(shapes()), ids=str)
def test_composition_equals_brute_force_on_every_shape_of_dag(
    parents: tuple[tuple[int, ...], ...],
) -> None:
    rng = random.Random(str(parents))
    graph = Graph.of(parents)
    for _ in range(3):
        offers = [
            [(rng.randint(1, 9) / 10, float(rng.randint(1, 99))) for _ in range(rng.randint(1, 4))]
            for _ in parents
        ]
        arrays = [(np.array([p[0] for p in o]), np.array([p[1] for p in o])) for o in offers]
        slo_s = rng.choice((0.8, 1.4, 2.0))
        least = brute_force(parents, offers, slo_s)
        found = compose(graph, arrays, slo_s)
        if found is None:
            assert least == inf
            continue
        cost = sum(offer[at][1] for offer, at in zip(offers, found.chosen, strict=True))
        assert cost == pytest.approx(least) == pytest.approx(found.bound)
        prices = latency_prices(graph, arrays, slo_s)
        assert prices is not None
        priced = compose(graph, arrays, slo_s, prices=prices, at_most=least)
        assert priced is not None and priced.bound == pytest.approx(least)


def agrees(parents: Sequence[Sequence[int]], rng: random.Random, options: int) -> bool:
    """Whether composing equals brute force; also says whether anything was possible."""
    offers = [
        [(rng.randint(1, 9) / 10, float(rng.randint(1, 99))) for _ in range(options)]
        for _ in parents
    ]
    arrays = [(np.array([p[0] for p in o]), np.array([p[1] for p in o])) for o in offers]
    slo_s = rng.choice((1.0, 1.6, 2.2))
    least = brute_force(parents, offers, slo_s)
    found = compose(Graph.of(parents), arrays, slo_s)
    assert (least == inf) == (found is None), parents
    if found is not None:
        cost = sum(offer[at][1] for offer, at in zip(offers, found.chosen, strict=True))
        assert cost == pytest.approx(least) == pytest.approx(found.bound), parents
    return found is not None


def test_composition_equals_brute_force_on_every_dag_of_five_modules() -> None:
    edges = list(combinations(range(5), 2))
    feasible = 0
    for at, used in enumerate(product((False, True), repeat=len(edges))):
        there = [edge for edge, on in zip(edges, used, strict=True) if on]
        parents = [tuple(a for a, b in there if b == i) for i in range(5)]
        feasible += agrees(parents, random.Random(at), 2)
    assert feasible >= 400


def test_branching_is_exact_within_its_tolerance_and_says_where_it_ended_at_its_limit() -> None:
    cut_short = 0
    for seed in range(40):
        rng = random.Random(seed)
        parents = [tuple(a for a in range(b) if rng.random() < 0.4) for b in range(5)]
        offers = [
            [(rng.randint(1, 40) / 40, float(rng.randint(1, 999))) for _ in range(5)]
            for _ in parents
        ]
        arrays = [(np.array([p[0] for p in o]), np.array([p[1] for p in o])) for o in offers]
        graph, slo_s = Graph.of(parents), rng.choice((0.9, 1.4, 1.9))
        least = brute_force(parents, offers, slo_s)
        for tolerance, most_nodes in ((0.0, 0), (50.0, 0), (0.0, 2)):
            found = by_branching(graph, arrays, slo_s, inf, tolerance, most_nodes)
            assert (found is None) == (least == inf), seed
            if found is None:
                continue
            cost = sum(offer[at][1] for offer, at in zip(offers, found.chosen, strict=True))
            taken_s = [offer[at][0] for offer, at in zip(offers, found.chosen, strict=True)]
            assert graph.longest(taken_s) <= slo_s + 1e-9, seed
            assert found.bound <= least * (1 + 1e-9) <= cost * (1 + 2e-9), seed
            cut_short += found.cut_short
            if not found.cut_short:
                assert cost - found.bound <= max(tolerance, 1e-6 * cost), seed
            if not most_nodes:
                assert not found.cut_short, seed
    assert cut_short >= 5


def test_what_no_end_can_be_taken_off_is_solved_by_branching() -> None:
    # Three starts, three ends, each start before two of the ends: a crown.
    crown = ((), (), (), (0, 1), (1, 2), (0, 2))
    assert tree(Graph.of(crown)) is None
    assert sum(agrees(crown, random.Random(seed), 3) for seed in range(12)) >= 6


def small_chain(parents: tuple[tuple[int, ...], ...]) -> PlannedChain:
    rng = random.Random(f"chain {parents}")
    rate_rps = rng.choice((3.0, 20.0, 150.0))
    modules = []
    for i, above in enumerate(parents):
        configurations = []
        for hardware, price in (("cpu", 0.3), ("gpu", 1.0)):
            duration_s = rng.choice((0.02, 0.05)) / price**0.5
            for size in (1, 2, 4):
                configurations.append(Configuration(hardware, size, duration_s, price))
                duration_s *= rng.choice((1.0, 1.2, 1.7))
        modules.append(
            PlannedModule(
                f"m{i}", "m", rate_rps, tuple(f"m{j}" for j in above), tuple(configurations)
            )
        )
    least_s = [min(c.duration_s for c in m.configurations) for m in modules]
    slo_s = Graph.of(parents).longest(least_s) * rng.choice((1.1, 1.7, 3.0))
    return PlannedChain("c", slo_s, rate_rps, tuple(modules))


def interpolated(module: PlannedModule) -> Iterator[Configuration]:
    """Sizes 1 to 4 of every hardware, written out by hand."""
    for hardware in ("cpu", "gpu"):
        one, two, four = (c for c in module.configurations if c.hardware == hardware)
        between_s = (two.duration_s + four.duration_s) / 2
        yield from (one, two, Configuration(hardware, 3, between_s, one.price_per_hour), four)


def points(module: PlannedModule, most_s: float) -> list[tuple[float, float]]:
    """(latency, cost) of every configuration with no dummy requests, and with many amounts of
    them; thinned to those that none beats."""
    found: list[tuple[float, float]] = []
    for c in interpolated(module):
        if c.batch_size == 1:
            found.append((c.duration_s, module.rate_rps / c.tc_ratio))
            continue
        for share in (1.0, *np.geomspace(1.0, 30.0, 25)[1:]):
            total_rps = module.rate_rps * float(share)
            found.append((c.duration_s + c.batch_size / total_rps, total_rps / c.tc_ratio))
    front: list[tuple[float, float]] = []
    for latency_s, cost in sorted(found):
        if latency_s <= most_s and (not front or cost < front[-1][1]):
            front.append((latency_s, cost))
    return front


@pytest.mark.parametrize("parents", list(shapes()), ids=str)
def test_the_optimum_is_not_above_brute_force_on_any_shape_of_dag(
    parents: tuple[tuple[int, ...], ...],
) -> None:
    chain = small_chain(parents)
    plan = solve([chain], Options(policy="optimal"))
    offers = [points(module, chain.slo_s) for module in chain.modules]
    while sum(len(offer) for offer in offers) > 60:
        offers = [offer[::2] for offer in offers]
    least = brute_force(parents, offers, chain.slo_s)
    assert plan.cost_per_hour <= least * (1 + GAP)
    assert plan.lower_bound_per_hour <= min(least, plan.cost_per_hour) * (1 + ROUNDING)
    assert plan.cost_per_hour <= plan.lower_bound_per_hour * (1 + WIDEST_GAP)


@pytest.mark.parametrize("parents", list(shapes()), ids=str)
def test_without_dummy_requests_to_gain_from_the_optimum_is_brute_force_exactly(
    parents: tuple[tuple[int, ...], ...],
) -> None:
    # Batches of one have nothing to collect: two kinds of machine, two points a module.
    rng = random.Random(f"ones {parents}")
    modules = tuple(
        PlannedModule(
            f"m{i}",
            "m",
            10.0,
            tuple(f"m{j}" for j in above),
            (
                Configuration("fast", 1, rng.randint(1, 4) / 100, float(rng.randint(5, 9))),
                Configuration("slow", 1, rng.randint(5, 9) / 100, float(rng.randint(1, 2))),
            ),
        )
        for i, above in enumerate(parents)
    )
    offers = [[(c.duration_s, 10.0 / c.tc_ratio) for c in m.configurations] for m in modules]
    for slo_s in (0.05, 0.12, 0.2):
        least = brute_force(parents, offers, slo_s)
        try:
            plan = solve([PlannedChain("c", slo_s, 10.0, modules)], Options(policy="optimal"))
        except PlanError:
            assert least == inf
            continue
        assert plan.cost_per_hour == pytest.approx(least)
        assert plan.lower_bound_per_hour == pytest.approx(least)


def test_only_the_letter_n_is_not_series_parallel_up_to_four_modules() -> None:
    found = {parents for parents in shapes() if tree(Graph.of(parents)) is None}
    letters = {
        frozenset((a, b) for b, above in enumerate(parents) for a in above) for parents in found
    }
    assert letters and all(len(edges) == 3 for edges in letters)
    for edges in letters:
        starts, ends = [a for a, _ in edges], [b for _, b in edges]
        assert not set(starts) & set(ends)
        assert len(set(starts)) == len(set(ends)) == 2


def test_a_frontier_is_the_least_cost_over_all_sizes_and_any_number_of_dummy_requests() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        module = small_chain((((),) * 4)[: rng.randint(1, 4)]).modules[0]
        frontier = Frontier.of(module.configurations, module.rate_rps, 0.0)
        for budget_s in np.linspace(frontier.least_s, 20 * frontier.least_s, 60):
            least = min(
                max(module.rate_rps, c.batch_size / (budget_s - c.duration_s)) / c.tc_ratio
                if c.batch_size > 1
                else module.rate_rps / c.tc_ratio
                for c in interpolated(module)
                if c.duration_s < budget_s - 1e-9
                or (c.batch_size == 1 and c.duration_s <= budget_s)
            )
            assert frontier.cost_at(float(budget_s)) == pytest.approx(least, rel=1e-5)
            choice = frontier.at(float(budget_s))
            assert choice is not None and choice.worst_s <= budget_s + 1e-8
            cost = choice.machines * choice.configuration.price_per_hour
            assert cost == pytest.approx(frontier.cost_at(float(budget_s)))


def test_a_frontier_never_rises() -> None:
    module = small_chain(((),)).modules[0]
    frontier = Frontier.of(module.configurations, module.rate_rps, 0.01)
    costs = frontier.cost(np.linspace(frontier.least_s, 1.0, 500))
    assert np.all(np.diff(costs) <= 1e-12) and np.isfinite(costs).all()
    assert frontier.cost_at(frontier.least_s - 1e-6) == inf
    assert frontier.at(frontier.least_s - 1e-6) is None


def test_every_integer_batch_size_is_used_between_the_measured_ones() -> None:
    configurations = (Configuration("gpu", 1, 0.1, 1.0), Configuration("gpu", 9, 0.2, 1.0))
    module = PlannedModule("m", "m", 50.0, (), configurations)
    plan = solve([PlannedChain("c", 0.251, 50.0, (module,))], Options(policy="optimal"))
    (allocation,) = plan.chains[0].modules[0].allocations
    assert allocation.batch_size == 5
    assert allocation.duration_s == pytest.approx(0.15)
    assert plan.chains[0].modules[0].dummy_rps == 0


def test_dummy_requests_are_used_where_a_batch_would_not_fill_in_time() -> None:
    # Batches of 8 take no longer than one, so half-empty ones beat a machine for each request.
    configurations = (Configuration("gpu", 1, 0.1, 1.0), Configuration("gpu", 8, 0.1, 1.0))
    module = PlannedModule("m", "m", 11.0, (), configurations)
    plan = solve([PlannedChain("c", 0.2, 11.0, (module,))], Options(policy="optimal"))
    assert plan.cost_per_hour == pytest.approx(1.0)
    assert plan.chains[0].modules[0].dummy_rps == pytest.approx(9.0)


def test_mixed_hardware_is_chosen_per_module_and_ties_go_to_the_first_name() -> None:
    both = (Configuration("a", 1, 0.1, 1.0), Configuration("b", 1, 0.1, 1.0))
    cheap = (*both, Configuration("slow", 1, 0.4, 0.1))
    chain = PlannedChain(
        "c",
        0.55,
        5.0,
        (PlannedModule("x", "x", 5.0, (), both), PlannedModule("y", "y", 5.0, ("x",), cheap)),
    )
    plan = solve([chain], Options(policy="optimal")).chains[0]
    assert [m.allocations[0].hardware for m in plan.modules] == ["a", "slow"]


def test_an_infeasible_chain_says_what_it_lacks_and_one_of_just_enough_time_is_planned() -> None:
    module = PlannedModule("m", "m", 5.0, (), (Configuration("gpu", 1, 0.1, 1.0),), 0.02)
    with pytest.raises(PlanError, match="needs at least 120 ms, 20 ms more than") as raised:
        solve([PlannedChain("c", 0.1, 5.0, (module,))], Options(policy="optimal"))
    assert raised.value.lacking_s == pytest.approx(0.02)
    plan = solve([PlannedChain("c", 0.12, 5.0, (module,))], Options(policy="optimal"))
    assert plan.cost_per_hour == pytest.approx(0.5)
