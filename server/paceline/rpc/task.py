"""Calls whose handlers are coroutines: requests wait for them, they for clients.

Handlers are those that generated code and the gRPC libraries register (`grpc.RpcMethodHandler`).
Invariant: a handler runs in one task; a client that goes away, and a deadline, cancel it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from paceline.core.tensor import Buffer
from paceline.http2 import frames, hpack
from paceline.http2.messages import PREFIX, PREFIX_BYTES, Inbox
from paceline.http2.server import ServerConnection
from paceline.rpc.call import OK_BLOCK, RESPONSE_BLOCK, WRITE_AHEAD_BYTES, Call, Intake, sendable
from paceline.rpc.head import Head, Metadata, encode_message
from paceline.rpc.status import Status

Run = Callable[["TaskCall", Buffer | None], Coroutine[Any, Any, None]]
"""Runs a call's handler, with the only request or, where None, with a stream of them."""


class TaskCall(Call):
    """A call served by a `grpc.RpcMethodHandler`, as `run` does it."""

    __slots__ = ("_changed", "_run", "_task", "_tasks", "handler")

    def __init__(
        self,
        connection: ServerConnection[Any],
        stream: int,
        head: Head[Any],
        intake: Intake,
        handler: grpc.RpcMethodHandler[Any, Any],
        tasks: set[asyncio.Task[None]],
        run: Run,
    ) -> None:
        super().__init__(connection, stream, head, intake)
        self.handler = handler
        self._run = run
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None

    # -- requests ---------------------------------------------------------------------------

    def arrived(self, inbox: Inbox) -> None:
        """See `Call.arrived`: a stream's handler starts with the headers."""
        if self.handler.request_streaming and self._task is None:
            self._start(None)
        self._wake()

    def ready(self, inbox: Inbox) -> None:
        """See `Call.ready`."""
        if self.handler.request_streaming:
            self._wake()
        elif (request := self._take_only(inbox)) is not None:
            self._start(request)

    async def next_request(self) -> Any:
        """The next message of a stream, deserialized; grpc.aio.EOF behind the last."""
        while True:
            inbox = self._inbox
            if inbox is None or self.over:
                raise asyncio.CancelledError
            if len(inbox):
                data = self._take_next(inbox)
                if data is None:
                    raise asyncio.CancelledError
                return self.deserialized(data)
            if self.remote_closed:
                return grpc.aio.EOF  # type: ignore[attr-defined]
            await self._change()

    def deserialized(self, data: Buffer) -> Any:
        """A message as the handler takes it. Raises CancelledError where it is none."""
        read = self.handler.request_deserializer
        if read is None:
            return bytes(data)
        try:
            # A large message is a memoryview: protobuf takes both.
            return read(data)
        except Exception:
            self.stop(Status(grpc.StatusCode.INTERNAL, "Exception deserializing request!"))
            raise asyncio.CancelledError from None

    # -- responses --------------------------------------------------------------------------

    async def write(self, message: Any) -> None:
        """Send a message; returns when the client keeps up."""
        if self.over:
            raise asyncio.CancelledError
        write = self.handler.response_serializer
        data: bytes = write(message) if write is not None else message
        head = b"" if self._told_headers else self._initial(())
        self._connection.send(
            self, head, (PREFIX.pack(0, len(data)), data), PREFIX_BYTES + len(data), None
        )
        while self.pending_bytes > WRITE_AHEAD_BYTES and not self.over:
            await self._change()

    def tell_headers(self, metadata: Metadata) -> None:
        """Send the initial metadata now."""
        if not self.over and not self._told_headers:
            self._connection.write(self._initial(metadata))

    def _initial(self, metadata: Metadata) -> bytes:
        self._told_headers = True
        return self._connection.headers(self.id, RESPONSE_BLOCK + sendable(metadata))

    def sent(self) -> None:
        """See `Stream.sent`."""
        super().sent()
        self._wake()

    # -- the handler ------------------------------------------------------------------------

    def _start(self, request: Any) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(self, request), name=self.head.path)
        self._tasks.add(self._task)
        self._task.add_done_callback(self._tasks.discard)

    def succeed(self, status: Status) -> None:
        """End with a status that is OK."""
        block = OK_BLOCK
        if status.details:
            block += hpack.encode([("grpc-message", encode_message(status.details))])
        if status.metadata:
            block += sendable(status.metadata)
        head = b"" if self._told_headers else self._initial(())
        tail = head + frames.headers(self.id, block, frames.END_STREAM)
        self._finish(tail)

    def abandoned(self) -> None:
        """See `Call.abandoned`."""
        if self._task is not None:
            self._task.cancel()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def _change(self) -> None:
        """Until something was received or sent. The reader and the writer may be two tasks."""
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)
