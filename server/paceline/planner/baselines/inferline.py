"""InferLine (SoCC'20): one configuration a module, downgraded greedily from the fastest.

Invariant: every state keeps every path within the objective and costs less than the one before.
"""

from __future__ import annotations

from math import inf

from paceline.planner.assemble import graph_of, infeasible
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE, Schedule, cheaper, ranked, schedule


def single_configurations(module: PlannedModule) -> list[Schedule]:
    """The module run in each of its configurations alone, round-robin; fastest first."""
    found = [
        schedule(module.rate_rps, (c,), inf, dispatch="round-robin", max_tuples=1)
        for c in ranked(module.configurations)
    ]
    alone = [each for each in found if each is not None]
    return sorted(alone, key=lambda each: (each.worst_s, each.cost_per_hour))


def inferline(chain: PlannedChain, options: Options) -> list[Schedule]:
    """Start fastest; again and again make the one change that lowers the cost most and fits."""
    graph = graph_of(chain)
    offers = [single_configurations(module) for module in chain.modules]
    now = [each[0] for each in offers]

    def latency_s(i: int, found: Schedule) -> float:
        return found.worst_s + chain.modules[i].overhead_s

    while True:
        latencies_s = [latency_s(i, found) for i, found in enumerate(now)]
        slacks_s = graph.slacks(latencies_s, chain.slo_s)
        if min(slacks_s) < -TOLERANCE:
            raise infeasible(chain, graph, latencies_s)
        best: tuple[float, int, Schedule] | None = None
        for i, each in enumerate(offers):
            for then in each:
                saving = now[i].cost_per_hour - then.cost_per_hour
                fits = latency_s(i, then) <= latencies_s[i] + slacks_s[i] + TOLERANCE
                if not fits or not cheaper(then.cost_per_hour, now[i].cost_per_hour):
                    continue
                if best is None or saving > best[0]:
                    best = (saving, i, then)
        if best is None:
            return now
        now[best[1]] = best[2]
