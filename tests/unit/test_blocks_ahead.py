"""What a model's process is going to need is fetched before it is there."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_blocks_model import (
    LAYERS,
    OBJECT_BYTES,
    Open,
    RemotePool,
    check,
    opened,
    pool,
    repository,
)
from tritonclient.grpc.model_config_pb2 import ModelConfig

from paceline.block_fetches import BlockFetches
from paceline.blocks.backend import ahead, objects
from paceline.blocks.backend.ledger import Ledger
from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.settings import Settings, read_settings
from paceline.blocks.repository import compiled_model

__all__ = ["opened", "pool", "repository"]

TIMEOUT_S = 10.0


def parameters_of(repository: Path, name: str, url: str, cache: Path) -> dict[str, str]:
    found = compiled_model(repository / name)
    assert found is not None
    return {"manifest": found.digest, "pool": url, "cache": str(cache)}


def settings_of(repository: Path, name: str, url: str, cache: Path) -> Settings:
    texts = parameters_of(repository, name, url, cache)
    return read_settings({key: {"string_value": text} for key, text in texts.items()}, repository)


def test_a_model_finds_what_was_fetched_ahead_and_asks_its_store_for_nothing(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    ahead.fetch("mlp", settings_of(repository, "mlp", pool.url, cache))
    sent = len(pool.sent)
    assert LAYERS * OBJECT_BYTES <= pool.sent_bytes() < (LAYERS + 1) * OBJECT_BYTES
    model = opened("mlp", pool=pool.url, cache=str(cache))
    check(model, repository)
    assert model.loader.wait_complete(TIMEOUT_S)
    assert len(pool.sent) == sent


def test_what_was_fetched_in_this_life_of_the_machine_is_not_hashed_again(
    repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not on the disk yet may be lost in a crash: then it is hashed."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    settings = settings_of(repository, "mlp", pool.url, cache)
    ahead.fetch("mlp", settings)
    hashed: list[int] = []

    def counting(handle: int, *, keep: bool = True) -> str:
        hashed.append(handle)
        return real(handle, keep=keep)

    real = objects.hash_file
    monkeypatch.setattr(objects, "hash_file", counting)
    manifest = ObjectStore(cache).manifest(settings.manifest)
    names = [name for name in manifest.objects if (cache / "verified" / name).exists()]
    assert len(names) >= LAYERS
    for name in names:
        ObjectStore(cache).verified(name, manifest.objects[name])
    assert not hashed
    monkeypatch.setattr(objects, "_boot", lambda: "another")
    for name in names:
        ObjectStore(cache).verified(name, manifest.objects[name])
    assert len(hashed) == len(names)


def test_it_gives_way_to_the_models_own_process_when_others_load_as_well(
    opened: Open, repository: Path, pool: RemotePool, tmp_path: Path
) -> None:
    """The own process has the weight of who waits for it; nothing may wait for who has none."""
    cache = tmp_path / "cache"
    settings = settings_of(repository, "mlp", pool.url, cache)
    channel = f"store {pool.url.removeprefix('http://')}"
    own, other = Ledger(channel), Ledger(channel)
    try:
        other.expect("other", 1 << 20)
        ahead.fetch("mlp", settings)  # the own process is not there yet
        own.expect("sibling", 1 << 20)
        with pytest.raises(PoolError, match="fetched by its own process now"):
            ahead.fetch("sibling", settings_of(repository, "sibling", pool.url, cache))
        other.close()
        ahead.fetch("sibling", settings_of(repository, "sibling", pool.url, cache))
    finally:
        own.close()


def waited_for(true: Callable[[], bool]) -> bool:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not true() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return true()


def config_of(parameters: dict[str, str], backend: str = "paceline_blocks") -> Any:
    config = ModelConfig(name="mlp", backend=backend)
    for key, text in parameters.items():
        config.parameters[key].string_value = text
    return config


def test_a_process_fetches_what_will_be_loaded_and_is_replaced_when_it_dies(
    repository: Path, pool: RemotePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_BLOCKS_LEDGER", str(tmp_path / "ledger"))
    fetches = BlockFetches()
    given = parameters_of(repository, "mlp", pool.url, tmp_path / "cache")
    budget = {**given, "memory_budget_mib": "4"}
    local = {**given, "pool": "../blocks"}
    for config in (config_of(budget), config_of(local), config_of(given, "onnxruntime")):
        fetches.begin(repository / "mlp", config)
        assert fetches.pid is None, "these are not fetched ahead"
    try:
        # What it cannot fetch ends nothing.
        fetches.begin(repository / "mlp", config_of({**given, "manifest": "0" * 64}))
        first = fetches.pid
        fetches.begin(repository / "mlp", config_of(given))
        least = LAYERS * OBJECT_BYTES
        assert waited_for(lambda: pool.sent_bytes() >= least) and fetches.pid == first is not None
        objects_there = tmp_path / "cache" / "objects"
        assert waited_for(lambda: len([*objects_there.iterdir()]) > LAYERS)
        mapped = Path(f"/proc/{first}/maps")
        assert waited_for(lambda: str(tmp_path) not in mapped.read_text(encoding="utf-8"))
        assert fetches._process is not None
        fetches._process.send_signal(signal.SIGKILL)
        fetches._process.wait()
        given = parameters_of(repository, "sibling", pool.url, tmp_path / "cache")
        fetches.begin(repository / "sibling", config_of(given))
        assert fetches.pid not in (None, first)
        assert waited_for(lambda: pool.sent_bytes() >= least + OBJECT_BYTES)
    finally:
        process = fetches._process
        fetches.close()
    assert process is not None and process.returncode == 0 and fetches.pid is None
