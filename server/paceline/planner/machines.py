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

from paceline.core.plan import Plan
from paceline.core.profile import Configuration
from paceline.planner.assemble import budgets_s, graph_of, infeasible
from paceline.planner.columns import packed
from paceline.planner.compose import compose
from paceline.planner.cycle import Load, together
from paceline.planner.fits import too_few
from paceline.planner.frontier import Choice, Curve, Frontier
from paceline.planner.optimal import Optimum, optimum
from paceline.planner.pack import Machine, Packing
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.relaxed import latency_prices
from paceline.planner.schedule import TOLERANCE
from paceline.planner.whole_plan import (
    Full,
    Served,
    assembled,
    full_machines,
    kinds_of,
)

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
"""The best plan is kept. A single chain's shared machines may stay half empty."""

MANY_GUESS = _Guess(1.1, inf)
"""With many loads shared machines fill up well."""

ROUNDS = 12
"""How often machines over their limit are made dearer for planning, before giving up."""


def whole_machines(chains: Sequence[PlannedChain], options: Options) -> Plan:
    """The cheapest plan found in whole machines. Raises PlanError: objective, memory or limit."""
    kinds = kinds_of(chains, options)
    factors = dict.fromkeys(kinds, 1.0)
    optima = [_fractional(chain, _frontiers(chain, kinds, factors)) for chain in chains]
    hints = [best.latencies_s for best in optima]
    for _ in range(ROUNDS):
        best: tuple[list[Served], Packing, float] | None = None
        scarce: set[str] = set()
        known: _Known = {}
        for guess in (MANY_GUESS,) if len(chains) >= MANY_CHAINS else GUESSES:
            served = _serve(chains, kinds, factors, guess, hints, known)
            used = full_machines(served)
            over = {name for name, count in used.items() if count > kinds[name].limit}
            if not over:
                packing = packed([s.load() for s in served if s.rest_rps], kinds, used)
                if packing is not None:
                    cost = packing.cost_per_hour + _full_cost(used, kinds)
                    if best is None or cost < best[2] * (1 - TOLERANCE):
                        best = (served, packing, cost)
                    continue
                over = {name for name, kind in kinds.items() if used.get(name, 0) >= kind.limit}
            scarce |= over or {name for name, kind in kinds.items() if kind.limit < inf}
        if best is not None:
            return assembled(chains, best[0], best[1], kinds, options.policy)
        if not scarce:
            break
        for name in scarce:
            factors[name] *= 1.5
    raise too_few(chains, options)


def _fractional(chain: PlannedChain, frontiers: Sequence[Frontier]) -> Optimum:
    """The least that the chain costs if parts of machines could be paid for."""
    graph = graph_of(chain)
    best = optimum(graph, frontiers, chain.slo_s)
    if best is None:
        raise infeasible(chain, graph, [frontier.least_s for frontier in frontiers])
    return best


def _full_cost(used: Mapping[str, int], kinds: Mapping[str, Machine]) -> float:
    return sum(count * kinds[name].price_per_hour for name, count in used.items())


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to serve a load on a shared machine: how busy it keeps it, and how long it can wait."""

    price_per_hour: float
    busy: float
    waits: float

    def cost(self, guess: _Guess) -> float:
        stretched = guess.stretch * self.busy if self.waits >= guess.waits else 1.0
        return min(1.0, stretched) * self.price_per_hour


_Known = dict[tuple[str, str, float], list[tuple[Served, float, list[_Way]]]]
"""By chain, module and budget: full machines, what they cost, and ways to serve the rest."""


def _serve(
    chains: Sequence[PlannedChain],
    kinds: Mapping[str, Machine],
    factors: Mapping[str, float],
    guess: _Guess,
    hints: Sequence[Sequence[float]],
    known: _Known,
) -> list[Served]:
    """Every module's budget and full machines, the cheapest if shares cost what `guess` says.

    `hints`: latencies worth trying."""
    found: list[Served] = []
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
) -> list[tuple[Served, float]]:
    """What a module may take, with its cost; fastest first, each cheaper than the one before."""
    least_s, most_s = frontier.least_s, frontier.least_s + slack_s
    steps_s = np.geomspace(1e-3, 1.0, POINTS) * slack_s + least_s
    found: list[tuple[Served, float]] = []
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
) -> tuple[Served, float]:
    """The cheapest hardware for the full machines of a module within a budget."""
    key = (chain, module.name, budget_s)
    if key not in known:
        known[key] = list(_ways(chain, module, frontier, budget_s))
    best: tuple[Served, float] | None = None
    for served, full_cost, ways in known[key]:
        cost = full_cost + min((way.cost(guess) for way in ways), default=0.0)
        if best is None or cost < best[1] * (1 - TOLERANCE):
            best = (served, cost)
    assert best is not None, f"module {module.name}: nothing fits {budget_s} s"
    return best


def _ways(
    chain: str, module: PlannedModule, frontier: Frontier, budget_s: float
) -> Iterator[tuple[Served, float, list[_Way]]]:
    """For each kind of full machines what they cost, ways for the rest."""
    for curve in frontier.curves:
        choice = Frontier(frontier.rate_rps, frontier.overhead_s, (curve,)).at(budget_s)
        if choice is None:
            continue
        served = served_at(chain, module, frontier, budget_s, choice)
        ways: list[_Way] = []
        if served.rest_rps:
            load = served.load()
            ways = [way for c in frontier.curves for way in _shares(load, c)]
            ways.append(_Way(curve.price_per_hour, 1.0, 0.0))
        full = sum(each.machines for each in served.full)
        yield served, full * curve.price_per_hour, ways


def served_at(
    chain: str, module: PlannedModule, frontier: Frontier, budget_s: float, choice: Choice
) -> Served:
    """As many full machines as the choice has, and what they leave."""
    c = choice.configuration
    machines = floor(choice.machines + 1e-6)
    utilisation = module.rate_rps / choice.total_rps
    rest_rps = module.rate_rps * (1 - machines * c.throughput_rps / choice.total_rps)
    return Served(
        chain,
        module,
        frontier,
        budget_s,
        (Full(c, machines, choice.worst_s, utilisation),) if machines else (),
        rest_rps if rest_rps > TOLERANCE * module.rate_rps else 0.0,
        c,
        choice.worst_s,
    )


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
