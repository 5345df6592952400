"""The backend `paceline_blocks` on a real Triton: right outputs within a budget, clear errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.integration.blocks_models import (
    VOCABULARY,
    compiled,
    write_argmax,
    write_embedding,
    write_mlp,
)
from tests.integration.blocks_triton import batch, connected, infer, plain, started

from paceline.blocks.backend.ledger import Ledger
from paceline.core.errors import BackendError, ErrorKind, ResidencyError
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.launcher import LocalTriton
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
    async with started(repository, tmp_path_factory.mktemp("triton"), ledger) as local:
        yield local


@pytest_asyncio.fixture(loop_scope="module")
async def models(triton: LocalTriton, repository: Path) -> AsyncIterator[TritonRepository]:
    """What a test loads is unloaded behind it."""
    async with connected(triton, repository) as connection:
        yield connection


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
