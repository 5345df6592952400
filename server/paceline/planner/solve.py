"""The planner's entry point: demand in, plan out.

Invariant: a plan that is returned serves every module's whole rate, keeps every path of every
chain within its objective, and costs no less than its lower bound.

Harpagon's heuristics can mislead each other (a cheaper choice for one module may end the climb
earlier), so `solve` also plans without dummy requests and with two tuples, and keeps the cheapest:
no option makes a plan costlier by being on, nor does lifting a limit of one or two tuples.

>>> m3 = tuple(Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8)))
>>> chain = PlannedChain("m3", 1.0, 198.0, (PlannedModule("m3", "m3", 198.0, (), m3),))
>>> def cost(**options): return round(solve([chain], Options(**options)).cost_per_hour, 9)
>>> cost(dispatch="round-robin", max_tuples=2, dummy=False)
6.3
>>> cost(max_tuples=2, dummy=False), cost(dummy=False), cost()
(5.9, 5.3, 5.0)
>>> cost(dispatch="pooled"), round(solve([chain]).lower_bound_per_hour, 9)
(4.95, 4.95)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.profile import Configuration
from paceline.planner.bound import lower_bound_per_hour
from paceline.planner.paths import Graph
from paceline.planner.problem import Options, PlannedChain, PlannedModule, demand
from paceline.planner.residual import ModuleScheduler, reassign
from paceline.planner.schedule import TOLERANCE, Schedule, cheaper
from paceline.planner.split import choices, split

__all__ = [
    "Configuration",
    "Options",
    "PlannedChain",
    "PlannedModule",
    "demand",
    "solve",
]


def solve(chains: Sequence[PlannedChain], options: Options = Options()) -> Plan:  # noqa: B008
    """The cheapest plan found for `chains`; machines are fractional and `solve_s` is left at 0.

    Raises PlanError when a chain cannot keep its objective (which module lacks how many
    milliseconds) and ConfigError for an unknown policy.
    """
    plan_chain = POLICIES.get(options.policy)
    if plan_chain is None:
        raise ConfigError(
            f"unknown policy {options.policy!r}; choose one of {', '.join(sorted(POLICIES))}",
            key="policy",
        )
    return Plan(
        policy=options.policy,
        billing="fractional",
        chains=tuple(plan_chain(chain, options) for chain in chains),
        lower_bound_per_hour=sum(lower_bound_per_hour(chain, graph_of(chain)) for chain in chains),
    )


def graph_of(chain: PlannedChain) -> Graph:
    """The chain's DAG by index of its modules."""
    index = {module.name: i for i, module in enumerate(chain.modules)}
    return Graph.of([[index[parent] for parent in module.parents] for module in chain.modules])


def harpagon(chain: PlannedChain, options: Options) -> ChainPlan:
    """Split the objective, schedule every module, reassign what is left; the cheapest way wins."""
    graph = graph_of(chain)
    best: list[Schedule] | None = None
    best_cost = 0.0
    for variant in _variants(options):
        schedulers = [ModuleScheduler(module, variant) for module in chain.modules]
        frontiers = [choices(scheduler, chain.slo_s) for scheduler in schedulers]
        ends = split(
            graph,
            frontiers,
            chain.slo_s,
            node_merger=options.node_merger,
            cost_direct=options.cost_direct,
        )
        for end in ends:
            found = [frontier[at].schedule for frontier, at in zip(frontiers, end, strict=True)]
            if options.reassign:
                found = reassign(graph, chain.slo_s, schedulers, found)
            cost = sum(s.cost_per_hour for s in found)
            if best is None or cheaper(cost, best_cost):
                best, best_cost = found, cost
    if best is None:
        schedulers = [ModuleScheduler(module, options) for module in chain.modules]
        least_s = [choices(scheduler, chain.slo_s)[0].latency_s for scheduler in schedulers]
        raise infeasible(chain, graph, least_s)
    return chain_plan(chain, graph, best)


def _variants(options: Options) -> Iterator[Options]:
    """The options, then with the parts of module scheduling left out that can mislead a split."""
    tuples = (None, 2) if options.max_tuples is None else (options.max_tuples,)
    for max_tuples in tuples:
        for dummy in (True, False) if options.dummy else (False,):
            yield replace(options, max_tuples=max_tuples, dummy=dummy)


POLICIES: Mapping[str, Callable[[PlannedChain, Options], ChainPlan]] = {"harpagon": harpagon}


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
        f"its slo_ms {_ms(chain.slo_s)}; slowest path {steps}; largest share: {name}",
        chain=chain.name,
        module=name,
        lacking_s=lacking_s,
    )


def chain_plan(chain: PlannedChain, graph: Graph, schedules: Sequence[Schedule]) -> ChainPlan:
    """The plan that gives every module its schedule, and a budget from all of the objective."""
    latencies_s = [
        s.worst_s + module.overhead_s for module, s in zip(chain.modules, schedules, strict=True)
    ]
    budgets_s = _budgets_s(graph, latencies_s, chain.slo_s)
    return ChainPlan(
        chain=chain.name,
        slo_s=chain.slo_s,
        rate_rps=chain.rate_rps,
        latency_worst_s=graph.longest(latencies_s),
        modules=tuple(
            _module_plan(module, schedules[i], latencies_s[i], budgets_s[i])
            for i, module in enumerate(chain.modules)
        ),
    )


def _budgets_s(graph: Graph, latencies_s: Sequence[float], slo_s: float) -> list[float]:
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
