"""Blocks models on a real Triton when something breaks: errors are clear, outputs are right.

Pools that are damaged, stubs that are killed while they load or swap, a store that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import compiled, write_mlp
from tests.integration.blocks_triton import (
    batch,
    connected,
    ended,
    graphs_of,
    infer,
    mappers,
    plain,
    started,
    stub_of,
    stubs_of,
    weights_of,
)

from paceline.blocks.backend.ledger import Row, read_rows
from paceline.core.errors import BackendError, ResidencyError
from paceline.triton.launcher import LocalTriton
from paceline.triton.repository import TritonRepository

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

LAYERS = 24
SHARED = {"shared_budget_mib": "5", "budget_group": "pair"}
"""Less than the 6 MiB of one of the two models that share it: every run swaps."""


@dataclass
class Store:
    """The pool behind HTTP; requests for what is withheld wait until it is released."""

    root: Path
    url: str = ""
    withheld: frozenset[str] = frozenset()
    failing: bool = False
    """All is answered 503."""
    released: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    """Somebody asked for what is withheld."""

    def withhold(self, objects: Iterable[Path]) -> None:
        self.released.clear()
        self.waiting.clear()
        self.withheld = frozenset(path.name for path in objects)

    def release(self) -> None:
        self.withheld = frozenset()
        self.released.set()

    def read(self, path: str) -> bytes:
        name = path.rpartition("/")[2]
        if name in self.withheld:
            self.waiting.set()
            assert self.released.wait(60), f"{name} was never released"
        return (self.root / path.lstrip("/")).read_bytes()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    served = Store(tmp_path_factory.mktemp("blocks"))

    class Handler(StoreHandler):
        def do_GET(self) -> None:
            part = b"" if served.failing else self.part(served.read(f"/blocks{self.path}"))
            answered = 206 if "Range" in self.headers else 200
            try:
                self.send_response(503 if served.failing else answered)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)
            except OSError:
                self.close_connection = True  # whoever asked was killed

    with answering(Handler) as served.url:
        yield served
        served.release()


@pytest.fixture(scope="module")
def cache(store: Store) -> Path:
    """Where what comes from the store is kept."""
    return store.root / "cache"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks-ledger") / "table"


@pytest.fixture(scope="module")
def repository(store: Store, cache: Path) -> Path:
    """Two models that share a budget; from the store, one model and two that are fused."""
    root = store.root
    repository = root / "models"
    onnx = {
        name: write_mlp(root / f"{name}.onnx", layers=LAYERS, seed=seed)
        for seed, name in enumerate(("first", "second", "slow"))
    }
    fused = {
        name: write_mlp(root / f"{name}.onnx", layers=4, seed=seed, head_seed=seed)
        for seed, name in enumerate(("early", "late"), 3)
    }
    for name in ("first", "second"):
        compiled(repository, name, {"": onnx[name]}, parameters=SHARED)
    remote = {"pool": store.url, "cache": str(cache)}
    compiled(repository, "slow", {"": onnx["slow"]}, parameters=remote)
    compiled(repository, "fused", fused, parameters=remote)
    return repository


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton(
    repository: Path, ledger: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalTriton]:
    async with started(repository, tmp_path_factory.mktemp("triton"), ledger) as local:
        yield local


@pytest_asyncio.fixture(loop_scope="module")
async def models(
    triton: LocalTriton, repository: Path, store: Store
) -> AsyncIterator[TritonRepository]:
    """What a test loads is unloaded behind it, and what it withholds released."""
    async with connected(triton, repository) as connection:
        yield connection
        store.release()


async def becomes(condition: Callable[[], bool]) -> None:
    """Waits for what other processes do."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - no event tells of them
            await asyncio.sleep(0.01)


def rows_of(ledger: Path, process: psutil.Process) -> list[Row]:
    """What the machine's table has of a process, looked at without its lock."""
    return [row for row in read_rows(ledger).values() if row.pid == process.pid]


