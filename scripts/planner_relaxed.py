#!/usr/bin/env python3
"""How far the gap of 100 chains in whole machines is the bound's: budgets and machines as one LP.

    .venv/bin/python scripts/planner_relaxed.py --draws 0 1 --seconds 60

For the chains of `bench_planner.py --together`. Columns are the budgets of a chain's modules (each
with its full machines) and patterns of loads that one shared machine holds (`planner.patterns`);
what is chosen of them need not be whole. Both are searched for by the duals (Dantzig and Wolfe
1960), budgets among some per module and the plan's own (`--budgets`), patterns greedily. A plan of
these columns costs no less than the program; as patterns are not searched for exactly, better ones
may be missing, so it is no bound: it shows how low one could be. "Estimated" is what all chains
cost at the last prices, from below if the search missed nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from time import process_time

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_array

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_planner import hundred
from scripts.planner_workloads import OPTIMAL

from paceline.core.plan import Plan
from paceline.planner.assemble import graph_of
from paceline.planner.columns import EAGER
from paceline.planner.compose import compose
from paceline.planner.cycle import Load
from paceline.planner.frontier import Floats, Frontier
from paceline.planner.hull import Index, pareto
from paceline.planner.machines import served_at
from paceline.planner.pack import Machine, Packing
from paceline.planner.patterns import (
    MOST_LOADS,
    Filling,
    Offers,
    Rounds,
    by_urgency,
    in_cycles,
    part_jitter_s,
)
from paceline.planner.problem import PlannedChain
from paceline.planner.relaxed import latency_prices
from paceline.planner.solve import solve
from paceline.planner.whole_plan import kinds_of

WHOLE = replace(OPTIMAL, billing="machine")
BUDGETS_EVERY = 3
"""Budgets are looked for every so many turns."""


@dataclass(frozen=True)
class Way:
    """A module within a budget: what its full machines cost, and the load that they leave."""

    chain: int
    module: int
    budget_s: float
    full: float
    load: Load | None
    planned: bool


def ways_of(at: int, chain: PlannedChain, plan: Plan, points: int) -> Iterator[Way]:
    kinds = kinds_of([chain], WHOLE)
    frontiers = [Frontier.of(m.configurations, m.rate_rps, m.overhead_s) for m in chain.modules]
    slacks_s = graph_of(chain).slacks([f.least_s for f in frontiers], chain.slo_s)
    (own,) = (c for c in plan.chains if c.chain == chain.name)
    for i, (m, frontier, slack) in enumerate(zip(chain.modules, frontiers, slacks_s, strict=True)):
        spread_s = frontier.least_s + slack * np.geomspace(1e-3, 1.0, points)
        planned_s = own.modules[i].latency_budget_s
        for budget_s in sorted({frontier.least_s, planned_s, *spread_s.tolist()}):
            for curve in frontier.curves:
                choice = Frontier(m.rate_rps, m.overhead_s, (curve,)).at(budget_s)
                if choice is not None:
                    s = served_at(chain.name, m, frontier, budget_s, choice)
                    full = sum(
                        f.machines * kinds[f.configuration.hardware].price_per_hour for f in s.full
                    )
                    load = s.load() if s.rest_rps else None
                    yield Way(at, i, budget_s, full, load, budget_s == planned_s)


@dataclass
class Program:
    """The columns so far; rows are chains and the loads of ways in use."""

    chains: Sequence[PlannedChain]
    kinds: dict[str, Machine]
    ways: list[Way]
    budgets: dict[tuple[int, ...], float] = field(default_factory=dict)
    patterns: dict[tuple[object, ...], tuple[float, tuple[tuple[int, float], ...]]] = field(
        default_factory=dict
    )
    used: set[int] = field(default_factory=set)

    def use(self, chosen: tuple[int, ...]) -> bool:
        """Budgets of a chain's modules, as ways; whether they were not known."""
        if chosen in self.budgets:
            return False
        self.budgets[chosen] = sum(self.ways[way].full for way in chosen)
        packing = Packing(self.kinds, {})
        for way in chosen:
            load = self.ways[way].load
            if way not in self.used and load is not None:
                self.used.add(way)
                for hardware, machine in sorted(self.kinds.items()):
                    if packing.alone(load, machine) is not None:
                        self.add(hardware, [(way, 1.0)])
        return True

    def add(self, hardware: str, parts: Sequence[tuple[int, float]]) -> bool:
        key = (hardware, *sorted((way, round(part, 6)) for way, part in parts))
        known = key in self.patterns
        self.patterns[key] = (self.kinds[hardware].price_per_hour, tuple(parts))
        return not known

    def solved(self) -> tuple[float, Floats, Floats]:
        """The cost, what each way's load is worth, and what each chain costs."""
        rows = {way: row for row, way in enumerate(sorted(self.used))}
        at: list[tuple[int, int, float]] = []
        chain_of = []
        for column, (_, parts) in enumerate(self.patterns.values()):
            at += [(rows[way], column, part) for way, part in parts]
        for column, chosen in enumerate(self.budgets, len(self.patterns)):
            at += [(rows[way], column, -1.0) for way in chosen if way in rows]
            chain_of.append(self.ways[chosen[0]].chain)
        row, column_of, value = zip(*at, strict=True)
        total = len(self.patterns) + len(self.budgets)
        served = csc_array((value, (row, column_of)), shape=(len(rows), total))
        ends = np.arange(len(self.patterns), total)
        one = csc_array((np.ones(len(ends)), (chain_of, ends)), shape=(len(self.chains), total))
        answer = linprog(
            [price for price, _ in self.patterns.values()] + list(self.budgets.values()),
            A_ub=-served,
            b_ub=np.zeros(len(rows)),
            A_eq=one,
            b_eq=np.ones(len(self.chains)),
            method="highs",
        )
        assert answer.success, answer.message
        worth = np.zeros(len(self.ways))
        worth[sorted(self.used)] = np.maximum(0.0, -answer.ineqlin.marginals)
        return float(answer.fun), worth, np.asarray(answer.eqlin.marginals)


