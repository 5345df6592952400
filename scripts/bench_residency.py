"""More models than memory: Paceline's residency against LRU and against unlimited memory, and what
prewarming saves a cold chain. On a real local Triton, with models that take memory and time.

    .venv/bin/python scripts/bench_residency.py [--quick] [--seconds S] [--systems NAME ...]
    .venv/bin/python scripts/bench_residency.py --virtual [--seconds S] [--seeds N]
    .venv/bin/python scripts/bench_residency.py --pacing S

Twelve models of 10 to 120 MiB beside what their processes take, which load the longer the larger
they are; memory for 40 % of their total. Requests follow the shape of a Twitter window, models a
Zipf law whose ranking is dealt anew at every shift. A request is attained when its answer came
within the objective, counted from the instant at which it was due to be sent.

`--virtual` runs the real residency and dispatcher in virtual time instead, where loads and unloads
take what Triton was measured to take, so that long traffic and many seeds cost seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from subprocess import Popen
from time import monotonic, sleep
from typing import Any
from urllib.request import urlopen

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from paceline.core.bind import single_model_chain
from paceline.core.model import ModelSpec
from paceline.core.profile import Durations
from paceline.core.quantities import percentile
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import Action, Answer, Event, route_chain
from paceline.residency.state import Limits
from paceline.sim.backend import SimMachine
from paceline.sim.fleet import BlankModels
from paceline.sim.resident import Memory, ResidentWorld, SimModel
from paceline.sim.stimuli import Arrive, Install
from paceline.sim.workload import read_trace, scaled
from paceline.v1 import control_pb2, control_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scripts.gateway_peers import free_port, process  # noqa: E402
from scripts.residency_models import chain_file, write_ballast  # noqa: E402

TRACE = ROOT / "examples" / "traces" / "twitter_2021-08_ipa_windows_per_second.csv"
INFER = "/inference.GRPCInferenceService/ModelInfer"
MODELS = {f"m{index:02}": 10.0 * index for index in range(1, 13)}
"""Ballast in MiB."""
PROCESS_MIB = 22.0
"""What a model's process takes beside it (PSS), measured."""
LOAD_S_PER_MIB = 0.004
START_S = 0.35
UNLOAD_S = 1.4
"""What a model without ballast takes to load, and any to be gone: measured, used by --virtual."""
MIB = 1 << 20
EXECUTE_S = 0.01
MEMORY_SHARE = 0.4
ZIPF = 1.1
RATE_RPS = 2.0
WINDOW_S = 600.0
"""The window of the trace, whose shape is squeezed into the run."""
OBJECTIVE_S = 0.5
SHIFTS = 4
GIVE_UP_S = 60.0
EXECUTE_BUSY_S = 0.01
STEADY_RPS = 40.0
STEADY_SLO_S = 0.04
LOAD_BUSY_S = 2.0
COLD_EVERY_S = 20.0
COLD_AT_ONCE = 4
"""Of the comparison of paced loads."""
READY_S = 180.0
UNLOADED_S = 180.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One replay: latencies in seconds (None: failed), and the server's counts."""

    latencies_s: list[float | None]
    counts: dict[str, float]

    def row(self, name: str) -> str:
        met = sum(took is not None and took <= OBJECTIVE_S for took in self.latencies_s)
        answered = sorted(took for took in self.latencies_s if took is not None)
        uses = self.counts.get("hits", 0) + self.counts.get("misses", 0)
        misses = f"{self.counts['misses'] / uses:.1%}" if uses else "-"
        moved = f"{self.counts.get('loads', 0):.0f}" if uses else "-"
        return (
            f"| {name} | {len(self.latencies_s)} | {misses} | {moved} "
            f"| {percentile(answered, 0.5) * 1e3:.0f} | {percentile(answered, 0.99) * 1e3:.0f} "
            f"| {met / len(self.latencies_s):.1%} | {len(self.latencies_s) - len(answered)} |"
        )


def requests(seconds: float, seed: int) -> list[tuple[float, str]]:
    """When which model is asked for: the same for every system."""
    rng = Random(seed)
    whole = read_trace(TRACE, rng, rate_rps=RATE_RPS * seconds / WINDOW_S, window="ipa_bursty")
    arrivals = scaled(whole, RATE_RPS)
    names, found = list(MODELS), []
    weights = [1.0 / rank**ZIPF for rank in range(1, len(names) + 1)]
    shift = -1
    for at_s in arrivals:
        if at_s >= seconds:
            break
        if int(at_s * SHIFTS / seconds) != shift:
            shift = int(at_s * SHIFTS / seconds)
            rng.shuffle(names)
        found.append((at_s, rng.choices(names, weights)[0]))
    return found


