"""inference.GRPCInferenceService (KServe v2) in front of `Inference` and `Control`.

Invariant: a chain is a model. Unmodified Triton clients see Triton: the same messages, codes and
order of checks. Handlers await the port directly, so a client that goes away cancels its request.
The messages are those that ship in `tritonclient.grpc`: a second copy in a process collides.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline import __version__
from paceline.core import ports
from paceline.core.errors import ErrorKind, RequestError
from paceline.core.ports import Control, Inference
from paceline.core.request import InferAnswer
from paceline.rpc import describe
from paceline.rpc.context import CallContext
from paceline.rpc.convert import infer_request, infer_response
from paceline.rpc.infer import InferCalls, checked, numbered
from paceline.rpc.status import Status, abort, answered


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The servicer."""

    def __init__(self, inference: Inference, control: Control) -> None:
        self._inference = inference
        self._control = control
        self.calls = InferCalls(inference, control)
        """Serves inference without tasks; its handlers are to be registered first."""

    # Inference

    async def ModelInfer(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._unary(request, context))

    async def infer(self, request: Any, remaining_s: float | None) -> Any:
        """A ModelInferRequest as a ModelInferResponse. RequestError."""
        answer, version = await self._serve(request, remaining_s)
        return infer_response(request, version, answer)

    async def _unary(self, request: Any, context: CallContext) -> Any:
        answer, version = await self._serve(request, context.time_remaining())
        if not request.id:
            context.set_trailing_metadata(numbered(answer))
        return infer_response(request, version, answer)

    async def _serve(self, message: Any, remaining_s: float | None) -> tuple[InferAnswer, str]:
        """The answer, and the version that gave it when the client named none."""
        signature = self.calls.signature(message.model_name, message.model_version)
        request = infer_request(message, signature, remaining_s)
        return await self._inference.infer(request), signature.version

    # Health, metadata, statistics

    async def ServerLive(self, request: Any, context: CallContext) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: CallContext) -> Any:
        ready = self._control.ready and not self._control.draining
        return service_pb2.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._model_ready(request))

    async def _model_ready(self, request: Any) -> Any:
        version = checked(request.version)
        try:
            self._control.callable(request.name, version)
        except RequestError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: CallContext) -> Any:
        return service_pb2.ServerMetadataResponse(
            name="paceline", version=__version__, extensions=describe.EXTENSIONS
        )

    async def ModelMetadata(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._describe(request, describe.metadata))

    async def ModelConfig(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._describe(request, describe.config))

    async def _describe(self, request: Any, what: Any) -> Any:
        bound = self._control.callable(request.name, checked(request.version))
        return what(bound)

    async def ModelStatistics(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._statistics(request))

    async def _statistics(self, request: Any) -> Any:
        response = service_pb2.ModelStatisticsResponse()
        for counts in self._counts(request.name, checked(request.version)):
            describe.add_statistics(response, counts)
        return response

    def _counts(self, name: str, version: str) -> tuple[ports.ModelStatistics, ...]:
        """Unlike elsewhere, Triton calls an unknown model's statistics an invalid argument."""
        try:
            return self._control.statistics(name, version if name else "")
        except RequestError as error:
            if error.kind not in (ErrorKind.UNKNOWN_MODEL, ErrorKind.NOT_READY):
                raise
            known = version and any(bound.name == name for bound in self._control.callables())
            if known:
                text = f"requested model version is not available for model '{name}'"
            else:
                text = f"requested model '{name}' is not available"
            raise RequestError(ErrorKind.INVALID, text) from error

    # Repository

    async def RepositoryIndex(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._index(request))

    async def _index(self, request: Any) -> Any:
        _no_repository_name(request)
        response = service_pb2.RepositoryIndexResponse()
        for state in self._control.repository_index():
            if not request.ready or state.state == "READY":
                describe.add_index(response, state)
        return response

    async def RepositoryModelLoad(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._load(request))

    async def _load(self, request: Any) -> Any:
        _no_repository_name(request)
        _no_load_parameters(request)
        try:
            await self._control.load(request.model_name)
        except RequestError as error:
            if error.kind is not ErrorKind.UNKNOWN_MODEL:
                raise
            text = f"failed to load '{request.model_name}', failed to poll from model repository"
            raise RequestError(ErrorKind.INTERNAL, text) from error
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._unload(request))

    async def _unload(self, request: Any) -> Any:
        _no_repository_name(request)
        dependents = request.parameters.get("unload_dependents")
        if dependents is not None and dependents.bool_param:
            raise RequestError(ErrorKind.UNSUPPORTED, "'unload_dependents' is not supported")
        try:
            await self._control.unload(request.model_name)
        except RequestError as error:
            # Triton: to unload what is not there is no failure.
            if error.kind is not ErrorKind.UNKNOWN_MODEL:
                raise
        return service_pb2.RepositoryModelUnloadResponse()

    # What a front server in another process than Triton does not offer

    async def SystemSharedMemoryStatus(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "system shared memory")

    async def SystemSharedMemoryRegister(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "system shared memory")

    async def SystemSharedMemoryUnregister(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "system shared memory")

    async def CudaSharedMemoryStatus(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "CUDA shared memory")

    async def CudaSharedMemoryRegister(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "CUDA shared memory")

    async def CudaSharedMemoryUnregister(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "CUDA shared memory")

    async def TraceSetting(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "tracing")

    async def LogSettings(self, request: Any, context: CallContext) -> Any:
        await _unsupported(context, "setting the log level over gRPC")


def _no_repository_name(request: Any) -> None:
    if request.repository_name:
        raise RequestError(
            ErrorKind.UNSUPPORTED, "'repository_name' specification is not supported"
        )


def _no_load_parameters(request: Any) -> None:
    """Triton takes a model's configuration and files here; a `file:` name of 256 characters or
    more aborts it. Paceline's models are those of the repository."""
    for name in request.parameters:
        if name == "config" or name.startswith("file:"):
            raise RequestError(
                ErrorKind.INVALID,
                f"load parameter '{name.partition(':')[0]}' is not supported: models are loaded "
                "as they are in the model repository",
            )
        raise RequestError(ErrorKind.INVALID, f"unrecognized load parameter '{name[:64]}'.")


async def _unsupported(context: CallContext, what: str) -> NoReturn:
    details = f"{what} is not offered in this version of Paceline"
    await abort(context, Status(grpc.StatusCode.UNIMPLEMENTED, details))
