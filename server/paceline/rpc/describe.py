"""What KServe v2 clients ask before they send anything: metadata, configuration, statistics.

Invariant: everything said about a chain comes from its bound form, nothing is made up; durations
are nanoseconds, as in Triton.
"""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import model_config_pb2, service_pb2

from paceline.core.bind import BoundChain
from paceline.core.ports import ModelState, ModelStatistics
from paceline.core.tensor import TensorSpec
from paceline.rpc.validate import VERSION, versions_of

EXTENSIONS = (
    "model_repository",
    "model_configuration",
    "schedule_policy",
    "parameters",
    "statistics",
)
"""Triton's names of the extensions that exist here."""

CHAIN_PLATFORM = "paceline_chain"


def platform_of(bound: BoundChain) -> str:
    """A chain's is ours, a model called by its own name keeps Triton's."""
    return bound.modules[0].spec.platform if bound.direct else CHAIN_PLATFORM


def metadata(bound: BoundChain) -> Any:
    """ModelMetadataResponse."""
    response = service_pb2.ModelMetadataResponse(
        name=bound.name, versions=versions_of(bound), platform=platform_of(bound)
    )
    for spec in bound.inputs:
        response.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    for spec in bound.outputs:
        response.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
    return response


def config(bound: BoundChain) -> Any:
    """ModelConfigResponse; dims leave out the batch axis where there is one."""
    response = service_pb2.ModelConfigResponse()
    described = response.config
    described.name = bound.name
    described.platform = platform_of(bound)
    described.max_batch_size = bound.max_batch_size
    described.version_policy.latest.num_versions = 1
    for spec in bound.inputs:
        described.input.add(
            name=spec.name,
            data_type=_data_type(spec),
            dims=_dims(spec, bound),
            optional=spec.optional,
        )
    for spec in bound.outputs:
        described.output.add(name=spec.name, data_type=_data_type(spec), dims=_dims(spec, bound))
    return response


def add_statistics(response: Any, counts: ModelStatistics) -> None:
    """Append to a ModelStatisticsResponse."""
    entry = response.model_stats.add(
        name=counts.name,
        version=counts.version or VERSION,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inference_count,
        execution_count=counts.execution_count,
    )
    inference = entry.inference_stats
    for duration, count, seconds in (
        (inference.success, counts.success_count, counts.success_s),
        (inference.fail, counts.fail_count, counts.fail_s),
        (inference.queue, counts.queue_count, counts.queue_s),
        (inference.compute_input, counts.compute_infer_count, 0.0),
        (inference.compute_infer, counts.compute_infer_count, counts.compute_infer_s),
        (inference.compute_output, counts.compute_infer_count, 0.0),
    ):
        duration.count = count
        duration.ns = _ns(seconds)
    for batch_size, executions, seconds in counts.batches:
        batch = entry.batch_stats.add(batch_size=batch_size)
        batch.compute_infer.count = executions
        batch.compute_infer.ns = _ns(seconds)


def add_index(response: Any, state: ModelState) -> None:
    """Append to a RepositoryIndexResponse."""
    response.models.add(
        name=state.name, version=state.version, state=state.state, reason=state.reason
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _dims(spec: TensorSpec, bound: BoundChain) -> tuple[int, ...]:
    return spec.shape[1:] if bound.max_batch_size > 0 else spec.shape


def _data_type(spec: TensorSpec) -> int:
    name = "STRING" if spec.datatype == "BYTES" else spec.datatype
    value: int = model_config_pb2.DataType.Value(f"TYPE_{name}")
    return value
