"""Names that stand for other models: runs, ensembles of a repository, members of fused models.

An ensemble has no process and no memory of its own: it is there where all the models are whose
processes answer its requests. Where memory is bounded it is leased as those, loaded after them and
unloaded before any of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from paceline.core.chain import Module
from paceline.core.model import ModelSpec
from paceline.residency.residency import Residency
from paceline.runtime.engine import Engine

if TYPE_CHECKING:
    from paceline.runtime.machines import Machines


class _Repository(Protocol):
    def members(self, model: str) -> tuple[str, ...]: ...


class Ensembles:
    """Which they are; `runs` are those that Paceline composes, with their declarations."""

    def __init__(self) -> None:
        self.runs: dict[str, tuple[Module, ModelSpec]] = {}

    def members(self, repository: _Repository, model: str) -> set[str]:
        """What an ensemble hands its requests to; nothing for other models."""
        if model in self.runs:
            return {member.model for member in self.runs[model][0].members}
        return set(repository.members(model))

    def processes(self, repository: _Repository, model: str) -> tuple[str, ...]:
        """What an ensemble is made of in the end, in order; a model that is none is its own."""
        found: set[str] = set()
        seen: set[str] = set()
        waiting = {model}
        while waiting:
            seen.add(each := waiting.pop())
            members = self.members(repository, each)
            found |= set() if members else {each}
            waiting |= members - seen
        return tuple(sorted(found))

    def made_of(
        self, repository: _Repository, models: Collection[str], among: Iterable[str]
    ) -> list[str]:
        """Those `among` these that any of `models` is a part of, in the order to load them."""
        return self.in_order(
            repository,
            (
                each
                for each in among
                if each not in models
                and not set(models).isdisjoint(self.processes(repository, each))
            ),
        )

    def in_order(self, repository: _Repository, models: Iterable[str]) -> list[str]:
        """Ensembles after the models that they are made of, runs last."""
        return sorted(
            models,
            key=lambda each: (each in self.runs, bool(repository.members(each)), each),
        )


class LeasedEnsembles:
    """Ensembles where models come and go; `lock` is held for one operation on a model."""

    def __init__(
        self,
        engine: Engine,
        machines: Machines,
        state: Residency,
        lock: Callable[[str, str], asyncio.Lock],
    ) -> None:
        self._engine = engine
        self._machines = machines
        self._state = state
        self._lock = lock
        self._processes: dict[str, tuple[str, ...]] = {}
        self._demanded: dict[str, Mapping[str, int]] = {}
        """With the batches at a time that the plan wants, by machine."""

    def demand(self, model: str) -> bool:
        """From now on it is loaded with what it is made of; whether it was before."""
        before = model in self._demanded
        self._demanded.setdefault(model, {})
        return before

    def want(self, model: str, batches: Mapping[str, int]) -> None:
        """So many batches at a time, by machine."""
        if model in self._demanded:
            self._demanded[model] = batches

    def forget(self, model: str) -> bool:
        """No longer demanded; whether it was."""
        return self._demanded.pop(model, None) is not None

    def processes(self, model: str) -> tuple[str, ...]:
        """The models that are leased for a model: it alone, or what an ensemble is made of."""
        return self._processes.get(model) or self.look_up(model)

    def look_up(self, model: str) -> tuple[str, ...]:
        """`processes`, as the repositories say now."""
        names = self._machines.named()
        several = (self._machines.processes(name, model) for name in names)
        found = next((each for each in several if each != (model,)), (model,))
        if names:
            self._processes[model] = found
        return found

    def none_of(self, held: Mapping[str, int]) -> dict[str, int]:
        """Those that have processes of their own."""
        return {model: n for model, n in held.items() if self.processes(model) == (model,)}

    def together(self, processes: Sequence[str]) -> str:
        """Where models shall be that are needed on one machine; "": on any."""
        if len(processes) < 2 or len(self._state.machines) < 2:
            return ""
        held = [name for model in processes for name in self._state.holders(model)]
        return min(self._state.machines, key=lambda name: (-held.count(name), name))

    def holders(self, model: str) -> list[str]:
        """Machines that hold all that a model needs, by name."""
        holders = [set(self._state.holders(each)) for each in self.processes(model)]
        return sorted(set.intersection(*holders))

    async def load_with(self, name: str, model: str) -> dict[str, int]:
        """Those that a machine can have now that it has `model`, with their batches at a time.

        Raises ResidencyError.
        """
        placed = self._machines.placed[name]
        has = {*placed, model}
        found: dict[str, int] = {}
        for each in sorted(self._demanded):
            processes = self.processes(each)
            if model in processes and each not in placed and has.issuperset(processes):
                found |= await self.load(name, each)
        return found

    async def load(self, name: str, model: str) -> dict[str, int]:
        """Load one; with its batches at a time. Raises ResidencyError."""
        async with self._lock(name, model):
            await self._machines.named()[name].repository.load(model, instances=1)
        return {model: self._demanded.get(model, {}).get(name, 1)}

    async def unload(self, name: str, model: str) -> None:
        """Unload one when its batches have ended. Raises ResidencyError."""
        await self._engine.lane_idle(name, model)
        async with self._lock(name, model):
            await self._machines.named()[name].repository.unload(model)
