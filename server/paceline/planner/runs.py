"""Whether executing consecutive modules at once (`core.runs`) pays, and what it takes.

A run has one batch size and one hardware, where each of its modules could have its own; in return
it leaves out a round trip a module and waits for one batch to fill instead of several. Which of
the two costs less the planner answers: both are planned, under the durations that were profiled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from paceline.core.chain import Module
from paceline.core.errors import PlanError
from paceline.core.profile import Durations, ProfileRow, Profiles
from paceline.planner.problem import Options, PlannedChain, memory_bytes
from paceline.planner.solve import solve

_TOLERANCE = 1e-9


def run_rows(
    run: Module, profiles: Profiles, round_trips_s: Mapping[str, float]
) -> tuple[ProfileRow, ...]:
    """What batches of `run` take on hardware on which all of its modules were measured: their sum
    less the round trips between them, no less than the longest of them.

    `round_trips_s` is the least that a call takes, by hardware, which is in every duration. Beyond
    what was measured of all members nothing is said.

    >>> from paceline.core.chain import Source
    >>> x, y = Module("x", "x", {"i": Source(None, "i")}), Module("y", "y", {"i": Source("x", "o")})
    >>> rows = [ProfileRow("x", "cpu", b, b / 100) for b in (1, 2, 4)]
    >>> rows += [ProfileRow("y", "cpu", b, b / 50) for b in (1, 4, 8)]
    >>> run = Module("x+y", "xy", {"inputs.i": Source(None, "i")}, members=(x, y))
    >>> found = run_rows(run, Profiles(tuple(rows)), {"cpu": 0.005})
    >>> [(row.batch_size, round(row.duration_s, 6)) for row in found]
    [(1, 0.025), (2, 0.055), (4, 0.115)]
    """
    models = [member.model for member in run.members]
    rows: list[ProfileRow] = []
    for hardware in profiles.hardware_of(models[0]):
        known = [profiles.durations(model, hardware) for model in models]
        measured = [durations for durations in known if durations is not None]
        if len(measured) < len(models):
            continue
        saved_s = (len(models) - 1) * round_trips_s.get(hardware, 0.0)
        needed = sum(memory_bytes(profiles, m).get(hardware, 0) for m in sorted(set(models)))
        all_slow = all(durations.slow for durations in measured)
        for size in _sizes(measured):
            each_s = [durations.at(size) for durations in measured]
            duration_s = max(sum(each_s) - saved_s, *each_s)
            slow_s = sum(d.slow_at(size) for d in measured) if all_slow else 0.0
            rows.append(ProfileRow(run.model, hardware, size, duration_s, needed, slow_s))
    return tuple(rows)


def pays(apart: PlannedChain, merged: PlannedChain, options: Options) -> bool:
    """Whether the plan with runs costs no more than the plan without."""
    return _cost(merged, options) <= _cost(apart, options) + _TOLERANCE


def _sizes(measured: Collection[Durations]) -> list[int]:
    """Every batch size that some member was measured at, as far as all of them were."""
    most = min(durations.points[-1][0] for durations in measured)
    return sorted({size for d in measured for size, _ in d.points if size <= most})


def _cost(chain: PlannedChain, options: Options) -> float:
    """Infinite where the objective cannot be kept."""
    try:
        return solve([chain], options).cost_per_hour
    except PlanError:
        return float("inf")
