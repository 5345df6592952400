"""Who is measured by `bench_gateway.py`: models, chains, and the processes that serve them.

Invariant: every process is stopped when its block ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from scripts.gateway_report import BEFORE, FRONTED
from tritonclient.grpc import service_pb2

from paceline import compiled
from paceline.core.errors import PacelineError
from paceline.database import connect
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.v1.control_pb2 import StatusRequest
from paceline.v1.control_pb2_grpc import ControlStub

HERE = Path(__file__).resolve().parent
MAX_BATCH = 32
READY_TIMEOUT_S = 180.0

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
    model: str
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


def source_tree(path: str) -> Path:
    """A work tree of Paceline, as an argument."""
    if not (Path(path) / "server" / "paceline").is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no source tree of Paceline")
    return Path(path)


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
        made[case] = Peer(target, model, path, size_bytes, pids)

    async with AsyncExitStack() as stack:

        def play(role: str, model: str, *arguments: str) -> None:
            """A case that is a role of gateway_load.py."""
            port = str(free_port())
            script = str(HERE / "gateway_load.py")
            command = (sys.executable, script, role, "--port", port, *arguments)
            child = stack.enter_context(process(command))
            add(role, f"127.0.0.1:{port}", model, True, lambda: (child.pid,))

        for case in ("echo", "own"):
            play(case, "plain")
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
        play("relay", "a", "--triton", triton.url)
        play("naive", "a", "--triton", triton.url, "--model", "a")
        fronts = [(HERE.parent, FRONTED)]
        if options.before is not None:
            fronts.append((options.before, BEFORE))
        for tree, cases in fronts:
            # This code as `before`: what compiling it is worth.
            interpreted = cases is BEFORE and tree.resolve() == HERE.parent
            target, front = await start_front(work, options, stack, tree, interpreted=interpreted)
            for case, chain in zip(cases, ("one", "three", "apart"), strict=True):
                add(case, target, chain, False, lambda pid=front: (pid,))
        yield made


async def start_front(
    work: Path,
    options: argparse.Namespace,
    stack: AsyncExitStack,
    tree: Path,
    *,
    interpreted: bool,
) -> tuple[str, int]:
    """`paceline serve` of a source tree with a local Triton of its own: where it listens, its
    process.

    Started twice: what the first one measured of the models on this noisy machine decides the
    batch sizes of the plan, so it is replaced by the same figures every time.
    """
    name = "before" if interpreted or tree != HERE.parent else "paceline"
    state = work / f"{name}-state"
    command: list[str | Path] = [
        *(sys.executable, HERE / "gateway_load.py", "paceline", "serve"),
        *("--model-repository", work / "models", "--chains", work / "chains"),
        *("--state-dir", state, "--http-port", "0", "--slots", str(options.slots)),
        # The plan stays the same for every case.
        *("--replan-window-s", "0"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "server"),
        compiled.VARIABLE: "1" if interpreted else "0",
    }
    with ExitStack() as first:
        await _serve(command, environment, work / f"{name}-profiling.log", first)
    pin_profiles(state)
    target, front = await _serve(command, environment, work / f"{name}.log", stack)
    await check_forms(target)
    return target, front.pid


async def _serve(
    command: list[str | Path],
    environment: dict[str, str],
    log_path: Path,
    stack: ExitStack | AsyncExitStack,
) -> tuple[str, subprocess.Popen[str]]:
    port = free_port()
    log = stack.enter_context(log_path.open("w"))
    front = stack.enter_context(
        process(
            [*command, "--grpc-port", str(port)],
            stdout=log,
            stderr=log,
            env=environment,
        )
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
