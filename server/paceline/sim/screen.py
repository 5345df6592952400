"""When a simulated run may stop because its verdict is known, and how sure a verdict has to be.

Screening only guides the search, so it decides by Wald's sequential test; what it lets pass is
confirmed. A confirmation stops early only where it fails: its verdict is that of all its requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

from paceline.sim.results import SimResult
from paceline.sim.tally import Tally

ERROR = 0.1
"""The probability with which screening mistakes half the misses allowed for all, or those for half,
as far as requests miss independently."""
CLUMPED = 2.0
"""Misses come together: a verdict takes so many times the evidence that independent ones need."""


def spent(confidence: float, attempt: int) -> float:
    """How sure the `attempt`-th confirmation (from 0) has to be, so that with any number of them
    the probability that one of them errs stays that of a single one.

    >>> [round(spent(0.95, attempt), 5) for attempt in range(3)]
    [0.9696, 0.9924, 0.99662]
    """
    return 1.0 - (1.0 - confidence) * 6.0 / (pi * (attempt + 1)) ** 2


class Screen:
    """Asked before each request whether enough is known; `missed` is the verdict."""

    def __init__(
        self,
        targets: Mapping[str, float],
        most: Mapping[str, int],
        *,
        all_: bool,
        least: Mapping[str, int] | None = None,
    ) -> None:
        """`targets` and the most misses of the whole run by chain; `all_`: every chain that
        misses is wanted, not only whether one does. None passes before `least` requests.
        """
        self._most = most
        self._all = all_
        self._least = least or {}
        self._lines = {name: _line(target) for name, target in targets.items()}
        self._verdicts: dict[str, bool] = {}

    def __call__(self, tally: Tally) -> bool:
        for name, most in self._most.items():
            if name in self._verdicts:
                continue
            slope, start = self._lines[name]
            ended, missed = tally.ended[name], tally.missed[name]
            if missed > most or missed > slope * ended + CLUMPED * start:
                self._verdicts[name] = False
            elif missed <= slope * ended - CLUMPED * start and ended >= self._least.get(name, 0):
                self._verdicts[name] = True
        if not self._all and False in self._verdicts.values():
            return True
        return len(self._verdicts) == len(self._most)

    def missed(self, result: SimResult) -> set[str]:
        """Chains that miss: as decided, or else as the run ended."""
        found = set()
        for name, most in self._most.items():
            own = result.chain(name)
            if not self._verdicts.get(name, own.requests - own.met <= most):
                found.add(name)
        return found


class Refuted:
    """Asked before each request whether every chain has missed more than it may."""

    def __init__(self, most: Mapping[str, int]) -> None:
        self._most = most
        self.chains: set[str] = set()

    def __call__(self, tally: Tally) -> bool:
        self.chains |= {name for name, most in self._most.items() if tally.missed[name] > most}
        return len(self.chains) == len(self._most)


def _line(target: float) -> tuple[float, float]:
    """Wald's test between the misses a target allows and half of them: misses per request between
    the two lines, and how far each is from the line through the origin.
    """
    bad = 1.0 - target
    good = bad / 2.0
    weight = log(bad * (1.0 - good) / (good * (1.0 - bad)))
    return log((1.0 - good) / (1.0 - bad)) / weight, log((1.0 - ERROR) / ERROR) / weight
