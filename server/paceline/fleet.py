"""The Tritons that somebody else runs: connected to, watched, joined and left while serving.

Invariant: a machine gets requests only after its models are loaded, and its connection is closed
only after its last batch has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from time import perf_counter

from paceline.block_fetches import BlockFetches
from paceline.block_links import BlockLinks
from paceline.block_sizes import blocks_of, fetch_manifest
from paceline.core.errors import BackendError, PacelineError, ResidencyError
from paceline.core.quantities import percentile
from paceline.database import Measurements
from paceline.discovery import LOOK_EVERY_S, Discovery, TritonTarget
from paceline.runtime.controller import Controller
from paceline.runtime.machines import Machine
from paceline.runtime.placement import Site
from paceline.triton.client import TritonClient, TritonFleet
from paceline.triton.gpu_memory import GpuMemory
from paceline.triton.launcher import LocalTriton
from paceline.triton.memory import GuessedMemory, ProcessMemory
from paceline.triton.profiler import TritonProfiler
from paceline.triton.repository import TritonRepository
from paceline.triton.stuck_loads import StuckLoads
from paceline.triton.turns import Turns

logger = logging.getLogger(__name__)

_OVERHEAD_PROBES = 20
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_WATCH_EVERY_S = 1.0
_WATCH_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 60.0


class RemoteTritons:
    """See the module docstring."""

    def __init__(
        self,
        targets: Sequence[TritonTarget],
        controller: Controller,
        clients: TritonFleet,
        *,
        model_repositories: tuple[Path, ...],
        state_directory: Path,
        slots: int,
        budget_bytes: Callable[[str], float],
        on_note: Callable[[str], None],
        turns: Turns | None = None,
    ) -> None:
        """`budget_bytes`: what models may take on a machine of that hardware; `turns`: where other
        workers change the same Tritons' models.
        """
        self._turns = turns
        self._discovery = Discovery(targets)
        self._controller = controller
        self._clients = clients
        self._model_repositories = model_repositories
        self._state_directory = state_directory
        self._slots = slots
        self._budget_bytes = budget_bytes
        self._on_note = on_note
        self._known: dict[str, TritonTarget] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._lost: set[str] = set()
        """Those that went away and were not taken back yet."""
        self._missing: dict[str, set[str]] = {}
        """Models that were not there at the last look at a machine."""
        self._looking: asyncio.Task[None] | None = None
        self._refused: set[TritonTarget] = set()
        self._count = 0

    async def start(self) -> None:
        """Connect to every machine there is. Raises ConfigError, ResidencyError."""
        for target in await self._discovery.look():
            self._on_note(f"connecting to Triton at {target.url}")
            self._controller.add_machine(await self._connect(target))
        if not self._known:
            raise ResidencyError("no machine was found; --triton names none at the moment")

    def follow(self) -> None:
        """From now on machines come and go."""
        if self._discovery.changes:
            self._looking = asyncio.create_task(self._look(), name="discover")

    async def close(self) -> None:
        """Stop looking and watching; connections are the clients' owner's."""
        tasks = [*self._watches.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect(self, target: TritonTarget) -> Machine:
        name = f"triton-{self._count}"
        client = await TritonClient.connect(target.url, name=name)
        self._count += 1
        self._clients.add(name, client)
        # Its port may be another one next time; this processor is the same.
        local = target.url.rpartition(":")[0] in _LOOPBACK
        machine = await connected_machine(
            client,
            Site(name, target.hardware, self._slots),
            self._model_repositories,
            self._state_directory,
            local=local,
            budget_bytes=self._budget_bytes(target.hardware),
            turns=self._turns,
        )
        self._known[name] = target
        self._watches[name] = asyncio.create_task(self._watch(client), name=f"watch {name}")
        return machine

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._follow(await self._discovery.look())
            except PacelineError as error:
                logger.warning("the machines stay as they are: %s", error)
            except Exception:
                # A bug here must not end discovery for good, unseen.
                logger.exception("looking for machines failed")

    async def _follow(self, found: Collection[TritonTarget]) -> None:
        for name in [n for n, target in self._known.items() if target not in found]:
            await self._leave(name)
        for target in found:
            if target not in self._known.values():
                await self._join(target)

    async def _join(self, target: TritonTarget) -> None:
        """A machine that cannot be used is asked again at the next look, and spoken of once."""
        before = set(self._known)
        try:
            machine = await self._connect(target)
            await self._controller.join(machine)
        except PacelineError as error:
            if target not in self._refused:
                logger.warning("Triton %s is not used: %s", target.url, error)
            self._refused.add(target)
            for name in self._known.keys() - before:
                await self._forget(name)
            return
        self._refused.discard(target)
        self._on_note(f"Triton {target.url} joined as {machine.site.name}")

    async def _leave(self, name: str) -> None:
        target = self._known[name]
        if not await self._controller.leave(name, timeout_s=_LEAVE_TIMEOUT_S):
            logger.warning("%s left with batches under way", name)
        await self._forget(name)
        self._on_note(f"Triton {target.url} ({name}) left")

    async def _forget(self, name: str) -> None:
        del self._known[name]
        watch = self._watches.pop(name)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        self._lost.discard(name)
        self._missing.pop(name, None)
        await self._clients.remove(name)

    async def _watch(self, client: TritonClient) -> None:
        """Notice when a machine goes away, or comes back empty."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                await self.look_after(client)
            except Exception:
                # A bug here must not end the watch for good, unseen.
                logger.exception("looking after %s failed", client.name)

    async def look_after(self, client: TritonClient) -> None:
        """One look at a machine."""
        name, machines = client.name, self._controller.machines
        alive = await client.live(timeout_s=_WATCH_TIMEOUT_S)
        if machines.is_up(name):
            try:
                if alive and not await self._is_empty(client):
                    return
            except BackendError:
                # It went between the two questions.
                alive = False
            what = "restarted" if alive else "does not answer"
            logger.error("Triton %s %s", client.url, what)
            machines.down(name)
            self._lost.add(name)
        # One that was never used is being loaded and measured: its calls need its connection.
        if alive and name in self._lost:
            try:
                await client.retarget(client.url)
                await self._controller.machine_up(name)
            except ResidencyError as error:
                logger.error("Triton %s is not usable yet: %s", client.url, error)
            else:
                self._lost.discard(name)
                logger.warning("Triton %s is back, models loaded", client.url)

    async def _is_empty(self, client: TritonClient) -> bool:
        """Whether a Triton has none of its models: it restarted. Of others that it lost it is told
        at the second look: by then nobody is about to load them. Raises BackendError.
        """
        name, machines = client.name, self._controller.machines
        if not (held := machines.models_on(name)):
            return False  # where models come and go, what is there is looked after elsewhere
        ready = {state.name for state in await client.index(ready=True)}
        missing = set(machines.missing(name, ready))
        if missing == held.keys():
            return True
        if again := sorted(missing & self._missing.pop(name, set())):
            machines.lost(name, again)
        else:
            self._missing[name] = missing
        return False


