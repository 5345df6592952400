"""Modules of a chain as one model: what may be one, how it is wired, what a request of it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.blocks_models import conv

from paceline.blocks.backend.batching import RequestError, rows_of
from paceline.blocks.backend.manifest import Member, PoolError, parse
from paceline.blocks.backend.wired import StepError, WiredModel
from paceline.blocks.backend.wiring import Wiring, parse_wiring
from paceline.blocks.compile import compile_model
from paceline.blocks.group import Group, group_of, read_group
from paceline.blocks.member import Options
from paceline.blocks.repository import compiled_model, read_config
from paceline.config import parse_chain
from paceline.core.chain import Chain
from paceline.core.errors import ConfigError

CHAIN = """
chain: shop
slo_ms: 500
inputs:
  photo: {dtype: FP32, shape: [3, 32, 32]}
  limit: {dtype: FP32, shape: [1]}
modules:
  scale:    {model: scaler, inputs: {photo: inputs.photo}}
  embed:    {model: embedder, inputs: {image: scale.image}}
  rank:     {model: ranker, inputs: {x: embed.head.y, limit: inputs.limit}}
  log:      {model: logger, inputs: {x: embed.head.y}}
  join:     {model: joiner, inputs: {a: rank.y, b: log.y}}
  rare:     {model: special, when: rank.sure, inputs: {x: rank.y}}
  maybe:    {model: special, on_error: skip, inputs: {x: rank.y}}
  each:     {model: reader, for_each: rank.y, inputs: {x: rank.y}}
  also:     {model: reader, for_each: rank.y, inputs: {x: each.y}}
outputs:
  rank: rank.y
  image: scale.image
  text: also.y
"""

CONFIG = 'max_batch_size: {batch} {inputs} {outputs} backend: "{backend}"'


def _chain(text: str = CHAIN) -> Chain:
    return parse_chain(text, name="shop.yaml")


def _declare(
    directory: Path, backend: str, batch: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> Path:
    """A model directory with this configuration and, of a Python model, code that does nothing."""
    version = directory / "1"
    version.mkdir(parents=True)

    def tensors(kind: str, given: Mapping[str, Any]) -> str:
        return " ".join(
            f'{kind} {{ name: "{n}" data_type: TYPE_FP32 dims: {list(d)} }}'
            for n, d in given.items()
        )

    text = CONFIG.format(
        batch=batch,
        backend=backend,
        inputs=tensors("input", inputs),
        outputs=tensors("output", outputs),
    )
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    if backend == "python":
        (version / "model.py").write_text("import steps\n", encoding="utf-8")
        (version / "steps.py").write_text(f"# {directory.name}\n", encoding="utf-8")
    return version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`scaler` and `ranker` in Python, `embedder` (a small conv net) between them."""
    root = tmp_path / "models"
    image = [3, 32, 32]
    _declare(root / "scaler", "python", 8, {"photo": image}, {"image": image, "size": [2]})
    version = _declare(root / "embedder", "onnxruntime", 4, {"image": image}, {"head.y": [100]})
    conv("model").write(version)
    _declare(root / "ranker", "python", 8, {"x": [100], "limit": [1]}, {"y": [-1], "sure": [1]})
    (root / "ranker" / "1" / "steps.py").write_text("# scaler\n", encoding="utf-8")
    return root


def _group(repository: Path, *asked: str) -> Group:
    chain = group_of(_chain(), ["scale", "embed", "rank"], asked, "front")
    return read_group(chain, [repository])


def test_a_group_takes_and_gives_what_the_rest_of_the_chain_needs() -> None:
    """Tensors keep their names: a chain's input, MODULE/TENSOR otherwise."""
    group = group_of(_chain(), ["rank", "embed"], ["rank.sure"], "middle")
    assert [module.name for module in group.modules] == ["embed", "rank"]
    assert [spec.name for spec in group.inputs] == ["scale/image", "limit"]
    assert {name: str(source) for name, source in group.outputs.items()} == {
        "embed/head.y": "embed.head.y",  # for log
        "rank/y": "rank.y",
        "rank/sure": "rank.sure",
    }
    items = group_of(_chain(), ["each", "also"], [], "items")
    assert [spec.name for spec in items.inputs] == ["rank/y"]
    assert list(items.outputs) == ["also/y"] and items.modules[0].for_each is None


