"""Planning without serving: files in, a plan out. `advice` tells more of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from paceline.config import read_chains, read_hardware, read_profiles
from paceline.core.chain import Chain, Dispatch
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, Profiles
from paceline.core.runs import merge, runs_of
from paceline.planner.problem import Options, PlannedChain, demand
from paceline.planner.runs import pays, run_rows
from paceline.planner.solve import solve
from paceline.sim.headroom import Headroom, Verification
from paceline.sim.search import Progress, verified

LEAST_RPS, MOST_RPS = 1e-5, 1e7
"""A lower rate (about one request a day) or a higher one is a mistake in its unit."""

MOST_SLO_MS = 86_400_000.0
"""A day: a longer objective is a mistake in its unit."""


@dataclass(frozen=True, slots=True)
class Offline:
    """A plan with what it was made of; `chains`, `options` and `headroom` plan again."""

    plan: Plan
    chains: tuple[PlannedChain, ...]
    options: Options
    headroom: Mapping[str, Headroom] = field(default_factory=dict)


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
    if options.machine_limits and options.billing != "machine":
        raise ConfigError(
            "whole machines can be limited, parts of them not: add --billing machine, or leave "
            "the limit out",
            key="--limit",
        )
    memory = {name: kind.memory_bytes for name, kind in prices.items() if kind.memory_bytes}
    used = replace(options, memory_bytes=memory)
    demands: list[PlannedChain] = []
    declared: list[Chain] = []
    for read in read_chains(paths):
        chain = _with_slo(read, slo_ms)
        changed = replace(chain, dispatch=dispatch or chain.dispatch)
        rate = rate_rps if rate_rps is not None else chain.rate_rps
        if rate is None:
            rate = assumed_rps(chain.name)
        if rate is None:
            raise ConfigError(
                f"chain {chain.name!r} declares none; give --rate-rps",
                key="rate_rps",
                where=chain.where("rate_rps"),
            )
        if not LEAST_RPS <= rate <= MOST_RPS:
            least = f"above 0 and at most {MOST_RPS:.0f} requests/s"
            if 0 < rate < LEAST_RPS:
                least = f"at least {LEAST_RPS:g} requests/s (about one a day)"
            raise ConfigError(
                f"must be {least}, got {rate:g}",
                key="rate_rps",
                where=chain.where("rate_rps") if rate_rps is None else f"chain {chain.name}",
            )
        try:
            form = _form(changed, rate, measured, prices, overhead_s, used, with_runs)
        except ConfigError as error:
            where = error.where or chain.where(error.key)
            raise ConfigError(error.message, key=error.key, where=where) from None
        declared.append(form.chain)
        demands.append(form.planned)
        measured = form.profiles
    return Demand(tuple(declared), tuple(demands), used, measured, prices)


def _with_slo(chain: Chain, slo_ms: float | None) -> Chain:
    """With this objective instead of the declared one, if any. Raises ConfigError."""
    given_ms = chain.slo_s * 1e3 if slo_ms is None else slo_ms
    if not 0 < given_ms <= MOST_SLO_MS:
        raise ConfigError(
            f"slo_ms must be above 0 and at most {MOST_SLO_MS:.0f} (a day), got {given_ms:g}",
            where=chain.where("slo_ms") if slo_ms is None else "--slo-ms",
        )
    if slo_ms is None:
        return chain
    # What is told of the objective is told of the option.
    return replace(chain, slo_s=slo_ms / 1e3, places={**chain.places, "slo_ms": "--slo-ms"})


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
    """Plan, and verify if asked to. Raises ConfigError, and PlanError with file and line."""
    try:
        return _planned(wanted, verification, progress)
    except PlanError as error:
        raise _placed(error, wanted.declared) from None


def _placed(error: PlanError, chains: Sequence[Chain]) -> PlanError:
    chain = next((chain for chain in chains if chain.name == error.chain), None)
    if chain is None:
        return error
    return PlanError(
        f"{chain.where(error.key)}: {error}",
        chain=error.chain,
        module=error.module,
        lacking_s=error.lacking_s,
    )


def _planned(wanted: Demand, verification: Verification | None, progress: Progress) -> Offline:
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
        if name in found:
            raise ConfigError(
                f"{name!r} is given twice ({found[name]}, {count}); give one", key="--limit"
            )
        found[name] = int(count)
    return found
