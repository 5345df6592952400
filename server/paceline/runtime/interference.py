"""How much longer batches take on a machine while models are being loaded there, and how much
longer those that run may take.

For each machine, number of loads under way, model and size of batch (in powers of two): what the
95th percentile of the newest batches took, as a multiple of the mean without loads; a mean would
hide what makes requests late. Loads don't simply add up (one of two cores is free, the second load
takes it), so each number of loads is seen for itself. A machine's factor is its worst model's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import exp, inf

from paceline.core.quantities import percentile

WEIGHT = 0.1
LEAST_BATCHES = 8
"""Batches seen in both states before a ratio is believed."""

KEPT = 64
"""Ratios."""

SHARE = 0.95
"""The percentile of the ratios that counts."""

FORGOTTEN_S = 600.0
"""What was seen that long ago is not believed any more: what is held back is tried again."""

_Kind = tuple[str, int]
"""Model and size of batch."""


@dataclass(slots=True)
class _Mean:
    value_s: float = 0.0
    batches: int = 0

    def count(self, took_s: float) -> None:
        self.batches += 1
        self.value_s += max(WEIGHT, 1.0 / self.batches) * (took_s - self.value_s)


class Interference:
    """See the module docstring."""

    def __init__(self) -> None:
        self._calm: dict[tuple[str, _Kind], _Mean] = {}
        self._seen: dict[tuple[str, int], dict[_Kind, deque[tuple[float, float]]]] = {}

    def count(
        self, machine: str, model: str, rows: int, took_s: float, loading: int, now_s: float
    ) -> None:
        """A batch took that long while so many loads were under way."""
        kind = (model, rows.bit_length())
        calm = self._calm.setdefault((machine, kind), _Mean())
        if not loading:
            calm.count(took_s)
            return
        if calm.batches < LEAST_BATCHES or calm.value_s <= 0.0:
            return
        kinds = self._seen.setdefault((machine, loading), {})
        kinds.setdefault(kind, deque(maxlen=KEPT)).append((now_s, took_s / calm.value_s))

    def factors(self, machine: str, most: int, now_s: float) -> tuple[float, ...]:
        """How many times as long batches take under 1, 2, ... `most` loads: at least 1, never
        falling. What was not seen is taken to grow in proportion to the loads.
        """
        known = {n: f for n in range(1, most + 1) if (f := self._known(machine, n, now_s))}
        found: list[float] = []
        for n in range(1, most + 1):
            near = min(known, key=lambda k: (abs(k - n), k), default=0)
            factor = 1.0 + (known[near] - 1.0) * n / near if near else 1.0
            found.append(max(factor, *found, 1.0))
        return tuple(found)

    def _known(self, machine: str, loading: int, now_s: float) -> float:
        """0 while nothing is."""
        most = 0.0
        for seen in self._seen.get((machine, loading), {}).values():
            ratios = [ratio for at_s, ratio in seen if now_s - at_s < FORGOTTEN_S]
            if len(ratios) >= LEAST_BATCHES:
                most = max(most, percentile(ratios, SHARE))
        return most


SLACK_MEMORY_S = 1.0
"""A load outlasts the batches that run when it begins: what counts is what ran of late."""


class Slack:
    """By what factor running requests can take longer and still be in time, over the last second:
    the harmonic mean, in which those that can bear least count most.
    """

    def __init__(self) -> None:
        self._tightness = 0.0
        self._at_s = -inf

    def count(self, bearable: float, now_s: float) -> None:
        """What those that run now can bear."""
        if bearable == inf:
            return
        weight = 1.0 - exp(-(now_s - self._at_s) / SLACK_MEMORY_S)
        self._tightness += max(weight, 0.05) * (1.0 / max(bearable, 1.0) - self._tightness)
        self._at_s = now_s

    def bearable(self, now_s: float) -> float:
        """At least 1; infinite where nothing with a deadline ran of late."""
        recent = now_s - self._at_s <= 2.0 * SLACK_MEMORY_S
        return 1.0 / self._tightness if recent and self._tightness > 0.0 else inf
