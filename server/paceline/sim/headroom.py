"""Headroom: planning for more than is declared; and what plans are verified against.

While a chain misses its target under the arrivals that it is to be verified against, its plan is
made for a higher rate or a shorter objective than declared, so that every choice - budgets,
batches, machines - follows (docs/decisions/0014). `sim.search` finds how much of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from random import Random
from statistics import NormalDist

from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.plan import ChainPlan, PackedMachine, Plan
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import solve
from paceline.sim import workload

LEAST_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class Headroom:
    """A plan for `rate_factor` times the rate, within `slo_factor` times the objective; by another
    `policy` than asked for where that is the cheaper one once it is verified ("": as asked for).
    """

    rate_factor: float = 1.0
    slo_factor: float = 1.0
    policy: str = ""

    def of(self, chain: PlannedChain) -> PlannedChain:
        """What is planned in place of `chain`."""
        return replace(
            chain,
            slo_s=chain.slo_s * self.slo_factor,
            rate_rps=chain.rate_rps * self.rate_factor,
            modules=tuple(
                replace(m, rate_rps=m.rate_rps * self.rate_factor) for m in chain.modules
            ),
        )


NONE = Headroom()


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What plans are verified against.

    `kind` is `poisson`, `uniform`, or "" for what each chain declares; a `trace` (with `window`)
    is stretched to each chain's rate. Evenly spaced requests need no verification: the published
    bounds hold for them.
    """

    kind: str = ""
    trace: Path | None = None
    window: str = ""

    def of(self, chain: Chain) -> str:
        """How a report calls it."""
        return self.trace.name if self.trace is not None else self.kind or chain.arrivals

    def judged(self, chain: Chain) -> bool:
        return self.of(chain) != "uniform"

    def instants(
        self, chain: Chain, rate_rps: float, requests: int, rng: Random
    ) -> Sequence[float]:
        """`requests` arrivals, or all those of the trace. Raises ConfigError."""
        if self.trace is not None:
            return workload.read_trace(self.trace, rng, rate_rps=rate_rps, window=self.window)
        if self.of(chain) == "uniform":
            return workload.uniform(rate_rps, requests)
        return workload.poisson(rate_rps, requests, rng)


@dataclass(frozen=True, slots=True)
class Verification:
    """How sure to be: `requests` of the chain with the fewest (0: as many as its target needs)."""

    arrivals: Arrivals = field(default_factory=Arrivals)
    confidence: float = 0.95
    requests: int = 0
    seed: int = 0

    def least(self, target: float) -> int:
        """Requests that show the target if none of them misses."""
        z = NormalDist().inv_cdf(0.5 + self.confidence / 2.0)
        return ceil(z * z * target / (1.0 - target)) + 1

    def needed(self, target: float) -> int:
        """Requests to simulate; ConfigError where so few could never show the target."""
        least = self.least(target)
        if self.requests and self.requests < least:
            raise ConfigError(
                f"{target:.6g} with {self.confidence:.0%} confidence takes {least} requests, "
                f"got {self.requests}",
                key="--requests",
            )
        return self.requests or max(LEAST_REQUESTS, 12 * least)


def plan_with(
    chains: Sequence[PlannedChain], options: Options, headroom: Mapping[str, Headroom]
) -> Plan:
    """The plan with headroom by chain; its rates, utilisation and objectives are for what is
    declared, and what is served beyond counts as dummy requests.
    """
    by_policy: dict[str, list[PlannedChain]] = {}
    for chain in chains:
        wanted = headroom.get(chain.name, NONE)
        by_policy.setdefault(wanted.policy or options.policy, []).append(wanted.of(chain))
    plans = [
        solve(own, replace(options, policy=policy)) for policy, own in sorted(by_policy.items())
    ]
    made = {planned.chain: planned for plan in plans for planned in plan.chains}
    return replace(
        plans[0],
        policy=options.policy,
        chains=tuple(_declared(made[chain.name], chain) for chain in chains),
        lower_bound_per_hour=sum(plan.lower_bound_per_hour for plan in plans),
        machines=tuple(_used(machine, headroom) for plan in plans for machine in plan.machines),
    )


def _used(machine: PackedMachine, headroom: Mapping[str, Headroom]) -> PackedMachine:
    """As busy as it is at the rates declared."""
    return replace(
        machine,
        shares=tuple(
            replace(
                share, utilisation=share.utilisation / headroom.get(share.chain, NONE).rate_factor
            )
            for share in machine.shares
        ),
    )


def _declared(planned: ChainPlan, chain: PlannedChain) -> ChainPlan:
    """A plan made with headroom, for the rates and the objective that it serves."""
    modules = zip(planned.modules, chain.modules, strict=True)
    return replace(
        planned,
        slo_s=chain.slo_s,
        rate_rps=chain.rate_rps,
        modules=tuple(
            replace(
                plan,
                rate_rps=module.rate_rps,
                dummy_rps=plan.dummy_rps + plan.rate_rps - module.rate_rps,
            )
            for plan, module in modules
        ),
    )
