"""Small networks of every kind that blocks are made of; weights are large enough to be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scripts.make_models import Network, Sizes, bert, gpt2, vit, wide_mlp

_BOOL = TensorProto.BOOL
SMALL = Sizes(width=256, layers=2, heads=4, vocabulary=2000, sequence=16)


def _value(
    name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def conv(name: str = "conv", *, head_seed: int = 0) -> Network:
    """Four convolutions with batch normalisation, then a classifier; 4.1 MiB."""
    network = Network(name, "conv", head_seed=head_seed)
    network.inputs.append(_value("image", ["N", 3, 32, 32]))
    x, channels = "image", 3
    for index, width in enumerate((64, 128, 256, 256)):
        shape = (width, channels, 3, 3)
        kernel = network.normal(f"c{index}.w", shape, (2 / (channels * 9)) ** 0.5)
        x = network.node("Conv", [x, kernel], f"c{index}", pads=[1] * 4, strides=[2, 2])
        one, zero = np.ones(width, np.float32), np.zeros(width, np.float32)
        scale, variance = (network.constant(f"c{index}.{k}", one) for k in ("scale", "var"))
        bias = network.normal(f"c{index}.bias", (width,), 0.05)
        mean = network.constant(f"c{index}.mean", zero)
        x = network.node("BatchNormalization", [x, scale, bias, mean, variance], f"n{index}")
        x, channels = network.node("Relu", [x], f"r{index}"), width
    x = network.node("Flatten", [x], "flat")
    network.linear(x, "head", (1024, 100), head=True)
    network.outputs.append(_value("head.y", ["N", 100]))
    return network


def branches(name: str = "branches") -> Network:
    """Three parallel branches of two layers between a stem and a head, and two outputs."""
    network = Network(name, "branches")
    network.inputs.append(_value("x", ["N", 256]))
    stem = network.node("Relu", [network.linear("x", "stem", (256, 512))], "stem.relu")
    ends = []
    for index in range(3):
        inner = network.linear(stem, f"b{index}.0", (512, 512))
        inner = network.node("Tanh", [inner], f"b{index}.tanh")
        ends.append(network.linear(inner, f"b{index}.1", (512, 256)))
    joined = network.node("Concat", ends, "joined", axis=1)
    network.linear(joined, "head", (768, 64))
    network.node("Softmax", [stem], "early", axis=-1)
    network.outputs.append(_value("head.y", ["N", 64]))
    network.outputs.append(_value("early", ["N", 512]))
    return network


def choice(name: str = "choice") -> Network:
    """An If whose branches read weights of the graph around it."""
    network = Network(name, "choice")
    network.inputs.append(_value("x", ["N", 256]))
    network.inputs.append(_value("flip", [], TensorProto.BOOL))
    weight = network.normal("w", (256, 256), 0.1)
    made = helper.make_node("MatMul", ["x", weight], ["then.y"])
    then = helper.make_graph([made], "then", [], [_value("then.y", ["N", 256])])
    made = helper.make_node("Neg", ["x"], ["else.y"])
    other = helper.make_graph([made], "else", [], [_value("else.y", ["N", 256])])
    network.node("If", ["flip"], "y", then_branch=then, else_branch=other)
    network.outputs.append(_value("y", ["N", 256]))
    return network


def owning(name: str = "owning") -> Network:
    """Branches, a branch in a branch, and a loop, each with weights of its own, of 256 KiB.

    Weights of the same name are different ones; one is a branch's output as it is.
    """
    network = Network(name, "owning")
    network.inputs.append(_value("x", ["N", 256]))
    network.inputs.append(_value("flip", [], TensorProto.BOOL))
    network.inputs.append(_value("deep", [], TensorProto.BOOL))
    own = [_drawn("w", seed) for seed in range(3)]

    product = helper.make_node("MatMul", ["x", "w"], ["inner"])
    inner = _body("a", [product], ["inner"], [own[0]])
    # It reads the weight of the branch around it.
    product = helper.make_node("MatMul", ["x", "around"], ["other"])
    other = _body("b", [product], ["other"], [])
    chosen = helper.make_node("If", ["deep"], ["chosen"], then_branch=inner, else_branch=other)
    added = helper.make_node("Gemm", ["chosen", "w1"], ["then.y"], transB=1)
    given = [_drawn("around", 4), _drawn("w1", 5)]
    then = _body("then", [chosen, added], ["then.y", "kept"], [*given, _drawn("kept", 6)])

    product = helper.make_node("MatMul", ["x", "w"], ["else.y"])
    also = helper.make_node("Neg", ["w"], ["negative"])
    otherwise = _body("else", [product, also], ["else.y", "negative"], [own[1]])
    made = helper.make_node("If", ["flip"], ["y", "z"], then_branch=then, else_branch=otherwise)
    network.nodes.append(made)
    network.outputs.append(_value("z", [256, 256]))

    step = helper.make_node("MatMul", ["carried", "w"], ["next"])
    on = helper.make_node("Identity", ["going"], ["still"])
    body = _body("body", [step, on], ["still", "next"], [own[2]])
    body.input.extend([_value("count", [], TensorProto.INT64), _value("going", [], _BOOL)])
    body.input.append(_value("carried", ["N", 256]))
    body.output[0].CopyFrom(_value("still", [], _BOOL))
    times = network.constant("times", np.array(3, np.int64))
    network.node("Loop", [times, "", network.node("Tanh", ["y"], "tanh")], "looped", body=body)
    network.outputs.append(_value("looped", ["N", 256]))
    return network


def _drawn(name: str, seed: int) -> TensorProto:
    drawn = np.random.default_rng(seed).standard_normal((256, 256), dtype=np.float32)
    return numpy_helper.from_array(drawn / np.float32(16), name)


def _body(
    name: str, nodes: list[onnx.NodeProto], outputs: list[str], weights: list[TensorProto]
) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(nodes, name, [], values, weights)


def mixing(name: str = "mixing") -> Network:
    """Its rows depend on each other: it must not be batched."""
    network = Network(name, "mixing")
    network.inputs.append(_value("x", ["N", 256]))
    mean = network.node("ReduceMean", [network.linear("x", "l", (256, 256))], "mean", axes=[0])
    network.node("Sub", ["x", mean], "y")
    network.outputs.append(_value("y", ["N", 256]))
    return network


def sequence(name: str = "sequence") -> Network:
    """Its output is no tensor."""
    network = Network(name, "sequence")
    network.inputs.append(_value("x", ["N", 4]))
    network.node("SplitToSequence", ["x"], "y", axis=1)
    network.outputs.append(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
    return network


def fixed(name: str = "fixed") -> Network:
    """No dynamic axis, and a scalar output."""
    network = Network(name, "fixed")
    network.inputs.append(_value("x", [3, 256]))
    network.node("ReduceSum", [network.linear("x", "l", (256, 256))], "y", keepdims=0)
    network.outputs.append(_value("y", []))
    return network


def unranked(name: str = "unranked") -> Network:
    """A Squeeze of whatever is 1 makes the number of axes unknown in the middle of the graph."""
    network = Network(name, "unranked")
    network.inputs.append(_value("x", ["N", 512]))
    axis = network.constant("axis", np.array([0], np.int64))
    y = network.node("Unsqueeze", [network.linear("x", "l0", (512, 512)), axis], "wide")
    y = network.node("Squeeze", [y], "squeezed")
    for layer in ("l1", "l2", "l3"):
        y = network.node("Tanh", [network.linear(y, layer, (512, 512))], f"{layer}.tanh")
    network.node("Reshape", [y, network.constant("rows", np.array([-1, 512], np.int64))], "y")
    network.outputs.append(_value("y", ["N", 512]))
    return network


def wide(name: str = "wide") -> Network:
    """A matrix of 4 MiB, and activations of more than that."""
    network = Network(name, "wide")
    network.inputs.append(_value("x", ["N", 256, 1024]))
    network.node("Tanh", [network.linear("x", "l", (1024, 1024))], "y")
    network.outputs.append(_value("y", ["N", 256, 1024]))
    return network


NETWORKS: dict[str, Callable[[], Network]] = {
    "conv": conv,
    "branches": branches,
    "choice": choice,
    "owning": owning,
    "mixing": mixing,
    "fixed": fixed,
    "unranked": unranked,
    "bert": lambda: bert("bert", SMALL),
    "gpt2": lambda: gpt2("gpt2", SMALL),
    "vit": lambda: vit("vit", SMALL, pixels=64),
    "mlp": lambda: wide_mlp("mlp", width=1024, layers=2),
    "wide": wide,
}


def written(directory: Path, kind: str) -> Path:
    """The network of this kind as a file."""
    return NETWORKS[kind]().write(directory)
