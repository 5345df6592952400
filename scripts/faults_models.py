"""What `check_faults.py` serves: models that answer what they were given, and chains of them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scripts.timed_model import write_timed

ROW = 4
WIDTH = 2**18
LAYERS = 6
BUDGET_MIB = 16
MOST_ITEMS = 5

_SPLIT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            rows = np.stack([x * (i + 1) for i in range(int(x[0]) % MOST)] or [x])
            rows = rows[: int(x[0]) % MOST].astype(np.float32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("rows", rows)]))
        return responses
""".replace("MOST", str(MOST_ITEMS))

LINE = f"""
chain: line
slo_ms: 2000
inputs: {{x: {{dtype: FP32, shape: [{ROW}]}}}}
modules:
  a: {{model: first, inputs: {{x: inputs.x}}}}
  b: {{model: second, inputs: {{x: a.y}}}}
  c: {{model: first, inputs: {{x: b.y}}}}
outputs: {{y: c.y}}
"""
ITEMS = f"""
chain: items
slo_ms: 2000
inputs: {{x: {{dtype: FP32, shape: [{ROW}]}}}}
modules:
  split: {{model: split, inputs: {{x: inputs.x}}}}
  each: {{model: second, for_each: split.rows, fan_out: 2, inputs: {{x: split.rows}}}}
outputs: {{y: each.y}}
"""
CHAINS = {"line": LINE, "items": ITEMS}
ASKED = ("line", "items", "second")


def write_models(repository: Path, *, blocks: bool, fused: bool) -> None:
    """`first` and `second` answer what they were given; `split` makes 0 to 4 rows of a row."""
    if not fused:
        write_timed(repository, {1: 8, 8: 20}, "first", dims=f"[{ROW}]")
    if fused:
        compile_blocks(repository, {"first": 2, "second": LAYERS - 2}, ("--fuse", "both"))
    elif blocks:
        compile_blocks(repository, {"second": LAYERS})
    else:
        write_timed(repository, {1: 5, 8: 15}, "second", dims=f"[{ROW}]")
    directory = repository / "split"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_SPLIT.lstrip(), encoding="utf-8")
    (directory / "config.pbtxt").write_text(
        textwrap.dedent(
            f"""\
            name: "split"
            backend: "python"
            max_batch_size: 0
            input [{{name: "x" data_type: TYPE_FP32 dims: [{ROW}]}}]
            output [{{name: "rows" data_type: TYPE_FP32 dims: [-1, {ROW}]}}]
            """
        ),
        encoding="utf-8",
    )


def compile_blocks(repository: Path, layers: Mapping[str, int], fuse: Sequence[str] = ()) -> None:
    """As blocks, 48 MiB of weights within a third of that."""
    paths = [write_onnx(repository.parent, name, count) for name, count in layers.items()]
    command = [
        *(sys.executable, "-m", "paceline", "blocks", "compile", *map(str, paths), *fuse),
        *("--out", str(repository), "--budget-mib", str(BUDGET_MIB), "--max-batch", "8"),
    ]
    subprocess.run(command, check=True)


def write_onnx(directory: Path, model: str, layers: int) -> Path:
    """y = x A0 B0 A1 B1 ..., where A places x somewhere in a wide row of zeros and B takes it out
    again: 8 MiB a layer.
    """
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        wide = np.zeros((ROW, WIDTH), np.float32)
        wide[np.arange(ROW), np.arange(ROW) + 100 * layer + layers] = 1.0
        for name, matrix in ((f"a{layer}", wide), (f"b{layer}", wide.T.copy())):
            weights.append(onnx.numpy_helper.from_array(matrix, name))
            made = "y" if name == f"b{layers - 1}" else f"after_{name}"
            nodes.append(onnx.helper.make_node("MatMul", [value, name], [made]))
            value = made
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", ROW])
        for name in "xy"
    )
    graph = onnx.helper.make_graph(nodes, model, [x], [y], weights)
    opset = [onnx.helper.make_opsetid("", 17)]
    path = directory / f"{model}.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def asked_of(name: str, number: int) -> tuple[Any, Any]:
    """Input and right output of a request: no other request's output is the same."""
    row = np.array([number, number + 0.5, -number, 1.0], np.float32)
    if name == "second":
        return row[None], row[None]
    if name == "line":
        return row, row
    return row, np.stack([row * (i + 1) for i in range(MOST_ITEMS)])[: number % MOST_ITEMS]