@pytest.mark.parametrize(
    ("modules", "asked", "said"),
    [
        (["scale", "nobody"], [], "unknown module 'nobody'; chain shop has scale, embed"),
        (["scale"], [], "give two modules or more, each once"),
        (["scale", "scale"], [], "give two modules or more, each once"),
        (["rank", "each"], [], "a request runs rank once, each for each of rank.y"),
        (["rank", "rare"], [], "rare runs only `when: rank.sure`"),
        (["rank", "maybe"], [], "maybe may fail alone"),
        (["embed", "rank", "join"], [], r"log is between modules .*\(embed -> log -> join\)"),
        (["scale", "embed"], ["rank.y"], "'rank.y' is not of scale, embed"),
        (["scale", "embed"], ["y"], "'y' is not 'inputs.NAME' or 'MODULE.OUTPUT'"),
    ],
)
def test_what_cannot_be_one_model_is_refused(
    modules: list[str], asked: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        group_of(_chain(), modules, asked, "front")


def test_a_module_outside_that_nobody_inside_waits_for_is_in_nobodys_way() -> None:
    assert group_of(_chain(), ["embed", "rank", "log", "join"], ["join.y"], "all").outputs
    assert group_of(_chain(), ["rank", "join"], [], "end").outputs.keys() == {"rank/y", "rank/sure"}


@pytest.mark.parametrize(
    ("model", "old", "new", "said"),
    [
        ("scaler", "TYPE_FP32", "TYPE_FP16", "scale.image is FP16, but model 'embedder' takes"),
        ("scaler", "python", "identity", "backend 'identity' cannot be in a group"),
        (
            "scaler",
            "max_batch_size: 8",
            "model_transaction_policy { decoupled: true }",
            "decoupled",
        ),
        ("embedder", '"image"', '"picture"', "model 'embedder' has no input 'image'"),
        ("ranker", "max_batch_size: 8", "sequence_batching {}", "sequence batching"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    repository: Path, model: str, old: str, new: str, said: str
) -> None:
    config = repository / model / "config.pbtxt"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=said):
        _group(repository)


def test_two_members_with_a_module_of_one_name_are_refused(repository: Path) -> None:
    """In one process `import steps` means one file; the same bytes twice do no harm."""
    assert _group(repository).parts
    (repository / "ranker" / "1" / "steps.py").write_text("# another\n")
    with pytest.raises(ConfigError, match="scale and rank both import a 'steps' of their own"):
        _group(repository)


def test_a_mistake_is_told_before_anything_is_written(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(CHAIN)
    for arguments, said in (
        (["scale", "rare", "--fuse", "x"], "rare runs only"),
        (["scale", "embed"], "--chain: give --fuse NAME with it"),
        (["scale", "log", "--fuse", "x"], "embed is between modules"),
        (["rank", "log", "--fuse", "x"], "no model 'logger' (of module log) in models"),
        (["scale", "embed", "--fuse", "../x"], "'../x' is no name of a model"),
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "paceline", "blocks", "compile", "--chain", "shop.yaml"),
                *(*arguments, "--model-repository", "models", "--out", "out"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "shop.yaml"]


def test_a_compiled_group_is_one_model_that_says_what_it_takes(
    repository: Path, tmp_path: Path
) -> None:
    """Python files lie under a name that changes with them; what is unchanged is left alone."""
    directory = tmp_path / "out" / "front"
    options = Options(max_batch=32, measure=False)
    group = _group(repository, "scale.size")

    def compiled(group: Group) -> bool:
        made = compile_model(group.sources, directory, tmp_path / "blocks", options, group=group)
        return made.fresh

    assert compiled(group)
    config = read_config(directory / "config.pbtxt")
    assert config.max_batch_size == 4  # of the conv net
    assert {t.name: (list(t.dims), t.optional) for t in config.input} == {
        "photo": ([3, 32, 32], True),
        "limit": ([1], True),
        **{"scale/photo": ([3, 32, 32], True), "embed/image": ([3, 32, 32], True)},
        **{"rank/x": ([100], True), "rank/limit": ([1], True)},
    }
    assert {t.name for t in config.output} == {
        *("scale/image", "scale/size", "embed/head.y", "rank/y", "rank/sure")
    }
    (code,) = directory.glob("1/python-*")
    assert sorted(str(p.relative_to(code)) for p in code.rglob("*.py")) == [
        *("rank/1/model.py", "rank/1/steps.py", "scale/1/model.py", "scale/1/steps.py")
    ]
    own = read_config(tmp_path / "out" / "embedder" / "config.pbtxt")
    assert own.ensemble_scheduling.step[0].input_map == {"embed/image": "image"}
    assert not compiled(_group(repository, "scale.size"))

    (repository / "scaler" / "1" / "model.py").write_text("import steps  # new\n")
    assert compiled(_group(repository, "scale.size"))
    (fresh,) = directory.glob("1/python-*")
    assert fresh.name != code.name
    shutil.rmtree(fresh)
    assert compiled(_group(repository, "scale.size"))


def test_a_group_without_batches_asks_for_what_it_needs_alone(repository: Path) -> None:
    """One member that takes no batches is enough; members that do have no names of their own."""
    config = repository / "ranker" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 0"))
    wiring = _wiring(_group(repository))
    assert wiring.max_batch == 0
    assert _group(repository).own_names == {"rank": "ranker"}
    assert [port.name for port in wiring.own_inputs] == ["rank/x", "rank/limit"]


def _wiring(group: Group) -> Wiring:
    return parse_wiring(json.loads(json.dumps(group.as_json())), {"embed"})


class Blocks:
    """Stands for the networks: what they are asked, and an answer of zeros."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.asked: list[tuple[str, int]] = []
        self.closed = False

    def infer(
        self, member: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int = 1
    ) -> dict[str, Any]:
        (image,) = feed.values()
        assert image.shape == (rows, 3, 32, 32)
        self.asked.append((member, rows))
        return {name: np.full((rows, 100), image.sum(), np.float32) for name in outputs}

    def close(self) -> None:
        self.closed = True


class Hosted:
    """A Python model that gives what it is told to."""

    def __init__(self, **outputs: Any) -> None:
        self.outputs = outputs
        self.asked: list[tuple[dict[str, Any], list[str]]] = []

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        self.asked.append((dict(feed), list(outputs)))
        made = {name: self.outputs[name] for name in outputs if name in self.outputs}
        for value in made.values():
            if isinstance(value, Exception):
                raise value
        return made

    def close(self) -> None: ...


@pytest.fixture
def parts(repository: Path, tmp_path: Path) -> tuple[Wiring, Blocks]:
    """Compiled with a `ranker` that takes no batches."""
    config = repository / "ranker" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 0"))
    group, directory = _group(repository, "scale.size"), tmp_path / "out" / "front"
    compile_model(
        group.sources, directory, tmp_path / "blocks", Options(measure=False), group=group
    )
    found = compiled_model(directory)
    assert found is not None and found.manifest.wiring is not None
    return found.manifest.wiring, Blocks(found.manifest.members)


IMAGE = np.ones((3, 32, 32), np.float32)
LIMIT = np.ones(1, np.float32)


def test_arrays_go_from_member_to_member_as_they_are(parts: tuple[Wiring, Blocks]) -> None:
    """No copy in between, an axis of one for those that batch, none for those that do not."""
    wiring, blocks = parts
    scaled = np.full((1, 3, 32, 32), 2, np.float32)
    scale, rank = Hosted(image=scaled), Hosted(y=np.arange(5))
    model = WiredModel(wiring, blocks, {"scale": scale, "rank": rank})
    call = model.call(0, {"photo": IMAGE, "limit": LIMIT}, ["rank/y", "scale/image"])
    got = model.infer("", call.feed, call.outputs)
    assert got["rank/y"].tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(got["scale/image"], scaled)
    assert scale.asked[0][0]["photo"].shape == (1, 3, 32, 32) and scale.asked[0][1] == ["image"]
    assert np.shares_memory(scale.asked[0][0]["photo"], IMAGE)
    assert rank.asked[0][0]["x"].shape == (100,) and rank.asked[0][0]["x"][0] == 2 * 3 * 32 * 32
    assert blocks.asked == [("embed", 1)]


@pytest.mark.parametrize("batching", [True, False])
def test_a_group_without_batches_runs_a_member_once(
    parts: tuple[Wiring, Blocks], batching: bool
) -> None:
    """Whatever the length of the first axis, which is no batch's, of what the request brings."""
    wiring, blocks = parts
    blocks.members = [replace(member, batching=batching) for member in blocks.members]
    scale = Hosted(image=np.full((1, 3, 32, 32), 2, np.float32))
    model = WiredModel(wiring, blocks, {"scale": scale, "rank": Hosted(y=np.arange(5))})
    call = model.call(0, {"photo": IMAGE, "limit": LIMIT}, ["rank/y"])
    model.infer("", call.feed, call.outputs, rows_of(call))
    assert rows_of(call) == 3 and blocks.asked == [("embed", 1)]


def test_only_what_is_asked_for_is_computed(parts: tuple[Wiring, Blocks]) -> None:
    """And only the inputs that that takes have to be there; a member alone takes its own."""
    wiring, blocks = parts
    size = np.zeros((1, 2), np.float32)
    scale, rank = Hosted(size=size), Hosted(sure=np.ones(1))
    model = WiredModel(wiring, blocks, {"scale": scale, "rank": rank})
    call = model.call(0, {"photo": IMAGE}, ["scale/size"])
    assert model.infer("", call.feed, call.outputs)["scale/size"].shape == (2,)
    assert (len(scale.asked), blocks.asked, rank.asked) == (1, [], [])

    alone = {"rank/x": np.zeros(100), "rank/limit": LIMIT, "photo": IMAGE}
    call = model.call(0, alone, ["rank/sure"])
    assert set(call.feed) == {"rank/x", "rank/limit"}
    model.infer("", call.feed, call.outputs)
    assert (len(scale.asked), blocks.asked, len(rank.asked)) == (1, [], 1)
    with pytest.raises(RequestError, match="the request lacks the input photo, limit"):
        model.call(0, {}, ["rank/y"])


def test_a_member_that_fails_is_named(parts: tuple[Wiring, Blocks]) -> None:
    wiring, blocks = parts
    feed = {"photo": IMAGE, "limit": LIMIT}
    for wrong, kind, said in (
        (RequestError("too dark"), RequestError, r"member 'scale' \(scaler\): too dark"),
        (KeyError("x"), StepError, r"member 'scale' \(scaler\): 'x'"),
        (np.zeros((2, 3, 32, 32)), StepError, r"scale.*image \(2, 3, 32, 32\) has not one row"),
    ):
        model = WiredModel(wiring, blocks, {"scale": Hosted(image=wrong), "rank": Hosted()})
        with pytest.raises(kind, match=said):
            model.infer("", feed, ["rank/y"])
    good = Hosted(image=IMAGE[np.newaxis])
    model = WiredModel(wiring, blocks, {"scale": good, "rank": Hosted()})
    with pytest.raises(StepError, match=r"member 'rank' \(ranker\): gave no y"):
        model.infer("", feed, ["rank/y"])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("code",), "../python", "no name of a directory"),
        (("steps", 0, "module"), "..", "no name of a directory"),
        (("steps", 0, "version"), "1/../..", "no name of a directory"),
        (("steps", 0, "kind"), "exec", "kind is 'exec'"),
        (("steps", 1, "module"), "other", "step 'other' has no member"),
        (("steps", 2, "inputs", "x"), "log/y", "nothing gives 'log/y'"),
        (("outputs", 0, "name"), "log/y", "no step gives the output 'log/y'"),
    ],
)
def test_a_wiring_that_is_not_sound_is_refused(
    parts: tuple[Wiring, Blocks], tmp_path: Path, place: Sequence[Any], value: str, said: str
) -> None:
    found = compiled_model(tmp_path / "out" / "front")
    assert found is not None
    document = json.loads(json.dumps(found.manifest.document))
    at = document["wiring"]
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(PoolError, match=said):
        parse(json.dumps(document).encode(), "manifest")
