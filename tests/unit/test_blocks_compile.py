"""Compiling networks into blocks: same results, sharing, what is refused, what is done anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from scripts.make_models import bert, wide_mlp
from tests.blocks_models import SMALL, conv, sequence, written
from tritonclient.grpc import model_config_pb2

from paceline.blocks.backend.manifest import Manifest, runtime_here
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.compile import Outcome, compile_model
from paceline.blocks.measure import BlockRunner, Draw, sample
from paceline.blocks.member import Options
from paceline.core.errors import ConfigError

MIB = 1 << 20
UNMEASURED = Options(measure=False)


def _compile(tmp_path: Path, source: Path, options: Options = UNMEASURED) -> Outcome:
    return compile_model({"": source}, tmp_path / "repo" / source.stem, tmp_path / "pool", options)


def _weights(manifest: Manifest) -> dict[str, int]:
    """Bytes by object."""
    return {
        weight.object: manifest.objects[weight.object].size_bytes
        for member in manifest.members
        for block in member.blocks
        for weight in block.weights
    }


def _plain(source: Path, feed: dict[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("budget_mib", [None, 4])
@pytest.mark.parametrize(
    "kind",
    ["conv", "branches", "choice", "mixing", "fixed", "unranked", "bert", "gpt2", "vit", "mlp"],
)
def test_blocks_compute_what_the_whole_model_computes(
    tmp_path: Path, kind: str, budget_mib: int | None
) -> None:
    """In turn: bit for bit what the whole compiled graph gives, 1e-4 from plain ONNX Runtime."""
    source = written(tmp_path, kind)
    model = _compile(tmp_path, source, Options(budget_mib=budget_mib, measure=False)).model
    (member,) = model.manifest.members
    runner = BlockRunner(ObjectStore(model.pool), model.manifest.objects)
    for batch in (1, 3):
        feed = sample(member, batch, 3, {}, Draw(batch))
        blocks, whole = (runner.run(member, feed, whole=which) for which in (False, True))
        plain = _plain(source, feed)
        for name, array in plain.items():
            assert blocks[name].tobytes() == whole[name].tobytes()
            np.testing.assert_allclose(blocks[name], array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "blocks", "batching"),
    [
        ("conv", 2, True),
        ("bert", 4, True),
        ("branches", 3, True),
        ("mlp", 4, True),
        ("unranked", 2, True),
    ],
)
def test_a_budget_bounds_the_blocks(tmp_path: Path, kind: str, blocks: int, batching: bool) -> None:
    """Within 4 MiB two blocks fit at a time, whatever the graph is like; all are measured."""
    model = _compile(tmp_path, written(tmp_path, kind), Options(budget_mib=4)).model
    (member,) = model.manifest.members
    assert len(member.blocks) >= blocks
    for one, other in zip(member.blocks, member.blocks[1:], strict=False):
        assert one.swapped_bytes + other.swapped_bytes <= 4 * MIB + 64 * 1024
    assert sum(block.nodes for block in member.blocks) == member.whole.nodes
    assert member.batching is batching and not member.notes
    assert all(set(block.execute_s) == {1, 8} for block in member.blocks)
    assert all(block.swap_in_s is not None for block in member.blocks)
    assert model.manifest.document["measured"]["verified_batches"] == {"": [1, 2]}


def test_an_embedding_table_is_left_to_demand_paging(tmp_path: Path) -> None:
    """BERT's 2 MiB of words are `rows`; no block counts them against a budget."""
    model = _compile(
        tmp_path, written(tmp_path, "bert"), Options(budget_mib=4, measure=False)
    ).model
    first = model.manifest.members[0].blocks[0]
    tables = [weight for weight in first.weights if weight.access == "rows"]
    assert [table.shape for table in tables] == [(2000, 256)]
    assert first.paged_bytes == 2000 * 256 * 4
    assert first.swapped_bytes == first.weights_bytes - first.paged_bytes


def test_a_mask_that_every_layer_reads_forbids_no_cut(tmp_path: Path) -> None:
    """A value that stays live raises the width that is allowed; the blocks carry it."""
    model = _compile(
        tmp_path, written(tmp_path, "bert"), Options(budget_mib=4, measure=False)
    ).model
    inner = model.manifest.members[0].blocks[1:-2]
    assert inner and all(len(block.live) >= 2 for block in inner)


