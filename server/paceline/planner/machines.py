"""Plans in whole machines that modules and chains share (`--billing machine`, algorithms 1.4).

Invariant: every machine is paid for in full; each module's rate is served by full machines of its
own and at most one share of another; no more machines of a kind are used than its limit.

A module's full machines take batches from its queue at its whole rate (pooled), as in the optimum
for fractional machines; what they leave is packed. Budgets are composed from what a module costs
within each: full machines, and a share of another or, where that leaves no time for others, all of
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf

import numpy as np

from paceline.core.errors import PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Configuration
from paceline.planner.assemble import budgets_s, graph_of, infeasible
from paceline.planner.compose import compose, latency_prices
from paceline.planner.frontier import Choice, Frontier
from paceline.planner.optimal import Optimum, optimum
from paceline.planner.pack import Load, Machine, Packing, Shared, pack, together
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE

POINTS = (48, 24)
"""How many latencies of a module are tried: with few chains, with many."""

MANY_CHAINS = 20
STRETCHES = (1.2, 1.6, inf)
"""How much more than it keeps busy a share of a machine is taken to cost; the best plan is kept.

With many loads shared machines fill up well; a single chain's may stay half empty.
"""

ROUNDS = 12
"""How often machines over their limit are made dearer for planning, before giving up."""


@dataclass(frozen=True, slots=True)
class _Served:
    """One module: its budget, its full machines, and the load that is left (0: none)."""

    chain: str
    module: PlannedModule
    frontier: Frontier
    budget_s: float
    choice: Choice
    full: int

    @property
    def rest_rps(self) -> float:
        """Real requests that the full machines leave."""
        full_rps = self.full * self.choice.configuration.throughput_rps
        rest_rps = self.module.rate_rps * (1 - full_rps / self.choice.total_rps)
        return rest_rps if rest_rps > TOLERANCE * self.module.rate_rps else 0.0

    def load(self) -> Load:
        within_s = self.budget_s - self.module.overhead_s
        curves = [c for c in self.frontier.curves if c.duration_s[0] < within_s]
        return Load(
            self.chain,
            self.module.name,
            self.module.model,
            self.rest_rps,
            self.module.rate_rps,
            within_s,
            {c.hardware: c.duration_s.tolist() for c in curves},
            self.module.memory_bytes,
            self.choice.configuration.hardware,
        )


def whole_machines(chains: Sequence[PlannedChain], options: Options) -> Plan:
    """The cheapest plan found in whole machines. Raises PlanError: objective, memory or limit."""
    kinds = {
        c.hardware: Machine(
            c.hardware,
            c.price_per_hour,
            options.memory_bytes.get(c.hardware, 0),
            options.machine_limits.get(c.hardware, inf),
        )
        for chain in chains
        for module in chain.modules
        for c in module.configurations
    }
    factors = dict.fromkeys(kinds, 1.0)
    optima = [_fractional(chain, _frontiers(chain, kinds, factors)) for chain in chains]
    fractional = sum(best.bound_per_hour for best in optima)
    bound = least_price(fractional, [kind.price_per_hour for kind in kinds.values()])
    hints = [best.latencies_s for best in optima]
    for _ in range(ROUNDS):
        best: tuple[list[_Served], Packing, float] | None = None
        scarce: set[str] = set()
        for stretch in STRETCHES[: 3 if len(chains) < MANY_CHAINS else 2]:
            served = _serve(chains, kinds, factors, stretch, hints)
            used = _full_machines(served)
            over = {name for name, count in used.items() if count > kinds[name].limit}
            if not over:
                packing = pack([s.load() for s in served if s.rest_rps], kinds, used)
                if packing is not None:
                    cost = packing.cost_per_hour + _full_cost(used, kinds)
                    if best is None or cost < best[2] * (1 - TOLERANCE):
                        best = (served, packing, cost)
                    continue
                over = {name for name, kind in kinds.items() if used.get(name, 0) >= kind.limit}
            scarce |= over or {name for name, kind in kinds.items() if kind.limit < inf}
        if best is not None:
            return _plan(chains, best[0], best[1], kinds, bound)
        if not scarce:
            break
        for name in scarce:
            factors[name] *= 1.5
    raise _short(kinds)


def _fractional(chain: PlannedChain, frontiers: Sequence[Frontier]) -> Optimum:
    """The least that the chain costs if parts of machines could be paid for."""
    graph = graph_of(chain)
    best = optimum(graph, frontiers, chain.slo_s)
    if best is None:
        raise infeasible(chain, graph, [frontier.least_s for frontier in frontiers])
    return best


def _full_cost(used: Mapping[str, int], kinds: Mapping[str, Machine]) -> float:
    return sum(count * kinds[name].price_per_hour for name, count in used.items())


def _short(kinds: Mapping[str, Machine]) -> PlanError:
    limits = ", ".join(f"{k.limit:g} x {n}" for n, k in sorted(kinds.items()) if k.limit < inf)
    return PlanError(
        f"the machines do not suffice ({limits or 'memory'}): allow more of them, a lower rate or "
        "a longer slo_ms"
    )


def _serve(
    chains: Sequence[PlannedChain],
    kinds: Mapping[str, Machine],
    factors: Mapping[str, float],
    stretch: float,
    hints: Sequence[Sequence[float]],
) -> list[_Served]:
    """Every module's budget and full machines, the cheapest if a share costs `stretch` times
    what it keeps busy, and at most a whole machine. `hints`: latencies worth trying."""
    points = POINTS[len(chains) >= MANY_CHAINS]
    found: list[_Served] = []
    for chain, hint in zip(chains, hints, strict=True):
        graph = graph_of(chain)
        frontiers = _frontiers(chain, kinds, factors)
        least_s = [frontier.least_s for frontier in frontiers]
        slacks_s = graph.slacks(least_s, chain.slo_s)
        if min(slacks_s) < -TOLERANCE:
            raise infeasible(chain, graph, least_s)
        options = [
            _options(chain.name, module, frontier, least + max(0.0, slack), stretch, at, points)
            for module, frontier, least, slack, at in zip(
                chain.modules, frontiers, least_s, slacks_s, hint, strict=True
            )
        ]
        offers = [
            (np.array([o.budget_s for o, _ in each]), np.array([cost for _, cost in each]))
            for each in options
        ]
        prices = latency_prices(graph, offers, chain.slo_s)
        best = compose(graph, offers, chain.slo_s, prices=prices)
        assert best is not None, f"chain {chain.name!r}: every module at its least did not fit"
        chosen = [each[at][0] for each, at in zip(options, best.chosen, strict=True)]
        latencies_s = [each.budget_s for each in chosen]
        for served, budget_s in zip(
            chosen, budgets_s(graph, latencies_s, chain.slo_s), strict=True
        ):
            again = _best_at(chain.name, served.module, served.frontier, budget_s, stretch)
            found.append(again[0])
    return found


def _frontiers(
    chain: PlannedChain, kinds: Mapping[str, Machine], factors: Mapping[str, float]
) -> list[Frontier]:
    return [
        Frontier.of(_priced(m.configurations, kinds, factors), m.rate_rps, m.overhead_s)
        for m in chain.modules
    ]


def _options(
    chain: str,
    module: PlannedModule,
    frontier: Frontier,
    most_s: float,
    stretch: float,
    hint_s: float,
    points: int,
) -> list[tuple[_Served, float]]:
    """What a module may take, with its cost; fastest first, each cheaper than the one before."""
    least_s = frontier.least_s
    steps_s = np.geomspace(1e-3, 1.0, points) * (most_s - least_s) + least_s
    found: list[tuple[_Served, float]] = []
    for budget_s in sorted({least_s, min(max(hint_s, least_s), most_s), *steps_s.tolist()}):
        served, cost = _best_at(chain, module, frontier, budget_s, stretch)
        if not found or cost < found[-1][1] * (1 - TOLERANCE):
            found.append((served, cost))
    return found


def _best_at(
    chain: str, module: PlannedModule, frontier: Frontier, budget_s: float, stretch: float
) -> tuple[_Served, float]:
    """The cheapest hardware for the full machines of a module within a budget."""
    best: tuple[_Served, float] | None = None
    for curve in frontier.curves:
        choice = Frontier(frontier.rate_rps, frontier.overhead_s, (curve,)).at(budget_s)
        if choice is None:
            continue
        full = floor(choice.machines + 1e-6)
        served = _Served(chain, module, frontier, budget_s, choice, full)
        cost = full * curve.price_per_hour
        if served.rest_rps:
            cost += _share_price(served.load(), frontier, curve.price_per_hour, stretch)
        if best is None or cost < best[1] * (1 - TOLERANCE):
            best = (served, cost)
    assert best is not None, f"module {module.name}: nothing fits {budget_s} s"
    return best


def _share_price(load: Load, frontier: Frontier, alone: float, stretch: float) -> float:
    """What a load may cost on a shared machine, or at most on a machine of its own."""
    best = alone
    for curve in frontier.curves:
        cycle = together([load], curve.hardware) if curve.hardware in load.durations_s else None
        if cycle is not None:
            best = min(best, min(1.0, stretch * cycle.busy) * curve.price_per_hour)
        elif load.alone(curve.hardware):
            best = min(best, curve.price_per_hour)
    return best


def _priced(
    configurations: Sequence[Configuration],
    kinds: Mapping[str, Machine],
    factors: Mapping[str, float],
) -> list[Configuration]:
    """At planning prices; machines that there are none of are left out if others do."""
    there = [c for c in configurations if kinds[c.hardware].limit >= 1]
    return [
        replace(c, price_per_hour=kinds[c.hardware].price_per_hour * factors[c.hardware])
        for c in there or configurations
    ]


def _full_machines(served: Sequence[_Served]) -> dict[str, int]:
    used: dict[str, int] = {}
    for each in served:
        hardware = each.choice.configuration.hardware
        used[hardware] = used.get(hardware, 0) + each.full
    return used


def least_price(cost: float, prices: Sequence[float]) -> float:
    """The least sum of whole machines' prices that is not below `cost`.

    >>> least_price(4.1, [3.06, 0.526]), least_price(0.2, [3.06, 0.526]), least_price(0.0, [1.0])
    (4.112, 0.526, 0.0)
    """
    if cost <= 0:
        return 0.0
    kinds = sorted(set(prices), reverse=True)
    if cost > 40 * kinds[-1]:
        # So many ways to add up that some sum is just above.
        return cost
    best = ceil(cost / kinds[-1] - TOLERANCE) * kinds[-1]

    def add(at: int, total: float) -> None:
        nonlocal best
        if total >= cost * (1 - TOLERANCE):
            best = min(best, total)
            return
        if at + 1 == len(kinds):
            best = min(best, total + ceil((cost - total) / kinds[at] - TOLERANCE) * kinds[at])
            return
        for count in range(ceil((cost - total) / kinds[at] - TOLERANCE) + 1):
            add(at + 1, total + count * kinds[at])

    add(0, 0.0)
    return best


def _plan(
    chains: Sequence[PlannedChain],
    served: Sequence[_Served],
    packing: Packing,
    kinds: Mapping[str, Machine],
    bound: float,
) -> Plan:
    shares = {
        (load.chain, load.module): (each, at)
        for each in packing.shared
        for at, load in enumerate(each.loads)
    }
    machines = [
        PackedMachine(
            s.choice.configuration.hardware,
            kinds[s.choice.configuration.hardware].price_per_hour,
            (_full_share(s),),
            s.module.memory_bytes.get(s.choice.configuration.hardware, 0),
        )
        for s in served
        for _ in range(s.full)
    ]
    machines += [_shared_machine(each, served) for each in packing.shared]
    plans = []
    for chain in chains:
        own = [s for s in served if s.chain == chain.name]
        modules = tuple(_module_plan(s, shares.get((s.chain, s.module.name)), kinds) for s in own)
        worst_s = graph_of(chain).longest([m.latency_worst_s for m in modules])
        plans.append(ChainPlan(chain.name, chain.slo_s, chain.rate_rps, worst_s, modules))
    return Plan("optimal", "machine", tuple(plans), bound, machines=tuple(machines))


def _full_share(s: _Served) -> Share:
    utilisation = s.module.rate_rps / s.choice.total_rps
    return Share(s.chain, s.module.name, s.choice.configuration.batch_size, utilisation)


def _shared_machine(each: Shared, served: Sequence[_Served]) -> PackedMachine:
    by_name = {(s.chain, s.module.name): s for s in served}
    shares: list[Share] = []
    for at, load in enumerate(each.loads):
        size, duration_s, _ = _run(each, at, by_name[load.chain, load.module])
        busy = load.rate_rps * duration_s / size
        shares.append(
            Share(
                load.chain,
                load.module,
                size,
                busy,
                0.0 if each.cycle is None else each.cycle.duration_s,
            )
        )
    return PackedMachine(
        each.machine.hardware, each.machine.price_per_hour, tuple(shares), each.memory_bytes
    )


def _run(each: Shared, at: int, s: _Served) -> tuple[int, float, float]:
    """Batch size, duration and worst case of one load on a shared machine."""
    if each.cycle is None and not each.batch_size:
        c = s.choice.configuration
        return c.batch_size, c.duration_s, s.choice.worst_s
    if each.cycle is None:
        size, load = each.batch_size, each.loads[at]
        duration_s = load.durations_s[each.machine.hardware][size - 1]
        return size, duration_s, duration_s + (0.0 if size == 1 else size / load.total_rps)
    size = each.cycle.batch_sizes[at]
    duration_s = each.loads[at].durations_s[each.machine.hardware][size - 1]
    return size, duration_s, each.loads[at].worst_s(each.cycle.duration_s, duration_s)


def _module_plan(
    s: _Served, share: tuple[Shared, int] | None, kinds: Mapping[str, Machine]
) -> ModulePlan:
    c = s.choice.configuration
    allocations: list[Allocation] = []
    worst_s = 0.0
    dummy_rps = 0.0
    if s.full:
        price = kinds[c.hardware].price_per_hour
        allocations.append(Allocation(c.hardware, c.batch_size, c.duration_s, float(s.full), price))
        worst_s = s.choice.worst_s
        dummy_rps = s.full * c.throughput_rps * (1 - s.module.rate_rps / s.choice.total_rps)
    if share is not None:
        each, at = share
        size, duration_s, latency_s = _run(each, at, s)
        machines = s.rest_rps * duration_s / size
        allocations.append(
            Allocation(
                each.machine.hardware, size, duration_s, machines, each.machine.price_per_hour
            )
        )
        worst_s = max(worst_s, latency_s)
    return ModulePlan(
        module=s.module.name,
        model=s.module.model,
        rate_rps=s.module.rate_rps,
        dummy_rps=dummy_rps,
        latency_budget_s=s.budget_s,
        latency_worst_s=worst_s + s.module.overhead_s,
        allocations=tuple(allocations),
    )
