"""How models that share a budget divide it: by urgency, by load, and by what each gains. Pure.

Every model claims a floor, without which it cannot run, and says how its latency falls with more
memory. Memory goes where it saves most: latency saved per byte x runs per second x weight, along
the lower convex hull of each curve, which makes taking the best next step optimal. Loads count by
powers of two, so that a division changes when a load has shifted and not with every request.
SwapNet's multi-DNN scheduling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[int, float]

_IDLE_RPS = 2.0**-10
"""An idle model's load: it gets what nobody else gains from."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`curve` has (bytes, seconds a run), bytes rising from the floor to all it could use."""

    curve: tuple[Point, ...]
    rate_rps: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        assert self.curve and all(a[0] < b[0] for a, b in pairwise(self.curve)), self

    @property
    def floor_bytes(self) -> int:
        return self.curve[0][0]

    @property
    def urgency(self) -> float:
        """What a second saved per run is worth."""
        rate = max(self.rate_rps, _IDLE_RPS)
        return float(2.0 ** round(math.log2(rate)) * self.weight)


def divide(total_bytes: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Bytes for each claim, together at most the total; {} if the floors do not fit.

    Two equal models of which one runs eight times as often; 6 bytes beyond their floors:

    >>> curve = ((2, 1.0), (6, 0.2), (10, 0.1))
    >>> divide(10, {"busy": Claim(curve, 8.0), "quiet": Claim(curve, 1.0)})
    {'busy': 6, 'quiet': 4}

    The first four bytes save 0.8 s, the next only 0.1: they are worth more to the quiet one.
    """
    grants = {name: claims[name].floor_bytes for name in sorted(claims)}
    left = total_bytes - sum(grants.values())
    if left < 0:
        return {}
    steps = []
    for name in grants:
        hull = _hull(claims[name].curve)
        for (start, before_s), (end, after_s) in pairwise(hull):
            gain = (before_s - after_s) / (end - start) * claims[name].urgency
            steps.append((-gain, start, name, end - start))
    for _, _, name, size in sorted(steps):
        take = min(size, left)
        grants[name] += take
        left -= take
    return grants


def _hull(curve: Sequence[Point]) -> list[Point]:
    """Lower convex hull, falling: between its points memory has decreasing returns."""
    hull: list[Point] = []
    for size, seconds in curve:
        # More memory never hurts.
        point = (size, min(seconds, hull[-1][1]) if hull else seconds)
        while len(hull) >= 2 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_down(first: Point, middle: Point, last: Point) -> bool:
    """Whether `middle` lies on or above the line between the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (
        middle[0] - first[0]
    )
