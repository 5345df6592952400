"""Model directories of the backend `paceline_blocks`: written whole, and found again.

Invariant: `config.pbtxt` is renamed into place after everything it refers to is on the disk, and a
model's directory appears with it; a compile that is killed leaves the old model or none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from paceline.blocks.backend.manifest import Manifest, PoolError, Tensor
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.pool import disk_errors, staged, sync_directory, write_file
from paceline.core.errors import ConfigError, ResidencyError

BACKEND = "paceline_blocks"
ONNX_BACKENDS = ("onnxruntime", "onnxruntime_onnx")
CONFIG_FILE = "config.pbtxt"
_NOTE = "The model is in the block pool that ../config.pbtxt names: `paceline blocks show`.\n"


@dataclass(frozen=True, slots=True)
class CompiledModel:
    """A model directory and the manifest its configuration refers to."""

    directory: Path
    pool: Path
    digest: str
    manifest: Manifest

    def missing_files(self) -> bool:
        """Whether a hosted Python model's directory is gone."""
        wiring = self.manifest.wiring
        return wiring is not None and any(
            not (self.directory / "1" / wiring.code / step.module / step.version).is_dir()
            for step in wiring.steps
            if step.kind == "python"
        )


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """A file that is copied into a model's directory, to `name` below it; `digest`: SHA-256.

    What is at `name` never changes: its first directory or its own name carries a digest.
    """

    name: str
    source: Path
    digest: str


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


def version_directory(directory: Path) -> Path | None:
    """The newest version of the model in `directory`, None if it has none."""
    versions = [p for p in directory.glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    return max(versions, key=lambda path: int(path.name), default=None)


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
    warm_up: Any = None,
    files: Sequence[ExtraFile] = (),
) -> None:
    """Makes `directory` a model of this manifest, or of this one from now on.

    `warm_up` is a ModelWarmup, `files` are what it and the manifest's wiring refer to.
    """
    repository = directory.parent
    with disk_errors(repository):
        repository.mkdir(parents=True, exist_ok=True)
        with staged(repository) as stage:
            config = config_text(
                manifest,
                digest,
                _relative(pool, directory),
                max_batch=max_batch,
                budget_mib=budget_mib,
            )
            if warm_up is not None:
                sample = text_format.MessageToString(warm_up, as_one_line=True)
                config += f"model_warmup {{ {sample} }}\n"
            write_file(stage / CONFIG_FILE, config)
            (stage / "1").mkdir()
            write_file(stage / "1" / "README", _NOTE)
            for file in files:
                _copy(file, stage)
            _move(stage, directory)
            sync_directory(directory)
            sync_directory(repository)


def config_text(
    manifest: Manifest, digest: str, pool: str, *, max_batch: int, budget_mib: int | None
) -> str:
    """config.pbtxt."""
    batching, inputs, outputs = _tensors(manifest, max_batch)
    if manifest.wiring is not None and batching:
        max_batch = min(max_batch, manifest.wiring.max_batch)
    parameters = {"manifest": digest, "pool": pool}
    if budget_mib is not None:
        parameters["memory_budget_mib"] = str(budget_mib)
    lines = [
        "# Written by `paceline blocks compile`; a recompile that changes something overwrites it.",
        f"name: {_quoted(manifest.model)}",
        f'backend: "{BACKEND}"',
        f"max_batch_size: {max_batch if batching else 0}",
    ]
    optional = _optional_inputs(manifest)
    for kind, tensors in (("input", inputs), ("output", outputs)):
        lines.extend(
            f"{kind} {{ name: {_quoted(name)} data_type: {_config_type(dtype)} "
            f"dims: {list(dims or (1,))}"
            f"{' optional: true' if kind == 'input' and name in optional else ''} }}"
            for name, dtype, dims in tensors
        )
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    lines.extend(
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in parameters.items()
    )
    return "\n".join(lines) + "\n"


_Declared = list[tuple[str, str, tuple[int, ...]]]


def _tensors(manifest: Manifest, max_batch: int) -> tuple[bool, _Declared, _Declared]:
    """Whether there is a batch axis; inputs and outputs: name, data type, dims without it."""
    wiring = manifest.wiring
    if wiring is not None:
        inputs, outputs = (
            [(port.name, port.dtype, port.dims) for port in ports]
            for ports in ((*wiring.inputs, *wiring.own_inputs), wiring.outputs)
        )
        return min(max_batch, wiring.max_batch) > 0, inputs, outputs
    batching = max_batch > 0 and all(member.batching for member in manifest.members)

    def declared(tensors: Iterable[Tensor]) -> _Declared:
        return [(t.name, t.dtype, t.shape[1:] if batching else t.shape) for t in tensors]

    return (
        batching,
        declared(t for member in manifest.members for t in member.inputs),
        declared(t for member in manifest.members for t in member.outputs),
    )


def _optional_inputs(manifest: Manifest) -> frozenset[str]:
    """Inputs that some output does not need: a request that asks for it need not bring them."""
    if manifest.wiring is not None:
        return manifest.wiring.optional
    if manifest.members[0].name == "":
        return frozenset()
    return frozenset(tensor.name for member in manifest.members for tensor in member.inputs)


def _config_type(dtype: str) -> str:
    return "TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _relative(pool: Path, directory: Path) -> str:
    """As config.pbtxt names the pool: relative if both move together when their parent is moved."""
    pool, directory = pool.resolve(), directory.parent.resolve() / directory.name
    if pool.is_relative_to(directory.parent.parent):
        return os.path.relpath(pool, directory)
    return str(pool)


def _copy(file: ExtraFile, stage: Path) -> None:
    data = file.source.read_bytes()
    if hashlib.sha256(data).hexdigest() != file.digest:
        raise ResidencyError(f"{file.source}: changed while it was compiled")
    target = stage / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    with target.open("rb") as written:
        os.fsync(written.fileno())


def _move(stage: Path, directory: Path) -> None:
    if not directory.exists():
        stage.rename(directory)
        return
    fresh = {
        path.relative_to(stage)
        for place in ("1", "warmup")
        for path in (stage / place).glob("*")
        if path.name != "README"
    }
    for place in ("1", "warmup"):
        if (stage / place).is_dir():
            (directory / place).mkdir(exist_ok=True)
    for name in sorted(fresh):
        if not (directory / name).exists():
            (stage / name).rename(directory / name)
    (stage / CONFIG_FILE).replace(directory / CONFIG_FILE)
    # Nothing refers to what the old configuration referred to.
    for path in (*directory.glob("1/python-*"), *directory.glob("warmup/*-*")):
        if path.relative_to(directory) not in fresh:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
