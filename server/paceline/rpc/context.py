"""What handlers see of their call (`task`), and how they are run.

`CallContext` offers what grpc.aio's context does, as far as they use it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc

from paceline.core.tensor import Buffer
from paceline.rpc.head import Metadata
from paceline.rpc.status import Status
from paceline.rpc.task import TaskCall

log = logging.getLogger(__name__)

_KNOWN_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Aborted(Exception):
    """A handler has ended its call with a status."""

    def __init__(self, status: Status) -> None:
        self.status = status
        super().__init__(status.details)


async def run(call: TaskCall, data: Buffer | None) -> None:
    """The handler from begin to end; every way it can end becomes the call's status."""
    context = CallContext(call)
    try:
        status = await _handled(call, context, data)
    except Aborted as error:
        status = error.status
    except asyncio.CancelledError:
        if call.over:
            return
        status = Status(grpc.StatusCode.CANCELLED, "the handler was cancelled")
    except Exception as error:
        log.error("unexpected failure in %s", call.head.path, exc_info=error)
        text = f"Unexpected {type(error)}: {error}"
        status = Status(grpc.StatusCode.UNKNOWN, text)
    finally:
        for callback in context.callbacks:
            callback(context)
    if call.over:
        return
    if status.code is grpc.StatusCode.OK:
        call.succeed(status)
    else:
        call.refuse(status)


async def _handled(call: TaskCall, context: CallContext, data: Buffer | None) -> Status:
    handler = call.handler
    given = context.requests() if data is None else call.deserialized(data)
    if handler.response_streaming:
        serve: Any = handler.stream_stream if data is None else handler.unary_stream
        outcome = serve(given, context)
        if hasattr(outcome, "__aiter__"):
            async for response in outcome:
                await call.write(response)
        else:
            await outcome
    else:
        serve = handler.stream_unary if data is None else handler.unary_unary
        response = await serve(given, context)
        if context.told.code is grpc.StatusCode.OK:
            await call.write(response)
    return context.told


class CallContext:
    """What a handler can do with its call."""

    def __init__(self, call: TaskCall) -> None:
        self._call = call
        self.callbacks: list[Callable[[Any], object]] = []
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
        self.callbacks.append(callback)

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
