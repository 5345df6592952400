"""What a chain costs at least in Harpagon's own cost model; `bench_planner.py --brute`.

Brute force over everything that Harpagon decides by rules: how many machines of every profiled
configuration serve a module, its residual, its dummy requests, and how the objective is split.

Of one module within a budget: configurations in the order of their throughput-cost ratio, every
number of full machines of each, and at most one residual machine, of any configuration, which is
fed last. A full machine is in time if `d + b/w` is within the budget, `w` being the rate left for
its rank and everything below it; the residual if `d + b/x` is, `x` being its own rate. What costs
no less than the best known at the best ratio that is left is not followed up.

Of a chain: a module's least cost falls in steps as its budget grows. A schedule that is the
cheapest within a budget is so from its own worst case on, so that one search tells a whole step.
Between the steps known so far the cost is between that of the faster and that of the slower one:
composed at the lower of both (`planner.compose`) they give what no split can cost less than.
Where that rests on such a gap there is searched next, until it rests on steps alone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scripts.planner_workloads import HARDWARE, PLAIN, RATE_BANDS, source

from paceline.core.plan import ChainPlan
from paceline.core.profile import Configuration
from paceline.planner.assemble import chain_plan, graph_of
from paceline.planner.compose import compose
from paceline.planner.harpagon import harpagon
from paceline.planner.hull import Offers
from paceline.planner.problem import PlannedChain, PlannedModule
from paceline.planner.schedule import TOLERANCE, ranked
from paceline.planner.worst_case import residual_s, throughput_cost_s

Dummies = Literal["none", "whole", "any"]
"""Which dummy requests there may be: none; those that leave no residual (the published generator's
purpose); any number of them, so that a residual collects as fast as it needs to as well.
"""

DUMMIES: Mapping[Dummies, str] = {
    "none": "none, on either side",
    "whole": "none, or so many that no residual is left",
    "any": "any number",
}

SAME = 1e-6
"""Costs that differ relatively by less are equal."""

CLOSE = 1e-3
"""How close the two bounds on the least cost of a chain have to come, relatively."""

STEP_S = 2 * TOLERANCE
"""A budget shorter by this excludes what just fits."""

MOST_ROUNDS = 150


@dataclass(frozen=True, slots=True)
class Cheapest:
    """A module's cheapest machines within a budget: full ones by rank, and the residual's rate."""

    full: tuple[tuple[Configuration, int], ...]
    residual: Configuration | None
    residual_rps: float
    cost_per_hour: float

    @property
    def worst_s(self) -> float:
        """Within which budget they would be in time as well."""
        left_rps = self.residual_rps
        worst_s = 0.0
        if self.residual is not None:
            worst_s = residual_s(self.residual, self.residual_rps)
        for c, machines in reversed(self.full):
            left_rps += machines * c.throughput_rps
            worst_s = max(worst_s, throughput_cost_s(c, left_rps))
        return worst_s


def cheapest(
    rate_rps: float,
    configurations: Iterable[Configuration],
    budget_s: float,
    dummies: Dummies,
) -> Cheapest | None:
    """The cheapest way to serve `rate_rps` within `budget_s`; None if there is none.

    >>> m3 = [Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8))]
    >>> [round(cheapest(198.0, m3, 1.0, kind).cost_per_hour, 6) for kind in ("none", "whole")]
    [5.3, 5.0]
    """
    found = _Search(rate_rps, dummies)
    ranks = [(c, needed_rps(c, budget_s)) for c in ranked(configurations)]
    if dummies == "none":
        found.ranks = [(c, need) for c, need in ranks if need <= rate_rps]
    else:
        found.ranks = [(c, need) for c, need in ranks if need < inf]
        found.alike()
    for c, need in found.ranks:
        # What is left for a residual is at most a full machine of it.
        if need <= c.throughput_rps and dummies != "whole":
            found.residual, found.residual_needs_rps = c, need
            found.below(0, rate_rps, 0.0, ())
    found.residual, found.residual_needs_rps = None, 0.0
    found.below(0, rate_rps, 0.0, ())
    if dummies != "whole":
        return found.best
    plain = cheapest(rate_rps, configurations, budget_s, "none")
    both = [each for each in (plain, found.best) if each is not None]
    return min(both, key=lambda each: each.cost_per_hour, default=None)


def needed_rps(c: Configuration, budget_s: float) -> float:
    """The collection rate from which on `c` keeps the budget."""
    spare_s = budget_s + TOLERANCE - c.duration_s
    if spare_s <= 0:
        return inf
    return 0.0 if c.batch_size == 1 else c.batch_size / spare_s


@dataclass(slots=True)
class _Search:
    """Full machines rank by rank, for one choice of the residual's configuration."""

    rate_rps: float
    dummies: Dummies
    ranks: Sequence[tuple[Configuration, float]] = ()
    residual: Configuration | None = None
    residual_needs_rps: float = 0.0
    best: Cheapest | None = None

    @property
    def _cost(self) -> float:
        return inf if self.best is None else self.best.cost_per_hour

    def alike(self) -> None:
        """Full machines of one configuration, as many as it takes: nothing dearer is looked at."""
        for c, need_rps in self.ranks:
            machines = ceil(max(self.rate_rps, need_rps) / c.throughput_rps - TOLERANCE)
            if machines * c.price_per_hour < self._cost:
                cost = machines * c.price_per_hour
                self.best = Cheapest(((c, machines),), None, 0.0, cost)

    def below(
        self, rank: int, left_rps: float, cost: float, full: tuple[tuple[Configuration, int], ...]
    ) -> None:
        """Serve `left_rps` by the ranks from `rank` on and the residual."""
        self._close(left_rps, cost, full)
        none_rps = TOLERANCE * self.rate_rps
        if left_rps <= none_rps:
            return
        if self.dummies == "none" and left_rps < self.residual_needs_rps:
            return
        for at in range(rank, len(self.ranks)):
            c, need_rps = self.ranks[at]
            # Dummy requests raise what is left to what the configuration needs. Without them, what
            # is left grows no more: what cannot be taken now never can.
            filled_rps = left_rps if self.dummies == "none" else max(left_rps, need_rps)
            if need_rps > filled_rps:
                continue
            if not cost + self._least(c, left_rps) < self._cost * (1 - TOLERANCE):
                return
            machines = filled_rps / c.throughput_rps
            most = floor(machines + TOLERANCE)
            if self.dummies != "none":
                most = ceil(machines - TOLERANCE)
            if self.best is not None:
                most = min(most, floor((self._cost - cost) / c.price_per_hour))
            for count in range(most, 0, -1):
                rest_rps = filled_rps - count * c.throughput_rps
                if abs(rest_rps) <= none_rps:
                    rest_rps = 0.0
                self.below(at + 1, rest_rps, cost + count * c.price_per_hour, (*full, (c, count)))

    def _least(self, c: Configuration, left_rps: float) -> float:
        """What serving `left_rps` costs at least by ranks from that of `c` on and the residual."""
        residual_rps = 0.0
        if self.residual is not None:
            residual_rps = self.residual_needs_rps
            if self.residual.tc_ratio > c.tc_ratio:
                residual_rps = max(residual_rps, min(self.residual.throughput_rps, left_rps))
        cost = max(0.0, left_rps - residual_rps) / c.tc_ratio
        return cost if self.residual is None else cost + residual_rps / self.residual.tc_ratio

    def _close(
        self, left_rps: float, cost: float, full: tuple[tuple[Configuration, int], ...]
    ) -> None:
        """What is left by the residual alone."""
        residual_rps = 0.0
        if self.residual is None:
            if left_rps > TOLERANCE * self.rate_rps:
                return
        else:
            residual_rps = left_rps
            if self.dummies == "any":
                residual_rps = max(left_rps, self.residual_needs_rps)
            most_rps = self.residual.throughput_rps * (1 + TOLERANCE)
            if not max(self.residual_needs_rps, TOLERANCE * self.rate_rps) <= residual_rps:
                return
            if residual_rps > most_rps:
                return
            cost += residual_rps / self.residual.tc_ratio
        if cost < self._cost * (1 - TOLERANCE):
            self.best = Cheapest(full, self.residual, residual_rps, cost)


