"""What models and tritonservers take, measured again and again: models grow while they execute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from paceline.residency import events as ev
from paceline.residency.ledger import Footprint
from paceline.residency.residency import Residency

if TYPE_CHECKING:
    from paceline.runtime.machines import Machine, Machines

MEASURE_EVERY_S = 5.0

SIZE_TOLERANCE = 0.02
"""A size that differs by less is no correction."""


async def footprint_of(machine: Machine, model: str, instances: int) -> Footprint | None:
    """What a loaded model takes, as measured; None where nobody can tell."""
    if machine.memory is None:
        return None
    blocks = machine.memory.blocks(model)
    total = await machine.memory.measured_bytes(model, blocks)
    return None if total is None else Footprint(-(-total // instances), blocks)


class Sizes:
    """Tells residency what differs from what it believes."""

    def __init__(
        self, machines: Machines, state: Residency, tell: Callable[[ev.Event], None]
    ) -> None:
        self._machines = machines
        self._state = state
        self._tell = tell

    async def watch(self) -> None:
        """Measure everything every few seconds, for ever."""
        while True:
            await asyncio.sleep(MEASURE_EVERY_S)
            placed = {n: sorted(self._machines.models_on(n)) for n in self._machines.placed}
            for name, models in sorted(placed.items()):
                for model in models:
                    await self.measure(name, model)
                await self._measure_server(name)

    async def measure(self, name: str, model: str) -> None:
        """One model on one machine, if it is there."""
        machine, instances = self._machines.named().get(name), self._instances(name, model)
        if machine is None or instances is None:
            return
        found = await footprint_of(machine, model, instances)
        if found is None or self._instances(name, model) != instances:
            return
        believed = self._state.models[model].footprint
        more_bytes = abs(found.own_bytes - believed.own_bytes)
        if more_bytes > SIZE_TOLERANCE * believed.own_bytes or found.blocks != believed.blocks:
            if machine.memory is not None:
                machine.memory.remember(model, found.own_bytes, found.blocks)
            self._tell(ev.SizeMeasured(model, found.own_bytes, found.blocks))

    def _instances(self, name: str, model: str) -> int | None:
        """How many there are; None where it is not there, or their number is being changed."""
        known = self._state.machines.get(name)
        if known is not None and model in known.growing:
            return None
        return self._machines.placed.get(name, {}).get(model)

    async def _measure_server(self, name: str) -> None:
        machine = self._machines.named().get(name)
        if machine is None or machine.memory is None:
            return
        size_bytes = await machine.memory.server_bytes()
        if size_bytes is not None:
            self._tell(ev.ServerMeasured(name, size_bytes))
