"""What `bench_slo.py` serves: workloads on profiles, as timed models, chains and ensembles.

An accelerator is emulated by a timed model (`timed_model.py`) that follows a measured profile: one
instance is one machine. Rates and objectives follow from the profiles by one rule for all
workloads: a rate is a *load*, the share of the machines that full batches of it keep busy; an
objective is a multiple of what full batches take along the slowest path.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.timed_model import write_timed

from paceline.config import read_profiles
from paceline.core.errors import ConfigError
from paceline.core.profile import Durations, Profiles

ROW = 4
"""Every tensor is FP32 [4]: what is measured is when, not what."""


@dataclass(frozen=True, slots=True)
class Step:
    """One module: whose profile it follows, after which step, for how many items a request."""

    name: str
    profile: str
    parent: str = ""
    fan_out: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A chain on one kind of machine.

    `largest` bounds the batches: beyond it the profiles gain nothing, or cost too much latency.
    """

    name: str
    title: str
    hardware: str
    largest: int
    steps: tuple[Step, ...]

    @property
    def fans_out(self) -> bool:
        """Whether a request has a number of items, which an ensemble cannot express."""
        return any(step.fan_out != 1.0 for step in self.steps)

    @property
    def sinks(self) -> tuple[Step, ...]:
        parents = {step.parent for step in self.steps}
        return tuple(step for step in self.steps if step.name not in parents)


