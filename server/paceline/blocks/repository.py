"""Model directories of the backend `paceline_blocks`: written whole, and found again.

Invariant: `config.pbtxt` is renamed into place after everything it refers to is on the disk, and a
model's directory appears with it; a compile that is killed leaves the old model or none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from paceline.blocks.backend.manifest import Manifest, Member, ObjectStore, PoolError, Tensor
from paceline.blocks.pool import disk_errors, locked_directory, sweep, sync_directory, write_file
from paceline.core.errors import ConfigError

BACKEND = "paceline_blocks"
CONFIG_FILE = "config.pbtxt"
_STAGE_PREFIX = ".paceline-"
_NOTE = "The model is in the block pool that ../config.pbtxt names: `paceline blocks show`.\n"


@dataclass(frozen=True, slots=True)
class CompiledModel:
    """A model directory and the manifest its configuration refers to."""

    directory: Path
    pool: Path
    digest: str
    manifest: Manifest


def compiled_model(directory: Path) -> CompiledModel | None:
    """The compiled model in `directory`; None if there is none of this backend.

    Raises ConfigError if its configuration or manifest cannot be used.
    """
    path = directory / CONFIG_FILE
    config = read_config(path)
    if config is None or config.backend != BACKEND:
        return None
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    digest, pool = parameters.get("manifest", ""), parameters.get("pool", "")
    if not digest or not pool:
        raise ConfigError("needs the parameters manifest and pool", where=str(path))
    if "://" in pool:
        raise ConfigError(f"the pool {pool} is not on this machine", where=str(path))
    root = Path(os.path.normpath(directory.resolve() / pool))
    try:
        return CompiledModel(directory, root, digest, ObjectStore(root).manifest(digest))
    except PoolError as error:
        raise ConfigError(str(error), where=str(path)) from None


def is_ours(directory: Path) -> bool:
    """May a compile overwrite what is in the existing `directory`?"""
    config = read_config(directory / CONFIG_FILE)
    return config.backend == BACKEND if config is not None else not any(directory.iterdir())


def read_config(path: Path) -> Any:
    """The ModelConfig in a file, None if there is none; tritonclient ships no type information."""
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(" ".join(str(error).split()), where=str(path)) from None
    return config


def find_compiled(places: Iterable[Path]) -> list[CompiledModel]:
    """The compiled models in these model directories and repositories.

    Raises ConfigError for a place that is neither.
    """
    found: dict[Path, CompiledModel] = {}
    for place in places:
        if not place.is_dir():
            raise ConfigError("no such directory", where=str(place))
        inside = (p for p in sorted(place.iterdir()) if p.is_dir() and not p.name.startswith("."))
        directories = [place] if (place / CONFIG_FILE).is_file() else inside
        models = [model for path in directories if (model := compiled_model(path)) is not None]
        if not models:
            raise ConfigError(
                "no model compiled into blocks is here; see paceline blocks compile --help",
                where=str(place),
            )
        found.update((model.directory.resolve(), model) for model in models)
    return list(found.values())


def publish(
    directory: Path,
    manifest: Manifest,
    digest: str,
    pool: Path,
    *,
    max_batch: int,
    budget_mib: int | None,
) -> None:
    """Makes `directory` a model of this manifest, or of this one from now on."""
    repository = directory.parent
    with disk_errors(repository):
        repository.mkdir(parents=True, exist_ok=True)
        prefix = f"{_STAGE_PREFIX}{directory.name}-"
        sweep(repository, prefix)
        stage, lock = locked_directory(repository, prefix)
        try:
            write_file(
                stage / CONFIG_FILE,
                config_text(
                    manifest,
                    digest,
                    _relative(pool, directory),
                    max_batch=max_batch,
                    budget_mib=budget_mib,
                ),
            )
            (stage / "1").mkdir()
            write_file(stage / "1" / "README", _NOTE)
            _move(stage, directory)
            sync_directory(directory)
            sync_directory(repository)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)


def config_text(
    manifest: Manifest, digest: str, pool: str, *, max_batch: int, budget_mib: int | None
) -> str:
    """config.pbtxt."""
    fused = len(manifest.members) > 1 or manifest.members[0].name != ""
    batching = max_batch > 0 and all(member.batching for member in manifest.members)
    members: Sequence[Member] = manifest.members
    parameters = {"manifest": digest, "pool": pool}
    if budget_mib is not None:
        parameters["memory_budget_mib"] = str(budget_mib)
    lines = [
        "# Written by `paceline blocks compile`; a recompile that changes something overwrites it.",
        f"name: {_quoted(manifest.model)}",
        f'backend: "{BACKEND}"',
        f"max_batch_size: {max_batch if batching else 0}",
    ]
    for kind in ("input", "output"):
        tensors = [t for m in members for t in (m.inputs if kind == "input" else m.outputs)]
        optional = " optional: true" if fused and kind == "input" else ""
        lines.extend(
            f"{kind} {{ name: {_quoted(tensor.name)} data_type: {_config_type(tensor)} "
            f"dims: {list((tensor.shape[1:] if batching else tensor.shape) or [1])}{optional} }}"
            for tensor in tensors
        )
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    lines.extend(
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in parameters.items()
    )
    return "\n".join(lines) + "\n"


def _config_type(tensor: Tensor) -> str:
    return "TYPE_STRING" if tensor.dtype == "BYTES" else f"TYPE_{tensor.dtype}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _relative(pool: Path, directory: Path) -> str:
    """As config.pbtxt names the pool: relative if both move together when their parent is moved."""
    pool, directory = pool.resolve(), directory.parent.resolve() / directory.name
    if pool.is_relative_to(directory.parent.parent):
        return os.path.relpath(pool, directory)
    return str(pool)


def _move(stage: Path, directory: Path) -> None:
    if not directory.exists():
        stage.rename(directory)
        return
    (directory / "1").mkdir(exist_ok=True)
    (stage / CONFIG_FILE).replace(directory / CONFIG_FILE)
