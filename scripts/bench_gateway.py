#!/usr/bin/env python3
"""What does a request cost in the front server, and what does it gain?

Runs side by side, on this machine, in interleaved repeats:

  echo        a bare grpc.aio server on uvloop that answers raw bytes with themselves
  own         the same on Paceline's own gRPC server
  triton      one identity model, called on Triton directly
  dynamic     the same with Triton's dynamic batching
  ensemble    three of those as a Triton ensemble
  paceline-1  `paceline serve`, a chain of one such model
  paceline-3  a chain of three, executed at once (`runs: auto`)
  apart-3     the same chain, module by module (`runs: off`)
  naive       the front as one writes it first, for one model: grpc.aio, protobuf objects,
              tritonclient.grpc.aio, no shared memory; Triton batches dynamically

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
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import uvloop
from rich.console import Console
from rich.markdown import Markdown
from tritonclient.grpc import service_pb2

from paceline.core.errors import PacelineError
from paceline.database import connect
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.v1.control_pb2 import StatusRequest
from paceline.v1.control_pb2_grpc import ControlStub

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts.gateway_report import Cell, Results, report  # noqa: E402

SIZES = {"64B": 64, "600KB": 600_000, "5MB": 5_000_000}
MAX_BATCH = 32
READY_TIMEOUT_S = 180.0
FRONTED = ("paceline-1", "paceline-3", "apart-3")

_IDENTITY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([
            pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(request, "x").as_numpy())])
            for request in requests]
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A case: where it listens, what is sent to it, whose CPU time counts."""

    target: str
    message: Path
    least_bytes: int
    pids: Callable[[], tuple[int, ...]]


# -- what is served ----------------------------------------------------------------------------


def write_repository(root: Path, elements: int) -> None:
    """`plain`, and `a`, `b`, `c` (dynamic batching) with their ensemble `abc`."""
    for name in ("plain", "a", "b", "c"):
        config = (
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH}\n'
            f'input [{{name: "x" data_type: TYPE_UINT8 dims: [{elements}]}}]\n'
            f'output [{{name: "y" data_type: TYPE_UINT8 dims: [{elements}]}}]\n'
            "instance_group [{count: 1 kind: KIND_CPU}]\n"
        )
        config += "dynamic_batching {}\n" if name != "plain" else ""
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        (root / name / "1" / "model.py").write_text(_IDENTITY)


def write_ensemble(root: Path, name: str, elements: int) -> None:
    """`a`, `b` and `c` one after the other."""
    steps = ", ".join(
        f'{{model_name: "{model}" model_version: -1 '
        f'input_map {{key: "x" value: "{given}"}} output_map {{key: "y" value: "{made}"}}}}'
        for model, given, made in (("a", "x", "t1"), ("b", "t1", "t2"), ("c", "t2", "y"))
    )
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(
        f'name: "{name}"\nplatform: "ensemble"\nmax_batch_size: {MAX_BATCH}\n'
        f'input [{{name: "x" data_type: TYPE_UINT8 dims: [{elements}]}}]\n'
        f'output [{{name: "y" data_type: TYPE_UINT8 dims: [{elements}]}}]\n'
        f"ensemble_scheduling {{step [{steps}]}}\n"
    )


def write_chains(root: Path, elements: int) -> None:
    """`one` (model a), `three` and `apart` (a, b, c): planned for less than they see, which they
    are served all the same."""
    root.mkdir()
    for name, models, runs in (
        ("one", "a", "off"),
        ("three", "abc", "auto"),
        ("apart", "abc", "off"),
    ):
        lines = [
            f"chain: {name}\nslo_ms: 120000\nrate_rps: 20\narrivals: uniform\nruns: {runs}",
            f"inputs: {{x: {{dtype: UINT8, shape: [{elements}]}}}}\nmodules:",
        ]
        source = "inputs.x"
        for model in models:
            lines.append(f"  m{model}: {{model: {model}, inputs: {{x: {source}}}}}")
            source = f"m{model}.y"
        lines.append(f"outputs: {{y: {source}}}\n")
        (root / f"{name}.yaml").write_text("\n".join(lines))


