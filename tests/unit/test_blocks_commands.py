"""`paceline blocks` from the shell: compile, show, suggest, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from scripts.make_models import wide_mlp
from tests.blocks_models import conv, written

from paceline.blocks import show
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.observed import Observed, from_documents, from_state
from paceline.blocks.repository import find_compiled
from paceline.blocks.suggest import Suggestion, Weights, groups, suggest, weights_of
from paceline.config import parse_chain
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError
from paceline.core.profile import ProfileRow, Profiles
from paceline.planner.replan import Traffic
from paceline.state import State

MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "y=1,2"], "--shape: no input 'y'; there are image"),
        (["--shape", "image=1"], "--shape: input 'image' has 4 axes, got 1 sizes"),
        (["--out", "taken"], "--out: taken is a file; name a directory"),
        (["--pool", "taken/pool"], "--pool: taken is a file; name a directory"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_compiled(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    conv("one").write(tmp_path)
    (tmp_path / "taken").touch()
    before = sorted(tmp_path.iterdir())
    done = _paceline("compile", "one.onnx", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"paceline: {said}\n")
    assert sorted(tmp_path.iterdir()) == before


def _paceline(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline", "blocks", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_compile_then_show_from_the_shell(tmp_path: Path) -> None:
    """Default places; progress and results on stderr; the second time nothing is done."""
    conv("one").write(tmp_path)
    conv("two", head_seed=1).write(tmp_path)
    arguments = ("compile", "one.onnx", "again=two.onnx", "--budget-mib", "8")
    done = _paceline(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "paceline: one: timing 2 blocks" in done.stderr
    assert f"again: 2 blocks, 4.1 MiB, of which 0.4 MiB new to {tmp_path}" in done.stderr
    assert (tmp_path / "blocks" / "objects").is_dir()
    assert "model_repository/one: unchanged" in _paceline(*arguments, cwd=tmp_path).stderr

    shown = json.loads(_paceline("show", "--format", "json", cwd=tmp_path).stdout)
    assert [model["model"] for model in shown["models"]] == ["again", "one"]
    one = shown["models"][1]
    assert one["shared_bytes"]["again"] + one["own_bytes"] == one["weights_bytes"]
    assert one["members"][0]["blocks"][0]["shared_with"] == ["again"]
    assert shown["once_bytes"] == shown["total_bytes"] - one["shared_bytes"]["again"]
    text = _paceline("show", "one", cwd=tmp_path).stdout
    assert "one (model_repository/one)" in text and "if nothing was shared" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "none.onnx"], "none.onnx: no such file"),
        (["compile", "x=."], "a directory; name the ONNX file in it"),
        (["compile", "x.onnx", "x=x.onnx"], "two models are called 'x'"),
        (["compile", "x.onnx", "--shape", "ids"], "--shape: must be INPUT=D,D,..."),
        (["compile", "a/b=x.onnx"], "'a/b' is no name of a model"),
        (["compile", "x.onnx", "--fuse", "a b"], "'a b' is no name of a model"),
        (["compile", "x.onnx"], "x.onnx: not an ONNX file"),
        (["show", "x.onnx"], "run `paceline blocks compile x.onnx`, then `paceline blocks show x`"),
        (["show", "nobody"], "no model 'nobody' in model_repository"),
        (["show"], "model_repository: no such directory"),
        (["show", "."], "no model compiled into blocks is here"),
        (["show", ".", "--format", "xml"], "--format: must be text or json"),
        (["suggest", "--chains", "none.yaml"], "none.yaml"),
        (["suggest"], "--chains: give --chains, or the --state-dir of a server"),
        (["suggest", "--state-dir", "."], "paceline.sqlite3: no such file"),
        (["suggest", "--chains", "c.yaml", "--server", "x:1", "--state-dir", "."], "is enough"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"x")
    done = _paceline(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.endswith("reading x.onnx")]
    assert len(errors) == 1 and said in errors[0], done.stderr
    assert not (tmp_path / "blocks").exists()


def test_a_length_that_cannot_be_guessed_can_be_given(tmp_path: Path) -> None:
    """Only 300 columns fit, which the graph does not say: --shape does."""
    source = wide_mlp("mlp", width=300, layers=1).write(tmp_path)
    model = onnx.load(source, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "S"
    source.write_bytes(model.SerializeToString())
    for options, measured in ((Options(), False), (Options(shapes={"x": (1, 300)}), True)):
        made = compile_model({"": source}, tmp_path / "repo" / "mlp", tmp_path / "pool", options)
        (member,) = made.model.manifest.members
        assert member.batching is measured
        assert all(bool(block.execute_s) is measured for block in member.blocks)
        assert any("give --shape" in note for note in member.notes) is not measured


def test_sharing_counts_every_object_once(tmp_path: Path) -> None:
    """Three models of one backbone: total, once and own bytes add up."""
    for seed in range(3):
        source = conv(f"m{seed}", head_seed=seed).write(tmp_path)
        directory = tmp_path / "repo" / source.stem
        compile_model({"": source}, directory, tmp_path / "pool", Options(measure=False))
    shown = show.sharing(find_compiled([tmp_path / "repo", tmp_path / "repo" / "m0"]))
    assert list(shown.models) == ["m0", "m1", "m2"]
    backbone = shown.shared_bytes("m0", "m1")
    heads = [shown.own_bytes(name) for name in shown.models]
    assert backbone > 3 * MIB
    assert shown.once_bytes == backbone + sum(heads)
    assert shown.total_bytes == 3 * backbone + sum(heads)


CHAIN = """
chain: shop
slo_ms: 500
inputs:
  photo: {dtype: FP32, shape: [3, 32, 32]}
