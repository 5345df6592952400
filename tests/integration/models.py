"""Tiny Python-backend models, written into a directory that a test then serves with a real Triton.

`timed` is the model by which the benchmarks emulate an accelerator: `scripts.timed_model`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from scripts.timed_model import write_timed

DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "BF16", "FP32", "FP64", "BYTES"),
)

_IDENTITY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(list(request.inputs())) for request in requests]
"""

_ADD = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "a").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "b").as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("sum", a + b)]))
        return responses
"""

_FAILING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        error = pb_utils.TritonError("deliberate failure", pb_utils.TritonError.INVALID_ARG)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
"""

_PICKY = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if (x == -1).any():
                error = pb_utils.TritonError("a bad item", pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            large = pb_utils.Tensor("large", x[:, :1] > 100)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x), large]))
        return responses
"""

_BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("this model does not load on purpose")

    def execute(self, requests):
        return []
"""

_SLOW_LOADING = """
import json
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        time.sleep(float(parameters["load_s"]["string_value"]))

    def execute(self, requests):
        return [pb_utils.InferenceResponse(list(request.inputs())) for request in requests]
"""

_TRANSPOSE = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            y = pb_utils.Tensor("y", np.ascontiguousarray(x.T))
            responses.append(pb_utils.InferenceResponse([y]))
        return responses
"""


def write_model(repository: Path, name: str, config: str, code: str) -> Path:
    """A Python-backend model `name` with version 1; its directory."""
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    text = f'name: "{name}"\nbackend: "python"\n{textwrap.dedent(config).strip()}\n'
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    (directory / "1" / "model.py").write_text(code.lstrip(), encoding="utf-8")
    return directory


def write_identity(repository: Path, name: str = "identity", *, max_batch_size: int = 8) -> Path:
    """One optional input `x_<datatype>` of each datatype; gives back those it got, same names."""
    tensors = [
        (f"x_{datatype.lower()}", "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")
        for datatype in DATATYPES
    ]
    inputs = ", ".join(
        f'{{name: "{name}" data_type: {kind} dims: [-1] optional: true}}' for name, kind in tensors
    )
    outputs = ", ".join(
        f'{{name: "{name}" data_type: {kind} dims: [-1]}}' for name, kind in tensors
    )
    config = f"max_batch_size: {max_batch_size}\ninput [{inputs}]\noutput [{outputs}]"
    return write_model(repository, name, config, _IDENTITY)


def write_add(
    repository: Path, name: str = "add", *, max_batch_size: int = 8, extra: str = ""
) -> Path:
    """sum = a + b, INT32 [16]."""
    config = f"""
    max_batch_size: {max_batch_size}
    input [{{name: "a" data_type: TYPE_INT32 dims: [16]}}]
    input [{{name: "b" data_type: TYPE_INT32 dims: [16]}}]
    output [{{name: "sum" data_type: TYPE_INT32 dims: [16]}}]
    """
    return write_model(repository, name, textwrap.dedent(config) + extra, _ADD)


def write_failing(repository: Path, name: str = "failing") -> Path:
    """Loads, but answers every request with INVALID_ARGUMENT `deliberate failure`."""
    config = """
    max_batch_size: 8
    input [{name: "x" data_type: TYPE_FP32 dims: [4]}]
    output [{name: "y" data_type: TYPE_FP32 dims: [4]}]
    """
    return write_model(repository, name, config, _FAILING)


def write_picky(repository: Path, name: str = "picky") -> Path:
    """y = 2 x, and whether a row's first element is above 100; a batch with a -1 in it fails."""
    config = """
    max_batch_size: 8
    input [{name: "x" data_type: TYPE_FP32 dims: [4]}]
    output [
      {name: "y" data_type: TYPE_FP32 dims: [4]},
      {name: "large" data_type: TYPE_BOOL dims: [1]}
    ]
    """
    return write_model(repository, name, config, _PICKY)


def write_broken(repository: Path, name: str = "broken") -> Path:
    """Does not load."""
    config = """
    max_batch_size: 8
    input [{name: "x" data_type: TYPE_FP32 dims: [4]}]
    output [{name: "y" data_type: TYPE_FP32 dims: [4]}]
    """
    return write_model(repository, name, config, _BROKEN)


def write_slow_loading(repository: Path, load_s: float, name: str = "slow_loading") -> Path:
    """x = x, once it has loaded for `load_s` seconds."""
    config = f"""
    max_batch_size: 8
    input [{{name: "x" data_type: TYPE_FP32 dims: [4]}}]
    output [{{name: "x" data_type: TYPE_FP32 dims: [4]}}]
    parameters [{{key: "load_s" value: {{string_value: "{load_s}"}}}}]
    """
    return write_model(repository, name, config, _SLOW_LOADING)


def write_transpose(repository: Path, name: str = "transpose") -> Path:
    """y = x transposed: no batch axis, both axes of any length."""
    config = """
    max_batch_size: 0
    input [{name: "x" data_type: TYPE_FP32 dims: [-1, -1]}]
    output [{name: "y" data_type: TYPE_FP32 dims: [-1, -1]}]
    """
    return write_model(repository, name, config, _TRANSPOSE)


def write_all(repository: Path) -> Path:
    """Every model above under its default name."""
    repository.mkdir(parents=True, exist_ok=True)
    write_identity(repository)
    write_add(repository)
    write_timed(repository, {1: 50, 2: 55, 4: 60, 8: 75})
    write_failing(repository)
    write_broken(repository)
    write_slow_loading(repository, 0.3)
    write_transpose(repository)
    return repository
