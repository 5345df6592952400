"""Live replanning: counts what comes, and has the controller plan anew when that is worth it.

The decisions are `planner.replan`'s; this reads the clock and the counters once a second. With
several workers nobody replans: each sees a part of the traffic, and what they share is fixed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import time
from typing import Protocol

from paceline.core.chain import Chain
from paceline.core.errors import PacelineError
from paceline.core.plan import Plan
from paceline.core.request import Timeline
from paceline.core.runs import modules_in
from paceline.planner.replan import (
    Cadence,
    Proposal,
    Replanning,
    Traffic,
    TrafficEstimator,
    propose,
    worth,
)

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_KEPT_CHANGES = 32
_SLOWDOWN_WEIGHT = 0.1
"""Of a second's slowdowns: what lasts ten seconds counts, a stall does not."""
STRAGGLES, RECOVERED = 1.5, 1.25
"""A machine counts as less of one from so many times its kind's durations on, until it is below."""
MOVED, SETTLED = STRAGGLES / RECOVERED, 1.1
"""It is planned for anew when it is so many times slower or faster than was planned for, and what
it takes now is within so many times what it took lately."""


class Replannable(Protocol):
    """What is replanned: the controller."""

    @property
    def traffic(self) -> Traffic: ...
    def chains(self) -> tuple[Chain, ...]: ...
    def current_plan(self) -> Plan: ...
    def slowdowns(self) -> Mapping[tuple[str, str], float]: ...
    def stragglers(self) -> Mapping[str, float]: ...
    def machines_up(self) -> frozenset[str]: ...
    async def replan(self, proposal: Proposal, decide: Decide) -> bool: ...
    async def rebalance(self, slow: Mapping[str, float]) -> None: ...


