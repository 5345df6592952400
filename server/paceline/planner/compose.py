"""The cheapest choice for every module with every path of the DAG within the objective.

Invariant: the result is the minimum over all combinations of the options given.

Each module offers options (latency, cost). Series-parallel DAGs are solved by dynamic programming
over Pareto fronts: latencies add up along series, and parallel parts share a latency. In any other
DAG a module between the start and one other module, or between one other and the end, is decided
with that one (the letter N is then a series of two); what is left and not series-parallel either is
searched by branching on latencies (`branch`; algorithms 1.4).

`Prices` of latency (`hull`) tell what no combination of a part can be of use for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from paceline.planner.branch import Composed, by_branching
from paceline.planner.frontier import SAME_S, Floats
from paceline.planner.hull import Index, Offers, Prices, pareto
from paceline.planner.paths import Graph
from paceline.planner.series_parallel import Series, Tree, tree

_MANY, _MOST = 200, 500
"""From how many options on a front is thinned as the tolerance allows, and to how many at most."""

_PAIRS_AT_ONCE = 1 << 20


def compose(
    graph: Graph,
    offers: Sequence[Offers],
    slo_s: float,
    *,
    prices: Prices | None = None,
    at_most: float = inf,
    tolerance: float = 0.0,
    enough: float = inf,
) -> Composed | None:
    """The cheapest option of every module; None if no combination keeps `slo_s`.

    With `prices`, combinations that cost more than `at_most` may be left out: None then means
    that there may be only those. With a `tolerance` (money) above 0, work is limited: the result
    need not be the cheapest, but nothing costs less than its bound. Nor need it be when it is known
    that nothing costs less than `enough`.
    """
    if any(len(costs) == 0 for _, costs in offers):
        return None
    structure = tree(graph)
    if structure is None:
        if (ends := _ends(graph)) is not None:
            return _by_ends(graph, offers, slo_s, at_most, tolerance, enough, ends)
        return by_branching(graph, offers, slo_s, min(at_most, enough), tolerance)
    free = Prices((0.0,) * len(offers), 0.0, ())
    return _Search.of(offers, slo_s, prices or free, at_most, tolerance).cheapest(structure)


@dataclass(frozen=True, slots=True)
class _Front:
    """Options of a part of the DAG, fastest first and each cheaper than the one before.

    `per_s` is the part's price of latency and `least` the least of cost + price * latency. Of a
    module, `left` is the index of its option; of two parts, `left` and `right` are indices into
    theirs.
    """

    latencies_s: Floats
    costs: Floats
    least: float
    per_s: float
    left: Index
    right: Index
    parts: tuple[_Front, _Front] | None = None
    module: int = -1


@dataclass(frozen=True, slots=True)
class _Search:
    """`surplus`: by how much a combination within the asked cost can exceed the sum of leasts.

    With a tolerance, options that cost nearly the same are taken for one.
    """

    offers: Sequence[Offers]
    slo_s: float
    per_s: tuple[float, ...]
    surplus: float
    tolerance: float

    @classmethod
    def of(
        cls,
        offers: Sequence[Offers],
        slo_s: float,
        prices: Prices,
        at_most: float,
        tolerance: float,
    ) -> _Search:
        leasts = sum(
            float(np.min(costs + per_s * latencies_s))
            for (latencies_s, costs), per_s in zip(offers, prices.per_s, strict=True)
        )
        surplus = at_most + prices.total_per_s * slo_s - leasts
        surplus += 1e-9 * (abs(surplus) + abs(leasts))
        return cls(offers, slo_s, prices.per_s, surplus, tolerance)

    def cheapest(self, structure: Tree) -> Composed | None:
        front = self._front(structure, root=True)
        if not len(front.costs):
            return None
        at = int(np.argmin(front.costs))
        chosen = [0] * len(self.offers)
        _trace(front, at, chosen)
        return Composed(tuple(chosen), float(front.costs[at]))

    def _front(self, part: Tree, *, root: bool = False) -> _Front:
        if isinstance(part, int):
            return self._of_module(part)
        fronts = [self._front(each) for each in part.parts]
        join = self._series if isinstance(part, Series) else self._parallel
        # The two smallest first: it keeps what is multiplied small.
        while len(fronts) > 2:
            fronts.sort(key=lambda front: len(front.costs))
            fronts[:2] = [join(fronts[0], fronts[1])]
        if root and isinstance(part, Series):
            return self._last(*fronts)
        return join(*fronts)

    def _of_module(self, module: int) -> _Front:
        latencies_s, costs = self.offers[module]
        per_s = self.per_s[module]
        least = float(np.min(costs + per_s * latencies_s))
        index = np.arange(len(costs), dtype=np.intp)
        return self._pruned(_Front(latencies_s, costs, least, per_s, index, index, module=module))

    def _series(self, a: _Front, b: _Front) -> _Front:
        # Prices are a flow through the DAG, so they are the same along series, rounding aside.
        per_s, least = min(a.per_s, b.per_s), a.least + b.least
        paid_a = a.costs + per_s * a.latencies_s - a.least
        paid_b = b.costs + per_s * b.latencies_s - b.least
        found: list[tuple[Index, Index]] = []
        rows = max(1, _PAIRS_AT_ONCE // max(1, len(b.costs)))
        for first in range(0, len(a.costs), rows):
            of_a = slice(first, first + rows)
            near = paid_a[of_a, None] + paid_b[None, :] <= self.surplus
            near &= a.latencies_s[of_a, None] + b.latencies_s[None, :] <= self.slo_s + SAME_S
            left, right = np.nonzero(near)
            found.append((left + first, right))
        left = np.concatenate([pair[0] for pair in found] or [np.zeros(0, dtype=np.intp)])
        right = np.concatenate([pair[1] for pair in found] or [np.zeros(0, dtype=np.intp)])
        latencies_s = a.latencies_s[left] + b.latencies_s[right]
        costs = a.costs[left] + b.costs[right]
        return self._pruned(_Front(latencies_s, costs, least, per_s, left, right, (a, b)))

    def _last(self, a: _Front, b: _Front) -> _Front:
        """Series at the root: only the cheapest partner of every option matters."""
        right = np.searchsorted(b.latencies_s, self.slo_s + SAME_S - a.latencies_s, "right") - 1
        left = np.flatnonzero(right >= 0)
        right = right[left]
        latencies_s = a.latencies_s[left] + b.latencies_s[right]
        costs = a.costs[left] + b.costs[right]
        return _Front(latencies_s, costs, a.least + b.least, 0.0, left, right, (a, b))

    def _parallel(self, a: _Front, b: _Front) -> _Front:
        latencies_s = np.union1d(a.latencies_s, b.latencies_s)
        left = np.searchsorted(a.latencies_s, latencies_s, side="right") - 1
        right = np.searchsorted(b.latencies_s, latencies_s, side="right") - 1
        both = (left >= 0) & (right >= 0)
        latencies_s, left, right = latencies_s[both], left[both], right[both]
        costs = a.costs[left] + b.costs[right]
        per_s, least = a.per_s + b.per_s, a.least + b.least
        return self._pruned(_Front(latencies_s, costs, least, per_s, left, right, (a, b)))

    def _pruned(self, front: _Front) -> _Front:
        paid = front.costs + front.per_s * front.latencies_s - front.least
        keep = (front.latencies_s <= self.slo_s + SAME_S) & (paid <= self.surplus)
        index = np.flatnonzero(keep)
        order = index[np.lexsort((front.costs[index], front.latencies_s[index]))]
        costs = front.costs[order]
        cheaper = costs < np.minimum.accumulate(np.concatenate(([inf], costs)))[:-1]
        order, costs = order[cheaper], costs[cheaper]
        latencies_s = front.latencies_s[order]
        if self.tolerance and len(order) > _MANY:
            # A group takes the least latency and the least cost of its options, never a real
            # one's loss: bounds stay bounds. The option that stands for it is the fastest.
            grain = max(self.tolerance / (2 * len(self.offers)), (costs[0] - costs[-1]) / _MOST)
            group = np.floor((costs[0] - costs) / grain)
            first = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
            last = np.append(first[1:], len(order)) - 1
            order, costs, latencies_s = order[first], costs[last], latencies_s[first]
        return _Front(
            latencies_s,
            costs,
            front.least,
            front.per_s,
            front.left[order],
            front.right[order],
            front.parts,
            front.module,
        )


def _trace(front: _Front, at: int, chosen: list[int]) -> None:
    """Write the options that made up `front`'s option `at` into `chosen`."""
    if front.parts is None:
        chosen[front.module] = int(front.left[at])
        return
    _trace(front.parts[0], int(front.left[at]), chosen)
    _trace(front.parts[1], int(front.right[at]), chosen)


