"""inference.GRPCInferenceService (KServe v2) in front of `Inference` and `Control`.

Invariant: a chain is a model. Unmodified Triton clients see Triton: the same messages, codes and
order of checks. Handlers await the port directly, so a client that goes away cancels its request.
The messages are those that ship in `tritonclient.grpc`: a second copy in a process collides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from paceline import __version__
from paceline.core import ports
from paceline.core.bind import BoundChain
from paceline.core.errors import ErrorKind, RequestError
from paceline.core.ports import Control, Inference
from paceline.core.request import InferAnswer
from paceline.core.tensor import Buffer, Tensor
from paceline.rpc import describe, wire
from paceline.rpc.call import UnaryCall
from paceline.rpc.context import CallContext
from paceline.rpc.convert import (
    final_response,
    infer_request,
    infer_response,
    items_response,
)
from paceline.rpc.head import Metadata
from paceline.rpc.listener import GrpcServer
from paceline.rpc.status import Status, abort, answered, status_of
from paceline.rpc.stream import InferStream
from paceline.rpc.validate import Signature

SERVICE = "inference.GRPCInferenceService"

_SIGNATURES = 1024
_INTEGER = re.compile(r"[+-]?\d+")


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The servicer."""

    def __init__(self, inference: Inference, control: Control) -> None:
        self._inference = inference
        self._control = control
        self._signatures: dict[str, tuple[BoundChain, Signature]] = {}

    # Inference

    def add_handlers(self, server: GrpcServer, *, raw: bool) -> None:
        """Inference without tasks; to be registered before the servicer itself.

        `raw` reads and writes serialized messages without protobuf wherever that is possible.
        """
        if raw:
            server.add_unary(f"/{SERVICE}/ModelInfer", self._raw_infer)
        begin = partial(self._begin, form=_RAW if raw else _PROTOBUF)
        stream = partial(InferStream, begin=begin, cancel=self._inference.cancel)
        server.add_calls(f"/{SERVICE}/ModelStreamInfer", stream)

    def _raw_infer(self, call: UnaryCall, data: Buffer) -> None:
        """The hot path: no task, no message object."""
        try:
            message = wire.read_request(data)
            signature = self._signature(message.model_name, message.model_version)
            request = infer_request(message, signature, call.time_remaining())

            def on_end(outcome: InferAnswer | RequestError) -> None:
                # Raised here it would hold frames that hold it.
                if isinstance(outcome, RequestError):
                    call.refuse(status_of(outcome))
                    return
                try:
                    metadata = () if message.id else _number(outcome)
                    call.answer(wire.response_parts(message, signature.version, outcome), metadata)
                except Exception as error:
                    call.refuse(status_of(error))

            number = self._inference.begin(request, on_end)
            call.on_cancel = partial(self._inference.cancel, number)
        except Exception as error:
            call.refuse(status_of(error))

    def _begin(self, stream: InferStream, data: Buffer, form: _Form) -> None:
        """Serve a request of a stream. What is no message ends the stream: RequestError."""
        message = form.read(data)
        entry = stream.enter()

        def fail(error: Exception) -> None:
            status = status_of(error)
            stream.fail(entry, status, [_stream_failure(message, status)])

        def on_end(outcome: InferAnswer | RequestError) -> None:
            if isinstance(outcome, RequestError):
                fail(outcome)
                return
            try:
                if "stream_items" in message.parameters:
                    final = final_response(message, signature.version, outcome)
                    parts: Sequence[Buffer] = [final.SerializeToString()]
                else:
                    parts = form.response(message, signature.version, outcome)
                stream.leave(entry, wire.stream_parts(parts))
            except Exception as error:
                fail(error)

        def on_partial(start: int, outputs: tuple[Tensor, ...]) -> None:
            items = items_response(message, signature.version, start, outputs)
            stream.write(wire.stream_parts([items.SerializeToString()]))

        try:
            signature = self._signature(message.model_name, message.model_version)
            request = infer_request(message, signature, stream.time_remaining())
            entry.number = self._inference.begin(
                request, on_end, on_partial if request.stream_items else None
            )
        except Exception as error:
            fail(error)

    async def ModelInfer(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._unary(request, context))

    async def infer(self, request: Any, remaining_s: float | None) -> Any:
        """A ModelInferRequest as a ModelInferResponse. RequestError."""
        answer, version = await self._serve(request, remaining_s)
        return infer_response(request, version, answer)

    async def _unary(self, request: Any, context: CallContext) -> Any:
        answer, version = await self._serve(request, context.time_remaining())
        if not request.id:
            context.set_trailing_metadata(_number(answer))
        return infer_response(request, version, answer)

    async def _serve(self, message: Any, remaining_s: float | None) -> tuple[InferAnswer, str]:
        """The answer, and the version that gave it when the client named none."""
        signature = self._signature(message.model_name, message.model_version)
        request = infer_request(message, signature, remaining_s)
        return await self._inference.infer(request), signature.version

    def _signature(self, name: str, version: str) -> Signature:
        bound = self._control.callable(name, _checked(version))
        kept = self._signatures.get(name)
        if kept is not None and kept[0] is bound:
            return kept[1]
        if len(self._signatures) >= _SIGNATURES:
            self._signatures.clear()
        signature = Signature.of(bound)
        self._signatures[name] = (bound, signature)
        return signature

    # Health, metadata, statistics

    async def ServerLive(self, request: Any, context: CallContext) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: CallContext) -> Any:
        ready = self._control.ready and not self._control.draining
        return service_pb2.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._model_ready(request))

    async def _model_ready(self, request: Any) -> Any:
        version = _checked(request.version)
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
        bound = self._control.callable(request.name, _checked(request.version))
        return what(bound)

    async def ModelStatistics(self, request: Any, context: CallContext) -> Any:
        return await answered(context, self._statistics(request))

    async def _statistics(self, request: Any) -> Any:
        response = service_pb2.ModelStatisticsResponse()
        for counts in self._counts(request.name, _checked(request.version)):
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


def _number(answer: InferAnswer) -> Metadata:
    """An answer to a request without an id says by which number `explain` knows it."""
    return (("paceline-request-id", str(answer.timeline.request)),)


@dataclass(frozen=True, slots=True)
class _Form:
    """How the messages of streams are read and written."""

    read: Callable[[Buffer], Any]
    response: Callable[[Any, str, InferAnswer], Sequence[Buffer]]


def _response(message: Any, version: str, answer: InferAnswer) -> Sequence[Buffer]:
    return [infer_response(message, version, answer).SerializeToString()]


_RAW = _Form(wire.read_request, wire.response_parts)
_PROTOBUF = _Form(wire.read_protobuf, _response)


def _stream_failure(request: Any, status: Status) -> bytes:
    """A failure carries the id of its request in an otherwise empty response, as Triton's does; why
    and when to try again, which a call of its own has in its trailers, in that one's parameters.
    """
    response = service_pb2.ModelStreamInferResponse(error_message=status.details)
    response.infer_response.id = request.id
    for key, text in status.metadata:
        response.infer_response.parameters[key].string_param = text
    data: bytes = response.SerializeToString()
    return data


def _checked(version: str) -> str:
    """Raises RequestError(INVALID) for a version that is no number."""
    if not version or (version.isdecimal() and version.isascii()):
        return version
    if _INTEGER.match(version):
        text = f"invalid model version specified '{version}' , "
    else:
        text = f"failed to get model version from specified version string '{version}' "
        text += "(details: stol), "
    raise RequestError(ErrorKind.INVALID, f"{text}version should be an integral value > 0")


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
