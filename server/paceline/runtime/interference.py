"""How much longer batches take on a machine while a model is being loaded there, and how much
longer those that run may take.

For each machine, model and size of batch (in powers of two) the mean duration without loads, and
the mean of what each load under way added to it, exponentially weighted. The factor of a machine
is the largest of its models'.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf

WEIGHT = 0.1
LEAST_BATCHES = 8
"""Batches seen in both states before a ratio is believed."""


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
        self._calm: dict[tuple[str, str, int], _Mean] = {}
        self._added: dict[tuple[str, str, int], _Mean] = {}
        self._factors: dict[str, dict[tuple[str, int], float]] = {}

    def count(self, machine: str, model: str, rows: int, took_s: float, loading: int) -> None:
        """A batch took that long while so many loads were under way."""
        size = rows.bit_length()
        calm = self._calm.setdefault((machine, model, size), _Mean())
        if not loading:
            calm.count(took_s)
            return
        if calm.batches < LEAST_BATCHES:
            return
        added = self._added.setdefault((machine, model, size), _Mean())
        added.count((took_s - calm.value_s) / loading)
        if added.batches >= LEAST_BATCHES:
            factor = max(1.0, 1.0 + added.value_s / calm.value_s)
            self._factors.setdefault(machine, {})[model, size] = factor

    def factor(self, machine: str) -> float:
        """At least 1; 1 while nothing is known."""
        return max(self._factors.get(machine, {}).values(), default=1.0)


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
