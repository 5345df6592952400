"""HTTP/2's frames (RFC 9113): codes, limits, and the bytes of those that both sides send."""

from __future__ import annotations

import struct
from enum import IntEnum

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
MAX_WINDOW = 2**31 - 1
"""Also the largest stream identifier, and the mask of its reserved bit."""
FIRST_WINDOW = 65_535
LEAST_FRAME_BYTES = 16_384
"""What every peer takes until it says otherwise."""
MAX_FRAME_BYTES = 2**24 - 1

HEADER = struct.Struct(">HBBBI")
SETTING = struct.Struct(">HI")
_WORD = struct.Struct(">I")


class Setting(IntEnum):
    """Keys of SETTINGS."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Why a stream is reset or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11


class ProtocolError(Exception):
    """The peer does not keep to HTTP/2: the connection ends with this code."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        self.code = code
        super().__init__(message)


def header(kind: int, flags: int, stream: int, size: int) -> bytes:
    """The 9 bytes before `size` bytes of payload.

    >>> header(DATA, END_STREAM, 3, 70_000).hex()
    '011170000100000003'
    """
    return HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream)


def headers(stream: int, block: bytes, flags: int = 0) -> bytes:
    """A header block as HEADERS and, above what every peer takes in one frame, CONTINUATIONs."""
    size = len(block)
    if size <= LEAST_FRAME_BYTES:
        return HEADER.pack(size >> 8, size & 0xFF, HEADERS, flags | END_HEADERS, stream) + block
    pieces = []
    kind = HEADERS
    for at in range(0, size, LEAST_FRAME_BYTES):
        piece = block[at : at + LEAST_FRAME_BYTES]
        last = END_HEADERS if at + LEAST_FRAME_BYTES >= size else 0
        pieces.append(header(kind, flags | last, stream, len(piece)) + piece)
        kind, flags = CONTINUATION, 0
    return b"".join(pieces)


def settings(values: dict[Setting, int]) -> bytes:
    """SETTINGS with these values."""
    payload = b"".join(SETTING.pack(key, value) for key, value in values.items())
    return header(SETTINGS, 0, 0, len(payload)) + payload


def window_update(stream: int, increment: int) -> bytes:
    """`stream` 0: the connection's window."""
    return header(WINDOW_UPDATE, 0, stream, 4) + _WORD.pack(increment)


def reset(stream: int, code: int) -> bytes:
    """RST_STREAM."""
    return header(RST_STREAM, 0, stream, 4) + _WORD.pack(code)


def goaway(last_stream: int, code: int, why: str = "") -> bytes:
    """GOAWAY: streams above `last_stream` have not been looked at."""
    payload = _WORD.pack(last_stream) + _WORD.pack(code) + why.encode()[:256]
    return header(GOAWAY, 0, 0, len(payload)) + payload


def word(payload: bytes | bytearray, at: int = 0) -> int:
    """The 32-bit number at an offset. Raises ProtocolError where it is cut off."""
    if len(payload) < at + 4:
        raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a frame is too short")
    number: int = _WORD.unpack_from(payload, at)[0]
    return number