@dataclass(order=True, slots=True)
class _Step:
    """From `start_s` to `end_s` a module costs this at least, and can."""

    start_s: float
    end_s: float
    cost: float


@dataclass(slots=True)
class _Module:
    """The steps that are known of one module, fastest first; nothing is known between them."""

    module: PlannedModule
    dummies: Dummies
    steps: list[_Step] = field(default_factory=list)
    least_s: float = 0.0
    """Below it there is nothing."""

    def search(self, within_s: float) -> bool:
        """Find the step at a latency, overhead included; False if there is none."""
        overhead_s = self.module.overhead_s
        found = cheapest(
            self.module.rate_rps, self.module.configurations, within_s - overhead_s, self.dummies
        )
        if found is None:
            self.least_s = max(self.least_s, within_s)
            return False
        start_s = min(within_s, found.worst_s + overhead_s)
        insort(self.steps, _Step(start_s, within_s, found.cost_per_hour))
        return True

    def known(self) -> Offers:
        """Latency and cost of every step."""
        return (
            np.array([step.start_s for step in self.steps]),
            np.array([step.cost for step in self.steps]),
        )

    def options(self) -> tuple[Offers, list[int]]:
        """The same and, of every gap, the faster step's latency and the slower one's cost; and
        which each is of: the step's number, or of the step after the gap -1 - number.
        """
        latencies_s: list[float] = []
        costs: list[float] = []
        numbers: list[int] = []
        before_s = self.least_s
        for number, step in enumerate(self.steps):
            if step.start_s - before_s > STEP_S:
                latencies_s.append(before_s)
                costs.append(step.cost)
                numbers.append(-1 - number)
            latencies_s.append(step.start_s)
            costs.append(step.cost)
            numbers.append(number)
            before_s = max(before_s, step.end_s)
        return (np.array(latencies_s), np.array(costs)), numbers

    def refine(self, number: int) -> None:
        """Search in the gap before a step: just before it, or, if the step is none but a point of
        a slope, at every quarter of the gap.
        """
        step = self.steps[number]
        before_s = max([self.least_s, *(faster.end_s for faster in self.steps[:number])])
        if step.end_s - step.start_s > STEP_S:
            self.search(step.start_s - STEP_S)
            return
        width_s = step.start_s - before_s
        for quarter in (1, 2, 3):
            self.search(before_s + width_s * quarter / 4)


