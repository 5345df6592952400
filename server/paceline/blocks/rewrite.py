"""Tiles oversized matrices: one MatMul or Gemm becomes several over columns, and a Concat.

A weight that no cut can make smaller would be the least budget of its model. The result is the same
bit for bit where the kernel computes columns independently; `measure` compares.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from paceline.blocks.source import Stored

_COLUMNS = 64  # a multiple of what kernels compute at a time
_OPERATORS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")


def tile(
    model: onnx.ModelProto, stored: Mapping[str, Stored], limit_bytes: int
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Splits the matrices above `limit_bytes` in place.

    Returns the weights as they are now, and for every tile's output the value it is a part of.
    """
    weights = dict(stored)
    parts: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    small = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        columns = _columns(node, stored, small, limit_bytes)
        if columns is None:
            nodes.append(node)
            continue
        outputs = []
        for index, (start, stop) in enumerate(columns):
            made = _tile(node, index, (start, stop), weights, small, model.graph)
            nodes.append(made)
            outputs.append(made.output[0])
            parts[made.output[0]] = node.output[0]
        nodes.append(helper.make_node("Concat", outputs, list(node.output), axis=-1))
    if parts:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return weights, parts


def _columns(
    node: onnx.NodeProto,
    stored: Mapping[str, Stored],
    small: Mapping[str, TensorProto],
    limit_bytes: int,
) -> list[tuple[int, int]] | None:
    """Which columns of the result each tile computes; None if the node stays whole."""
    if node.op_type not in _OPERATORS or node.domain not in ("", "com.microsoft"):
        return None
    matrix = stored.get(node.input[1])
    if matrix is None or len(matrix.shape) != 2 or matrix.size_bytes <= limit_bytes:
        return None
    width = matrix.shape[_axis(node)]
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and (bias not in small or tuple(small[bias].dims) not in ((width,), (1, width))):
        return None
    count = -(-matrix.size_bytes // limit_bytes)
    step = -(-width // (count * _COLUMNS)) * _COLUMNS
    if step >= width:
        return None
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _axis(node: onnx.NodeProto) -> int:
    """The weight's axis that is the result's last."""
    return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1


def _tile(
    node: onnx.NodeProto,
    index: int,
    columns: tuple[int, int],
    weights: dict[str, Stored],
    small: Mapping[str, TensorProto],
    graph: onnx.GraphProto,
) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.name = ""
    made.input[1] = f"{node.input[1]}/tile{index}"
    weights[made.input[1]] = weights[node.input[1]].part(_axis(node), *columns)
    if len(node.input) > 2 and node.input[2]:
        made.input[2] = f"{node.input[2]}/tile{index}"
        _slice_bias(small[node.input[2]], made.input[2], columns, weights, graph)
    made.output[0] = f"{node.output[0]}/tile{index}"
    return made


def _slice_bias(
    bias: TensorProto,
    name: str,
    columns: tuple[int, int],
    weights: dict[str, Stored],
    graph: onnx.GraphProto,
) -> None:
    if bias.name in weights:
        weights[name] = weights[bias.name].part(len(bias.dims) - 1, *columns)
        return
    array = onnx.numpy_helper.to_array(bias)[..., columns[0] : columns[1]]
    graph.initializer.append(onnx.numpy_helper.from_array(array.copy(), name))
