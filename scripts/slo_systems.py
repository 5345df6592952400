"""The systems that `bench_slo.py` compares, as lanes that a load generator can be pointed at.

* `Ensembles`: one Triton with ensembles of dynamically batched steps, one per `Setting`;
* `start_front`: `paceline serve` as users start it, pooled or round-robin, with `--slots` machines.

One instance of a timed model is one machine. A *dedicated* ensemble gives every step its own
machines; a *shared* one lets any machine run any step, with Triton's rate limiter as the machines:
every execution takes one of N resources.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import grpc.aio
from scripts.gateway_peers import free_port, process, until_ready
from scripts.slo_workloads import (
    MOST_ITEMS,
    ROW,
    Served,
    chain_yaml,
    ensemble_config,
    write_chain_models,
    write_step,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline.core.errors import PlanError
from paceline.core.profile import Configuration
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.solve import solve
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings

LOAD_TIMEOUT_S = 120.0
PROFILED = "profiled"
SLO_MARGIN_MS = 10.0
"""Paceline is told an objective this much tighter than what clients are held to: theirs counts
from the instant at which the request was due to be sent, Paceline's from its arrival."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How an ensemble is tuned.

    `split`: which division of the machines over the steps, 0 the most even in utilisation; shared:
    none. `cut`: batches of at most `largest / cut`. `wait`: share of a step's slack that a batch
    may wait to fill up (max_queue_delay). `reject`: queued requests that have used up the slack
    are rejected (default_queue_policy).
    """

    name: str
    shared: bool = False
    split: int = 0
    cut: int = 1
    wait: float = 0.0
    reject: bool = False


SETTINGS = (
    Setting("eager"),
    Setting("eager, other split", split=1),
    Setting("half batches", cut=2),
    Setting("wait to fill", wait=0.5),
    Setting("reject late", reject=True),
    Setting("shared, eager", shared=True),
    Setting("shared, wait to fill", shared=True, wait=0.5),
    Setting("shared, reject late", shared=True, reject=True),
)


@dataclass(frozen=True, slots=True)
class Lane:
    """Where a system under test listens, and the messages for it (hexadecimal, by item count)."""

    name: str
    target: str
    messages: tuple[str, ...]


# -- (a) Triton ------------------------------------------------------------------------------------


def splits(served: Served, machines: int) -> list[tuple[int, ...]]:
    """Divisions of machines over the steps that can carry the load, most even first; if none can,
    the least overloaded one.
    """
    steps = served.workload.steps
    loads = [served.load(step) for step in steps]
    found = [
        counts
        for counts in itertools.product(range(1, machines + 1), repeat=len(steps))
        if sum(counts) == machines
    ]

    def busiest(counts: tuple[int, ...]) -> float:
        return max(load / count for load, count in zip(loads, counts, strict=True))

    found.sort(key=lambda counts: (busiest(counts), counts))
    return [counts for counts in found if busiest(counts) < 1.0] or found[:1]


def possible(served: Served, setting: Setting, machines: int) -> bool:
    """Whether the setting exists with so many machines."""
    if setting.shared:
        return True
    return len(splits(served, machines)) > setting.split


class Ensembles:
    """One Triton with an ensemble for each of some settings, on that many machines."""

    def __init__(
        self, work: Path, served: Served, machines: int, settings: Sequence[Setting]
    ) -> None:
        self._served = served
        self._machines = machines
        self._settings = settings
        self._root = Path(tempfile.mkdtemp(prefix="ensembles-", dir=work))
        resources = [_resource(s) for s in settings if s.shared]
        self._triton = LocalTriton(
            LocalTritonSettings(
                state_directory=self._root / "state",
                model_repositories=(self._root,),
                extra_arguments=(
                    *(["--rate-limit=execution_count"] if resources else []),
                    *(f"--rate-limit-resource={name}:{machines}" for name in resources),
                ),
            )
        )

    async def start(self, stack: AsyncExitStack) -> list[Lane]:
        """Bring them all up; `stack` takes them down."""
        await stack.enter_async_context(self._triton)
        client = TritonClient(self._triton.url)
        stack.push_async_callback(client.close)
        lanes = []
        for setting in self._settings:
            name = _variant(setting)
            self._write(name, setting)
            steps = (f"{name}_{step.name}" for step in self._served.workload.steps)
            await asyncio.gather(*(client.load(step, timeout_s=LOAD_TIMEOUT_S) for step in steps))
            await client.load(name, timeout_s=LOAD_TIMEOUT_S)
            lanes.append(Lane(setting.name, self._triton.url, (message(name, batched=True),)))
        return lanes

    async def execution_errors(self) -> list[tuple[int, float]]:
        """By how much the machines' mean execution time exceeded d(b): (batches, relative error)
        of each batch size seen, by Triton's own statistics.
        """
        found = []
        async with grpc.aio.insecure_channel(self._triton.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for setting, step in itertools.product(self._settings, self._served.workload.steps):
                name = f"{_variant(setting)}_{step.name}"
                answer = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=name))
                for batch in answer.model_stats[0].batch_stats:
                    executed = batch.compute_infer
                    if executed.count:
                        mean_s = executed.ns / executed.count / 1e9
                        planned_s = self._served.durations(step).at(batch.batch_size)
                        found.append((executed.count, mean_s / planned_s - 1.0))
        return found

    def _write(self, name: str, setting: Setting) -> None:
        work, machines = self._served.workload, self._machines
        if setting.shared:
            counts = (machines,) * len(work.steps)
        else:
            counts = splits(self._served, machines)[setting.split]
        largest = max(1, work.largest // setting.cut)
        slack_s = self._slack_s(largest)
        for step, count in zip(work.steps, counts, strict=True):
            limiter = (
                f' rate_limiter {{resources [{{name: "{_resource(setting)}" '
                "global: true count: 1}]}"
                if setting.shared
                else ""
            )
            fill_s = largest / (self._served.rate_rps * step.fan_out)
            delay_s = min(fill_s, setting.wait * slack_s / len(work.steps))
            batching = f"preferred_batch_size: [{largest}] " if setting.wait else ""
            batching += f"max_queue_delay_microseconds: {int(delay_s * 1e6)} "
            if setting.reject:
                batching += (
                    "default_queue_policy {timeout_action: REJECT "
                    f"default_timeout_microseconds: {int(slack_s * 1e6)}}}"
                )
            write_step(
                self._root,
                f"{name}_{step.name}",
                self._served,
                step,
                largest,
                f"instance_group [{{count: {count} kind: KIND_CPU{limiter}}}]\n"
                f"dynamic_batching {{{batching}}}\n",
            )
        (self._root / name / "1").mkdir(parents=True)
        config = ensemble_config(name, work)
        (self._root / name / "config.pbtxt").write_text(config, encoding="utf-8")

    def _slack_s(self, largest: int) -> float:
        """What the objective leaves beyond full batches along the slowest path."""
        return max(0.02, self._served.slo_ms / 1e3 - self._served.path_s(largest))


async def start_ensembles(
    work: Path, served: Served, machines: int, settings: Sequence[Setting], stack: AsyncExitStack
) -> tuple[list[Lane], list[Ensembles]]:
    """The lanes of some settings, shared ones on a Triton of their own.

    Only that one has a rate limiter: with it, overloaded steps that it does not limit get stuck.
    """
    lanes, started = [], []
    for shared in (False, True):
        group = [setting for setting in settings if setting.shared is shared]
        if group:
            started.append(Ensembles(work, served, machines, group))
            lanes += await started[-1].start(stack)
    return lanes, started


def _variant(setting: Setting) -> str:
    return f"v{SETTINGS.index(setting)}"


def _resource(setting: Setting) -> str:
    return f"machine_{_variant(setting)}"


# -- (b) and (c): Paceline -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Front:
    """How `paceline serve` is started: its dispatch policy, the rate its plan is made for, and
    whether consecutive modules may be executed at once (`runs: auto`)."""

    dispatch: str
    rate_rps: float
    runs: bool = False

    @property
    def name(self) -> str:
        """Of its lane."""
        return "runs" if self.runs else self.dispatch


def round_robin(served: Served, machines: int, rate_rps: float) -> Front:
    """Round-robin with its plan provisioned to use all machines: at the largest rate it carries,
    as its own bounds have it, but no less than `rate_rps`.
    """
    low, high = rate_rps, max(rate_rps, machines / served.row_s)
    for _ in range(14):
        middle = (low + high) / 2.0
        cost = _round_robin_machines(served, middle)
        low, high = (middle, high) if cost is not None and cost <= machines else (low, middle)
    return Front("round-robin", low)


def _round_robin_machines(served: Served, rate_rps: float) -> float | None:
    work = served.workload
    modules = tuple(
        PlannedModule(
            step.name,
            step.name,
            rate_rps * step.fan_out,
            (step.parent,) if step.parent else (),
            tuple(
                Configuration(work.hardware, size, duration_s, 1.0)
                for size, duration_s in served.durations(step).points
            ),
            0.003,
        )
        for step in work.steps
    )
    chain = PlannedChain(work.name, (served.slo_ms - SLO_MARGIN_MS) / 1e3, rate_rps, modules)
    try:
        return solve([chain], Options(dispatch="round-robin", max_tuples=2)).cost_per_hour
    except PlanError:
        return None


async def profile(work: Path, served: Served) -> None:
    """Once for all fronts in `work`: Paceline profiles the models while nothing else goes on."""
    home = work / PROFILED
    if home.exists():
        return
    write_chain_models(work / "models", served)
    home.mkdir()
    with ExitStack() as stack:
        await _serve(work, served, Front("pooled", 1.0), 1, home, stack)


async def start_front(
    work: Path, served: Served, front: Front, machines: int, stack: ExitStack
) -> Lane:
    """`paceline serve`, ready, with the profiles of `profile`."""
    workload = served.workload
    home = Path(tempfile.mkdtemp(prefix=f"{front.name}-", dir=work))
    shutil.copytree(work / PROFILED / "state", home / "state", ignore=lambda *_: {"triton"})
    target, server = await _serve(work, served, front, machines, home, stack)
    # Pushed after every process that was started together: all end before one is waited for.
    stack.callback(server.terminate)
    kinds = range(MOST_ITEMS + 1) if workload.fans_out else (None,)
    messages = tuple(message(workload.name, batched=False, items=count) for count in kinds)
    return Lane(front.name, target, messages)


async def _serve(
    work: Path, served: Served, front: Front, machines: int, home: Path, stack: ExitStack
) -> tuple[str, Popen[str]]:
    """Its address, once it is ready."""
    text = chain_yaml(
        served.workload,
        rate_rps=front.rate_rps,
        slo_ms=served.slo_ms - SLO_MARGIN_MS,
        dispatch=front.dispatch,
        runs=front.runs,
    )
    (home / "chain.yaml").write_text(text, encoding="utf-8")
    port, log_path = free_port(), home / "log"
    log = stack.enter_context(log_path.open("w"))
    server: Popen[str] = stack.enter_context(
        process(
            [
                *(sys.executable, "-m", "paceline", "serve"),
                *("--model-repository", work / "models", "--chains", home / "chain.yaml"),
                *("--state-dir", home / "state", "--http-port", "0"),
                *("--grpc-port", str(port), "--slots", str(machines)),
            ],
            stdout=log,
            stderr=log,
        )
    )
    target = f"127.0.0.1:{port}"
    await until_ready(target, served.workload.name, server, log_path.read_text)
    return target, server


def message(model: str, *, batched: bool, items: int | None = None) -> str:
    made = service_pb2.ModelInferRequest(model_name=model)
    made.inputs.add(name="x", datatype="FP32", shape=[1, ROW] if batched else [ROW])
    made.raw_input_contents.append(bytes(4 * ROW))
    if items is not None:
        made.inputs.add(name="items", datatype="FP32", shape=[items, ROW])
        made.raw_input_contents.append(bytes(4 * ROW * items))
    serialized: bytes = made.SerializeToString()
    return serialized.hex()
