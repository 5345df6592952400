"""Whether a request's tensors are what a chain takes, in Triton's words.

Invariant: a request that passes has every required input once, of the declared datatype and
shape, with bytes that fill the shape. Messages are those of Triton 2.51 for the same mistake,
so that clients which match on them keep working. Cost: a few dictionary look-ups per input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from paceline.core.bind import BoundChain
from paceline.core.errors import ErrorKind, RequestError
from paceline.core.tensor import DATATYPES, Tensor, TensorSpec, byte_size_error

_BATCH_AXIS_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be "
    "prepended to each input shape. If you want to specify the full shape including the batch dim "
    "in your input dims config, try setting max_batch_size to zero. See the model configuration "
    "docs for more info on max_batch_size."
)
_LENGTH_BYTES = 4
_KEPT_ACCEPTED = 256

VERSION = "1"
"""Chains have one version, as a model directory with nothing but `1/` has."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a chain takes and gives, arranged for checking requests."""

    name: str
    inputs: dict[str, TensorSpec]
    required: tuple[str, ...]
    outputs: frozenset[str]
    max_batch_size: int
    most_rows: int
    version: str
    """The one that answers when the client names none: the latest."""
    accepted: set[tuple[tuple[str, str, tuple[int, ...]], ...]] = field(
        default_factory=set, compare=False, repr=False
    )
    """Names, datatypes and shapes that have been found right before."""

    @classmethod
    def of(cls, bound: BoundChain) -> Signature:
        return cls(
            bound.name,
            {spec.name: spec for spec in bound.inputs},
            tuple(spec.name for spec in bound.inputs if not spec.optional),
            frozenset(spec.name for spec in bound.outputs),
            bound.max_batch_size,
            bound.most_rows,
            max(versions_of(bound), key=lambda version: (len(version), version)),
        )


def versions_of(bound: BoundChain) -> tuple[str, ...]:
    """A model under its own name has the versions of its directory, a chain has one."""
    return (bound.modules[0].spec.versions if bound.direct else ()) or (VERSION,)


def check_outputs(signature: Signature, names: Sequence[str]) -> None:
    """Raises RequestError(INVALID) for an output that the chain does not have."""
    for name in names:
        if name not in signature.outputs:
            raise _error(f"unexpected inference output '{name}' for model '{signature.name}'")


def check_inputs(signature: Signature, tensors: Sequence[Tensor], request_id: str) -> None:
    """Raises RequestError(INVALID) with Triton's message for the first thing that is wrong."""
    heads = tuple([(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors])
    if heads not in signature.accepted:
        _check_heads(signature, tensors, request_id)
        if len(signature.accepted) >= _KEPT_ACCEPTED:
            signature.accepted.clear()
        signature.accepted.add(heads)
    for tensor in tensors:
        sizes = byte_size_error(tensor)
        if sizes is not None:
            raise _error(_byte_size_message(signature.name, tensor, sizes, _prefix(request_id)))


def _prefix(request_id: str) -> str:
    return f"[request id: {request_id or '<id_unknown>'}] "


def _check_heads(signature: Signature, tensors: Sequence[Tensor], request_id: str) -> None:
    """Everything but whether the bytes fill the shapes."""
    prefix = _prefix(request_id)
    _check_names(signature, tensors, prefix)
    if signature.max_batch_size > 0:
        _check_batch_axis(signature, tensors, prefix)
    for tensor in tensors:
        spec = signature.inputs[tensor.name]
        if tensor.datatype != spec.datatype:
            got = tensor.datatype if tensor.datatype in DATATYPES else "<invalid>"
            raise _error(
                f"{prefix}inference input '{tensor.name}' data-type is '{got}', "
                f"but model '{signature.name}' expects '{spec.datatype}'"
            )
        if not spec.accepts(tensor.shape) or (tensor.shape and min(tensor.shape) < 0):
            note = _BATCH_AXIS_NOTE if signature.max_batch_size > 0 else ""
            raise _error(
                f"{prefix}unexpected shape for input '{tensor.name}' for model "
                f"'{signature.name}'. Expected {_dims(spec.shape)}, got {_dims(tensor.shape)}. "
                f"{note}"
            )


def _check_names(signature: Signature, tensors: Sequence[Tensor], prefix: str) -> None:
    got = [tensor.name for tensor in tensors]
    missing = [name for name in signature.required if name not in got]
    if len(got) < len(signature.required) or (missing and signature.inputs.keys() >= set(got)):
        raise _error(
            f"{prefix}expected {len(signature.required)} inputs but got {len(got)} inputs for "
            f"model '{signature.name}'. Got input(s) [{_quoted(got)}], but missing required "
            f"input(s) [{_quoted(missing)}]. Please provide all required input(s)."
        )
    for index, name in enumerate(got):
        if name not in signature.inputs:
            raise _error(f"unexpected inference input '{name}' for model '{signature.name}'")
        if name in got[:index]:
            raise _error(f"{prefix}input '{name}' already exists in request")


def _check_batch_axis(signature: Signature, tensors: Sequence[Tensor], prefix: str) -> None:
    rows = -1
    for tensor in tensors:
        if not tensor.shape:
            raise _error(
                f"{prefix}input '{tensor.name}' has no shape but model requires batch dimension "
                f"for '{signature.name}'"
            )
        if rows not in (-1, tensor.shape[0]):
            raise _error(
                f"{prefix}input '{tensor.name}' batch size does not match other inputs "
                f"for '{signature.name}'"
            )
        rows = tensor.shape[0]
    # Triton's words, not its limit: what is larger than a batch is split (decision 36).
    if rows > signature.most_rows:
        raise _error(
            f"{prefix}inference request batch-size must be <= {signature.most_rows} "
            f"for '{signature.name}'"
        )
    if tensors and rows < 1:
        raise _error(f"{prefix}inference request batch-size must be >= 1 for '{signature.name}'")


def _byte_size_message(model: str, tensor: Tensor, sizes: tuple[int, int], prefix: str) -> str:
    if tensor.datatype == "BYTES":
        return _string_message(model, tensor, prefix)
    return (
        f"{prefix}input byte size mismatch for input '{tensor.name}' for model '{model}'. "
        f"Expected {sizes[0]}, got {sizes[1]}"
    )


def _string_message(model: str, tensor: Tensor, prefix: str) -> str:
    """Where a BYTES tensor's elements stop making sense."""
    at, count, size = 0, 0, len(tensor.data)
    where = f"for inference input '{tensor.name}'"
    while at < size:
        if at + _LENGTH_BYTES > size:
            return (
                f"{prefix}incomplete string length indicator {where} for model '{model}', "
                f"expecting {_LENGTH_BYTES} bytes but only {size - at} bytes available. Please "
                "make sure the string length indicator is in one buffer."
            )
        length = int.from_bytes(tensor.data[at : at + _LENGTH_BYTES], "little")
        at += _LENGTH_BYTES
        if at + length > size:
            return (
                f"incomplete string data {where}, expecting string of length {length} "
                f"but only {size - at} bytes available"
            )
        at += length
        count += 1
    return (
        f"{prefix}unexpected number of string elements {count} {where} for model '{model}', "
        f"expecting {prod(tensor.shape)}"
    )


def _dims(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _quoted(names: Sequence[str]) -> str:
    return ",".join(f"'{name}'" for name in names)


def _error(message: str) -> RequestError:
    return RequestError(ErrorKind.INVALID, message)
