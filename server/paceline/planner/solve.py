"""The planner's entry point: demand in, plan out.

Invariant: a plan that is returned serves every module's whole rate, keeps every path of every
chain within its objective, and costs no less than its lower bound.

Every policy plans under the same cost model and is told the same lower bound: what no policy can
do for less, whatever batch sizes it uses (`optimal`).

>>> m3 = tuple(Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8)))
>>> chain = PlannedChain("m3", 1.0, 198.0, (PlannedModule("m3", "m3", 198.0, (), m3),))
>>> def cost(**options): return round(solve([chain], Options(**options)).cost_per_hour, 9)
>>> cost(dispatch="round-robin", max_tuples=2, dummy=False)
6.3
>>> cost(max_tuples=2, dummy=False), cost(dummy=False), cost()
(5.9, 5.3, 5.0)
>>> cost(dispatch="pooled"), round(solve([chain]).lower_bound_per_hour, 9)
(4.95, 4.95)
>>> cost(policy="nexus"), cost(policy="scrooge"), cost(policy="clipper"), cost(policy="optimal")
(6.3, 5.9, 9.9, 4.95)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf

from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import ChainPlan, Plan
from paceline.core.profile import Configuration
from paceline.planner.assemble import chain_plan, graph_of, infeasible
from paceline.planner.baselines.clipper import clipper
from paceline.planner.baselines.inferline import inferline
from paceline.planner.baselines.nexus import nexus
from paceline.planner.baselines.scrooge import scrooge
from paceline.planner.fits import usable, with_left_out
from paceline.planner.frontier import Choice, Frontier
from paceline.planner.harpagon import harpagon
from paceline.planner.machines import whole_machines
from paceline.planner.optimal import Optimum, optimum
from paceline.planner.problem import Options, PlannedChain, PlannedModule, demand
from paceline.planner.rounded import rounded
from paceline.planner.schedule import Placement, Schedule
from paceline.planner.whole_bound import least_cost_within

__all__ = [
    "HEURISTICS",
    "POLICIES",
    "Configuration",
    "Options",
    "PlannedChain",
    "PlannedModule",
    "demand",
    "solve",
]

POLICIES = ("optimal", "harpagon", "nexus", "scrooge", "inferline", "clipper")

HEURISTICS: Mapping[str, Callable[[PlannedChain, Options], list[Schedule]]] = {
    "harpagon": harpagon,
    "nexus": nexus,
    "scrooge": scrooge,
    "inferline": inferline,
    "clipper": clipper,
}


def solve(chains: Sequence[PlannedChain], options: Options = Options()) -> Plan:  # noqa: B008
    """The cheapest plan found for `chains`; `solve_s` is left at 0.

    Raises PlanError when a chain cannot keep its objective (which module lacks how many
    milliseconds) or fits into no machine, and ConfigError for an unknown policy.
    """
    if options.policy not in POLICIES:
        raise ConfigError(
            f"unknown policy {options.policy!r}; choose one of {', '.join(sorted(POLICIES))}",
            key="policy",
        )
    left = usable(chains, options)
    try:
        return _solve(left, options)
    except PlanError as error:
        raise with_left_out(error, chains, options) from None


def _solve(chains: Sequence[PlannedChain], options: Options) -> Plan:
    """On the hardware that chains are left with."""
    if options.billing == "machine":
        bound = _whole_bound(chains, options) if options.bound else 0.0
        return replace(_whole(chains, options), lower_bound_per_hour=bound)
    planned = [_solve_chain(chain, options) for chain in chains]
    return Plan(
        policy=options.policy,
        billing="fractional",
        chains=tuple(plan for plan, _ in planned),
        lower_bound_per_hour=sum(bound for _, bound in planned),
    )


def _whole(chains: Sequence[PlannedChain], options: Options) -> Plan:
    """In whole machines; `optimal` is no dearer than any other policy, as theirs are tried as well:
    what is best in fractions need not leave the best loads to pack.
    """
    if options.policy != "optimal":
        plan = _by_policy(chains, options)
        assert plan is not None, f"{options.policy}: nothing is below infinity"
        return plan
    best: Plan | None = None
    refusal: PlanError | None = None
    try:
        best = whole_machines(chains, options)
    except PlanError as error:
        refusal = error
    for policy in HEURISTICS:
        below = inf if best is None else best.cost_per_hour
        try:
            other = _by_policy(chains, replace(options, policy=policy), below)
        except PlanError:
            continue
        if other is not None:
            best = replace(other, policy="optimal")
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def _by_policy(chains: Sequence[PlannedChain], options: Options, below: float = inf) -> Plan | None:
    """A published policy's plan in whole machines; None where it costs no less than `below`."""
    schedules = [HEURISTICS[options.policy](chain, options) for chain in chains]
    return rounded(chains, schedules, options, below)


def _whole_bound(chains: Sequence[PlannedChain], options: Options) -> float:
    configurations = (c for chain in chains for m in chain.modules for c in m.configurations)
    prices = {c.hardware: c.price_per_hour for c in configurations}
    return least_cost_within(chains, prices, options.machine_limits)


def _solve_chain(chain: PlannedChain, options: Options) -> tuple[ChainPlan, float]:
    graph = graph_of(chain)
    best = None
    if options.bound or options.policy == "optimal":
        frontiers = [Frontier.of(m.configurations, m.rate_rps, m.overhead_s) for m in chain.modules]
        best = optimum(graph, frontiers, chain.slo_s)
    if options.policy != "optimal":
        schedules = HEURISTICS[options.policy](chain, options)
    elif best is not None:
        schedules = optimal_schedules(chain, best)
    else:
        raise infeasible(chain, graph, [frontier.least_s for frontier in frontiers])
    bound = best.bound_per_hour if best is not None and options.bound else 0.0
    return chain_plan(chain, graph, schedules), bound


def optimal_schedules(chain: PlannedChain, best: Optimum) -> list[Schedule]:
    """The optimum's choices as schedules of one placement each."""
    return [_single(m.rate_rps, c) for m, c in zip(chain.modules, best.choices, strict=True)]


def _single(rate_rps: float, choice: Choice) -> Schedule:
    placement = Placement(choice.configuration, choice.machines, choice.worst_s)
    return Schedule(rate_rps, choice.total_rps - rate_rps, (placement,))
