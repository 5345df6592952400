"""What a run in virtual time came to: attainment and how sure it is, latencies, queueing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import NormalDist

from paceline.core.quantities import percentile


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module over a run: `batches` by size; times per row, mean or 99th percentile.

    `utilisation` is the share of the machines planned for it that its batches took.
    """

    chain: str
    module: str
    rows: int
    batches: Mapping[int, int]
    queue_s: float
    queue_p99_s: float
    execute_s: float
    utilisation: float

    @property
    def batch_size(self) -> float:
        """Mean rows of a batch."""
        count = sum(self.batches.values())
        return sum(size * n for size, n in self.batches.items()) / count if count else 0.0


@dataclass(frozen=True, slots=True)
class ChainResult:
    """One chain over a run. `missed`: answered too late; `rejected`: refused, or given up."""

    chain: str
    slo_s: float
    requests: int
    met: int
    missed: int
    rejected: int
    latencies_s: Sequence[float] = field(repr=False)
    """Of answered requests, in increasing order."""
    clumping: float = 1.0
    """How many misses come together: the variance of the share of misses between stretches of the
    run, over that of independent misses; at least 1."""

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered within the objective."""
        return self.met / self.requests if self.requests else 1.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the attainment, as if requests missed independently."""
        return wilson(self.met, self.requests, confidence)

    def at_least(self, confidence: float = 0.95) -> float:
        """The lower end of that interval for as many independent requests as these are worth."""
        return wilson(self.met / self.clumping, self.requests / self.clumping, confidence)[0]

    def percentile_s(self, share: float) -> float:
        """A latency that `share` of the answered requests do not exceed; 0 without any."""
        return percentile(self.latencies_s, share) if self.latencies_s else 0.0


@dataclass(frozen=True, slots=True)
class SimResult:
    """A run. `duration_s` is virtual."""

    chains: tuple[ChainResult, ...]
    modules: tuple[ModuleResult, ...]
    duration_s: float
    events: int
    utilisation: float

    def chain(self, name: str) -> ChainResult:
        return next(c for c in self.chains if c.chain == name)

    @property
    def requests(self) -> int:
        return sum(c.requests for c in self.chains)

    @property
    def attainment(self) -> float:
        """The least of its chains."""
        return min((c.attainment for c in self.chains), default=1.0)


def wilson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    >>> [round(bound, 4) for bound in wilson(990, 1000)]
    [0.9817, 0.9946]
    """
    if trials == 0:
        return (0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * sqrt(share * (1.0 - share) / trials + z * z / (4 * trials * trials))
    scale = 1.0 + z * z / trials
    return (max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))
