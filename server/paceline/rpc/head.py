"""A gRPC request's headers, read once for all calls that send the same ones."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Final, Generic, TypeVar
from urllib.parse import quote

from paceline.http2 import hpack

M = TypeVar("M")
Metadata = tuple[tuple[str, str | bytes], ...]

ENCODINGS = ("identity", "deflate", "gzip")
"""Of messages; answers are never compressed."""

_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_NAME = re.compile(r"[0-9a-z_.\-]+", re.ASCII)
_NOT_METADATA = frozenset(
    ("te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding")
)
_OF_A_CONNECTION = frozenset(("connection", "proxy-connection", "keep-alive", "upgrade"))
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class Head(Generic[M]):
    """`method` is None for a path that is not served; `http_status` is other than 200 for what is
    no gRPC."""

    __slots__ = ("encoding", "http_status", "metadata", "method", "path", "timeout_s")

    def __init__(
        self,
        path: str,
        method: M | None,
        metadata: Metadata,
        timeout_s: float | None = None,
        encoding: str = "identity",
        http_status: int = 200,
    ) -> None:
        self.path: Final = path
        self.method: Final = method
        self.metadata: Final = metadata
        self.timeout_s: Final = timeout_s
        self.encoding: Final = encoding
        self.http_status: Final = http_status


def read_head(headers: list[hpack.Header], method: Callable[[str, Metadata], M | None]) -> Head[M]:
    """Raises ValueError for what is no HTTP/2 request, or no valid gRPC metadata."""
    special: dict[str, str] = {}
    others: dict[str, str] = {}
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith(":"):
            if name in special or others or metadata:
                raise ValueError(f"{name} twice, or behind other headers")
            special[name] = value
        elif not _NAME.fullmatch(name) or name in _OF_A_CONNECTION:
            raise ValueError(f"a header {name!r}")
        elif name in _NOT_METADATA:
            others[name] = value
        elif name.endswith("-bin"):
            metadata += [(name, _binary(part)) for part in value.split(",")]
        else:
            metadata.append((name, value))
    if not special.keys() >= {":method", ":scheme", ":path"} or special.keys() - {
        *(":method", ":scheme", ":path", ":authority"),
    }:
        raise ValueError("pseudo-headers are missing, or unknown")
    told = tuple(metadata)
    path = special[":path"]
    return Head(
        path,
        method(path, told),
        told,
        _timeout_s(others.get("grpc-timeout")),
        others.get("grpc-encoding", "identity"),
        _http_status(special[":method"], others.get("content-type", "")),
    )


def encode_metadata(metadata: Metadata) -> bytes:
    """A header block. Raises ValueError for what cannot be metadata."""
    found: list[hpack.Header] = []
    for name, value in metadata:
        if not _NAME.fullmatch(name) or name in _NOT_METADATA or name.startswith("grpc-"):
            raise ValueError(f"no name of metadata: {name!r}")
        if name.endswith("-bin"):
            data = value.encode() if isinstance(value, str) else value
            found.append((name, base64.b64encode(data).rstrip(b"=").decode()))
        else:
            text = value if isinstance(value, str) else value.decode("latin-1")
            if not text.isascii() or not text.isprintable():
                raise ValueError(f"metadata {name!r} has a value that is not printable ASCII")
            found.append((name, text))
    return hpack.encode(found)


def encode_message(text: str) -> str:
    """`grpc-message`: percent-encoded UTF-8."""
    return quote(text, safe=_PRINTABLE, errors="replace")


def _timeout_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise ValueError(f"grpc-timeout {text!r}")
    return int(match[1]) * _UNITS_S[match[2]]


def _http_status(method: str, content_type: str) -> int:
    if method != "POST":
        return 405
    kind = content_type.partition(";")[0].strip()
    grpc = kind == "application/grpc" or kind.startswith("application/grpc+")
    return 200 if grpc else 415


def _binary(text: str) -> bytes:
    try:
        return base64.b64decode(text.strip() + "=" * (-len(text.strip()) % 4), validate=True)
    except binascii.Error:
        raise ValueError("binary metadata that is not base64") from None
