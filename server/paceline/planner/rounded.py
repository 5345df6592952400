"""Plans of the published policies in whole machines (`--billing machine`, algorithms 1.4).

They plan fractions of machines. Of what they plan, whole machines stay; the fractions are packed
onto machines that modules share, by the packing that the optimum uses as well (`pack`), or get a
machine of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf

from paceline.core.plan import Plan
from paceline.planner.assemble import budgets_s, graph_of
from paceline.planner.columns import packed
from paceline.planner.fits import too_few
from paceline.planner.frontier import Frontier
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE, Schedule, cheaper
from paceline.planner.whole_plan import (
    Full,
    Served,
    assembled,
    full_machines,
    kinds_of,
)


def rounded(
    chains: Sequence[PlannedChain],
    schedules: Sequence[Sequence[Schedule]],
    options: Options,
    below: float = inf,
) -> Plan | None:
    """`schedules` of every chain's modules in whole machines; None where they cost no less than
    `below`, mostly known before they are packed. Raises PlanError: memory or limit.
    """
    kinds = kinds_of(chains, options)
    served: list[Served] = []
    for chain, found in zip(chains, schedules, strict=True):
        latencies_s = [m.overhead_s + s.worst_s for m, s in zip(chain.modules, found, strict=True)]
        each_s = budgets_s(graph_of(chain), latencies_s, chain.slo_s)
        served += [
            _served(chain.name, module, schedule, budget_s)
            for module, schedule, budget_s in zip(chain.modules, found, each_s, strict=True)
        ]
    used = full_machines(served)
    full = sum(count * kinds[name].price_per_hour for name, count in used.items())
    if not cheaper(full + sum(_least_share(each) for each in served), below):
        return None
    packing = None
    if all(count <= kinds[name].limit for name, count in used.items()):
        loads = [s.load() for s in served if s.rest_rps]
        packing = packed(loads, kinds, used, below=below - full)
    if packing is None:
        raise too_few(chains, options)
    if not cheaper(full + packing.cost_per_hour, below):
        return None
    return assembled(chains, served, packing, kinds, options.policy)


def _least_share(served: Served) -> float:
    """What no packing serves the rest for less than.

    A machine's price is paid at least in proportion to the time it works for each of its loads, and
    nothing serves a part of the rate for less than that part of the frontier's cost.
    """
    part = served.rest_rps / served.module.rate_rps
    return part * served.frontier.cost_at(served.budget_s) if part else 0.0


def _served(chain: str, module: PlannedModule, schedule: Schedule, budget_s: float) -> Served:
    real = module.rate_rps / (module.rate_rps + schedule.dummy_rps)
    full: list[Full] = []
    rest_rps, alone = 0.0, schedule.placements[-1]
    for placement in schedule.placements:
        whole = floor(placement.machines + 1e-6)
        if whole:
            full.append(Full(placement.configuration, whole, placement.worst_s, real))
        part_rps = (placement.machines - whole) * placement.configuration.throughput_rps * real
        if part_rps > TOLERANCE * module.rate_rps:
            rest_rps, alone = rest_rps + part_rps, placement
    frontier = Frontier.of(module.configurations, module.rate_rps, module.overhead_s)
    return Served(
        chain,
        module,
        frontier,
        budget_s,
        tuple(full),
        rest_rps,
        alone.configuration,
        alone.worst_s,
    )
