"""Scrooge (SoCC'21): batches collected like Harpagon's, two tuples, split by throughput.

Invariant: budgets only grow, each to what a configuration of higher throughput per price needs.

Every module starts at the configuration of its least worst case. The step that gains the most
throughput per price, as a ratio and per second of latency, is taken until none fits: cost and the
residual are not looked at, which is what the published comparison holds against it.
"""

from __future__ import annotations

from paceline.planner.assemble import graph_of, infeasible
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.residual import ModuleScheduler
from paceline.planner.schedule import TOLERANCE, Schedule
from paceline.planner.split import choices


def scrooge(chain: PlannedChain, options: Options) -> list[Schedule]:
    """Split by throughput, then schedule every module with two tuples at most."""
    graph = graph_of(chain)
    own = Options(dispatch="throughput-cost", max_tuples=2, dummy=False)
    schedulers = [ModuleScheduler(module, own) for module in chain.modules]
    frontiers = [choices(scheduler, chain.slo_s) for scheduler in schedulers]
    at = [0] * len(frontiers)
    latencies_s = [frontier[0].latency_s for frontier in frontiers]
    if graph.longest(latencies_s) > chain.slo_s + TOLERANCE:
        raise infeasible(chain, graph, latencies_s)
    while True:
        slacks_s = graph.slacks(latencies_s, chain.slo_s)
        steps: list[tuple[float, int, int]] = []
        for i, frontier in enumerate(frontiers):
            now = frontier[at[i]]
            for to in range(at[i] + 1, len(frontier)):
                longer_s = frontier[to].latency_s - now.latency_s
                if longer_s > slacks_s[i] + TOLERANCE:
                    break
                gain = _throughput(frontier[to].schedule) / _throughput(now.schedule)
                if gain > 1 + TOLERANCE:
                    steps.append(((gain - 1) / longer_s, -i, to))
        if not steps:
            return [frontier[k].schedule for frontier, k in zip(frontiers, at, strict=True)]
        _, i, at_i = max(steps)
        at[-i] = at_i
        latencies_s[-i] = frontiers[-i][at_i].latency_s


def _throughput(found: Schedule) -> float:
    """Requests per second and price of the configuration that serves first."""
    return found.placements[0].configuration.tc_ratio
