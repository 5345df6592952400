"""A module's options by latency and cost: those worth having, and the hull that blends of them use.

`Prices` say what a second of latency costs: whatever keeps the objective costs at least sum over
modules of (cost + price * latency) - total price * objective; where a part alone makes that exceed
a cost that is known to be possible, it is left out without losing the minimum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from paceline.planner.frontier import Floats

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


def pareto(latencies_s: Floats, costs: Floats) -> tuple[Offers, Index]:
    """The options that are each cheaper than all faster ones, fastest first, and their indices."""
    order = np.lexsort((costs, latencies_s))
    ordered = costs[order]
    order = order[ordered < np.minimum.accumulate(np.concatenate(([inf], ordered)))[:-1]]
    return (latencies_s[order], costs[order]), order


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
