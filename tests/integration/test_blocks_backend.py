"""The backend `paceline_blocks` on a real Triton: right outputs within a budget, clear errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest
import pytest_asyncio
from tests.integration.blocks_models import (
    VOCABULARY,
    WIDTH,
    compiled,
    write_argmax,
    write_embedding,
    write_mlp,
)

from paceline.blocks.backend.ledger import Ledger
from paceline.blocks.backend.manifest import ObjectStore
from paceline.blocks.repository import compiled_model
from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

LAYERS = 24
SHARED = {"shared_budget_mib": "7", "budget_group": "pair"}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks-ledger") / "table"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in a pool of their own: six blocks of 1 MiB each, a table, and two that are fused."""
    root = tmp_path_factory.mktemp("blocks")
    repository = root / "models"
    mlp = write_mlp(root / "mlp.onnx", layers=LAYERS)
    other = write_mlp(root / "other.onnx", layers=LAYERS, seed=5)
    table = write_embedding(root / "table.onnx")
    compiled(repository, "whole", {"": mlp})
    compiled(repository, "swapped", {"": mlp}, parameters={"memory_budget_mib": "3"})
    compiled(repository, "tight", {"": mlp}, parameters={"memory_budget_mib": "0.9"})
    compiled(repository, "table", {"": table}, parameters={"memory_budget_mib": "1"})
    compiled(repository, "fused", {"mlp": other, "table": table})
    compiled(repository, "aliased", {"whole": other, "embedding": table})
    for name in ("first", "second"):
        compiled(repository, name, {"": mlp if name == "first" else other}, parameters=SHARED)
    compiled(repository, "third", {"": mlp}, parameters={**SHARED, "shared_budget_mib": "2"})
    compiled(repository, "argmax", {"": write_argmax(root / "argmax.onnx")})
    compiled(repository, "unknown", {"": mlp}, parameters={"memory_budget": "3"})
    return repository


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton(
    repository: Path, ledger: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalTriton]:
    """Whose backend keeps its ledger away from those of others; it is gone in the end."""
    before = os.environ.get("PACELINE_BLOCKS_LEDGER")
    os.environ["PACELINE_BLOCKS_LEDGER"] = str(ledger)
    settings = LocalTritonSettings(
        state_directory=tmp_path_factory.mktemp("triton"),
        model_repositories=(repository,),
        stop_timeout_s=0.5,
    )
    try:
        async with LocalTriton(settings) as local:
            yield local
    finally:
        del os.environ["PACELINE_BLOCKS_LEDGER"]
        if before is not None:
            os.environ["PACELINE_BLOCKS_LEDGER"] = before


@pytest_asyncio.fixture(loop_scope="module")
async def models(triton: LocalTriton, repository: Path) -> AsyncIterator[TritonRepository]:
    """What a test loads is unloaded behind it."""
    client = await TritonClient.connect(triton.url, name="m1")
    yield TritonRepository(client, (repository,))
    served = TritonRepository(client, (repository,))
    loaded = {state.name for state in await served.index() if state.state == "READY"}
    await asyncio.gather(*(served.unload(name) for name in sorted(loaded)))
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
    result: np.ndarray[Any, Any] = ort.InferenceSession(repository.parent / f"{name}.onnx").run(
        None, feed
    )[0]
    return result


async def test_outputs_are_those_of_the_model_with_and_without_a_budget(
    models: TritonRepository, repository: Path
) -> None:
    """Bit for bit the same at every budget, and plain ONNX Runtime's within rounding."""
    await asyncio.gather(*(models.load(name, instances=1) for name in ("whole", "swapped")))
    for rows in (1, 3, 8):
        x = batch(rows, seed=rows)
        (whole,) = await infer(models, "whole", {"x": x})
        np.testing.assert_allclose(whole, plain(repository, "mlp", {"x": x}), rtol=1e-4, atol=1e-6)
        for _ in range(2):
            (swapped,) = await infer(models, "swapped", {"x": x})
            np.testing.assert_array_equal(swapped, whole)


