"""One plan to be made while chains are served: all that it depends on, as one value.

Chains are planned as they are cheapest, with their runs or as declared (`planner.runs`); each under
the bound of the policy by which it is dispatched; and where machines do not suffice, lower
priorities get what is left (`planner.scarce`).

Invariant: a task is a value that can be sent to another process, and what comes of it depends on
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from paceline.core.chain import Chain
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, Profiles
from paceline.core.runs import merge, modules_in, run_spec, runs_of
from paceline.planner.problem import Options, PlannedChain, demand
from paceline.planner.replan import Traffic
from paceline.planner.runs import pays
from paceline.planner.scarce import Wanted, plan_by_priority


@dataclass(frozen=True, slots=True)
class PlanTask:
    """`chains` under `traffic`, on what is there.

    `profiles` are as they were measured, `capacity` is in machines by hardware, `overhead_s` what a
    batch takes on top of its duration. `runs`: whether consecutive modules may be executed at once,
    but for models in `refused`.
    """

    chains: Sequence[Chain]
    specs: Mapping[str, ModelSpec]
    traffic: Traffic
    profiles: Profiles
    hardware: Mapping[str, Hardware]
    capacity: Mapping[str, float]
    overhead_s: float
    options: Options
    runs: bool = True
    refused: frozenset[str] = frozenset()

    def served(self) -> list[Chain]:
        """The chains as they are cheapest under the traffic: with their runs, or as declared.

        By profiled durations, whatever was learned since: what is not executed now would be
        compared as it was when it was.
        """
        return [self._cheapest(chain) if self.runs else chain for chain in self.chains]

    def plan(self, served: Sequence[Chain]) -> Plan:
        """The plan of the chains as they are `served`; `solve_s` is left at 0. Raises PlanError."""
        if not served:
            return Plan(self.options.policy, "fractional", ())
        plans = plan_by_priority(
            [
                Wanted(needed, self._options_for(chain), chain.priority)
                for chain, needed in self._demands(served, self.traffic)
            ],
            self.capacity,
        )
        return replace(
            plans[0],
            chains=tuple(planned for plan in plans for planned in plan.chains),
            lower_bound_per_hour=sum(plan.lower_bound_per_hour for plan in plans),
        )

    def _cheapest(self, chain: Chain) -> Chain:
        runs = [
            run
            for run in runs_of(chain)
            if run.model not in self.refused
            and run_spec(run, self.specs) is not None
            and self.profiles.hardware_of(run.model)
        ]
        if not runs:
            return chain
        profiled = replace(self.traffic, slowdowns={})
        merged = merge(chain, runs)
        (_, apart), (_, together) = self._demands([chain, merged], profiled)
        return merged if pays(apart, together, self._options_for(chain)) else chain

    def _options_for(self, chain: Chain) -> Options:
        """The optimum counts on pooled batches; what is dispatched otherwise is planned otherwise.

        Harpagon's plans of pooled chains have smaller batches where objectives are tight: fewer
        requests make it on the same machines (`docs/benchmarks/slo.md`).
        """
        policy = "optimal" if chain.dispatch == "pooled" else self.options.policy
        return replace(self.options, dispatch=chain.dispatch, policy=policy)

    def _demands(
        self, chains: Sequence[Chain], traffic: Traffic
    ) -> Iterable[tuple[Chain, PlannedChain]]:
        limits = {name: spec.row_limit for name, spec in self.specs.items()}
        profiles = _slowed(self.profiles, traffic.slowdowns)
        for chain in chains:
            modules = tuple(
                replace(module, fan_out=traffic.fan_outs[chain.name, modules_in(module.name)[0]])
                for module in chain.modules
            )
            needed = demand(
                replace(chain, modules=modules),
                traffic.rates_rps[chain.name],
                profiles,
                self.hardware,
                limits,
                self.overhead_s,
            )
            yield chain, needed


def _slowed(profiles: Profiles, slowdowns: Mapping[tuple[str, str], float]) -> Profiles:
    """`profiles` with durations as they were measured in service."""
    if all(ratio == 1.0 for ratio in slowdowns.values()):
        return profiles
    return Profiles(
        tuple(
            replace(row, duration_s=row.duration_s * slowdowns.get((row.model, row.hardware), 1.0))
            for row in profiles.rows
        )
    )
