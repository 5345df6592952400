"""Nexus (SOSP'19): round-robin, two tuples, objective split by dynamic programming.

Invariant: budgets are whole multiples of the objective's `SEGMENTS`-th part. A frontier changes
only where a configuration comes in time, so its points rounded up stand for all the multiples.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from paceline.planner.assemble import graph_of, infeasible
from paceline.planner.compose import compose
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.residual import ModuleScheduler
from paceline.planner.schedule import TOLERANCE, Schedule
from paceline.planner.split import choices

SEGMENTS = 500
"""As in the published implementation (`dp_segments`)."""


def nexus(chain: PlannedChain, options: Options) -> list[Schedule]:
    """The cheapest split into multiples of the objective's 500th part."""
    graph = graph_of(chain)
    own = Options(dispatch="round-robin", max_tuples=2, dummy=False)
    frontiers = [choices(ModuleScheduler(m, own), chain.slo_s) for m in chain.modules]
    segment_s = chain.slo_s / SEGMENTS
    offers = []
    for frontier in frontiers:
        segments = [ceil(choice.latency_s / segment_s - TOLERANCE) for choice in frontier]
        # Counted in segments, so that sums are exact.
        latencies = np.array([float(count) for count in segments])
        offers.append((latencies, np.array([choice.cost_per_hour for choice in frontier])))
    found = compose(graph, offers, float(SEGMENTS))
    if found is None:
        least_s = [float(latencies[0]) * segment_s for latencies, _ in offers]
        raise infeasible(chain, graph, least_s)
    return [f[at].schedule for f, at in zip(frontiers, found.chosen, strict=True)]
