"""What a model of `paceline_blocks` shares with others, for the memory ledger: blocks by content.

A model within a budget of its own (`memory_budget_mib`, `shared_budget_mib`) swaps its blocks in
and out: it holds none for good. Models of other backends have no blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paceline.blocks.backend.manifest import PoolError
from paceline.blocks.backend.objects import ObjectStore
from paceline.core.errors import ConfigError
from paceline.triton.config import read_config

BUDGETS = frozenset(("memory_budget_mib", "shared_budget_mib"))


def blocks_of(directory: Path) -> Mapping[str, int]:
    """Bytes by content hash of a model's blocks; none where there is no readable manifest."""
    try:
        config = read_config(directory)
    except ConfigError:
        return {}
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    pool, manifest = parameters.get("pool", ""), parameters.get("manifest", "")
    swapped = not BUDGETS.isdisjoint(parameters)
    if config.backend != "paceline_blocks" or swapped or "://" in pool:
        return {}
    try:
        objects = ObjectStore(directory.resolve() / pool).manifest(manifest).objects
        return {name: one.size_bytes for name, one in objects.items()}
    except (PoolError, OSError):
        return {}
