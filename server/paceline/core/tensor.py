"""Tensors as bytes: KServe v2 datatypes, joining and splitting along the row axis.

Invariant: a tensor's bytes are never decoded on the hot path. Rows are joined by collecting
parts (the transport joins them once) and split by slicing memoryviews. A BYTES tensor is a
sequence of elements, each a 4-byte little-endian length and that many bytes, as on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from paceline.core.values import value

Buffer = bytes | memoryview

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
"""Bytes of one element of each fixed-size datatype."""

DATATYPES = frozenset({*ITEM_BYTES, "BYTES"})
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor's datatype and shape; -1 is an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            known = ", ".join(sorted(DATATYPES))
            raise ValueError(f"unknown datatype {self.datatype!r}; expected one of {known}")
        if any(axis < -1 for axis in self.shape):
            raise ValueError(f"shape {list(self.shape)} has an axis below -1")

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether a concrete (or partly variable) `shape` can be this one."""
        return len(shape) == len(self.shape) and all(
            want in (-1, got) or got == -1 for want, got in zip(self.shape, shape, strict=True)
        )


@value
class Tensor:
    """A concrete tensor: `data` holds exactly `shape` elements of `datatype`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer

    def renamed(self, name: str) -> Tensor:
        """The same bytes under another name."""
        return self if name == self.name else Tensor(name, self.datatype, self.shape, self.data)

    def reshaped(self, shape: tuple[int, ...]) -> Tensor:
        """The same bytes under another shape of as many elements."""
        return Tensor(self.name, self.datatype, shape, self.data)


@value
class BatchTensor:
    """A tensor whose bytes are still in parts, one or more per request; joined once, when sent."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parts: tuple[Buffer, ...]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.parts))


def byte_size_error(tensor: Tensor) -> tuple[int, int] | None:
    """`(expected, got)` bytes where the data does not fill the shape, else None."""
    elements = prod(tensor.shape)
    item = ITEM_BYTES.get(tensor.datatype)
    if item is not None:
        expected = elements * item
        return None if expected == len(tensor.data) else (expected, len(tensor.data))
    try:
        end = _skip_elements(tensor.data, 0, elements)
    except ValueError:
        return (len(tensor.data) + 1, len(tensor.data))
    return None if end == len(tensor.data) else (end, len(tensor.data))


def row_slice(tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows `start .. start + count` of axis 0, without copying.

    >>> t = Tensor("x", "INT16", (3, 2), bytes(range(12)))
    >>> bytes(row_slice(t, 1, 1).data)
    b'\\x04\\x05\\x06\\x07'
    """
    rows, rest = tensor.shape[0], tensor.shape[1:]
    assert 0 <= start <= start + count <= rows, (tensor.shape, start, count)
    if count == rows:
        return tensor
    view = memoryview(tensor.data)
    item = ITEM_BYTES.get(tensor.datatype)
    if item is not None:
        row_bytes = item * prod(rest)
        begin, end = start * row_bytes, (start + count) * row_bytes
    else:
        row_elements = prod(rest)
        begin = _skip_elements(view, 0, start * row_elements)
        end = _skip_elements(view, begin, count * row_elements)
    return Tensor(tensor.name, tensor.datatype, (count, *rest), view[begin:end])


def split_rows(tensor: Tensor, counts: Iterable[int]) -> list[Tensor]:
    """Consecutive row ranges of the given lengths; walks a BYTES tensor once.

    Raises ValueError when the lengths do not add up to axis 0.
    """
    counts = list(counts)
    if not tensor.shape or sum(counts) != tensor.shape[0]:
        raise ValueError(f"shape {list(tensor.shape)} does not hold {sum(counts)} rows")
    if len(counts) == 1:
        return [tensor]
    view = memoryview(tensor.data)
    rest = tensor.shape[1:]
    row_elements = prod(rest)
    item = ITEM_BYTES.get(tensor.datatype)
    pieces: list[Tensor] = []
    begin = 0
    for count in counts:
        if item is not None:
            end = begin + count * row_elements * item
        else:
            end = _skip_elements(view, begin, count * row_elements)
        pieces.append(Tensor(tensor.name, tensor.datatype, (count, *rest), view[begin:end]))
        begin = end
    return pieces


def batch_rows(tensors: Sequence[Tensor]) -> BatchTensor:
    """Tensors of equal name, datatype and row shape, stacked along axis 0 (not yet copied)."""
    first = tensors[0]
    rows = sum(tensor.shape[0] for tensor in tensors)
    return BatchTensor(
        first.name, first.datatype, (rows, *first.shape[1:]), tuple(t.data for t in tensors)
    )


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of equal row shape as one; copies only when there is more than one.

    Raises ValueError when the row shapes differ: they cannot be one tensor.
    """
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0]
    if any(t.shape[1:] != first.shape[1:] or t.datatype != first.datatype for t in tensors):
        shapes = sorted({str(list(t.shape[1:])) for t in tensors})
        raise ValueError(f"items of {first.name!r} differ in shape: {', '.join(shapes)}")
    joined = batch_rows(tensors)
    return Tensor(joined.name, joined.datatype, joined.shape, b"".join(joined.parts))


def bytes_elements(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor, in row-major order."""
    view = memoryview(tensor.data)
    elements: list[bytes] = []
    at = 0
    for _ in range(prod(tensor.shape)):
        end = _skip_elements(view, at, 1)
        elements.append(bytes(view[at + _LENGTH_BYTES : end]))
        at = end
    return elements


def encode_bytes(elements: Iterable[bytes]) -> bytes:
    """BYTES elements as they travel: each with its 4-byte little-endian length before it.

    >>> encode_bytes([b"ab", b""])
    b'\\x02\\x00\\x00\\x00ab\\x00\\x00\\x00\\x00'
    """
    return b"".join(len(e).to_bytes(_LENGTH_BYTES, "little") + e for e in elements)


def _skip_elements(data: Buffer, at: int, count: int) -> int:
    """The offset behind `count` BYTES elements that start at `at`; ValueError if they run out."""
    size = len(data)
    for _ in range(count):
        if at + _LENGTH_BYTES > size:
            raise ValueError("a BYTES element is cut off")
        at += _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
    if at > size:
        raise ValueError("a BYTES element is cut off")
    return at
