"""Weights that the branches and bodies of control flow have themselves are objects like others."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from scripts.make_models import Network
from tests.blocks_models import owning, written

from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.compile import compile_model
from paceline.blocks.graph import keep
from paceline.blocks.measure import BlockRunner
from paceline.blocks.member import Options
from paceline.blocks.repository import CompiledModel
from paceline.blocks.source import Stored
from paceline.blocks.subgraphs import external_tensors, hoist
from paceline.core.errors import ConfigError

WEIGHT_BYTES = 256 * 256 * 4


def _compiled(tmp_path: Path, source: Path, *, measure: bool = False) -> CompiledModel:
    directory, pool = tmp_path / "repo" / source.stem, tmp_path / "pool"
    return compile_model({"": source}, directory, pool, Options(measure=measure)).model


def _external(tmp_path: Path) -> Path:
    """The network, all weights of 1 KiB or more in a file beside it, those of branches too."""
    model = onnx.load(owning().write(tmp_path / "whole"))
    path = tmp_path / "owning.onnx"
    onnx.save(model, path, save_as_external_data=True, location="owning.data")
    assert sum(1 for _ in external_tensors(onnx.load(path, load_external_data=False))) == 6
    return path


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_every_branch_computes_with_its_own_weights(
    tmp_path: Path, external: bool, measure: bool
) -> None:
    """Whichever is taken; branches beside each other have other weights of the same name."""
    source = _external(tmp_path) if external else written(tmp_path, "owning")
    model = _compiled(tmp_path, source, measure=measure)
    (member,) = model.manifest.members
    runner = BlockRunner(ObjectStore(model.pool), model.manifest.objects)
    plain = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((3, 256), dtype=np.float32)
    answers = set()
    for flip, deep in product((True, False), repeat=2):
        feed: dict[str, Any] = {"x": x, "flip": np.array(flip), "deep": np.array(deep)}
        for name, array in zip(("z", "looped"), plain.run(["z", "looped"], feed), strict=True):
            got = runner.run(member, feed)[name]
            np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-4)
            answers.add(got.tobytes())
    assert len(answers) == 5, "of z two, of looped three: the branches differ"


def test_a_branchs_weights_are_objects_like_others(tmp_path: Path) -> None:
    """None is left in the graph, and what two branches have in common is one object."""
    model = _compiled(tmp_path, written(tmp_path, "owning"))
    (block,) = model.manifest.members[0].blocks
    large = [weight for weight in block.weights if weight.bytes == WEIGHT_BYTES]
    assert len(large) == len({weight.object for weight in large}) == 7
    assert model.manifest.objects[block.graph].size_bytes < WEIGHT_BYTES
    again = owning("again").write(tmp_path)
    twin = onnx.load(again)
    (choice,) = (node for node in twin.graph.node if node.op_type == "If")
    then, otherwise = (
        next(attribute.g for attribute in choice.attribute if attribute.name == f"{which}_branch")
        for which in ("then", "else")
    )
    (around,) = (tensor for tensor in then.initializer if tensor.name == "around")
    otherwise.initializer[0].raw_data = around.raw_data
    again.write_bytes(twin.SerializeToString())
    (shared,) = _compiled(tmp_path, again).manifest.members[0].blocks
    assert len({w.object for w in shared.weights if w.bytes == WEIGHT_BYTES}) < 7


def test_a_branchs_external_data_belong_to_the_model(tmp_path: Path) -> None:
    """They are part of its digest, and may not lie outside its directory."""
    source = _external(tmp_path)
    first = _compiled(tmp_path, source)
    data = tmp_path / "owning.data"
    data.write_bytes(bytes(reversed(data.read_bytes())))
    assert _compiled(tmp_path, source).digest != first.digest
    data.rename(tmp_path.parent / f"{tmp_path.name}.data")
    model = onnx.load(source, load_external_data=False)
    for tensor in external_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{tmp_path.name}.data"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="outside the model's directory"):
        _compiled(tmp_path, source)


def test_a_table_that_a_branch_reads_is_no_table(tmp_path: Path) -> None:
    """Rows are asked of it outside, but the branch needs all of it."""
    rows, width = 2048, 256
    network = Network("table", "table")
    network.inputs += [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows]),
        helper.make_tensor_value_info("flip", TensorProto.BOOL, []),
    ]
    network.node("Gather", [network.normal("words", (rows, width), 0.1), "ids"], "found")
    bodies = [
        helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info("made", TensorProto.FLOAT, None)]
        )
        for name, nodes in (
            ("then", [helper.make_node("MatMul", ["x", "words"], ["made"])]),
            ("else", [helper.make_node("Neg", ["found"], ["made"])]),
        )
    ]
    network.node("If", ["flip"], "y", then_branch=bodies[0], else_branch=bodies[1])
    network.outputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", width]))
    (block,) = _compiled(tmp_path, network.write(tmp_path)).manifest.members[0].blocks
    assert [(weight.name, weight.access) for weight in block.weights] == [("words", "all")]


def test_the_backend_computes_with_a_branchs_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a budget, bit for bit what a run of the block without one gives."""
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    found = _compiled(tmp_path, written(tmp_path, "owning"))
    texts = {"manifest": found.digest, "pool": str(found.pool), "memory_budget_mib": "4"}
    given = {key: {"string_value": text} for key, text in texts.items()}
    runner = BlockRunner(ObjectStore(found.pool), found.manifest.objects)
    x = np.random.default_rng(0).standard_normal((3, 256), dtype=np.float32)
    model = BlockModel.open(read_settings(given, found.directory)).start()
    try:
        for flip, deep in product((True, False), repeat=2):
            feed: dict[str, Any] = {"x": x, "flip": np.array(flip), "deep": np.array(deep)}
            wanted = runner.run(found.manifest.members[0], feed)
            for name, array in model.infer("", feed, list(wanted)).items():
                assert array.tobytes() == wanted[name].tobytes()
    finally:
        model.close()


