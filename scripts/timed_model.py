"""A Triton model that emulates an accelerator: it holds its instance for d(b) and computes nothing.

Tests and benchmarks use it alike: one instance is one machine. It sleeps once a batch, whatever
requests the batch came in, and only what its own work leaves of d(b).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_CODE = """
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


def write_timed(
    repository: Path,
    durations_ms: Mapping[int, float],
    name: str = "timed",
    *,
    max_batch_size: int = 8,
    datatype: str = "FP32",
    dims: str = "[4]",
    after: bool = False,
    extra: str = "",
) -> Path:
    """y = x after d(rows): `durations_ms` by batch size, linear in between, flat outside.

    `after` gives it a second input that only orders it behind another model; `extra` is more
    config. Returns its directory.
    """
    table = ", ".join(f'\\"{size}\\": {ms:g}' for size, ms in sorted(durations_ms.items()))
    inputs = ["x", "after"] if after else ["x"]
    declared = ", ".join(
        f'{{name: "{tensor}" data_type: TYPE_{datatype} dims: {dims}}}' for tensor in inputs
    )
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_CODE.lstrip(), encoding="utf-8")
    (directory / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: {max_batch_size}\n'
        f"input [{declared}]\n"
        f'output [{{name: "y" data_type: TYPE_{datatype} dims: {dims}}}]\n'
        f'parameters [{{key: "durations_ms" value: {{string_value: "{{{table}}}"}}}}]\n{extra}',
        encoding="utf-8",
    )
    return directory
