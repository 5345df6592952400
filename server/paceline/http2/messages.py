"""gRPC's messages within a stream's DATA: a flag, four bytes of length, and the message.

Invariant: a message's bytes are copied once, from the connection's read buffer; large ones not at
all where the socket reads straight into `room`. A peer's small messages wait unread as they came.
Memory for a whole message is taken when it begins, which is fast as the allocator reuses it; a
`lazy` inbox takes a large message's from the kernel, which gives a page when something arrives.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque

import numpy as np

from paceline.core.tensor import Buffer

PREFIX = struct.Struct(">BI")
PREFIX_BYTES = PREFIX.size
_LARGE_BYTES = 1 << 17
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_READ_AHEAD = 64


class MessageTooLarge(Exception):
    """A message above the limit is announced."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        super().__init__(f"a message of {size_bytes} bytes")


class Inbox:
    """What has come of one stream's messages."""

    __slots__ = (
        *("_ahead", "_body", "_filled", "_flag", "_head", "_limit_bytes", "_size_bytes"),
        *("_lazy", "_whole", "unread_bytes"),
    )

    def __init__(self, limit_bytes: int, *, lazy: bool = False) -> None:
        self._lazy = lazy
        self._limit_bytes = limit_bytes
        self._whole: deque[tuple[int, Buffer]] = deque()
        self._head = b""
        self._body: memoryview | None = None
        self._flag = self._size_bytes = self._filled = 0
        self._ahead = bytearray()
        self.unread_bytes = 0
        """What has come and has not been taken out."""

    def feed(self, data: memoryview) -> None:
        """The next bytes, to be copied. Raises MessageTooLarge."""
        self.unread_bytes += len(data)
        self._feed(data)

    def _feed(self, data: memoryview) -> None:
        at, end = 0, len(data)
        while at < end:
            if self._body is not None:
                taken = min(end - at, self._size_bytes - self._filled)
                self._body[self._filled : self._filled + taken] = data[at : at + taken]
                at += taken
                self._advance(taken)
                continue
            if len(self._whole) >= _READ_AHEAD:
                self._ahead += data[at:]
                return
            at = self._begin(data, at, end)

    def _begin(self, data: memoryview, at: int, end: int) -> int:
        """Read a message's prefix, and the message where it is all there; the offset behind."""
        if self._head or end - at < PREFIX_BYTES:
            missing = PREFIX_BYTES - len(self._head)
            self._head += data[at : at + missing]
            at = min(at + missing, end)
            if len(self._head) < PREFIX_BYTES:
                return at
            flag, size_bytes = PREFIX.unpack(self._head)
            self._head = b""
        else:
            flag, size_bytes = PREFIX.unpack_from(data, at)
            at += PREFIX_BYTES
        if size_bytes > self._limit_bytes:
            raise MessageTooLarge(size_bytes)
        if end - at >= size_bytes:
            self._whole.append((flag, bytes(data[at : at + size_bytes])))
            end_of_message: int = at + size_bytes
            return end_of_message
        self._flag, self._size_bytes, self._filled = flag, size_bytes, 0
        if self._lazy and size_bytes >= _LARGE_BYTES:
            self._body = memoryview(mmap.mmap(-1, size_bytes, flags=_PRIVATE))
        else:
            # A bytearray would be zeroed first, which costs as much as a copy.
            self._body = np.empty(size_bytes, "B").data
        return at

    def room(self, at_most: int) -> memoryview | None:
        """Where up to `at_most` next bytes belong, where that is known."""
        if self._body is None:
            return None
        return self._body[self._filled : min(self._filled + at_most, self._size_bytes)]

    def filled(self, count: int) -> None:
        """So many bytes have been written to `room`."""
        self.unread_bytes += count
        self._advance(count)

    def _advance(self, count: int) -> None:
        assert self._body is not None
        self._filled += count
        if self._filled == self._size_bytes:
            small = self._size_bytes < _LARGE_BYTES
            self._whole.append((self._flag, bytes(self._body) if small else self._body))
            self._body = None

    @property
    def missing_bytes(self) -> int:
        """Of the message that has begun."""
        return self._size_bytes - self._filled if self._body is not None else 0

    @property
    def taken_bytes(self) -> int:
        """Memory: of what has come, and for the rest of the message that has begun."""
        lazy = self._lazy and self._size_bytes >= _LARGE_BYTES
        return self.unread_bytes + (0 if lazy else self.missing_bytes)

    @property
    def partial(self) -> bool:
        """Whether the stream, ending now, would end within a message."""
        return self._body is not None or bool(self._head)

    def __len__(self) -> int:
        return len(self._whole)

    def pop(self) -> tuple[int, Buffer]:
        """The flag and the bytes of the next whole message."""
        message = self._whole.popleft()
        self.unread_bytes -= PREFIX_BYTES + len(message[1])
        if self._ahead and not self._whole:
            ahead, self._ahead = self._ahead, bytearray()
            self._feed(memoryview(ahead))
        return message
