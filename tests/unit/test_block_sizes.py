"""What the memory ledger is told of blocks models: from their manifests, here or in a store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.http_stores import StoreHandler, answering
from tests.integration.blocks_models import elsewhere
from tests.unit.test_blocks_model import LAYERS, OBJECT_BYTES, RemotePool, pool, repository

from paceline.block_sizes import MOST, blocks_of, fetch_manifest, kept_blocks
from paceline.blocks.backend import ahead, store
from paceline.blocks.repository import compiled_model
from paceline.database import Measurements
from paceline.residency.ledger import Footprint, Ledger
from paceline.triton.client import TritonClient
from paceline.triton.config import read_config
from paceline.triton.memory import PROCESS_BYTES, ProcessMemory
from paceline.triton.repository import TritonRepository

__all__ = ["pool", "repository"]


@pytest.fixture
def remote(
    repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The two models of one backbone in the store: they share a cache, which is empty."""
    monkeypatch.setattr(store, "FIRST_PAUSE_S", 0.001)
    models = tmp_path / "models"
    for name in ("mlp", "sibling"):
        elsewhere(repository / name, models / name, pool.url, tmp_path / "cache")
        assert blocks_of(models / name) == {}, "nothing is on this machine"
    return models


def both(first: Mapping[str, int], second: Mapping[str, int]) -> int:
    """Bytes of what two models share."""
    return sum(size for block, size in first.items() if block in second)


def by_digest(blocks: Mapping[str, int]) -> dict[str, int]:
    return {Path(block).name: size for block, size in blocks.items()}


def test_models_of_one_backbone_share_all_blocks_but_those_of_their_heads(
    repository: Path,
) -> None:
    mlp, sibling = (blocks_of(repository / name) for name in ("mlp", "sibling"))
    assert all(Path(block).stat().st_size == size for block, size in mlp.items())
    assert both(mlp, sibling) == (LAYERS - 1) * OBJECT_BYTES
    assert sum(mlp.values()) == sum(sibling.values()) == LAYERS * OBJECT_BYTES
    ledger = Ledger()
    for operation, blocks in enumerate((mlp, sibling)):
        ledger.begin_load(str(operation), Footprint(10, blocks), 1, operation, 0.0)
    assert ledger.used_bytes == 20 + (LAYERS + 1) * OBJECT_BYTES


async def test_a_manifest_comes_from_the_store_and_is_then_in_the_models_cache(
    repository: Path, remote: Path, pool: RemotePool, tmp_path: Path
) -> None:
    for name in ("mlp", "sibling"):
        await fetch_manifest(remote / name)
        assert by_digest(blocks_of(remote / name)) == by_digest(blocks_of(repository / name))
    shared_bytes = both(blocks_of(remote / "mlp"), blocks_of(remote / "sibling"))
    assert shared_bytes == (LAYERS - 1) * OBJECT_BYTES
    assert len(pool.sent) == 2 and pool.sent_bytes() == 0, "nothing else comes"
    await fetch_manifest(remote / "mlp")
    assert len(pool.sent) == 2, "it is there"
    assert len([*(tmp_path / "cache" / "manifests").iterdir()]) == 2
    assert not [*(tmp_path / "cache" / "tmp" / "fetch").iterdir()]


def test_a_manifest_that_a_load_fetched_is_read_from_the_cache(
    remote: Path, pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "table"))
    settings = kept_blocks(remote / "mlp", read_config(remote / "mlp"))
    assert settings is not None
    ahead.fetch("mlp", settings)
    sent = len(pool.sent)
    blocks = blocks_of(remote / "mlp")
    assert sum(blocks.values()) == LAYERS * OBJECT_BYTES
    assert all(Path(block).stat().st_size == size for block, size in blocks.items())
    assert len(pool.sent) == sent


async def test_files_of_one_content_in_two_caches_are_not_shared(
    repository: Path, remote: Path, pool: RemotePool, tmp_path: Path
) -> None:
    elsewhere(repository / "mlp", remote / "another", pool.url, tmp_path / "other")
    for name in ("mlp", "another"):
        await fetch_manifest(remote / name)
    mlp, another = blocks_of(remote / "mlp"), blocks_of(remote / "another")
    assert by_digest(mlp) == by_digest(another) and both(mlp, another) == 0


