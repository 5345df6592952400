"""A real Triton that serves blocks models, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from tests.integration.blocks_models import WIDTH

from paceline.blocks.backend.manifest import Block
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.repository import read_config
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository


@contextlib.asynccontextmanager
async def started(repository: Path, state: Path, ledger: Path) -> AsyncIterator[LocalTriton]:
    """Whose backend keeps its ledger away from those of others; it is gone in the end."""
    before = os.environ.get("PACELINE_BLOCKS_LEDGER")
    os.environ["PACELINE_BLOCKS_LEDGER"] = str(ledger)
    settings = LocalTritonSettings(
        state_directory=state, model_repositories=(repository,), stop_timeout_s=0.5
    )
    try:
        async with LocalTriton(settings) as local:
            yield local
    finally:
        del os.environ["PACELINE_BLOCKS_LEDGER"]
        if before is not None:
            os.environ["PACELINE_BLOCKS_LEDGER"] = before


@contextlib.asynccontextmanager
async def connected(triton: LocalTriton, repository: Path) -> AsyncIterator[TritonRepository]:
    """What is loaded through it is unloaded behind it."""
    client = await TritonClient.connect(triton.url, name="m1")
    models = TritonRepository(client, (repository,))
    yield models
    loaded = {state.name for state in await models.index() if state.state == "READY"}
    await asyncio.gather(*(models.unload(name) for name in sorted(loaded)))
    await client.close()


def batch(rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH), dtype=np.float32)


async def infer(
    models: TritonRepository,
    model: str,
    feed: Mapping[str, np.ndarray[Any, Any]],
    outputs: tuple[str, ...] = ("y",),
) -> list[np.ndarray[Any, Any]]:
    datatypes = {"float32": "FP32", "int64": "INT64"}
    inputs = tuple(
        BatchTensor(name, datatypes[array.dtype.name], array.shape, (array.tobytes(),))
        for name, array in feed.items()
    )
    got = await models.client.execute(ModelCall(model, inputs, outputs), timeout_s=30)
    return [np.frombuffer(tensor.data, np.float32).reshape(tensor.shape) for tensor in got]


def plain(repository: Path, name: str, feed: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What plain ONNX Runtime computes."""
    result: np.ndarray[Any, Any] = ort.InferenceSession(repository.parent / f"{name}.onnx").run(
        None, feed
    )[0]
    return result


def weights_of(repository: Path, model: str, member: int = 0) -> list[Path]:
    """Objects of the model's weights, in the order in which they are loaded."""
    store, blocks = _blocks_of(repository, model, member)
    return [store.path(weight.object) for block in blocks for weight in block.weights]


def graphs_of(repository: Path, model: str, member: int = 0) -> list[Path]:
    """Objects of the model's graphs, in the order of its blocks."""
    store, blocks = _blocks_of(repository, model, member)
    return [store.path(block.graph) for block in blocks]


def _blocks_of(repository: Path, model: str, member: int) -> tuple[ObjectStore, Sequence[Block]]:
    config = read_config(repository / model / "config.pbtxt")
    assert config is not None
    store = ObjectStore(repository.parent / "blocks")
    manifest = store.manifest(config.parameters["manifest"].string_value)
    return store, manifest.members[member].blocks


def stub_of(triton: LocalTriton, model: str) -> psutil.Process:
    """The process of a model with one instance; of one that was loaded again, the latest."""
    return max(stubs_of(triton, model), key=lambda one: one.create_time())


def stubs_of(triton: LocalTriton, model: str) -> list[psutil.Process]:
    """Processes of a model with one instance."""
    assert triton.pid is not None
    stubs = []
    for one in psutil.Process(triton.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is ending
            if f"{model}_0_0" in one.cmdline():
                stubs.append(one)
    return stubs


def ended(process: psutil.Process) -> bool:
    """A zombie has ended: it runs nothing and holds nothing, but its parent has not asked yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def mappers(directory: Path) -> list[int]:
    """Processes that have a file under this directory mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # gone, or going
        if f"{directory}/" in text:
            found.append(int(process.name))
    return found
