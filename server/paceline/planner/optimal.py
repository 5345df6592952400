"""The optimum for fractional machines: exact frontiers, composed exactly (algorithms 1.4).

Invariant: no plan under any policy costs less than `Optimum.bound_per_hour`. Cutting ends when the
plan is within `GAP` of it, after `ROUNDS`, or when composing ends at its limit; the worst gap seen
is then 0.3 %.

A frontier falls continuously where batches are topped up to fill in time. It is cut into intervals;
taking each for its cost at the start gives a plan, taking it for its cost at the end gives a bound.
Intervals that no plan as cheap as the best one known can use are dropped, and those that the bound
rests on are cut finer, until both meet. Where no module is topped up they meet at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paceline.planner.compose import compose
from paceline.planner.frontier import SAME_S, Choice, Floats
from paceline.planner.hull import Offers, Prices
from paceline.planner.paths import Graph
from paceline.planner.relaxed import latency_prices

GAP = 1e-4
"""The relative distance from the bound at which a plan is taken for optimal."""

STEP = 0.02
"""By how much, relatively, the cost may fall within an interval at first."""

PIECES, NEAR = 4, 8
"""Into how many an interval is cut that the bound rests on, and as steep ones up to so far off."""

ROUNDS = 160
"""Shared out among the modules; then the bound is given as it is."""


class Costs(Protocol):
    """A module's least cost by latency, as `frontier.Frontier` has it."""

    @property
    def least_s(self) -> float: ...
    def cost(self, latencies_s: Floats) -> Floats: ...
    def cost_at(self, latency_s: float) -> float: ...
    def below(self, latencies_s: Floats) -> Floats: ...
    def kinks_s(self, within_s: float) -> Floats: ...
    def at(self, latency_s: float) -> Choice | None: ...


@dataclass(frozen=True, slots=True)
class Optimum:
    """For every module the latency it may take and what it runs; the cost and a lower bound."""

    latencies_s: tuple[float, ...]
    choices: tuple[Choice, ...]
    cost_per_hour: float
    bound_per_hour: float


@dataclass(frozen=True, slots=True)
class _Cut:
    """A module's intervals [start, end): cost at the start, and just before the end."""

    start_s: Floats
    end_s: Floats
    high: Floats
    low: Floats

    @classmethod
    def of(cls, frontier: Costs, start_s: Floats, end_s: Floats) -> _Cut:
        # An interval that ends where it starts is the last one, its end included.
        below = frontier.below(np.maximum(end_s, start_s + 2 * SAME_S))
        high = frontier.cost(start_s)
        return cls(start_s, end_s, high, np.minimum(high, below))

    def finer(self, frontier: Costs, pieces: npt.NDArray[np.intp]) -> _Cut:
        """Every interval cut into that many pieces of one width."""
        at = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        width_s = np.repeat((self.end_s - self.start_s) / pieces, pieces)
        start_s = np.repeat(self.start_s, pieces) + at * width_s
        last = at + 1 == np.repeat(pieces, pieces)
        return _Cut.of(
            frontier, start_s, np.where(last, np.repeat(self.end_s, pieces), start_s + width_s)
        )

    def kept(self, keep: npt.NDArray[np.bool_]) -> _Cut:
        return _Cut(self.start_s[keep], self.end_s[keep], self.high[keep], self.low[keep])


