"""Builds the graph of a block: nodes without weights, under names that say nothing.

Equal computations of different models become equal bytes: values are numbered in order of use,
names of nodes, symbols of axes and documentation are dropped (docs/blocks-format.md, "Graphs").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from paceline.blocks.backend.manifest import EXTERNAL
from paceline.blocks.source import Stored, Value
from paceline.blocks.subgraphs import external_tensors

# The newest that the checker of an older ONNX Runtime would take is of no interest: the manifest
# names the one version the graph is for.
_IR_VERSION = 8


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """An ONNX file and, by position, what its inputs, outputs and weights are in the model."""

    data: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[tuple[str, str], ...]
    """(name in the graph, name in the model)"""


def build(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    stored: Mapping[str, Stored],
    values: Mapping[str, Value],
) -> BlockGraph:
    """The graph of `nodes`, which gives `outputs` and takes whatever else it reads.

    Nodes with subgraphs cannot be renamed: use `keep` for those.
    """
    inline = {t.name: t for t in model.graph.initializer if t.name not in stored}
    names: dict[str, str] = {}
    weights: list[str] = []
    constants: list[str] = []
    inputs: list[str] = []
    makes = {name for node in nodes for name in node.output if name}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name):
        if name in stored:
            names[name] = f"w{len(weights)}"
            weights.append(name)
        elif name in inline:
            names[name] = f"c{len(constants)}"
            constants.append(name)
        elif name not in makes:
            names[name] = f"x{len(inputs)}"
            inputs.append(name)
    names.update((name, f"y{index}") for index, name in enumerate(outputs))
    for node in nodes:
        for name in node.output:
            if name and name not in names:
                names[name] = f"v{len(names)}"
    symbols: dict[str, str] = {}
    graph = helper.make_graph(
        [_renamed(node, names) for node in nodes],
        "block",
        [_typed(names[name], values[name], symbols) for name in inputs],
        [_typed(names[name], values[name], symbols) for name in outputs],
        [
            *(_constant(inline[name], names[name]) for name in constants),
            *(_external(stored[name], names[name]) for name in weights),
        ],
    )
    return BlockGraph(
        _serialised(model, graph),
        tuple(inputs),
        tuple(outputs),
        tuple((names[name], name) for name in weights),
    )


def keep(model: onnx.ModelProto, stored: Mapping[str, Stored]) -> BlockGraph:
    """The whole model as one block under its own names."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.initializer[:]
    for tensor in model.graph.initializer:
        given = stored.get(tensor.name)
        graph.initializer.append(tensor if given is None else _external(given, tensor.name))
    return BlockGraph(
        _serialised(model, graph),
        tuple(value.name for value in graph.input),
        tuple(value.name for value in graph.output),
        tuple((tensor.name, tensor.name) for tensor in graph.initializer if tensor.name in stored),
    )


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    made = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    made.input.extend(names[name] if name else "" for name in node.input)
    made.output.extend(names[name] if name else "" for name in node.output)
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        added = made.attribute.add()
        added.CopyFrom(attribute)
        added.doc_string = ""
    return made


def _typed(name: str, value: Value, symbols: dict[str, str]) -> onnx.ValueInfoProto:
    shape = [
        symbols.setdefault(axis, f"d{len(symbols)}") if isinstance(axis, str) else axis
        for axis in value.shape
    ]
    # No axes may also mean that ONNX Runtime does not know how many: it must not be told none.
    return helper.make_tensor_value_info(name, value.dtype, shape or None)


def _constant(tensor: TensorProto, name: str) -> TensorProto:
    made = TensorProto()
    made.CopyFrom(tensor)
    made.name, made.doc_string = name, ""
    return made


def _external(stored: Stored, name: str) -> TensorProto:
    made = TensorProto(name=name, data_type=stored.dtype, dims=stored.shape)
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", EXTERNAL), ("offset", "0"), ("length", str(stored.size_bytes))):
        made.external_data.add(key=key, value=value)
    return made


def _serialised(model: onnx.ModelProto, graph: onnx.GraphProto) -> bytes:
    made = onnx.ModelProto(ir_version=max(_IR_VERSION, model.ir_version))
    made.opset_import.extend(sorted(model.opset_import, key=lambda opset: opset.domain))
    made.functions.extend(model.functions)
    made.graph.CopyFrom(graph)
    elsewhere = [
        tensor.name
        for tensor in external_tensors(made)
        if all(entry.value != EXTERNAL for entry in tensor.external_data if entry.key == "location")
    ]
    assert not elsewhere, f"a block would go without its weights {elsewhere}"
    return made.SerializeToString(deterministic=True)
