"""Sending on one HTTP/2 connection: windows, turns, and as few system calls as possible.

Invariants: nothing goes beyond the peer's windows, the connection's and each stream's; frames of a
stream keep their order; while the transport's buffer is full (`pause_writing`) no DATA is added.
What one pass of the event loop writes is sent together: a system call, and waking the peer, cost
more than anything else here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from paceline.core.tensor import Buffer
from paceline.http2 import frames
from paceline.http2.frames import ErrorCode

_TURN_BYTES = 1 << 20
"""A stream sends so much before it is the next one's turn."""
_JOIN_BYTES = 1 << 15
_FLUSH_BYTES = 1 << 22
"""What a pass writes is kept back up to here, about what a socket takes at once: large answers of
one batch, too, as each that is copied into the kernel pushes this code out of the caches."""


class Stream:
    """A stream as its connection sees it. `tail` follows the last of `pending`: frames, or b""
    for an END_STREAM flag on the last DATA; None as long as more may come."""

    __slots__ = ("credit", "id", "pending", "pending_bytes", "remote_closed", "tail", "window")

    def __init__(self, identity: int, window: int, credit: int) -> None:
        self.id = identity
        self.window = window
        self.credit = credit
        self.pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.tail: bytes | None = None
        self.remote_closed = False

    def received(self, data: memoryview, ended: bool) -> None:
        """Bytes of DATA, valid during this call only; `ended`: they are the last."""
        raise NotImplementedError

    def room(self, at_most: int) -> memoryview | None:
        """Where up to `at_most` next bytes may be written to instead; `filled` follows."""
        return None

    def filled(self, count: int) -> None:
        """`count` bytes have been written to `room`."""
        raise NotImplementedError

    def sent(self) -> None:
        """Everything up to and including `tail`, or everything so far, has been written."""