@dataclass(frozen=True, slots=True)
class Least:
    """Between these two is what a chain costs at least."""

    low: float
    high: float


def least_cost(chain: PlannedChain, dummies: Dummies, beside: float = inf) -> Least | None:
    """The least cost of a chain over all splits of its objective; None if there is none.

    The two bounds are within `CLOSE`, and tell by `SAME` whether something costs less than
    `beside`; they are what they are after `MOST_ROUNDS`.
    """
    graph = graph_of(chain)
    modules = [_Module(module, dummies) for module in chain.modules]
    for own in modules:
        own.least_s = min(c.duration_s for c in own.module.configurations) - STEP_S
        own.least_s += own.module.overhead_s
    slacks_s = graph.slacks([own.least_s for own in modules], chain.slo_s)
    for own, slack_s in zip(modules, slacks_s, strict=True):
        if not own.search(own.least_s + slack_s):
            return None
    low, high = 0.0, inf
    for _ in range(MOST_ROUNDS):
        options, numbers = zip(*(own.options() for own in modules), strict=True)
        found = compose(graph, options, chain.slo_s)
        if found is None:
            return None
        possible = compose(graph, [own.known() for own in modules], chain.slo_s)
        low, high = found.bound, inf if possible is None else possible.bound
        told = low >= beside * (1 - SAME) or high < beside * (1 - SAME)
        if high <= low * (1 + SAME) or (told and high <= low * (1 + CLOSE)):
            break
        for own, which, at in zip(modules, numbers, found.chosen, strict=True):
            if which[at] < 0:
                own.refine(-1 - which[at])
    return Least(low, high)


