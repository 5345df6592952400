#!/usr/bin/env python3
"""What is served by machines of two kinds, at the planned rate and in overload?

A chain of two (detection, then classification) on real Tritons, one for each machine: some follow
profiles measured on T4, the others on V100 (timed models, as in `bench_slo.py`). `paceline serve`
plans for --load of what all of them do in full batches, and gets 0.5 to 5 times that rate, then the
planned rate again: it replans meanwhile, as it does for users. Prints what was planned first, then
for each rate the share of requests that was answered within the objective, goodput as a share of
the planned rate, and how long refusals took.

`--before DIR` has the front of another source tree (a git worktree) served afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop
from rich.console import Console
from rich.markdown import Markdown

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts.gateway_peers import free_port, process, source_tree, until_ready  # noqa: E402
from scripts.slo_report import Figures  # noqa: E402
from scripts.slo_run import HEAD_START_S, ask  # noqa: E402
from scripts.slo_systems import SLO_MARGIN_MS, Lane, message  # noqa: E402
from scripts.slo_workloads import (  # noqa: E402
    Served,
    Step,
    Workload,
    chain_yaml,
    poisson,
    read,
    write_chain_models,
)

from paceline.core.errors import PacelineError  # noqa: E402
from paceline.triton.launcher import LocalTriton, LocalTritonSettings  # noqa: E402

PROFILES = HERE.parent / "examples" / "data" / "profiles.csv"
PRICES = "hardware,price_per_hour,memory_mib\nt4,0.526,16384\nv100,1.2,16384\n"
"""A V100 at 2.3 times the price of a T4, as it is 2.1 times as fast at these models: a T4 is the
cheaper one, until there are no more."""
NAME = "mixed"
STEPS = (
    Step("detect", "ssd320-resnet50-tensorflow-fp32"),
    Step("classify", "resnext101-32x4d-tensorflow-fp32", "detect"),
)
LARGEST = 8
WARM_UP = 0.3
OFFERED = (0.5, 1.0, 1.5, 2.0, 5.0, 1.0)


def kinds(profiles: Path) -> dict[str, Served]:
    """The workload as each kind of hardware runs it."""
    return {
        kind: read(Workload(NAME, "", kind, LARGEST, STEPS), profiles) for kind in ("t4", "v100")
    }


async def start_tritons(
    work: Path, on: Mapping[str, Served], counts: Mapping[str, int], stack: AsyncExitStack
) -> list[str]:
    """One for each machine: `HARDWARE@HOST:PORT`."""
    found = []
    for kind, served in on.items():
        models = work / kind
        write_chain_models(models, served)
        for number in range(counts[kind]):
            settings = LocalTritonSettings(
                state_directory=work / f"{kind}-{number}", model_repositories=(models,)
            )
            triton = await stack.enter_async_context(LocalTriton(settings))
            found.append(f"{kind}@{triton.url}")
    return found


async def measure(
    work: Path, options: argparse.Namespace, tritons: Sequence[str], tree: Path
) -> tuple[str, list[tuple[float, Figures]]]:
    """What the front of a source tree said when it was ready, and what it served."""
    home = Path(tempfile.mkdtemp(dir=work))
    chain, prices, log_path = home / "chain.yaml", home / "hardware.csv", home / "log"
    told_ms = options.slo_ms - SLO_MARGIN_MS
    workload = next(iter(options.on.values())).workload
    text = chain_yaml(workload, rate_rps=options.rate_rps, slo_ms=told_ms, dispatch="pooled")
    chain.write_text(text, encoding="utf-8")
    prices.write_text(PRICES, encoding="utf-8")
    port = free_port()
    command: list[str | Path] = [
        *(sys.executable, "-m", "paceline", "serve", "--grpc-port", str(port), "--http-port", "0"),
        *("--chains", chain, "--hardware", prices, "--state-dir", home / "state"),
        *(word for triton in tritons for word in ("--triton", triton)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree / "server")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    target = f"127.0.0.1:{port}"
    lane = Lane("pooled", target, (message(NAME, batched=False),))
    found = []
    with (
        log_path.open("w") as log,
        process(command, stdout=log, stderr=log, env=environment) as server,
        process([sys.executable, HERE / "slo_load.py"], **pipes) as generator,
    ):
        await until_ready(target, NAME, server, log_path.read_text)
        said = log_path.read_text()
        for number, offered in enumerate((WARM_UP, *OFFERED)):
            arrivals_s = poisson(options.rate_rps * offered, options.seconds, options.seed + number)
            start_s = time.monotonic() + HEAD_START_S
            zeros = [0] * len(arrivals_s)
            answer = await asyncio.to_thread(ask, generator, lane, zeros, arrivals_s, start_s)
            figures = Figures.of(answer, options.slo_ms / 1e3)
            options.note.print(f"{offered:g}x: {figures.attainment:.1%}", highlight=False)
            found.append((offered, figures))
    return said, found[1:]


def report(
    options: argparse.Namespace, served: Mapping[str, tuple[str, list[tuple[float, Figures]]]]
) -> str:
    machines = " and ".join(f"{count} {kind}" for kind, count in options.counts.items())
    lines = [
        f"{machines}; {options.rate_rps:.0f} requests/s planned for, {options.load:.0%} of what "
        f"they do in full batches; objective {options.slo_ms:.0f} ms; {options.seconds:g} s a "
        "rate.",
        "",
    ]
    for title, (said, found) in served.items():
        planned = said[said.find("module ") :].split("paceline: ")[0].rstrip()
        lines += [f"### {title}", "", "```", planned, "```", ""]
        lines += [
            "| offered, of the planned rate | in time | goodput, of the planned rate | p99 ms "
            "| refusals, p50 and p99 ms | requests left late by, p99 ms |",
            "|---" * 6 + "|",
        ]
        lines += [
            f"| {offered:g} | {f.attainment:.1%} "
            f"| {f.goodput_rps(options.seconds) / options.rate_rps:.2f} | {f.p99_ms:.0f} "
            f"| {f.refused_p50_ms:.1f}, {f.refused_p99_ms:.1f} | {f.late_p99_ms:.1f} |"
            for offered, f in found
        ]
        lines.append("")
    return "\n".join(lines)


async def bench(options: argparse.Namespace) -> str:
    served = {}
    with tempfile.TemporaryDirectory(prefix="paceline-mixed-") as name:
        async with AsyncExitStack() as stack:
            tritons = await start_tritons(Path(name), options.on, options.counts, stack)
            trees = {"served": HERE.parent} | ({"before": options.before} if options.before else {})
            for title, tree in trees.items():
                served[title] = await measure(Path(name), options, tritons, tree)
    return report(options, served)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in ("t4", "v100"):
        parser.add_argument(f"--{kind}", type=int, default=2, help="machines (default: 2)")
    parser.add_argument(
        "--load", type=float, default=0.85, help="that is planned for (default: %(default)s)"
    )
    parser.add_argument(
        "--tightness",
        type=float,
        default=1.5,
        help="the objective, as a multiple of full batches' path on a T4 (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="a rate (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: 1)")
    parser.add_argument("--before", type=source_tree, metavar="DIR", help="another source tree")
    parser.add_argument("--profiles", type=Path, default=PROFILES, metavar="CSV")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    options = parser.parse_args()
    options.counts = {"t4": options.t4, "v100": options.v100}
    if min(options.t4, options.v100, options.seconds, options.load) <= 0 or options.tightness <= 1:
        parser.error("machines, --load and --seconds must be above 0, --tightness above 1")
    options.note = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options.on = kinds(options.profiles)
        options.slo_ms = round(options.tightness * options.on["t4"].path_s(LARGEST) * 1e3)
        most_rps = sum(count / options.on[kind].row_s for kind, count in options.counts.items())
        options.rate_rps = options.load * most_rps
        text = uvloop.run(bench(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except PacelineError as error:
        sys.exit(f"bench_mixed: {error}")
    Console().print(Markdown(text))
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
