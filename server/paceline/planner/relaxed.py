"""The linear relaxation of composing a chain: options blended, and what a second of latency costs.

Whatever keeps the objective costs at least sum over modules of (cost + price * latency) - total
price * objective; where a part alone makes that exceed a cost that is known to be possible, it is
left out without losing the minimum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_array

from paceline.planner.frontier import Floats
from paceline.planner.paths import Graph

Index = npt.NDArray[np.intp]

Offers = tuple[Floats, Floats]
"""Latencies and costs of one module's options."""

Hull = tuple[Sequence[float], Sequence[float]]
"""The same of those that a blend can use; latencies rise, costs fall ever more slowly."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a second of latency costs for each module, and the latencies of the relaxed optimum.

    For any latencies that keep the objective, sum(per_s * latency) <= total_per_s * objective.
    """

    per_s: tuple[float, ...]
    total_per_s: float
    latencies_s: tuple[float, ...]


def latency_prices(graph: Graph, offers: Sequence[Offers], slo_s: float) -> Prices | None:
    """Solve the linear relaxation, in which options may be blended; None if infeasible."""
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


def pareto(latencies_s: Floats, costs: Floats) -> tuple[Offers, Index]:
    """The options that are each cheaper than all faster ones, fastest first, and their indices."""
    order = np.lexsort((costs, latencies_s))
    ordered = costs[order]
    order = order[ordered < np.minimum.accumulate(np.concatenate(([inf], ordered)))[:-1]]
    return (latencies_s[order], costs[order]), order


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


def lower_hull(latencies_s: Floats, costs: Floats) -> Hull:
    """The corners of the convex hull from below: all that a blend can use."""
    order = np.lexsort((costs, latencies_s))
    hull_s: list[float] = []
    hull: list[float] = []
    for x, y in zip(latencies_s[order].tolist(), costs[order].tolist(), strict=True):
        if hull and y >= hull[-1]:
            continue
        # A corner that is not below the line from the one before it to the new one is none.
        while len(hull) > 1 and (
            (hull[-1] - hull[-2]) * (x - hull_s[-2]) >= (y - hull[-2]) * (hull_s[-1] - hull_s[-2])
        ):
            hull_s.pop()
            hull.pop()
        hull_s.append(x)
        hull.append(y)
    return hull_s, hull


def narrowed(hull: Hull, latencies_s: Floats, costs: Floats) -> Hull:
    """The hull of some of its options, fastest first and each cheaper than the one before: those
    within a range of latencies, or not above the hull by more than some amount at a price.

    Corners that are left are next to each other, so nothing between them changes.
    """
    corners_s, corners = hull
    first = bisect_left(corners_s, float(latencies_s[0]))
    last = bisect_right(corners_s, float(latencies_s[-1]))
    if first == last:
        return lower_hull(latencies_s, costs)
    before = int(np.searchsorted(latencies_s, corners_s[first]))
    after = int(np.searchsorted(latencies_s, corners_s[last - 1], side="right"))
    return lower_hull(
        np.concatenate((latencies_s[:before], corners_s[first:last], latencies_s[after:])),
        np.concatenate((costs[:before], corners[first:last], costs[after:])),
    )