def compared(at: int) -> dict[str, Any]:
    """One workload by Harpagon and by brute force, for every kind of dummy requests."""
    chain = source().chain(f"workload {at}", hardware=HARDWARE[at % 3])
    found: dict[str, Any] = {"at": at, "rate_rps": chain.rate_rps}
    for dummies in DUMMIES:
        options = replace(PLAIN, dummy=dummies != "none")
        plan = chain_plan(chain, graph_of(chain), harpagon(chain, options))
        strict = harpagon(chain, replace(options, strict=True))
        least = least_cost(chain, dummies, plan.cost_per_hour)
        assert least is not None, f"workload {at}: Harpagon has a plan, brute force none"
        found[dummies] = {
            "harpagon": plan.cost_per_hour,
            "strict": sum(schedule.cost_per_hour for schedule in strict),
            "own split": _within_budgets(chain, plan, dummies),
            "low": least.low,
            "high": least.high,
        }
    return found


def _within_budgets(chain: PlannedChain, plan: ChainPlan, dummies: Dummies) -> float:
    """What brute force pays where the objective is split as in `plan`."""
    costs = []
    for module, planned in zip(chain.modules, plan.modules, strict=True):
        budget_s = planned.latency_budget_s - module.overhead_s
        found = cheapest(module.rate_rps, module.configurations, budget_s, dummies)
        costs.append(inf if found is None else found.cost_per_hour)
    return sum(costs)


def report_brute(results: Sequence[Mapping[str, Any]]) -> None:
    """How often Harpagon is as cheap as brute force, and how much dearer it is otherwise."""
    print(f"{len(results)} workloads\n")
    print(
        "| dummy requests of brute force | requests/s | workloads | harpagon as cheap | cheaper |"
        " cost / brute force, mean | max | the published walk alone as cheap |"
        " as cheap as brute force within its split | its split as good as any |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for dummies, told in DUMMIES.items():
        for low, high in ((0.0, inf), *RATE_BANDS):
            own = [r[dummies] for r in results if low <= r["rate_rps"] < high]
            ratios = [r["harpagon"] / r["high"] for r in own]
            cells = [
                told,
                "all" if high == inf else f"{low:.0f} to {high:.0f}",
                f"{len(own)}",
                _share(r["harpagon"] <= r["low"] * (1 + SAME) for r in own),
                _share(r["harpagon"] < r["low"] * (1 - SAME) for r in own),
                f"{fmean(ratios):.4f}",
                f"{max(ratios):.2f}",
                _share(r["strict"] <= r["low"] * (1 + SAME) for r in own),
                _share(r["harpagon"] <= r["own split"] * (1 + SAME) for r in own),
                _share(r["own split"] <= r["low"] * (1 + SAME) for r in own),
            ]
            print(f"| {' | '.join(cells)} |")
    undecided = sum(
        r[d]["low"] * (1 + SAME) < r[d]["harpagon"] <= r[d]["high"] * (1 + SAME)
        for r in results
        for d in DUMMIES
    )
    wide = max(r[d]["high"] / r[d]["low"] - 1 for r in results for d in DUMMIES)
    print(
        f"\nthe bounds on brute force's cost are at most {wide:.2%} apart; workloads on which they "
        f"do not tell whether harpagon is as cheap, counted as dearer: {undecided}"
    )


def _share(which: Iterable[bool]) -> str:
    return f"{fmean(which):.1%}"
