"""From full machines and a packing of the rest to a plan in whole machines.

Invariant: every machine of the plan is paid for in full, and what the modules have of a machine
adds up to no more than the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Configuration
from paceline.planner.assemble import graph_of
from paceline.planner.cycle import Load
from paceline.planner.frontier import Frontier
from paceline.planner.pack import Machine, Packing, Shared
from paceline.planner.problem import Options, PlannedChain, PlannedModule


@dataclass(frozen=True, slots=True)
class Full:
    """Whole machines of one module in one configuration, of which real requests take a share."""

    configuration: Configuration
    machines: int
    worst_s: float
    utilisation: float


@dataclass(frozen=True, slots=True)
class Served:
    """One module: its budget, its full machines, and the load that is left (0: none).

    `alone` and `alone_s`: how one more machine would serve that load by itself, in the worst case.
    """

    chain: str
    module: PlannedModule
    frontier: Frontier
    budget_s: float
    full: tuple[Full, ...]
    rest_rps: float
    alone: Configuration
    alone_s: float

    def load(self) -> Load:
        within_s = self.budget_s - self.module.overhead_s
        curves = [c for c in self.frontier.curves if c.duration_s[0] < within_s]
        largest = max((full.configuration.batch_size for full in self.full), default=0)
        return Load(
            self.chain,
            self.module.name,
            self.module.model,
            self.rest_rps,
            self.module.rate_rps,
            within_s,
            {c.hardware: c.duration_s.tolist() for c in curves},
            self.module.memory_bytes,
            self.alone.hardware,
            largest / self.module.rate_rps,
        )


def kinds_of(chains: Sequence[PlannedChain], options: Options) -> dict[str, Machine]:
    """The hardware that the chains may use, by name."""
    return {
        c.hardware: Machine(
            c.hardware,
            c.price_per_hour,
            options.memory_bytes.get(c.hardware, 0),
            options.machine_limits.get(c.hardware, inf),
        )
        for chain in chains
        for module in chain.modules
        for c in module.configurations
    }


def full_machines(served: Sequence[Served]) -> dict[str, int]:
    """How many there are, by hardware."""
    used: dict[str, int] = {}
    for full in (full for each in served for full in each.full):
        hardware = full.configuration.hardware
        used[hardware] = used.get(hardware, 0) + full.machines
    return used


def assembled(
    chains: Sequence[PlannedChain],
    served: Sequence[Served],
    packing: Packing,
    kinds: Mapping[str, Machine],
    policy: str,
) -> Plan:
    """The plan that serves every module by its full machines and its shares of others."""
    shares: dict[tuple[str, str], list[tuple[Shared, int]]] = {}
    for each in packing.shared:
        for at, load in enumerate(each.loads):
            shares.setdefault((load.chain, load.module), []).append((each, at))
    machines = [_full_machine(s, full, kinds) for s in served for full in _each(s.full)]
    machines += [_shared_machine(each, served) for each in packing.shared]
    plans = []
    for chain in chains:
        own = [s for s in served if s.chain == chain.name]
        modules = tuple(
            _module_plan(s, shares.get((s.chain, s.module.name), ()), kinds) for s in own
        )
        worst_s = graph_of(chain).longest([m.latency_worst_s for m in modules])
        plans.append(ChainPlan(chain.name, chain.slo_s, chain.rate_rps, worst_s, modules))
    return Plan(policy, "machine", tuple(plans), machines=tuple(machines))


def _each(full: Sequence[Full]) -> list[Full]:
    return [each for each in full for _ in range(each.machines)]


def _full_machine(s: Served, full: Full, kinds: Mapping[str, Machine]) -> PackedMachine:
    c = full.configuration
    share = Share(s.chain, s.module.name, c.batch_size, full.utilisation)
    memory_bytes = s.module.memory_bytes.get(c.hardware, 0)
    return PackedMachine(c.hardware, kinds[c.hardware].price_per_hour, (share,), memory_bytes)


def _shared_machine(each: Shared, served: Sequence[Served]) -> PackedMachine:
    by_name = {(s.chain, s.module.name): s for s in served}
    shares: list[Share] = []
    for at, load in enumerate(each.loads):
        size, duration_s, _ = _run(each, at, by_name[load.chain, load.module])
        busy = load.rate_rps * duration_s / size
        shares.append(
            Share(
                load.chain,
                load.module,
                size,
                busy,
                0.0 if each.cycle is None else each.cycle.duration_s,
            )
        )
    return PackedMachine(
        each.machine.hardware, each.machine.price_per_hour, tuple(shares), each.memory_bytes
    )


def _run(each: Shared, at: int, s: Served) -> tuple[int, float, float]:
    """Batch size, duration and worst case of one load on a shared machine."""
    if each.cycle is None and each.due is not None:
        own = each.sizes[at]
        return own.batch_size, own.duration_s, each.loads[at].budget_s
    if each.cycle is None and not each.batch_size:
        return s.alone.batch_size, s.alone.duration_s, s.alone_s
    if each.cycle is None:
        size, load = each.batch_size, each.loads[at]
        duration_s = load.durations_s[each.machine.hardware][size - 1]
        return size, duration_s, duration_s + (0.0 if size == 1 else size / load.total_rps)
    size = each.cycle.batch_sizes[at]
    duration_s = each.loads[at].durations_s[each.machine.hardware][size - 1]
    return size, duration_s, each.loads[at].worst_s(each.cycle.duration_s, duration_s)


def _module_plan(
    s: Served, shares: Sequence[tuple[Shared, int]], kinds: Mapping[str, Machine]
) -> ModulePlan:
    allocations: list[Allocation] = []
    worst_s = 0.0
    dummy_rps = 0.0
    for full in s.full:
        c = full.configuration
        price = kinds[c.hardware].price_per_hour
        machines = float(full.machines)
        allocations.append(Allocation(c.hardware, c.batch_size, c.duration_s, machines, price))
        worst_s = max(worst_s, full.worst_s)
        dummy_rps += full.machines * c.throughput_rps * (1 - full.utilisation)
    for each, at in shares:
        size, duration_s, latency_s = _run(each, at, s)
        machines = each.loads[at].rate_rps * duration_s / size
        allocations.append(
            Allocation(
                each.machine.hardware, size, duration_s, machines, each.machine.price_per_hour
            )
        )
        worst_s = max(worst_s, latency_s)
    return ModulePlan(
        module=s.module.name,
        model=s.module.model,
        rate_rps=s.module.rate_rps,
        dummy_rps=dummy_rps,
        latency_budget_s=s.budget_s,
        latency_worst_s=worst_s + s.module.overhead_s,
        allocations=tuple(allocations),
    )
