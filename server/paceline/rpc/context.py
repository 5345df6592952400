"""Calls whose handlers are coroutines, and what these see of their call.

Handlers are those that generated code and the gRPC libraries register (`grpc.RpcMethodHandler`);
`CallContext` offers what grpc.aio's context does, as far as they use it. Invariant: a handler runs
in one task; a client that goes away, and a deadline, cancel it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc

from paceline.core.tensor import Buffer
from paceline.http2 import frames, hpack
from paceline.http2.messages import PREFIX, PREFIX_BYTES, Inbox
from paceline.http2.server import ServerConnection
from paceline.rpc.call import OK_BLOCK, RESPONSE_BLOCK, WRITE_AHEAD_BYTES, Call, Intake, sendable
from paceline.rpc.head import Head, Metadata, encode_message
from paceline.rpc.status import Status

log = logging.getLogger(__name__)

_KNOWN_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Aborted(Exception):
    """A handler has ended its call with a status."""

    def __init__(self, status: Status) -> None:
        self.status = status
        super().__init__(status.details)


class TaskCall(Call):
    """A call served by a `grpc.RpcMethodHandler`."""

    __slots__ = ("_changed", "_handler", "_task", "_tasks", "callbacks", "context")

    def __init__(
        self,
        connection: ServerConnection[Any],
        stream: int,
        head: Head[Any],
        intake: Intake,
        handler: grpc.RpcMethodHandler[Any, Any],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        super().__init__(connection, stream, head, intake)
        self._handler = handler
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None
        self.callbacks: list[Callable[[Any], object]] = []
        self.context = CallContext(self)

    # -- requests ---------------------------------------------------------------------------

    def arrived(self, inbox: Inbox) -> None:
        """See `Call.arrived`: a stream's handler starts with the headers."""
        if self._handler.request_streaming and self._task is None:
            self._start(None)
        self._wake()

    def ready(self, inbox: Inbox) -> None:
        """See `Call.ready`."""
        if self._handler.request_streaming:
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
                return self._deserialized(data)
            if self.remote_closed:
                return grpc.aio.EOF  # type: ignore[attr-defined]
            await self._change()

    def _deserialized(self, data: Buffer) -> Any:
        read = self._handler.request_deserializer
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
        write = self._handler.response_serializer
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
        self._task = loop.create_task(self._run(request), name=self.head.path)
        self._tasks.add(self._task)
        self._task.add_done_callback(self._tasks.discard)

    async def _run(self, data: Buffer | None) -> None:
        """The handler from begin to end; every way it can end becomes the call's status."""
        try:
            status = await self._handled(data)
        except Aborted as error:
            status = error.status
        except asyncio.CancelledError:
            if self.over:
                return
            status = Status(grpc.StatusCode.CANCELLED, "the handler was cancelled")
        except Exception as error:
            log.error("unexpected failure in %s", self.head.path, exc_info=error)
            text = f"Unexpected {type(error)}: {error}"
            status = Status(grpc.StatusCode.UNKNOWN, text)
        finally:
            for callback in self.callbacks:
                callback(self.context)
        if self.over:
            return
        if status.code is grpc.StatusCode.OK:
            self._succeed(status)
        else:
            self.refuse(status)

    async def _handled(self, data: Buffer | None) -> Status:
        handler, context = self._handler, self.context
        given = context.requests() if data is None else self._deserialized(data)
        if handler.response_streaming:
            serve: Any = handler.stream_stream if data is None else handler.unary_stream
            outcome = serve(given, context)
            if hasattr(outcome, "__aiter__"):
                async for response in outcome:
                    await self.write(response)
            else:
                await outcome
        else:
            serve = handler.stream_unary if data is None else handler.unary_unary
            response = await serve(given, context)
            if context.told.code is grpc.StatusCode.OK:
                await self.write(response)
        return context.told

    def _succeed(self, status: Status) -> None:
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


class CallContext:
    """What a handler can do with its call."""

    def __init__(self, call: TaskCall) -> None:
        self._call = call
        self.told = Status(grpc.StatusCode.OK, "")
        """The status to end with where the handler returns."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """End the call with a status; raises."""
        raise Aborted(Status(code, details, tuple(trailing_metadata) or self.told.metadata))

    def set_code(self, code: grpc.StatusCode) -> None:
        """The code to end with."""
        code = code if isinstance(code, grpc.StatusCode) else _KNOWN_CODES[code]
        self.told = Status(code, self.told.details, self.told.metadata)

    def set_details(self, details: str) -> None:
        """The message to end with."""
        self.told = Status(self.told.code, details, self.told.metadata)

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """What to send with the status."""
        self.told = Status(self.told.code, self.told.details, tuple(metadata))

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Send response headers ahead of the first message."""
        self._call.tell_headers(tuple(metadata))

    def invocation_metadata(self) -> Metadata:
        """What the client sent; values of names that end in -bin are bytes."""
        return self._call.head.metadata

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline, None without one."""
        return self._call.time_remaining()

    def peer(self) -> str:
        """The client's address."""
        return self._call.peer

    def cancelled(self) -> bool:
        """Whether the call has ended without its handler."""
        return self._call.over

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._call.over

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Called with this context when the handler has ended."""
        self._call.callbacks.append(callback)

    async def read(self) -> Any:
        """The next request of a stream, grpc.aio.EOF behind the last."""
        return await self._call.next_request()

    async def write(self, message: Any) -> None:
        """Send a response of a stream."""
        await self._call.write(message)

    async def requests(self) -> AsyncIterator[Any]:
        """The requests of a stream."""
        while (request := await self._call.next_request()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            yield request