def test_a_second_model_with_the_same_backbone_adds_its_head_alone(tmp_path: Path) -> None:
    """The pool grows by the head's matrix and a pack of small tensors."""
    first = _compile(tmp_path, conv("one").write(tmp_path)).model.manifest
    outcome = _compile(tmp_path, conv("two", head_seed=1).write(tmp_path))
    second = outcome.model.manifest
    new = _weights(second).keys() - _weights(first).keys()
    assert sum(_weights(second)[name] for name in new) <= 1024 * 100 * 4 + 64 * 1024
    assert sum(_weights(second).values()) > 3 * MIB


def test_blocks_of_models_that_begin_alike_are_one_block(tmp_path: Path) -> None:
    """Same key, so that one session serves both; names in the models differ."""
    options = Options(budget_mib=4, measure=False)
    keys = []
    for name, seed in (("one", 0), ("two", 1)):
        source = bert(name, SMALL, head_seed=seed).write(tmp_path)
        (member,) = _compile(tmp_path, source, options).model.manifest.members
        keys.append([block.key for block in member.blocks])
    assert keys[0][:-1] == keys[1][:-1]
    assert keys[0][-1] != keys[1][-1]


def test_fused_members_share_and_keep_their_own_tensors(tmp_path: Path) -> None:
    """One model: names prefixed, inputs optional, the backbone once."""
    sources = {
        "one": conv("one").write(tmp_path),
        "two": conv("two", head_seed=1).write(tmp_path),
    }
    directory = tmp_path / "repo" / "both"
    manifest = compile_model(sources, directory, tmp_path / "pool", Options()).model.manifest
    config = text_format.Parse(
        (directory / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert [t.name for t in config.input] == ["one/image", "two/image"]
    assert all(t.optional for t in config.input)
    assert [t.name for t in config.output] == ["one/head.y", "two/head.y"]
    assert config.max_batch_size == 32
    assert [member.name for member in manifest.members] == ["one", "two"]
    assert manifest.weights_bytes < 1.2 * (sources["one"].with_suffix(".bin").stat().st_size)


def test_what_each_member_takes_beside_weights_is_measured_apart(tmp_path: Path) -> None:
    """What the whole needs is that of whichever takes most."""
    sources = {"one": conv("one").write(tmp_path), "two": written(tmp_path, "bert")}
    directory = tmp_path / "repo" / "both"
    manifest = compile_model(sources, directory, tmp_path / "pool", Options(64)).model.manifest
    for rows, most in manifest.activations.items():
        each = [manifest.member_activation_bytes(member, rows) for member in manifest.members]
        assert 0 < min(each) < max(each) == most
    alone = replace(manifest.members[0], activations={})
    assert manifest.member_activation_bytes(alone, 8) == manifest.activation_bytes(8)


def test_the_configuration_says_what_triton_needs(tmp_path: Path) -> None:
    """Backend, types, shapes without the batch axis, where manifest and pool are."""
    outcome = _compile(tmp_path, written(tmp_path, "bert"), Options(budget_mib=16, max_batch=16))
    config = text_format.Parse(
        (tmp_path / "repo" / "bert" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert (config.name, config.backend) == ("bert", "paceline_blocks")
    assert config.max_batch_size == 16
    assert [(t.name, list(t.dims)) for t in config.input] == [("ids", [16]), ("mask", [16])]
    assert [(t.name, list(t.dims)) for t in config.output] == [("out", [16, 256])]
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "manifest": outcome.model.digest,
        "pool": "../../pool",
        "memory_budget_mib": "16",
    }
    assert (tmp_path / "repo" / "bert" / "1").is_dir()


def test_rows_that_depend_on_each_other_are_not_batched(tmp_path: Path) -> None:
    """Its axis is dynamic, but running it shows that it is no batch."""
    model = _compile(tmp_path, written(tmp_path, "mixing"), Options()).model
    (member,) = model.manifest.members
    assert not member.batching
    assert "not independent" in member.notes[0]
    assert "max_batch_size: 0" in (model.directory / "config.pbtxt").read_text()


def test_control_flow_is_one_block_with_a_note(tmp_path: Path) -> None:
    (member,) = _compile(tmp_path, written(tmp_path, "choice"), Options()).model.manifest.members
    assert len(member.blocks) == 1
    assert "control flow" in member.notes[0]


def test_what_triton_cannot_carry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequence.onnx: output 'y' is no tensor"):
        _compile(tmp_path, sequence().write(tmp_path))
    assert not (tmp_path / "repo").exists()


def test_a_budget_no_cut_can_keep_is_refused(tmp_path: Path) -> None:
    """A convolution's weights cannot be tiled: the message says which budget would do."""
    with pytest.raises(ConfigError, match="give at least --budget-mib 3"):
        _compile(tmp_path, written(tmp_path, "conv"), Options(budget_mib=1))
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not an ONNX file"), (b"\xff" * 99, "not an ONNX file")],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        _compile(tmp_path, path)


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    source = written(tmp_path, "conv")
    model = onnx.load(source, load_external_data=False)
    model.graph.node[-1].op_type = "Frobnicate"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=r"conv.onnx: ONNX Runtime refuses it: .*Frobnicate"):
        _compile(tmp_path, source)


def test_external_data_outside_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    source = written(tmp_path / "deep", "conv")
    (tmp_path / "deep" / "conv.bin").rename(tmp_path / "conv.bin")
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../conv.bin"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="outside the model's directory"):
        _compile(tmp_path, source)


def test_another_backends_model_is_not_overwritten(tmp_path: Path) -> None:
    source = written(tmp_path, "conv")
    taken = tmp_path / "repo" / "conv" / "config.pbtxt"
    taken.parent.mkdir(parents=True)
    taken.write_text('backend: "python"')
    with pytest.raises(ConfigError, match="another backend"):
        _compile(tmp_path, source)
    assert taken.read_text() == 'backend: "python"'


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    """Not the unchanged; but a new source, option, ONNX Runtime or CPU, or a damaged object."""
    source, options = written(tmp_path, "conv"), Options(measure=False)
    first = _compile(tmp_path, source, options)
    config = first.model.directory / "config.pbtxt"
    stamp = config.stat()
    assert first.fresh and not _compile(tmp_path, source, options).fresh
    assert config.stat() == stamp

    assert _compile(tmp_path, source, replace(options, max_batch=4)).fresh
    here = runtime_here(ort.__version__)
    for other in (
        replace(here, onnxruntime="0.1"),
        replace(here, cpu_features=here.cpu_features[1:]),
    ):
        for fresh in (True, False):
            arguments = ({"": source}, first.model.directory, tmp_path / "pool", options)
            assert compile_model(*arguments, runtime=other).fresh is fresh
    conv("conv", head_seed=1).write(tmp_path)
    changed = _compile(tmp_path, source, options)
    assert changed.fresh and changed.model.digest != first.model.digest

    name = next(iter(_weights(changed.model.manifest)))
    damaged = tmp_path / "pool" / "objects" / name
    damaged.chmod(0o644)
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    healed = _compile(tmp_path, source, options)
    assert healed.fresh
    assert healed.written_bytes == damaged.stat().st_size
    ObjectStore(tmp_path / "pool").verified(name, healed.model.manifest.objects[name])


def test_the_manifest_is_the_documented_one(tmp_path: Path) -> None:
    """The keys that docs/blocks-format.md shows are the keys that are written."""
    text = (Path(__file__).parents[2] / "docs" / "blocks-format.md").read_text()
    shown = json.loads(text.split("```json")[1].split("```")[0])
    model = _compile(tmp_path, written(tmp_path, "bert"), Options()).model
    made = model.manifest.document
    assert made.keys() == shown.keys()
    member, shown_member = made["members"][0], shown["members"][0]
    assert member.keys() == shown_member.keys()
    assert member["blocks"][0].keys() == shown_member["blocks"][0].keys()
    assert member["inputs"][0].keys() == shown_member["inputs"][0].keys()
    weight, shown_weight = (m["blocks"][0]["weights"][0] for m in (member, shown_member))
    assert weight.keys() == shown_weight.keys()


def test_a_matrix_above_the_budget_is_tiled(tmp_path: Path) -> None:
    """4 MiB a layer within a budget of 2: eight tiles in all, and none above half the budget."""
    source = wide_mlp("mlp", width=1024, layers=2).write(tmp_path)
    (member,) = _compile(tmp_path, source, Options(budget_mib=2)).model.manifest.members
    tiles = [w for w in member.whole.weights if w.shape == (1024, 256)]
    assert len(tiles) == 8
    assert not member.notes
    assert max(block.swapped_bytes for block in member.blocks) <= MIB + 16 * 1024
