"""The Tritons behind the server: which models each holds, whether it is up, repairing what breaks.

Invariant: the engine is only told of instances that are loaded; `placed` is what Triton was asked
for last; what a run is made of is loaded before it. Not concurrent: the controller makes one change
at a time (repairs are of one model and its runs, and take them out of use while they last).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass
from math import inf
from time import perf_counter

from paceline.core.chain import Chain, Module
from paceline.core.errors import ResidencyError, RunError
from paceline.core.model import ModelSpec
from paceline.core.ports import LoadLinks, ModelMemory, ModelRepository, Profiler
from paceline.runtime.engine import Engine
from paceline.runtime.ensembles import Ensembles
from paceline.runtime.placement import Share, Site
from paceline.runtime.residence import Residence

logger = logging.getLogger(__name__)

Placed = Mapping[str, Mapping[str, int]]
"""Instances by machine and model."""

_REPAIRABLE = ("is not healthy", "deadline exceeded")
"""What a batch's failure says when the model's own process is dead or hangs."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One Triton as the controller uses it.

    `overhead_s` is what the front and the network add to every execution there, measured (p95), and
    `round_trip_s` the least that a call takes; `budget_bytes` bounds what its models may take,
    which `memory` tells; `restart` ends a Triton of ours, which is then started again; `links` are
    what it loads through, where that is divided; `address` is what others know it by.
    """

    site: Site
    repository: ModelRepository
    profiler: Profiler
    overhead_s: float = 0.0
    round_trip_s: float = 0.0
    budget_bytes: float = inf
    memory: ModelMemory | None = None
    restart: Callable[[], None] | None = None
    address: str = ""
    links: LoadLinks | None = None


class Machines:
    """See the module docstring."""

    def __init__(self, engine: Engine, share: Share) -> None:
        self._engine = engine
        self._share = share
        self._machines: dict[str, Machine] = {}
        self._up: set[str] = set()
        self._repairing: dict[frozenset[tuple[str, str]], asyncio.Task[None]] = {}
        """Repairs by the models on machines that are not used while they last."""
        self.ensembles = Ensembles()
        self.placed: dict[str, dict[str, int]] = {}
        """Instances by machine and model."""
        self._loading: set[tuple[str, str]] = set()
        self._load_s: dict[tuple[str, str], float] = {}
        """What the last load of a model took on a machine."""
        self.residence = Residence(engine, self)

    def add(self, machine: Machine) -> None:
        """One more Triton; nothing is sent to it before `announce`."""
        self._machines[machine.site.name] = machine
        self._engine.suspicions.know(machine.site.name, machine.address)
        self.placed[machine.site.name] = {}
        for run, spec in self.ensembles.runs.values():
            machine.repository.compose(run, spec)
        if self.residence.engaged:
            self.residence.machine_up(machine.site.name, {})
        elif machine.budget_bytes != inf:
            self.residence.engage()

    async def adopt(self, names: Iterable[str]) -> None:
        """Count what these Tritons hold already, where memory is bounded. Raises ResidencyError."""
        if self.residence.engaged:
            for name in names:
                held = await self._machines[name].repository.instances()
                if held:
                    self.residence.machine_up(name, held)

    async def remove(self, name: str, *, timeout_s: float) -> bool:
        """Send nothing more to a Triton and forget it when its batches have ended; False when
        time ran out first.
        """
        site = self._machines[name].site
        self._up.discard(name)
        self._engine.machine_up(name, site.hardware, self._share.of(site.slots), {})
        try:
            async with asyncio.timeout(timeout_s):
                for model in sorted(self.placed[name]):
                    await self._engine.lane_idle(name, model)
        except TimeoutError:
            return False
        finally:
            if self.residence.engaged:
                self.residence.machine_down(name)
            self._engine.machine_down(name)
            del self._machines[name], self.placed[name]
        return True

    def keep(self, chains: Iterable[Chain]) -> None:
        """Unload what chains with a keep-alive do not use. Several workers share their machines:
        none of them knows what the others use, so that nothing is unloaded there.
        """
        if self.come_and_go(chains):
            self.residence.engage()

    def come_and_go(self, chains: Iterable[Chain]) -> bool:
        """Whether models come and go once these chains are served."""
        kept = self._share.count == 1 and any(c.keep_alive_s is not None for c in chains)
        return kept or self.residence.engaged

    def using(self, model: str, name: str) -> AbstractAsyncContextManager[None]:
        """That model is loaded on that Triton while the block runs. Raises ResidencyError."""
        return self.residence.using(model, name) if self.residence.engaged else nullcontext()

    def needed_bytes(self, model: str) -> int:
        """See `Residence.needed_bytes`."""
        return self.residence.needed_bytes(model)

    def all(self) -> tuple[Machine, ...]:
        return tuple(self._machines.values())

    def named(self) -> Mapping[str, Machine]:
        return self._machines

    def sites(self) -> list[Site]:
        return [machine.site for machine in self._machines.values()]

    def usable(self) -> list[Site]:
        """The Tritons that are up; before the first is announced, all."""
        return [m.site for n, m in self._machines.items() if n in self._up or not self._up]

    def up_now(self) -> frozenset[str]:
        return frozenset(self._up)

    @property
    def any_up(self) -> bool:
        return bool(self._up)

    def is_up(self, name: str) -> bool:
        """Whether batches are sent to that Triton."""
        return name in self._up

    def missing(self, name: str, ready: Collection[str]) -> list[str]:
        """Models that a Triton should have, that are not ready and that nobody here is loading."""
        return [
            model
            for model in sorted(self.models_on(name))
            if model not in ready
            and (name, model) not in self._loading
            and not self._is_repaired(name, model)
        ]

    def models_on(self, name: str) -> dict[str, int]:
        """Instances of what a Triton should have, the runs made of it left out."""
        return {m: count for m, count in self.placed[name].items() if m not in self.ensembles.runs}

    def has(self, name: str, model: str) -> bool:
        """Whether a Triton should have that model."""
        return model in self.placed.get(name, ())

    def announce(self, name: str) -> None:
        """Tell the engine what a Triton holds; from now on it is up."""
        site = self._machines[name].site
        self._up.add(name)
        instances = {
            model: self._share.of(count)
            for model, count in self.placed[name].items()
            if not self._is_repaired(name, model)
        }
        self._engine.machine_up(name, site.hardware, self._share.of(site.slots), instances)

    def announce_up(self) -> None:
        """`announce` every Triton that is up."""
        for name in sorted(self._up):
            self.announce(name)

    # -- models -----------------------------------------------------------------------------

    async def names(self) -> list[str]:
        """Every model that some repository knows. Raises ResidencyError."""
        found = {s.name for m in self._machines.values() for s in await m.repository.index()}
        return sorted(found)

    async def exists(self, model: str) -> bool:
        """Whether a repository has it; one that cannot be asked may."""
        try:
            return model in await self.names()
        except ResidencyError:
            return True

    async def load(self, model: str) -> ModelSpec:
        """Load it on every Triton, as often as it was, or where models come and go on one.

        Raises ResidencyError, ConfigError.
        """
        if model in self.ensembles.runs:
            raise ResidencyError(f"{model!r} is part of a chain, no model of a repository")
        if self.residence.engaged:
            return await self.residence.introduce(model)
        spec: ModelSpec | None = None
        for name, machine in self._machines.items():
            instances = self.placed[name].get(model, 1)
            await self._load(name, model, instances)
            spec = await machine.repository.spec(model)
        if spec is None:
            raise ResidencyError(f"model {model!r} cannot be loaded: there is no machine")
        return spec

    async def unload(self, model: str) -> None:
        """Unload it from every Triton; nothing is sent to it any more. Raises ResidencyError."""
        if self.residence.engaged:
            await self.residence.forget(model)
            return
        for name, machine in self._machines.items():
            self.placed[name].pop(model, None)
            if name in self._up:
                self.announce(name)
            await machine.repository.unload(model)

    async def grow_to(self, placed: Placed, *, first: bool = False) -> None:
        """Load what is missing of these counts on every Triton that is up (`first`: on all).

        Requests are sent to it from the next `announce` on. Raises ResidencyError, for a run
        RunError.
        """
        if self.residence.engaged:
            self.residence.want(placed)
            return
        for name in self._machines:
            if not first and name not in self._up:
                continue
            for model in self._in_order(name, placed.get(name, ())):
                if self.placed[name].get(model, 0) < placed[name][model]:
                    await self._load(name, model, placed[name][model])

    async def shrink_to(self, placed: Placed) -> None:
        """Give up what is above these counts, after requests have stopped being sent to it.

        What Triton does not give up stays, unused: that is logged, no reason to fail.
        """
        if self.residence.engaged:
            return
        for name in sorted(self._up):
            fewer = {
                model: instances
                for model, instances in sorted(placed.get(name, {}).items())
                if self.placed[name].get(model, 0) > instances
            }
            if not fewer:
                continue
            self.placed[name].update(fewer)
            self.announce(name)
            for model, instances in fewer.items():
                try:
                    await self._load(name, model, instances)
                except ResidencyError as error:
                    logger.warning("%s keeps instances of %s: %s", name, model, error)

    def load_s(self, name: str, placed: Mapping[str, int]) -> float:
        """About how long `grow_to` will take on a machine, by what loads took there before."""
        return sum(
            self._load_s.get((name, model), 0.0)
            for model, instances in placed.items()
            if self.placed[name].get(model, 0) < instances
        )

    async def _load(self, name: str, model: str, instances: int) -> None:
        started = perf_counter()
        self._loading.add((name, model))
        try:
            await self._machines[name].repository.load(model, instances=instances)
        except ResidencyError as error:
            if model not in self.ensembles.runs:
                raise
            raise RunError(str(error), model=model) from None
        finally:
            self._loading.discard((name, model))
        self._load_s[name, model] = perf_counter() - started
        self.placed[name][model] = instances

    # -- runs -------------------------------------------------------------------------------

    def compose(self, run: Module, spec: ModelSpec) -> None:
        """From now on `run`'s model, declared as `spec`, can be loaded wherever its members are."""
        self.ensembles.runs[run.model] = run, spec
        for machine in self._machines.values():
            machine.repository.compose(run, spec)

    async def drop(self, model: str) -> None:
        """Unload a run; nothing is sent to it any more. What Triton does not give up stays there,
        unused and without memory of its own.
        """
        for name, machine in self._machines.items():
            if self.placed[name].pop(model, None) is None or name not in self._up:
                continue
            self.announce(name)
            try:
                await machine.repository.unload(model)
            except ResidencyError as error:
                logger.warning("%s keeps %s: %s", name, model, error)
        del self.ensembles.runs[model]

    def processes(self, name: str, model: str) -> tuple[str, ...]:
        """The models whose processes answer its requests: it alone, or what an ensemble is of."""
        return self.ensembles.processes(self._machines[name].repository, model)

    def by_level(self, models: Iterable[str]) -> tuple[list[str], list[str]]:
        """Models that are no ensembles anywhere, and those that are."""
        own: list[str] = []
        ensembles: list[str] = []
        for model in models:
            alone = all(self.processes(name, model) == (model,) for name in self._machines)
            (own if alone else ensembles).append(model)
        return own, ensembles

    def made_of(self, name: str, models: Collection[str]) -> list[str]:
        """Ensembles on a Triton that any of these models is a part of."""
        repository = self._machines[name].repository
        return self.ensembles.made_of(repository, models, self.placed[name])

    def _in_order(self, name: str, models: Iterable[str]) -> list[str]:
        return self.ensembles.in_order(self._machines[name].repository, models)

    # -- what goes wrong --------------------------------------------------------------------

    def down(self, name: str) -> None:
        """A Triton is gone: nothing more is sent to it."""
        if self.residence.engaged:
            self.residence.machine_down(name)
        self._up.discard(name)
        self._engine.machine_down(name)

    async def up(self, name: str) -> list[str]:
        """A Triton is back: load what it had, then use it. Returns what did not load.

        Raises ResidencyError when nothing loads, or the Triton goes again: all is to be tried once
        more then.
        """
        if self.residence.engaged:
            held = await self._machines[name].repository.instances()
            self.residence.machine_up(name, held)
            self.announce(name)
            return []
        placed = self.placed[name]
        repository = self._machines[name].repository
        failures: dict[str, ResidencyError] = {}
        for model in self._in_order(name, placed):
            try:
                await repository.load(model, instances=placed[model])
            except ResidencyError as error:
                # It says nothing about a model that a Triton died while it loaded it.
                await repository.index()
                logger.error("model %s did not load again on %s: %s", model, name, error)
                failures[model] = error
        if placed and len(failures) == len(placed):
            raise next(iter(failures.values()))
        for model in failures:
            del placed[model]
        self.announce(name)
        return sorted(failures)

    def broken(self, name: str, model: str, reason: str) -> None:
        """A model on a Triton lost a batch. Where its process died or hangs, load it afresh; a
        Triton that is gone altogether comes back through `up`.
        """
        dead = any(words in reason for words in _REPAIRABLE)
        if not dead or name not in self._up or self._is_repaired(name, model):
            return
        logger.warning("model %s on %s is broken (%s); loading it afresh", model, name, reason)
        # An ensemble does not tell which of its members it was: all of them are loaded afresh.
        processes = self.processes(name, model)
        ensembles = self.made_of(name, processes)
        if ensembles or self._share.count > 1:
            # Others wait in Triton for the process that died, and get its answers if it did not.
            self._engine.suspicions.tell(name, (*processes, *ensembles))
        self._begin_repair(name, processes)

    def lost(self, name: str, models: Sequence[str]) -> None:
        """A Triton that should have these models does not: somebody else unloaded them."""
        logger.warning("%s has lost %s; loading again", name, ", ".join(models))
        self._begin_repair(name, models, gone=True)

    def _begin_repair(self, name: str, models: Sequence[str], *, gone: bool = False) -> None:
        ensembles = self.made_of(name, models)
        unused = frozenset((name, each) for each in (*models, *ensembles))
        self._repairing[unused] = asyncio.create_task(
            self._repair(name, models, ensembles, unused, gone=gone),
            name=f"repair {', '.join(models)}",
        )
        self.announce(name)

    async def close(self) -> None:
        """Give up repairs under way."""
        await self.residence.close()
        tasks = list(self._repairing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _repair(
        self,
        name: str,
        models: Sequence[str],
        ensembles: Sequence[str],
        unused: frozenset[tuple[str, str]],
        *,
        gone: bool,
    ) -> None:
        """No batch is sent to them while this lasts, so that none is lost to a probe."""
        try:
            async with AsyncExitStack() as held:
                for model in sorted((*models, *ensembles)):
                    await held.enter_async_context(self.residence.lock(name, model))
                repository = self._machines[name].repository
                await asyncio.gather(
                    *(self._again(repository, name, model, afresh=not gone) for model in models)
                )
                for model in ensembles:
                    await self._again(repository, name, model, afresh=False)
        finally:
            del self._repairing[unused]
            if name in self._up:
                self.announce(name)

    async def _again(
        self, repository: ModelRepository, name: str, model: str, *, afresh: bool
    ) -> None:
        """Load a model that a Triton should have, or that one which it should have is made of."""
        instances = self.placed[name].get(model)
        if instances is None and not self.made_of(name, [model]):
            return
        try:
            if afresh:
                await repository.repair(model, instances=instances)
            else:
                await repository.load(model, instances=instances or 1)
        except ResidencyError as error:
            logger.error("model %s on %s could not be repaired: %s", model, name, error)

    def _is_repaired(self, name: str, model: str) -> bool:
        return any((name, model) in unused for unused in self._repairing)
