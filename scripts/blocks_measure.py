"""What the parts of `bench_blocks.py` share: models, pools, processes, memory, the page cache."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from scripts.make_models import make
from scripts.prepare_models import NETWORKS

from paceline.blocks import compile as compiler
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import Manifest, Member, Tensor
from paceline.blocks.backend.settings import MIB, read_settings
from paceline.blocks.compile import compile_model
from paceline.blocks.cut import Piece
from paceline.blocks.dividing import Try
from paceline.blocks.member import Options
from paceline.blocks.repository import compiled_model

SCRIPTS = Path(__file__).resolve().parent
ITEMS = {
    "ocr_detect": (1, 3, 736, 1472),
    "ocr_classify": (1, 3, 48, 192),
    "ocr_recognize": (1, 3, 48, 320),
}
"""A page, a line: what axes of unknown length are."""
RATIOS = (2.32, 3.5, 5.81)
"""Weights to budget."""
LATENCY, SIZE = CUTS = ("latency", "size")
"""What decides where a model is cut for a budget; by size it was before decision 0040."""
WARM_UP_RUNS = 4
"""Until the plan rests on what was measured."""


@dataclass(frozen=True)
class Budget:
    """A model compiled for a budget, and what that is made of."""

    directory: Path
    weights_mib: float
    activations_mib: float

    @property
    def mib(self) -> float:
        return self.weights_mib + self.activations_mib


class Bench:
    """Models and pools under one directory."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def onnx(self, model: str) -> Path:
        """One of make_models.py, or a network of the OCR example."""
        path = self.work / "onnx" / f"{model.replace('@', '_')}.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(exist_ok=True)
        if model in NETWORKS:
            wheel = importlib.util.find_spec("rapidocr_onnxruntime")
            assert wheel is not None and wheel.origin is not None, "run scripts/setup"
            shutil.copyfile(Path(wheel.origin).parent / "models" / NETWORKS[model], path)
            return path
        return make(model, path.parent)

    def compiled(self, model: str, budget_bytes: float | None = None, cuts: str = LATENCY) -> Path:
        """Its directory; compiled for a small budget, the blocks are smaller. `cuts`: of `CUTS`."""
        name, budget_mib = model.replace("@", "_"), None
        if budget_bytes is not None:
            # Of a budget the activations of batch 1 are not for blocks.
            beside_bytes = self.manifest(model).activation_bytes(1)
            budget_mib = ceil((budget_bytes + beside_bytes) / MIB)
            name = f"{name}_{budget_mib}" if cuts == LATENCY else f"{name}_{budget_mib}_{cuts}"
        directory = self.work / "models" / name
        shapes = {"x": ITEMS[model]} if model in ITEMS else {}
        options = Options(budget_mib=budget_mib, shapes=shapes)
        with nullcontext() if cuts == LATENCY else _cut_by_size():
            compile_model({"": self.onnx(model)}, directory, self.work / "blocks", options)
        return directory

    def uncompiled(self, model: str) -> Path:
        """Blocks of the graph as it came, in a pool of their own: what PISeL has to start from."""
        directory = self.work / "raw" / "models" / model
        level = ort.GraphOptimizationLevel
        best, level.ORT_ENABLE_ALL = level.ORT_ENABLE_ALL, level.ORT_DISABLE_ALL
        try:
            options = Options(measure=False, panels=False)
            compile_model({"": self.onnx(model)}, directory, self.work / "raw/blocks", options)
        finally:
            level.ORT_ENABLE_ALL = best
        return directory

    def budget(self, model: str, ratio: float, batch: int, cuts: str = LATENCY) -> Budget:
        """The weights' bytes by `ratio`, and what a batch's activations take beside them."""
        weights_bytes = self.manifest(model).weights_bytes / ratio
        return Budget(
            self.compiled(model, weights_bytes, cuts),
            weights_bytes / MIB,
            self.manifest(model, weights_bytes, cuts).activation_bytes(batch) / MIB,
        )

    def manifest(
        self, model: str, budget_bytes: float | None = None, cuts: str = LATENCY
    ) -> Manifest:
        found = compiled_model(self.compiled(model, budget_bytes, cuts))
        assert found is not None
        return found.manifest


@contextmanager
def _cut_by_size() -> Iterator[None]:
    def by_size(
        finest: object, blocks: Sequence[Piece], attempt: Try, **_: object
    ) -> tuple[Member, dict[str, Any]]:
        return attempt(blocks)[0], {}

    with mock.patch.object(compiler, "best_division", by_size):
        yield


def in_child(bench: Bench, group: Path | None = None, **job: Any) -> dict[str, Any]:
    """What the job returns; {} if it was killed in its cgroup."""
    command = [
        sys.executable,
        str(SCRIPTS / "bench_blocks.py"),
        "--work",
        str(bench.work),
        "child",
        json.dumps(job),
    ]
    if group is not None:
        command = [*entering(group), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if group is not None and done.returncode in (-9, 137):
        return {}
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def entering(group: Path) -> list[str]:
    """What runs the command after it in this cgroup."""
    return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(group)]


def open_model(directory: Path, **parameters: str) -> BlockModel:
    found = compiled_model(directory)
    assert found is not None
    texts = {"manifest": found.digest, "pool": str(found.pool), **parameters}
    given = {key: {"string_value": text} for key, text in texts.items()}
    return BlockModel.open(read_settings(given, directory)).start()


def feed_of(model: BlockModel, batch: int) -> dict[str, Any]:
    return {
        tensor.name: filled(tensor.name, tensor.dtype, item_of(model.manifest, batch, tensor))
        for tensor in model.members[0].inputs
    }


def item_of(manifest: Manifest, batch: int, tensor: Tensor) -> list[int]:
    """Its shape in a batch."""
    source = Path(manifest.document["sources"][0]["file"]).stem
    return [batch, *ITEMS.get(source, tensor.shape)[1:]]


def plain_session(onnx: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(onnx, options, ["CPUExecutionProvider"])


def plain_feed(session: ort.InferenceSession, model: str, batch: int = 1) -> dict[str, Any]:
    return {
        node.name: filled(node.name, node.type, [batch, *ITEMS.get(model, node.shape)[1:]])
        for node in session.get_inputs()
    }


def plain_names(model: BlockModel, feed: Mapping[str, Any]) -> dict[str, Any]:
    """By the ONNX file's names."""
    return {tensor.value: feed[tensor.name] for tensor in model.members[0].inputs}


def filled(name: str, kind: str, shape: Sequence[Any]) -> Any:
    random = np.random.default_rng(0)
    if "mask" in name:
        return np.ones(shape, np.int64)
    if "int64" in kind.lower():
        return random.integers(0, 30000, shape)
    return random.standard_normal(shape, dtype=np.float32)


def warm_up() -> None:
    """ONNX Runtime's own first use, which is not the model's."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.zeros(1, np.float32)})


def private_mib() -> float:
    """Memory that belongs to this process alone and cannot be dropped."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no such line")


def files_under(root: Path) -> Iterator[Path]:
    for part in ("onnx", "blocks/objects", "raw/blocks/objects", "fuse/blocks/objects"):
        yield from (path for path in (root / part).glob("*") if path.is_file())


def drop_page_cache(root: Path) -> None:
    for path in files_under(root):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_mib(*directories: Path) -> float:
    """Of all files in them, what is in the page cache."""
    from paceline.blocks.backend.mapping import MappedObject

    total = 0
    for path in (path for directory in directories for path in directory.iterdir()):
        if path.stat().st_size:
            mapped = MappedObject(path, path.stat().st_size)
            total += mapped.cached_bytes()
            mapped.close()
    return total / MIB
