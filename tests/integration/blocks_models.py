"""Small ONNX models with seeded weights, compiled into a block pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options

WIDTH = 256
VOCABULARY = 2048


def write_mlp(path: Path, *, layers: int = 12, seed: int = 0, head_seed: int = 0) -> Path:
    """y = tanh(tanh(x W0) W1) ..., 256 KiB of weights a layer; the last one is the head."""
    nodes, weights = [], []
    value = "x"
    for layer in range(layers):
        drawn = np.random.default_rng([head_seed if layer == layers - 1 else seed, layer])
        matrix = drawn.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"]))
        value = "y" if layer == layers - 1 else f"t{layer}"
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [value]))
    return save(path, nodes, weights, ("x", TensorProto.FLOAT, ["N", WIDTH]))


def write_towers(path: Path, *, layers: int = 8) -> Path:
    """y = tower(x) + tower(x): two parallel branches of tanh(x W), 256 KiB of weights a layer."""
    nodes, weights = [], []
    for tower in "ab":
        value = "x"
        for layer in range(layers):
            drawn = np.random.default_rng([ord(tower), layer])
            matrix = drawn.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(16)
            name = f"{tower}{layer}"
            weights.append(numpy_helper.from_array(matrix, f"w_{name}"))
            nodes.append(helper.make_node("MatMul", [value, f"w_{name}"], [f"m_{name}"]))
            nodes.append(helper.make_node("Tanh", [f"m_{name}"], [value := f"t_{name}"]))
    nodes.append(helper.make_node("Add", [f"t_a{layers - 1}", f"t_b{layers - 1}"], ["y"]))
    return save(path, nodes, weights, ("x", TensorProto.FLOAT, ["N", WIDTH]))


def write_embedding(path: Path, *, seed: int = 0) -> Path:
    """ids -> rows of a 2 MiB table -> a layer: a model with a table that is paged on demand."""
    drawn = np.random.default_rng(seed)
    table = drawn.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
    matrix = drawn.standard_normal((WIDTH, WIDTH), dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(matrix, "w")]
    return save(path, nodes, weights, ("ids", TensorProto.INT64, ["N", 4]))


def write_argmax(path: Path) -> Path:
    """y = the largest column's number: one scalar a row."""
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)
    return save(path, [node], [], ("x", TensorProto.FLOAT, ["N", WIDTH]), TensorProto.INT64)


def compiled(
    repository: Path,
    name: str,
    sources: Mapping[str, Path],
    *,
    parameters: Mapping[str, str] | None = None,
    budget_mib: int | None = 2,
) -> Path:
    """The model `name`, in the pool beside the repository; blocks as fine as they get.

    `parameters` replace those that the compiler wrote, and its budget.
    """
    directory = repository / name
    pool = repository.parent / "blocks"
    options = Options(budget_mib=budget_mib, max_batch=8, measure=False)
    compile_model(sources, directory, pool, options)
    config = directory / "config.pbtxt"
    lines = [
        line
        for line in config.read_text(encoding="utf-8").splitlines()
        if not any(f'"{key}"' in line for key in ("memory_budget_mib", *(parameters or {})))
    ]
    lines += [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (parameters or {}).items()
    ]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def elsewhere(compiled: Path, directory: Path, pool: str, cache: Path) -> Path:
    """A compiled model once more, in that directory, with another pool and cache."""
    lines = (compiled / "config.pbtxt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("name:") and '"pool"' not in line]
    kept += [
        f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}'
        for key, text in (("pool", pool), ("cache", str(cache)))
    ]
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return directory


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    given: tuple[str, int, list[str | int]],
    kind: int = TensorProto.FLOAT,
) -> Path:
    shape = [*given[2], WIDTH] if given[0] == "ids" else given[2]
    if kind == TensorProto.INT64:
        shape = shape[:1]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info("y", kind, shape)],
        weights,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path
