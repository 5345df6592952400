"""ModelInferRequest in and ModelInferResponse out as bytes, without protobuf objects.

Invariant: a request read here is the one that protobuf would parse; what `parse_request` does not
know (typed contents, tensors' parameters, unknown fields, odd encodings) it leaves to protobuf, and
what protobuf refuses is refused. A response is byte for byte what protobuf would serialize.
Clients repeat themselves: a request that differs from an earlier one in its id, its parameters and
its tensors' contents only is not parsed again; else the header of a tensor is looked up by its
bytes. So are parameters, which protobuf reads on their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from paceline.core.errors import ErrorKind, RequestError
from paceline.core.request import InferAnswer
from paceline.core.tensor import Buffer
from paceline.core.wire import (
    Layouts,
    Range,
    Unusual,
    encode_tensor_header,
    fields,
    length_delimited,
    tag,
    tensor_header,
    text,
    varint,
)

_MODEL, _VERSION, _ID, _PARAMETER, _INPUT, _OUTPUT, _RAW = (tag(n) for n in range(1, 8))
_ANSWERED_RAW = bytes((tag(6),))
_STREAM_RESPONSE = bytes((tag(2),))
_VIEW_BYTES = 4096
"""Contents from this size on are views into the message; copying less costs less."""
_KEPT_HEADERS = 4096
_LONGEST_KEPT_BYTES = 1024

_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class WireTensor:
    """An input's header; stands where protobuf's InferInputTensor would."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NONE)

    def HasField(self, name: str) -> bool:
        """Never typed contents."""
        return False


@dataclass(frozen=True, slots=True)
class WireOutput:
    """A requested output."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NONE)


@dataclass(slots=True)
class WireRequest:
    """What protobuf's ModelInferRequest offers, as far as Paceline reads it."""

    model_name: str
    model_version: str
    id: str
    inputs: Sequence[WireTensor]
    outputs: Sequence[WireOutput]
    raw_input_contents: Sequence[Buffer]
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Request:
    """What requests have in common that differ in their id, their parameters and their tensors'
    contents only; those by where they are."""

    model: str
    version: str
    identity: Range
    parameters: tuple[Range, ...]
    inputs: tuple[WireTensor, ...]
    outputs: tuple[WireOutput, ...]
    contents: tuple[Range, ...]


_requests: Layouts[_Request] = Layouts()
_headers: dict[bytes, WireTensor] = {}
_parameters: dict[bytes, Mapping[str, Any]] = {}
_answered_headers: dict[tuple[str, str, tuple[int, ...]], bytes] = {}
_answered_names: dict[tuple[str, str], bytes] = {}


def read_request(data: Buffer) -> Any:
    """A WireRequest, or protobuf's ModelInferRequest where the message is unusual.

    Raises RequestError (INTERNAL, gRPC's own words) for bytes that are no ModelInferRequest.
    """
    try:
        return parse_request(data)
    except Unusual:
        return read_protobuf(data)


def read_protobuf(data: Buffer) -> Any:
    """Protobuf's ModelInferRequest. Raises RequestError for what is none."""
    try:
        return service_pb2.ModelInferRequest.FromString(bytes(data))
    except DecodeError:
        raise RequestError(ErrorKind.INTERNAL, "Exception deserializing request!") from None


def parse_request(data: Buffer) -> WireRequest:
    """Raises Unusual for what is protobuf's to judge."""
    known = _requests.find(data)
    if known is None:
        known = _request(data)
        holes = sorted((known.identity, *known.parameters, *known.contents))
        _requests.keep(data, known, holes, [tensor.datatype for tensor in known.inputs])
    view = memoryview(data) if len(data) > _VIEW_BYTES else data
    raw: list[Buffer] = []
    for start, end in known.contents:
        contents = view[start:end]
        raw.append(contents if end - start > _VIEW_BYTES else bytes(contents))
    start, end = known.identity
    identity = text(data[start:end]) if end else ""
    stated = _stated(data, known.parameters) if known.parameters else _NONE
    return WireRequest(
        known.model, known.version, identity, known.inputs, known.outputs, raw, stated
    )


