"""Which machines serve one module at a given rate and latency budget (Harpagon, level 2).

Invariant: a `Schedule` serves its whole rate, real and dummy, and no placement's worst case
exceeds the budget it was made for.

The published walk takes configurations best throughput-cost ratio first. It can strand a
remainder that nothing serves in time, or lose to a simpler mix, so it is also tried without its
best configurations and with at most one or two tuples; the published result wins ties.

>>> m3 = [Configuration("gpu", b, d, 1.0) for b, d in ((2, 0.1), (8, 0.25), (32, 0.8))]
>>> show(schedule(198.0, m3, 1.0, dispatch="round-robin", max_tuples=2))
'6 x b8 + 0.3 x b2 = 6.3'
>>> show(schedule(198.0, m3, 1.0, max_tuples=2))
'4 x b32 + 1.9 x b2 = 5.9'
>>> show(schedule(198.0, m3, 1.0))
'4 x b32 + 1 x b8 + 0.3 x b2 = 5.3'
>>> show(schedule(198.0, m3, 1.0, dispatch="pooled"))
'4.95 x b32 = 4.95'
>>> show(schedule(198.0, m3, 1.0, dummy_rps=2.0))
'5 x b32 = 5'
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import floor

from paceline.core.profile import Configuration
from paceline.planner.worst_case import Dispatch, full_machine_s, residual_machine_s

TOLERANCE = 1e-9
"""Relative for rates and costs, seconds for latencies: below it two values are the same."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`machines` (fractional allowed) in one configuration, with their worst-case latency."""

    configuration: Configuration
    machines: float
    worst_s: float

    @property
    def rate_rps(self) -> float:
        """Real and dummy requests it serves."""
        return self.machines * self.configuration.throughput_rps


@dataclass(frozen=True, slots=True)
class Schedule:
    """The machines of one module, best throughput-cost ratio first."""

    rate_rps: float
    dummy_rps: float
    placements: tuple[Placement, ...]
    cost_per_hour: float = field(init=False)
    worst_s: float = field(init=False)

    def __post_init__(self) -> None:
        cost = sum(p.machines * p.configuration.price_per_hour for p in self.placements)
        object.__setattr__(self, "cost_per_hour", cost)
        object.__setattr__(self, "worst_s", max(p.worst_s for p in self.placements))


def ranked(configurations: Iterable[Configuration]) -> tuple[Configuration, ...]:
    """Best throughput-cost ratio first; ties by duration, batch size, then hardware's name."""
    return tuple(
        sorted(configurations, key=lambda c: (-c.tc_ratio, c.duration_s, c.batch_size, c.hardware))
    )


def cheaper(cost: float, than: float) -> bool:
    """Whether `cost` is lower by more than rounding."""
    return cost < than * (1 - TOLERANCE)


def schedule(
    rate_rps: float,
    configurations: Iterable[Configuration],
    budget_s: float,
    *,
    dispatch: Dispatch = "throughput-cost",
    max_tuples: int | None = None,
    dummy_rps: float = 0.0,
) -> Schedule | None:
    """The cheapest schedule found for `rate_rps` within `budget_s`, or None.

    With `max_tuples`, the last tuple must take all that is left, fraction included.
    `dummy_rps` requests/s are served on top. Harpagon section on multi-tuple configurations.
    """
    ranks = ranked(c for c in configurations if c.duration_s <= budget_s + TOLERANCE)
    best: Schedule | None = None
    for limit in _limits(max_tuples):
        start = 0
        while start < len(ranks):
            bound = (rate_rps + dummy_rps) / ranks[start].tc_ratio
            if best is not None and not cheaper(bound, best.cost_per_hour):
                break
            walk = Walk(rate_rps, dummy_rps, budget_s, dispatch, limit)
            walk.take(ranks[start:])
            if not walk.placements:
                break
            if walk.done:
                found = Schedule(rate_rps, dummy_rps, tuple(walk.placements))
                if best is None or cheaper(found.cost_per_hour, best.cost_per_hour):
                    best = found
            # Configurations above the first one taken changed nothing: leave that one out next.
            start = ranks.index(walk.placements[0].configuration, start) + 1
    return best


