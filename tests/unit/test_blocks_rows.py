"""Which models with a first axis of any length are given several requests' rows along it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from scripts.make_models import Network

from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options

WIDTH = 256


def _network(dtype: int = TensorProto.FLOAT) -> Network:
    network = Network("rows", "rows")
    for value, values in (("x", network.inputs), ("y", network.outputs)):
        kind = TensorProto.FLOAT if value == "y" else dtype
        values.append(helper.make_tensor_value_info(value, kind, ["N", WIDTH]))
    return network


def _ints(network: Network, name: str, *values: int) -> str:
    return network.constant(name, np.array(values, np.int64))


def _rounding() -> Network:
    """Ids: where all are 0 or 1 the output is what two orders of adding make of the same sum.

    A row alone is added in another order than one of two, so that it comes out otherwise there; so
    does magika's (a network of file types) for a file in which all bytes are 0 or 1.
    """
    network = _network(TensorProto.INT64)
    real = network.node("Cast", ["x"], "real", to=TensorProto.FLOAT)
    wide = network.linear(real, "l", (WIDTH, WIDTH))
    drawn = network.weights["l.w"]
    turned = network.node(
        "Gather", [real, _ints(network, "turn", *range(WIDTH)[::-1])], "t", axis=1
    )
    network.constant("turned.w", drawn()[::-1].copy())
    other = network.node("MatMul", [turned, "turned.w"], "other")
    bias = network.node("Sub", [network.node("Sub", [wide, other], "bias.all"), "l.b"], "bias")
    most = network.node("ReduceMax", [real], "most", axes=[1], keepdims=1)
    two = network.constant("two", np.array(2, np.float32))
    loud = network.constant("loud", np.array(1e5, np.float32))
    low = network.node("Cast", [network.node("Less", [most, two], "less")], "low", to=1)
    noise = network.node("Mul", [network.node("Mul", [bias, loud], "noise.all"), low], "noise")
    network.node(
        "Tanh", [network.node("Add", [noise, network.node("Tanh", [wide], "w")], "s")], "y"
    )
    return network


def _weakly() -> Network:
    """A ten-thousandth of the batch's mean is in every row."""
    network = _network()
    mean = network.node("ReduceMean", ["x"], "mean", axes=[0])
    part = network.node(
        "Mul", [mean, network.constant("part", np.array(1e-4, np.float32))], "part.y"
    )
    network.node("Add", ["x", part], "y")
    return network


def _running() -> Network:
    """A row is the sum of those before it: the first one depends on none."""
    network = _network()
    network.node("CumSum", ["x", network.constant("axis", np.array(0, np.int64))], "y")
    return network


def _flags() -> Network:
    """Is any flag of the batch set? Two values, of which half the rows are alike."""
    network = _network(TensorProto.BOOL)
    real = network.node("Cast", ["x"], "real", to=TensorProto.FLOAT)
    most = network.node("ReduceMax", [real], "most", axes=[0, 1])
    network.node("Mul", [network.node("ReduceMean", [real], "mean", axes=[0]), most], "y.one")
    network.node("Sub", [real, "y.one"], "y")
    return network


def _by_size(network: Network, divided: str) -> None:
    """What is divided by the number of rows."""
    shape = network.node("Shape", [divided], "shape")
    rows = network.node("Gather", [shape, _ints(network, "first", 0)], "rows")
    network.node("Div", [divided, network.node("Cast", [rows], "n", to=TensorProto.FLOAT)], "y")


def _divided() -> Network:
    network = _network()
    _by_size(network, "x")
    return network


def _divided_and_small() -> Network:
    """All values are below any tolerance that is not relative."""
    network = _network()
    small = network.constant("small", np.array(1e-7, np.float32))
    _by_size(network, network.node("Mul", ["x", small], "less"))
    return network


def _divided_and_dead() -> Network:
    """Above 3, which few values are: for most inputs the output is 0 in a batch and alone."""
    network = _network()
    high = network.constant("high", np.array(6, np.float32))
    _by_size(network, network.node("Relu", [network.node("Sub", ["x", high], "above")], "alive"))
    return network


def _single() -> Network:
    """A row and no more, whatever its axis says."""
    network = _network()
    row = network.node("Reshape", ["x", _ints(network, "one", 1, WIDTH)], "row")
    network.node("Add", ["x", row], "y")
    return network


def _picked() -> Network:
    """The rows with a positive number in a column: of the first two that are tried both."""
    first, second, third = np.random.default_rng(0).standard_normal((3, WIDTH), dtype=np.float32)
    place = int(np.argmax((first > 0) & (second > 0) & (third < 0)))
    network = _network()
    column = network.node("Gather", ["x", _ints(network, "place", place)], "column", axis=1)
    flat = network.node("Reshape", [column, _ints(network, "all", -1)], "flat")
    nought = network.constant("nought", np.array(0, np.float32))
    network.node("Compress", ["x", network.node("Greater", [flat, nought], "more")], "y", axis=0)
    return network


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (_rounding, []),
        (_weakly, ["no batching: rows of a batch are not independent"]),
        (_running, ["no batching: rows of a batch are not independent"]),
        (_flags, ["no batching: rows of a batch are not independent"]),
        (_divided, ["no batching: rows of a batch come out otherwise than alone"]),
        (_divided_and_small, ["no batching: rows of a batch come out otherwise than alone"]),
        (_divided_and_dead, ["no batching: rows of a batch come out otherwise than alone"]),
        (_picked, ["no batching: an output has no batch axis"]),
        (_single, ["no batching: it does not run on a batch of two"]),
    ],
)
def test_a_batch_is_given_to_models_of_which_it_changes_no_row(
    tmp_path: Path, make: Callable[[], Network], notes: list[str]
) -> None:
    source = make().write(tmp_path)
    directory = tmp_path / "repo" / "rows"
    (member,) = compile_model(
        {"": source}, directory, tmp_path / "pool", Options(panels=False)
    ).model.manifest.members
    assert list(member.notes) == notes
    assert member.batching is not bool(notes)
