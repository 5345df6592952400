"""The linear relaxation of composing a chain: options blended, and what a second of latency costs.

Whatever keeps the objective costs at least sum over modules of (cost + price * latency) - total
price * objective; where a part alone makes that exceed a cost that is known to be possible, it is
left out without losing the minimum.
"""

from __future__ import annotations

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
    hulls = [_lower_hull(*offer) for offer in offers]
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


def _lower_hull(latencies_s: Floats, costs: Floats) -> Offers:
    """The corners of the convex hull from below: all that a blend can use."""
    order = np.lexsort((costs, latencies_s))
    hull: list[tuple[float, float]] = []
    for x, y in zip(latencies_s[order].tolist(), costs[order].tolist(), strict=True):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return np.array([x for x, _ in hull]), np.array([y for _, y in hull])


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
