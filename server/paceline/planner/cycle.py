"""What a shared machine is given to do, and duty cycles that it may do it in (Nexus 4.1).

Invariant: in a duty cycle D one batch of every load runs: the batches' durations add up to D at
most, each batch holds what arrives in a cycle, and a request waits until its batch is collected and
executed: D + d(b) <= budget, for each. Where other machines serve the module too, its batches are
collected from one queue at the module's whole rate T, of which the load is r: D * r / T + d(b) <=
budget (pooled, algorithms 1.4).

Nexus's two worked cases: A (64 requests/s within 200 ms) has a duty cycle of 125 ms for its batch
of 8. B's 50 ms fit in beside A's 75 ms, C's 60 ms do not:

>>> def load(name, rate_rps, budget_s, b, d):
...     durations_s = [d * (b + size) / (2 * b) for size in range(1, b + 1)]
...     return Load("nexus", name, name, rate_rps, rate_rps, budget_s, {"gpu": durations_s})
>>> a = load("A", 64.0, 0.2, 8, 0.075)
>>> b, c = load("B", 32.0, 0.25, 4, 0.05), load("C", 32.0, 0.25, 4, 0.06)
>>> together([a, b], "gpu")
Cycle(duration_s=0.125, batch_sizes=(8, 4), busy=1.0)
>>> together([a, c], "gpu") is None
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

SLACK = 1e-9
"""Rounding: seconds for times, relative for counts."""

SIZES = 8
"""So many batch sizes of a load are tried where batches go by urgency."""


@dataclass(frozen=True, slots=True)
class Size:
    """A batch size, how long a batch takes, and the time within which it must be done once full."""

    batch_size: int
    duration_s: float
    deadline_s: float

    @property
    def row_s(self) -> float:
        return self.duration_s / self.batch_size


@dataclass(frozen=True, slots=True)
class Load:
    """`rate_rps` of a module's `total_rps`. `durations_s` by hardware, for batches of 1, 2, ...

    `extra` says that the module has full machines elsewhere on some hardware, of which one more may
    serve this load alone, collecting from the module's whole rate. `jitter_s` is how long a batch
    may have to wait for another of its module's to fill before its own collection begins,
    `part` that other shared machines serve the module too.
    """

    chain: str
    module: str
    model: str
    rate_rps: float
    total_rps: float
    budget_s: float
    durations_s: Mapping[str, Sequence[float]]
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    extra: str = ""
    jitter_s: float = 0.0
    part: bool = False

    def longest_cycle_s(self, hardware: str) -> float:
        """The longest duty cycle within the budget; 0 if there is none."""
        longer = self.total_rps / self.rate_rps
        best_s = 0.0
        for size, duration_s in enumerate(self.durations_s[hardware], 1):
            within_s = (self.budget_s - duration_s) * longer
            if within_s <= best_s:
                break
            best_s = min(size / self.rate_rps, within_s)
        return best_s

    def worst_s(self, cycle_s: float, duration_s: float) -> float:
        """Collection and execution."""
        return cycle_s * self.rate_rps / self.total_rps + duration_s

    def alone(self, hardware: str) -> int:
        """The batch size with which a machine of its own serves it; 0 if none does.

        All of the module's machines take batches from one queue, which fills at its whole rate.
        """
        for size, duration_s in enumerate(self.durations_s.get(hardware, ()), 1):
            collection_s = 0.0 if size == 1 else size / self.total_rps
            if duration_s + collection_s > self.budget_s + SLACK:
                return 0
            if size >= self.rate_rps * duration_s * (1 - SLACK):
                return size
        return 0

    def batch_size(self, cycle_s: float) -> int:
        """What arrives within a cycle, in whole requests."""
        return max(1, ceil(self.rate_rps * cycle_s - 1e-6))

    def sizes(self, hardware: str) -> tuple[Size, ...]:
        """Batch sizes that may wait once full, the least work per request first."""
        found: list[Size] = []
        for size, duration_s in enumerate(self.durations_s.get(hardware, ()), 1):
            deadline_s = self.budget_s - (0.0 if size == 1 else size / self.total_rps)
            if deadline_s < duration_s:
                break
            if not found or duration_s / size < found[-1].row_s * (1 - SLACK):
                found.append(Size(size, duration_s, deadline_s))
        found.reverse()
        if len(found) <= SIZES:
            return tuple(found)
        step = (len(found) - 1) / (SIZES - 1)
        return tuple(found[round(step * at)] for at in range(SIZES))


@dataclass(frozen=True, slots=True)
class Cycle:
    """A duty cycle, the batch of every load in it, and the share of it that is busy."""

    duration_s: float
    batch_sizes: tuple[int, ...]
    busy: float


def together(
    loads: Sequence[Load], hardware: str, longest_s: Sequence[float] | None = None
) -> Cycle | None:
    """The least busy duty cycle in which one machine serves `loads`, or None."""
    cycles_s = longest_s or [load.longest_cycle_s(hardware) for load in loads]
    most_s = min(cycles_s)
    if most_s <= 0:
        return None
    best: Cycle | None = None
    # Batches are whole: the cycle may be cut to where one of the loads has no request to spare.
    candidates = {most_s}
    for load in loads:
        if (count := floor(load.rate_rps * most_s + 1e-6)) >= 1:
            candidates.add(min(most_s, count / load.rate_rps))
    for cycle_s in sorted(candidates, reverse=True):
        found = in_cycle(loads, hardware, cycle_s)
        if found and (best is None or found.busy < best.busy - SLACK):
            best = found
    return best


def in_cycle(loads: Sequence[Load], hardware: str, cycle_s: float) -> Cycle | None:
    """The duty cycle of that length, or None if it is too short for all or too long for one."""
    busy_s = 0.0
    sizes: list[int] = []
    for load in loads:
        size = load.batch_size(cycle_s)
        durations_s = load.durations_s[hardware]
        if size > len(durations_s):
            return None
        duration_s = durations_s[size - 1]
        busy_s += duration_s
        sizes.append(size)
        if (
            busy_s > cycle_s * (1 + SLACK)
            or load.worst_s(cycle_s, duration_s) > load.budget_s + SLACK
        ):
            return None
    return Cycle(cycle_s, tuple(sizes), busy_s / cycle_s)