class Search:
    """Patterns and budgets at the prices of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        found = [way.load for way in program.ways]
        self.index = np.array([at for at, load in enumerate(found) if load is not None])
        self.loads = [load for load in found if load is not None]
        self.kinds = sorted(program.kinds.items())
        sizes = [{h: load.sizes(h) for h in load.durations_s} for load in self.loads]
        jitters_s = [part_jitter_s(*each) for each in zip(self.loads, sizes, strict=True)]
        self.offers = {
            h: Offers.of(self.loads, [own.get(h, ()) for own in sizes], jitters_s, h)
            for h, _ in self.kinds
        }
        self.rounds = {h: Rounds.of(self.loads, h) for h, _ in self.kinds}

    def patterns(self, worth: Floats, turn: int) -> int:
        """Add those that are worth more than a machine; how many were not known."""
        found, own = 0, worth[self.index]
        eager = EAGER[turn % len(EAGER)]
        for hardware, machine in self.kinds:
            offers, price = self.offers[hardware], machine.price_per_hour
            offers = offers[np.flatnonzero(own[offers.load] > 0)]
            for pattern in by_urgency(offers, own, price, 0, eager=eager, turn=turn):
                parts = [(int(self.index[offers.load[at]]), share) for at, share in pattern]
                found += self.program.add(hardware, parts)
            for _, members in in_cycles(self.rounds[hardware], own, price, eager=eager):
                ways = self.index[members].tolist()
                names = {(self.program.ways[w].chain, self.program.ways[w].module) for w in ways}
                if len(names) == len(ways):
                    found += self.program.add(hardware, [(way, 1.0) for way in ways])
        return found

    def costs(self, worth: Floats) -> tuple[Floats, dict[int, tuple[str, list[tuple[int, float]]]]]:
        """What each way's load costs at least, from the patterns that begin with it; and those."""
        program, own = self.program, worth[self.index]
        costs = np.array([0.0 if way.load is None else inf for way in program.ways])
        best: dict[int, tuple[str, list[tuple[int, float]]]] = {}
        for way, load in zip(self.index.tolist(), self.loads, strict=True):
            for hardware, machine in self.kinds:
                if load.alone(hardware) or load.extra == hardware:
                    costs[way] = min(costs[way], machine.price_per_hour)
        for hardware, machine in self.kinds:
            offers, price = self.offers[hardware], machine.price_per_hour
            above = own[offers.load] - price * offers.busy
            useful = np.flatnonzero((own[offers.load] > 0) & (above > 0))
            for seeds in _first_and_last(offers):
                for filling in self._filled(offers, own, seeds, useful, above):
                    for pattern, total in zip(filling.found, filling.total.tolist(), strict=True):
                        if not pattern:
                            continue
                        parts = [(int(self.index[offers.load[a]]), share) for a, share in pattern]
                        way, share = parts[0]
                        cost = (price - (total - worth[way] * share)) / share
                        if cost < costs[way]:
                            costs[way], best[way] = cost, (hardware, parts)
        used = sorted(program.used)
        costs[used] = np.minimum(costs[used], worth[used])
        return np.maximum(costs, 0.0), best

    @staticmethod
    def _filled(
        offers: Offers, own: Floats, seeds: Index, useful: Index, above: Floats
    ) -> Iterator[Filling]:
        for start in range(0, len(seeds), 64):
            filling = Filling.begun(offers, own, seeds[start : start + 64])
            liked = np.broadcast_to(above[useful], (len(filling.rows), len(useful)))
            for _ in range(MOST_LOADS - 1):
                if not len(useful) or not len(filling.rows):
                    break
                liked = liked[filling.take_best(useful, liked, 0)]
            yield filling

    def budgets(self, worth: Floats, chain_costs: Floats) -> tuple[int, float]:
        """Add those that cost less than their chain does; how many, and what all chains cost."""
        costs, best = self.costs(worth)
        by: dict[tuple[int, int], list[int]] = {}
        for at, way in enumerate(self.program.ways):
            by.setdefault((way.chain, way.module), []).append(at)
        found, total = 0, 0.0
        for at, chain in enumerate(self.program.chains):
            graph, offers, maps = graph_of(chain), [], []
            for i in range(len(chain.modules)):
                own = np.array(by[at, i])
                ways = [self.program.ways[way] for way in own.tolist()]
                offer, order = pareto(
                    np.array([way.budget_s for way in ways]),
                    np.array([way.full for way in ways]) + costs[own],
                )
                offers.append(offer)
                maps.append(own[order])
            prices = latency_prices(graph, offers, chain.slo_s)
            composed = compose(graph, offers, chain.slo_s, prices=prices)
            assert composed is not None, f"{chain.name}: the plan's budgets did not fit"
            chosen = tuple(int(m[c]) for m, c in zip(maps, composed.chosen, strict=True))
            cost = sum(float(o[1][c]) for o, c in zip(offers, composed.chosen, strict=True))
            total += cost
            if cost < chain_costs[at] - 1e-6 and self.program.use(chosen):
                found += 1
                for own_way in chosen:
                    if own_way in best and {w for w, _ in best[own_way][1]} <= self.program.used:
                        self.program.add(*best[own_way])
        return found, total