def _ends(graph: Graph) -> tuple[int, int] | None:
    """A module at one end of the DAG whose only neighbour is at the other end: both, it last."""
    for module, (above, below) in enumerate(zip(graph.parents, graph.children, strict=True)):
        if len(above) == 1 and not below and not graph.parents[above[0]]:
            return above[0], module
        if len(below) == 1 and not above and not graph.children[below[0]]:
            return below[0], module
    return None


def _by_ends(
    graph: Graph,
    offers: Sequence[Offers],
    slo_s: float,
    at_most: float,
    tolerance: float,
    enough: float,
    ends: tuple[int, int],
) -> Composed | None:
    """Without the second of `ends`, which has what the first leaves of the objective."""
    stays, goes = ends
    (latencies_s, costs), kept = pareto(*offers[goes])
    own_s, own = offers[stays]
    at = np.searchsorted(latencies_s, slo_s + SAME_S - own_s, side="right") - 1
    possible = np.flatnonzero(at >= 0)
    at = at[possible]
    fewer = list(offers)
    fewer[stays] = (own_s[possible], own[possible] + costs[at])
    del fewer[goes]
    found = compose(
        _without(graph, goes), fewer, slo_s, at_most=at_most, tolerance=tolerance, enough=enough
    )
    if found is None:
        return None
    chosen = list(found.chosen)
    chosen.insert(goes, 0)
    picked = chosen[stays]
    chosen[stays], chosen[goes] = int(possible[picked]), int(kept[at[picked]])
    return replace(found, chosen=tuple(chosen))


def _without(graph: Graph, module: int) -> Graph:
    """The graph with one module less, those after it renumbered."""
    return Graph.of(
        [
            tuple(parent - (parent > module) for parent in above if parent != module)
            for i, above in enumerate(graph.parents)
            if i != module
        ]
    )
