#!/usr/bin/env python3
"""Whether the gap in whole machines is the bound's or the plans': small cases, solved exactly.

    .venv/bin/python scripts/planner_gap.py            # 60 cases; --cases N

A case is two or three chains of two modules, or two of three, drawn like those of
`bench_planner.py`. Its optimum is found over every way to serve each module within one of some
budgets (`--budgets`, the plan's own among them): full machines of one kind and the rest, whole, on
a machine with any others that `urgency.Due` or `cycle.together` accepts, in any batch sizes; an
integer program chooses budgets and machines (HiGHS). Loads are not divided, so a plan that divides
one may cost less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.planner_workloads import HARDWARE, OPTIMAL, SHAPES, source

from paceline.core.plan import Plan
from paceline.planner.assemble import graph_of
from paceline.planner.cycle import Load, Size, together
from paceline.planner.frontier import Frontier
from paceline.planner.machines import served_at
from paceline.planner.problem import PlannedChain, PlannedModule
from paceline.planner.solve import solve
from paceline.planner.urgency import Due, Stream
from paceline.planner.whole_plan import kinds_of

CASES = (("chain of 2", 2), ("chain of 2", 3), ("chain of 3", 2))
MOST_MACHINES = 12
"""Full machines of a case at most: with more the rest is too small a part to matter."""

WHOLE = replace(OPTIMAL, billing="machine")


@dataclass(frozen=True)
class Way:
    """A module within a budget: full machines, and the load that they leave."""

    module: int
    budget_s: float
    full: float
    load: Load | None


@dataclass(frozen=True)
class Column:
    """A machine and the ways whose loads it serves."""

    price: float
    ways: tuple[int, ...]


def ways_of(
    chain: PlannedChain, at: int, module: int, budgets_s: Sequence[float], prices: dict[str, float]
) -> Iterator[Way]:
    m = chain.modules[at]
    frontier = Frontier.of(m.configurations, m.rate_rps, m.overhead_s)
    for budget_s in budgets_s:
        for curve in frontier.curves:
            choice = Frontier(m.rate_rps, m.overhead_s, (curve,)).at(budget_s)
            if choice is None:
                continue
            served = served_at(chain.name, m, frontier, budget_s, choice)
            full = sum(f.machines * prices[f.configuration.hardware] for f in served.full)
            yield Way(module, budget_s, full, served.load() if served.rest_rps else None)
            if sum(f.machines for f in served.full) == 1:
                # All of it on a machine with others, where that has the time.
                shared = replace(served, full=(), rest_rps=m.rate_rps)
                yield Way(module, budget_s, 0.0, replace(shared.load(), extra=""))


def budgets(chain: PlannedChain, plan: Plan, count: int) -> list[list[float]]:
    """Of every module: spread between the least and all that is left, and the plan's."""
    least_s = [
        Frontier.of(m.configurations, m.rate_rps, m.overhead_s).least_s for m in chain.modules
    ]
    slacks_s = graph_of(chain).slacks(least_s, chain.slo_s)
    (planned,) = (c for c in plan.chains if c.chain == chain.name)
    return [
        sorted(
            {least, own.latency_budget_s}
            | {least + slack * share for share in np.geomspace(0.02, 1.0, count - 1).tolist()}
        )
        for least, slack, own in zip(least_s, slacks_s, planned.modules, strict=True)
    ]


def columns_of(ways: Sequence[Way], prices: dict[str, float]) -> Iterator[Column]:
    """Every set of modules' loads that one machine of some kind serves."""
    for hardware, price in sorted(prices.items()):
        level: set[tuple[int, ...]] = set()
        for at, way in enumerate(ways):
            load = way.load
            if load is not None and (
                load.alone(hardware)
                or load.extra == hardware
                or (hardware in load.durations_s and together([load], hardware))
            ):
                yield Column(price, (at,))
            if load is not None and load.durations_s.get(hardware):
                level.add((at,))
        dues: dict[tuple[int, ...], list[Due]] = {
            each: [*_joined([Due()], ways[each[0]].load, hardware)] for each in level
        }
        singles = sorted(level)
        while level:
            longer: dict[tuple[int, ...], list[Due]] = {}
            for found in sorted(level):
                for (at,) in singles:
                    if at <= found[-1] or ways[at].module in {ways[i].module for i in found}:
                        continue
                    both = (*found, at)
                    then = [*_joined(dues.get(found, []), ways[at].load, hardware)]
                    loads = [ways[i].load for i in both]
                    if then or together([load for load in loads if load], hardware):
                        longer[both] = then
                        yield Column(price, both)
            level, dues = set(longer), longer


