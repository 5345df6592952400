#!/usr/bin/env python3
"""How much does a machine serve within an objective, and how many machines does it take?

The same chain, arrivals and objective are served, side by side on this machine, by

  triton       a Triton ensemble with dynamic batching; a small grid of settings is searched and
               the best ones count: machines split over the steps or shared by all of them (rate
               limiter), batches launched at once or after waiting to fill, late ones rejected
  round-robin  `paceline serve` with `dispatch: round-robin` (what Nexus does), its plan made for
               the largest rate that its bounds allow on those machines
  pooled       `paceline serve` as it is: pooled dispatch, admission control

on real Tritons. A machine is one instance of a model that sleeps d(b), by profiles measured on
T4 and V100; it uses no CPU, so many fit. Objectives are multiples (--tightness) of what full
batches take along the slowest path; a load is the share of the machines that full batches keep
busy. What is measured (--measure):

  goodput      the largest rate at which --machines machines attain the target (99 % of all
               requests answered within the objective), to --resolution of their bound
  machines     the least machines that attain it at each of --rates rates, evenly spread from half
               to all of what keeps --machines busy (bursty: in its busiest minute). Systems tie
               at one rate unless they are a whole machine apart; the sum over the rates tells
               them apart
  overload     answers within the objective per second at 0.5 to 5 times the planned rate, and how
               long a rejection takes

Load is open loop: requests leave at instants fixed in advance, from a process per system, and
latency counts from those instants. Arrivals are Poisson, or follow a window of a Twitter trace,
compressed to the length of a replay, at the same mean rate.

Timing on a shared machine is noisy. So systems replay the same arrivals, at most --side-by-side
of them at a time, medians of repeats count, and the control shows by how much emulated executions
took longer than d(b).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

# Before grpc is imported: its fork handlers are of no use to a child that execs, and talk.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import uvloop
from rich.console import Console
from rich.markdown import Markdown

from paceline.core.errors import PacelineError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts import slo_report, slo_workloads  # noqa: E402
from scripts.gateway_peers import process  # noqa: E402
from scripts.slo_control import carried  # noqa: E402
from scripts.slo_machines import measure_machines, simulate_machines  # noqa: E402
from scripts.slo_report import SYSTEMS, Scenario  # noqa: E402
from scripts.slo_run import (  # noqa: E402
    ARRIVALS,
    LATE_MS,
    PLANNED_LOAD,
    TARGET,
    Bench,
    measure_goodput,
    measure_overload,
    simulate_goodput,
)
from scripts.slo_workloads import WORKLOADS, Served, Workload  # noqa: E402

EXAMPLES = HERE.parent / "examples"


MEASURES = {
    "goodput": measure_goodput,
    "machines": measure_machines,
    "overload": measure_overload,
}
SIMULATED = {"goodput": simulate_goodput, "machines": simulate_machines}


async def bench_all(bench: Bench) -> None:
    options = bench.options
    for workload in [work for work in WORKLOADS if work.name in options.workloads]:
        with tempfile.TemporaryDirectory(prefix="paceline-slo-") as work:
            try:
                for tightness in options.tightness:
                    for arrivals in options.arrivals:
                        scenario = Scenario(workload.name, arrivals, tightness)
                        await measure(bench, Path(work), scenario, workload)
            finally:
                write(bench)
                await bench.alone()


async def measure(bench: Bench, work: Path, scenario: Scenario, workload: Workload) -> None:
    """Everything that was asked for, of one scenario."""
    options = bench.options
    base = slo_workloads.read(workload, options.profiles).held_to(scenario.tightness)
    for name in options.measure:
        if options.virtual:
            SIMULATED[name](bench, scenario, base)
        else:
            await MEASURES[name](bench, work, scenario, base)
        write(bench)


def write(bench: Bench) -> None:
    """What there is so far, so that a run that is stopped is not lost."""
    options = bench.options
    if options.markdown is not None:
        options.markdown.write_text(report(bench), encoding="utf-8")
    if options.json is not None:
        measured = {
            "goodput": bench.goodput.flat(),
            "machines": bench.machines.flat(),
            "needed": [
                {**asdict(scenario), **asdict(need)} for scenario, need in bench.needed.items()
            ],
            "overload": bench.overload.flat(),
        }
        options.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")


def report(bench: Bench) -> str:
    """Everything as markdown."""
    options = bench.options
    described = [_described(options, work) for work in WORKLOADS if work.name in options.workloads]
    parts = [
        f"{os.cpu_count()} cores; up to {options.repeats} replays of {options.seconds:g} s, seed "
        f"{options.seed}, up to {options.side_by_side} systems side by side.",
        *(f"* {line}" for line in described),
    ]
    if bench.goodput.runs:
        parts += [
            "",
            f"## Goodput per machine, requests/s at {TARGET:.0%} attainment (share of the bound)",
            "",
            *slo_report.goodput_table(bench.goodput),
        ]
    if bench.needed:
        parts += ["", f"## Machines for {TARGET:.0%} attainment, summed over the rates", ""]
        parts += slo_report.machines_table(bench.needed)
        parts += ["", "## Machines by rate", *slo_report.needed_tables(bench.needed)]
        parts += ["", "## Attainment on as many machines as Paceline needs"]
        parts += slo_report.equal_tables(bench.needed, bench.machines)
    if bench.overload.runs:
        overload = slo_report.overload_table(bench.overload, PLANNED_LOAD, options.seconds)
        parts += ["", "## Overload", *overload]
    if bench.goodput.runs:
        parts += ["", "## Attainment by load", *slo_report.attainment_tables(bench.goodput)]
    for results in (bench.goodput, bench.machines):
        if results.runs:
            parts += ["", *slo_report.settings_table(results)]
    return "\n".join([*parts, "", "## Control", "", *(f"* {line}" for line in controls(bench)), ""])


def _described(options: argparse.Namespace, workload: slo_workloads.Workload) -> str:
    served: Served = slo_workloads.read(workload, options.profiles)
    objectives = " or ".join(f"{served.held_to(t).slo_ms:g} ms" for t in options.tightness)
    return (
        f"`{workload.name}`: {workload.title}, {workload.hardware}; {1 / served.row_s:.1f} "
        f"requests/s a machine at most; objective {objectives}"
    )


def controls(bench: Bench) -> list[str]:
    """What says whether the machine's noise decided anything."""
    lines = []
    if bench.errors:
        batches = sum(count for count, _ in bench.errors)
        mean = sum(count * error for count, error in bench.errors) / batches
        most = max(error for count, error in bench.errors if count >= min(20, batches))
        lines.append(
            f"Emulated executions took {mean:+.1%} longer than d(b) on average over {batches} "
            f"batches (by Triton's statistics); the worst mean of a step and batch size seen "
            f"at least 20 times is {most:+.1%}."
        )
    late = [
        run.late_p99_ms
        for results in (bench.goodput, bench.machines, bench.overload)
        for lanes in results.runs.values()
        for runs in lanes.values()
        for run in runs
    ]
    if late:
        lines.append(
            f"The load generators sent 99 % of the requests within {median(late):.1f} ms of their "
            f"instants (median over the replays; {max(late):.1f} ms in the worst); where it was "
            f"above {LATE_MS:g} ms, all were sent once more ({bench.disturbed} times)."
        )
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  scripts/bench_slo.py --quick                          # chain2, about 3 minutes\n"
        "  scripts/bench_slo.py --virtual --seconds 30           # about 10 minutes of one core\n"
        "  scripts/bench_slo.py --measure machines --workloads fork --arrivals poisson "
        "--tightness 1.5\n"
        "  scripts/bench_slo.py --measure overload --machines 4 --workloads chain2 --repeats 1\n"
        "  scripts/bench_slo.py --markdown figures.md            # goodput; about 40 minutes\n",
    )
    names = [work.name for work in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="chain2, Poisson, 2x, short replays")
    parser.add_argument(
        "--measure", nargs="+", choices=[*MEASURES], default=["goodput"], help="(default: goodput)"
    )
    parser.add_argument(
        "--virtual",
        action="store_true",
        help="goodput or machines in virtual time: the real dispatcher on simulated machines, an "
        "ideal model of Triton's batching; the same figures on any machine",
    )
    parser.add_argument(
        "--profiles",
        type=Path,
        default=EXAMPLES / "data" / "profiles.csv",
        metavar="CSV",
        help="model,hardware,batch_size,duration_ms,memory_mib with the profiles of the workloads "
        "(default: examples/data/profiles.csv)",
    )
    parser.add_argument(
        "--traces",
        type=Path,
        default=EXAMPLES / "traces" / "twitter_2021-08_ipa_windows_per_second.csv",
        metavar="CSV",
        help="window,...,requests: counts by second (default: the windows in examples/traces)",
    )
    parser.add_argument("--workloads", nargs="+", choices=names, help="(default: all)")
    parser.add_argument(
        "--arrivals",
        nargs="+",
        choices=ARRIVALS,
        help="(default: poisson and bursty; quick: poisson)",
    )
    parser.add_argument(
        "--tightness",
        nargs="+",
        type=float,
        help="objectives, as multiples of full batches' path (default: 1.5 2.5; quick: 2)",
    )
    parser.add_argument(
        "--machines",
        type=int,
        default=8,
        help="machines: those that the highest rate keeps busy (default: %(default)s)",
    )
    parser.add_argument(
        "--rates", type=int, default=6, help="machines: how many (default: %(default)s)"
    )
    parser.add_argument(
        "--most",
        type=int,
        help="machines: more are not tried (default: a quarter more than --machines; virtual: "
        "twice as many)",
    )
    parser.add_argument(
        "--resolution",
        type=float,
        help="goodput: step of the load (default: 0.025; virtual: 0.01)",
    )
    parser.add_argument("--seconds", type=float, help="of a replay (default: 10; quick: 6)")
    parser.add_argument("--repeats", type=int, help="at most (default: 3; quick: 1)")
    parser.add_argument(
        "--side-by-side",
        type=int,
        default=2,
        help="systems that are replayed to at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=[*SYSTEMS],
        default=[system for system in SYSTEMS if system != "runs"],
        help="split, shared: Triton's; runs: Paceline with `runs: auto` in its chain file "
        "(default: all but runs)",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="only show how many emulated machines the cores of this machine carry",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: 1)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every replay there")
    options = parser.parse_args()
    quick = options.quick
    options.workloads = options.workloads or (names[:1] if quick else names)
    options.arrivals = options.arrivals or (["poisson"] if quick else ["poisson", "bursty"])
    options.tightness = options.tightness or ([2.0] if quick else [1.5, 2.5])
    options.seconds = options.seconds or (6.0 if quick else 10.0)
    options.repeats = options.repeats or (1 if quick else 3)
    options.resolution = options.resolution or (0.01 if options.virtual else 0.025)
    share = 2.0 if options.virtual else 1.25
    options.most = options.most or round(share * options.machines)
    for name in ("machines", "rates", "most", "seconds", "repeats", "side_by_side", "resolution"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if min(options.tightness) <= 1.0:
        parser.error("--tightness must be above 1: full batches have to fit")
    if "pooled" not in options.systems and options.measure != ["goodput"]:
        parser.error("--measure machines and overload compare others with --systems pooled")
    if options.virtual and "overload" in options.measure:
        parser.error("--measure overload is not made in --virtual time")
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.control:
        with tempfile.TemporaryDirectory(prefix="paceline-slo-") as work:
            table = uvloop.run(carried(Path(work), (2, 4, 8, 16, 32), options.seconds / 3))
        Console().print(Markdown("\n".join(table)))
        return
    started_s = time.monotonic()
    command = (sys.executable, HERE / "slo_load.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    try:
        with ExitStack() as stack:
            count = range(options.side_by_side)
            generators = [stack.enter_context(process(command, **pipes)) for _ in count]
            bench = Bench(options, generators)
            uvloop.run(bench_all(bench))
    except KeyboardInterrupt:
        sys.exit(130)
    except PacelineError as error:
        sys.exit(f"bench_slo: {error}")
    Console().print(Markdown(report(bench)))
    print(f"{time.monotonic() - started_s:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
