"""Clipper (NSDI'17): one configuration a module, the objective split evenly.

Invariant: a module's share is the objective over the number of modules on its longest path, so
the shares on any path add up to the objective at most.
"""

from __future__ import annotations

from paceline.core.errors import PlanError
from paceline.planner.assemble import graph_of
from paceline.planner.baselines.inferline import single_configurations
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.schedule import TOLERANCE, Schedule


def clipper(chain: PlannedChain, options: Options) -> list[Schedule]:
    """The cheapest configuration of every module within its even share."""
    lengths = graph_of(chain).through([1.0] * len(chain.modules))
    found: list[Schedule] = []
    for module, length in zip(chain.modules, lengths, strict=True):
        share_s = chain.slo_s / length
        offers = single_configurations(module)
        lacking_s = offers[0].worst_s + module.overhead_s - share_s
        if lacking_s > TOLERANCE:
            raise PlanError(
                f"chain {chain.name!r}: module {module.name} needs {lacking_s * 1e3:.3g} ms more "
                f"than its even share of {share_s * 1e3:.3g} ms; raise slo_ms, or take a policy "
                "that splits it otherwise",
                chain=chain.name,
                module=module.name,
                lacking_s=lacking_s * length,
            )
        within = [s for s in offers if s.worst_s + module.overhead_s <= share_s + TOLERANCE]
        found.append(min(within, key=lambda each: each.cost_per_hour))
    return found
