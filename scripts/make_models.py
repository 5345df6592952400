#!/usr/bin/env python3
"""Makes ONNX models of real architectures with seeded weights, without downloads.

    .venv/bin/python scripts/make_models.py --out DIR resnet50 bert_base vgg19
    .venv/bin/python scripts/make_models.py --out DIR resnet50@1    # same backbone, another head
    .venv/bin/python scripts/make_models.py --list

Convolutional networks are the graphs that the onnx wheel carries for its tests, where every weight
is a ConstantOfShape: they get weights, and a dynamic batch axis. Transformers are built here. A
tensor's values depend on the architecture, the seed and its name alone, so `name@1` shares all but
the head with `name`. Weights lie beside the graph (`NAME.bin`, external data) and are written one
by one: a model larger than memory can be made. A file that exists is whole (temporary file, then
rename).
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
PAGE_BYTES = 4096
INLINE_BYTES = 1024  # smaller tensors, and integers, stay in the graph

Array = npt.NDArray[Any]
Make = Callable[[], Array]


@dataclass
class Network:
    """A graph under construction; `weights` are made when they are written."""

    name: str
    family: str
    seed: int = 0
    head_seed: int = 0
    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    weights: dict[str, Make] = field(default_factory=dict)

    def normal(self, name: str, shape: Sequence[int], scale: float, *, head: bool = False) -> str:
        """A weight drawn from a normal distribution; `head`: from the head's seed."""
        seed = [self.head_seed if head else self.seed, zlib.crc32(f"{self.family}/{name}".encode())]

        def make() -> Array:
            drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
            return drawn * np.float32(scale)

        self.weights[name] = make
        return name

    def constant(self, name: str, value: Array) -> str:
        self.weights[name] = lambda: value
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def linear(self, x: str, name: str, wide: tuple[int, int], *, head: bool = False) -> str:
        weight = self.normal(f"{name}.w", wide, wide[0] ** -0.5, head=head)
        bias = self.normal(f"{name}.b", wide[1:], 0.02, head=head)
        return self.node("Add", [self.node("MatMul", [x, weight], f"{name}.mm"), bias], f"{name}.y")

    def write(self, directory: Path) -> Path:
        """Writes `NAME.onnx` and `NAME.bin`; returns the first."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, [])
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        directory.mkdir(parents=True, exist_ok=True)
        binary, path = directory / f"{self.name}.bin", directory / f"{self.name}.onnx"
        fresh = directory / f".{self.name}.{os.getpid()}"
        with fresh.open("wb") as file:
            for name, make in self.weights.items():
                array = make()
                tensor = model.graph.initializer.add()
                if array.nbytes < INLINE_BYTES or array.dtype.kind != "f":
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
                    continue
                file.seek(-file.tell() % PAGE_BYTES, os.SEEK_CUR)
                place = {"location": binary.name, "offset": file.tell(), "length": array.nbytes}
                _external(tensor, name, array, place)
                file.write(np.ascontiguousarray(array).data)
            file.truncate()
        fresh.replace(binary)
        fresh.write_bytes(model.SerializeToString())
        fresh.replace(path)
        return path


def _external(tensor: Any, name: str, array: Array, place: dict[str, Any]) -> None:
    tensor.name = name
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def convolutional(name: str, light: str, *, seed: int = 0, head_seed: int = 0) -> Network:
    """One of the onnx wheel's graphs with weights and a dynamic batch axis."""
    graph = onnx.load(LIGHT / f"light_{light}.onnx").graph
    network = Network(name, light, seed, head_seed, opset=9)
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(int(size) for size in given[node.input[0]])
        else:
            network.nodes.append(node)
    used = {value for node in network.nodes for value in node.input}
    roles = _roles(network.nodes)
    for key, array in given.items():
        if key in used and array.dtype == np.float32 and array.size > 1:
            shapes[key] = array.shape
        elif key in used:
            network.constant(key, array)
    head = _head(network.nodes, shapes)
    for key in used & shapes.keys():
        _convolutional_weight(network, key, shapes[key], roles.get(key, ""), head=key in head)
    network.weights = {key: network.weights[key] for key in sorted(network.weights)}
    for node in network.nodes:
        _generalise(node, network, given)
    network.inputs = [value for value in graph.input if value.name in used - network.weights.keys()]
    network.outputs = list(graph.output)
    for value in (*network.inputs, *network.outputs):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    return network