async def test_a_stub_killed_in_a_load_disturbs_nobody_and_leaves_nothing(
    models: TritonRepository,
    triton: LocalTriton,
    repository: Path,
    store: Store,
    cache: Path,
    ledger: Path,
) -> None:
    """Half of the weights are there, the store withholds the rest, a request waits for them."""
    await models.load("first", instances=1)
    x = batch(3)
    (expected,) = await infer(models, "first", {"x": x})
    store.withhold(weights_of(repository, "slow")[LAYERS // 2 :])
    await models.load("slow", instances=1)
    request = asyncio.create_task(infer(models, "slow", {"x": x}))
    assert await asyncio.to_thread(store.waiting.wait, 30)
    victim = stub_of(triton, "slow")
    await becomes(lambda: mappers(cache) == [victim.pid])
    assert rows_of(ledger, victim)

    victim.kill()
    with pytest.raises(BackendError, match="slow"):
        await request
    await becomes(partial(ended, victim))
    await becomes(lambda: mappers(cache) == [])
    assert rows_of(ledger, victim) == []
    for path in (cache / "objects").glob("[0-9a-f]" * 64):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    (got,) = await infer(models, "first", {"x": x})
    np.testing.assert_array_equal(got, expected)

    store.release()
    await models.repair("slow", instances=1)
    (got,) = await infer(models, "slow", {"x": x})
    np.testing.assert_allclose(got, plain(repository, "slow", {"x": x}), rtol=1e-4, atol=1e-6)
    await models.unload("slow")
    await becomes(lambda: list((cache / "tmp" / "fetch").iterdir()) == [])


async def test_a_stub_killed_in_a_swap_disturbs_nobody_and_leaves_nothing(
    models: TritonRepository, triton: LocalTriton, repository: Path, ledger: Path
) -> None:
    """Frozen while it holds a turn at the disk, then killed; the other one gets all the memory."""
    await asyncio.gather(*(models.load(name, instances=1) for name in ("first", "second")))
    (expected,) = await infer(models, "second", {"x": batch(1)})
    wanted = [await infer(models, "first", {"x": batch(8, seed)}) for seed in range(3)]
    victim = stub_of(triton, "first")

    async def keep_asking(seed: int) -> None:
        while True:
            (got,) = await infer(models, "first", {"x": batch(8, seed)})
            np.testing.assert_array_equal(got, wanted[seed][0])

    running = [asyncio.create_task(keep_asking(seed)) for seed in range(3)]
    async with asyncio.timeout(30):
        while True:
            victim.suspend()
            (row,) = rows_of(ledger, victim)
            if row.load.holding_since_s is not None:
                break
            victim.resume()
            await infer(models, "second", {"x": batch(1)})  # it runs meanwhile
    victim.kill()
    for ended_with in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(ended_with, BackendError), ended_with

    await becomes(partial(ended, victim))
    assert rows_of(ledger, victim) == []
    other = stub_of(triton, "second")
    await becomes(lambda: mappers(repository.parent / "blocks") == [other.pid])
    async with asyncio.timeout(30):
        while [row.limit_bytes for row in rows_of(ledger, other)] != [5 * 2**20]:
            (got,) = await infer(models, "second", {"x": batch(1)})
            np.testing.assert_array_equal(got, expected)
    await models.repair("first", instances=1)
    for seed in range(3):
        (got,) = await infer(models, "first", {"x": batch(8, seed)})
        np.testing.assert_array_equal(got, wanted[seed][0])


async def test_a_member_that_waits_for_its_weights_keeps_no_other_waiting(
    models: TritonRepository, repository: Path, store: Store
) -> None:
    """Requests for the other one come and go, each on a thread of its own, while it is busy."""
    store.withhold(weights_of(repository, "fused", member=1))
    await models.load("fused", instances=1)
    assert await asyncio.to_thread(store.waiting.wait, 30)
    x = batch(2)
    late = asyncio.create_task(infer(models, "fused", {"late/x": x}, ("late/y",)))
    for _ in range(10):
        (got,) = await infer(models, "fused", {"early/x": x}, ("early/y",))
        np.testing.assert_allclose(got, plain(repository, "early", {"x": x}), rtol=1e-4, atol=1e-6)
    assert not late.done()
    store.release()
    (got,) = await late
    np.testing.assert_allclose(got, plain(repository, "late", {"x": x}), rtol=1e-4, atol=1e-6)


@dataclass
class Damaged:
    """A model, and an object of it that no other model uses."""

    path: Path
    right: bytes

    @classmethod
    def of(cls, path: Path) -> Damaged:
        return cls(path, path.read_bytes())

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
    onnx = write_mlp(repository.parent / "damaged.onnx", layers=4, seed=77, head_seed=77)
    compiled(repository, "damaged", {"": onnx}, budget_mib=None)
    found = Damaged.of(weights_of(repository, "damaged")[-1])
    yield found
    found.path.write_bytes(found.right)


async def healed(models: TritonRepository, feed: Mapping[str, Any]) -> Any:
    """The first answer of `damaged`; errors may come before."""
    async with asyncio.timeout(30):
        while True:
            try:
                (got,) = await infer(models, "damaged", feed)
            except BackendError:
                await asyncio.sleep(0.05)
            else:
                return got


@contextlib.asynccontextmanager
async def undisturbed(models: TritonRepository) -> AsyncIterator[None]:
    """Another model, which swaps, gives the same bits all the time."""
    await models.load("first", instances=1)
    (expected,) = await infer(models, "first", {"x": batch(3)})
    answers = 0

    async def keep_asking() -> None:
        nonlocal answers
        while True:
            (got,) = await infer(models, "first", {"x": batch(3)})
            np.testing.assert_array_equal(got, expected)
            answers += 1

    async with asyncio.TaskGroup() as group:
        asking = group.create_task(keep_asking())
        yield
        await becomes(lambda: answers > 0)
        asking.cancel()


async def nothing_left(triton: LocalTriton, model: str, ledger: Path, pool: Path) -> None:
    """Of a load that failed: no process, no mapping, nothing accounted for."""
    await becomes(lambda: all(map(ended, stubs_of(triton, model))))
    alive = {stub_of(triton, "first").pid}
    await becomes(lambda: set(mappers(pool)) <= alive)
    assert {row.pid for row in read_rows(ledger).values()} == alive


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
    await healed(models, {"x": batch(1)})


async def test_objects_that_change_under_a_loaded_model_are_in_no_answer(
    models: TritonRepository, triton: LocalTriton, damaged: Damaged
) -> None:
    """Altered or cut short, its process lives on, and heals with them."""
    await models.load("damaged", instances=1)
    x = batch(1)
    (expected,) = await infer(models, "damaged", {"x": x})
    stub = stub_of(triton, "damaged")
    name, right = damaged.path.name, damaged.right
    async with undisturbed(models):
        for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:4096], b""):
            damaged.write(wrong)
            with pytest.raises(BackendError, match=f"'damaged': object {name}: its file changed"):
                await infer(models, "damaged", {"x": x})
            with pytest.raises(BackendError, match=f"{name}: (altered|its file changed)"):
                await infer(models, "damaged", {"x": x})
            damaged.write(right)
            np.testing.assert_array_equal(await healed(models, {"x": x}), expected)
    assert stub_of(triton, "damaged") == stub and not ended(stub)


