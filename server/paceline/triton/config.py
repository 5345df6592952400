"""Model configurations: reading config.pbtxt and ModelConfig, and what they say of a model.

Invariant: nothing here talks to a server; a configuration is read afresh from disk each time, so
an edited file is what the next load uses. Names are Triton's own (TYPE_STRING is BYTES).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec

CONFIG_FILE = "config.pbtxt"

CONTENT = "paceline_content"
"""The parameter of a loaded model that tells what it was loaded from."""

ModelConfig = Any
"""`model_config_pb2.ModelConfig`; tritonclient ships no type information."""


def find_models(directories: Iterable[Path]) -> dict[str, Path]:
    """Every model directory (it has a numeric version subdirectory) below `directories`, by name.

    Raises ConfigError for a missing directory or a name that two directories hold.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError("model repository is not a directory", where=str(directory))
        for path in sorted(directory.iterdir()):
            if path.name.startswith(".") or not path.is_dir() or not versions_of(path):
                continue
            if path.name in found:
                raise ConfigError(
                    f"model {path.name!r} is also in {found[path.name].parent}; rename one of them",
                    where=str(path),
                )
            found[path.name] = path
    return dict(sorted(found.items()))


def versions_of(directory: Path) -> tuple[str, ...]:
    """Version subdirectories of a model directory, oldest first."""
    numbers = (
        int(path.name)
        for path in directory.iterdir()
        if path.name.isascii() and path.name.isdigit() and int(path.name) > 0 and path.is_dir()
    )
    return tuple(str(number) for number in sorted(numbers))


def members_of(config: ModelConfig) -> tuple[str, ...]:
    """The models that an ensemble's steps are; none for other models."""
    return tuple(sorted({step.model_name for step in config.ensemble_scheduling.step}))


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a model directory, its name filled in.

    Raises ConfigError naming file and line when it is missing, malformed or misnamed.
    """
    path = directory / CONFIG_FILE
    config = model_config_pb2.ModelConfig()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such file; Paceline needs complete configurations (Triton does not complete them)",
            where=str(path),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        line = error.GetLine()
        reason = str(error).split(" : ", 1)[-1].strip()
        where = f"{path}:{line}" if line is not None else str(path)
        raise ConfigError(" ".join(reason.split()), where=where) from None
    if config.name not in ("", directory.name):
        raise ConfigError(
            f"name {config.name!r} differs from the directory's name {directory.name!r}",
            where=str(path),
        )
    config.name = directory.name
    return config


def spec_of(config: ModelConfig, versions: Sequence[str] = ("1",), *, where: str = "") -> ModelSpec:
    """What the model takes and gives. Shapes are `dims`: clients see those, never `reshape`.

    Raises ConfigError for a tensor without a datatype and for a negative batch size.
    """
    if config.max_batch_size < 0:
        raise ConfigError("max_batch_size is below 0", key=config.name, where=where)
    return ModelSpec(
        name=config.name,
        max_batch_size=config.max_batch_size,
        inputs=tuple(_tensor_spec(t, where, optional=t.optional) for t in config.input),
        outputs=tuple(_tensor_spec(t, where) for t in config.output),
        platform=config.platform or config.backend,
        versions=tuple(versions),
    )


def with_instances(config: ModelConfig, instances: int) -> ModelConfig:
    """A copy whose instance groups are one group of `instances`.

    The kind and devices of the first group are kept; Triton counts per device, so a group on
    several devices gets its share on each, rounded up. An ensemble has none, and may not.
    """
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    if changed.HasField("ensemble_scheduling"):
        return changed
    if not changed.instance_group:
        changed.instance_group.add()
    del changed.instance_group[1:]
    group = changed.instance_group[0]
    group.count = -(-instances // max(1, len(group.gpus)))
    return changed


def instances_of(config: ModelConfig) -> int:
    """How many instances the configuration runs (a group without a count has one per device)."""
    return sum(
        max(1, group.count) * max(1, len(group.gpus)) for group in config.instance_group
    ) or (1)


def config_json(config: ModelConfig) -> str:
    """The configuration as RepositoryModelLoad takes it: whole, because it replaces the whole."""
    fields = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return json.dumps(fields, separators=(",", ":"))


def datatype_of(config_type: int) -> str:
    """KServe's name of a configuration's datatype, "" for none."""
    name = str(model_config_pb2.DataType.Name(config_type)).removeprefix("TYPE_")
    return {"STRING": "BYTES", "INVALID": ""}.get(name, name)


def config_type(datatype: str) -> int:
    """The configuration's datatype of KServe's name: `datatype_of`, the other way."""
    name = "STRING" if datatype == "BYTES" else datatype
    return int(model_config_pb2.DataType.Value(f"TYPE_{name}"))


def _tensor_spec(tensor: Any, where: str, *, optional: bool = False) -> TensorSpec:
    try:
        datatype = datatype_of(tensor.data_type)
        return TensorSpec(tensor.name, datatype, tuple(tensor.dims), optional)
    except ValueError as error:
        raise ConfigError(str(error), key=tensor.name, where=where) from None
