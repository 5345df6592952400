"""Protobuf's wire format by hand, as far as KServe v2 inference messages need it.

For the hot path: tensors' bytes go into and out of messages without passing through message
objects, which copy them. Invariant: `Fields` reads only what every encoder writes (shortest
varints, length-delimited fields); whatever else is legal raises `Unusual`, and the caller hands the
whole message to protobuf. So a message means the same on both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paceline.core.tensor import Buffer

LENGTH_DELIMITED = 2
_LONGEST_LENGTH_BITS = 28
"""Lengths of up to 5 varint bytes; a message is below 2 GiB."""


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
    return bytes((tag(number),)) + varint(len(content)) + content if content else b""


def fields(data: Buffer, begin: int = 0) -> Iterator[tuple[int, int, int]]:
    """`(tag byte, start, end)` of each length-delimited field. Raises Unusual."""
    at, size = begin, len(data)
    while at < size:
        try:
            key, length = data[at], data[at + 1]
            at += 2
            if length > 0x7F:
                length &= 0x7F
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
        except IndexError:
            raise Unusual from None
        end = at + length
        if key & 7 != LENGTH_DELIMITED or key > 0x7F or end > size:
            raise Unusual
        yield key, at, end
        at = end


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
