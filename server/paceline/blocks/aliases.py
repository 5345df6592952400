"""Members of a fused model under their own names: one Triton ensemble of one step each.

Whoever called a model before it was fused calls it as before, through Paceline or on Triton itself:
the ensemble maps its tensors to the member's, names no others, and so nothing else is computed. It
costs a request about 0.03 ms, and loads the fused model when it is loaded. A model of another kind
that has the member's name already keeps it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from paceline.blocks.pool import disk_errors, staged, sync_directory, write_file
from paceline.blocks.repository import CONFIG_FILE, CompiledModel, read_config

_HEADER = (
    "# Written by `paceline blocks compile --fuse`: a member of a fused model by its own name.\n"
)


def publish_members(model: CompiledModel, names: Mapping[str, str]) -> dict[str, str]:
    """Makes each member a model beside the fused one; those whose names others have already.

    `names`: what a member is called as a model.
    """
    repository = model.directory.parent
    fused = read_config(model.directory / CONFIG_FILE)
    return {
        member: name
        for member, name in names.items()
        if not _publish(repository / name, fused, _config(fused, member, name))
    }


def _config(fused: Any, member: str, name: str) -> Any:
    """The ModelConfig of one member, called `name`; `fused` is that of all."""
    config = model_config_pb2.ModelConfig(
        name=name, platform="ensemble", max_batch_size=fused.max_batch_size
    )
    step = config.ensemble_scheduling.step.add(model_name=fused.name, model_version=-1)
    prefix = f"{member}/"
    for kind, mapped in (("input", step.input_map), ("output", step.output_map)):
        for tensor in getattr(fused, kind):
            if tensor.name.startswith(prefix):
                own = getattr(config, kind).add()
                own.CopyFrom(tensor)
                own.name = tensor.name.removeprefix(prefix)
                own.ClearField("optional") if kind == "input" else None
                mapped[tensor.name] = own.name
    return config


def _is_free(directory: Path, fused: str) -> bool:
    """Whether no model is there, or this very alias."""
    config = read_config(directory / CONFIG_FILE)
    if config is None:
        return not directory.exists() or not any(directory.iterdir())
    return [step.model_name for step in config.ensemble_scheduling.step] == [fused]


def _publish(directory: Path, fused: Any, config: Any) -> bool:
    """Writes the alias; false if another model is there."""
    repository = directory.parent
    with disk_errors(repository), staged(repository) as stage:
        if not _is_free(directory, fused.name):
            return False
        (stage / "1").mkdir()
        write_file(stage / CONFIG_FILE, _HEADER + text_format.MessageToString(config))
        if (directory / CONFIG_FILE).exists():
            (stage / CONFIG_FILE).replace(directory / CONFIG_FILE)
        else:
            shutil.rmtree(directory, ignore_errors=True)  # empty: nothing else is free
            stage.rename(directory)
        sync_directory(repository)
    return True