@pytest.mark.parametrize("which", ["weights", "graph"])
async def test_truncated_and_missing_objects_are_load_errors(
    models: TritonRepository,
    triton: LocalTriton,
    repository: Path,
    ledger: Path,
    damaged: Damaged,
    which: str,
) -> None:
    if which == "graph":
        damaged = Damaged.of(graphs_of(repository, "damaged")[0])
    size = len(damaged.right)
    try:
        async with undisturbed(models):
            damaged.write(damaged.right[:-1])
            with pytest.raises(ResidencyError, match=rf"{size - 1} bytes instead of {size}"):
                await models.load("damaged", instances=1)
            await nothing_left(triton, "damaged", ledger, repository.parent / "blocks")
            damaged.remove()
            missing = rf"{damaged.path.name}: missing; compile the model"
            with pytest.raises(ResidencyError, match=missing):
                await models.load("damaged", instances=1)
            await nothing_left(triton, "damaged", ledger, repository.parent / "blocks")
    finally:
        damaged.path.write_bytes(damaged.right)


async def test_a_store_that_fails_is_a_load_error_and_disturbs_nobody(
    models: TritonRepository, triton: LocalTriton, repository: Path, store: Store, ledger: Path
) -> None:
    """And once it is back the model can be loaded."""
    cache = store.root / "other-cache"
    remote = {"pool": store.url, "cache": str(cache)}
    onnx = write_mlp(repository.parent / "unlucky.onnx", layers=4, seed=78)
    compiled(repository, "unlucky", {"": onnx}, parameters=remote)
    async with undisturbed(models):
        store.failing = True
        try:
            with pytest.raises(ResidencyError, match=r"manifests/.*: HTTP 503 .* in a row"):
                await models.load("unlucky", instances=1)
            await nothing_left(triton, "unlucky", ledger, cache)
            assert [path for path in cache.rglob("*") if path.is_file()] == [
                cache / "objects" / "external"
            ]
        finally:
            store.failing = False
        await models.load("unlucky", instances=1)
        x = batch(1)
        (got,) = await infer(models, "unlucky", {"x": x})
    np.testing.assert_allclose(got, plain(repository, "unlucky", {"x": x}), rtol=1e-4, atol=1e-6)
