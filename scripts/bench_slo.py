#!/usr/bin/env python3
"""How many machines does it take to keep an objective?

The same chain, arrivals and objective are served, side by side on this machine, by

  triton       a Triton ensemble with dynamic batching; a small grid of settings is searched and
               the best one counts: machines split over the steps or shared by all of them (rate
               limiter), batches launched at once or after waiting to fill, late ones rejected
  round-robin  `paceline serve` with `dispatch: round-robin` (what Nexus does), its plan made for
               the largest rate that its bounds allow on those machines
  pooled       `paceline serve` as it is: pooled dispatch, admission control, planned for the mean
               rate of the arrivals

on real Tritons. A machine is one instance of a model that sleeps d(b), by profiles measured on
T4 and V100; it uses no CPU, so many fit. For growing numbers of machines it prints the attainment
(answers within the objective, of all requests) and the least number that reaches the target.

Load is open loop: requests leave at instants fixed in advance, from a process per system, and
latency counts from those instants. Arrivals are Poisson, or follow a window of a Twitter trace,
compressed to the length of a replay, at the same mean rate times --trace-load.

Timing on a shared machine is noisy. So all systems replay the same arrivals, at most
--side-by-side of them at a time and in changing company, medians of repeats count, and the control
shows by how much emulated executions took longer than d(b).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

# Before grpc is imported: its fork handlers are of no use to a child that execs, and talk.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import uvloop
from rich.console import Console
from rich.markdown import Markdown

from paceline.core.errors import PacelineError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts import slo_workloads  # noqa: E402
from scripts.bench_gateway import process  # noqa: E402
from scripts.slo_control import carried  # noqa: E402
from scripts.slo_report import SYSTEMS, TRITON, Cell, Figures, Results, report  # noqa: E402
from scripts.slo_systems import (  # noqa: E402
    SETTINGS,
    Front,
    Lane,
    Setting,
    possible,
    round_robin,
    start_ensembles,
    start_front,
)
from scripts.slo_workloads import WORKLOADS, Served  # noqa: E402

ARRIVALS = {"poisson": "", "bursty": "ipa_bursty", "steady": "ipa_steady_high"}
"""What can be replayed, and the window of the trace file it follows."""

EXAMPLES = HERE.parent / "examples"
HEAD_START_S = 0.5
GIVE_UP_S = 5.0
TARGET = 0.99
KEPT_SETTINGS = 3


@dataclass(slots=True)
class Bench:
    """Everything that lasts for the whole run."""

    options: argparse.Namespace
    results: Results
    generators: list[subprocess.Popen[str]]
    errors: list[tuple[int, float]] = field(default_factory=list)
    note: Console = field(default_factory=lambda: Console(stderr=True))

    async def wave(
        self, cell: Cell, served: Served, lanes: Sequence[Lane], seed: int
    ) -> dict[str, Figures]:
        """The same arrivals to some systems at once."""
        work, options = served.workload, self.options
        window = ARRIVALS[cell.arrivals]
        if window:
            shape = slo_workloads.trace_window(options.traces, window)
            rate_rps = work.rate_rps * options.trace_load
            arrivals_s = slo_workloads.varying(shape, rate_rps, options.seconds, seed)
        else:
            arrivals_s = slo_workloads.poisson(work.rate_rps, options.seconds, seed)
        kinds = [0] * len(arrivals_s)
        if work.fans_out:
            kinds = slo_workloads.item_counts(work, len(arrivals_s), seed)
        start_s = time.monotonic() + HEAD_START_S
        answers = await asyncio.gather(
            *(
                asyncio.to_thread(_ask, generator, lane, kinds, arrivals_s, start_s)
                for generator, lane in zip(self.generators, lanes, strict=False)
            )
        )
        return {
            lane.name: Figures.of(answer, work.slo_ms / 1e3)
            for lane, answer in zip(lanes, answers, strict=True)
        }

    async def replay(self, cell: Cell, served: Served, lanes: Sequence[Lane], repeat: int) -> None:
        """Every lane once, in waves whose company changes from repeat to repeat."""
        turn = repeat % len(lanes)
        order = [*lanes[turn:], *lanes[:turn]]
        size = self.options.side_by_side
        seed = self.options.seed + 1000 * repeat
        for start in range(0, len(order), size):
            found = await self.wave(cell, served, order[start : start + size], seed)
            for name, figures in found.items():
                self.results.add(cell, name, figures)
                self.note.print(
                    f"  {cell.workload} {cell.arrivals}, {cell.machines} machines, "
                    f"{name}: {figures.attainment:.1%}, rejected {figures.rejected:.1%}, "
                    f"p50 {figures.p50_ms:.0f} ms, p99 {figures.p99_ms:.0f} ms"
                    + (f", sent {figures.late_p99_ms:.0f} ms late" * (figures.late_p99_ms > 20)),
                    highlight=False,
                )


def _ask(
    generator: subprocess.Popen[str],
    lane: Lane,
    kinds: list[int],
    arrivals_s: list[float],
    start_s: float,
) -> dict[str, Any]:
    assert generator.stdin is not None and generator.stdout is not None
    load = {
        "target": lane.target,
        "messages": lane.messages,
        "kinds": kinds,
        "arrivals_s": arrivals_s,
        "start_s": start_s,
        "give_up_s": GIVE_UP_S,
    }
    generator.stdin.write(json.dumps(load) + "\n")
    generator.stdin.flush()
    line = generator.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "the generator ended"}
    if "error" in answer:
        raise SystemExit(f"bench_slo: {lane.name} at {lane.target}: {answer['error']}")
    return answer


async def run_workload(bench: Bench, served: Served, work: Path) -> None:
    """All arrivals and numbers of machines of one workload."""
    options = bench.options
    least = served.least_machines
    for arrivals in options.arrivals:
        settings: Sequence[Setting] = ()
        if not served.workload.fans_out:
            settings = await screen(
                bench, Cell(served.workload.name, arrivals, least), served, work
            )
        # Below the least nobody can: how gracefully it fails still differs.
        for machines in range(least - options.overload, least + options.span + 1):
            cell = Cell(served.workload.name, arrivals, machines)
            await measure(bench, cell, served, work, settings)
            systems = [s for s in SYSTEMS if s not in TRITON or settings]
            if machines > least and all(bench.results.attains(cell, s) for s in systems):
                break


async def screen(bench: Bench, least: Cell, served: Served, work: Path) -> list[Setting]:
    """The best settings, of all measured once with one machine more than the least."""
    cell = replace(least, machines=least.machines + 1)
    bench.note.print(f"{cell.workload}, {cell.arrivals}: tuning Triton on {cell.machines} machines")
    tried = [setting for setting in SETTINGS if possible(served, setting, cell.machines)]
    scores: dict[str, Figures] = {}
    size = bench.options.side_by_side
    for start in range(0, len(tried), size):
        async with AsyncExitStack() as stack:
            group = tried[start : start + size]
            lanes, _ = await start_ensembles(work, served, cell.machines, group, stack)
            scores |= await bench.wave(cell, served, lanes, bench.options.seed - 1)
    for name, figures in scores.items():
        bench.note.print(f"  {name}: {figures.attainment:.1%}, p99 {figures.p99_ms:.0f} ms")
    tried.sort(key=lambda s: (-round(scores[s.name].attainment, 3), scores[s.name].p99_ms))
    # One that shares machines and one that splits them are always among them.
    firsts = [next(s for s in tried if s.shared is shared) for shared in (False, True)]
    rest = [setting for setting in tried if setting not in firsts]
    return [*firsts, *rest[: KEPT_SETTINGS - len(firsts)]]


async def measure(
    bench: Bench, cell: Cell, served: Served, work: Path, settings: Sequence[Setting]
) -> None:
    """Bring up every system on that many machines, replay, take them down."""
    options = bench.options
    rate_rps = served.workload.rate_rps
    rate_rps *= options.trace_load if ARRIVALS[cell.arrivals] else 1.0
    fronts = (Front("pooled", rate_rps), round_robin(served, cell.machines, rate_rps))
    settings = [setting for setting in settings if possible(served, setting, cell.machines)]
    async with AsyncExitStack() as stack:
        processes = stack.enter_context(ExitStack())
        lanes = []
        for front in fronts:
            lanes.append(await start_front(work, served, front, cell.machines, processes))
        more, ensembles = await start_ensembles(work, served, cell.machines, settings, stack)
        lanes += more
        for repeat in range(options.repeats):
            bench.note.print(
                f"{cell.workload}, {cell.arrivals}, {cell.machines} machines: "
                f"repeat {repeat + 1} of {options.repeats}"
            )
            await bench.replay(cell, served, lanes, repeat)
        for each in ensembles:
            bench.errors += await each.execution_errors()


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
        for lanes in bench.results.runs.values()
        for runs in lanes.values()
        for run in runs
    ]
    lines.append(
        f"The load generators sent 99 % of the requests within {median(late):.1f} ms of their "
        f"instants (median over the replays; {max(late):.1f} ms in the worst)."
    )
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  scripts/bench_slo.py --quick                   # chain2, about 2 minutes\n"
        "  scripts/bench_slo.py --workloads fork --arrivals poisson steady --overload\n"
        "  scripts/bench_slo.py --markdown figures.md     # everything; about 40 minutes\n",
    )
    names = [work.name for work in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="chain2, Poisson, short replays")
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
        "--trace-load",
        type=float,
        default=0.65,
        help="mean rate of trace replays, as a share of the workload's (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, help="of a replay (default: 15; quick: 6)")
    parser.add_argument("--repeats", type=int, help="(default: 3; quick: 1)")
    parser.add_argument(
        "--span",
        type=int,
        help="how many machines more than the least to try (default: 2; quick: 1)",
    )
    parser.add_argument(
        "--overload", action="store_true", help="also with one machine less than can do"
    )
    parser.add_argument(
        "--side-by-side",
        type=int,
        default=3,
        help="systems that are replayed to at a time (default: %(default)s)",
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
    options.seconds = options.seconds or (6.0 if quick else 15.0)
    options.repeats = options.repeats or (1 if quick else 3)
    options.span = options.span if options.span is not None else (1 if quick else 2)
    return options


async def bench_all(bench: Bench) -> None:
    chosen = [work for work in WORKLOADS if work.name in bench.options.workloads]
    for served in [slo_workloads.read(work, bench.options.profiles) for work in chosen]:
        with tempfile.TemporaryDirectory(prefix="paceline-slo-") as work:
            await run_workload(bench, served, Path(work))


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
            bench = Bench(options, Results(TARGET), generators)
            uvloop.run(bench_all(bench))
    except KeyboardInterrupt:
        sys.exit(130)
    except PacelineError as error:
        sys.exit(f"bench_slo: {error}")
    set_up = (
        f"{os.cpu_count()} cores; {options.repeats} repeats of {options.seconds:g} s, seed "
        f"{options.seed}, up to {options.side_by_side} systems side by side. "
        + " ".join(
            f"`{work.name}`: {work.title}, {work.hardware}, {work.rate_rps:g} requests/s, "
            f"{work.slo_ms:g} ms."
            for work in WORKLOADS
            if work.name in options.workloads
        )
    )
    text = report(bench.results, set_up, controls(bench))
    Console().print(Markdown(text))
    print(f"{time.monotonic() - started_s:.0f} s", file=sys.stderr)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(bench.results.flat(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
