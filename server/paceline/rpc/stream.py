"""ModelStreamInfer: many requests and answers on one call, without a task for any of them.

Invariant: at most `IN_FLIGHT` requests of a stream are being served or have answers that wait for
the client; beyond that it is not read, so that flow control holds the client back. Answers are
written as they finish (the request id tells which is which). When the client closes its side, or
the server stops, what was accepted is still answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from paceline.core.tensor import Buffer
from paceline.http2 import frames
from paceline.http2.messages import PREFIX, PREFIX_BYTES, Inbox
from paceline.http2.server import ServerConnection
from paceline.rpc.call import OK_BLOCK, RESPONSE_BLOCK, WRITE_AHEAD_BYTES, Call, Intake
from paceline.rpc.head import Head
from paceline.rpc.status import Status, status_of

IN_FLIGHT = 64
_LARGE_BYTES = 1 << 18

FAIL_FAST = ("triton_grpc_error", "true")
"""The header by which a client asks that the first failure ends the stream, as a unary call."""

_STOPPING = Status(grpc.StatusCode.UNAVAILABLE, "the server is stopping")


class Entry:
    """A request of a stream; `number` is what it is cancelled by, once that is known."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number: int | None = None


Begin = Callable[["InferStream", Buffer], None]
"""Serves one message: `enter`s it, and `leave`s or `fail`s now or later. What it raises ends the
stream. It is never called from within `leave` and `fail`."""


class InferStream(Call):
    """One stream; see the module docstring. `cancel` drops a request by its number."""

    __slots__ = (
        *("_begin", "_cancel", "_complete", "_entries", "_fail_fast", "_failure"),
        *("_resuming", "_stopping", "_unwritten"),
    )

    def __init__(
        self,
        connection: ServerConnection[Any],
        stream: int,
        head: Head[Any],
        intake: Intake,
        *,
        begin: Begin,
        cancel: Callable[[int], object],
    ) -> None:
        super().__init__(connection, stream, head, intake)
        self._begin = begin
        self._cancel = cancel
        self._fail_fast = FAIL_FAST in head.metadata
        self._failure: Status | None = None
        self._entries: dict[Entry, None] = {}
        self._unwritten = 0
        """Requests whose answers wait for a client that does not keep up."""
        self._complete = self._stopping = self._resuming = False

    # -- requests ---------------------------------------------------------------------------

    def arrived(self, inbox: Inbox) -> None:
        """See `Call.arrived`."""
        self._resume()

    def ready(self, inbox: Inbox) -> None:
        """See `Call.ready`."""
        self._complete = True
        self._resume()

    def closing(self) -> None:
        """See `Call.closing`: what was accepted is answered, nothing more is read."""
        self._stopping = True
        self._resume()

    def sent(self) -> None:
        """See `Stream.sent`."""
        super().sent()
        if self._unwritten:
            self._unwritten = 0
            self._resume_soon()

    def _resume(self) -> None:
        """Begin what has come, as far as there is room; end the stream when nothing is left."""
        if self.over:
            return
        failure = self._failure
        if failure is not None:
            self.stop(failure)
            return
        inbox = self._inbox
        while inbox is not None and len(inbox) and not (self._stopping or self._failure):
            if len(self._entries) + self._unwritten >= IN_FLIGHT:
                return
            data = self._take_next(inbox)
            if data is None:
                return
            try:
                self._begin(self, data)
            except Exception as error:
                self.stop(status_of(error))
                return
        if not (self._entries or self._failure) and (self._complete or self._stopping):
            self._end()

    def _resume_soon(self) -> None:
        """Not from within the end of a request, which must not begin others."""
        if not self._resuming:
            self._resuming = True
            asyncio.get_running_loop().call_soon(self._resumed)

    def _resumed(self) -> None:
        self._resuming = False
        self._resume()

    def _end(self) -> None:
        if self._stopping:
            self.refuse(_STOPPING)
            return
        head = b"" if self._told_headers else self._connection.headers(self.id, RESPONSE_BLOCK)
        self._finish(head + frames.headers(self.id, OK_BLOCK, frames.END_STREAM))

    def abandoned(self) -> None:
        """See `Call.abandoned`."""
        entries, self._entries = self._entries, {}
        for entry in entries:
            if entry.number is not None:
                self._cancel(entry.number)

    # -- for `Begin` ------------------------------------------------------------------------

    def enter(self) -> Entry:
        """One more request is being served."""
        entry = Entry()
        self._entries[entry] = None
        return entry

    def write(self, parts: Sequence[Buffer]) -> None:
        """Send the message made of `parts`, which ends no request."""
        if self.over or self._failure is not None:
            return
        size = sum(map(len, parts))
        head = b""
        if not self._told_headers:
            self._told_headers = True
            head = self._connection.headers(self.id, RESPONSE_BLOCK)
        message = (PREFIX.pack(0, size), *parts)
        connection = self._connection
        # With no other request under way a large one need not wait for what this pass still does;
        # small ones go together.
        at_once = size >= _LARGE_BYTES and not self._entries and connection.alone
        send = connection.send_at_once if at_once else connection.send
        send(self, head, message, PREFIX_BYTES + size, None)

    def leave(self, entry: Entry, parts: Sequence[Buffer]) -> None:
        """A request ends with this message."""
        if entry not in self._entries:
            return
        del self._entries[entry]
        self.write(parts)
        if self.pending_bytes > WRITE_AHEAD_BYTES:
            self._unwritten += 1
        if self._complete or self._stopping or self._inbox:
            self._resume_soon()

    def fail(self, entry: Entry, status: Status, parts: Sequence[Buffer]) -> None:
        """A request ends with this message, or ends the stream where its client wants that."""
        if not self._fail_fast:
            self.leave(entry, parts)
        elif self._failure is None and entry in self._entries:
            del self._entries[entry]
            self._failure = status
            self._resume_soon()
