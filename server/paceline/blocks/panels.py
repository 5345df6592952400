"""Stores matrices in the order in which a kernel reads them: prepacking, done once, in the pool.

ONNX Runtime copies the matrix of a MatMul into panels: when a session is made, into memory of the
process that cannot be mapped, shared or swapped, or else at every run. Its 1x1 convolution over
blocked channels (`com.microsoft.nchwc`, what the optimiser makes of convolutional networks) reads
weights that lie in panels in the file. So a MatMul of a constant matrix becomes that convolution,
between two reorderings of the activations, which are small. As fast as prepacked, and mapped.

The results are those of the MatMul but for rounding; `compile` compares. What is chosen depends on
shapes alone, never on times, so that equal layers of different models stay equal objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from paceline.blocks.source import Stored, Value, session_options

_DOMAIN = "com.microsoft.nchwc"
_LEAST_BYTES = 64 << 10
_LEAST_ROWS = 8
"""Of fewer rows the product is bound by reading the matrix once, which needs no panels."""
_WIDTHS = (16, 8)
_STEPS = ("rows", "channels", "product", "reordered")


def panel(
    model: onnx.ModelProto, stored: Mapping[str, Stored], values: Mapping[str, Value]
) -> tuple[dict[str, Stored], dict[str, Value]]:
    """Replaces MatMul, Gemm and FusedMatMul of constant matrices in place, where it pays.

    Returns the weights as they are now, and the values that came to be within a product.
    """
    weights, made = dict(stored), dict[str, Value]()
    width = panel_width()
    small = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(value.name for value in model.graph.output)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        product = _product(node, stored, values, small, width) if width else None
        if product is None or uses[node.input[1]] != 1:
            nodes.append(node)
            continue
        axis, forth, back = product
        matrix = weights.pop(node.input[1]).in_panels(axis, width)
        weights[f"{node.input[1]}/panels"] = matrix
        nodes.extend(_convolution(node, matrix, forth, back, model.graph))
        made.update((f"{node.output[0]}/{step}", Value(TensorProto.FLOAT, ())) for step in _STEPS)
    if made:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        if all(opset.domain != _DOMAIN for opset in model.opset_import):
            model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return weights, made


@cache
def panel_width() -> int:
    """Channels of a block on this machine's ONNX Runtime; 0 if it has no such convolution."""
    random = np.random.default_rng(0)
    size, rows = 2 * max(_WIDTHS), 3
    matrix = random.standard_normal((size, size), dtype=np.float32)
    feed = {"x": random.standard_normal((rows, size), dtype=np.float32)}
    for width in _WIDTHS:
        panels = matrix.reshape(size, size // width, width).transpose(1, 0, 2)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "probe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, size])],
            [numpy_helper.from_array(panels.reshape(size, size, 1, 1), "w/panels")],
        )
        (node,) = graph.node
        forth, back = [1, -1, 1, size], [-1, size]
        steps = _convolution(node, None, forth, back, graph, channels=size)
        del graph.node[:]
        graph.node.extend(steps)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_DOMAIN, 1)]
        probe = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        try:
            session = ort.InferenceSession(
                probe.SerializeToString(), session_options(), ["CPUExecutionProvider"]
            )
            (answer,) = session.run(None, feed)
        except Exception:  # ONNX Runtime's own exceptions share no useful base class
            continue
        if np.allclose(answer, feed["x"] @ matrix, rtol=1e-4, atol=1e-4):
            return width
    return 0


def _product(
    node: onnx.NodeProto,
    stored: Mapping[str, Stored],
    values: Mapping[str, Value],
    small: Mapping[str, TensorProto],
    width: int,
) -> tuple[int, list[int], list[int]] | None:
    """The matrix's axis that is the result's last, and the shapes to bring the rows into and back.

    None if the node is none of ours or would gain nothing.
    """
    matrix = stored.get(node.input[1]) if len(node.input) > 1 else None
    if matrix is None or matrix.dtype != TensorProto.FLOAT or len(matrix.shape) != 2:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    transposed = attributes.pop("transB", 0)
    kind = (node.domain.removeprefix("ai.onnx"), node.op_type)
    if kind not in (("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")):
        return None
    if any(value != _NEUTRAL.get(name) for name, value in attributes.items()):
        return None
    axis = 0 if transposed else 1
    columns, depth = matrix.shape[axis], matrix.shape[1 - axis]
    if columns % width or depth % width or matrix.size_bytes < _LEAST_BYTES:
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and (bias not in small or tuple(small[bias].dims) != (columns,)):
        return None
    rows = values[node.input[0]].shape[:-1] if node.input[0] in values else ()
    shapes = _shapes(rows, depth, columns)
    return None if shapes is None else (axis, *shapes)


_NEUTRAL: Mapping[str, float] = {
    "transA": 0,
    "transBatchA": 0,
    "transBatchB": 0,
    "alpha": 1.0,
    "beta": 1.0,
}


def _shapes(
    rows: Sequence[int | str | None], depth: int, columns: int
) -> tuple[list[int], list[int]] | None:
    """For ReorderInput, which takes (images, height, width, channels), and of the result."""
    known = [axis for axis in rows if isinstance(axis, int)]
    unknown = len(rows) - len(known)
    if not rows or (unknown <= 1 and np.prod(known) < _LEAST_ROWS):
        return None
    if unknown <= 1:
        back = [axis if isinstance(axis, int) else -1 for axis in rows]
        return [1, -1, 1, depth], [*back, columns]
    if len(rows) == 2:  # 0: as it is
        return [0, 0, 1, depth], [0, 0, columns]
    return None


def _convolution(
    node: onnx.NodeProto,
    matrix: Stored | None,
    forth: Sequence[int],
    back: Sequence[int],
    graph: onnx.GraphProto,
    *,
    channels: int = 0,
) -> list[onnx.NodeProto]:
    rows, blocked, product, reordered = (f"{node.output[0]}/{step}" for step in _STEPS)
    columns = channels if matrix is None else matrix.shape[0]
    for name, shape in ((f"{rows}/shape", forth), (f"{reordered}/shape", back)):
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    weights = [f"{node.input[1]}/panels", *(name for name in node.input[2:] if name)]
    return [
        helper.make_node("Reshape", [node.input[0], f"{rows}/shape"], [rows]),
        helper.make_node("ReorderInput", [rows], [blocked], domain=_DOMAIN, channels_last=1),
        helper.make_node(
            "Conv", [blocked, *weights], [product], domain=_DOMAIN, kernel_shape=[1, 1]
        ),
        helper.make_node(
            "ReorderOutput",
            [product],
            [reordered],
            domain=_DOMAIN,
            channels=columns,
            channels_last=1,
        ),
        helper.make_node("Reshape", [reordered, f"{reordered}/shape"], [node.output[0]]),
    ]
