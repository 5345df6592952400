"""Ending endless streams when the server stops.

Invariant: a stream that only waits (a health watch, an idle inference stream) never makes the
server use up its grace period: it ends as soon as `stopping` is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


async def until(stopping: asyncio.Event, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The items, until there are no more or `stopping` is set; closes `items`."""
    stop = asyncio.ensure_future(stopping.wait())
    step: asyncio.Task[object] | None = None
    try:
        while not stopping.is_set():
            step = asyncio.ensure_future(_next(items))
            await asyncio.wait((step, stop), return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                return
            item = step.result()
            if item is _END:
                return
            yield item  # type: ignore[misc]  # _next gives a T or _END
    finally:
        pending = [task for task in (step, stop) if task is not None and not task.done()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _next(items: AsyncIterator[T]) -> object:
    return await anext(items, _END)
