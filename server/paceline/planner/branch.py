"""The cheapest options for a DAG that is not series-parallel, by branch and bound on latencies.

Invariant: no combination of options that keeps the objective costs less than `Composed.bound`.

A node allows every module a range of latencies. Its linear relaxation (`relaxed`) blends options,
from that of the node it is a part of; the prices of latency in it bound the node from below, rule
options out, and tell a combination to try: the options just within the blended latencies. The
module whose blend is the cheapest against what it stands for is then split there, into shorter and
longer latencies: each half has a tighter relaxation, where fixing one option among hundreds would
hardly change it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from paceline.planner.frontier import SAME_S
from paceline.planner.hull import Offers, Prices, pareto
from paceline.planner.paths import Graph
from paceline.planner.relaxed import Flow

MOST_NODES, MOST_NODES_EXACT = 300, 3000
"""After so many the best found so far is given, with its bound: with a tolerance and without."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Composed:
    """For every module the index of its option; what no combination can cost less than.

    `cut_short`: the search ended at its limit, so that the two may be further apart than asked.
    """

    chosen: tuple[int, ...]
    bound: float
    cut_short: bool = False


def by_branching(
    graph: Graph,
    offers: Sequence[Offers],
    slo_s: float,
    at_most: float = inf,
    tolerance: float = 0.0,
    most_nodes: int = 0,
) -> Composed | None:
    """A combination that costs at most `tolerance` more than the cheapest; None if none keeps
    `slo_s`. Those that cost more than `at_most` are not looked for. `most_nodes` 0: as above.
    """
    fronts, kept = zip(*(pareto(*offer) for offer in offers), strict=True)
    search = _Search.of(graph, fronts, slo_s)
    best, chosen = inf, None
    closed = inf
    nodes: list[tuple[float, int, _Node]] = [(-inf, 0, _Node(fronts, (), -1, None))]
    number = 0
    for _ in range(most_nodes or (MOST_NODES if tolerance else MOST_NODES_EXACT)):
        if not nodes or nodes[0][0] >= _enough(min(best, at_most), tolerance):
            break
        known, _, node = heappop(nodes)
        flow = node.solved(graph, slo_s)
        if flow is None:
            continue
        prices = flow.prices()
        found, picked = search.within(prices.latencies_s)
        if found < best:
            best, chosen = found, picked
        bound, left = _ruled_out(node.offers, prices, slo_s, min(best, at_most))
        bound = max(bound, known)
        at = _where(left, prices)
        if at is None or bound >= _enough(min(best, at_most), tolerance):
            closed = min(closed, bound)
            continue
        for half in _halves(left, *at):
            number += 1
            heappush(nodes, (bound, number, _Node(half, node.offers, at[0], flow)))
    if chosen is None:
        return None
    known = nodes[0][0] if nodes else inf
    bound = min(best, at_most, closed, known)
    return Composed(
        tuple(int(index[at]) for index, at in zip(kept, chosen, strict=True)),
        best if bound >= _enough(best, 0.0) else bound,
        known < _enough(min(best, at_most), tolerance),
    )


@dataclass(frozen=True, slots=True)
class _Node:
    """What is allowed; what was in the node that it is a part of, which module was split there, and
    the flow that solves that node's relaxation.
    """

    offers: Sequence[Offers]
    above: Sequence[Offers]
    module: int
    flow: Flow | None

    def solved(self, graph: Graph, slo_s: float) -> Flow | None:
        """The flow that solves the relaxation; None if nothing keeps `slo_s`."""
        if self.flow is None:
            return Flow.of(graph, self.offers, slo_s)
        changed = [
            None if now is was else now for now, was in zip(self.offers, self.above, strict=True)
        ]
        return self.flow.after(changed, self.module)


def _enough(cost: float, tolerance: float) -> float:
    """From which bound on a node is of no use."""
    return cost - max(tolerance, _ROUNDING * abs(cost)) if cost < inf else inf


def _ruled_out(
    node: Sequence[Offers], prices: Prices, slo_s: float, cost: float
) -> tuple[float, list[Offers]]:
    """The node's bound, and its options without those that nothing of at most `cost` can use."""
    paid = [
        costs + per_s * latencies_s
        for (latencies_s, costs), per_s in zip(node, prices.per_s, strict=True)
    ]
    leasts = [float(np.min(each)) for each in paid]
    bound = sum(leasts) - prices.total_per_s * slo_s
    surplus = cost - bound + _ROUNDING * (abs(cost) + abs(bound)) if cost < inf else inf
    keep = [each - least <= surplus for each, least in zip(paid, leasts, strict=True)]
    return bound, [
        offer if which.all() else (offer[0][which], offer[1][which])
        for offer, which in zip(node, keep, strict=True)
    ]


def _where(node: Sequence[Offers], prices: Prices) -> tuple[int, int] | None:
    """The module to split and how many of its options are the shorter half; None: none has two."""
    best: tuple[float, int, int] | None = None
    for module, (latencies_s, costs) in enumerate(node):
        if len(costs) < 2:
            continue
        per_s, blended_s = prices.per_s[module], prices.latencies_s[module]
        within = int(np.searchsorted(latencies_s, blended_s + SAME_S, side="right"))
        blend = float(np.min(costs + per_s * latencies_s)) - per_s * blended_s
        gap = float(costs[max(within - 1, 0)]) - blend
        if best is None or gap > best[0]:
            best = (gap, module, min(max(within, 1), len(costs) - 1))
    return None if best is None else best[1:]


def _halves(node: Sequence[Offers], module: int, shorter: int) -> Iterator[list[Offers]]:
    latencies_s, costs = node[module]
    for half in (slice(0, shorter), slice(shorter, None)):
        found = list(node)
        found[module] = (latencies_s[half], costs[half])
        yield found


@dataclass(frozen=True, slots=True)
class _Search:
    """Combinations near given latencies; every module's options fastest first, as lists."""

    graph: Graph
    fronts: Sequence[tuple[list[float], list[float]]]
    slo_s: float

    @classmethod
    def of(cls, graph: Graph, fronts: Sequence[Offers], slo_s: float) -> _Search:
        return cls(graph, [(s.tolist(), costs.tolist()) for s, costs in fronts], slo_s)

    def within(self, latencies_s: Sequence[float]) -> tuple[float, tuple[int, ...] | None]:
        """The cost and the options just within these, given what latency no path uses: the largest
        saving first."""
        chosen = [self._last_within(i, latency_s) for i, latency_s in enumerate(latencies_s)]
        if min(chosen) < 0:
            return inf, None
        for _ in chosen:
            own_s = [s[at] for (s, _), at in zip(self.fronts, chosen, strict=True)]
            slacks_s = self.graph.slacks(own_s, self.slo_s)
            longer = [self._last_within(i, s + slacks_s[i]) for i, s in enumerate(own_s)]
            savings = [
                costs[at] - costs[max(at, to)]
                for (_, costs), at, to in zip(self.fronts, chosen, longer, strict=True)
            ]
            most = max(savings)
            if most <= 0:
                break
            at = savings.index(most)
            chosen[at] = longer[at]
        cost = sum(costs[at] for (_, costs), at in zip(self.fronts, chosen, strict=True))
        return cost, tuple(chosen)

    def _last_within(self, module: int, latency_s: float) -> int:
        """The cheapest option within a latency; -1 if there is none."""
        return bisect_right(self.fronts[module][0], latency_s + SAME_S) - 1
