"""What batches really take: durations learned while serving, by model, machine and batch size.

The newest `WINDOW` durations of each are kept; what is made of them is robust: the median does not
move for a stall, the p95 (what a profile holds) only for more than three of them. Invariant: at
most `MOST_LEARNED` combinations are known; the one that was met first is forgotten first, and all
of a machine when it goes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from paceline.core.quantities import percentile

WINDOW = 64
MOST_LEARNED = 4096
LEAST_SEEN = 40
"""Batches with one outlier among them of which it is not the p95, nor two."""


@dataclass(frozen=True, slots=True)
class LearnedDuration:
    """Batches of `batch_size` rows, from launch to answer: what the front and the network add is in
    it, as it is in a profile. `count` of them were seen, the newest at most `WINDOW` are told of.
    """

    model: str
    machine: str
    hardware: str
    batch_size: int
    count: int
    median_s: float
    p95_s: float


@dataclass(slots=True)
class _Seen:
    count: int
    newest_s: deque[float]


class Learned:
    """See the module docstring."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str, int], _Seen] = {}

    def add(self, model: str, machine: str, hardware: str, batch_size: int, took_s: float) -> None:
        """A batch came back in order."""
        key = (model, machine, hardware, batch_size)
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= MOST_LEARNED:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[key] = _Seen(0, deque(maxlen=WINDOW))
        seen.count += 1
        seen.newest_s.append(took_s)

    def forget(self, machine: str) -> None:
        """A machine is gone; one that comes back under its name may be another."""
        for key in [key for key in self._seen if key[1] == machine]:
            del self._seen[key]

    def p95_s(self, model: str, machine: str, hardware: str, batch_size: int) -> float:
        """What 95 of 100 of the newest batches took at most; 0 where few were seen, of which one
        that hung would be the p95.
        """
        seen = self._seen.get((model, machine, hardware, batch_size))
        if seen is None or len(seen.newest_s) < LEAST_SEEN:
            return 0.0
        return percentile(seen.newest_s, 0.95)

    def all(self) -> tuple[LearnedDuration, ...]:
        """Everything known, by model, machine, hardware and batch size."""
        return tuple(
            LearnedDuration(
                *key,
                seen.count,
                percentile(seen.newest_s, 0.5),
                percentile(seen.newest_s, 0.95),
            )
            for key, seen in sorted(self._seen.items())
        )
