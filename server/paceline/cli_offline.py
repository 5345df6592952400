"""The commands that serve nothing: what to rent, and what would happen.

They read files and print; `cli` registers them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.core.errors import ConfigError
from paceline.report import Working, console, own_stdout, plan_report, simulation_report

if TYPE_CHECKING:
    from paceline.planner.problem import Options
    from paceline.planning import Offline
    from paceline.sim.headroom import Verification

MOST_MS, MOST_S, MOST_RPS = 86_400_000, 31_536_000, 10_000_000
"""More overhead than a day, more seconds than a year, a higher rate: a mistake in the unit."""

SECONDS, LOAD_S = 60.0, 10.0
"""How long requests come without a trace, how long a new machine loads its models."""

ChainsArgument = Annotated[list[Path], typer.Argument(metavar="CHAIN.yaml...", show_default=False)]
ProfilesOption = Annotated[Path, typer.Option(help="Durations: CSV from `paceline profile`.")]
HardwareOption = Annotated[Path, typer.Option(help="Prices: hardware,price_per_hour,memory_mib.")]
RateOption = Annotated[float | None, typer.Option(help="Instead of the file's rate, requests/s.")]
SloOption = Annotated[float | None, typer.Option(help="Instead of the file's objective.")]
PolicyOption = Annotated[
    str, typer.Option(help="optimal, harpagon, nexus, scrooge, inferline or clipper.")
]
BillingOption = Annotated[
    str, typer.Option(help="fractional, or machine: whole ones that modules share.")
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(metavar="HARDWARE=N", help="Most machines of a kind (--billing machine)."),
]
OverheadOption = Annotated[
    float,
    typer.Option(min=0, max=MOST_MS, help="Reserved per module for front server and network."),
]
FormatOption = Annotated[str, typer.Option("--format", help="text or json.")]
ArrivalsOption = Annotated[
    str | None,
    typer.Option(
        metavar="poisson|uniform|TRACE.csv",
        help="What the plan is verified against (default: what the chain file declares, else "
        "poisson); a trace is stretched to the chain's rate.",
    ),
]
WindowOption = Annotated[
    str, typer.Option(help="The rows of a trace whose column `window` says so.")
]
VerifyOption = Annotated[bool, typer.Option(help="Simulate the plan; raise its headroom.")]
ConfidenceOption = Annotated[
    float, typer.Option(min=0.5, max=0.9999, help="With which the attainment has to hold.")
]
RequestsOption = Annotated[
    int,
    typer.Option(min=0, max=1_000_000, help="To verify with at least (0: what the target takes)."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]


def plan(
    chains: ChainsArgument,
    profiles: ProfilesOption,
    hardware: HardwareOption,
    rate_rps: RateOption = None,
    slo_ms: SloOption = None,
    policy: PolicyOption = "optimal",
    billing: BillingOption = "fractional",
    limit: LimitOption = None,
    overhead_ms: OverheadOption = 0.0,
    arrivals: ArrivalsOption = None,
    window: WindowOption = "",
    verify: VerifyOption = True,
    confidence: ConfidenceOption = 0.95,
    requests: RequestsOption = 0,
    seed: SeedOption = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cost against objective and rate (.png or .svg).")
    ] = None,
    output: FormatOption = "text",
    dispatch: Annotated[
        str, typer.Option(help="harpagon: throughput-cost, round-robin or pooled.")
    ] = "throughput-cost",
    max_tuples: Annotated[
        int | None, typer.Option(min=1, help="harpagon: most configurations a module may mix.")
    ] = None,
    dummy: Annotated[bool, typer.Option(help="harpagon: dummy requests.")] = True,
    reassign: Annotated[bool, typer.Option(help="harpagon: latency reassignment.")] = True,
    efficiency: Annotated[
        bool, typer.Option(help="harpagon: split by efficiency, not in proportion to latencies.")
    ] = True,
    node_merger: Annotated[bool, typer.Option(help="harpagon: siblings as one node.")] = True,
    cost_direct: Annotated[bool, typer.Option(help="harpagon: also split by saving.")] = True,
    strict: Annotated[
        bool, typer.Option(help="harpagon: the published walk over configurations, no other.")
    ] = False,
) -> None:
    """What is the least that must be paid to serve these chains within their objectives, and how?

    The plan is executed by the real dispatcher in virtual time. Where a chain misses its
    attainment, it is given more machines, and what they cost is told. --arrivals uniform (what
    the published bounds assume) and --no-verify do without.

    Exits 3 when no plan meets an objective, naming the module that lacks how many ms.
    """
    from paceline.advice import check_plot
    from paceline.planner.worst_case import DISPATCHES
    from paceline.planning import plan_offline, read_demand

    own_stdout()
    one_of("--format", output, ("text", "json"))
    one_of("--dispatch", dispatch, DISPATCHES)
    if plot is not None:
        check_plot(plot)
    chosen = _options(policy, billing, limit)
    if policy != "harpagon":
        _of_no_use(
            f"is about --policy harpagon; it changes nothing in {policy}",
            {
                "--dispatch": dispatch != "throughput-cost",
                "--max-tuples": max_tuples is not None,
                "--no-dummy": not dummy,
                "--no-reassign": not reassign,
                "--no-efficiency": not efficiency,
                "--no-node-merger": not node_merger,
                "--no-cost-direct": not cost_direct,
                "--strict": strict,
            },
        )
    options = replace(
        chosen,
        dispatch=dispatch,  # type: ignore[arg-type]
        max_tuples=max_tuples,
        dummy=dummy,
        reassign=reassign,
        efficiency=efficiency,
        node_merger=node_merger,
        cost_direct=cost_direct,
        strict=strict,
    )
    how = _verification(arrivals, window, confidence, requests, seed)
    wanted = read_demand(
        chains,
        profiles,
        hardware,
        options,
        rate_rps=rate_rps,
        slo_ms=slo_ms,
        overhead_s=overhead_ms / 1e3,
    )
    with Working() as working:
        made = plan_offline(wanted, verification=how if verify else None, progress=working)
    try:
        if output == "json":
            print(json.dumps(made.plan.as_json(), indent=2), flush=True)
        else:
            console().print(plan_report(made.plan))
        _advise(made, cheaper=output == "text", plot=plot)
    except KeyboardInterrupt:
        print("paceline: stopped before all that was asked for was told", file=sys.stderr)
        raise typer.Exit(130) from None


def _advise(made: Offline, *, cheaper: bool, plot: Path | None) -> None:
    """What takes further plans, after the plan itself is printed."""
    from paceline.advice import cheaper_slo
    from paceline.advice import plot as draw

    if cheaper:
        with Working() as working:
            found = cheaper_slo(made, working)
        console().print(found.told(made), markup=False, soft_wrap=True)
    if plot is not None:
        with Working() as working:
            draw(made, plot, working)


def simulate(
    chains: ChainsArgument,
    profiles: ProfilesOption,
    hardware: HardwareOption,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay this CSV: instants (arrival_s), or counts (requests beside second or "
            "minute), spread at random within each.",
        ),
    ] = None,
    window: WindowOption = "",
    scale_to_rps: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MOST_RPS,
            help="Scale the trace to this mean rate (default: the rate planned for; 0: as it was "
            "recorded).",
        ),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="Without a trace: poisson or uniform, at the rate planned for.")
    ] = "poisson",
    seconds: Annotated[
        float,
        typer.Option(min=0.001, max=MOST_S, help="Without a trace: how long requests come."),
    ] = SECONDS,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan from `paceline plan --format json`, not a new one."),
    ] = None,
    replan: Annotated[
        bool, typer.Option(help="Follow the traffic with new plans, as `paceline serve` does.")
    ] = False,
    load_s: Annotated[
        float,
        typer.Option(min=0, max=MOST_S, help="--replan: how long a new machine loads its models."),
    ] = LOAD_S,
    rate_rps: RateOption = None,
    slo_ms: SloOption = None,
    policy: PolicyOption = "optimal",
    billing: BillingOption = "fractional",
    limit: LimitOption = None,
    overhead_ms: OverheadOption = 0.0,
    verify: VerifyOption = True,
    dispatch: Annotated[
        str | None,
        typer.Option(help="pooled, throughput-cost or round-robin, instead of the file's."),
    ] = None,
    seed: SeedOption = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw attainment, queue, utilisation and cost over time (.png, .svg)."),
    ] = None,
    output: FormatOption = "text",
) -> None:
    """What happens when this traffic meets this plan? The real dispatcher, in virtual time.

    The plan is made (and verified) as `paceline plan` makes it, for the rate of the file or of
    --rate-rps, else for the trace's mean. The same seed prints the same bytes.

    From the repository's root, a bursty window of a trace against live replanning:

    \b
      paceline simulate examples/planning/traffic.yaml \\
        --profiles examples/data/profiles.csv --hardware examples/data/hardware.csv \\
        --trace examples/traces/twitter_2021-08_ipa_windows_per_second.csv \\
        --window ipa_bursty --rate-rps 40 --seed 1 --replan --plot run.png
    """
    from paceline.advice import check_plot
    from paceline.core.chain import ARRIVALS, DISPATCHES
    from paceline.planning import plan_offline, read_demand
    from paceline.sim.headroom import Verification
    from paceline.simulating import (
        Traffic,
        arrivals_of,
        planned_before,
        rates_of_plan,
        rates_of_trace,
        run_offline,
        runs_of_plan,
    )
    from paceline.simulating import plot as draw

    own_stdout()
    one_of("--format", output, ("text", "json"))
    one_of("--arrivals", arrivals, ARRIVALS)
    if dispatch is not None:
        one_of("--dispatch", dispatch, DISPATCHES)
    if trace is None:
        _of_no_use(
            "is about a trace; give one",
            {"--window": bool(window), "--scale-to-rps": scale_to_rps is not None},
        )
    else:
        _of_no_use(
            "is about traffic without a trace; leave it or --trace out",
            {"--arrivals": arrivals != "poisson", "--seconds": seconds != SECONDS},
        )
    if not replan:
        _of_no_use("is about --replan; add it", {"--load-s": load_s != LOAD_S})
    if plan_file is not None and replan:
        raise ConfigError("replanning starts from a plan that it made; leave one out", key="--plan")
    if plan_file is not None:
        _of_no_use(
            "is about a new plan; leave it or --plan out",
            {
                "--policy": policy != "optimal",
                "--billing": billing != "fractional",
                "--limit": bool(limit),
            },
        )
    if plot is not None:
        check_plot(plot)
    traffic = Traffic(trace, window, scale_to_rps, arrivals, seconds)
    assumed_rps = rates_of_trace(traffic) if plan_file is None else rates_of_plan(plan_file)
    wanted = read_demand(
        chains,
        profiles,
        hardware,
        _options(policy, billing, limit),
        rate_rps=rate_rps,
        slo_ms=slo_ms,
        overhead_s=overhead_ms / 1e3,
        assumed_rps=assumed_rps,
        dispatch=dispatch,  # type: ignore[arg-type]
        with_runs=runs_of_plan(plan_file) if plan_file is not None else lambda chain: None,
    )
    instants = arrivals_of(wanted, traffic, seed)
    with Working() as working:
        if plan_file is not None:
            made = planned_before(wanted, plan_file)
        else:
            how = Verification(seed=seed)
            made = plan_offline(wanted, verification=how if verify else None, progress=working)
        working(f"replaying {traffic.name}", "")
        done = run_offline(wanted, made, traffic, instants, seed=seed, replan=replan, load_s=load_s)
    if output == "json":
        print(json.dumps(done.as_json(), indent=2), flush=True)
    else:
        console().print(simulation_report(done.as_json()))
    if plot is not None:
        draw(done, plot)


def _options(policy: str, billing: str, limit: list[str] | None) -> Options:
    from paceline.planner.problem import BILLINGS, Options
    from paceline.planner.solve import POLICIES
    from paceline.planning import limits

    one_of("--policy", policy, POLICIES)
    one_of("--billing", billing, BILLINGS)
    return Options(
        policy=policy,
        billing=billing,  # type: ignore[arg-type]
        machine_limits=limits(limit or ()),
    )


def _of_no_use(why: str, given: Mapping[str, bool]) -> None:
    """ConfigError for the first option that was given although it changes nothing."""
    for option, was_given in given.items():
        if was_given:
            raise ConfigError(why, key=option)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """ConfigError unless an option has one of the values that it may have."""
    if value not in allowed:
        raise ConfigError(f"must be one of {', '.join(allowed)}, got {value!r}", key=option)


def _verification(
    arrivals: str | None, window: str, confidence: float, requests: int, seed: int
) -> Verification:
    """What --arrivals and its companions ask for."""
    from paceline.core.chain import ARRIVALS
    from paceline.sim.headroom import Arrivals, Verification

    if arrivals is None or arrivals in ARRIVALS:
        if window:
            raise ConfigError("selects rows of a trace; give one as --arrivals", key="--window")
        against = Arrivals(arrivals or "")
    else:
        against = Arrivals(trace=Path(arrivals), window=window)
        if not Path(arrivals).is_file():
            raise ConfigError(
                f"must be poisson, uniform or a trace file; there is no {arrivals!r}",
                key="--arrivals",
            )
    return Verification(against, confidence, requests, seed)
