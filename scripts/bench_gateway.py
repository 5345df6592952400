#!/usr/bin/env python3
"""What does a request cost in the front server, and what does it gain?

Runs side by side, on this machine, in interleaved repeats:

  echo        a bare grpc.aio server on uvloop that answers raw bytes with themselves
  own         the same on Paceline's own gRPC server
  relay       Paceline's server and its client of Triton with nothing between them, one model with
              dynamic batching: what any front on these costs at least
  triton      one identity model, called on Triton directly
  dynamic     the same with Triton's dynamic batching
  ensemble    three of those as a Triton ensemble
  paceline-1  `paceline serve`, a chain of one such model
  paceline-3  a chain of three, executed at once (`runs: auto`)
  apart-3     the same chain, module by module (`runs: off`)
  naive       the front as one writes it first, for one model: grpc.aio, protobuf objects,
              tritonclient.grpc.aio, no shared memory; Triton batches dynamically
  before-1, before-3, before-a
              the three chains by the code of another source tree (`--before`)

For each tensor size, call type and number of requests in flight: median latency, requests/s, and
CPU time per request of the front process alone (of the echo servers; of all of Triton's processes
for the rows that have no front). Then the figures that matter: latency added per module, requests
per second of one front core, CPU compared with the bare echo server.

The machine is shared and noisy: medians of repeats are shown, and ratios are medians of the
ratios within each repeat. Trust the ratios. Two gRPC clients, a Triton and the front server share
its cores, so requests/s is what all of them leave for each other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.markdown import Markdown

from paceline.core.errors import PacelineError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts import gateway_analyzer  # noqa: E402
from scripts.gateway_peers import MAX_BATCH, Peer, peers, process, source_tree  # noqa: E402
from scripts.gateway_report import BEFORE, FRONTED, Cell, Results, report  # noqa: E402

SIZES = {"64B": 64, "600KB": 600_000, "5MB": 5_000_000}


def ask(generator: subprocess.Popen[str], peer: Peer, cell: Cell, seconds_s: float) -> Any:
    assert generator.stdin is not None and generator.stdout is not None
    load = {
        "target": peer.target,
        "message": str(peer.message),
        "least_bytes": peer.least_bytes,
        "in_flight": cell.in_flight,
        "duration_s": seconds_s,
        "stream": cell.stream,
        "pids": peer.pids(),
    }
    generator.stdin.write(json.dumps(load) + "\n")
    generator.stdin.flush()
    line = generator.stdout.readline()
    return json.loads(line) if line else {"error": "the load generator ended"}


def analyze(peer: Peer, cell: Cell, seconds_s: float) -> dict[str, Any]:
    try:
        return gateway_analyzer.measure(peer, cell, seconds_s)
    except RuntimeError as error:
        return {"error": str(error)}


async def run_size(size: str, options: argparse.Namespace, results: Results) -> None:
    modes = [mode == "stream" for mode in options.modes]
    cells = [Cell(size, *pair) for pair in itertools.product(modes, options.in_flight)]
    note = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as work:
        command = (sys.executable, HERE / "gateway_load.py", "load")
        async with peers(Path(work), SIZES[size], options) as cases:
            with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as generator:
                measure = partial(ask, generator) if options.client == "grpc.aio" else analyze
                for repeat, cell in itertools.product(range(options.repeats), cells):
                    note.print(f"repeat {repeat + 1} of {options.repeats}: {cell.title}")
                    wanted = [name for name in cases if name in options.cases]
                    turn = repeat % len(wanted)
                    figures = {}
                    for case in wanted[turn:] + wanted[:turn]:
                        # In a thread: the loop supervises Triton meanwhile.
                        figures[case] = await asyncio.to_thread(
                            measure, cases[case], cell, options.seconds
                        )
                    failed = {c: f["error"] for c, f in figures.items() if "error" in f}
                    for case, reason in failed.items():
                        note.print(f"left out: {cell.title}, as {case} failed: {reason}")
                    for case in wanted if not failed else ():
                        results.add(cell, case, figures[case])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  scripts/bench_gateway.py --quick\n"
        "  scripts/bench_gateway.py --sizes 600KB --in-flight 1 32\n"
        "  scripts/bench_gateway.py --markdown figures.md     # everything; about 20 minutes\n",
    )
    every = ("echo", "own", "relay", "naive", "triton", "dynamic", "ensemble", *FRONTED, *BEFORE)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="64 B and 600 KB, unary, 1 and 32 in flight; about a minute",
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=None, help="tensor sizes (default: all)"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=("unary", "stream"), default=None, help="(default: both)"
    )
    parser.add_argument(
        "--in-flight",
        nargs="+",
        type=int,
        default=None,
        help="requests outstanding (default: 1 8 32 64)",
    )
    parser.add_argument(
        "--cases", nargs="+", choices=every, default=every, help="leave out the others"
    )
    parser.add_argument(
        "--client",
        choices=("grpc.aio", "perf_analyzer"),
        default="grpc.aio",
        help="who sends the requests: a generator in Python, or NVIDIA's, which is lighter and "
        "cannot measure `echo` and `own` (default: grpc.aio)",
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="per measurement (default: 1.5; quick: 0.6)"
    )
    parser.add_argument("--repeats", type=int, default=None, help="(default: 5; quick: 3)")
    parser.add_argument(
        "--slots",
        type=int,
        default=os.cpu_count() or 1,
        help="batches Paceline executes at a time (default: the cores, as `paceline serve`)",
    )
    parser.add_argument(
        "--before",
        type=source_tree,
        metavar="DIR",
        help="also measure the front server of another source tree (a `git worktree`; compiled if "
        "its scripts/compile_server.py was run by this Python); `.`: this one's, interpreted",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every measurement there"
    )
    options = parser.parse_args()
    if options.client == "perf_analyzer":
        known = (*gateway_analyzer.CASES, *FRONTED, *BEFORE)
        options.cases = [case for case in options.cases if case in known]
        if not options.cases:
            parser.error("--client perf_analyzer: it measures " + ", ".join(known))
    if options.before is None:
        options.cases = [case for case in options.cases if case not in BEFORE]
        if not options.cases:
            parser.error(f"{', '.join(BEFORE)}: of which code? (--before DIR)")
    quick = options.quick
    options.sizes = options.sizes or (["64B", "600KB"] if quick else list(SIZES))
    options.modes = options.modes or (["unary"] if quick else ["unary", "stream"])
    options.in_flight = options.in_flight or ([1, 32] if quick else [1, 8, 32, 64])
    options.seconds = options.seconds or (0.6 if quick else 1.5)
    options.repeats = options.repeats or (3 if quick else 5)
    return options


async def bench(options: argparse.Namespace) -> Results:
    results = Results()
    for size in options.sizes:
        await run_size(size, options, results)
    return results


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started_s = time.monotonic()
    try:
        results = uvloop.run(bench(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except PacelineError as error:
        sys.exit(f"bench_gateway: {error}")
    set_up = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}; "
        f"{options.repeats} repeats of {options.seconds:g} s per figure, sent by "
        f"{options.client}; slots {options.slots}; batches of up to {MAX_BATCH}."
    )
    text = report(results, set_up)
    Console().print(Markdown(text))
    print(f"{time.monotonic() - started_s:.0f} s", file=sys.stderr)
    if options.markdown is not None:
        options.markdown.write_text(text)
    if options.json is not None:
        flat = [
            {**asdict(cell), "case": case, "repeat": repeat, **run}
            for cell, cases in results.runs.items()
            for case, runs in cases.items()
            for repeat, run in enumerate(runs)
        ]
        options.json.write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