def _roles(nodes: Iterable[onnx.NodeProto]) -> dict[str, str]:
    names = ("", "scale", "bias", "mean", "variance")
    return {
        value: role
        for node in nodes
        if node.op_type == "BatchNormalization"
        for value, role in zip(node.input, names, strict=True)
        if role
    }


def _head(nodes: Sequence[onnx.NodeProto], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The weights of the last layer that has a matrix."""
    for node in reversed(nodes):
        mine = {value for value in node.input if value in shapes}
        if any(len(shapes[value]) >= 2 for value in mine):
            return mine
    return set()


def _convolutional_weight(
    network: Network, key: str, shape: tuple[int, ...], role: str, *, head: bool
) -> None:
    """Values that keep activations of order one through the depth of the network."""
    if role == "variance" or (not role and "bn" in key and key.endswith("w_0")):
        network.constant(key, np.ones(shape, np.float32))
    elif role == "scale":
        residual = "branch2c" in key or "_3_bn" in key
        network.constant(key, np.full(shape, 0.5 if residual else 1.0, np.float32))
    elif not role and len(shape) >= 2:
        network.normal(key, shape, (2 / int(np.prod(shape[1:]))) ** 0.5, head=head)
    else:
        network.normal(key, shape, 0.05, head=head)


def _generalise(node: onnx.NodeProto, network: Network, given: dict[str, Array]) -> None:
    """Drops attributes opset 9 no longer has; a Reshape keeps its first axis."""
    if node.op_type == "BatchNormalization":
        for attribute in list(node.attribute):
            if attribute.name in ("spatial", "is_test"):
                node.attribute.remove(attribute)
    if node.op_type == "Reshape" and node.input[1] in given and given[node.input[1]][0] == 1:
        shape = given[node.input[1]].copy()
        shape[0] = 0
        network.constant(node.input[1], shape)


@dataclass(frozen=True)
class Sizes:
    """Of a transformer."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 30522
    sequence: int = 128


def bert(name: str, sizes: Sizes = Sizes(), *, seed: int = 0, head_seed: int = 0) -> Network:
    """Token ids and an attention mask to hidden states through a pooled head, post-norm."""
    network = Network(name, "bert", seed, head_seed)
    width, sequence = sizes.width, sizes.sequence
    for value in ("ids", "mask"):
        network.inputs.append(_value(value, TensorProto.INT64, ["N", sequence]))
    x = _embed(network, sizes)
    x = _layer_norm(network, x, "emb.ln", width)
    one = network.constant("one", np.array(1, np.float32))
    far = network.constant("far", np.array(-1e4, np.float32))
    axes = network.constant("mask.axes", np.array([1, 2], np.int64))
    wide = network.node("Unsqueeze", ["mask", axes], "mask.wide")
    real = network.node("Cast", [wide], "mask.real", to=TensorProto.FLOAT)
    hidden = network.node("Mul", [network.node("Sub", [one, real], "mask.not"), far], "mask.far")
    for layer in range(sizes.layers):
        x = _layer(network, f"l{layer}", x, sizes, mask=hidden, pre_norm=False)
    x = network.linear(x, "head", (width, width), head=True)
    network.node("Tanh", [x], "out")
    network.outputs.append(_value("out", TensorProto.FLOAT, ["N", sequence, width]))
    return network


def gpt2(
    name: str, sizes: Sizes = Sizes(vocabulary=50257), *, seed: int = 0, head_seed: int = 0
) -> Network:
    """Token ids to hidden states, causal, pre-norm."""
    network = Network(name, "gpt2", seed, head_seed)
    width, sequence = sizes.width, sizes.sequence
    network.inputs.append(_value("ids", TensorProto.INT64, ["N", sequence]))
    mask = network.constant("causal", np.triu(np.full((sequence,) * 2, -1e4, np.float32), 1))
    x = _embed(network, sizes)
    for layer in range(sizes.layers):
        x = _layer(network, f"l{layer}", x, sizes, mask=mask, pre_norm=True)
    x = _layer_norm(network, x, "final.ln", width)
    network.linear(x, "head", (width, width), head=True)
    network.outputs.append(_value("head.y", TensorProto.FLOAT, ["N", sequence, width]))
    return network


def vit(
    name: str, sizes: Sizes = Sizes(), *, pixels: int = 224, seed: int = 0, head_seed: int = 0
) -> Network:
    """Images in patches of 16 x 16 to 1000 classes, pre-norm, mean-pooled."""
    network = Network(name, "vit", seed, head_seed)
    width, patches = sizes.width, (pixels // 16) ** 2
    network.inputs.append(_value("image", TensorProto.FLOAT, ["N", 3, pixels, pixels]))
    kernel = network.normal("patch.w", (width, 3, 16, 16), 0.02)
    bias = network.normal("patch.b", (width,), 0.02)
    attributes = {"strides": [16, 16], "kernel_shape": [16, 16]}
    x = network.node("Conv", ["image", kernel, bias], "patch", **attributes)
    flat = network.constant("flat", np.array([0, width, -1], np.int64))
    x = network.node("Reshape", [x, flat], "patch.flat")
    x = network.node("Transpose", [x], "patch.rows", perm=[0, 2, 1])
    position = network.normal("position", (patches, width), 0.02)
    x = network.node("Add", [x, position], "embedded")
    for layer in range(sizes.layers):
        x = _layer(network, f"l{layer}", x, sizes, mask="", pre_norm=True)
    x = network.node("ReduceMean", [x], "pooled", axes=[1], keepdims=0)
    network.linear(x, "head", (width, 1000), head=True)
    network.outputs.append(_value("head.y", TensorProto.FLOAT, ["N", 1000]))
    return network


def wide_mlp(
    name: str,
    *,
    width: int,
    layers: int,
    outputs: int | None = None,
    seed: int = 0,
    head_seed: int = 0,
) -> Network:
    """Square layers, the last one for so many `outputs`: the size of a model is all it is for."""
    network = Network(name, "mlp", seed, head_seed)
    network.inputs.append(_value("x", TensorProto.FLOAT, ["N", width]))
    x = "x"
    last = outputs or width
    for layer in range(layers):
        head = layer == layers - 1
        x = network.linear(x, f"l{layer}", (width, last if head else width), head=head)
        x = network.node("Relu", [x], f"l{layer}.relu")
    network.outputs.append(_value(x, TensorProto.FLOAT, ["N", last]))
    return network


def _value(name: str, data_type: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, shape)


def _embed(network: Network, sizes: Sizes) -> str:
    words = network.normal("words", (sizes.vocabulary, sizes.width), 0.02)
    position = network.normal("position", (sizes.sequence, sizes.width), 0.02)
    return network.node("Add", [network.node("Gather", [words, "ids"], "tokens"), position], "emb")


def _layer_norm(network: Network, x: str, name: str, width: int) -> str:
    scale = network.constant(f"{name}.g", np.ones(width, np.float32))
    bias = network.normal(f"{name}.b", (width,), 0.02)
    out = f"{name}.y"
    return network.node("LayerNormalization", [x, scale, bias], out, axis=-1, epsilon=1e-5)


def _layer(network: Network, p: str, x: str, sizes: Sizes, *, mask: str, pre_norm: bool) -> str:
    """Attention, then two linear layers with a GELU between, each with a residual."""
    node, width = network.node, sizes.width
    attended = _attention(
        network, p, _layer_norm(network, x, f"{p}.ln1", width) if pre_norm else x, sizes, mask
    )
    x = node("Add", [x, attended], f"{p}.r1")
    if not pre_norm:
        x = _layer_norm(network, x, f"{p}.ln1", width)
    inner = _layer_norm(network, x, f"{p}.ln2", width) if pre_norm else x
    inner = network.linear(inner, f"{p}.fc1", (width, 4 * width))
    for key, value in (("sqrt2", 2**0.5), ("one", 1.0), ("half", 0.5)):
        network.constant(key, np.array(value, np.float32))
    erf = node("Erf", [node("Div", [inner, "sqrt2"], f"{p}.gelu.div")], f"{p}.gelu.erf")
    gate = node("Mul", [inner, node("Add", [erf, "one"], f"{p}.gelu.one")], f"{p}.gelu.mul")
    inner = node("Mul", [gate, "half"], f"{p}.gelu")
    x = node("Add", [x, network.linear(inner, f"{p}.fc2", (4 * width, width))], f"{p}.r2")
    return x if pre_norm else _layer_norm(network, x, f"{p}.ln2", width)


def _attention(network: Network, p: str, x: str, sizes: Sizes, mask: str) -> str:
    node, width, heads = network.node, sizes.width, sizes.heads
    split = network.constant("split", np.array([0, -1, heads, width // heads], np.int64))
    join = network.constant("join", np.array([0, -1, width], np.int64))
    scale = network.constant("scale", np.array((width // heads) ** -0.5, np.float32))
    parts = []
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = network.linear(x, f"{p}.{part}", (width, width))
        y = node("Reshape", [y, split], f"{p}.{part}.split")
        parts.append(node("Transpose", [y], f"{p}.{part}.heads", perm=order))
    score = node("Mul", [node("MatMul", parts[:2], f"{p}.qk"), scale], f"{p}.scaled")
    if mask:
        score = node("Add", [score, mask], f"{p}.masked")
    weight = node("Softmax", [score], f"{p}.softmax", axis=-1)
    mixed = node("MatMul", [weight, parts[2]], f"{p}.mixed")
    mixed = node("Transpose", [mixed], f"{p}.mixed.rows", perm=[0, 2, 1, 3])
    return network.linear(
        node("Reshape", [mixed, join], f"{p}.mixed.join"), f"{p}.proj", (width, width)
    )


ZOO: dict[str, Callable[..., Network]] = {
    "alexnet": partial(convolutional, light="bvlc_alexnet"),
    "densenet121": partial(convolutional, light="densenet121"),
    "inception_v1": partial(convolutional, light="inception_v1"),
    "inception_v2": partial(convolutional, light="inception_v2"),
    "resnet50": partial(convolutional, light="resnet50"),
    "shufflenet": partial(convolutional, light="shufflenet"),
    "squeezenet": partial(convolutional, light="squeezenet"),
    "vgg19": partial(convolutional, light="vgg19"),
    "zfnet512": partial(convolutional, light="zfnet512"),
    "bert_base": bert,
    "gpt2": gpt2,
    "vit_b16": vit,
    # What it takes to serve a model that is nothing.
    "tiny": partial(wide_mlp, width=64, layers=1),
    # 2.3 GiB: more than one protobuf file can hold.
    "mlp_2gb": partial(wide_mlp, width=8192, layers=9),
    "matrix_2gb": partial(wide_mlp, width=8192, layers=1, outputs=9 * 8192),
}


def make(wanted: str, directory: Path) -> Path:
    """`NAME` or `NAME@HEADSEED` of the zoo as a file, which is made unless it is there."""
    name, _, head_seed = wanted.partition("@")
    file = directory / f"{wanted.replace('@', '_')}.onnx"
    if not file.is_file():
        ZOO[name](file.stem, head_seed=int(head_seed or 0)).write(directory)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME[@HEADSEED]", help="default: all")
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "paceline" / "models")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(sorted(ZOO)))
        return 0
    wanted = arguments.models or sorted(ZOO)
    for name in wanted:
        base, _, seed = name.partition("@")
        if base not in ZOO or not (seed or "0").isdecimal():
            parser.error(f"no model {name!r}: use {', '.join(sorted(ZOO))}, each with @HEADSEED")
    for name in wanted:
        path = make(name, arguments.out)
        print(f"{path}  {path.with_suffix('.bin').stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
