"""ModelInferRequest and ModelInferResponse towards Triton as bytes.

Invariant: `infer_request` gives parts that together are the serialized message, in which every
tensor part appears as it is (nothing is copied); `read_response` reads what protobuf would, and
leaves to protobuf what is unusual (typed contents).
Batches repeat themselves: what does not change from one to the next is encoded, or read, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from paceline.core.errors import BackendError, ErrorKind
from paceline.core.ports import ModelCall
from paceline.core.request import Parameter
from paceline.core.tensor import Buffer, Tensor
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
from paceline.triton.contents import typed_bytes

INT32_MAX = 2**31 - 1
_RAW_INPUT = bytes((tag(7),))
_MODEL, _VERSION, _ID, _PARAMETER, _OUTPUT, _RAW = (tag(number) for number in range(1, 7))
_KEPT = 1024
_ADVICE = "it answers with what is no ModelInferResponse; is it a Triton?"

_Output = tuple[str, str, tuple[int, ...], int, int]
"""Name, datatype and shape of an output, and where its contents are; 0, 0: in shared memory."""

_heads: dict[tuple[Any, ...], bytes] = {}
_answers: Layouts[list[_Output]] = Layouts()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are in registered shared memory."""

    region: str
    offset: int
    size_bytes: int


def infer_request(
    call: ModelCall, inputs: Sequence[Place] = (), outputs: Sequence[Place] = ()
) -> list[Buffer]:
    """The parts of a serialized ModelInferRequest: raw contents, or places instead of them.

    Raises BackendError (INVALID) above what one gRPC message can hold.
    """
    parts: list[Buffer] = [_head(call, inputs, outputs)]
    if call.request_id:
        parts.append(length_delimited(3, call.request_id.encode()))
    if call.parameters:
        parts.append(_parameters(call.parameters))
    if not inputs:
        for tensor in call.inputs:
            parts.append(_RAW_INPUT + varint(tensor.size_bytes))
            parts += tensor.parts
    size_bytes = sum(map(len, parts))
    if size_bytes > INT32_MAX:
        raise BackendError(
            f"a batch of {size_bytes} bytes for model {call.model!r} is above gRPC's limit of "
            f"{INT32_MAX}",
            kind=ErrorKind.INVALID,
        )
    return parts


def encode_infer_request(call: ModelCall) -> bytes:
    """A serialized ModelInferRequest with raw contents. Raises BackendError (INVALID)."""
    return b"".join(infer_request(call))


def read_response(data: Buffer) -> dict[str, Tensor]:
    """Outputs by name, views into `data`; an output without contents (it is in shared memory)
    has none. Raises BackendError."""
    try:
        return _parse(data)
    except Unusual:
        pass
    try:
        response = service_pb2.ModelInferResponse.FromString(bytes(data))
    except DecodeError:
        raise BackendError(_ADVICE) from None
    return decode_infer_response(response)


def decode_infer_response(response: Any) -> dict[str, Tensor]:
    """Outputs of a ModelInferResponse by name, raw or typed. Raises BackendError."""
    raw = response.raw_output_contents
    tensors: dict[str, Tensor] = {}
    placed = [output for output in response.outputs if _placed(output)]
    if raw and len(raw) != len(response.outputs) - len(placed):
        raise _miscounted(response.model_name, len(response.outputs), len(raw))
    contents = iter(raw)
    for output in response.outputs:
        if _placed(output):
            data = b""
        else:
            data = next(contents) if raw else typed_bytes(output.datatype, output.contents)
        tensors[output.name] = Tensor(output.name, output.datatype, tuple(output.shape), data)
    return tensors


def _placed(output: Any) -> bool:
    return "shared_memory_region" in output.parameters


def _parse(data: Buffer) -> dict[str, Tensor]:
    view = memoryview(data)
    outputs = _answers.find(view)
    if outputs is None:
        outputs = _outputs(view)
        holes = [(start, end) for *_, start, end in outputs if end]
        _answers.keep(view, outputs, holes, [datatype for _, datatype, *_ in outputs])
    return {
        name: Tensor(name, datatype, shape, view[start:end])
        for name, datatype, shape, start, end in outputs
    }