def _first_and_last(offers: Offers) -> Iterator[Index]:
    """Of every load the batch size with the least work, and the one that can wait the longest."""
    change = np.flatnonzero(np.diff(offers.load, prepend=-1))
    yield change
    yield np.append(change[1:], len(offers.load)) - 1


def relax(draw: int, points: int, seconds: float) -> None:
    """One draw of 100 chains."""
    chains = hundred(draw)
    plan = solve(chains, WHOLE)
    ways = [w for at, chain in enumerate(chains) for w in ways_of(at, chain, plan, points)]
    program = Program(chains, dict(kinds_of(chains, WHOLE)), ways)
    for at, chain in enumerate(chains):
        first: dict[int, int] = {}
        for i, way in enumerate(ways):
            if way.chain == at and way.planned:
                first.setdefault(way.module, i)
        program.use(tuple(first[i] for i in range(len(chain.modules))))
    search, started = Search(program), process_time()
    turn, cost, estimate = 0, inf, 0.0
    while process_time() - started < seconds:
        cost, worth, chain_costs = program.solved()
        search.patterns(worth, turn)
        if turn % BUDGETS_EVERY == BUDGETS_EVERY - 1:
            _, estimate = search.budgets(worth, chain_costs)
        turn += 1
    bound = plan.lower_bound_per_hour
    print(
        f"| {draw} | {plan.cost_per_hour:.1f} | {cost:.1f} | {estimate:.1f} | {bound:.1f} | "
        f"{plan.cost_per_hour / cost - 1:.1%} | {cost / bound - 1:.1%} |",
        flush=True,
    )


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--budgets", type=int, default=12, help="of every module (default 12)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time, each")
    arguments = parser.parse_args()
    print("| draw | plan | program | estimated | bound | plan above it | it above the bound |")
    print("|---|---|---|---|---|---|---|")
    for draw in arguments.draws:
        relax(draw, arguments.budgets, arguments.seconds)


if __name__ == "__main__":
    main()
