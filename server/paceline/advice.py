"""Beside a plan: what a longer objective would save, and curves of its cost.

Invariant: it is planned by the same policy, billing, options and headroom as the plan itself, in a
bounded number of plans; many chains in whole machines take long, so that few are made for them.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from paceline.core.errors import ConfigError, PlanError
from paceline.planning import Offline
from paceline.sim.headroom import plan_with
from paceline.sim.search import Progress

WORTH_TELLING = 0.1
"""A longer objective is told when it saves this share of the cost, else what the longest saves."""

WORTH_NOTHING = 0.01
"""Less is no saving."""

LONGER = tuple(1 + step / 20 for step in range(1, 41))
"""The factors of the objective that are considered, up to three times."""

FEW_CHAINS = 5
"""So many chains, at most, are planned in whole machines for each point of a search or curve."""

POINTS = 25
FEWER_POINTS = 13
FEWEST_POINTS = 5
"""Of a curve, by how long a plan takes. Odd, so that what is declared is one of them."""


@dataclass(frozen=True, slots=True)
class Cheaper:
    """All objectives made `factor` times as long lower the cost by `saving`: a share in whole
    percents, as it is told.
    """

    factor: float
    saving: float
    guessed: bool = False
    """The only one that was planned: in parts of machines, it is the one to take."""

    def told(self, made: Offline) -> str:
        """One line for people."""
        at, most = _objective(made, self.factor), _objective(made, LONGER[-1])
        saves = f"{'at' if len(made.chains) == 1 else 'with'} {at} this costs "
        saves += "no less" if self.saving < WORTH_NOTHING else f"{self.saving:.0%} less"
        if self.guessed:
            return (
                f"{saves} (the only longer objective planned for, as {len(made.chains)} chains in "
                "whole machines take long: what parts of machines tell to take)"
            )
        if self.saving >= WORTH_TELLING:
            return f"{saves} (the shortest objective found that saves {WORTH_TELLING:.0%})"
        if self.saving >= WORTH_NOTHING:
            return f"{saves}; no objective up to {most} was found to save {WORTH_TELLING:.0%}"
        return f"no objective up to {most} was found to save {WORTH_NOTHING:.0%}"


def cheaper_slo(made: Offline, progress: Progress = lambda subject, detail: None) -> Cheaper:
    """The next objective that saves a tenth, else one that saves as much as the longest.

    By bisection: the cost (nearly) never rises with the objective. Many chains in whole machines
    are planned once more only.
    """
    if _slow(made):
        parts = replace(made, options=replace(made.options, billing="fractional"))
        factor = _search(parts, _cost(parts), progress).factor
        progress("looking for a cheaper objective", f"{factor:.3g}x as long, in whole machines")
        cost = _cost(made, slo_factor=factor)
        return Cheaper(factor, _saving(cost, made.plan.cost_per_hour), guessed=True)
    return _search(made, made.plan.cost_per_hour, progress)


def _search(made: Offline, now: float, progress: Progress) -> Cheaper:
    """In at most 13 plans, in whole machines 7: there, how soon less than a tenth is saved is left
    out.
    """
    known: dict[int, float] = {}

    def saving(at: int) -> float:
        if at not in known:
            progress("looking for a cheaper objective", f"{LONGER[at]:.3g}x as long")
            known[at] = _saving(_cost(made, slo_factor=LONGER[at]), now)
        return known[at]

    last = len(LONGER) - 1
    wanted = WORTH_TELLING
    if saving(last) < WORTH_TELLING:
        if saving(last) < WORTH_NOTHING or made.options.billing == "machine":
            return Cheaper(LONGER[last], saving(last))
        wanted = saving(last)
    at = bisect_left(range(last), wanted, key=saving)
    return Cheaper(LONGER[at], saving(at))


def _saving(cost: float, now: float) -> float:
    return round(1 - cost / now, 2)


def _slow(made: Offline) -> bool:
    """Whether one plan may take seconds."""
    return made.options.billing == "machine" and len(made.chains) > FEW_CHAINS


def _objective(made: Offline, factor: float) -> str:
    if len(made.chains) > 1:
        return f"{factor:.3g}x the slo"
    return f"{made.chains[0].slo_s * factor * 1e3:.4g} ms"


def _cost(made: Offline, *, slo_factor: float = 1.0, rate_factor: float = 1.0) -> float:
    """What it costs with longer objectives or higher rates; infinite when there is no plan."""
    changed = [
        replace(
            chain,
            slo_s=chain.slo_s * slo_factor,
            rate_rps=chain.rate_rps * rate_factor,
            modules=tuple(replace(m, rate_rps=m.rate_rps * rate_factor) for m in chain.modules),
        )
        for chain in made.chains
    ]
    try:
        return plan_with(changed, replace(made.options, bound=False), made.headroom).cost_per_hour
    except PlanError:
        return inf


def curves(
    made: Offline, progress: Progress = lambda subject, detail: None
) -> Mapping[str, list[tuple[float, float]]]:
    """Cost against the factor of every objective (a third to three), and of every rate."""
    points = POINTS
    if made.options.billing == "machine" and len(made.chains) > 1:
        points = FEWEST_POINTS if _slow(made) else FEWER_POINTS
    steps = [3 ** (2 * i / (points - 1) - 1) for i in range(points)]
    found: dict[str, list[tuple[float, float]]] = {"slo": [], "rate": []}
    for name, told in (("slo", "objective"), ("rate", "rate")):
        for at, factor in enumerate(steps, start=1):
            progress("drawing", f"{factor:.2f}x the {told}, point {at} of {points}")
            cost = made.plan.cost_per_hour
            if factor != 1.0:
                cost = _cost(made, **{f"{name}_factor": factor})
            found[name].append((factor, cost))
    return found


def plot(made: Offline, path: Path, progress: Progress = lambda subject, detail: None) -> None:
    """Draw cost against objective and against rate. ConfigError where it cannot be written."""
    first = made.chains[0]
    single = len(made.chains) == 1
    scales = {"slo": first.slo_s * 1e3, "rate": first.rate_rps}
    units = {"slo": "objective, ms", "rate": "rate, requests/s"}
    whole = {"slo": "objective, times as declared", "rate": "rate, times as declared"}
    found = curves(made, progress)

    def draw(figure: Any) -> None:
        for axes, (name, points) in zip(figure.subplots(1, 2), found.items(), strict=True):
            _draw(axes, points, scales[name] if single else 1.0, made.plan.cost_per_hour)
            axes.set_xlabel(units[name] if single else whole[name])
            axes.set_ylabel("cost per hour")
        names = ", ".join(chain.name for chain in made.chains[:4])
        more = f" and {len(made.chains) - 4} more" if len(made.chains) > 4 else ""
        figure.suptitle(f"{names}{more}: {made.plan.policy}, {made.plan.billing} billing")

    save_figure(path, (9, 3.6), draw)


def save_figure(path: Path, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draw a figure into a file; the same bytes each time. ConfigError: see `check_plot`."""
    check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    svg = path.suffix.lower() == ".svg"
    try:
        with matplotlib.rc_context({"svg.hashsalt": "paceline"}):
            figure.savefig(path, metadata={"Date": None} if svg else None)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path)) from None


def check_plot(path: Path) -> None:
    """ConfigError unless a PNG or SVG file can be written there; touches nothing."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{path.name!r} must end in .png or .svg", key="--plot")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {str(folder)!r}; make it first, or draw elsewhere", key="--plot"
        )
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder; name a file", key="--plot")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written; draw elsewhere", key="--plot")


def _draw(axes: Any, points: Sequence[tuple[float, float]], scale: float, cost: float) -> None:
    feasible = [(x * scale, y) for x, y in points if y < inf]
    axes.plot([x for x, _ in feasible], [y for _, y in feasible], drawstyle="default")
    axes.plot([scale], [cost], "o")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
