"""Harpagon: dispatch bounds, scheduling and splitting together (arXiv 2412.06161).

Invariant: no option makes a plan costlier by being on (splitting by efficiency aside, which is a
heuristic, and `strict`), nor does lifting a limit of one or two tuples. The heuristics can mislead
each other (a cheaper choice for one module may end the climb earlier), so it also plans without
dummy requests and with two tuples, and keeps the cheapest. `strict` does neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paceline.planner.assemble import graph_of, infeasible
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.residual import ModuleScheduler, reassign, unhurried
from paceline.planner.schedule import Schedule, cheaper
from paceline.planner.split import choices, in_proportion, split


def harpagon(chain: PlannedChain, options: Options) -> list[Schedule]:
    """Split the objective, schedule every module, reassign what is left; the cheapest way wins."""
    graph = graph_of(chain)
    best: list[Schedule] | None = None
    best_cost = 0.0
    for variant in _variants(options):
        schedulers = [ModuleScheduler(module, variant) for module in chain.modules]
        frontiers = [choices(scheduler, chain.slo_s) for scheduler in schedulers]
        if options.efficiency:
            ends = split(
                graph,
                frontiers,
                chain.slo_s,
                node_merger=options.node_merger,
                cost_direct=options.cost_direct,
            )
        else:
            ends = in_proportion(graph, frontiers, chain.slo_s)
        for end in ends:
            found = [frontier[at].schedule for frontier, at in zip(frontiers, end, strict=True)]
            if options.reassign:
                found = reassign(graph, chain.slo_s, schedulers, found)
            cost = sum(s.cost_per_hour for s in found)
            if best is None or cheaper(cost, best_cost):
                best = unhurried(graph, chain.slo_s, schedulers, found)
                best_cost = cost
    if best is None:
        schedulers = [ModuleScheduler(module, options) for module in chain.modules]
        least_s = [choices(scheduler, chain.slo_s)[0].latency_s for scheduler in schedulers]
        raise infeasible(chain, graph, least_s)
    return best


def _variants(options: Options) -> Iterator[Options]:
    """The options, then with the parts of module scheduling left out that can mislead a split."""
    if options.strict:
        yield options
        return
    tuples = (None, 2) if options.max_tuples is None else (options.max_tuples,)
    for max_tuples in tuples:
        for dummy in (True, False) if options.dummy else (False,):
            yield replace(options, max_tuples=max_tuples, dummy=dummy)
