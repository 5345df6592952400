"""A gRPC call on its HTTP/2 stream.

Invariants: a call ends once: answered, refused, past its deadline, or taken back by the client;
whoever works on it is told of the latter two. What is kept of unfinished requests is bounded for
all calls together (`Intake`).
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from paceline.core.tensor import Buffer
from paceline.http2 import frames, hpack
from paceline.http2.messages import PREFIX, PREFIX_BYTES, Inbox, MessageTooLarge
from paceline.http2.server import ServerConnection, ServerStream
from paceline.rpc.head import ENCODINGS, Head, Metadata, encode_message, encode_metadata
from paceline.rpc.status import Status, status_of

log = logging.getLogger(__name__)

_EXPIRED = Status(
    grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", (("paceline-reason", "deadline"),)
)

Begin = Callable[["UnaryCall", Buffer], None]
"""Serves a request's bytes: calls `answer` or `refuse`, now or later."""

_HEADERS = hpack.encode([("content-type", "application/grpc")])
RESPONSE_BLOCK = b"\x88" + _HEADERS
_ACCEPTS = hpack.encode([("grpc-accept-encoding", ",".join(ENCODINGS))])
OK_BLOCK = hpack.encode([("grpc-status", "0")])
WRITE_AHEAD_BYTES = 1 << 20


