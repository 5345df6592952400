"""Summaries of measured values that more than one package needs."""

from __future__ import annotations

from collections.abc import Collection
from math import ceil


def percentile(values: Collection[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank).

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    return sorted(values)[max(1, ceil(share * len(values))) - 1]