async def test_a_store_that_is_down_costs_nothing_but_the_knowledge_until_it_is_back(
    remote: Path, pool: RemotePool
) -> None:
    pool.broken = store.ATTEMPTS
    await fetch_manifest(remote / "mlp")
    assert blocks_of(remote / "mlp") == {}
    assert [path for path, _ in pool.sent] == [pool.sent[0][0]] * store.ATTEMPTS
    await fetch_manifest(remote / "mlp")
    assert blocks_of(remote / "mlp")


async def test_a_manifest_with_other_bytes_is_not_believed(
    remote: Path, pool: RemotePool, tmp_path: Path
) -> None:
    found = compiled_model(pool.root.parent / "models" / "sibling")
    assert found is not None
    pool.root = tmp_path / "wrong"
    (pool.root / "manifests").mkdir(parents=True)
    right = (found.pool / "manifests" / f"{found.digest}.json").read_bytes()
    wrong = pool.root / "manifests" / f"{found.digest}.json"
    wrong.write_bytes(right.replace(b'"model"', b'"Model"'))
    await fetch_manifest(remote / "sibling")
    assert pool.sent == [(f"/manifests/{wrong.name}", len(right))]
    assert blocks_of(remote / "sibling") == {}
    cached = tmp_path / "cache" / "manifests" / wrong.name
    assert not cached.exists()
    cached.write_bytes(wrong.read_bytes())
    assert blocks_of(remote / "sibling") == {}, "nor one that is in the cache"


async def test_stores_that_hang_hold_up_a_few_manifests_and_nobody_else(
    repository: Path, remote: Path, tmp_path: Path
) -> None:
    asked, over = threading.Semaphore(0), threading.Event()

    class Hanging(StoreHandler):
        def do_GET(self) -> None:
            asked.release()
            over.wait(30)
            self.send_error(404)  # which is not tried again

    with answering(Hanging) as url:
        names = [f"hanging{number}" for number in range(MOST)]
        for name in names:
            elsewhere(repository / "mlp", remote / name, url, tmp_path / "never")
        fetches = [asyncio.create_task(fetch_manifest(remote / name)) for name in names]
        for _ in names:
            assert await asyncio.to_thread(asked.acquire, timeout=30)
        await fetch_manifest(remote / "mlp")
        assert blocks_of(remote / "mlp") == {}, "it is left to the model's own process"
        over.set()
        await asyncio.gather(*fetches)
    await fetch_manifest(remote / "mlp")
    assert blocks_of(remote / "mlp")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("paceline_blocks", "onnxruntime"),
        ('key: "manifest"', 'key: "memory_budget_mib" value { string_value: "3" } }\n'
         'parameters { key: "manifest"'),
        ('key: "manifest"', 'key: "budget" value { string_value: "3" } }\n'
         'parameters { key: "manifest"'),
        ("backend", "{"),
    ],
    ids=["of another backend", "swaps within a budget", "will not load", "not a configuration"],
)  # fmt: skip
async def test_these_have_no_blocks_for_good(
    remote: Path, pool: RemotePool, before: str, after: str
) -> None:
    config = remote / "mlp" / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    assert before in text
    config.write_text(text.replace(before, after, 1), encoding="utf-8")
    await fetch_manifest(remote / "mlp")
    assert blocks_of(remote / "mlp") == {} and not pool.sent


async def test_a_size_that_had_the_blocks_in_it_is_not_taken_for_one_beside_them(
    remote: Path, tmp_path: Path
) -> None:
    """As it was measured before anybody knew of them."""
    client = TritonClient("127.0.0.1:1", name="m")
    models = TritonRepository(client, (remote,))
    sizes = Measurements(tmp_path)
    memory = ProcessMemory(models, sizes, lambda: None, blocks_of, fetch_manifest)
    memory.remember("mlp", 70 << 20, memory.blocks("mlp"))
    assert memory.guessed_bytes("mlp", memory.blocks("mlp")) == 70 << 20
    await memory.find_blocks("mlp")
    blocks = memory.blocks("mlp")
    assert blocks and memory.guessed_bytes("mlp", blocks) == PROCESS_BYTES
    memory.remember("mlp", 40 << 20, blocks)
    assert memory.guessed_bytes("mlp", blocks) == 40 << 20
    await client.close()
