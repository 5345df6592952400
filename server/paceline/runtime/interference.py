"""How much longer batches take on a machine while a model is being loaded there.

For each machine, model and size of batch (in powers of two) the mean duration without loads, and
the mean of what each load under way added to it, exponentially weighted. The factor of a machine
is the largest of its models'.
"""

from __future__ import annotations

from dataclasses import dataclass

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
