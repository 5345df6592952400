"""Inference requests without tasks: unary calls and streams.

Bytes come in, the engine is told, and bytes go out when it has ended: callbacks, and no message
object wherever that is possible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tritonclient.grpc import service_pb2

from paceline.core.bind import BoundChain
from paceline.core.errors import ErrorKind, RequestError
from paceline.core.ports import Control, Inference
from paceline.core.request import InferAnswer
from paceline.core.tensor import Buffer, Tensor
from paceline.rpc import wire
from paceline.rpc.call import UnaryCall
from paceline.rpc.convert import final_response, infer_request, infer_response, items_response
from paceline.rpc.head import Metadata
from paceline.rpc.listener import GrpcServer
from paceline.rpc.status import Status, status_of
from paceline.rpc.stream import InferStream
from paceline.rpc.validate import Signature

SERVICE = "inference.GRPCInferenceService"

_SIGNATURES = 1024
_INTEGER = re.compile(r"[+-]?\d+")


class InferCalls:
    """See the module docstring; also what each chain takes and gives."""

    def __init__(self, inference: Inference, control: Control) -> None:
        self._inference = inference
        self._control = control
        self._signatures: dict[str, tuple[BoundChain, Signature]] = {}

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
            signature = self.signature(message.model_name, message.model_version)
            request = infer_request(message, signature, call.time_remaining())
            answering = _Unary(call, message, signature.version)
            number = self._inference.begin(request, answering.ended)
            call.on_cancel = partial(self._inference.cancel, number)
        except Exception as error:
            call.refuse(status_of(error))

    def _begin(self, stream: InferStream, data: Buffer, form: _Form) -> None:
        """Serve a request of a stream. What is no message ends the stream: RequestError."""
        message = form.read(data)
        answering = _Streamed(stream, message, form)
        try:
            signature = self.signature(message.model_name, message.model_version)
            answering.version = signature.version
            request = infer_request(message, signature, stream.time_remaining())
            answering.entry.number = self._inference.begin(
                request, answering.ended, answering.came if request.stream_items else None
            )
        except Exception as error:
            answering.fail(error)

    def signature(self, name: str, version: str) -> Signature:
        """Of a chain that can be called. Raises RequestError."""
        bound = self._control.callable(name, checked(version))
        kept = self._signatures.get(name)
        if kept is not None and kept[0] is bound:
            return kept[1]
        if len(self._signatures) >= _SIGNATURES:
            self._signatures.clear()
        signature = Signature.of(bound)
        self._signatures[name] = (bound, signature)
        return signature


# Who answers is an object and no closure: a compiled function that has closures makes a cycle with
# them, and so garbage of every request, with its tensors.


class _Unary:
    """Answers a call; what it raised itself would hold frames that hold it."""

    __slots__ = ("_call", "_message", "_version")

    def __init__(self, call: UnaryCall, message: Any, version: str) -> None:
        self._call = call
        self._message = message
        self._version = version

    def ended(self, outcome: InferAnswer | RequestError) -> None:
        """See `Inference.begin`."""
        if isinstance(outcome, RequestError):
            self._call.refuse(status_of(outcome))
            return
        try:
            metadata = () if self._message.id else numbered(outcome)
            parts = wire.response_parts(self._message, self._version, outcome)
            self._call.answer(parts, metadata)
        except Exception as error:
            self._call.refuse(status_of(error))


class _Streamed:
    """Answers a request of a stream."""

    __slots__ = ("_form", "_message", "_stream", "entry", "version")

    def __init__(self, stream: InferStream, message: Any, form: _Form) -> None:
        self._stream = stream
        self._message = message
        self._form = form
        self.entry = stream.enter()
        self.version = ""

    def fail(self, error: Exception) -> None:
        """End the request with what happened."""
        status = status_of(error)
        self._stream.fail(self.entry, status, [_stream_failure(self._message, status)])

    def ended(self, outcome: InferAnswer | RequestError) -> None:
        """See `Inference.begin`."""
        if isinstance(outcome, RequestError):
            self.fail(outcome)
            return
        try:
            if "stream_items" in self._message.parameters:
                final = final_response(self._message, self.version, outcome)
                parts: Sequence[Buffer] = [final.SerializeToString()]
            else:
                parts = self._form.response(self._message, self.version, outcome)
            self._stream.leave(self.entry, wire.stream_parts(parts))
        except Exception as error:
            self.fail(error)

    def came(self, start: int, outputs: tuple[Tensor, ...]) -> None:
        """See `Inference.begin`: items of a fan-out."""
        items = items_response(self._message, self.version, start, outputs)
        self._stream.write(wire.stream_parts([items.SerializeToString()]))


def numbered(answer: InferAnswer) -> Metadata:
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


def checked(version: str) -> str:
    """Raises RequestError(INVALID) for a version that is no number."""
    if not version or (version.isdecimal() and version.isascii()):
        return version
    if _INTEGER.match(version):
        text = f"invalid model version specified '{version}' , "
    else:
        text = f"failed to get model version from specified version string '{version}' "
        text += "(details: stol), "
    raise RequestError(ErrorKind.INVALID, f"{text}version should be an integral value > 0")