modules:
  embed:    {model: embedder, inputs: {x: inputs.photo}}
  rank:     {model: ranker, inputs: {x: embed.y}}
  detect:   {model: detector, inputs: {x: inputs.photo}}
  classify: {model: classifier, for_each: detect.crops, inputs: {x: detect.crops}}
  read:     {model: reader, for_each: detect.crops, inputs: {x: detect.crops}}
  rare:     {model: special, when: rank.sure, inputs: {x: embed.y}}
outputs:
  label: classify.label
  text: read.text
  rank: rank.y
  special: rare.y
"""


def _chain(text: str = CHAIN) -> Chain:
    return parse_chain(text, name="shop.yaml")


def _suggest(profiles: Profiles | None = None, **weights: Weights) -> list[Suggestion]:
    names = ("embedder", "ranker", "detector", "classifier", "reader", "special")
    known = {name: Weights({name: 10 * MIB}) for name in names} | weights
    return suggest([_chain()], known, profiles)


def test_groups_are_what_the_same_requests_always_need() -> None:
    """Connected modules without condition, and those over the same items; nothing else."""
    found = [(relation, [m.name for m in part]) for relation, part in groups(_chain())]
    assert found == [
        ("in sequence", ["embed", "rank"]),
        ("on the same items", ["classify", "read"]),
    ]


def test_what_shares_more_is_suggested_first() -> None:
    shared = {"common": 30 * MIB}
    first, second = _suggest(
        classifier=Weights({**shared, "a": 2 * MIB}), reader=Weights({**shared, "b": 3 * MIB})
    )
    assert first.models == ("classifier", "reader")
    assert (first.weights_bytes, first.shared_bytes) == (65 * MIB, 30 * MIB)
    assert second.models == ("embedder", "ranker") and second.shared_bytes == 0
    assert "65.0 MiB of weights, 30.0 MiB of them once" in str(first)


def test_a_model_that_is_not_onnx_is_left_out_with_the_reason() -> None:
    """Of two nothing is left to fuse, and that is said."""
    *_, last = _suggest(ranker=Weights({}, "ranker is no ONNX model"))
    assert not last.possible
    assert str(last).endswith("in sequence, but ranker is no ONNX model")


def test_unlike_batch_sizes_are_warned_of() -> None:
    """One is at its best alone, the other by the 32."""
    rows = [ProfileRow("embedder", "cpu", size, 0.1 * size**1.2) for size in (1, 8, 32)]
    rows += [ProfileRow("ranker", "cpu", size, 0.1 + 0.001 * size) for size in (1, 8, 32)]
    (note,) = _suggest(Profiles(tuple(rows)))[0].notes + _suggest(Profiles(tuple(rows)))[1].notes
    assert "embedder in batches of 1, ranker in batches of 32" in note


def test_python_models_can_be_in_a_group_that_is_wired() -> None:
    """And are an obstacle where the chain cannot be followed."""
    python = Weights({}, "ranker is no ONNX model", hosted=True)
    found = next(s for s in _suggest(ranker=python) if "ranker" in s.models)
    assert found.possible and found.wired and not found.notes
    assert "paceline blocks compile --chain FILE embed rank --fuse NAME" in str(found)
    python = Weights({}, "special is no ONNX model", hosted=True)
    observed = Observed({"shop": 1.0}, {("shop", "rare"): 1.0})
    known = {name: Weights({name: MIB}) for name in ("embedder", "ranker", "detector")}
    known |= {"classifier": Weights({}), "reader": Weights({}), "special": python}
    found = next(
        s for s in suggest([_chain()], known, None, observed) if s.relation.startswith("nearly")
    )
    assert found.models == ("embedder", "ranker") and not found.wired
    assert "special is no ONNX model" in found.notes


def test_what_is_observed_ranks_and_warns() -> None:
    """Groups by the calls a second that fusing saves; a model that others use more is told."""
    observed = Observed(
        {"shop": 2.0},
        {("shop", "classify"): 5.0, ("shop", "read"): 5.0, ("shop", "rare"): 0.95},
        {"ranker": 10.0, "embedder": 2.0},
    )
    assert ("nearly always together", ["embed", "rank", "rare"]) in [
        (relation, [m.name for m in part]) for relation, part in groups(_chain(), observed)
    ]
    names = ("embedder", "ranker", "detector", "classifier", "reader", "special")
    weights = {name: Weights({name: MIB}) for name in names}
    first, second, third = suggest([_chain()], weights, None, observed)
    assert first.models == ("classifier", "reader")
    assert (first.rate_rps, first.saved_calls_rps) == (10.0, 10.0)
    assert "observed 10/s: 10 calls/s less" in str(first)
    assert second.models == ("embedder", "ranker") and second.saved_calls_rps == 2.0
    assert second.notes == ("80 % of the rows of ranker are of other chains or of its own name",)
    assert third.relation == "nearly always together" and not third.wired
    (unseen, *_) = suggest([_chain()], weights, None, Observed())
    assert "no request of this chain was observed" in unseen.notes


def test_what_a_server_says_is_read_as_rates() -> None:
    status = {
        "uptime_s": 50.0,
        "chains": [
            {"chain": "shop", "met": 90, "missed": 10},
            {"chain": "idle", "met": 0, "missed": 0},
        ],
        "replanning": {"traffic": [{"chain": "shop", "fan_outs": {"read": 2.5}}]},
    }
    observed = from_documents(status, {"shop": 100, "idle": 0, "reader": 500})
    assert observed == Observed({"shop": 2.0}, {("shop", "read"): 2.5}, {"reader": 10.0})
    assert observed.model_rps("reader", [_chain()]) == 10.0


def test_what_a_server_kept_is_read_and_left_alone(tmp_path: Path) -> None:
    """Chains that were applied over the API are there too; one state serves many looks."""
    state, chain = State(tmp_path), _chain()
    fan_outs = {(chain.name, module.name): 1.0 for module in chain.modules}
    state.keep_traffic(Traffic({"shop": 4.0}, fan_outs | {("shop", "rare"): 0.25}), [chain])
    for _ in range(2):
        chains, observed = from_state(tmp_path)
        assert [found.name for found in chains] == ["shop"]
        assert observed.rates_rps == {"shop": 4.0} and observed.fan_outs["shop", "rare"] == 0.25
    state.close()
    (tmp_path / "paceline.sqlite3").write_bytes(b"x" * 4096)
    with pytest.raises(ConfigError, match="not a database"):
        from_state(tmp_path)


def test_another_chain_that_needs_a_part_only_is_named() -> None:
    other = _chain(CHAIN.replace("chain: shop", "chain: mini").replace("ranker", "sorter"))
    known: dict[str, Any] = {
        name: Weights({name: MIB})
        for name in ["embedder", "ranker", "sorter", "detector", "classifier", "reader", "special"]
    }
    notes = [note for found in suggest([_chain(), other], known) for note in found.notes]
    assert "chain mini uses only embedder of them" in notes


def test_weights_are_found_by_content_compiled_or_not(tmp_path: Path) -> None:
    """Two ONNX models of one backbone in a repository, as Triton's backend has them."""
    repository = tmp_path / "repo"
    for seed in range(2):
        version = repository / f"m{seed}" / "1"
        source = conv("model", head_seed=seed).write(version)
        (version.parent / "config.pbtxt").write_text('backend: "onnxruntime"')
        assert source == version / "model.onnx"
    first, second = (weights_of(f"m{seed}", [repository]) for seed in range(2))
    shared = sum(first.objects[name] for name in first.objects.keys() & second.objects.keys())
    assert 0 < first.total_bytes - shared <= 1024 * 100 * 4 + 4096

    shutil.rmtree(repository / "m1")
    written(tmp_path, "conv")
    compile_model(
        {"": tmp_path / "conv.onnx"}, repository / "m1", tmp_path / "pool", Options(measure=False)
    )
    assert weights_of("m1", [repository]).total_bytes > 3 * MIB
