"""Typed tensor contents (KServe's InferTensorContents) as raw bytes.

Triton always answers with raw contents; other KServe v2 servers may not. FP16 and BF16 have no
typed form in the protocol.
"""

from __future__ import annotations

import struct
from typing import Any

from paceline.core.errors import BackendError
from paceline.core.tensor import encode_bytes

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
}
"""Datatype -> (field of InferTensorContents, struct code of one element)."""


def typed_bytes(datatype: str, contents: Any) -> bytes:
    """The elements of `contents`, little-endian. Raises BackendError for what has no typed form."""
    if datatype == "BYTES":
        return encode_bytes(contents.bytes_contents)
    if datatype not in _TYPED:
        raise BackendError(f"typed contents of datatype {datatype!r} do not exist in KServe v2")
    field, code = _TYPED[datatype]
    elements = getattr(contents, field)
    try:
        return struct.pack(f"<{len(elements)}{code}", *elements)
    except struct.error as error:
        raise BackendError(f"typed contents do not fit datatype {datatype}: {error}") from None
