"""The Triton ensemble that executes a run (`core.runs`) at once.

Its directory exists in the request that loads it only: Triton asks for a version directory with a
file in it, whatever that holds. Triton itself keeps it in step with its members: one that is
unloaded takes the ensemble away, and brings it back when it is loaded again.
"""

from __future__ import annotations

import hashlib

from tritonclient.grpc import model_config_pb2

from paceline.core.chain import Module
from paceline.core.model import ModelSpec
from paceline.triton.config import CONTENT, ModelConfig, config_type

FILES = {"file:1/ensemble": b"-"}
"""What an ensemble's model directory holds: no file of it is ever read."""


def ensemble_config(run: Module, spec: ModelSpec) -> ModelConfig:
    """The configuration of `run`, which is declared as `spec`; its content mark is its own."""
    config = model_config_pb2.ModelConfig(
        name=run.model, platform="ensemble", max_batch_size=spec.max_batch_size
    )
    for declared, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
        for tensor in tensors:
            declared.add(
                name=tensor.name, data_type=config_type(tensor.datatype), dims=tensor.shape
            )
    used = {source for member in run.members for source in member.inputs.values()}
    for member in run.members:
        step = config.ensemble_scheduling.step.add(model_name=member.model, model_version=-1)
        for name, source in member.inputs.items():
            step.input_map[name] = str(source)
        for source in used:
            if source.module == member.name:
                step.output_map[source.tensor] = str(source)
    for tensor in spec.outputs:
        step.output_map[tensor.name] = tensor.name
    mark = hashlib.sha256(config.SerializeToString(deterministic=True)).hexdigest()
    config.parameters[CONTENT].string_value = mark
    return config
