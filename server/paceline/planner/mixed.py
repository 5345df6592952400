"""Plans on the machines that there are, where the cheapest plan wants more of a kind than there is.

A module may then run on several kinds of hardware, and in several batch sizes, side by side. With
pooled dispatch a batch of b rows is full after b/T wherever it goes, T being the module's whole
rate, so that a configuration's worst case does not depend on what else the module runs in
(`worst_case.pooled_s`), and the cheapest mix is a mixed-integer linear program: machines by module
and configuration, which configurations are used, and when each module ends.

Invariant: what comes out serves every module's whole rate, keeps every path within its objective,
uses no more machines of a kind than there are, and costs no more than `GAP` above the least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import scipy  # its parts when they are used: to import them takes 0.3 s, few plans need them

from paceline.core.profile import Configuration
from paceline.planner.problem import PlannedChain, PlannedModule
from paceline.planner.schedule import Placement, Schedule, ranked
from paceline.planner.worst_case import pooled_s

GAP, NODES = 0.001, 2000
"""The search ends within this of the least cost, or after so many nodes: with none, perhaps."""

_NONE = 1e-7
"""So few machines are none."""


@dataclass(frozen=True, slots=True)
class _Use:
    """A module's machines in one configuration: a variable, the next says whether there are any."""

    module: PlannedModule
    configuration: Configuration
    worst_s: float
    variable: int

    @property
    def any(self) -> int:
        return self.variable + 1

    @property
    def most(self) -> float:
        """Machines that serve the whole rate."""
        return self.module.rate_rps / self.configuration.throughput_rps


@dataclass(slots=True)
class _Program:
    """Rows of `lower <= A x <= upper`, as (column, factor) pairs."""

    rows: list[list[tuple[int, float]]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, row: list[tuple[int, float]], lower: float, upper: float) -> None:
        self.rows.append(row)
        self.lower.append(lower)
        self.upper.append(upper)

    def constraint(self, columns: int) -> scipy.optimize.LinearConstraint:
        entries = [
            (at, column, factor) for at, row in enumerate(self.rows) for column, factor in row
        ]
        at, column, factor = zip(*entries, strict=True)
        matrix = scipy.sparse.csr_array((factor, (at, column)), (len(self.rows), columns))
        return scipy.optimize.LinearConstraint(matrix, self.lower, self.upper)


def mixed(
    chains: Sequence[PlannedChain], capacity: Mapping[str, float]
) -> list[list[Schedule]] | None:
    """Schedules by chain and module that use at most `capacity` machines by hardware, all together;
    None where there are none, or none was found.
    """
    uses: list[list[list[_Use]]] = []
    columns = 0
    for chain in chains:
        uses.append([])
        for module in chain.modules:
            found = []
            for configuration in _worthwhile(module, chain.slo_s, capacity):
                worst_s = pooled_s(configuration, module.rate_rps)
                found.append(_Use(module, configuration, worst_s, columns))
                columns += 2
            if not found:
                return None
            uses[-1].append(found)
    answer = _solved(chains, uses, capacity)
    if answer is None:
        return None
    return [[_schedule(found, answer) for found in chain_uses] for chain_uses in uses]


def _solved(
    chains: Sequence[PlannedChain],
    uses: Sequence[Sequence[Sequence[_Use]]],
    capacity: Mapping[str, float],
) -> Sequence[float] | None:
    """The program's variables: those of the uses, then when each module ends."""
    each = [use for chain_uses in uses for module_uses in chain_uses for use in module_uses]
    columns = 2 * len(each)
    program = _Program()
    most = [1.0] * columns
    for use in each:
        most[use.variable] = min(use.most, capacity[use.configuration.hardware])
        program.add([(use.variable, 1.0), (use.any, -use.most)], -inf, 0.0)
    for hardware in sorted({use.configuration.hardware for use in each}):
        row = [(u.variable, 1.0) for u in each if u.configuration.hardware == hardware]
        program.add(row, -inf, capacity[hardware])
    for chain, chain_uses in zip(chains, uses, strict=True):
        ends = {module.name: columns + at for at, module in enumerate(chain.modules)}
        columns += len(ends)
        most += [chain.slo_s] * len(ends)
        for module, module_uses in zip(chain.modules, chain_uses, strict=True):
            rate = [(use.variable, use.configuration.throughput_rps) for use in module_uses]
            program.add(rate, module.rate_rps, module.rate_rps)
            end = ends[module.name]
            starts = [[(ends[parent], 1.0)] for parent in module.parents] or [[]]
            for use in module_uses:
                for start in starts:
                    row = [*start, (use.any, use.worst_s), (end, -1.0)]
                    program.add(row, -inf, -module.overhead_s)
    cost, integral = np.zeros(columns), np.zeros(columns)
    for use in each:
        cost[use.variable] = use.configuration.price_per_hour
        integral[use.any] = 1
    answer = scipy.optimize.milp(
        cost,
        integrality=integral,
        bounds=scipy.optimize.Bounds(0.0, most),
        constraints=program.constraint(columns),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    variables: Sequence[float] | None = answer.x
    return variables


def _worthwhile(
    module: PlannedModule, slo_s: float, capacity: Mapping[str, float]
) -> Iterable[Configuration]:
    """Configurations on hardware that there is, in time by themselves; larger batches only where
    they serve more."""
    best: dict[str, float] = {}
    for configuration in sorted(module.configurations, key=lambda c: pooled_s(c, module.rate_rps)):
        hardware = configuration.hardware
        if pooled_s(configuration, module.rate_rps) + module.overhead_s > slo_s:
            break
        if capacity.get(hardware, 0.0) <= _NONE:
            continue
        if configuration.throughput_rps > best.get(hardware, 0.0):
            best[hardware] = configuration.throughput_rps
            yield configuration


def _schedule(uses: Sequence[_Use], machines: Sequence[float]) -> Schedule:
    """What a module runs in, without what rounding leaves of other configurations."""
    used = {
        use.configuration: use
        for use in uses
        if machines[use.any] > 0.5 and machines[use.variable] > _NONE
    }
    module = uses[0].module
    served_rps = sum(machines[u.variable] * c.throughput_rps for c, u in used.items())
    factor = module.rate_rps / served_rps
    return Schedule(
        module.rate_rps,
        0.0,
        tuple(
            Placement(c, float(machines[used[c].variable]) * factor, used[c].worst_s)
            for c in ranked(used)
        ),
    )
