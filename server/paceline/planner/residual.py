"""What to do about the machine that is not full: dummy requests and spare latency (Harpagon, 2).

Invariant: both only ever lower the cost; each falls back to what it was given.

Dummy requests fill a better configuration's machine instead of renting a worse one:

>>> m3 = [Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8))]
>>> show(with_dummies(198.0, m3, 1.0))
'5 x b32 = 5'
>>> with_dummies(198.0, m3, 1.0).dummy_rps
2.0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil

from paceline.core.profile import Configuration
from paceline.planner.paths import Graph
from paceline.planner.problem import Options, PlannedModule
from paceline.planner.schedule import (
    TOLERANCE,
    Load,
    Schedule,
    cheaper,
    ranked,
    schedule,
    show,
    walk,
)
from paceline.planner.worst_case import Dispatch

__all__ = ["ModuleScheduler", "reassign", "show", "top_ups_rps", "unhurried", "with_dummies"]


def top_ups_rps(
    rate_rps: float, ranks: Sequence[Configuration], budget_s: float, dispatch: Dispatch
) -> list[float]:
    """Every dummy rate that turns the whole rate, or a rest of it, into whole machines.

    The rests are those that the published walk leaves after each of its tuples.
    """
    _, rests_rps = walk(Load(rate_rps, 0.0, budget_s, dispatch), ranks)
    found: set[float] = set()
    for rest_rps in rests_rps:
        for c in ranks:
            machines = ceil(rest_rps / c.throughput_rps - TOLERANCE)
            # Rounded, so that the same top-up reached on two ways is tried once.
            dummy_rps = round(machines * c.throughput_rps - rest_rps, 9)
            if dummy_rps > TOLERANCE * rate_rps:
                found.add(dummy_rps)
    return sorted(found)


def with_dummies(
    rate_rps: float,
    configurations: Iterable[Configuration],
    budget_s: float,
    *,
    dispatch: Dispatch = "throughput-cost",
    max_tuples: int | None = None,
    strict: bool = False,
) -> Schedule | None:
    """The cheapest of the plain schedule and those with the rate topped up; None if none fits.

    Harpagon section on the dummy generator. Fewest dummies win ties.
    """
    ranks = ranked(c for c in configurations if c.duration_s <= budget_s + TOLERANCE)
    best = schedule(
        rate_rps, ranks, budget_s, dispatch=dispatch, max_tuples=max_tuples, strict=strict
    )
    if not ranks:
        return best
    for dummy_rps in top_ups_rps(rate_rps, ranks, budget_s, dispatch):
        least = (rate_rps + dummy_rps) / ranks[0].tc_ratio
        if best is not None and not cheaper(least, best.cost_per_hour):
            break
        found = schedule(
            rate_rps,
            ranks,
            budget_s,
            dispatch=dispatch,
            max_tuples=max_tuples,
            dummy_rps=dummy_rps,
            strict=strict,
        )
        if found and (best is None or cheaper(found.cost_per_hour, best.cost_per_hour)):
            best = found
    return best


@dataclass(slots=True)
class ModuleScheduler:
    """Schedules one module within any latency budget, overhead included; remembers the answers."""

    module: PlannedModule
    options: Options
    _known: dict[float, Schedule | None] = field(default_factory=dict)

    def within(self, budget_s: float) -> Schedule | None:
        """The cheapest schedule found whose worst case and overhead fit `budget_s`, or None."""
        if budget_s not in self._known:
            self._known[budget_s] = self._solve(budget_s - self.module.overhead_s)
        return self._known[budget_s]

    def latency_s(self, found: Schedule) -> float:
        """Worst case and overhead."""
        return found.worst_s + self.module.overhead_s

    def _solve(self, budget_s: float) -> Schedule | None:
        o = self.options
        solve = with_dummies if o.dummy else schedule
        return solve(
            self.module.rate_rps,
            self.module.configurations,
            budget_s,
            dispatch=o.dispatch,
            max_tuples=o.max_tuples,
            strict=o.strict,
        )


def reassign(
    graph: Graph,
    slo_s: float,
    schedulers: Sequence[ModuleScheduler],
    schedules: Sequence[Schedule],
) -> list[Schedule]:
    """Offer the latency that no path uses to one module after the other, largest saving first.

    Full machines keep their worst case; it is the residual that gets a better configuration.
    Harpagon section on the latency reassigner. Returns schedules of no higher cost.
    """
    now = list(schedules)
    while True:
        latencies_s = [s.latency_s(found) for s, found in zip(schedulers, now, strict=True)]
        slacks_s = graph.slacks(latencies_s, slo_s)
        offers: list[tuple[float, int, Schedule]] = []
        for i, scheduler in enumerate(schedulers):
            then = scheduler.within(latencies_s[i] + max(0.0, slacks_s[i]))
            if then is not None and cheaper(then.cost_per_hour, now[i].cost_per_hour):
                offers.append((now[i].cost_per_hour - then.cost_per_hour, i, then))
        if not offers:
            return now
        _, at, then = max(offers, key=lambda offer: (offer[0], -offer[1]))
        now[at] = then


def unhurried(
    graph: Graph,
    slo_s: float,
    schedulers: Sequence[ModuleScheduler],
    schedules: Sequence[Schedule],
) -> list[Schedule]:
    """The same machines where no path needs the time: batches wait for real requests, not dummies.

    A budget that only dummy requests keep was asked for when the objective was split.
    """
    now = list(schedules)
    for i, scheduler in enumerate(schedulers):
        if not now[i].dummy_rps:
            continue
        latencies_s = [s.latency_s(found) for s, found in zip(schedulers, now, strict=True)]
        slack_s = graph.slacks(latencies_s, slo_s)[i]
        then = scheduler.within(latencies_s[i] + max(0.0, slack_s))
        if then is not None and _machines(then) == _machines(now[i]):
            now[i] = then
    return now


def _machines(found: Schedule) -> list[tuple[Configuration, float]]:
    return [(p.configuration, p.machines) for p in found.placements]