def _stream(load: Load, size: Size) -> Stream:
    return Stream(size.duration_s, size.deadline_s, load.rate_rps * size.row_s, load.jitter_s)


def _joined(dues: Sequence[Due], load: Load | None, hardware: str) -> Iterator[Due]:
    """What each becomes with the load in each batch size that there is room for."""
    if load is None:
        return
    for due, size in product(dues, load.sizes(hardware)):
        stream = _stream(load, size)
        if due.room(stream.duration_s, stream.deadline_s, stream.jitter_s) >= stream.busy - 1e-9:
            yield due.joined(stream)


def optimum(chains: Sequence[PlannedChain], plan: Plan, count: int) -> float:
    """The least cost over budgets and machines; see the module's docstring."""
    prices = {name: kind.price_per_hour for name, kind in kinds_of(chains, WHOLE).items()}
    modules: list[tuple[PlannedChain, PlannedModule]] = []
    ways: list[Way] = []
    for chain in chains:
        for at, budgets_s in enumerate(budgets(chain, plan, count)):
            ways += ways_of(chain, at, len(modules), budgets_s, prices)
            modules.append((chain, chain.modules[at]))
    columns = list(columns_of(ways, prices))
    total = len(ways) + len(columns)
    one, served = lil_array((len(modules), total)), lil_array((len(ways), total))
    for at, way in enumerate(ways):
        one[way.module, at] = 1.0
        served[at, at] = -float(way.load is not None)
    for at, column in enumerate(columns):
        for own in column.ways:
            served[own, len(ways) + at] = 1.0
    paths = lil_array((len(chains), total))
    for row, chain in enumerate(chains):
        for at, way in enumerate(ways):
            paths[row, at] = way.budget_s if modules[way.module][0] is chain else 0.0
    answer = milp(
        [way.full for way in ways] + [column.price for column in columns],
        integrality=np.ones(total),
        bounds=Bounds(0.0, 1.0),
        constraints=[
            LinearConstraint(one.tocsr(), 1.0, 1.0),
            LinearConstraint(served.tocsr(), 0.0),
            LinearConstraint(paths.tocsr(), -np.inf, [c.slo_s + 1e-9 for c in chains]),
        ],
    )
    assert answer.success, answer.message
    return float(answer.fun)


def case(seed: int) -> list[PlannedChain]:
    """Two or three chains in a row, the first that need few full machines."""
    shape, count = CASES[seed % len(CASES)]
    chains: list[PlannedChain] = []
    draw = 0
    while len(chains) < count:
        hardware = HARDWARE[(seed // len(CASES)) % 3]
        chain = source().chain(f"gap {seed} {draw}", SHAPES[shape], hardware)
        draw += 1
        frontiers = [Frontier.of(m.configurations, m.rate_rps, 0.0) for m in chain.modules]
        share = chain.slo_s / sum(frontier.least_s for frontier in frontiers)
        choices = [frontier.at(frontier.least_s * share) for frontier in frontiers]
        if sum(choice.machines for choice in choices if choice) <= MOST_MACHINES / count:
            chains.append(chain)
    return chains


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--budgets", type=int, default=6, help="of every module (default 6)")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.cases):
        chains = case(seed)
        plan = solve(chains, WHOLE)
        rows.append(
            (
                plan.cost_per_hour,
                optimum(chains, plan, arguments.budgets),
                plan.lower_bound_per_hour,
            )
        )
    for name, ratios in (
        ("plan / optimum", [cost / best for cost, best, _ in rows]),
        ("optimum / bound", [best / bound for _, best, bound in rows]),
        ("plan / bound", [cost / bound for cost, _, bound in rows]),
    ):
        exact = sum(ratio <= 1 + 1e-6 for ratio in ratios) / len(rows)
        less = sum(ratio < 1 - 1e-6 for ratio in ratios)
        print(
            f"{name}: median {median(ratios):.3f}, mean {mean(ratios):.3f}, max {max(ratios):.2f}; "
            f"no more on {exact:.0%}, less on {less}"
        )
    cost, best, bound = (sum(column) for column in zip(*rows, strict=True))
    share = (cost - best) / (cost - bound)
    print(
        f"added up: {cost:.1f}, {best:.1f}, {bound:.1f}; of the gap the plans' share is {share:.0%}"
    )


if __name__ == "__main__":
    main()
