"""One module's exact frontier: the least cost within any latency budget, batches pooled.

Invariant: no schedule of the module, under any dispatch policy, any mix of hardware and batch
sizes and any number of dummy requests, costs less within a budget than `Frontier.cost` says.

All machines of a module take their batches from one queue (algorithms 1.4), so at a total rate
R = T + dummies every batch of b requests collects in b/R and a configuration is in time if
d + b/R <= L (a batch of one: d <= L). Serving is linear in the rate: of the configurations in
time, the one with the least price per request, p*d/b, takes all of it - mixing cannot help. Hence

    cost(L) = min over configurations of max(T, b / (L - d)) * p * d / b.

More than T is served only where a batch would not fill in time; that is then p * d / (L - d): of
the sizes that do not fill, the one with the least duration. Other dispatch policies collect more
slowly than R, so whatever they can do within L, this can do for no more.

Durations are measured at some sizes; between them they are interpolated. Sizes below the smallest
take as long as that one, and none longer than a larger one: a batch may always be padded.

>>> m3 = [Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8))]
>>> frontier = Frontier.of(m3, 198.0, 0.0)
>>> frontier.at(1.0)
Choice(configuration=Configuration(hardware='gpu', batch_size=32, duration_s=0.8, \
price_per_hour=1.0), total_rps=198.0)
>>> [round(frontier.cost_at(latency_s), 4) for latency_s in (0.09, 0.11, 0.5, 1.0)]
[inf, 10.0, 5.4175, 4.95]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from paceline.core.profile import Configuration

Floats = npt.NDArray[np.float64]

SAME_S = 1e-9
"""Latencies closer than this, in seconds, are the same."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Everything in one configuration; `total_rps` is the module's rate and its dummy requests."""

    configuration: Configuration
    total_rps: float

    @property
    def machines(self) -> float:
        return self.total_rps / self.configuration.throughput_rps

    @property
    def worst_s(self) -> float:
        c = self.configuration
        return c.duration_s + (0.0 if c.batch_size == 1 else c.batch_size / self.total_rps)


@dataclass(frozen=True, slots=True)
class Curve:
    """One hardware's part: what is known of batch size b is at index b - 1.

    `full_s[i]` is the latency, overhead included, from which on batches of i + 1 fill; it rises
    with i. `best[i]` is the index of the cheapest per request of the sizes up to i + 1, and
    `unit[i]` its price per request.
    """

    hardware: str
    price_per_hour: float
    duration_s: Floats
    overhead_s: float
    full_s: Floats
    unit: Floats
    best: npt.NDArray[np.intp]

    @classmethod
    def of(
        cls, configurations: Sequence[Configuration], rate_rps: float, overhead_s: float
    ) -> Curve:
        """Of the configurations measured on one hardware, for a module at `rate_rps`."""
        measured = sorted(configurations, key=lambda c: c.batch_size)
        price_per_hour = measured[0].price_per_hour
        size = np.arange(1.0, measured[-1].batch_size + 1.0)
        between_s = np.interp(
            size, [c.batch_size for c in measured], [c.duration_s for c in measured]
        )
        duration_s = np.minimum.accumulate(between_s[::-1])[::-1]
        collection_s = np.where(size > 1, size / rate_rps, 0.0)
        own = price_per_hour * duration_s / size
        unit = np.minimum.accumulate(own)
        best = np.maximum.accumulate(np.where(own <= unit, np.arange(len(size)), 0))
        return cls(
            measured[0].hardware,
            price_per_hour,
            duration_s,
            overhead_s,
            duration_s + collection_s + overhead_s,
            unit,
            best,
        )

    def configuration(self, batch_size: int) -> Configuration:
        """Any size up to the largest measured, with its interpolated duration."""
        duration_s = float(self.duration_s[batch_size - 1])
        return Configuration(self.hardware, batch_size, duration_s, self.price_per_hour)

    def filled(self, latency_s: Floats) -> npt.NDArray[np.intp]:
        """The largest batch size that fills within each latency."""
        found: npt.NDArray[np.intp] = np.searchsorted(self.full_s, latency_s, side="right")
        return found

    def costs(self, latencies_s: Floats, rate_rps: float) -> tuple[Floats, Floats]:
        """Cost with batches that fill, and with batches of the next size that do not."""
        filled = self.filled(latencies_s)
        full = np.where(filled > 0, self.unit[np.maximum(filled - 1, 0)] * rate_rps, inf)
        after_s = self.duration_s[np.minimum(filled, len(self.full_s) - 1)]
        spare_s = latencies_s - self.overhead_s - after_s
        usable = (filled < len(self.full_s)) & (filled > 0) & (spare_s > 0)
        padded = np.full(len(latencies_s), inf)
        np.divide(self.price_per_hour * after_s, spare_s, out=padded, where=usable)
        return full, padded


@dataclass(frozen=True, slots=True)
class Frontier:
    """See the module docstring. Latencies include the module's overhead."""

    rate_rps: float
    overhead_s: float
    curves: tuple[Curve, ...]

    @classmethod
    def of(
        cls, configurations: Iterable[Configuration], rate_rps: float, overhead_s: float
    ) -> Frontier:
        """The frontier of a module that serves `rate_rps` with these, interpolated."""
        by_hardware: dict[str, list[Configuration]] = {}
        for c in configurations:
            by_hardware.setdefault(c.hardware, []).append(c)
        curves = [Curve.of(each, rate_rps, overhead_s) for _, each in sorted(by_hardware.items())]
        return cls(rate_rps, overhead_s, tuple(curves))

    @property
    def least_s(self) -> float:
        """The least latency at any cost."""
        return float(min(curve.full_s[0] for curve in self.curves))

    def cost(self, latencies_s: Floats) -> Floats:
        """Least cost within each latency; infinite below `least_s`. Never rises."""
        parts = [curve.costs(latencies_s + SAME_S, self.rate_rps) for curve in self.curves]
        least: Floats = np.minimum.reduce([cost for pair in parts for cost in pair])
        return least

    def cost_at(self, latency_s: float) -> float:
        """Least cost within one latency."""
        return float(self.cost(np.array([latency_s]))[0])

    def below(self, latencies_s: Floats) -> Floats:
        """The limit of the cost from below: without what just becomes possible at a latency."""
        return self.cost(latencies_s - 2 * SAME_S)

    def at(self, latency_s: float) -> Choice | None:
        """What costs that little within `latency_s`; ties by hardware's name."""
        found: Choice | None = None
        least = inf
        at = np.array([latency_s + SAME_S])
        for curve in self.curves:
            (full,), (padded,) = curve.costs(at, self.rate_rps)
            if min(full, padded) >= least * (1 - 1e-12):
                continue
            least = min(full, padded)
            filled = int(curve.filled(at)[0])
            if full <= padded:
                best = curve.configuration(int(curve.best[filled - 1]) + 1)
                found = Choice(best, self.rate_rps)
            else:
                c = curve.configuration(filled + 1)
                spare_s = float(at[0]) - self.overhead_s - c.duration_s
                found = Choice(c, max(self.rate_rps, c.batch_size / spare_s))
        return found

    def kinks_s(self, within_s: float) -> Floats:
        """Latencies at which the cost's shape changes, rising, up to `within_s`."""
        parts = [(curve.full_s, curve.duration_s + curve.overhead_s) for curve in self.curves]
        found = np.unique(np.concatenate([kinks for pair in parts for kinks in pair]))
        kept: Floats = found[found <= within_s + SAME_S]
        return kept