def message(name: str, *, batched: bool = True) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=name)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4] if batched else [4])
    request.raw_input_contents.append(bytes(16))
    sent: bytes = request.SerializeToString()
    return sent


@contextmanager
def served(
    work: Path, arguments: Sequence[str], within: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """`paceline serve`, ready: its gRPC target and HTTP address. `within`: what runs a command."""
    grpc_port, http_port = free_port(), free_port()
    command: list[str | Path] = [
        *within,
        *(sys.executable, "-m", "paceline", "serve", "--state-dir", work / "state"),
        *("--grpc-port", str(grpc_port), "--http-port", str(http_port), *arguments),
    ]
    log = (work / "front.log").open("w", encoding="utf-8")
    with log, process(command, stdout=log, stderr=log) as child:
        wait_ready(child, f"http://127.0.0.1:{http_port}", work / "front.log")
        yield f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}"


def wait_ready(child: Popen[str], http: str, log: Path) -> None:
    limit_s = monotonic() + READY_S
    while monotonic() < limit_s:
        if child.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text(encoding='utf-8')}")
        try:
            with urlopen(f"{http}/readyz", timeout=5):
                return
        except OSError:
            sleep(0.2)
    raise SystemExit(f"not ready within {READY_S:g} s")


def counts(http: str) -> dict[str, float]:
    """Residency's counters, as Prometheus sees them."""
    with urlopen(f"{http}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        name, _, value = line.partition(" ")
        if name.startswith("paceline_model_") and name.endswith("_total"):
            key = name.removeprefix("paceline_model_").removesuffix("_total")
            found[key] = float(value)
    return found


async def replay(
    target: str, asked: Sequence[tuple[float, str]], *, quiet: bool = False
) -> list[float | None]:
    """Open loop: sent when due, whatever became of those before."""
    latencies: list[float | None] = [None] * len(asked)
    async with grpc.aio.insecure_channel(target) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10.0)
        call: Any = channel.unary_unary(INFER, None, None)

        async def send(index: int, name: str, due_s: float) -> None:
            try:
                await call(message(name, batched=name != "running"), timeout=GIVE_UP_S)
            except grpc.aio.AioRpcError as error:
                if not quiet:
                    print(f"{name}: {error.code().name} {error.details()}", file=sys.stderr)
            else:
                latencies[index] = monotonic() - due_s

        start_s = monotonic() + 0.1
        async with asyncio.TaskGroup() as group:
            for index, (at_s, name) in enumerate(asked):
                await asyncio.sleep(max(0.0, start_s + at_s - monotonic()))
                group.create_task(send(index, name, start_s + at_s))
    return latencies


def compare(systems: Sequence[str], seconds: float, seed: int) -> None:
    asked = requests(seconds, seed)
    total_mib = sum(MODELS.values()) + PROCESS_MIB * len(MODELS)
    budget_mib = round(MEMORY_SHARE * total_mib)
    print(
        f"{len(MODELS)} models, {total_mib:.0f} MiB with their processes; budget {budget_mib} MiB; "
        f"{len(asked)} requests in {seconds:g} s, {SHIFTS} rankings; "
        f"objective {OBJECTIVE_S * 1e3:.0f} ms; seed {seed}\n"
    )
    print("| system | requests | misses | loads | p50 ms | p99 ms | attained | failed |")
    print("|---|---|---|---|---|---|---|---|")
    bounds = {
        "cost": ["--memory-mib", str(budget_mib)],
        "lru": ["--memory-mib", str(budget_mib), "--eviction", "lru"],
        "load-all": [],
    }
    for name in systems:
        with tempfile.TemporaryDirectory(prefix="paceline-residency-") as made:
            work = Path(made)
            for model, ballast_mib in MODELS.items():
                write_ballast(
                    work / "models",
                    model,
                    ballast_mib,
                    load_s=LOAD_S_PER_MIB * ballast_mib,
                    execute_s=EXECUTE_S,
                )
            arguments = ["--model-repository", str(work / "models"), *bounds[name]]
            with served(work, arguments) as (target, http):
                before = counts(http)
                latencies_s = asyncio.run(replay(target, asked))
                after = counts(http)
        moved = {key: value - before.get(key, 0.0) for key, value in after.items()}
        print(Outcome(latencies_s, moved).row(name), flush=True)


