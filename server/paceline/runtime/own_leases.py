"""Leases that no request holds: while the controller loads, measures or describes a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from paceline.core.errors import ResidencyError
from paceline.residency import events as ev
from paceline.residency.residency import Residency


@dataclass(slots=True)
class _Lease:
    """On that machine, where only one will do; it `lacks` these models yet."""

    machine: str
    lacks: set[str]
    granted: asyncio.Future[None]

    def fail(self, error: ResidencyError) -> None:
        if not self.granted.done():
            self.granted.set_exception(error)


class OwnLeases:
    """Those that are held now, by their numbers, which are no request's."""

    def __init__(
        self, state: Residency, tell: Callable[[ev.Event], None], numbers: Iterator[int]
    ) -> None:
        self._state = state
        self._tell = tell
        self._numbers = numbers
        self._leases: dict[int, _Lease] = {}

    @asynccontextmanager
    async def held(self, models: Sequence[str], machine: str) -> AsyncIterator[None]:
        """All these models are there while the block runs, on that machine where one is named.

        Raises ResidencyError where they cannot be had, also because no Triton is up that could have
        them: who waits here may be what keeps one from being used again.
        """
        if (error := self._nowhere(machine)) is not None:
            raise error
        number = next(self._numbers)
        lease = _Lease(machine, set(models), asyncio.get_running_loop().create_future())
        self._leases[number] = lease
        self._tell(ev.Enter(number, tuple(ev.Need(model, machine=machine) for model in models)))
        try:
            await lease.granted
            yield
        finally:
            del self._leases[number]
            self._tell(ev.Leave(number))

    def granted(self, number: int, model: str) -> bool:
        """A model is there for a lease; whether it is one of these."""
        lease = self._leases.get(number)
        if lease is None:
            return False
        lease.lacks.discard(model)
        if not lease.lacks and not lease.granted.done():
            lease.granted.set_result(None)
        return True

    def refused(self, number: int, reason: str) -> bool:
        """A lease comes to nothing; whether it is one of these."""
        lease = self._leases.get(number)
        if lease is None:
            return False
        lease.fail(ResidencyError(reason))
        return True

    def machine_down(self) -> None:
        """A Triton is gone: who can have a model nowhere any more is told."""
        for lease in self._leases.values():
            if (error := self._nowhere(lease.machine)) is not None:
                lease.fail(error)

    def _nowhere(self, machine: str) -> ResidencyError | None:
        """Why no Triton can have a model now, or not the one that is named."""
        if machine and machine not in self._state.machines:
            return ResidencyError(f"Triton {machine} is down; try again when it is back")
        if not self._state.machines:
            return ResidencyError("no Triton is up; try again when one is back")
        return None
