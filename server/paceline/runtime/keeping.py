"""What of a change is kept on disk, and that it is then served.

Invariant: a change that was written down is served before who asked for it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, Protocol

from paceline.core.chain import Chain
from paceline.planner.replan import Traffic


class Memory(Protocol):
    """What outlives the process. What writes is called on other threads: it waits for the disk."""

    def changed(self, applied: Iterable[Chain], deleted: Collection[str]) -> None:
        """Keep a change that is about to be served. Raises ResidencyError when that fails."""
        ...

    def traffic(self, chains: Iterable[Chain]) -> Traffic:
        """What of `chains` was planned for before."""
        ...

    def keep_traffic(self, traffic: Traffic, chains: Iterable[Chain]) -> None:
        """Remember what `chains` are planned for."""
        ...


async def to_its_end(change: Coroutine[Any, Any, None]) -> None:
    """Make a change that is written down first. Who is cancelled meanwhile ends after it: otherwise
    something else would be on the disk than is served.
    """
    task = asyncio.create_task(change)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