def optimum(graph: Graph, frontiers: Sequence[Costs], slo_s: float) -> Optimum | None:
    """The cheapest plan within `slo_s`, None if there is none."""
    least_s = [frontier.least_s for frontier in frontiers]
    slacks_s = graph.slacks(least_s, slo_s)
    if min(slacks_s) < -SAME_S:
        return None
    cuts = [
        _whole(frontier, least + max(0.0, slack))
        for frontier, least, slack in zip(frontiers, least_s, slacks_s, strict=True)
    ]
    prices = latency_prices(graph, [(cut.start_s, cut.high) for cut in cuts], slo_s)
    if prices is None:
        prices = Prices((0.0,) * len(cuts), 0.0, tuple(least_s))
    best_s = _with_slack(graph, frontiers, prices.latencies_s, slo_s)
    cuts = [
        cut.finer(f, np.ceil(np.log(cut.high / cut.low) / STEP).clip(1, 100).astype(np.intp))
        for cut, f in zip(
            _possible(cuts, prices, slo_s, _cost(frontiers, best_s)), frontiers, strict=True
        )
    ]
    cost, bound, care = _cost(frontiers, best_s), 0.0, 4.0
    for _ in range(ceil(ROUNDS / len(frontiers))):
        cuts = list(_possible(cuts, prices, slo_s, cost))
        low: list[Offers] = [(cut.start_s, cut.low) for cut in cuts]
        # Coarse while the gap is wide: it only shows where to cut.
        gap = cost - max(bound, _relaxed(cuts, prices, slo_s))
        tolerance = max(GAP * cost / 64, gap / care)
        found = compose(
            graph,
            low,
            slo_s,
            prices=prices,
            at_most=cost,
            tolerance=tolerance,
            enough=cost * (1 - GAP / 2),
        )
        known, bound = bound, max(bound, min(cost, cost if found is None else found.bound))
        if bound - known < gap / 20:
            care *= 4
        if found is None or cost - bound <= GAP * cost:
            break
        starts_s = [float(cut.start_s[at]) for cut, at in zip(cuts, found.chosen, strict=True)]
        filled_s = _with_slack(graph, frontiers, starts_s, slo_s)
        if (then := _cost(frontiers, filled_s)) < cost:
            best_s, cost = filled_s, then
        if cost - bound <= GAP * cost or found.cut_short:
            break
        cuts = [_split(*each) for each in zip(cuts, frontiers, found.chosen, strict=True)]
    choices = [f.at(latency_s) for f, latency_s in zip(frontiers, best_s, strict=True)]
    assert None not in choices, f"latencies {best_s} of a plan are below the least {least_s}"
    return Optimum(tuple(best_s), tuple(c for c in choices if c is not None), cost, bound)


def _whole(frontier: Costs, most_s: float) -> _Cut:
    """All latencies from the least possible to `most_s`, cut where the shape changes."""
    start_s = frontier.kinks_s(most_s)
    start_s = start_s[start_s >= frontier.least_s - SAME_S]
    start_s = np.append(start_s[start_s < most_s - SAME_S], most_s)
    return _Cut.of(frontier, start_s, np.append(start_s[1:], most_s))


def _cost(frontiers: Sequence[Costs], latencies_s: Sequence[float]) -> float:
    return sum(f.cost_at(s) for f, s in zip(frontiers, latencies_s, strict=True))


def _split(cut: _Cut, frontier: Costs, at: int) -> _Cut:
    if cut.low[at] >= cut.high[at] * (1 - GAP / 10):
        return cut
    pieces = np.ones(len(cut.low), dtype=np.intp)
    steep = cut.high[at] - cut.low[at]
    near = np.arange(max(0, at - NEAR), min(len(pieces), at + NEAR + 1))
    pieces[near[(cut.high - cut.low)[near] > steep / 2]] = PIECES
    return cut.finer(frontier, pieces)


def _relaxed(cuts: Sequence[_Cut], prices: Prices, slo_s: float) -> float:
    """What every plan costs at least: each module at its best at these prices of latency."""
    leasts = [
        float(np.min(cut.low + per_s * cut.start_s))
        for cut, per_s in zip(cuts, prices.per_s, strict=True)
    ]
    return sum(leasts) - prices.total_per_s * slo_s


def _possible(cuts: Sequence[_Cut], prices: Prices, slo_s: float, cost: float) -> Iterator[_Cut]:
    """Without the intervals that no plan of at most `cost` can use."""
    paid = [cut.low + per_s * cut.start_s for cut, per_s in zip(cuts, prices.per_s, strict=True)]
    leasts = [float(np.min(each)) for each in paid]
    surplus = cost + prices.total_per_s * slo_s - sum(leasts)
    for cut, each, least in zip(cuts, paid, leasts, strict=True):
        yield cut.kept(each - least <= surplus + 1e-9 * (cost + abs(surplus)))


def _with_slack(
    graph: Graph, frontiers: Sequence[Costs], latencies_s: Sequence[float], slo_s: float
) -> list[float]:
    """Offer latency that no path uses to one module after the other, largest saving first."""
    now_s = list(latencies_s)
    for _ in now_s:
        slacks_s = graph.slacks(now_s, slo_s)
        offers = [
            (f.cost_at(s) - f.cost_at(s + slack), -i)
            for i, (f, s, slack) in enumerate(zip(frontiers, now_s, slacks_s, strict=True))
            if slack > SAME_S
        ]
        if not offers or (best := max(offers))[0] <= 0:
            break
        now_s[-best[1]] += slacks_s[-best[1]]
    return now_s
