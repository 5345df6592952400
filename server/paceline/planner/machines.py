"""Plans in whole machines that modules and chains share (`--billing machine`, algorithms 1.4).

Invariant: every machine is paid for in full; each module's rate is served by full machines of its
own and shares of others; no more machines of a kind are used than its limit.

A module's full machines take batches from its queue at its whole rate (pooled), as in the optimum
for fractional machines; what they leave is packed (`pack`). Budgets are composed from what a module
costs within each: full machines, and what the rest is guessed to cost: a share of another machine
or, where that leaves no time for others, all of another. Several guesses are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf

import numpy as np

from paceline.core.errors import PlanError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Configuration
from paceline.planner.assemble import budgets_s, graph_of, infeasible
from paceline.planner.compose import compose, latency_prices
from paceline.planner.cycle import Load, together
from paceline.planner.frontier import Choice, Curve, Frontier
from paceline.planner.optimal import Optimum, optimum
from paceline.planner.pack import Machine, Packing, Shared, pack
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE
from paceline.planner.whole_bound import least_cost

POINTS = 48
"""How many latencies of a module are tried."""

MANY_CHAINS = 20


@dataclass(frozen=True, slots=True)
class _Guess:
    """What a share of a machine is taken to cost while budgets are chosen: `stretch` times what it
    keeps busy if it can wait for `waits` batches of its own length, else the whole machine."""

    stretch: float
    waits: float


GUESSES = (
    _Guess(1.2, inf),
    _Guess(1.2, 1.0),
    _Guess(1.2, 0.3),
    _Guess(1.6, 1.0),
    _Guess(3.0, 0.3),
    _Guess(inf, 0.0),
)
"""The best plan is kept. With many loads shared machines fill up well; a single chain's may stay
half empty."""

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
            self.choice.configuration.batch_size / self.module.rate_rps if self.full else 0.0,
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
    prices = {name: kind.price_per_hour for name, kind in kinds.items()}
    bound = least_cost(chains, prices) if options.bound else 0.0
    hints = [best.latencies_s for best in optima]
    for _ in range(ROUNDS):
        best: tuple[list[_Served], Packing, float] | None = None
        scarce: set[str] = set()
        known: _Known = {}
        for guess in GUESSES[: 1 if len(chains) >= MANY_CHAINS else None]:
            served = _serve(chains, kinds, factors, guess, hints, known)
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


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to serve a load on a shared machine: how busy it keeps it, and how long it can wait."""

    price_per_hour: float
    busy: float
    waits: float

    def cost(self, guess: _Guess) -> float:
        stretched = guess.stretch * self.busy if self.waits >= guess.waits else 1.0
        return min(1.0, stretched) * self.price_per_hour


_Known = dict[tuple[str, str, float], list[tuple[_Served, float, list[_Way]]]]
"""By chain, module and budget: full machines, what they cost, and ways to serve the rest."""


