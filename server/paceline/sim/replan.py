"""Live replanning in virtual time: the decisions of `planner.replan`, as the server takes them.

Once a second the traffic of that second is held against what the plan was made for; a candidate is
planned with the headroom that the first plan was verified with, and followed if it is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from paceline.core.errors import PlanError
from paceline.core.plan import Plan
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.replan import Cadence, Replanning, Traffic, TrafficEstimator, propose, worth
from paceline.sim.headroom import Headroom, plan_with


@dataclass(slots=True)
class Seen:
    """What ended since the last decision: requests, those answered, and rows by module."""

    requests: int = 0
    answered: int = 0
    rows: dict[str, int] = field(default_factory=dict)


class Replanner(Protocol):
    """Decides once a second whether another plan is to be followed."""

    reason: str
    """Why the last plan that it decided for was made."""

    def decide(
        self,
        now_s: float,
        seen: Mapping[str, Seen],
        current: Plan,
        transition_cost: Callable[[Plan], float],
    ) -> Plan | None:
        """Another plan, or None; `transition_cost` is what changing to one costs in money."""
        ...


class LivePlanner:
    """What the server does; see the module docstring."""

    def __init__(
        self,
        demands: Sequence[PlannedChain],
        options: Options,
        headroom: Mapping[str, Headroom],
        rules: Replanning,
    ) -> None:
        """`demands`: what the first plan was made for."""
        self._demands = demands
        self._options = options
        self._headroom = headroom
        self._rules = rules
        self._cadence = Cadence(rules)
        self._estimators = {d.name: TrafficEstimator(d.rate_rps, rules.window_s) for d in demands}
        self._planned = Traffic(
            {d.name: d.rate_rps for d in demands},
            {
                (d.name, m.name): m.rate_rps / d.rate_rps
                for d in demands
                for m in d.modules
                if m.rate_rps != d.rate_rps
            },
        )
        self.reason = ""

    def decide(
        self,
        now_s: float,
        seen: Mapping[str, Seen],
        current: Plan,
        transition_cost: Callable[[Plan], float],
    ) -> Plan | None:
        for name, estimator in self._estimators.items():
            counts = seen.get(name) or Seen()
            estimator.observe(now_s, counts.requests, counts.answered, counts.rows)
        proposal = propose(self._planned, self._measured(), self._rules)
        if proposal is None:
            return None
        if not self._cadence.due(proposal, now_s):
            return None
        since_s = now_s - self._cadence.tried_s
        self._cadence.tried_s = now_s
        try:
            candidate = plan_with(self._for(proposal.traffic), self._options, self._headroom)
        except PlanError:
            self._cadence.failed = True
            return None
        self._cadence.failed = False
        if not worth(
            proposal,
            current,
            candidate,
            self._rules,
            transition_cost=transition_cost(candidate),
            since_change_s=since_s,
        ):
            return None
        self._planned, self.reason = proposal.traffic, proposal.reason
        return candidate

    def _measured(self) -> Traffic:
        return Traffic(
            {name: estimator.rate_rps() for name, estimator in self._estimators.items()},
            {
                (name, module): fan_out
                for name, estimator in self._estimators.items()
                for module, fan_out in estimator.fan_outs().items()
                if (name, module) in self._planned.fan_outs
            },
        )

    def _for(self, traffic: Traffic) -> list[PlannedChain]:
        """The demands at other rates and fan-outs."""
        made = []
        for chain in self._demands:
            rate_rps = traffic.rates_rps[chain.name]
            modules = tuple(
                replace(m, rate_rps=rate_rps * traffic.fan_outs.get((chain.name, m.name), 1.0))
                for m in chain.modules
            )
            made.append(replace(chain, rate_rps=rate_rps, modules=modules))
        return made