def _limits(max_tuples: int | None) -> tuple[int | None, ...]:
    """The tuple limits to try, the asked one first, so that a looser limit is never costlier."""
    tighter = (2, 1) if max_tuples is None else range(max_tuples - 1, 0, -1)
    return (max_tuples, *tighter)


class Walk:
    """One pass over ranked configurations; `rests_rps` is what was left after each placement."""

    __slots__ = (
        "_budget_s",
        "_dispatch",
        "_dummy_rps",
        "_limit",
        "_total_rps",
        "placements",
        "rests_rps",
    )

    def __init__(
        self,
        rate_rps: float,
        dummy_rps: float,
        budget_s: float,
        dispatch: Dispatch,
        limit: int | None,
    ) -> None:
        self._total_rps = rate_rps + dummy_rps
        self._dummy_rps = dummy_rps
        self._budget_s = budget_s + TOLERANCE
        self._dispatch: Dispatch = dispatch
        self._limit = limit
        self.placements: list[Placement] = []
        self.rests_rps = [self._total_rps]

    @property
    def done(self) -> bool:
        """Whether everything is served."""
        return self.rests_rps[-1] <= 0.0

    def take(self, ranks: Sequence[Configuration]) -> None:
        """Give each configuration in turn what it can serve in time, until nothing is left."""
        for configuration in ranks:
            if self.done or len(self.placements) == self._limit:
                return
            self._offer(configuration)

    def _offer(self, c: Configuration) -> None:
        rest_rps = self.rests_rps[-1]
        full = floor(rest_rps / c.throughput_rps + TOLERANCE)
        remainder_rps = rest_rps - full * c.throughput_rps
        if remainder_rps <= TOLERANCE * self._total_rps:
            remainder_rps = 0.0
        full_s = self._bound_s(c, rest_rps, full=True) if full else 0.0
        remainder_s = self._bound_s(c, remainder_rps, full=False) if remainder_rps else 0.0
        if full_s > self._budget_s:
            return
        machines = float(full)
        worst_s = full_s
        if remainder_s <= self._budget_s:
            machines += remainder_rps / c.throughput_rps
            worst_s = max(full_s, remainder_s)
            remainder_rps = 0.0
        elif not full or len(self.placements) + 1 == self._limit:
            return
        self.placements.append(Placement(c, machines, worst_s))
        self.rests_rps.append(remainder_rps)

    def _bound_s(self, c: Configuration, left_rps: float, *, full: bool) -> float:
        """Worst case of `c` when `left_rps` is left for it.

        Dummy requests are sent only when needed: a batch that real requests alone fill within the
        budget waits for those, and that longer wait is then its worst case.
        """
        real_rps = left_rps - self._dummy_rps
        if self._dummy_rps and real_rps > 0:
            waiting_s = self._of(c, real_rps, self._total_rps - self._dummy_rps, full=full)
            if waiting_s <= self._budget_s:
                return waiting_s
        return self._of(c, left_rps, self._total_rps, full=full)

    def _of(self, c: Configuration, left_rps: float, rate_rps: float, *, full: bool) -> float:
        if full:
            return full_machine_s(self._dispatch, c, left_rps=left_rps, rate_rps=rate_rps)
        return residual_machine_s(self._dispatch, c, residual_rps=left_rps, rate_rps=rate_rps)


def show(found: Schedule | None) -> str:
    """One line for people, e.g. `4 x b32 + 1.9 x b2 = 5.9`."""
    if found is None:
        return "infeasible"
    parts = [f"{p.machines:.6g} x b{p.configuration.batch_size}" for p in found.placements]
    return f"{' + '.join(parts)} = {found.cost_per_hour:.6g}"
