"""What to evict: the least loss for the room it makes, or (a baseline) what was used longest ago.

The loss of a model is what its absence costs per second: uses per second, times the seconds until
it is back, times the weight of its priority. Whoever comes back needs another's room first: a
reload takes an unload and a load. Uses are counted with exponential decay, so that a shift of the
traffic is seen within a minute and a burst is not taken for a rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

RATE_MEMORY_S = 30.0
"""The rate forgets what is older than about this."""

Eviction = Literal["cost", "lru"]


@dataclass(slots=True)
class Rate:
    """Events per second, exponentially decayed. `per_s` as of `at_s`."""

    per_s: float = 0.0
    at_s: float = 0.0

    def count(self, now_s: float) -> None:
        self.per_s = self.at(now_s) + 1.0 / RATE_MEMORY_S
        self.at_s = now_s

    def at(self, now_s: float) -> float:
        """The rate now.

        >>> rate = Rate(4.0, 0.0)
        >>> round(rate.at(30.0), 3)
        1.472
        """
        return self.per_s * exp(-max(0.0, now_s - self.at_s) / RATE_MEMORY_S)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may go. `reload_s`: until it would be back (0: another machine has it). `soon`:
    an accepted request will want it later on its way.
    """

    model: str
    rate_rps: float
    reload_s: float
    weight: float
    size_bytes: int
    used_s: float
    soon: bool = False

    @property
    def loss(self) -> float:
        """What its absence costs, per second."""
        return self.rate_rps * self.reload_s * self.weight

    def rank(self, eviction: Eviction) -> tuple[bool, float, float, str]:
        """The lowest goes first."""
        if eviction == "lru":
            return (False, self.used_s, 0.0, self.model)
        return (self.soon, self.loss / max(1, self.size_bytes), self.used_s, self.model)


def weight(priority: float) -> float:
    """What a second of waiting at that priority counts (0 is the most urgent).

    >>> weight(0), weight(1)
    (1.0, 0.5)
    """
    return 1.0 / (1.0 + max(0.0, priority))


def choose(
    candidates: Sequence[Candidate],
    missing_bytes: float,
    freed_bytes: Callable[[Sequence[str]], int],
    eviction: Eviction = "cost",
) -> list[str] | None:
    """The models that make `missing_bytes` of room; None when all together would not.

    In order of rank, then without those that a later one made unnecessary.
    """
    chosen: list[str] = []
    for candidate in sorted(candidates, key=lambda c: c.rank(eviction)):
        if freed_bytes(chosen) >= missing_bytes:
            break
        chosen.append(candidate.model)
    if freed_bytes(chosen) < missing_bytes:
        return None
    for model in list(chosen):
        others = [other for other in chosen if other != model]
        if freed_bytes(others) >= missing_bytes:
            chosen = others
    return chosen