class Writer:
    """What both sides of a connection write; see the module docstring."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._collecting = False
        """Whether somebody will flush what is written now."""
        self._streams: dict[int, Stream] = {}
        self._blocked: deque[Stream] = deque()
        self._window = frames.FIRST_WINDOW
        self._stream_window = frames.FIRST_WINDOW
        self._frame_bytes = frames.LEAST_FRAME_BYTES
        self._paused = False
        self._resuming = False
        self.moved = False
        """Set when something of what waits has been sent."""

    def write(self, data: bytes) -> None:
        """Frames that no window restricts."""
        self._put((data,), len(data))

    def _put(self, parts: Iterable[Buffer], size: int) -> None:
        """Send with whatever else this pass of the event loop writes."""
        if not (self._out or self._collecting):
            self._loop.call_soon(self.flush)
        self._out += parts
        self._out_bytes += size
        if self._out_bytes >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Give the transport what has been written."""
        out, size = self._out, self._out_bytes
        if not out:
            return
        self._out, self._out_bytes = [], 0
        if self._transport is None:
            return
        if size < _JOIN_BYTES:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(out)

    def reset(self, stream: int, code: ErrorCode) -> None:
        """End a stream; what still comes for it is ignored."""
        self._streams.pop(stream, None)
        self.write(frames.reset(stream, code))

    def send(
        self, stream: Stream, head: bytes, parts: Sequence[Buffer], size: int, tail: bytes | None
    ) -> bool:
        """Write frames `head`, then `parts` (`size` bytes in all) as DATA, then `tail`.

        What the windows do not allow waits. Returns whether all is written.
        """
        if self._transport is None:
            return True
        if (
            size <= self._frame_bytes
            and size <= stream.window
            and size <= self._window
            and not (stream.pending or self._paused)
        ):
            stream.window -= size
            self._window -= size
            ends = frames.END_STREAM if tail == b"" else 0
            tail = tail or b""
            data = frames.header(frames.DATA, ends, stream.id, size)
            written = len(head) + frames.HEADER_BYTES + size + len(tail)
            self._put((head, data, *parts, tail), written)
            return True
        if head:
            self.write(head)
        waiting = bool(stream.pending)
        stream.pending.extend(memoryview(part) for part in parts if len(part))
        stream.pending_bytes += size
        stream.tail = tail
        if waiting:
            return False
        if not self._pump(stream):
            self._blocked.append(stream)
            return False
        return True

    def send_at_once(
        self, stream: Stream, head: bytes, parts: Sequence[Buffer], size: int, tail: bytes | None
    ) -> bool:
        """`send` what nothing else will be sent together with: not only behind this pass."""
        collecting, self._collecting = self._collecting, True
        try:
            return self.send(stream, head, parts, size, tail)
        finally:
            self._collecting = collecting
            if not collecting:
                self.flush()

    def finish(self, stream: Stream, tail: bytes) -> bool:
        """Write `tail` after what waits; whether that is done."""
        stream.tail = tail
        if not stream.pending:
            self.write(tail)
        return not stream.pending

    def _pump(self, stream: Stream) -> bool:
        """Send a turn of what waits; whether that was all."""
        pending = stream.pending
        size = min(stream.window, self._window, stream.pending_bytes, _TURN_BYTES)
        chunks: list[Buffer] = []
        if size > 0 and not self._paused:
            parts = _cut(pending, size)
            stream.window -= size
            self._window -= size
            stream.pending_bytes -= size
            ends = frames.END_STREAM if not pending and stream.tail == b"" else 0
            chunks = data_frames(stream.id, parts, size, self._frame_bytes, ends)
        if not pending and stream.tail:
            chunks.append(stream.tail)
        if chunks:
            self._put(chunks, sum(map(len, chunks)))
            self.moved = True
        if pending and size == _TURN_BYTES and not self._paused:
            self._resume_soon()
        return not pending

    def _resume_soon(self) -> None:
        if not self._resuming:
            self._resuming = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        for _ in range(len(self._blocked)):
            if self._paused or self._window <= 0:
                return
            stream = self._blocked.popleft()
            if not stream.pending:
                continue
            if self._pump(stream):
                stream.sent()
            else:
                self._blocked.append(stream)

    def _drop(self, stream: Stream) -> None:
        """Send nothing more of a stream."""
        stream.pending.clear()
        stream.pending_bytes = 0

    def pause_writing(self) -> None:
        """The transport's buffer is full: the peer reads slowly."""
        self._paused = True

    def resume_writing(self) -> None:
        """It is empty enough again."""
        self._paused = False
        if self._blocked:
            self._resume()


def _cut(pending: deque[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of `pending`, which loses them."""
    parts: list[memoryview] = []
    while size:
        part = pending.popleft()
        if len(part) > size:
            pending.appendleft(part[size:])
            part = part[:size]
        parts.append(part)
        size -= len(part)
    return parts


def data_frames(
    stream: int, parts: Iterable[memoryview], size: int, most: int, flags: int
) -> list[Buffer]:
    """`parts` (`size` bytes) as DATA frames of up to `most` bytes; `flags` are the last one's.

    >>> parts = (memoryview(b"abc"), memoryview(b"defg"))
    >>> [bytes(chunk).hex() for chunk in data_frames(1, parts, 7, 4, frames.END_STREAM)]
    ['000004000000000001', '616263', '64', '000003000100000001', '656667']
    """
    chunks: list[Buffer] = []
    full = frames.header(frames.DATA, 0, stream, most)
    room = 0
    for part in parts:
        end = len(part)
        at = min(room, end)
        if at:
            chunks.append(part[:at])
            room -= at
        if at == end:
            continue
        # Frames that the part fills alone, and that are not the last: of a large tensor nearly all.
        alone = at + min(end - at, size - 1) // most * most
        for begin in range(at, alone, most):
            chunks += (full, part[begin : begin + most])
        size -= alone - at
        if alone < end:
            taken = min(size, most)
            header = frames.header(frames.DATA, 0 if size > most else flags, stream, taken)
            chunks += (header, part[alone:])
            size -= taken
            room = taken - (end - alone)
    return chunks
