"""ModelStreamInfer: many requests and answers on one call.

Invariant: at most `IN_FLIGHT` requests of a stream are being served; beyond that it is not read,
so that gRPC's flow control holds the client back. Answers are written as they finish (the request
id tells which is which), by one writer. When the client closes its side, or the server stops,
what was accepted is still answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from paceline.rpc.status import Status, status_of
from paceline.rpc.stopping import until

IN_FLIGHT = 64

Emit = Callable[[Any], None]
"""Writes a response ahead of the one that ends its request."""

Infer = Callable[[Any, Emit], Awaitable[Any]]
Reply = Callable[[Any, Any | Status], Any]
"""`(request, response or failure)` as a ModelStreamInferResponse."""

_STOPPING = Status(grpc.StatusCode.UNAVAILABLE, "the server is stopping")


class InferStream:
    """One stream. `fail_fast`: the first failure ends it with that status, as a unary call."""

    def __init__(
        self, infer: Infer, reply: Reply, *, fail_fast: bool, stopping: asyncio.Event
    ) -> None:
        self._infer = infer
        self._reply = reply
        self._fail_fast = fail_fast
        self._stopping = stopping
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        # Bounded by the slots, one of which is given back when a request's last response has been
        # written, and by the limit on the items of a fan-out.
        self._finished: asyncio.Queue[tuple[Any, Any | Status, bool] | None] = asyncio.Queue()

    async def run(
        self, requests: AsyncIterator[Any], write: Callable[[Any], Awaitable[None]]
    ) -> Status | None:
        """Serve until the client closes its side; the status to end with, None for OK."""
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(requests))
            while (item := await self._finished.get()) is not None:
                request, outcome, last = item
                if self._fail_fast and isinstance(outcome, Status):
                    reader.cancel()
                    return outcome
                await write(self._reply(request, outcome))
                if last:
                    self._slots.release()
        return _STOPPING if self._stopping.is_set() else None

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async with asyncio.TaskGroup() as group, aclosing(until(self._stopping, requests)) as some:
            async for request in some:
                await self._slots.acquire()
                group.create_task(self._serve(request))
        self._finished.put_nowait(None)

    async def _serve(self, request: Any) -> None:
        def emit(response: Any) -> None:
            self._finished.put_nowait((request, response, False))

        try:
            outcome = await self._infer(request, emit)
        except Exception as error:
            outcome = status_of(error)
        self._finished.put_nowait((request, outcome, True))