def _outputs(view: memoryview) -> list[_Output]:
    """Raises Unusual, and BackendError where there are not as many contents as outputs."""
    model = ""
    headers: list[tuple[str, str, tuple[int, ...], bool]] = []
    raw: list[Range] = []
    for key, start, end in fields(view):
        if key == _RAW:
            raw.append((start, end))
        elif key == _OUTPUT:
            headers.append(_output_header(bytes(view[start:end])))
        elif key == _MODEL:
            model = text(view[start:end])
        elif key == _PARAMETER:
            _check_parameter(bytes(view[start:end]))
        elif key not in (_VERSION, _ID):
            raise Unusual
        else:
            text(view[start:end])
    sent = sum([not placed for *_, placed in headers])
    if sent and not raw:
        raise Unusual
    if raw and len(raw) != sent:
        raise _miscounted(model, len(headers), len(raw))
    contents = iter(raw)
    return [
        (name, datatype, shape, *((0, 0) if placed else next(contents)))
        for name, datatype, shape, placed in headers
    ]


def _output_header(header: bytes) -> tuple[str, str, tuple[int, ...], bool]:
    """Name, datatype, shape, and whether the contents are in shared memory. Raises Unusual."""
    try:
        return (*tensor_header(header), False)
    except Unusual:
        pass
    try:
        output = service_pb2.ModelInferResponse.InferOutputTensor.FromString(header)
    except DecodeError:
        raise Unusual from None
    if not _placed(output):
        raise Unusual
    return output.name, output.datatype, tuple(output.shape), True


def _check_parameter(entry: bytes) -> None:
    """Of the response: ensembles have three that say nothing. Raises Unusual for what is none."""
    try:
        field = bytes((_PARAMETER,)) + varint(len(entry)) + entry
        service_pb2.ModelInferResponse.FromString(field)
    except DecodeError:
        raise Unusual from None


def _miscounted(model: str, outputs: int, raw: int) -> BackendError:
    return BackendError(f"model {model!r} answered {outputs} outputs with {raw} raw contents")


def _head(call: ModelCall, inputs: Sequence[Place], outputs: Sequence[Place]) -> bytes:
    """Everything but id, parameters and contents."""
    tensors = tuple([(t.name, t.datatype, t.shape) for t in call.inputs])
    key = (call.model, call.version, tensors, call.outputs, tuple(inputs), tuple(outputs))
    known = _heads.get(key)
    if known is None:
        known = length_delimited(1, call.model.encode())
        known += length_delimited(2, call.version.encode())
        for index, (name, datatype, shape) in enumerate(tensors):
            header = encode_tensor_header(name, datatype, shape)
            if inputs:
                header += _place(4, inputs[index])
            known += bytes((tag(5),)) + varint(len(header)) + header
        for index, name in enumerate(call.outputs):
            header = length_delimited(1, name.encode())
            if outputs:
                header += _place(2, outputs[index])
            known += bytes((tag(6),)) + varint(len(header)) + header
        if len(_heads) >= _KEPT:
            _heads.clear()
        _heads[key] = known
    return known


def _place(number: int, place: Place) -> bytes:
    """Triton's shared memory parameters in the map field `number` of a tensor."""
    region = service_pb2.InferParameter(string_param=place.region)
    size = service_pb2.InferParameter(int64_param=place.size_bytes)
    offset = service_pb2.InferParameter(int64_param=place.offset)
    entries = (
        ("shared_memory_region", region),
        ("shared_memory_byte_size", size),
        ("shared_memory_offset", offset),
    )
    return b"".join(
        length_delimited(
            number,
            length_delimited(1, key.encode()) + length_delimited(2, value.SerializeToString()),
        )
        for key, value in entries
    )


def _parameters(parameters: Mapping[str, Parameter]) -> bytes:
    message = service_pb2.ModelInferRequest()
    for key, value in parameters.items():
        _set_parameter(message.parameters[key], value)
    serialized: bytes = message.SerializeToString()
    return serialized


def _set_parameter(slot: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        slot.bool_param = value
    elif isinstance(value, int):
        slot.int64_param = value
    elif isinstance(value, float):
        slot.double_param = value
    else:
        slot.string_param = value