async def connected_machine(
    client: TritonClient,
    site: Site,
    model_repositories: tuple[Path, ...],
    state_directory: Path,
    *,
    local: bool,
    budget_bytes: float = inf,
    process: LocalTriton | None = None,
    fetches: BlockFetches | None = None,
    turns: Turns | None = None,
) -> Machine:
    """A Triton that answers, as the controller uses it; `process` and `fetches` where we run it
    ourselves.
    """
    on_load = fetches.begin if fetches is not None else None
    repository = TritonRepository(
        client,
        model_repositories,
        on_load=on_load,
        turns=turns,
        stuck=StuckLoads(lambda: process.pid, process.restart) if process is not None else None,
    )
    profiler = TritonProfiler(repository, cache_directory=state_directory, local=local)
    took_s = await _probe(client)
    machine = Machine(
        site,
        repository,
        profiler,
        overhead_s=percentile(took_s, 0.95),
        round_trip_s=min(took_s),
        budget_bytes=budget_bytes,
        address=client.url,
    )
    sizes = Measurements(state_directory)
    if process is None:
        return replace(machine, memory=GuessedMemory(repository, sizes, blocks_of))
    return replace(
        machine,
        memory=ProcessMemory(
            repository, sizes, lambda: process.pid, blocks_of, fetch_manifest, GpuMemory.find()
        ),
        restart=process.restart,
        links=BlockLinks(lambda: process.pid),
    )


async def _probe(client: TritonClient) -> list[float]:
    """What empty calls through our loop and the network to that Triton take."""
    took_s = []
    for _ in range(_OVERHEAD_PROBES):
        started_s = perf_counter()
        await client.live()
        took_s.append(perf_counter() - started_s)
    return took_s
