"""What `bench_slo.py` serves: workloads on profiles, as timed models, chains and ensembles.

An accelerator is emulated by a Python-backend model that sleeps d(b), by a measured profile: one
instance is one machine. It sleeps once a batch, whatever requests the batch came in, and only
what is left of d(b), so that its own work is part of the duration.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from paceline.config import read_profiles
from paceline.core.errors import ConfigError
from paceline.core.profile import Durations, Profiles

_TIMED = """
import json
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        table = json.loads(parameters["durations_ms"]["string_value"])
        self.table = sorted((int(size), float(ms)) for size, ms in table.items())

    def duration_s(self, rows):
        below = [point for point in self.table if point[0] <= rows] or self.table[:1]
        above = [point for point in self.table if point[0] >= rows] or self.table[-1:]
        (b0, d0), (b1, d1) = below[-1], above[0]
        return (d0 if b0 == b1 else d0 + (d1 - d0) * (rows - b0) / (b1 - b0)) / 1e3

    def execute(self, requests):
        started_s = time.monotonic()
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        until_s = started_s + self.duration_s(sum(x.shape[0] for x in inputs))
        responses = [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
        left_s = until_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        return responses
"""

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
    """A chain with its objective and mean rate, on one kind of machine.

    `largest` bounds the batches: beyond it the profiles gain nothing, or cost too much latency.
    """

    name: str
    title: str
    hardware: str
    slo_ms: float
    rate_rps: float
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


# The objective is 2.5 times what full batches take along the slowest path, and the rate keeps four
# machines 93 % busy in full batches: where machines are scarce, but four could do.
WORKLOADS = (
    Workload(
        "chain2",
        "speech recognition, question answering",
        "t4",
        700.0,
        103.0,
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
        900.0,
        83.0,
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
        920.0,
        74.0,
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
        720.0,
        77.0,
        8,
        (
            Step("detect", "ssd320-resnet50-tensorflow-fp16"),
            Step("classify", "resnext101-32x4d-tensorflow-fp32", "detect", 2.0),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Served:
    """A workload with its profiles."""

    workload: Workload
    profiles: Profiles

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
        """Machines that the step keeps busy at the workload's rate; the least it can do with."""
        return self.workload.rate_rps * step.fan_out / self.throughput_rps(step)

    @property
    def least_machines(self) -> int:
        """No system can do with fewer, however it batches."""
        return ceil(sum(self.load(step) for step in self.workload.steps))


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


def item_counts(workload: Workload, requests: int, seed: int) -> list[int]:
    """Items of each request: binomial, 0 to 8, with the mean of the workload's fan-out."""
    fan_out = next((s.fan_out for s in workload.steps if s.fan_out != 1.0), 0.0)
    rng = random.Random(seed)
    return [
        sum(rng.random() < fan_out / MOST_ITEMS for _ in range(MOST_ITEMS)) for _ in range(requests)
    ]


MOST_ITEMS = 8


# -- what is written for the servers ---------------------------------------------------------------


def write_timed(
    root: Path, name: str, durations: Durations, largest: int, extra: str, *, after: bool = False
) -> None:
    """A timed model; `after` gives it a second input that only orders it behind another step."""
    table = ", ".join(
        f'\\"{size}\\": {duration_s * 1e3:g}' for size, duration_s in durations.points
    )
    more = f'input [{{name: "after" data_type: TYPE_FP32 dims: [{ROW}]}}]\n' if after else ""
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text(_TIMED.lstrip(), encoding="utf-8")
    (root / name / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: {largest}\n'
        f'input [{{name: "x" data_type: TYPE_FP32 dims: [{ROW}]}}]\n{more}'
        f'output [{{name: "y" data_type: TYPE_FP32 dims: [{ROW}]}}]\n'
        f'parameters [{{key: "durations_ms" value: {{string_value: "{{{table}}}"}}}}]\n{extra}',
        encoding="utf-8",
    )


def write_chain_models(root: Path, served: Served) -> None:
    """The repository of `paceline serve`."""
    for step in served.workload.steps:
        largest = served.workload.largest
        after = step.fan_out != 1.0
        write_timed(root, step.name, served.durations(step), largest, "", after=after)


def chain_yaml(workload: Workload, *, rate_rps: float, slo_ms: float, dispatch: str) -> str:
    """The chain file; items of a fan-out come with the request and wait for their parent."""
    lines = [
        f"chain: {workload.name}",
        f"slo_ms: {slo_ms:g}",
        f"rate_rps: {rate_rps:.6g}",
        f"dispatch: {dispatch}",
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
