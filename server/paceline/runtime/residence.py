"""Residency, performed: leases from the engine's requests, loads and unloads on the Tritons.

Off until a machine has a memory budget or a chain a keep-alive (`engage`): where everything fits
and stays, nothing of this costs a request anything. Invariant: `Machines.placed` says what batches
are sent to; a model is taken out of it before its unload begins, and put in after its load ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any

from paceline.core.errors import (
    BackendError,
    ErrorKind,
    LoadTimeoutError,
    ResidencyError,
)
from paceline.core.model import ModelSpec
from paceline.dispatch import ChainRoute, Entered, Passed, Reached, TooCold
from paceline.residency import events as ev
from paceline.residency.ledger import Footprint
from paceline.residency.residency import Residency
from paceline.residency.state import Limits
from paceline.runtime.bandwidth import Bandwidth
from paceline.runtime.engine import Engine
from paceline.runtime.ensembles import LeasedEnsembles
from paceline.runtime.interference import Interference, Slack
from paceline.runtime.needs import needs
from paceline.runtime.own_leases import OwnLeases
from paceline.runtime.sizes import Sizes, footprint_of

if TYPE_CHECKING:
    from paceline.runtime.machines import Machines

logger = logging.getLogger(__name__)

PACE_EVERY_S = 0.01
"""How often, at most, it is looked at what running requests can bear."""

FIND_WITHIN_S = 2.0
"""How long a model's load waits to be told what blocks the model has."""


