"""A cost that no plan can go below, to say how far a plan is from it.

Invariant: it holds for every dispatch policy, any mix of tuples and any number of dummy requests,
given the configurations, because each relaxes to the same: a batch cannot fill faster than the
whole rate arrives, and a request costs at least what the best configuration in use asks for it.
"""

from __future__ import annotations

from math import inf

from paceline.core.profile import Configuration
from paceline.planner.paths import Graph
from paceline.planner.problem import PlannedChain
from paceline.planner.schedule import TOLERANCE


def lower_bound_per_hour(chain: PlannedChain, graph: Graph) -> float:
    """Sum over modules of the least cost when all others are as fast as they can be.

    0 when no module can keep the objective at any cost.
    """
    least_s = [
        min(c.duration_s for c in module.configurations) + module.overhead_s
        for module in chain.modules
    ]
    slacks_s = graph.slacks(least_s, chain.slo_s)
    total = 0.0
    for i, module in enumerate(chain.modules):
        budget_s = least_s[i] + slacks_s[i] - module.overhead_s
        cost = min(_at_best(c, module.rate_rps, budget_s) for c in module.configurations)
        total += cost if cost < inf else 0.0
    return total


def _at_best(c: Configuration, rate_rps: float, budget_s: float) -> float:
    """Least cost of any schedule whose best configuration is `c`.

    Its batches fill in time only if b / (budget - d) requests/s or more are served, with dummies.
    """
    spare_s = budget_s - c.duration_s + TOLERANCE
    if spare_s <= 0:
        return inf
    needed_rps = 0.0 if c.batch_size == 1 else c.batch_size / spare_s
    return max(rate_rps, needed_rps) / c.tc_ratio