def _weight(name: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    return tensor


def test_a_name_means_the_value_nearest_to_it() -> None:
    """Moved out under a name nobody else has; a body that has its own value keeps that."""
    shadowing = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["w"]), helper.make_node("Neg", ["w"], ["s"])],
        "shadowing",
        [],
        [],
    )
    reading = helper.make_graph([helper.make_node("Neg", ["w"], ["r"])], "reading", [], [])
    nested = helper.make_node("If", ["c"], ["n"], then_branch=shadowing, else_branch=reading)
    outer = helper.make_graph([nested], "outer", [], [], [_weight("w")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=reading)
    graph = helper.make_graph([node], "g", [], [], [_weight("w"), _weight("w/0")])
    model = helper.make_model(graph)
    hoist(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "w/0", "w/1"]
    assert [t.external_data[0].value for t in model.graph.initializer] == ["w", "w/0", "w"]
    branches = {a.name: a.g for a in model.graph.node[0].attribute}
    assert list(branches["else_branch"].node[0].input) == ["w"]
    assert not branches["then_branch"].initializer
    inner = {a.name: a.g for a in branches["then_branch"].node[0].attribute}
    assert list(inner["else_branch"].node[0].input) == ["w/1"]
    assert [list(node.input) for node in inner["then_branch"].node] == [["x"], ["w"]]


def test_a_graph_that_goes_without_its_weights_is_never_made() -> None:
    """Whoever forgets a branch's weights finds out before anything is in the pool."""
    branch = helper.make_graph([helper.make_node("Neg", ["w"], ["y"])], "b", [], [], [_weight("w")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(AssertionError, match=r"without its weights \['w', 'w'\]"):
        keep(model, {})
    hoist(model)
    stored = {tensor.name: Stored(Path("w"), 0, 1, (4,)) for tensor in model.graph.initializer}
    assert [name for _, name in keep(model, stored).weights] == ["w/0", "w/1"]