def _request(data: Buffer) -> _Request:
    """Everything but what differs from one request to the next. Raises Unusual."""
    model = version = ""
    identity = (0, 0)
    inputs: list[WireTensor] = []
    outputs: list[WireOutput] = []
    parameters: list[Range] = []
    contents: list[Range] = []
    for key, start, end in fields(data):
        if key == _RAW:
            contents.append((start, end))
        elif key == _INPUT:
            inputs.append(_input(bytes(data[start:end])))
        elif key == _MODEL:
            model = text(data[start:end])
        elif key == _ID:
            text(data[start:end])
            identity = (start, end)
        elif key == _OUTPUT:
            outputs.append(_output(bytes(data[start:end])))
        elif key == _VERSION:
            version = text(data[start:end])
        elif key == _PARAMETER and end > start:
            parameters.append((start, end))
        else:
            raise Unusual
    if inputs and not contents:
        raise Unusual
    return _Request(
        model,
        version,
        identity,
        tuple(parameters),
        tuple(inputs),
        tuple(outputs),
        tuple(contents),
    )


def response_parts(message: Any, version: str, answer: InferAnswer) -> list[Buffer]:
    """The serialized ModelInferResponse to `message`, not joined; `version` is the one that
    answered."""
    head = _answered_name(message.model_name, message.model_version or version)
    if message.id:
        head += length_delimited(3, message.id.encode())
    parts: list[Buffer] = [head]
    contents: list[Buffer] = []
    for tensor in answer.outputs:
        parts.append(_answered_header(tensor.name, tensor.datatype, tensor.shape))
        contents.append(_ANSWERED_RAW + varint(len(tensor.data)))
        contents.append(tensor.data)
    return parts + contents


def stream_parts(parts: Sequence[Buffer]) -> list[Buffer]:
    """The serialized ModelStreamInferResponse around the ModelInferResponse made of `parts`."""
    return [_STREAM_RESPONSE + varint(sum(map(len, parts))), *parts]


def _stated(data: Buffer, ranges: Sequence[Range]) -> Mapping[str, Any]:
    """The request's own parameters: protobuf's, of a message that has nothing else.

    Raises Unusual for what are none.
    """
    entries = b"".join(
        [length_delimited(_PARAMETER >> 3, bytes(data[start:end])) for start, end in ranges]
    )
    known = _parameters.get(entries)
    if known is None:
        try:
            known = dict(service_pb2.ModelInferRequest.FromString(entries).parameters)
        except DecodeError:
            raise Unusual from None
        if len(entries) <= _LONGEST_KEPT_BYTES:
            if len(_parameters) >= _KEPT_HEADERS:
                _parameters.clear()
            _parameters[entries] = known
    return known


def _input(header: bytes) -> WireTensor:
    known = _headers.get(header)
    if known is None:
        known = WireTensor(*tensor_header(header))
        if len(header) <= _LONGEST_KEPT_BYTES:
            if len(_headers) >= _KEPT_HEADERS:
                _headers.clear()
            _headers[header] = known
    return known


def _output(header: bytes) -> WireOutput:
    name = ""
    for key, start, end in fields(header):
        if key != _MODEL:
            raise Unusual
        name = text(header[start:end])
    return WireOutput(name)


def _answered_name(model: str, version: str) -> bytes:
    """The fields that tell who has answered."""
    known = _answered_names.get((model, version))
    if known is None:
        known = length_delimited(1, model.encode()) + length_delimited(2, version.encode())
        if len(_answered_names) >= _KEPT_HEADERS:
            _answered_names.clear()
        _answered_names[model, version] = known
    return known


def _answered_header(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    known = _answered_headers.get((name, datatype, shape))
    if known is None:
        content = encode_tensor_header(name, datatype, shape)
        # Also where it is empty: the field is there, once per output.
        known = bytes((tag(5),)) + varint(len(content)) + content
        if len(_answered_headers) >= _KEPT_HEADERS:
            _answered_headers.clear()
        _answered_headers[name, datatype, shape] = known
    return known