def write_message(path: Path, model: str, shape: list[int], payload: bytes) -> Path:
    message = service_pb2.ModelInferRequest(model_name=model, id="0")
    message.inputs.add(name="x", datatype="UINT8", shape=shape)
    message.raw_input_contents.append(payload)
    path.write_bytes(message.SerializeToString())
    return path


# -- the processes -----------------------------------------------------------------------------


@contextmanager
def process(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that is stopped (SIGTERM, then SIGKILL) when the block ends."""
    child = subprocess.Popen([str(part) for part in command], text=True, **options)
    try:
        yield child
    finally:
        for stop, limit_s in ((child.terminate, 20.0), (child.kill, 5.0)):
            if child.poll() is not None:
                break
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(limit_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until_ready(
    target: str, model: str, child: subprocess.Popen[str], log: Callable[[], str]
) -> None:
    client = TritonClient(target)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                if child.poll() is not None:
                    raise SystemExit(f"the front server ended; its log: {log()}")
                with contextlib.suppress(PacelineError):
                    if await client.model_ready(model):
                        return
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise SystemExit(f"{target} was not ready within {READY_TIMEOUT_S:g} s") from None
    finally:
        await client.close()


@asynccontextmanager
async def peers(
    work: Path, size_bytes: int, options: argparse.Namespace
) -> AsyncIterator[dict[str, Peer]]:
    """Every case, up and ready, with tensors of one size."""
    write_repository(work / "models", size_bytes)
    write_chains(work / "chains", size_bytes)
    write_ensemble(work / "ensembles", "abc", size_bytes)
    payload = random.Random(size_bytes).randbytes(size_bytes)
    made: dict[str, Peer] = {}

    def add(case: str, target: str, model: str, batched: bool, pids: Any) -> None:
        shape = [1, size_bytes] if batched else [size_bytes]
        path = write_message(work / f"{case}.bin", model, shape, payload)
        made[case] = Peer(target, path, size_bytes, pids)

    async with AsyncExitStack() as stack:
        for case in ("echo", "own"):
            port = free_port()
            echo = stack.enter_context(
                process([sys.executable, HERE / "gateway_load.py", case, "--port", str(port)])
            )
            add(case, f"127.0.0.1:{port}", "plain", True, lambda pid=echo.pid: (pid,))
        triton = await stack.enter_async_context(
            LocalTriton(
                LocalTritonSettings(
                    state_directory=work / "triton",
                    model_repositories=(work / "models", work / "ensembles"),
                )
            )
        )
        client = TritonClient(triton.url)
        for model in ("plain", "a", "b", "c", "abc"):
            await client.load(model, timeout_s=READY_TIMEOUT_S)
        await client.close()
        add("triton", triton.url, "plain", True, lambda: family(triton.pid))
        add("dynamic", triton.url, "a", True, lambda: family(triton.pid))
        add("ensemble", triton.url, "abc", True, lambda: family(triton.pid))
        port = free_port()
        naive = stack.enter_context(
            process(
                [
                    *(sys.executable, HERE / "gateway_load.py", "naive", "--port", str(port)),
                    *("--triton", triton.url, "--model", "a"),
                ]
            )
        )
        add("naive", f"127.0.0.1:{port}", "a", True, lambda: (naive.pid,))
        target, front = await start_front(work, options, stack)
        for case, chain in (("paceline-1", "one"), ("paceline-3", "three"), ("apart-3", "apart")):
            add(case, target, chain, False, lambda: (front.pid,))
        await check_forms(target)
        yield made


async def start_front(
    work: Path, options: argparse.Namespace, stack: AsyncExitStack
) -> tuple[str, subprocess.Popen[str]]:
    """`paceline serve` with a local Triton of its own.

    Started twice: what the first one measured of the models on this noisy machine decides the
    batch sizes of the plan, so it is replaced by the same figures every time.
    """
    state = work / "paceline-state"
    command: list[str | Path] = [
        *(sys.executable, HERE / "gateway_load.py", "paceline", "serve"),
        *("--model-repository", work / "models", "--chains", work / "chains"),
        *("--state-dir", state, "--http-port", "0", "--slots", str(options.slots)),
        # The plan stays the same for every case.
        *("--replan-window-s", "0"),
    ]
    with ExitStack() as first:
        await _serve(command, work / "profiling.log", first)
    pin_profiles(state)
    return await _serve(command, work / "paceline.log", stack)


async def _serve(
    command: list[str | Path], log_path: Path, stack: ExitStack | AsyncExitStack
) -> tuple[str, subprocess.Popen[str]]:
    port = free_port()
    log = stack.enter_context(log_path.open("w"))
    front = stack.enter_context(
        process([*command, "--grpc-port", str(port)], stdout=log, stderr=log)
    )
    await until_ready(f"127.0.0.1:{port}", "three", front, log_path.read_text)
    return f"127.0.0.1:{port}", front


async def check_forms(target: str) -> None:
    """The cases are what they are called: one chain is served at once, the other is not."""
    async with grpc.aio.insecure_channel(target) as channel:
        status = await ControlStub(channel).Status(StatusRequest())
    served = {"three": "ma+mb+mc", "apart": "ma mb mc", "one": "ma"}
    found = {
        chain: " ".join(
            m["module"] for m in json.loads(status.json)["modules"] if m["chain"] == chain
        )
        for chain in served
    }
    if found != served:
        raise SystemExit(f"chains are served as {found}, not as {served}")


def pin_profiles(state: Path) -> None:
    """A millisecond a batch and a tenth of one a row: large batches pay, as on an accelerator."""
    sizes = [2**power for power in range(MAX_BATCH.bit_length())]
    rows = [{"batch_size": size, "duration_ms": 1 + size / 10} for size in sizes]
    with contextlib.closing(connect(state)) as database, database:
        for model, key, text in database.execute("SELECT * FROM profiles").fetchall():
            document = json.dumps({**json.loads(text), "rows": rows})
            database.execute(
                "UPDATE profiles SET document = ? WHERE model = ? AND key = ?",
                (document, model, key),
            )


def family(pid: int | None) -> tuple[int, ...]:
    """Triton and its model processes."""
    if pid is None:
        raise SystemExit("the Triton that is measured directly has ended")
    return (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))


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


async def run_size(size: str, options: argparse.Namespace, results: Results) -> None:
    modes = [mode == "stream" for mode in options.modes]
    cells = [Cell(size, *pair) for pair in itertools.product(modes, options.in_flight)]
    note = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as work:
        command = (sys.executable, HERE / "gateway_load.py", "load")
        async with peers(Path(work), SIZES[size], options) as cases:
            with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as generator:
                for repeat, cell in itertools.product(range(options.repeats), cells):
                    note.print(f"repeat {repeat + 1} of {options.repeats}: {cell.title}")
                    wanted = [name for name in cases if name in options.cases]
                    turn = repeat % len(wanted)
                    figures = {}
                    for case in wanted[turn:] + wanted[:turn]:
                        # In a thread: the loop supervises Triton meanwhile.
                        figures[case] = await asyncio.to_thread(
                            ask, generator, cases[case], cell, options.seconds
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
    every = ("echo", "own", "naive", "triton", "dynamic", "ensemble", *FRONTED)
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
        "--seconds", type=float, default=None, help="per measurement (default: 1.5; quick: 0.6)"
    )
    parser.add_argument("--repeats", type=int, default=None, help="(default: 5; quick: 3)")
    parser.add_argument(
        "--slots",
        type=int,
        default=os.cpu_count() or 1,
        help="batches Paceline executes at a time (default: the cores, as `paceline serve`)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every measurement there"
    )
    options = parser.parse_args()
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
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    started_s = time.monotonic()
    try:
        results = uvloop.run(bench(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except PacelineError as error:
        sys.exit(f"bench_gateway: {error}")
    set_up = (
        f"{os.cpu_count()} cores; {options.repeats} repeats of {options.seconds:g} s per figure; "
        f"slots {options.slots}; batches of up to {MAX_BATCH}."
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
