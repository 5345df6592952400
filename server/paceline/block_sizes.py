"""What a model of `paceline_blocks` shares with others, for the memory ledger: its blocks.

Its manifest says; that of a remote pool is in the model's cache once somebody has fetched it. A
model within a budget of its own (`memory_budget_mib`, `shared_budget_mib`) swaps its blocks in and
out: it holds none for good. Models of other backends have no blocks.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from paceline.blocks.backend.manifest import PoolError, pages
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.settings import Settings, SettingsError, read_settings
from paceline.blocks.backend.source import objects_of, open_source
from paceline.core.errors import ConfigError
from paceline.triton.config import ModelConfig, read_config

BACKEND = "paceline_blocks"

MOST = 4
"""Manifests that are fetched at a time; more are left to the models' own processes."""

_REMEMBERED = 256
"""Manifests whose blocks need not be read again."""

_free = threading.Semaphore(MOST)


def kept_blocks(directory: Path, config: ModelConfig) -> Settings | None:
    """What a model asks of the backend that keeps its blocks in memory once they were loaded.

    None of other backends' models, of one within a budget, and of one that will not load.
    """
    if config.backend != BACKEND:
        return None
    parameters = {
        key: {"string_value": value.string_value} for key, value in config.parameters.items()
    }
    try:
        settings = read_settings(parameters, directory)
    except SettingsError:
        return None
    return None if settings.has_budget else settings


def blocks_of(directory: Path) -> Mapping[str, int]:
    """Bytes of a model's blocks, whole pages, by the file that its processes map, which is named by
    its content: models share what is in one pool or cache. {} where this machine has no right
    manifest of it.
    """
    settings = _kept_in(directory)
    if settings is None:
        return {}
    root = settings.pool if isinstance(settings.pool, Path) else settings.cache
    try:
        return _blocks(os.path.realpath(root), settings.manifest)
    except PoolError:
        return {}


async def fetch_manifest(directory: Path) -> None:
    """Has `blocks_of` tell what it can: brings the manifest from a store if it is in no cache.

    Takes as long as the store does (limits: `blocks.backend.store`). Where it cannot be had,
    nothing is said: the model's load will meet it, too. Neither its end nor ours waits for the
    other: a thread of the event loop's pool would have to be waited for.
    """
    if not _free.acquire(blocking=False):
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def work() -> None:
        try:
            _fetch(directory)
        finally:
            _free.release()
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=work, name="manifest", daemon=True).start()
    await ended.wait()


def _fetch(directory: Path) -> None:
    settings = _kept_in(directory)
    if settings is None or blocks_of(directory) or isinstance(settings.pool, Path):
        return
    with suppress(PoolError, OSError):
        source, _ = open_source(settings)
        try:
            source.manifest(settings.manifest)
        finally:
            source.close()
        blocks_of(directory)  # reads it here and not where requests wait


def _kept_in(directory: Path) -> Settings | None:
    try:
        return kept_blocks(directory, read_config(directory))
    except ConfigError:
        return None


@lru_cache(_REMEMBERED)
def _blocks(root: str, manifest: str) -> Mapping[str, int]:
    """Raises PoolError."""
    store = ObjectStore(Path(root))
    mapped = objects_of(store.manifest(manifest)).items()
    return MappingProxyType(
        {str(store.path(name)): pages(one.size_bytes) for name, one in mapped if one.size_bytes}
    )
