"""KServe v2 messages to and from Paceline's requests.

Invariant: tensors stay bytes. `raw_input_contents` become `Tensor.data` without a copy, outputs
become bytes once; only typed contents (the slow way that the protocol also allows) are encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import Any

from tritonclient.grpc import service_pb2

from paceline.core.errors import ErrorKind, RequestError
from paceline.core.request import InferAnswer, InferRequest
from paceline.core.tensor import Buffer, Tensor, encode_bytes
from paceline.rpc.parameters import read_parameters
from paceline.rpc.validate import Signature, check_inputs, check_outputs

_TYPED: dict[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
"""Field of InferTensorContents and `struct` code by datatype. FP16 and BF16 have no field."""

_FIELD_DATATYPES = {
    "bool_contents": "BOOL",
    "int_contents": "INT32",
    "int64_contents": "INT64",
    "uint_contents": "UINT32",
    "uint64_contents": "UINT64",
    "fp32_contents": "FP32",
    "fp64_contents": "FP64",
    "bytes_contents": "BYTES",
}
"""What Triton calls the contents of each field."""


def infer_request(message: Any, signature: Signature, remaining_s: float | None) -> InferRequest:
    """A ModelInferRequest (protobuf's or `wire`'s) as a validated request.

    `remaining_s` is what its deadline leaves.

    Raises RequestError with Triton's message for whatever is wrong with it.
    """
    parameters = read_parameters(message.parameters, remaining_s)
    request_id = message.id
    tensors = _tensors(message, signature.name)
    check_inputs(signature, tensors, request_id)
    outputs = _requested_outputs(message, signature) if message.outputs else ()
    return InferRequest(
        signature.name,
        tensors,
        outputs,
        request_id,
        message.model_version,
        parameters.budget_s,
        parameters.priority,
        parameters.forwarded,
        parameters.stream_items,
    )


def infer_response(message: Any, version: str, answer: InferAnswer) -> Any:
    """The ModelInferResponse to `message`; `version` is the one that answered."""
    return _response(message, version, answer.outputs)


def _response(message: Any, version: str, tensors: Sequence[Tensor]) -> Any:
    response = service_pb2.ModelInferResponse(
        model_name=message.model_name,
        model_version=message.model_version or version,
        id=message.id,
    )
    outputs, contents = response.outputs, response.raw_output_contents
    for tensor in tensors:
        outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        data = tensor.data
        contents.append(data if isinstance(data, bytes) else bytes(data))
    return response


def items_response(message: Any, version: str, start: int, outputs: Sequence[Tensor]) -> Any:
    """A ModelInferResponse that holds items `start ..` of a fan-out, ahead of the full answer."""
    response = _response(message, version, outputs)
    response.parameters["paceline_first_item"].int64_param = start
    response.parameters["triton_final_response"].bool_param = False
    return response


def final_response(message: Any, version: str, answer: InferAnswer) -> Any:
    """The full answer behind `items_response`s."""
    response = infer_response(message, version, answer)
    response.parameters["triton_final_response"].bool_param = True
    return response


def _tensors(message: Any, model: str) -> tuple[Tensor, ...]:
    raw = message.raw_input_contents
    inputs = message.inputs
    if len(raw) > len(inputs):
        raise _invalid(f"{len(raw)} raw_input_contents for {len(inputs)} inputs of model '{model}'")
    tensors: list[Tensor] = []
    for index, tensor in enumerate(inputs):
        if tensor.parameters:
            _refuse_shared_memory(tensor)
        shape = tuple(tensor.shape)
        if not raw:
            data: Buffer = _typed_bytes(tensor, shape, model)
        elif tensor.HasField("contents"):
            raise _invalid(
                "contents field must not be specified when using raw_input_contents for "
                f"'{tensor.name}' for model '{model}'"
            )
        elif index < len(raw):
            data = raw[index]
        else:
            raise _no_data(tensor.name, model)
        tensors.append(Tensor(tensor.name, tensor.datatype, shape, data))
    return tuple(tensors)


def _typed_bytes(tensor: Any, shape: tuple[int, ...], model: str) -> bytes:
    """`contents` as the bytes that `raw_input_contents` would have held."""
    field, code = _TYPED.get(tensor.datatype, ("", ""))
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            expected = tensor.datatype if field or tensor.datatype in ("FP16", "BF16") else ""
            raise _invalid(
                f"unexpected explicit tensor data for input tensor '{tensor.name}' for model "
                f"'{model}' of type '{_FIELD_DATATYPES[other.name]}', expected datatype "
                f"'{expected or '<invalid>'}'"
            )
    values = getattr(tensor.contents, field) if field else ()
    if not values:
        if prod(shape) == 0:
            return b""
        raise _no_data(tensor.name, model)
    if not code:
        return encode_bytes(values)
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except struct.error:
        raise _invalid(
            f"explicit tensor data for input tensor '{tensor.name}' for model '{model}' "
            f"has a value outside the range of {tensor.datatype}"
        ) from None


def _requested_outputs(message: Any, signature: Signature) -> tuple[str, ...]:
    """Names in the order of the request, each once."""
    for output in message.outputs:
        if output.parameters:
            _refuse_shared_memory(output)
            if "classification" in output.parameters:
                raise _invalid(
                    f"output '{output.name}': the 'classification' parameter is not supported"
                )
    names = tuple(dict.fromkeys([output.name for output in message.outputs]))
    check_outputs(signature, names)
    return names


def _refuse_shared_memory(tensor: Any) -> None:
    for name in tensor.parameters:
        if name.startswith("shared_memory_"):
            raise _invalid(
                f"tensor '{tensor.name}': shared memory is not supported; "
                "send its contents in the request"
            )


def _no_data(name: str, model: str) -> RequestError:
    return _invalid(
        f"unable to find data for input tensor '{name}' for model '{model}' in request."
    )


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorKind.INVALID, message)