class Intake:
    """The limits that all calls of a server share: of a message, and of the memory taken by
    requests that no handler has taken yet. From a quarter of it on it is taken as it is needed,
    and not as it is announced."""

    __slots__ = ("held_bytes", "max_held_bytes", "max_message_bytes")

    def __init__(self, max_message_bytes: int, max_held_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0


class Call(ServerStream):
    """What all calls have in common. Subclasses take requests in `arrived` and `ready`."""

    __slots__ = (
        *("_connection", "_deadline_s", "_held_bytes", "_inbox", "_intake", "_timer"),
        *("_told_headers", "head", "over"),
    )

    def __init__(
        self, connection: ServerConnection[Any], stream: int, head: Head[Any], intake: Intake
    ) -> None:
        super().__init__(stream, connection.peer_window, connection.stream_credit)
        self._connection = connection
        self._intake = intake
        self._inbox: Inbox | None = None
        self._held_bytes = 0
        self._told_headers = False
        self.head = head
        self.over = False
        self._deadline_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._deadline_s = loop.time() + head.timeout_s
            self._timer = loop.call_at(self._deadline_s, self._expired)

    # -- for handlers -----------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        return self._connection.peer

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline, None without one."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - asyncio.get_running_loop().time())

    def refuse(self, status: Status) -> None:
        """End with a status other than OK."""
        if self.over:
            return
        block = hpack.encode([("grpc-status", str(status.code.value[0]))])
        if status.details:
            block += hpack.encode([("grpc-message", encode_message(status.details))])
        if status.metadata:
            block += sendable(status.metadata)
        if status.code is grpc.StatusCode.UNIMPLEMENTED:
            block += _ACCEPTS
        if not self._told_headers:
            block = RESPONSE_BLOCK + block
        self._finish(self._connection.headers(self.id, block, ends=True))

    def _finish(self, tail: bytes) -> None:
        self._over()
        if self._connection.finish(self, tail):
            self._connection.stream_ended(self)

    def _over(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._inbox is not None:
            self._hold(0)
            self._inbox = None

    def sent(self) -> None:
        """All that waited has been written."""
        if self.over:
            self._connection.stream_ended(self)

    # -- what comes in ----------------------------------------------------------------------

    def received(self, data: memoryview, ended: bool) -> None:
        """See `Stream.received`."""
        if self.over:
            return
        inbox = self._inbox
        if inbox is None:
            intake = self._intake
            lazy = intake.held_bytes > intake.max_held_bytes // 4
            inbox = self._inbox = Inbox(intake.max_message_bytes, lazy=lazy)
        try:
            inbox.feed(data)
        except MessageTooLarge as error:
            self._too_large(error.size_bytes)
            return
        self._arrived(inbox)
        if ended and not self.over:
            self._ended(inbox)

    def room(self, at_most: int) -> memoryview | None:
        """See `Stream.room`."""
        return self._inbox.room(at_most) if self._inbox is not None else None

    def filled(self, count: int) -> None:
        """See `Stream.filled`."""
        if self._inbox is not None:
            self._inbox.filled(count)
            self._arrived(self._inbox)

    def arrived(self, inbox: Inbox) -> None:
        """There may be a whole message."""

    def ready(self, inbox: Inbox) -> None:
        """The client has sent everything."""
        raise NotImplementedError

    def _arrived(self, inbox: Inbox) -> None:
        self._hold(inbox.taken_bytes)
        if self._intake.held_bytes > self._intake.max_held_bytes:
            details = "too many bytes of requests are on their way to the server"
            self.stop(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
            return
        self._connection.renew(self, inbox.missing_bytes - self._connection.on_its_way(self))
        self.arrived(inbox)

    def _ended(self, inbox: Inbox) -> None:
        if inbox.partial:
            details = "the request ends within a message"
            self.stop(Status(grpc.StatusCode.INTERNAL, details))
        else:
            self.ready(inbox)

    def _hold(self, count: int) -> None:
        self._intake.held_bytes += count - self._held_bytes
        self._held_bytes = count

    def _take(self, inbox: Inbox) -> Buffer | None:
        """The next message, decompressed; None where the call has ended over it."""
        flag, data = inbox.pop()
        self._hold(inbox.taken_bytes)
        if not flag:
            return data
        if flag != 1 or self.head.encoding == "identity":
            details = "a message says that it is compressed, and the call that none is"
            self.stop(Status(grpc.StatusCode.INTERNAL, details))
            return None
        try:
            return self._decompressed(data)
        except zlib.error:
            details = f"a message is not {self.head.encoding}-compressed as it says"
            self.stop(Status(grpc.StatusCode.INTERNAL, details))
            return None

    def _take_next(self, inbox: Inbox) -> Buffer | None:
        """As `_take`, of a stream: the client may send on."""
        data = self._take(inbox)
        if data is not None:
            half = self._connection.stream_credit // 2
            room = 2 * half - inbox.unread_bytes - self._connection.on_its_way(self)
            if room >= half:
                self._connection.renew(self, room)
        return data

    def _take_only(self, inbox: Inbox) -> Buffer | None:
        """A unary request's message; None where the call has ended for not having just one."""
        if len(inbox) != 1:
            details = f"{len(inbox)} messages where one is due"
            self.stop(Status(grpc.StatusCode.INTERNAL, details))
            return None
        return self._take(inbox)

    def _decompressed(self, data: Buffer) -> bytes | None:
        limit = self._intake.max_message_bytes
        # 32: zlib's own header or gzip's.
        reader = zlib.decompressobj(zlib.MAX_WBITS | 32)
        plain = reader.decompress(data, limit + 1)
        if len(plain) > limit:
            self._too_large(len(plain))
            return None
        if not reader.eof or reader.unused_data:
            raise zlib.error("cut off")
        return plain

    def _too_large(self, size_bytes: int) -> None:
        details = (
            f"Received message larger than max ({size_bytes} vs. {self._intake.max_message_bytes})"
        )
        self.stop(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, details))

    # -- endings from outside ---------------------------------------------------------------

    def aborted(self) -> None:
        """See `ServerStream.aborted`."""
        if not self.over:
            self._over()
            self.abandoned()

    def stop(self, status: Status) -> None:
        """End it for the server's own reasons."""
        if not self.over:
            self.refuse(status)
            self.abandoned()

    def closing(self) -> None:
        """The server takes no further calls: one that would never end by itself has to."""

    def abandoned(self) -> None:
        """The call is over without its handler: it can stop."""
        raise NotImplementedError

    def _expired(self) -> None:
        self.stop(_EXPIRED)


class UnaryCall(Call):
    """One request, one answer, served by a function without a task."""

    __slots__ = ("_begin", "on_cancel")

    def __init__(
        self,
        connection: ServerConnection[Any],
        stream: int,
        head: Head[Any],
        intake: Intake,
        begin: Begin,
    ) -> None:
        super().__init__(connection, stream, head, intake)
        self._begin = begin
        self.on_cancel: Callable[[], object] | None = None
        """Called when nobody waits for the answer any more."""

    def answer(self, parts: Sequence[Buffer], metadata: Metadata = ()) -> None:
        """End with the message made of `parts`."""
        if self.over:
            return
        size = PREFIX_BYTES + sum(map(len, parts))
        block = OK_BLOCK + sendable(metadata) if metadata else OK_BLOCK
        tail = frames.headers(self.id, block, frames.END_STREAM)
        head = self._connection.headers(self.id, RESPONSE_BLOCK)
        self._over()
        message = (PREFIX.pack(0, size - PREFIX_BYTES), *parts)
        connection = self._connection
        send = connection.send_at_once if connection.alone else connection.send
        if send(self, head, message, size, tail):
            connection.stream_ended(self)

    def received(self, data: memoryview, ended: bool) -> None:
        """See `Stream.received`; most requests come in one piece."""
        if ended and self._inbox is None and not self.over and len(data) >= PREFIX_BYTES:
            flag, size = PREFIX.unpack_from(data)
            if not flag and size == len(data) - PREFIX_BYTES <= self._intake.max_message_bytes:
                self._serve(bytes(data[PREFIX_BYTES:]))
                return
        if len(data) or ended:
            super().received(data, ended)

    def ready(self, inbox: Inbox) -> None:
        """See `Call.ready`."""
        data = self._take_only(inbox)
        if data is not None:
            self._serve(data)

    def _serve(self, data: Buffer) -> None:
        try:
            self._begin(self, data)
        except Exception as error:
            # Not the connection's fault, nor that of its other calls.
            self.refuse(status_of(error))

    def abandoned(self) -> None:
        """See `Call.abandoned`."""
        if self.on_cancel is not None:
            self.on_cancel()


def sendable(metadata: Metadata) -> bytes:
    """A header block; what cannot be metadata is left out, and told, as the call has to end."""
    try:
        return encode_metadata(metadata)
    except ValueError as error:
        log.error("metadata is not sent: %s", error)
        return b""
