"""Protobuf's wire format by hand, as far as KServe v2 inference messages need it.

For the hot path: tensors' bytes go into and out of messages without passing through message
objects, which copy them. Invariant: `Fields` reads only what every encoder writes (shortest
varints, length-delimited fields); whatever else is legal raises `Unusual`, and the caller hands the
whole message to protobuf. So a message means the same on both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from paceline.core.tensor import ITEM_BYTES, Buffer

LENGTH_DELIMITED = 2
_LONGEST_LENGTH_BITS = 28
"""Lengths of up to 5 varint bytes; a message is below 2 GiB."""
_KEPT_LENGTHS = 1024
_LONGEST_KEPT_BYTES = 1024
_KEPT_OF_A_LENGTH = 8

T = TypeVar("T")
Range = tuple[int, int]
"""Where something begins and ends in a message."""


class Unusual(Exception):
    """Legal or not, this is protobuf's to judge."""


def tag(number: int) -> int:
    """The first byte of a length-delimited field below number 16.

    >>> tag(1)
    10
    """
    assert 0 < number < 16, number
    return number << 3 | LENGTH_DELIMITED


def varint(value: int) -> bytes:
    """A non-negative integer, shortest form.

    >>> varint(300)
    b'\\xac\\x02'
    """
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def length_delimited(number: int, content: bytes) -> bytes:
    """A whole field; nothing at all where `content` is empty, as proto3 leaves out defaults.

    >>> length_delimited(3, b"id")
    b'\\x1a\\x02id'
    """
    if not content:
        return b""
    size = len(content)
    key = number << 3 | LENGTH_DELIMITED
    if size < 0x80:
        return bytes((key, size)) + content
    return bytes((key,)) + varint(size) + content


def fields(data: Buffer, begin: int = 0) -> Iterator[tuple[int, int, int]]:
    """`(tag byte, start, end)` of each length-delimited field. Raises Unusual."""
    at, size = begin, len(data)
    while at < size:
        try:
            key, length = data[at], data[at + 1]
            at += 2
            if length > 0x7F:
                length, at = _long_length(data, at, length & 0x7F)
        except IndexError:
            raise Unusual from None
        end = at + length
        # 0x87: the field's type, and whether its number goes on in the next byte.
        if key & 0x87 != LENGTH_DELIMITED or end > size:
            raise Unusual
        yield key, at, end
        at = end


def _long_length(data: Buffer, at: int, length: int) -> tuple[int, int]:
    """A varint whose first byte was `length`, and the offset behind it. Raises Unusual."""
    shift = 7
    while True:
        byte = data[at]
        at += 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > _LONGEST_LENGTH_BITS:
            raise Unusual
    if byte == 0:
        raise Unusual
    return length, at


class Layouts(Generic[T]):
    """What messages meant that were read before. One that differs from such a message in nothing
    but the contents of its tensors (and other given `holes`) means the same, and is not read again.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[list[tuple[int, int, bytes]], T]]] = {}
        """By length: what is the same, and the meaning."""

    def find(self, data: Buffer) -> T | None:
        """What a message means, if one like it is known."""
        for fixed, meaning in self._known.get(len(data), ()):
            for start, end, same in fixed:
                if data[start:end] != same:
                    break
            else:
                return meaning
        return None

    def keep(
        self, data: Buffer, meaning: T, holes: Iterable[Range], datatypes: Iterable[str]
    ) -> None:
        """Remember a message; not where contents have any size, as hardly another one is alike."""
        if not all(datatype in ITEM_BYTES for datatype in datatypes):
            return
        fixed: list[tuple[int, int, bytes]] = []
        at = kept_bytes = 0
        for start, end in (*holes, (len(data), len(data))):
            kept_bytes += start - at
            if kept_bytes > _LONGEST_KEPT_BYTES:
                return
            fixed.append((at, start, bytes(data[at:start])))
            at = end
        if len(self._known) >= _KEPT_LENGTHS:
            self._known.clear()
        alike = self._known.setdefault(len(data), [])
        if len(alike) >= _KEPT_OF_A_LENGTH:
            alike.clear()
        alike.append((fixed, meaning))


def int64s(data: Buffer) -> tuple[int, ...]:
    """Packed non-negative int64 values. Raises Unusual, also for a negative one."""
    values: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte > 0x7F:
            shift += 7
            continue
        if (byte == 0 and shift) or value >= 1 << 63:
            raise Unusual
        values.append(value)
        value = shift = 0
    if shift:
        raise Unusual
    return tuple(values)


def text(data: Buffer) -> str:
    """A proto3 string. Raises Unusual where it is not UTF-8."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise Unusual from None


_NAME, _DATATYPE, _SHAPE = tag(1), tag(2), tag(3)


def tensor_header(data: Buffer) -> tuple[str, str, tuple[int, ...]]:
    """Name, datatype and shape of an InferInputTensor or InferOutputTensor.

    Raises Unusual where it has anything else: typed contents, parameters, a scalar twice.
    """
    name = datatype = ""
    shape: tuple[int, ...] = ()
    for key, start, end in fields(data):
        if key == _NAME:
            name = text(data[start:end])
        elif key == _DATATYPE:
            datatype = text(data[start:end])
        elif key == _SHAPE:
            shape += int64s(data[start:end])
        else:
            raise Unusual
    return name, datatype, shape


def encode_tensor_header(name: str, datatype: str, shape: Sequence[int]) -> bytes:
    """The content of an InferInputTensor or InferOutputTensor without contents.

    >>> encode_tensor_header("x", "FP32", (1, 4))
    b'\\n\\x01x\\x12\\x04FP32\\x1a\\x02\\x01\\x04'
    """
    axes = b"".join(varint(axis & 0xFFFF_FFFF_FFFF_FFFF) for axis in shape)
    return (
        length_delimited(1, name.encode())
        + length_delimited(2, datatype.encode())
        + length_delimited(3, axes)
    )
