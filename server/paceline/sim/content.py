"""What simulated models answer: bytes that can be traced back to the request they belong to.

`row_outputs` is the whole model: a pure function of one row's inputs. Every output is derived
from a digest of the model's name and the row's bytes, so no two rows look alike, and whoever
evaluates a chain row by row knows the only right answer of a request however it was batched.

Lengths of variable axes: the leading one of several, where the model has no batch axis, is a
number of items (drawn from `items` by the digest, zero included); every other one follows the
first axis of the row's first input, so that rows of equal input shape can be stacked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from math import prod

from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall
from paceline.core.tensor import (
    ITEM_BYTES,
    BatchTensor,
    Tensor,
    TensorSpec,
    encode_bytes,
    split_rows,
)

DEFAULT_ITEMS = (0, 1, 2, 3, 5)


class TracingModels:
    """Answers `ModelCall`s for a set of models; see the module docstring."""

    def __init__(
        self, specs: Mapping[str, ModelSpec], *, items: Sequence[int] = DEFAULT_ITEMS
    ) -> None:
        self.specs = specs
        self._items = tuple(items)

    def __call__(self, call: ModelCall, rows: int) -> tuple[Tensor, ...]:
        """Outputs in the order of `call.outputs`, `rows` long where the model batches."""
        spec = self.specs[call.model]
        joined = [_joined(tensor) for tensor in call.inputs]
        if not spec.batches:
            known = self.row_outputs(spec, joined)
            return tuple(known[name] for name in call.outputs)
        split = [split_rows(tensor, [1] * rows) for tensor in joined]
        answers = [
            self.row_outputs(spec, [t.reshaped(t.shape[1:]) for t in row])
            for row in zip(*split, strict=True)
        ]
        stacked = []
        for name in call.outputs:
            first = answers[0][name]
            data = b"".join(answer[name].data for answer in answers)
            stacked.append(Tensor(name, first.datatype, (rows, *first.shape), data))
        return tuple(stacked)

    def row_outputs(self, spec: ModelSpec, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every output of the model for one row (tensors without row axis)."""
        digest = blake2b(spec.name.encode(), digest_size=16)
        for tensor in inputs:
            digest.update(repr((tensor.name, tensor.shape)).encode())
            digest.update(tensor.data)
        seed = digest.digest()
        length = next((t.shape[0] for t in inputs if t.shape), 1)
        outputs = {}
        for index, output in enumerate(spec.outputs):
            shape = self._shape(spec, output, seed, length)
            outputs[output.name] = fill(output, shape, seed + bytes([index]))
        return outputs

    def _shape(
        self, spec: ModelSpec, output: TensorSpec, seed: bytes, length: int
    ) -> tuple[int, ...]:
        shape = [length if axis < 0 else axis for axis in output.shape]
        if not spec.batches and len(shape) > 1 and output.shape[0] < 0:
            shape[0] = self._items[seed[0] % len(self._items)]
        return tuple(shape)


def fill(spec: TensorSpec, shape: tuple[int, ...], seed: bytes) -> Tensor:
    """A tensor of `shape` whose content follows from `seed` alone."""
    elements = prod(shape)
    if spec.datatype == "BYTES":
        texts = (_stream(seed + i.to_bytes(4, "little"), 8) for i in range(elements))
        data = encode_bytes(text[: 6 + text[7] % 3] for text in texts)
    elif spec.datatype == "BOOL":
        data = bytes(byte & 1 for byte in _stream(seed, elements))
    else:
        data = _stream(seed, elements * ITEM_BYTES[spec.datatype])
    return Tensor(spec.name, spec.datatype, shape, data)


def _stream(seed: bytes, size: int) -> bytes:
    """`size` bytes that follow from `seed`."""
    if size <= 64:
        return blake2b(seed, digest_size=max(size, 1)).digest()[:size]
    blocks = range(-(-size // 64))
    parts = (blake2b(seed + block.to_bytes(4, "big")).digest() for block in blocks)
    return b"".join(parts)[:size]


def _joined(tensor: BatchTensor) -> Tensor:
    return Tensor(tensor.name, tensor.datatype, tensor.shape, b"".join(tensor.parts))
