"""What the served chains need: profiles measured, traffic assumed or measured, plans asked for.

Invariant: a plan is made for a `Traffic` that has a value for every chain, every module's fan-out
and every profiled (model, hardware), so that what is measured later can be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean, median_low

from paceline.core.bind import BoundChain
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import Durations, Hardware, Profiles
from paceline.core.runs import runs_of
from paceline.dispatch.learned import LearnedDuration
from paceline.planner.problem import Options
from paceline.planner.replan import Traffic
from paceline.planner.runs import run_rows
from paceline.planner.task import PlanTask
from paceline.runtime.machines import Machine, Machines, Placed
from paceline.runtime.placement import worth

ASSUMED_RATE_RPS = 1.0
"""What a chain that declares no rate is planned for until its traffic is known."""


LEARNED_BATCHES = 20
"""How many batches of a size a machine has executed before its durations are believed."""

UNDECLARED_PRICE_PER_HOUR = 1.0
"""Price of hardware when no prices are given: costs then count machines."""


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a long change: `what` ("load", "profile", "plan"), on which `name`, how far."""

    what: str
    name: str
    done: int
    total: int


class Provisioning:
    """See the module docstring. The controller's; changed by one change at a time."""

    def __init__(
        self,
        machines: Machines,
        hardware: Mapping[str, Hardware] | None,
        options: Options,
        on_step: Callable[[Step], None],
    ) -> None:
        self._machines = machines
        self._hardware = dict(hardware or {})
        self._priced = hardware is not None
        self._options = options
        self._on_step = on_step
        self.profiles = Profiles()
        self.refused: set[str] = set()
        """Models of runs that some Triton did not load: they are planned for no more."""
        self.slow: Mapping[str, float] = {}
        """Machines that take so many times as long as their kind: they count as less."""

    @property
    def nothing(self) -> Plan:
        """The plan of no chains."""
        return Plan(self._options.policy, "fractional", ())

    def check(self, machine: Machine) -> None:
        """Raises ConfigError when a machine's hardware has no price but other hardware has."""
        site = machine.site
        if not self._priced:
            self._hardware[site.hardware] = Hardware(site.hardware, UNDECLARED_PRICE_PER_HOUR)
        if site.hardware not in self._hardware:
            raise ConfigError(
                f"hardware {site.hardware!r} of {site.name} has no price; "
                f"have {', '.join(sorted(self._hardware)) or 'none'}",
                key="hardware",
            )

    async def profile(self, chains: Collection[BoundChain]) -> None:
        """Measure the models that were not measured yet, one after the other, once per hardware;
        what runs take follows from that.

        Where a model does not fit into memory it is not measured, and so not planned for; one that
        fits nowhere is tried, so that it is said. Raises ResidencyError.
        """
        wanted = {module.spec.name: module.spec for bound in chains for module in bound.modules}
        by_hardware: dict[str, Machine] = {}
        for machine in self._machines.all():
            by_hardware.setdefault(machine.site.hardware, machine)
        todo = [
            (spec, hardware, machine)
            for hardware, machine in sorted(by_hardware.items())
            for _, spec in sorted(wanted.items())
            if self.profiles.durations(spec.name, hardware) is None
            and (self._fits(spec.name, machine) or not self._fits_any(spec.name))
        ]
        for spec, hardware, machine in todo:
            name = spec.name

            def progress(done: int, total: int, name: str = name) -> None:
                self._on_step(Step("profile", name, done, total))

            async with self._machines.using(name, machine.site.name):
                rows = await machine.profiler.measure(spec, hardware, on_progress=progress)
            self.profiles = self.profiles.merged(rows)
        round_trips_s = {name: m.round_trip_s for name, m in by_hardware.items()}
        for run in (run for bound in chains for run in runs_of(bound.chain)):
            rows = run_rows(run, self.profiles, round_trips_s)
            known = self.profiles.hardware_of(run.model)
            self.profiles = self.profiles.merged(r for r in rows if r.hardware not in known)

    def assumed(self, chains: Iterable[Chain]) -> Traffic:
        """Traffic as the chain files and the profile say it is."""
        chains = list(chains)
        models = {m.model for c in chains for m in (*c.modules, *runs_of(c))}
        return Traffic(
            {chain.name: chain.rate_rps or ASSUMED_RATE_RPS for chain in chains},
            {(c.name, m.name): m.fan_out for c in chains for m in c.modules},
            {(model, h): 1.0 for model in sorted(models) for h in self.profiles.hardware_of(model)},
        )

    def expected(self, served: Sequence[Chain], fresh: Sequence[Chain], now: Traffic) -> Traffic:
        """The traffic of `served`: of `fresh` chains as their files say, otherwise as `now`."""
        assumed = self.assumed(served)
        names = {chain.name for chain in fresh}
        return Traffic(
            {
                chain: rps if chain in names else now.rates_rps.get(chain, rps)
                for chain, rps in assumed.rates_rps.items()
            },
            {
                key: fan_out if key[0] in names else now.fan_outs.get(key, fan_out)
                for key, fan_out in assumed.fan_outs.items()
            },
            {key: now.slowdowns.get(key, ratio) for key, ratio in assumed.slowdowns.items()},
        )

    def slowdowns(self, learned: Iterable[LearnedDuration]) -> dict[tuple[str, str], float]:
        """p95 learned over p95 profiled by (model, hardware): of its machines the median, so that
        one that is slow says nothing about the others; of two the faster.
        """
        return {
            key: median_low(machines.values()) for key, machines in self._ratios(learned).items()
        }

    def stragglers(self, learned: Iterable[LearnedDuration]) -> dict[str, float]:
        """How many times as long as the median of its kind each machine takes, over its models."""
        found: dict[str, list[float]] = {}
        for machines in self._ratios(learned).values():
            kind = median_low(machines.values())
            for machine, ratio in machines.items():
                found.setdefault(machine, []).append(ratio / kind)
        return {machine: fmean(ratios) for machine, ratios in sorted(found.items())}

    def _ratios(
        self, learned: Iterable[LearnedDuration]
    ) -> dict[tuple[str, str], dict[str, float]]:
        """p95 learned over p95 profiled by (model, hardware) and machine, weighted by batches."""
        ratios: dict[tuple[str, str], dict[str, list[tuple[float, int]]]] = {}
        for seen in learned:
            profiled = self.profiles.durations(seen.model, seen.hardware)
            if profiled is not None and seen.count >= LEARNED_BATCHES:
                ratio = seen.p95_s / profiled.at(seen.batch_size)
                machines = ratios.setdefault((seen.model, seen.hardware), {})
                machines.setdefault(seen.machine, []).append((ratio, seen.count))
        return {
            key: {
                machine: sum(ratio * count for ratio, count in found)
                / sum(count for _, count in found)
                for machine, found in machines.items()
            }
            for key, machines in ratios.items()
        }

    def transition_cost(self, placed: Placed) -> float:
        """Money that machines cost while they load what `placed` has more than there is."""
        return sum(
            self._machines.load_s(name, placed[name])
            * self._hardware[machine.site.hardware].price_per_hour
            / 3600
            for name, machine in self._machines.named().items()
            if name in placed
        )

    def task(
        self,
        chains: Sequence[Chain],
        specs: Mapping[str, ModelSpec],
        traffic: Traffic,
        *,
        runs: bool,
    ) -> PlanTask:
        """What is to be planned, and on what: `chains` under `traffic`, with `runs` where they pay
        or without, on the machines that are up.
        """
        usable = self._machines.usable()
        present = {site.hardware for site in usable}
        memory_bytes = self._memory_bytes()
        return PlanTask(
            chains=tuple(chains),
            specs=dict(specs),
            traffic=traffic,
            profiles=self._sized() if memory_bytes else self.profiles,
            hardware={name: h for name, h in self._hardware.items() if name in present},
            capacity=worth(usable, self.slow),
            overhead_s=max(machine.overhead_s for machine in self._machines.all()),
            options=replace(self._options, memory_bytes=memory_bytes),
            runs=runs,
            refused=frozenset(self.refused),
        )

    def _memory_bytes(self) -> dict[str, int]:
        """What the models of a machine may take, by hardware, where that is bounded."""
        found: dict[str, int] = {}
        for machine in self._machines.all():
            if machine.budget_bytes != inf:
                most_bytes = int(machine.budget_bytes)
                kind = machine.site.hardware
                found[kind] = min(most_bytes, found.get(kind, most_bytes))
        return found

    def _fits(self, model: str, machine: Machine) -> bool:
        return self._machines.needed_bytes(model) <= machine.budget_bytes

    def _fits_any(self, model: str) -> bool:
        return any(self._fits(model, machine) for machine in self._machines.all())

    def durations(self, models: Iterable[str]) -> dict[str, dict[str, Durations]]:
        """What was measured of `models`, by hardware that is there."""
        present = sorted({site.hardware for site in self._machines.sites()})
        return {
            model: {
                hardware: known
                for hardware in present
                if (known := self.profiles.durations(model, hardware)) is not None
            }
            for model in models
        }

    def _sized(self) -> Profiles:
        """What was measured, with what the models need of a machine's memory."""
        return Profiles(
            tuple(
                replace(row, memory_bytes=self._machines.needed_bytes(row.model))
                for row in self.profiles.rows
            )
        )