async def test_concurrent_requests_get_their_own_rows(models: TritonRepository) -> None:
    await models.load("swapped", instances=2)
    singles = [await infer(models, "swapped", {"x": batch(1, seed)}) for seed in range(6)]
    answers = await asyncio.gather(
        *(infer(models, "swapped", {"x": batch(1 + seed % 2, seed)}) for seed in range(6))
    )
    for (single,), (answer,) in zip(singles, answers, strict=True):
        np.testing.assert_allclose(answer[:1], single, rtol=1e-5, atol=1e-6)


async def test_a_scalar_a_row_has_an_axis_in_triton(models: TritonRepository) -> None:
    """Triton has no empty shapes; the backend adds and drops the axis."""
    await models.load("argmax", instances=1)
    x = batch(3)
    call = ModelCall("argmax", (BatchTensor("x", "FP32", x.shape, (x.tobytes(),)),), ("y",))
    (got,) = await models.client.execute(call, timeout_s=30)
    assert got.shape == (3, 1)
    assert np.frombuffer(got.data, np.int64).tolist() == x.argmax(axis=1).tolist()


async def test_a_table_is_paged_in_row_by_row(models: TritonRepository, repository: Path) -> None:
    """Its 2 MiB need not fit the budget of 1 MiB."""
    await models.load("table", instances=1)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (8, 4))
    (got,) = await infer(models, "table", {"ids": ids})
    np.testing.assert_allclose(got, plain(repository, "table", {"ids": ids}), rtol=1e-4, atol=1e-4)


async def test_a_fused_model_computes_the_members_that_are_asked_for(
    models: TritonRepository, repository: Path
) -> None:
    await models.load("fused", instances=1)
    x, ids = batch(2), np.arange(8).reshape(2, 4)
    expected = plain(repository, "other", {"x": x}), plain(repository, "table", {"ids": ids})
    (mlp,) = await infer(models, "fused", {"mlp/x": x}, ("mlp/y",))
    both = await infer(models, "fused", {"table/ids": ids, "mlp/x": x}, ("mlp/y", "table/y"))
    for got, wanted in zip([mlp, *both], [expected[0], *expected], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="lacks the input of member 'table' table/ids") as failed:
        await infer(models, "fused", {"mlp/x": x}, ("table/y",))
    assert failed.value.kind is ErrorKind.INVALID


async def test_a_member_is_called_by_its_own_name_too(
    models: TritonRepository, repository: Path
) -> None:
    """As before it was fused; the fused model is loaded with it. A name that is taken stays."""
    assert "embedding" in models.names() and models.declaration("table").inputs[0].name == "ids"
    await models.load("embedding", instances=1)
    ids = np.arange(8).reshape(2, 4)
    (got,) = await infer(models, "embedding", {"ids": ids})
    wanted = plain(repository, "table", {"ids": ids})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


async def test_models_that_share_a_budget_divide_it_by_their_load(
    models: TritonRepository, ledger: Path
) -> None:
    """Neither is ever wrong, and the budget is kept, while it moves from one to the other."""
    await asyncio.gather(*(models.load(name, instances=1) for name in ("first", "second")))
    mine = Ledger("test", directory=ledger)
    expected = {name: await infer(models, name, {"x": batch(1)}) for name in ("first", "second")}

    async def served(name: str) -> None:
        (got,) = await infer(models, name, {"x": batch(1)})
        np.testing.assert_array_equal(got, expected[name][0])

    try:
        for busy, quiet in (("first", "second"), ("second", "first")):
            most = 0
            async with asyncio.timeout(30):
                while most < 5 * 2**20:  # of 7: the quiet one keeps its floor
                    await asyncio.gather(*(served(busy) for _ in range(4)))
                    rows = [row for row in mine.rows().values() if row.group == "pair"]
                    assert sum(row.limit_bytes for row in rows) <= 7 * 2**20
                    most = max(row.limit_bytes for row in rows if row.claim is not None)
                    loads = [row.claim.rate_rps for row in rows if row.claim is not None]
                    if rows[loads.index(max(loads))].limit_bytes != most:
                        most = 0  # it is still the quiet one's
            await served(quiet)
        with pytest.raises(ResidencyError, match="is 2 here and 7 in another model"):
            await models.load("third", instances=1)
    finally:
        mine.close()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tight", r"memory_budget_mib 0.9 is below 1.0, what its largest block needs; raise it"),
        ("unknown", r"parameter memory_budget is unknown; known are manifest, pool"),
    ],
)
async def test_what_cannot_be_is_a_load_error_that_says_what_to_change(
    models: TritonRepository, model: str, said: str
) -> None:
    with pytest.raises(ResidencyError, match=said):
        await models.load(model, instances=1)