def _serve(
    chains: Sequence[PlannedChain],
    kinds: Mapping[str, Machine],
    factors: Mapping[str, float],
    guess: _Guess,
    hints: Sequence[Sequence[float]],
    known: _Known,
) -> list[_Served]:
    """Every module's budget and full machines, the cheapest if shares cost what `guess` says.

    `hints`: latencies worth trying."""
    found: list[_Served] = []
    for chain, hint in zip(chains, hints, strict=True):
        graph = graph_of(chain)
        frontiers = _frontiers(chain, kinds, factors)
        least_s = [frontier.least_s for frontier in frontiers]
        slacks_s = graph.slacks(least_s, chain.slo_s)
        if min(slacks_s) < -TOLERANCE:
            raise infeasible(chain, graph, least_s)
        options = [
            _options(chain.name, module, frontier, max(0.0, slack), guess, at, known)
            for module, frontier, slack, at in zip(
                chain.modules, frontiers, slacks_s, hint, strict=True
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
        each_s = budgets_s(graph, [each.budget_s for each in chosen], chain.slo_s)
        for served, budget_s in zip(chosen, each_s, strict=True):
            again = _best_at(chain.name, served.module, served.frontier, budget_s, guess, known)
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
    slack_s: float,
    guess: _Guess,
    hint_s: float,
    known: _Known,
) -> list[tuple[_Served, float]]:
    """What a module may take, with its cost; fastest first, each cheaper than the one before."""
    least_s, most_s = frontier.least_s, frontier.least_s + slack_s
    steps_s = np.geomspace(1e-3, 1.0, POINTS) * slack_s + least_s
    found: list[tuple[_Served, float]] = []
    for budget_s in sorted({least_s, min(max(hint_s, least_s), most_s), *steps_s.tolist()}):
        served, cost = _best_at(chain, module, frontier, budget_s, guess, known)
        if not found or cost < found[-1][1] * (1 - TOLERANCE):
            found.append((served, cost))
    return found


def _best_at(
    chain: str,
    module: PlannedModule,
    frontier: Frontier,
    budget_s: float,
    guess: _Guess,
    known: _Known,
) -> tuple[_Served, float]:
    """The cheapest hardware for the full machines of a module within a budget."""
    key = (chain, module.name, budget_s)
    if key not in known:
        known[key] = list(_ways(chain, module, frontier, budget_s))
    best: tuple[_Served, float] | None = None
    for served, full_cost, ways in known[key]:
        cost = full_cost + min((way.cost(guess) for way in ways), default=0.0)
        if best is None or cost < best[1] * (1 - TOLERANCE):
            best = (served, cost)
    assert best is not None, f"module {module.name}: nothing fits {budget_s} s"
    return best


def _ways(
    chain: str, module: PlannedModule, frontier: Frontier, budget_s: float
) -> Iterator[tuple[_Served, float, list[_Way]]]:
    """For each kind of full machines what they cost, ways for the rest."""
    for curve in frontier.curves:
        choice = Frontier(frontier.rate_rps, frontier.overhead_s, (curve,)).at(budget_s)
        if choice is None:
            continue
        full = floor(choice.machines + 1e-6)
        served = _Served(chain, module, frontier, budget_s, choice, full)
        ways: list[_Way] = []
        if served.rest_rps:
            load = served.load()
            ways = [way for c in frontier.curves for way in _shares(load, c)]
            ways.append(_Way(curve.price_per_hour, 1.0, 0.0))
        yield served, full * curve.price_per_hour, ways


def _shares(load: Load, curve: Curve) -> Iterator[_Way]:
    if curve.hardware not in load.durations_s:
        return
    if (cycle := together([load], curve.hardware)) is not None:
        yield _Way(curve.price_per_hour, cycle.busy, inf)
    for size in load.sizes(curve.hardware):
        if (busy := load.rate_rps * size.row_s) <= 1:
            yield _Way(curve.price_per_hour, busy, size.deadline_s / size.duration_s - 1)
    if load.alone(curve.hardware):
        yield _Way(curve.price_per_hour, 1.0, 0.0)


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


def _plan(
    chains: Sequence[PlannedChain],
    served: Sequence[_Served],
    packing: Packing,
    kinds: Mapping[str, Machine],
    bound: float,
) -> Plan:
    shares: dict[tuple[str, str], list[tuple[Shared, int]]] = {}
    for each in packing.shared:
        for at, load in enumerate(each.loads):
            shares.setdefault((load.chain, load.module), []).append((each, at))
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
        modules = tuple(
            _module_plan(s, shares.get((s.chain, s.module.name), ()), kinds) for s in own
        )
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
    if each.cycle is None and each.due is not None:
        own = each.sizes[at]
        return own.batch_size, own.duration_s, each.loads[at].budget_s
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
    s: _Served, shares: Sequence[tuple[Shared, int]], kinds: Mapping[str, Machine]
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
    for each, at in shares:
        size, duration_s, latency_s = _run(each, at, s)
        machines = each.loads[at].rate_rps * duration_s / size
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
