"""What lies within the nodes of a graph: the bodies of If, Loop and Scan, their weights and names.

A body reads values of the graphs around it by name. It may have weights of its own; to be a pool's
objects like all others these belong to the outermost graph, from where every body can read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import AttributeProto, TensorProto, helper


def has_subgraphs(nodes: Iterable[onnx.NodeProto]) -> bool:
    return any(True for node in nodes for _ in bodies(node))


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The node's own subgraphs, not those within them."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """All of them, at every depth, outer ones first."""
    for node in nodes:
        for body in bodies(node):
            yield body
            yield from subgraphs(body.node)


def read_within(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the node's subgraphs read, their own values among them."""
    for body in subgraphs([node]):
        yield from (name for inner in body.node for name in inner.input)


def external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model, wherever it stands, whose data are in another file."""
    outer = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    inner = list(subgraphs(outer))
    graphs = [model.graph, *inner]
    nodes = [*outer, *(node for graph in inner for node in graph.node)]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    sparse = [
        *(tensor for graph in graphs for tensor in graph.sparse_initializer),
        *(tensor for a in attributes for tensor in (a.sparse_tensor, *a.sparse_tensors)),
    ]
    dense = [
        *(tensor for graph in graphs for tensor in graph.initializer),
        *(tensor for a in attributes for tensor in (a.t, *a.tensors)),
        *(part for tensor in sparse for part in (tensor.values, tensor.indices)),
    ]
    return filter(_is_external, dense)


def hoist(model: onnx.ModelProto) -> None:
    """Makes the external weights of all subgraphs weights of the model's graph, in place.

    Each gets a name that nothing else has: bodies beside each other may use the same ones.
    """
    inner = list(subgraphs(model.graph.node))
    taken = {name for graph in (model.graph, *inner) for name in _names(graph)}
    for graph in inner:
        renamed: dict[str, str] = {}
        for tensor in filter(_is_external, graph.initializer):
            renamed[tensor.name] = name = _fresh(tensor.name, taken)
            taken.add(name)
            outer = model.graph.initializer.add()
            outer.CopyFrom(tensor)
            outer.name = name
        kept = [tensor for tensor in graph.initializer if tensor.name not in renamed]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        _rename(graph.node, renamed)
        for value in graph.output:  # which may not be a value of a graph around
            if value.name in renamed:
                source = renamed[value.name]
                graph.node.append(helper.make_node("Identity", [source], [value.name]))


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _made(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that the graph itself gives values."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from _made(graph)
    yield from (name for node in graph.node for name in node.input)


def _fresh(name: str, taken: set[str]) -> str:
    number = 0
    while f"{name}/{number}" in taken:
        number += 1
    return f"{name}/{number}"


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """What the nodes and their bodies read, but for a body that has another value of that name."""
    if not names:
        return
    for node in nodes:
        for position, name in enumerate(node.input):
            if name in names:
                node.input[position] = names[name]
        for body in bodies(node):
            own = set(_made(body))
            _rename(body.node, {old: new for old, new in names.items() if old not in own})