def weights_of(repository: Path, model: str) -> list[Path]:
    found = compiled_model(repository / model)
    assert found is not None
    store = ObjectStore(found.pool)
    blocks = found.manifest.members[0].blocks
    return [store.path(weight.object) for block in blocks for weight in block.weights]


@dataclass
class Damaged:
    """A model, and an object of it that no other model uses."""

    path: Path
    right: bytes

    def write(self, text: bytes) -> None:
        """With the modification time that it had."""
        status = self.path.stat()
        self.path.chmod(0o644)
        self.path.write_bytes(text)
        os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def remove(self) -> None:
        self.path.unlink()


@pytest.fixture
def damaged(repository: Path) -> Iterator[Damaged]:
    onnx = write_mlp(repository.parent / "damaged.onnx", layers=4, seed=77)
    compiled(repository, "damaged", {"": onnx}, budget_mib=None)
    path = weights_of(repository, "damaged")[-1]
    right = path.read_bytes()
    yield Damaged(path, right)
    path.write_bytes(right)


async def test_bytes_that_were_altered_are_never_computed_with(
    models: TritonRepository, damaged: Damaged
) -> None:
    """And the model heals with its pool."""
    damaged.write(damaged.right[:-1] + bytes([damaged.right[-1] ^ 1]))
    await models.load("damaged", instances=1)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"altered \(its hash is another\)"):
            await infer(models, "damaged", {"x": batch(1)})
    damaged.write(damaged.right)
    async with asyncio.timeout(30):
        while True:
            try:
                await infer(models, "damaged", {"x": batch(1)})
                break
            except BackendError:
                await asyncio.sleep(0.1)


async def test_truncated_and_missing_objects_are_load_errors(
    models: TritonRepository, damaged: Damaged
) -> None:
    size = len(damaged.right)
    damaged.write(damaged.right[:-4096])
    with pytest.raises(ResidencyError, match=rf"{size - 4096} bytes instead of {size}"):
        await models.load("damaged", instances=1)
    damaged.remove()
    with pytest.raises(ResidencyError, match=rf"{damaged.path.name}: missing; compile the model"):
        await models.load("damaged", instances=1)


async def test_a_stub_killed_in_a_swap_disturbs_nobody_and_leaves_nothing(
    models: TritonRepository, triton: LocalTriton, ledger: Path
) -> None:
    """The other one gets its share of the budget, the ledger forgets it, and it can come back."""
    await asyncio.gather(*(models.load(name, instances=1) for name in ("first", "second")))
    (expected,) = await infer(models, "second", {"x": batch(1)})
    assert triton.pid is not None
    stubs = psutil.Process(triton.pid).children(recursive=True)
    (victim,) = [stub for stub in stubs if any("first" in word for word in stub.cmdline())]
    running = [asyncio.create_task(infer(models, "first", {"x": batch(8, i)})) for i in range(3)]
    await asyncio.sleep(0.02)
    victim.kill()
    answers = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(answer, list | BackendError) for answer in answers)
    mine = Ledger("test", directory=ledger)
    try:
        async with asyncio.timeout(30):
            while True:
                (got,) = await infer(models, "second", {"x": batch(1)})
                np.testing.assert_array_equal(got, expected)
                rows = [row for row in mine.rows().values() if row.group == "pair"]
                if [row.limit_bytes for row in rows] == [6 * 2**20 + 1]:
                    break  # all it can use
    finally:
        mine.close()
    await models.repair("first", instances=1)
    assert len(await infer(models, "first", {"x": batch(2)})) == 1
