"""Which machines serve one module at a given rate and latency budget (Harpagon, level 2).

Invariant: a `Schedule` serves its whole rate, real and dummy, and no placement's worst case
exceeds the budget it was made for.

The published walk takes configurations best throughput-cost ratio first. It can strand a
remainder that nothing serves in time (then it is walked again with one full machine less), or lose
to a simpler mix, so it is also tried without its best configurations and with at most one or two
tuples (unless `strict`); the published result wins ties. The gap to brute force is in the property
tests.

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
    strict: bool = False,
) -> Schedule | None:
    """The cheapest schedule found for `rate_rps` within `budget_s`, or None.

    With `max_tuples`, the last tuple must take all that is left, fraction included.
    `dummy_rps` requests/s are served on top. Harpagon section on multi-tuple configurations.
    `strict` takes the published walk as it comes: None where it strands a remainder.
    """
    load = Load(rate_rps, dummy_rps, budget_s, dispatch)
    ranks = ranked(c for c in configurations if c.duration_s <= budget_s + TOLERANCE)
    best: Schedule | None = None
    for limit in (max_tuples,) if strict else _limits(max_tuples):
        start = 0
        while start < len(ranks):
            if best and not cheaper(load.total_rps / ranks[start].tc_ratio, best.cost_per_hour):
                break
            placements, rests_rps = walk(load, ranks[start:], limit)
            if not placements:
                break
            # Configurations above the first one taken changed nothing: leave that one out next.
            start = ranks.index(placements[0].configuration, start) + 1
            if rests_rps[-1]:
                below = ranks[start - 1 :]
                placements = () if strict else _held_back(load, below, limit, placements)
            if placements:
                found = Schedule(rate_rps, dummy_rps, placements)
                if best is None or cheaper(found.cost_per_hour, best.cost_per_hour):
                    best = found
            if strict:
                break
    return best


def _limits(max_tuples: int | None) -> tuple[int | None, ...]:
    """The tuple limits to try, the asked one first, so that a looser limit is never costlier."""
    tighter = (2, 1) if max_tuples is None else range(max_tuples - 1, 0, -1)
    return (max_tuples, *tighter)


def _held_back(
    load: Load,
    ranks: Sequence[Configuration],
    limit: int | None,
    stranded: tuple[Placement, ...],
) -> tuple[Placement, ...]:
    """A walk left a remainder that nothing serves; one full machine less, the last, may save it."""
    for placement in reversed(stranded):
        placements, rests_rps = walk(load, ranks, limit, held=placement.configuration)
        if not rests_rps[-1]:
            return placements
    return ()


@dataclass(frozen=True, slots=True)
class Load:
    """What one module must serve, and within which latency budget."""

    rate_rps: float
    dummy_rps: float
    budget_s: float
    dispatch: Dispatch

    @property
    def total_rps(self) -> float:
        """Real and dummy requests."""
        return self.rate_rps + self.dummy_rps

    def in_time(self, worst_s: float) -> bool:
        """Whether `worst_s` keeps the budget."""
        return worst_s <= self.budget_s + TOLERANCE

    def full_s(self, c: Configuration, left_rps: float) -> float:
        """Worst case of a full machine when `left_rps` is left for its rank and below.

        Dummy requests are sent only when needed: a batch that real requests alone fill within the
        budget waits for those, and that longer wait is then its worst case.
        """
        if 0 < self.dummy_rps < left_rps:
            real_rps = left_rps - self.dummy_rps
            waiting_s = full_machine_s(self.dispatch, c, left_rps=real_rps, rate_rps=self.rate_rps)
            if self.in_time(waiting_s):
                return waiting_s
        return full_machine_s(self.dispatch, c, left_rps=left_rps, rate_rps=self.total_rps)

    def residual_s(self, c: Configuration, left_rps: float) -> float:
        """Worst case of a machine that serves `left_rps` and is not full; dummies as above."""
        if 0 < self.dummy_rps < left_rps:
            real_rps = left_rps - self.dummy_rps
            waiting_s = residual_machine_s(
                self.dispatch, c, residual_rps=real_rps, rate_rps=self.rate_rps
            )
            if self.in_time(waiting_s):
                return waiting_s
        return residual_machine_s(self.dispatch, c, residual_rps=left_rps, rate_rps=self.total_rps)


def walk(
    load: Load,
    ranks: Iterable[Configuration],
    limit: int | None = None,
    held: Configuration | None = None,
) -> tuple[tuple[Placement, ...], tuple[float, ...]]:
    """The published pass: each configuration in turn takes what it can serve in time.

    Returns the placements, at most `limit`, and the rate that was left before and after each of
    them; everything is served if the last is 0. `held` takes one full machine less than it could.
    """
    placements: list[Placement] = []
    rests_rps = [load.total_rps]
    for c in ranks:
        if not rests_rps[-1] or len(placements) == limit:
            break
        last = len(placements) + 1 == limit
        placed = _held(load, rests_rps[-1], c) if c == held else _placed(load, rests_rps[-1], c)
        if placed is None:
            continue
        rest_rps = rests_rps[-1] - placed.rate_rps
        if rest_rps <= TOLERANCE * load.total_rps:
            rest_rps = 0.0
        if rest_rps and last:
            continue
        placements.append(placed)
        rests_rps.append(rest_rps)
    return tuple(placements), tuple(rests_rps)


def _placed(load: Load, rest_rps: float, c: Configuration) -> Placement | None:
    """Full machines of `c` for `rest_rps`, with the fraction if that keeps the budget as well."""
    full = floor(rest_rps / c.throughput_rps + TOLERANCE)
    remainder_rps = rest_rps - full * c.throughput_rps
    if remainder_rps <= TOLERANCE * load.total_rps:
        remainder_rps = 0.0
    full_s = load.full_s(c, rest_rps) if full else 0.0
    if not load.in_time(full_s):
        return None
    residual_s = load.residual_s(c, remainder_rps) if remainder_rps else 0.0
    if load.in_time(residual_s):
        return Placement(c, full + remainder_rps / c.throughput_rps, max(full_s, residual_s))
    return Placement(c, float(full), full_s) if full else None


def _held(load: Load, rest_rps: float, c: Configuration) -> Placement | None:
    full = floor(rest_rps / c.throughput_rps + TOLERANCE) - 1
    full_s = load.full_s(c, rest_rps)
    return Placement(c, float(full), full_s) if full > 0 and load.in_time(full_s) else None


def show(found: Schedule | None) -> str:
    """One line for people, e.g. `4 x b32 + 1.9 x b2 = 5.9`."""
    if found is None:
        return "infeasible"
    parts = [f"{p.machines:.6g} x b{p.configuration.batch_size}" for p in found.placements]
    return f"{' + '.join(parts)} = {found.cost_per_hour:.6g}"
