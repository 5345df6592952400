"""How many requests it takes to show that chains attain their targets, and how many may miss.

Requests that miss come together: where one waits, the next do. So a run counts as fewer requests
than it has, the fewer the more its misses clump, and lasts for many objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from random import Random

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.planner.problem import PlannedChain
from paceline.sim.headroom import Verification
from paceline.sim.results import ChainResult, SimResult, wilson
from paceline.sim.workload import MOST_REQUESTS

WIDE = 3.0
"""Runs that miss up to so many times what they may tell how misses clump near the target."""
LEAST_OBJECTIVES = 30.0
"""A confirmation lasts so many times the longest objective: for about one, a full queue makes every
request miss, so that thousands of requests that come meanwhile are no more than one sample."""


class Evidence:
    """Of chains that are verified together, with the probability `sure` that a plan which
    passes attains its targets.

    Raises ConfigError where so few requests as are asked for could not show a target.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        demands: Sequence[PlannedChain],
        how: Verification,
        sure: float,
    ) -> None:
        self._chains = chains
        self._demands = demands
        self._how = how
        self.sure = sure
        self.judged = [chain for chain in chains if how.arrivals.judged(chain)]
        self._requests = max((how.needed(c.attainment) for c in self.judged), default=0)
        self._clumping = dict.fromkeys((chain.name for chain in chains), 1.0)
        """How many misses come together by chain, as far as seen: a run with few cannot tell."""

    def saw(self, result: SimResult) -> None:
        """A run near the targets, which tells how misses clump."""
        for chain in self.judged:
            own = result.chain(chain.name)
            if own.attainment >= 1.0 - WIDE * (1.0 - chain.attainment):
                self._clumping[chain.name] = max(self._clumping[chain.name], own.clumping)

    def instants(
        self, salt: str, sure: float, part: int = 1
    ) -> tuple[dict[str, Sequence[float]], int]:
        """Arrivals for a confirmation that sure, or one in so many of them, and a seed for the rest
        of the run. The chain of least rate gets so many, the others come for as long.
        """
        seed = Random(f"{self._how.seed} {salt}").randrange(1 << 30)
        rates = {demand.name: demand.rate_rps for demand in self._demands}
        span_s = self._confirming(sure) / part / min(rates.values())
        total = round(span_s * sum(rates.values()))
        if self._how.arrivals.trace is None and total > MOST_REQUESTS:
            raise ConfigError(
                f"verifying these chains takes {total} requests at a time, more than "
                f"{MOST_REQUESTS}; lower it, verify fewer together, or use --no-verify",
                key="attainment",
            )
        found = {
            chain.name: self._how.arrivals.instants(
                chain, rate_rps, round(span_s * rate_rps), Random(f"{seed} {chain.name}")
            )
            for chain in self._chains
            if (rate_rps := rates[chain.name])
        }
        return found, seed

    def allowed(self, instants: Mapping[str, Sequence[float]], sure: float) -> dict[str, int]:
        """By chain the most of these requests that may miss."""
        return {c.name: self._allowed(c, len(instants[c.name]), sure) for c in self.judged}

    def _confirming(self, sure: float) -> int:
        """Requests, of the chain with the fewest, for a confirmation that sure: more than asked for
        where it would not last long enough, or so few could not show it: twice the least, so that
        some may miss.
        """
        strict = replace(self._how, confidence=sure)
        needed = (2 * strict.least(chain.attainment) for chain in self.judged)
        span_s = LEAST_OBJECTIVES * max(chain.slo_s for chain in self.judged)
        lasting = ceil(span_s * min(demand.rate_rps for demand in self._demands))
        return max(self._requests, lasting, *needed)

    def _allowed(self, chain: Chain, requests: int, sure: float) -> int:
        """The share with which the lower bound of a whole confirmation reaches the target."""
        traced = self._how.arrivals.trace is not None
        total = requests if traced else self._confirming(sure)
        if wilson(total, total, sure)[0] < chain.attainment:
            # Each confirmation that fails makes the next one stricter (`spent`).
            raise ConfigError(
                f"{total} requests cannot show {chain.attainment:.6g} with "
                f"{sure:.4g} confidence; take a longer trace",
                key="--arrivals",
            )
        worth = total / self._clumped(chain, total, sure)

        def shown(misses: int) -> bool:
            share = 1.0 - misses / total
            return wilson(share * worth, worth, sure)[0] >= chain.attainment

        low, high = 0, total
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if shown(middle) else (low, middle)
        return low * requests // total

    def at_least(self, chain: Chain, own: ChainResult, sure: float) -> float:
        """The lower bound of a chain's attainment, misses clumping at least as in the search."""
        clumping = max(own.clumping, self._clumped(chain, own.requests, sure))
        return replace(own, clumping=clumping).at_least(sure)

    def _clumped(self, chain: Chain, requests: int, sure: float) -> float:
        """As seen in the search, but so that these requests can show the target."""
        most = requests / (2 * replace(self._how, confidence=sure).least(chain.attainment))
        return max(1.0, min(self._clumping[chain.name], most))
