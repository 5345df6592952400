"""Planning without serving: files in, a plan and what a person wants to know about it out.

Invariant: what is reported besides the plan (a cheaper objective, a plot) is planned by the same
policy, billing, options and headroom as the plan itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from paceline.config import read_chains, read_hardware, read_profiles
from paceline.core.chain import Chain, Dispatch
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, Profiles
from paceline.core.runs import merge, runs_of
from paceline.planner.problem import Options, PlannedChain, demand
from paceline.planner.runs import pays, run_rows
from paceline.planner.solve import solve
from paceline.sim.headroom import Headroom, Verification, plan_with
from paceline.sim.search import Progress, verified

WORTH_TELLING = 0.1
"""A longer objective is told when it saves this share of the cost, else what the longest saves."""

LONGER = tuple(1 + step / 20 for step in range(1, 41))
"""The factors of the objective that are tried, up to three times."""

PLOT_POINTS = 25
"""Odd, so that what is declared is one of them."""

MOST_RPS = 1e7
"""A higher rate is a mistake in its unit."""


@dataclass(frozen=True, slots=True)
class Offline:
    """A plan with what it was made of; `chains`, `options` and `headroom` plan again."""

    plan: Plan
    chains: tuple[PlannedChain, ...]
    options: Options
    headroom: Mapping[str, Headroom] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cheaper:
    """All objectives made `factor` times as long lower the cost by `saving` (a share)."""

    factor: float
    saving: float
    slo_s: float

    def told(self, chains: int) -> str:
        """One line for people."""
        at = f"at {self.slo_s * 1e3:.4g} ms" if chains == 1 else f"with {self.factor:.3g}x the slo"
        return f"{at} this costs {self.saving:.0%} less"


@dataclass(frozen=True, slots=True)
class Demand:
    """What files and options ask to be planned; chains with runs have those merged."""

    declared: tuple[Chain, ...]
    chains: tuple[PlannedChain, ...]
    options: Options
    profiles: Profiles
    prices: Mapping[str, Hardware]


def read_demand(
    paths: Sequence[Path],
    profiles: Path,
    hardware: Path,
    options: Options,
    *,
    rate_rps: float | None = None,
    slo_ms: float | None = None,
    overhead_s: float = 0.0,
    assumed_rps: Callable[[str], float | None] = lambda chain: None,
    dispatch: Dispatch | None = None,
    with_runs: Callable[[str], bool | None] = lambda chain: None,
) -> Demand:
    """Read the files. Raises ConfigError.

    `assumed_rps` is the rate of a chain that declares none; `dispatch` replaces what is declared.
    `with_runs` says whether a chain is planned with its runs (None: where that costs no more).
    """
    prices = read_hardware(hardware)
    measured = read_profiles(profiles, prices)
    for name in options.machine_limits:
        if name not in prices:
            raise ConfigError(
                f"no hardware {name!r}; {hardware.name} has {', '.join(sorted(prices))}",
                key="--limit",
            )
    demands: list[PlannedChain] = []
    declared: list[Chain] = []
    for chain in read_chains(paths):
        changed = replace(
            chain,
            slo_s=chain.slo_s if slo_ms is None else slo_ms / 1e3,
            dispatch=dispatch or chain.dispatch,
        )
        rate = rate_rps if rate_rps is not None else chain.rate_rps
        if rate is None:
            rate = assumed_rps(chain.name)
        if rate is None:
            raise ConfigError(
                f"chain {chain.name!r} declares none; give --rate-rps",
                key="rate_rps",
                where=chain.where("rate_rps"),
            )
        if not 0 < rate <= MOST_RPS:
            raise ConfigError(
                f"must be above 0 and at most {MOST_RPS:.0f} requests/s, got {rate:g}",
                key="rate_rps",
                where=chain.where("rate_rps") if rate_rps is None else f"chain {chain.name}",
            )
        try:
            form = _form(changed, rate, measured, prices, overhead_s, options, with_runs)
        except ConfigError as error:
            where = error.where or chain.where(error.key)
            raise ConfigError(error.message, key=error.key, where=where) from None
        declared.append(form.chain)
        demands.append(form.planned)
        measured = form.profiles
    memory = {name: kind.memory_bytes for name, kind in prices.items() if kind.memory_bytes}
    used = replace(options, memory_bytes=memory)
    return Demand(tuple(declared), tuple(demands), used, measured, prices)


@dataclass(frozen=True, slots=True)
class _Form:
    """A chain as it is to be served, and the profiles with what its runs take."""

    chain: Chain
    planned: PlannedChain
    profiles: Profiles


def _form(
    chain: Chain,
    rate_rps: float,
    profiles: Profiles,
    prices: Mapping[str, Hardware],
    overhead_s: float,
    options: Options,
    with_runs: Callable[[str], bool | None],
) -> _Form:
    """With its runs or without. Raises ConfigError."""
    form = _Form(chain, demand(chain, rate_rps, profiles, prices, {}, overhead_s), profiles)
    # Files do not tell whether there is a round trip in their durations: none is taken off.
    known = [(run, rows) for run in runs_of(chain) if (rows := run_rows(run, profiles, {}))]
    if not known:
        return form
    profiles = profiles.merged(row for _, rows in known for row in rows)
    merged = merge(chain, [run for run, _ in known])
    planned = demand(merged, rate_rps, profiles, prices, {}, overhead_s)
    chosen = with_runs(chain.name)
    together = pays(form.planned, planned, options) if chosen is None else chosen
    return _Form(merged, planned, profiles) if together else form


def plan_offline(
    wanted: Demand,
    *,
    verification: Verification | None = None,
    progress: Progress = lambda subject, detail: None,
) -> Offline:
    """Plan, and verify if asked to. Raises ConfigError and PlanError."""
    started = perf_counter()
    plan = solve(wanted.chains, wanted.options)
    plan = replace(plan, solve_s=perf_counter() - started)
    headroom: dict[str, Headroom] = {}
    if verification is not None:
        plan, headroom = verified(
            wanted.declared,
            wanted.chains,
            wanted.options,
            wanted.profiles,
            verification,
            plan,
            progress=progress,
        )
    return Offline(plan, wanted.chains, wanted.options, headroom)


def limits(texts: Sequence[str]) -> dict[str, int]:
    """`t4=10` as the most machines of each hardware."""
    found: dict[str, int] = {}
    for text in texts:
        name, equals, count = text.partition("=")
        if not name or not equals or not count.isdecimal():
            raise ConfigError(f"{text!r} is not HARDWARE=NUMBER", key="--limit")
        found[name] = int(count)
    return found


def cheaper_slo(made: Offline) -> Cheaper | None:
    """The next objective that saves a tenth; else the longest tried that saves 1 % or more."""
    now = made.plan.cost_per_hour
    found: Cheaper | None = None
    for factor in LONGER:
        saving = 1 - _cost(made, slo_factor=factor) / now
        if saving >= 0.01 and (found is None or saving > found.saving):
            found = Cheaper(factor, saving, made.chains[0].slo_s * factor)
        if saving >= WORTH_TELLING:
            break
    return found


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
        return float("inf")


def curves(made: Offline) -> Mapping[str, list[tuple[float, float]]]:
    """Cost against the factor of every objective (a third to three), and of every rate."""
    steps = [3 ** (2 * i / (PLOT_POINTS - 1) - 1) for i in range(PLOT_POINTS)]
    return {
        "slo": [(factor, _cost(made, slo_factor=factor)) for factor in steps],
        "rate": [(factor, _cost(made, rate_factor=factor)) for factor in steps],
    }


def plot(made: Offline, path: Path) -> None:
    """Draw cost against objective and against rate. ConfigError unless PNG or SVG."""
    first = made.chains[0]
    single = len(made.chains) == 1
    scales = {"slo": first.slo_s * 1e3, "rate": first.rate_rps}
    units = {"slo": "objective, ms", "rate": "rate, requests/s"}
    whole = {"slo": "objective, times as declared", "rate": "rate, times as declared"}

    def draw(figure: Any) -> None:
        for axes, (name, points) in zip(figure.subplots(1, 2), curves(made).items(), strict=True):
            _draw(axes, points, scales[name] if single else 1.0, made.plan.cost_per_hour)
            axes.set_xlabel(units[name] if single else whole[name])
            axes.set_ylabel("cost per hour")
        names = ", ".join(chain.name for chain in made.chains[:4])
        more = f" and {len(made.chains) - 4} more" if len(made.chains) > 4 else ""
        figure.suptitle(f"{names}{more}: {made.plan.policy}, {made.plan.billing} billing")

    save_figure(path, (9, 3.6), draw)


def save_figure(path: Path, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draw a figure into a file; the same bytes each time. ConfigError unless PNG or SVG."""
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
    """ConfigError unless it can be drawn there."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{path.name!r} must end in .png or .svg", key="--plot")


def _draw(axes: Any, points: Sequence[tuple[float, float]], scale: float, cost: float) -> None:
    feasible = [(x * scale, y) for x, y in points if y < float("inf")]
    axes.plot([x for x, _ in feasible], [y for _, y in feasible], drawstyle="default")
    axes.plot([scale], [cost], "o")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
