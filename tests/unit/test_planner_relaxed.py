"""The relaxation solved as a flow: the best one, and again after one module's options changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array

from paceline.planner.frontier import Floats
from paceline.planner.hull import Offers, Prices, lower_hull, pareto
from paceline.planner.paths import Graph
from paceline.planner.relaxed import Flow, latency_prices

SLO_S = 1.0


def by_highs(graph: Graph, offers: Sequence[Offers], slo_s: float) -> Prices | None:
    """The same as a linear program; None if infeasible."""
    hulls = [(np.array(x), np.array(y)) for x, y in (lower_hull(*offer) for offer in offers)]
    costs, latencies, owner = _columns(hulls)
    matrix, limits = _path_rows(graph, latencies, owner, slo_s)
    count = len(graph.parents)
    one_each = csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(count, len(owner) + count)
    )
    answer = linprog(
        np.concatenate((costs, np.zeros(count))),
        A_ub=matrix,
        b_ub=limits,
        A_eq=one_each,
        b_eq=np.ones(count),
        method="highs-ds",
    )
    if not answer.success:
        return None
    duals = np.maximum(0.0, -np.asarray(answer.ineqlin.marginals))
    per_s = np.zeros(count)
    total = 0.0
    for row, (module, child) in enumerate(_rows(graph)):
        per_s[module] += duals[row]
        total += duals[row] if child is None else 0.0
    blended = np.bincount(owner, weights=latencies * answer.x[: len(owner)], minlength=count)
    return Prices(tuple(per_s.tolist()), float(total), tuple(blended.tolist()))


def _columns(offers: Sequence[Offers]) -> tuple[Floats, Floats, Any]:
    costs = np.concatenate([costs for _, costs in offers])
    latencies = np.concatenate([latencies for latencies, _ in offers])
    owner = np.repeat(np.arange(len(offers)), [len(costs) for _, costs in offers])
    return costs, latencies, owner


def _rows(graph: Graph) -> list[tuple[int, int | None]]:
    """What must end before what starts; None: before the objective."""
    return [
        (module, child)
        for module, below in enumerate(graph.children)
        for child in (below or (None,))
    ]


def _path_rows(graph: Graph, latencies: Floats, owner: Any, slo_s: float) -> tuple[Any, Floats]:
    """start + latency - next start <= 0, and start + latency <= objective at the ends."""
    rows: list[Any] = []
    columns: list[Any] = []
    values: list[Any] = []
    limits: list[float] = []
    for row, (module, child) in enumerate(_rows(graph)):
        own = np.flatnonzero(owner == module)
        starts = [len(owner) + module] + ([] if child is None else [len(owner) + child])
        columns += [own, starts]
        values += [latencies[own], [1.0, -1.0][: len(starts)]]
        rows += [np.full(len(own), row), [row] * len(starts)]
        limits.append(slo_s if child is None else 0.0)
    shape = (len(limits), len(owner) + len(graph.parents))
    flat = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return csr_array(flat, shape=shape), np.array(limits)


def bound_by(prices: Prices, offers: Sequence[Offers]) -> float:
    """What every combination that keeps the objective costs at least."""
    return -prices.total_per_s * SLO_S + sum(
        float(np.min(costs + per_s * latencies_s))
        for (latencies_s, costs), per_s in zip(offers, prices.per_s, strict=True)
    )


def check(flow: Flow, graph: Graph, offers: Sequence[Offers]) -> None:
    """Prices and latencies prove each other: the bound of the ones is the cost of the others."""
    prices = flow.prices()
    bound = bound_by(prices, offers)
    cost = sum(
        float(np.interp(latency_s, *lower_hull(*offer)))
        for latency_s, offer in zip(prices.latencies_s, offers, strict=True)
    )
    assert bound == pytest.approx(cost, rel=1e-8, abs=1e-8)
    assert graph.longest(prices.latencies_s) <= SLO_S * (1 + 1e-9)
    assert min(prices.per_s) >= 0
    assert latency_prices(graph, offers, SLO_S) is not None
    program = by_highs(graph, offers, SLO_S)
    assert program is not None
    assert bound == pytest.approx(bound_by(program, offers), rel=1e-6, abs=1e-6)


def drawn(rng: random.Random) -> tuple[Graph, list[Offers]]:
    modules = rng.randint(1, 9)
    graph = Graph.of([tuple(a for a in range(b) if rng.random() < 0.4) for b in range(modules)])
    offers = []
    for _ in range(modules):
        count = rng.randint(1, 8)
        latencies_s = np.array(
            [rng.choice((0.1, 0.2, 0.3, 0.7, rng.random())) for _ in range(count)]
        )
        costs = np.array([rng.choice((1.0, 2.0, 5.0, 9 * rng.random())) for _ in range(count)])
        offers.append(pareto(latencies_s, costs)[0])
    return graph, offers


def solved(graph: Graph, offers: Sequence[Offers]) -> Flow | None:
    return Flow.of(graph, offers, SLO_S)


@pytest.mark.parametrize("seed", range(60))
def test_a_flow_is_the_best_there_is_and_none_where_no_latencies_fit(seed: int) -> None:
    graph, offers = drawn(random.Random(seed))
    flow = solved(graph, offers)
    assert (flow is None) == (graph.longest([float(s[0]) for s, _ in offers]) > SLO_S)
    assert (flow is None) == (by_highs(graph, offers, SLO_S) is None)
    if flow is not None:
        check(flow, graph, offers)


@pytest.mark.parametrize("seed", range(60))
def test_after_a_module_lost_options_the_flow_is_the_best_there_is_again(seed: int) -> None:
    rng = random.Random(seed)
    graph, offers = drawn(rng)
    flow = solved(graph, offers)
    while flow is not None and (some := [i for i, (s, _) in enumerate(offers) if len(s) > 1]):
        check(flow, graph, offers)
        module = rng.choice(some)
        latencies_s, costs = offers[module]
        at = rng.randint(1, len(costs) - 1)
        half = slice(0, at) if rng.random() < 0.5 else slice(at, None)
        offers[module] = (latencies_s[half], costs[half])
        changed = [each if i == module else None for i, each in enumerate(offers)]
        before = flow.prices()
        then = flow.after(changed, module)
        assert flow.prices() == before, "the node above is split once more"
        assert (then is None) == (solved(graph, offers) is None)
        flow = then


def test_latencies_that_exceed_the_objective_by_rounding_alone_keep_it() -> None:
    crown = Graph.of([(), (), (), (0, 1), (1, 2), (0, 2)])
    fitted = 0
    for seed in range(300):
        rng = random.Random(seed)
        slo_s = rng.choice((1.0, 1.6, 2.2))
        offers = []
        for _ in range(6):
            latencies_s = np.array([rng.randint(1, 12) / 10 for _ in range(3)])
            offers.append(pareto(latencies_s, np.array([rng.random() for _ in range(3)]))[0])
        flow = Flow.of(crown, offers, slo_s)
        at = 0
        while flow is not None and at < 6:
            offers[at] = (offers[at][0][:1], offers[at][1][:1])
            flow = flow.after([each if i == at else None for i, each in enumerate(offers)], at)
            at += 1
        fits = crown.longest([float(s[0]) for s, _ in offers]) <= slo_s + 1e-9
        assert (flow is not None) == fits, seed
        fitted += fits
    assert 50 <= fitted <= 250