WORKLOADS = (
    Workload(
        "chain2",
        "speech recognition, question answering",
        "t4",
        8,
        (
            Step("asr", "jasper-audio16-7s-triton-pytorch-jit-fp16"),
            Step("answer", "bert-squad-large-seq128-tensorflow-fp16", "asr"),
        ),
    ),
    Workload(
        "chain3",
        "speech recognition, question answering, speech synthesis",
        "t4",
        8,
        (
            Step("asr", "jasper-audio16-7s-triton-pytorch-jit-fp16"),
            Step("answer", "bert-squad-large-seq128-tensorflow-fp16", "asr"),
            Step("speak", "fastpitch-seq128-triton-fp32", "answer"),
        ),
    ),
    Workload(
        "fork",
        "video: detection, then classification and speech recognition side by side",
        "v100",
        8,
        (
            Step("detect", "ssd320-resnet50-tensorflow-fp32"),
            Step("classify", "resnext101-32x4d-tensorflow-fp32", "detect"),
            Step("listen", "jasper-audio16-7s-pytorch-fp32", "detect"),
        ),
    ),
    Workload(
        "fanout",
        "detection, then a classifier for each of 0 to 8 crops, 2 on average",
        "t4",
        8,
        (
            Step("detect", "ssd320-resnet50-tensorflow-fp16"),
            Step("classify", "resnext101-32x4d-tensorflow-fp32", "detect", 2.0),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Served:
    """A workload with its profiles, the objective it is held to and its mean rate."""

    workload: Workload
    profiles: Profiles
    slo_ms: float = 0.0
    rate_rps: float = 0.0

    def held_to(self, tightness: float) -> Served:
        """With an objective of so many times what full batches take along the slowest path."""
        slo_ms = round(tightness * self.path_s(self.workload.largest) * 1e3)
        return replace(self, slo_ms=float(slo_ms))

    def loaded(self, machines: float) -> Served:
        """At the rate that keeps so many machines busy with full batches."""
        return replace(self, rate_rps=machines / self.row_s)

    @property
    def row_s(self) -> float:
        """Machine time a request costs in full batches: no scheduler can do with less."""
        return sum(step.fan_out / self.throughput_rps(step) for step in self.workload.steps)

    @property
    def bound(self) -> float:
        """Machines that the rate keeps busy in full batches; no system can do with fewer."""
        return self.rate_rps * self.row_s

    def durations(self, step: Step) -> Durations:
        """Up to the largest batch."""
        work = self.workload
        found = self.profiles.durations(step.profile, work.hardware)
        if found is None:
            raise ConfigError(
                f"no profile of {step.profile!r} on {work.hardware!r}; give --profiles the "
                "file with it",
                key="--profiles",
            )
        points = tuple(point for point in found.points if point[0] <= work.largest)
        return Durations(points)

    def throughput_rps(self, step: Step) -> float:
        """Of one machine, at its best batch size."""
        return max(size / duration_s for size, duration_s in self.durations(step).points)

    def load(self, step: Step) -> float:
        """Machines that the step keeps busy; the least it can do with."""
        return self.rate_rps * step.fan_out / self.throughput_rps(step)

    def path_s(self, size: int) -> float:
        """What batches of that size take along the slowest path."""
        ends_s: dict[str, float] = {"": 0.0}
        for step in self.workload.steps:
            ends_s[step.name] = ends_s[step.parent] + self.durations(step).at(size)
        return max(ends_s.values())


def read(workload: Workload, path: Path) -> Served:
    """A workload on the profiles of a file."""
    served = Served(workload, read_profiles(path))
    for step in workload.steps:
        served.durations(step)
    return served


# -- arrivals -----------------------------------------------------------------------------------


def poisson(rate_rps: float, duration_s: float, seed: int) -> list[float]:
    """Instants of a Poisson process."""
    return varying([1.0], rate_rps, duration_s, seed)


def varying(shape: Sequence[float], rate_rps: float, duration_s: float, seed: int) -> list[float]:
    """A Poisson process whose rate follows `shape`, stretched over the time; its mean is given."""
    rng = random.Random(seed)
    mean = sum(shape) / len(shape)
    width_s = duration_s / len(shape)
    found: list[float] = []
    for index, height in enumerate(shape):
        at_s = index * width_s
        while height > 0:
            at_s += rng.expovariate(rate_rps * height / mean)
            if at_s >= (index + 1) * width_s:
                break
            found.append(at_s)
    return found


def trace_window(path: Path, window: str) -> list[float]:
    """Requests by second of one window of a trace file `window,..,requests`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("window") == window]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not rows:
        raise ConfigError(f"has no window {window!r}", where=str(path))
    return [float(row["requests"]) for row in rows]


def busiest_minute(per_second: Sequence[float]) -> float:
    """Its rate, as a multiple of the mean."""
    minutes = [per_second[start : start + 60] for start in range(0, len(per_second), 60)]
    busiest = max(sum(minute) / len(minute) for minute in minutes)
    return busiest / (sum(per_second) / len(per_second))


def item_counts(workload: Workload, requests: int, seed: int) -> list[int]:
    """Items of each request: binomial, 0 to 8, with the mean of the workload's fan-out."""
    fan_out = next((s.fan_out for s in workload.steps if s.fan_out != 1.0), 0.0)
    rng = random.Random(seed)
    return [
        sum(rng.random() < fan_out / MOST_ITEMS for _ in range(MOST_ITEMS)) for _ in range(requests)
    ]


MOST_ITEMS = 8


# -- what is written for the servers ---------------------------------------------------------------


def write_step(
    root: Path, name: str, served: Served, step: Step, largest: int, extra: str = ""
) -> None:
    """The timed model of a step, for batches of at most `largest`; a fan-out waits for its parent
    by a second input."""
    durations_ms = {size: took_s * 1e3 for size, took_s in served.durations(step).points}
    after = step.fan_out != 1.0
    write_timed(
        root,
        durations_ms,
        name,
        max_batch_size=largest,
        dims=f"[{ROW}]",
        after=after,
        extra=extra,
    )


def write_chain_models(root: Path, served: Served) -> None:
    """The repository of `paceline serve`."""
    for step in served.workload.steps:
        write_step(root, step.name, served, step, served.workload.largest)


def chain_yaml(
    workload: Workload, *, rate_rps: float, slo_ms: float, dispatch: str, runs: bool = False
) -> str:
    """The chain file; items of a fan-out come with the request and wait for their parent."""
    lines = [
        f"chain: {workload.name}",
        f"slo_ms: {slo_ms:g}",
        f"rate_rps: {rate_rps:.6g}",
        f"dispatch: {dispatch}",
        *(["runs: auto"] if runs else []),
        "inputs:",
        f"  x: {{dtype: FP32, shape: [{ROW}]}}",
        *([f"  items: {{dtype: FP32, shape: [-1, {ROW}]}}"] if workload.fans_out else []),
        "modules:",
    ]
    for step in workload.steps:
        source = f"{step.parent}.y" if step.parent else "inputs.x"
        if step.fan_out == 1.0:
            lines.append(f"  {step.name}: {{model: {step.name}, inputs: {{x: {source}}}}}")
        else:
            lines.append(
                f"  {step.name}: {{model: {step.name}, for_each: inputs.items, fan_out: "
                f"{step.fan_out:g}, inputs: {{x: inputs.items, after: {source}}}}}"
            )
    lines.append("outputs:")
    lines += [f"  {step.name}: {step.name}.y" for step in workload.sinks]
    return "\n".join(lines) + "\n"


def ensemble_config(name: str, workload: Workload) -> str:
    """The steps `NAME_STEP` as a Triton ensemble NAME."""
    steps = ", ".join(
        f'{{model_name: "{name}_{step.name}" model_version: -1 '
        f'input_map {{key: "x" value: "{step.parent or "x"}"}} '
        f'output_map {{key: "y" value: "{step.name}"}}}}'
        for step in workload.steps
    )
    outputs = ", ".join(
        f'{{name: "{step.name}" data_type: TYPE_FP32 dims: [{ROW}]}}' for step in workload.sinks
    )
    return (
        f'name: "{name}"\nplatform: "ensemble"\nmax_batch_size: 1\n'
        f'input [{{name: "x" data_type: TYPE_FP32 dims: [{ROW}]}}]\noutput [{outputs}]\n'
        f"ensemble_scheduling {{step [{steps}]}}\n"
    )