class Residence:
    """Implements `engine.Leasing`; see the module docstring. On the event loop's thread."""

    def __init__(self, engine: Engine, machines: Machines, limits: Limits | None = None) -> None:
        self._engine = engine
        self._machines = machines
        self.state = Residency(limits)
        self.engaged = False
        self.interference = Interference()
        self._slack = Slack()
        self._needs: dict[tuple[str, tuple[int, ...]], tuple[ev.Need, ...]] = {}
        self._routes: dict[str, ChainRoute] = {}
        self._ids = count(-1, -1)
        self._own = OwnLeases(self.state, self._tell, self._ids)
        self._wishes: dict[int, str] = {}
        self._gone: dict[str, list[asyncio.Future[None]]] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._ensembles = LeasedEnsembles(engine, machines, self.state, self.lock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None
        self._paced: dict[str, tuple[tuple[float, ...], float]] = {}
        self._paced_s = -inf
        self._sizes = Sizes(machines, self.state, self._tell)
        self._bandwidth = Bandwidth(machines, self._loading, self._tell)

    def engage(self) -> None:
        """From now on models come and go; what is loaded now stays for the time being."""
        if self.engaged:
            return
        self.engaged = True
        placed = {name: self._machines.models_on(name) for name in self._machines.named()}
        for model in sorted({model for held in placed.values() for model in held}):
            if self._ensembles.processes(model) == (model,):
                self._declare(model)
            else:
                self._ensembles.demand(model)
        self.want(placed)
        for name, held in placed.items():
            if self._machines.is_up(name) or not held:
                self._up(name, self._ensembles.none_of(held))
        self._engine.lease(self)
        self._spawn(self._sizes.watch(), "measure models")

    async def close(self) -> None:
        """Give up what is under way."""
        if self._wake is not None:
            self._wake.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what the machines and the controller ask -------------------------------------------

    async def introduce(self, model: str) -> ModelSpec:
        """Have a model loaded somewhere, afresh where it was; from now on it can be demanded.

        Raises ResidencyError, and forgets a model that did not load.
        """
        processes = self._ensembles.look_up(model)
        if processes == (model,):
            return await self._introduce(model)
        for each in processes:
            if not self._is_known(each):
                await self._introduce(each)
        before = self._ensembles.demand(model)
        try:
            async with self.using(model):
                for name in self._ensembles.holders(model):
                    self._machines.placed[name] |= await self._ensembles.load(name, model)
                return await self._spec(model, self._ensembles.holders(model))
        except ResidencyError:
            if not before:
                self._ensembles.forget(model)
            raise

    async def _introduce(self, model: str) -> ModelSpec:
        finding = self._spawn(self._find_blocks(model), f"find blocks of {model}")
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(finding), FIND_WITHIN_S)
        known = self._is_known(model)
        before = self.state.holders(model) if known else []
        self._declare(model)
        try:
            async with self.using(model):
                for name in before:
                    await self._load_again(name, model)
                return await self._spec(model, self.state.holders(model))
        except ResidencyError:
            if not known:
                self._tell(ev.Forget(model))
            raise

    def _is_known(self, model: str) -> bool:
        return model in self.state.models and not self.state.models[model].withdrawn

    async def _spec(self, model: str, holders: Sequence[str]) -> ModelSpec:
        for name in holders:
            if (machine := self._machines.named().get(name)) is not None:
                return await machine.repository.spec(model)
        raise ResidencyError(f"{model!r} went while it was loaded; try again")

    async def forget(self, model: str) -> None:
        """Unload a model everywhere, after the requests that use it. Raises ResidencyError."""
        if self._ensembles.forget(model):
            for machine, placed in list(self._machines.placed.items()):
                if model in placed:
                    self._unplace(machine, (model,))
                    await self._ensembles.unload(machine, model)
        if model not in self.state.models:
            return
        self._tell(ev.Forget(model))
        while (name := self._holder(model)) is not None:
            if self.state.machines[name].ledger.leaks(model):
                raise ResidencyError(f"model {model!r} was not unloaded by {name}")
            changed = asyncio.get_running_loop().create_future()
            self._gone.setdefault(model, []).append(changed)
            await changed

    @asynccontextmanager
    async def using(self, model: str, machine: str = "") -> AsyncIterator[None]:
        """Lease a model, on that machine where one is named; it is there while the block runs.

        Raises ResidencyError where it cannot be had, also because no Triton is up that could have
        it: who waits here may be what keeps one from being used again.
        """
        processes = self._ensembles.processes(model)
        async with self._own.held(processes, machine or self._ensembles.together(processes)):
            yield
        for each in processes:
            for name in self.state.holders(each):
                await self._sizes.measure(name, each)

    def want(self, placed: Mapping[str, Mapping[str, int]]) -> None:
        """Instances of each model that the plan would have on each machine."""
        models = sorted({model for held in placed.values() for model in held})
        for model in models:
            instances = {name: held[model] for name, held in placed.items() if model in held}
            self._ensembles.want(model, instances)
            if model in self.state.models:
                footprint = self.state.models[model].footprint
                self._tell(ev.Declare(model, footprint, instances))

    def machine_up(self, name: str, resident: Mapping[str, int]) -> None:
        """A Triton is there, and holds `resident`: maybe another Paceline was here before."""
        own = self._ensembles.none_of(resident)
        for model in sorted(own):
            self._declare(model)
        self._machines.placed[name].clear()
        self._machines.placed[name].update(resident)
        self._needs.clear()
        self._up(name, own)

    def machine_down(self, name: str) -> None:
        """A Triton is gone, and everything it held."""
        self._tell(ev.MachineDown(name))
        self._machines.placed[name].clear()
        self._needs.clear()
        for model in list(self._gone):
            self._changed(model)
        self._own.machine_down()

    def lock(self, machine: str, model: str) -> asyncio.Lock:
        """One operation on a model of a machine at a time."""
        return self._locks.setdefault((machine, model), asyncio.Lock())

    def needed_bytes(self, model: str) -> int:
        """What one instance takes on a machine that holds nothing else, as it is believed now; 0
        where nothing is known, as while models do not come and go.
        """
        known = (self.state.models.get(each) for each in self._ensembles.processes(model))
        return sum(each.footprint.alone_bytes() for each in known if each is not None)

    def load_s(self, model: str) -> float:
        known = (self.state.models.get(each) for each in self._ensembles.processes(model))
        return max((each.load_s for each in known if each is not None), default=0.0)

    # -- what the engine tells (`engine.Leasing`) -------------------------------------------

    def ready_in_s(self, model: str, now_s: float) -> float:
        """See `Leasing.ready_in_s`."""
        return max(
            (
                self.state.ready_in_s(each, now_s)
                for each in self._ensembles.processes(model)
                if each in self.state.models
            ),
            default=0.0,
        )

    def told(self, action: Entered | Reached | Passed | TooCold) -> None:
        """See `Leasing.told`."""
        match action:
            case Entered():
                wanted = self._needs_of(action)
                self._tell(ev.Enter(action.request, wanted, action.deadline_s, action.priority))
            case Reached():
                for each in self._ensembles.processes(action.model):
                    self._tell(ev.Reach(action.request, each))
            case Passed():
                for each in self._ensembles.processes(action.model):
                    self._tell(ev.Passed(action.request, each, action.used))
            case TooCold():
                self._wish(action)

    def ended(self, request: int) -> None:
        """See `Leasing.ended`."""
        self._tell(ev.Leave(request))

    def executed(self, machine: str, model: str, rows: int, took_s: float) -> None:
        """See `Leasing.executed`."""
        known = self._machines.named().get(machine)
        if known is not None:
            now_s = asyncio.get_running_loop().time()
            self.interference.count(machine, model, rows, took_s, self._loading(machine), now_s)

    def installed(self, route: ChainRoute) -> None:
        """See `Leasing.installed`."""
        chain = route.bound.chain
        self._routes[chain.name] = route
        self._needs = {key: value for key, value in self._needs.items() if key[0] != chain.name}
        rates: dict[str, float] = {}
        for module in route.modules:
            for each in self._ensembles.processes(module.model):
                rates[each] = rates.get(each, 0.0) + module.rate_rps
                if each not in self.state.models:
                    self._declare(each)
        if not route.bound.direct:
            self._tell(ev.ChainUp(chain.name, rates, chain.priority, chain.keep_alive_s))

    def removed(self, chain: str) -> None:
        """See `Leasing.removed`."""
        self._routes.pop(chain, None)
        self._tell(ev.ChainDown(chain))

    # -- steps ------------------------------------------------------------------------------

    def _needs_of(self, action: Entered) -> tuple[ev.Need, ...]:
        """Cached by chain and modules: a chain has few sets of outputs that are asked for."""
        first = action.modules[0]
        key = (first.chain, tuple([id(module) for module in action.modules]))
        found = self._needs.get(key)
        if found is None:
            found = self._needs[key] = needs(
                action.modules, self._ensembles.processes, self._ensembles.together
            )
        return found

    def _wish(self, action: TooCold) -> None:
        """A request was refused because its models are not there: have them for the next one."""
        waited_for = set(self._wishes.values())
        for model in dict.fromkeys(
            p for each in action.models for p in self._ensembles.processes(each)
        ):
            if model not in waited_for and not self.state.leases.any(model):
                number = next(self._ids)
                self._wishes[number] = model
                self._tell(ev.Enter(number, (ev.Need(model),)))

    async def _find_blocks(self, model: str) -> None:
        """Tells them as soon as they are known; what is loaded by then has been measured."""
        for machine in self._machines.all():
            if machine.memory is not None:
                await machine.memory.find_blocks(model)
        known = self.state.models.get(model)
        if known is not None and not known.loads:
            found = self._guessed(model)
            if found.blocks != known.footprint.blocks:
                self._tell(ev.SizeMeasured(model, found.own_bytes, found.blocks))

    def _declare(self, model: str) -> None:
        known = self.state.models.get(model)
        footprint = known.footprint if known is not None else self._guessed(model)
        instances = known.instances if known is not None else {}
        self._tell(ev.Declare(model, footprint, instances))

    def _guessed(self, model: str) -> Footprint:
        own_bytes, blocks = 0, dict[str, int]()
        for machine in self._machines.all():
            if machine.memory is not None:
                its = machine.memory.blocks(model)
                own_bytes = max(own_bytes, machine.memory.guessed_bytes(model, its))
                blocks.update(its)
        return Footprint(own_bytes, blocks)

    def _up(self, name: str, resident: Mapping[str, int]) -> None:
        machine = self._machines.named()[name]
        restartable = machine.restart is not None
        self._tell(ev.MachineUp(name, machine.budget_bytes, dict(resident), restartable))

    def _loading(self, machine: str) -> int:
        known = self.state.machines.get(machine)
        return known.starting if known is not None else 0

    def _holder(self, model: str) -> str | None:
        for name, machine in sorted(self.state.machines.items()):
            if machine.ledger.get(model) is not None:
                return name
        return None

    def _tell(self, event: ev.Event) -> None:
        if not self.engaged:
            return
        now_s = asyncio.get_running_loop().time()
        self._pace(now_s)
        self._perform(self.state.handle(event, now_s=now_s))

    def factors(self, name: str, now_s: float) -> tuple[float, ...]:
        """How many times as long batches take on a machine under 1, 2, ... loads at a time."""
        return self.interference.factors(name, self.state.limits.most_loads, now_s)

    def _pace(self, now_s: float) -> None:
        """What runs, and what loads do to it, before anything is loaded."""
        if not self.state.limits.paced or now_s - self._paced_s < PACE_EVERY_S:
            return
        self._paced_s = now_s
        self._slack.count(self._engine.dispatcher.bearable(now_s), now_s)
        if not self.state.waiting:
            return
        bearable = self._slack.bearable(now_s)
        for name in self.state.machines:
            pace = (self.factors(name, now_s), bearable)
            if self._paced.get(name) != pace:
                self._paced[name] = pace
                self._perform(self.state.handle(ev.Pace(name, *pace), now_s=now_s))

    def _perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.Load():
                    self._spawn(self._load(action), f"load {action.model}")
                    if (following := self._bandwidth.following(action.machine)) is not None:
                        self._spawn(following, f"follow the loads of {action.machine}")
                case ev.Unload():
                    ensembles = self._machines.made_of(action.machine, (action.model,))
                    self._unplace(action.machine, (*ensembles, action.model))
                    self._spawn(self._unload(action, ensembles), f"unload {action.model}")
                case ev.Recycle():
                    self._spawn(self._recycle(action), f"recycle {action.machine}")
                case ev.Grant():
                    self._grant(action)
                case ev.Refuse():
                    self._refuse(action)
                case ev.Split():
                    self._spawn(self._bandwidth.split(action), f"split {action.machine}")
                case ev.Wake():
                    if self._wake is not None:
                        self._wake.cancel()
                    loop = asyncio.get_running_loop()
                    self._wake = loop.call_at(action.at_s, self._tell, ev.Tick())

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _grant(self, action: ev.Grant) -> None:
        if self._own.granted(action.request, action.model):
            return
        if self._wishes.pop(action.request, None) is not None:
            asyncio.get_running_loop().call_soon(self._tell, ev.Leave(action.request))

    def _refuse(self, action: ev.Refuse) -> None:
        if self._own.refused(action.request, action.reason):
            return
        if self._wishes.pop(action.request, None) is None:
            error = BackendError(action.reason, kind=ErrorKind.UNAVAILABLE)
            asyncio.get_running_loop().call_soon(self._engine.abort, action.request, error)

    # -- loads and unloads ------------------------------------------------------------------

    async def _load(self, action: ev.Load) -> None:
        name, model = action.machine, action.model
        machine = self._machines.named()[name]
        logger.info("loading %s on %s, instances: %d", model, name, action.instances)
        try:
            async with self.lock(name, model):
                await machine.repository.load(model, instances=action.instances)
                found = await footprint_of(machine, model, action.instances)
            ensembles = await self._ensembles.load_with(name, model)
        except LoadTimeoutError as error:
            logger.error("%s", error)
            self._tell(ev.LoadHung(action.operation, name, model, str(error)))
        except ResidencyError as error:
            logger.warning("%s", error)
            self._tell(ev.LoadFailed(action.operation, name, model, str(error)))
        else:
            logger.info("loaded %s on %s", model, name)
            if self.state.is_under_way(name, model, action.operation):
                self._machines.placed[name] |= {model: action.instances, **ensembles}
                own_bytes, blocks = None, None
                if found is not None and machine.memory is not None:
                    own_bytes, blocks = found.own_bytes, found.blocks
                    machine.memory.remember(model, own_bytes, blocks)
                self._tell(ev.LoadDone(action.operation, name, model, own_bytes, blocks))
                if self._machines.is_up(name):
                    self._machines.announce(name)
        self._changed(model)

    async def _load_again(self, name: str, model: str) -> None:
        """Afresh, where it still is; its instances may be being changed. Raises ResidencyError."""
        async with self.lock(name, model):
            instances = self._machines.placed.get(name, {}).get(model)
            if instances is not None:
                await self._machines.named()[name].repository.load(model, instances=instances)

    def _unplace(self, name: str, models: Sequence[str]) -> None:
        """No batch is sent to them from now on."""
        placed = self._machines.placed[name]
        gone = [model for model in models if placed.pop(model, None) is not None]
        if gone and self._machines.is_up(name):
            self._machines.announce(name)

    async def _unload(self, action: ev.Unload, ensembles: Sequence[str]) -> None:
        """A model, before it what is made of it."""
        name, model = action.machine, action.model
        machine = self._machines.named()[name]
        logger.info("unloading %s from %s: %s", model, name, action.why)
        try:
            for each in ensembles:
                await self._ensembles.unload(name, each)
            await self._engine.lane_idle(name, model)
            async with self.lock(name, model):
                await machine.repository.unload(model)
            if machine.memory is not None and not await machine.memory.gone(model):
                raise ResidencyError(f"processes of {model!r} are left on {name}")
        except ResidencyError as error:
            logger.error("%s", error)
            self._tell(ev.UnloadStuck(action.operation, name, model))
        else:
            self._tell(ev.UnloadDone(action.operation, name, model))
        self._changed(model)

    async def _recycle(self, action: ev.Recycle) -> None:
        """Let what runs end, then restart the Triton; its owner tells when it is down and up."""
        logger.warning("restarting Triton %s: %s", action.machine, action.why)
        machine = self._machines.named()[action.machine]
        for model in list(self._machines.placed[action.machine]):
            self._unplace(action.machine, (model,))
            await self._engine.lane_idle(action.machine, model)
        assert machine.restart is not None, action
        machine.restart()

    def _changed(self, model: str) -> None:
        for waiting in self._gone.pop(model, ()):
            if not waiting.done():
                waiting.set_result(None)