class Decide(Protocol):
    """Whether the second plan is worth leaving the first at that cost of transition."""

    def __call__(self, current: Plan, candidate: Plan, transition_cost: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Change:
    """One replan that was followed; costs per hour, `at_s` since the epoch."""

    at_s: float
    reason: str
    cost_before: float
    cost_after: float


@dataclass(slots=True)
class _Counts:
    estimator: TrafficEstimator
    requests: int = 0
    answered: int = 0
    rows: dict[str, int] = field(default_factory=dict)


class Replanner:
    """See the module docstring."""

    def __init__(self, controller: Replannable, rules: Replanning) -> None:
        self._controller = controller
        self._rules = rules
        self._counts: dict[str, _Counts] = {}
        self._slowdowns: dict[tuple[str, str], float] = {}
        self._behind: dict[str, float] = {}
        """How many times as long as its kind each machine takes, smoothed."""
        self._slow: dict[str, float] = {}
        """Of those the stragglers, as they were planned for."""
        self._up: frozenset[str] | None = None
        self._cadence = Cadence(rules)
        self.changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        self.failure = ""
        """Why the last proposal could not be followed; empty when it could."""

    def observe(self, timeline: Timeline) -> None:
        """Count one request that ended."""
        counts = self._counts.get(timeline.chain)
        if counts is None:
            return
        counts.requests += 1
        if timeline.error:
            return
        counts.answered += 1
        rows = counts.rows
        for span in timeline.spans:
            rows[span.module] = rows.get(span.module, 0) + span.rows

    async def run(self) -> None:
        """Once a second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.tick(loop.time())
            except Exception:
                # A bug here must not end replanning for good, unseen.
                logger.exception("replanning failed; the plan stays")

    async def tick(self, now_s: float) -> None:
        """Look at the traffic of the last second, and at the machines; replan for them."""
        measured = self._measured(now_s)
        up = self._controller.machines_up()
        if up != self._up:
            reason = _moved(self._up, up)
            self._up = up
            # With none left there is nothing to plan; at the first look nothing has moved.
            if reason and up:
                await self._follow(reason, now_s, self._rebalanced)
                return
        if (reason := self._straggling(up)) and up:
            await self._follow(reason, now_s, self._rebalanced)
            return
        proposal = propose(self._controller.traffic, measured, self._rules)
        if proposal is None:
            return
        if not self._cadence.due(proposal, now_s):
            return
        since_change_s = now_s - self._cadence.tried_s

        def decide(current: Plan, candidate: Plan, transition_cost: float) -> bool:
            return worth(
                proposal,
                current,
                candidate,
                self._rules,
                transition_cost=transition_cost,
                since_change_s=since_change_s,
            )

        async def replan() -> bool:
            return await self._controller.replan(proposal, decide)

        await self._follow(proposal.reason, now_s, replan)

    async def _follow(
        self, reason: str, now_s: float, change: Callable[[], Awaitable[bool]]
    ) -> None:
        """Make a change and write it down, or why it was not possible."""
        before = self._controller.current_plan().cost_per_hour
        self._cadence.tried_s = now_s
        try:
            changed = await change()
        except PacelineError as error:
            self._cadence.failed = True
            self.failure = f"{reason}: {error}"
            logger.warning("the plan stays although %s", self.failure)
            return
        self._cadence.failed, self.failure = False, ""
        if changed:
            plan = self._controller.current_plan()
            reason = "; ".join([reason, *_cut(plan)])
            self.changes.append(Change(time(), reason, before, plan.cost_per_hour))
            logger.info("replanned: %s; cost %.4g -> %.4g", reason, before, plan.cost_per_hour)

    async def _rebalanced(self) -> bool:
        await self._controller.rebalance(self._slow)
        return True

    def _straggling(self, up: frozenset[str]) -> str:
        """In words which machines are stragglers now or are none any more; empty for no news."""
        told = []
        found = self._controller.stragglers()
        for name in [name for name in self._behind if name not in up or name not in found]:
            # Gone, or loaded afresh: what comes back may be another machine.
            del self._behind[name]
            if self._slow.pop(name, None) is not None and name in up:
                told.append(f"{name} has begun afresh")
        for name, ratio in found.items():
            if name not in up:
                continue
            known = self._behind.get(name, 1.0)
            known = self._behind[name] = known + _SLOWDOWN_WEIGHT * (ratio - known)
            if name not in self._slow and known > STRAGGLES:
                self._slow[name] = ratio
                told.append(f"{name} takes {ratio:.2g} times as long as others")
            elif name in self._slow and known < RECOVERED:
                del self._slow[name]
                told.append(f"{name} is as fast as others again")
            elif name in self._slow:
                told += self._moved_on(name, known, ratio)
        return ", ".join(told)

    def _moved_on(self, name: str, known: float, ratio: float) -> list[str]:
        """The same of a straggler that is slower or faster by now than was planned for, once it
        changes no more.
        """
        if _apart(known, ratio) > SETTLED or _apart(known, self._slow[name]) < MOVED:
            return []
        self._slow[name] = ratio
        return [f"{name} takes {ratio:.2g} times as long as others by now"]

    def measured(self) -> Traffic:
        """What is measured now of what was planned for."""
        planned = self._controller.traffic
        return Traffic(
            {chain: counts.estimator.rate_rps() for chain, counts in self._counts.items()},
            {
                (chain, module): fan_out
                for chain, counts in self._counts.items()
                for module, fan_out in counts.estimator.fan_outs().items()
                if (chain, module) in planned.fan_outs
            },
            {key: ratio for key, ratio in self._slowdowns.items() if key in planned.slowdowns},
        )

    def _measured(self, now_s: float) -> Traffic:
        """Close the second: counters into estimators, for the chains that are served now."""
        rates_rps = self._controller.traffic.rates_rps
        served = sorted({chain.name for chain in self._controller.chains()} & rates_rps.keys())
        self._counts = {
            name: self._counts.get(name)
            or _Counts(TrafficEstimator(rates_rps[name], self._rules.window_s))
            for name in served
        }
        for counts in self._counts.values():
            rows = Counter[str]()
            for name, count in counts.rows.items():
                rows.update(dict.fromkeys(modules_in(name), count))
            counts.estimator.observe(now_s, counts.requests, counts.answered, rows)
            counts.requests, counts.answered, counts.rows = 0, 0, {}
        for key, ratio in self._controller.slowdowns().items():
            known = self._slowdowns.get(key, 1.0)
            self._slowdowns[key] = known + _SLOWDOWN_WEIGHT * (ratio - known)
        return self.measured()


def _apart(one: float, other: float) -> float:
    return max(one / other, other / one)


def _cut(plan: Plan) -> list[str]:
    """In words which chains are planned for less than they want."""
    return [
        f"{chain.chain} is planned for {chain.rate_rps:.3g} "
        f"of {chain.wanted.rate_rps:.3g} requests/s"
        for chain in plan.chains
        if chain.wanted is not None
    ]


def _moved(before: frozenset[str] | None, now: frozenset[str]) -> str:
    """In words which machines came and went; empty when there is nothing to compare with."""
    if before is None:
        return ""
    gone = [f"{name} is gone" for name in sorted(before - now)]
    return ", ".join([*gone, *(f"{name} has come" for name in sorted(now - before))])
