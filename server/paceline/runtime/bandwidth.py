"""The split of a machine's load bandwidth, followed as long as it loads something.

What the blocks backend still has to move is looked at and told to residency, whose split
(`residency.bandwidth`) then is put into force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from paceline.core.ports import LoadLinks
from paceline.residency import events as ev

if TYPE_CHECKING:
    from paceline.runtime.machines import Machines

LINKS_EVERY_S = 0.1
"""How often the split is looked at while models are being loaded."""


class Bandwidth:
    """See the module docstring. `loading` says how many loads a machine has under way."""

    def __init__(
        self, machines: Machines, loading: Callable[[str], int], tell: Callable[[ev.Event], None]
    ) -> None:
        self._machines = machines
        self._loading = loading
        self._tell = tell
        self._followed: set[str] = set()

    def following(self, name: str) -> Coroutine[Any, Any, None] | None:
        """What is to run as long as a machine loads; None where it divides no links, or it runs."""
        links = self._machines.named()[name].links
        if links is None or name in self._followed:
            return None
        self._followed.add(name)
        return self._follow(name, links)

    async def split(self, action: ev.Split) -> None:
        """Put a split into force."""
        machine = self._machines.named().get(action.machine)
        if machine is not None and machine.links is not None:
            await asyncio.to_thread(machine.links.split, action.shares)

    async def _follow(self, name: str, links: LoadLinks) -> None:
        try:
            moving = True
            while moving or self._loading(name):
                await asyncio.sleep(LINKS_EVERY_S)
                found = await asyncio.to_thread(links.moving)
                told = tuple(ev.Link(link, *state) for link, state in sorted(found.items()))
                moving = any(left for link in told for left in link.left_bytes.values())
                self._tell(ev.Moving(name, told))
        finally:
            self._followed.discard(name)