def virtual(systems: Sequence[str], seconds: float, seeds: int) -> None:
    """`compare` in virtual time, over seeds; medians of the seeds' figures."""
    total_mib = sum(MODELS.values()) + PROCESS_MIB * len(MODELS)
    budget_mib = round(MEMORY_SHARE * total_mib)
    print(
        f"virtual time; {len(MODELS)} models, {total_mib:.0f} MiB; budget {budget_mib} MiB; "
        f"{seconds:g} s of {RATE_RPS:g} requests/s, {SHIFTS} rankings; objective "
        f"{OBJECTIVE_S * 1e3:.0f} ms; {seeds} seeds\n"
    )
    print("| system | misses | loads | p50 ms | p99 ms | attained |\n|---|---|---|---|---|---|")
    for name in systems:
        figures = [virtual_run(name, seconds, seed, budget_mib) for seed in range(1, seeds + 1)]
        misses, loads, p50_s, p99_s, attained = (
            median(column) for column in zip(*figures, strict=True)
        )
        print(
            f"| {name} | {misses:.1%} | {loads:.0f} | {p50_s * 1e3:.0f} | {p99_s * 1e3:.0f} "
            f"| {attained:.1%} |",
            flush=True,
        )


def virtual_run(name: str, seconds: float, seed: int, budget_mib: float) -> tuple[float, ...]:
    """Share of misses, loads, p50 and p99 in seconds, share attained."""
    row = (TensorSpec("rows", "UINT8", (1,)),)
    specs = {m: ModelSpec(m, 8, row, (TensorSpec("y", "UINT8", (1,)),)) for m in MODELS}
    durations = {m: {"cpu": Durations(((1, EXECUTE_S), (8, EXECUTE_S)))} for m in MODELS}
    models = {
        model: SimModel(
            int((ballast_mib + PROCESS_MIB) * MIB),
            int((ballast_mib + PROCESS_MIB) * MIB),
            START_S + LOAD_S_PER_MIB * ballast_mib,
            UNLOAD_S,
        )
        for model, ballast_mib in MODELS.items()
    }
    budget = 1 << 60 if name == "load-all" else int(budget_mib * MIB)
    limits = Limits(eviction="lru" if name == "lru" else "cost")
    memory = Memory({"m": budget}, models, {"m": dict.fromkeys(MODELS, 1)}, limits=limits)
    took_s: list[float] = []

    def watch(due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        took_s.extend(a.timeline.latency_s for a in actions if isinstance(a, Answer))

    machine = SimMachine("m", "cpu", 2, {})
    world = ResidentWorld(
        [machine], durations, BlankModels(specs), memory=memory, observers=(watch,), seed=seed
    )
    world.run(
        [Install(0.0, route_chain(single_model_chain(s), None, durations)) for s in specs.values()]
    )
    settled_s = world.now_s
    inputs = {"rows": Tensor("rows", "UINT8", (1, 1), b"\0")}
    asked = requests(seconds, seed)
    world.run(
        Arrive(settled_s + at_s, number, model, inputs, GIVE_UP_S)
        for number, (at_s, model) in enumerate(asked, start=1)
    )
    counted = world.residency.counts
    return (
        counted.misses / (counted.hits + counted.misses),
        float(counted.loads),
        percentile(sorted(took_s), 0.5),
        percentile(sorted(took_s), 0.99),
        sum(took <= OBJECTIVE_S for took in took_s) / len(asked),
    )


def pacing(seconds: float) -> None:
    """Loads beside running batches, paced and not: what becomes of both."""
    print(
        f"\nA chain of {EXECUTE_BUSY_S * 1e3:.0f} ms at {STEADY_RPS:g} requests/s with "
        f"{STEADY_SLO_S * 1e3:.0f} ms to answer in; every {COLD_EVERY_S:g} s {COLD_AT_ONCE} cold "
        f"models at once, each of which keeps a core busy for {LOAD_BUSY_S:g} s; {seconds:g} s "
        f"on {os.cpu_count()} cores:\n"
    )
    print("| loads | running chain attained | its p50 ms | p99 ms | refused |", end="")
    print(" cold p50 ms | p99 ms | failed |\n|---|---|---|---|---|---|---|---|")
    for label, flag in (("paced", "--pace-loads"), ("not paced", "--no-pace-loads")):
        with tempfile.TemporaryDirectory(prefix="paceline-residency-") as made:
            work = Path(made)
            cold = [f"cold{index}" for index in range(2 * COLD_AT_ONCE)]
            write_ballast(work / "models", "steady", 1, execute_s=EXECUTE_BUSY_S, busy=True)
            for name in cold:
                write_ballast(work / "models", name, 60, load_s=LOAD_BUSY_S, busy=True)
            text = chain_file("running", ["steady"], slo_ms=STEADY_SLO_S * 1e3, rate_rps=STEADY_RPS)
            (work / "running.yaml").write_text(text, encoding="utf-8")
            room_mib = round((COLD_AT_ONCE + 0.5) * (60 + PROCESS_MIB) + PROCESS_MIB)
            arguments = ["--model-repository", str(work / "models"), flag]
            arguments += ["--memory-mib", str(room_mib), "--chains", str(work / "running.yaml")]
            asked = [(n / STEADY_RPS, "running") for n in range(int(seconds * STEADY_RPS))]
            for turn in range(int(seconds / COLD_EVERY_S)):
                at_s = (turn + 0.5) * COLD_EVERY_S
                half = turn % 2 * COLD_AT_ONCE
                asked += [(at_s, name) for name in cold[half : half + COLD_AT_ONCE]]
            asked.sort()
            with served(work, arguments) as (target, _):
                took_s = asyncio.run(replay(target, asked, quiet=True))
        print(f"| {label} {paced_row(asked, took_s)}", flush=True)


def paced_row(asked: Sequence[tuple[float, str]], took_s: Sequence[float | None]) -> str:
    found = list(zip(asked, took_s, strict=True))
    running = [took for (_, name), took in found if name == "running"]
    cold = [took for (_, name), took in found if name != "running"]
    ran, waited = (sorted(t for t in each if t is not None) for each in (running, cold))
    met = sum(took <= STEADY_SLO_S for took in ran)
    return (
        f"| {met / len(running):.1%} | {percentile(ran, 0.5) * 1e3:.0f} "
        f"| {percentile(ran, 0.99) * 1e3:.0f} | {1 - len(ran) / len(running):.1%} "
        f"| {percentile(waited, 0.5) * 1e3:.0f} | {percentile(waited, 0.99) * 1e3:.0f} "
        f"| {len(cold) - len(waited)} |"
    )


def cold_chain(rounds: int) -> None:
    """The first request after a keep-alive has ended: as a chain, and module by module."""
    models = ["first", "second", "third"]
    load_s = 0.5
    with tempfile.TemporaryDirectory(prefix="paceline-residency-") as made:
        work = Path(made)
        for name in models:
            write_ballast(work / "models", name, 20, load_s=load_s, execute_s=EXECUTE_S)
        text = chain_file("line", models, keep_alive_s=0.5)
        (work / "line.yaml").write_text(text, encoding="utf-8")
        arguments = [
            "--model-repository",
            str(work / "models"),
            "--chains",
            str(work / "line.yaml"),
        ]
        with served(work, arguments) as (target, _), grpc.insecure_channel(target) as channel:
            call: Any = channel.unary_unary(INFER, None, None)
            together_s, apart_s = [], []
            for _ in range(rounds):
                until_cold(channel)
                began_s = monotonic()
                call(message("line", batched=False), timeout=GIVE_UP_S)
                together_s.append(monotonic() - began_s)
                until_cold(channel)
                began_s = monotonic()
                for name in models:
                    call(message(name), timeout=GIVE_UP_S)
                apart_s.append(monotonic() - began_s)
    print(
        f"\nThree cold modules that load for {load_s * 1e3:.0f} ms beyond their processes' start,"
    )
    print(f"one after the other; median of {rounds} (ms):\n")
    print("| | first request |\n|---|---|")
    print(f"| prewarmed: a request to the chain | {percentile(together_s, 0.5) * 1e3:.0f} |")
    print(f"| on demand: a request to each in turn | {percentile(apart_s, 0.5) * 1e3:.0f} |")


def until_cold(channel: grpc.Channel) -> None:
    """Until nothing is in memory."""
    control: Any = control_pb2_grpc.ControlStub(channel)
    watch = control.WatchStatus(control_pb2.StatusRequest(), timeout=UNLOADED_S)
    for told in watch:
        status = json.loads(told.json)
        if not any(machine.get("held") for machine in status["machines"]):
            watch.cancel()
            return
    raise SystemExit("the models were not unloaded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic for each system")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="cold starts of each kind")
    parser.add_argument("--quick", action="store_true", help="10 s, two cold starts: a smoke test")
    parser.add_argument(
        "--systems",
        nargs="*",
        default=["cost", "lru", "load-all"],
        choices=["cost", "lru", "load-all"],
        help="cost is what Paceline does; none: only the cold chain",
    )
    parser.add_argument(
        "--pacing", type=float, metavar="S", help="only: paced loads against others, S s each"
    )
    parser.add_argument("--virtual", action="store_true", help="in virtual time, without Triton")
    parser.add_argument("--seeds", type=int, default=5, help="for --virtual")
    given = parser.parse_args()
    if given.virtual:
        virtual(given.systems, given.seconds, given.seeds)
        return
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if given.pacing:
        pacing(given.pacing)
        return
    if given.systems:
        compare(given.systems, 10.0 if given.quick else given.seconds, given.seed)
    if given.rounds:
        cold_chain(2 if given.quick else given.rounds)


if __name__ == "__main__":
    main()
