"""From schedules to a plan, or to the error that says what a chain lacks.

Invariant: a chain's budgets use up its objective, and no path of it exceeds the objective.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.errors import PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.planner.paths import Graph
from paceline.planner.problem import PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE, Schedule


def graph_of(chain: PlannedChain) -> Graph:
    """The chain's DAG by index of its modules."""
    index = {module.name: i for i, module in enumerate(chain.modules)}
    return Graph.of([[index[parent] for parent in module.parents] for module in chain.modules])


def infeasible(chain: PlannedChain, graph: Graph, least_s: Sequence[float]) -> PlanError:
    """Says by how much the slowest path misses the objective with every module at its fastest."""
    path = graph.slowest(least_s)
    needed_s = sum(least_s[i] for i in path)
    largest = max(path, key=lambda i: least_s[i])
    name = chain.modules[largest].name
    steps = " -> ".join(f"{chain.modules[i].name} {_ms(least_s[i])} ms" for i in path)
    lacking_s = needed_s - chain.slo_s
    return PlanError(
        f"chain {chain.name!r} needs at least {_ms(needed_s)} ms, {_ms(lacking_s)} ms more than "
        f"its slo_ms {_ms(chain.slo_s)}; slowest path {steps}; largest share: {name}; "
        "raise slo_ms, or take a faster model or faster hardware",
        chain=chain.name,
        module=name,
        lacking_s=lacking_s,
    )


def chain_plan(chain: PlannedChain, graph: Graph, schedules: Sequence[Schedule]) -> ChainPlan:
    """The plan that gives every module its schedule, and a budget from all of the objective."""
    latencies_s = [
        s.worst_s + module.overhead_s for module, s in zip(chain.modules, schedules, strict=True)
    ]
    each_s = budgets_s(graph, latencies_s, chain.slo_s)
    return ChainPlan(
        chain=chain.name,
        slo_s=chain.slo_s,
        rate_rps=chain.rate_rps,
        latency_worst_s=graph.longest(latencies_s),
        modules=tuple(
            _module_plan(module, schedules[i], latencies_s[i], each_s[i])
            for i, module in enumerate(chain.modules)
        ),
    )


def budgets_s(graph: Graph, latencies_s: Sequence[float], slo_s: float) -> list[float]:
    """Latencies raised to budgets: in proportion to fill the slowest path, then one by one."""
    factor = max(1.0, slo_s / graph.longest(latencies_s))
    budgets_s = [latency_s * factor for latency_s in latencies_s]
    for i in range(len(budgets_s)):
        slack_s = graph.slacks(budgets_s, slo_s)[i]
        if slack_s > TOLERANCE:
            budgets_s[i] += slack_s
    return budgets_s


def _module_plan(
    module: PlannedModule, found: Schedule, latency_s: float, budget_s: float
) -> ModulePlan:
    return ModulePlan(
        module=module.name,
        model=module.model,
        rate_rps=module.rate_rps,
        dummy_rps=found.dummy_rps,
        latency_budget_s=budget_s,
        latency_worst_s=latency_s,
        allocations=tuple(
            Allocation(
                hardware=p.configuration.hardware,
                batch_size=p.configuration.batch_size,
                duration_s=p.configuration.duration_s,
                machines=p.machines,
                price_per_hour=p.configuration.price_per_hour,
            )
            for p in found.placements
        ),
    )


def _ms(seconds: float) -> str:
    """Milliseconds for people: to a tenth from 10 on, to three digits below."""
    milliseconds = seconds * 1e3
    return f"{round(milliseconds, 1):.12g}" if milliseconds >= 10 else f"{milliseconds:.3g}"
