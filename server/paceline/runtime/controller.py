"""The controller: which chains are served, by which models, under which plan.

Chains are known twice: as declared (`catalogue`) and as the plan in force serves them (`served`).

Implements `core.ports.Control`. Invariant: a change is bound, profiled, planned and loaded before
anything of it is installed, so a change that fails has changed nothing a request can see; one
change runs at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import replace
from time import time
from typing import Any

from paceline.core.bind import BoundChain
from paceline.core.chain import Chain
from paceline.core.errors import (
    ConfigError,
    ErrorKind,
    PlanError,
    Rejected,
    RequestError,
)
from paceline.core.plan import Plan
from paceline.core.ports import ModelState, ModelStatistics
from paceline.core.profile import Hardware
from paceline.core.request import Timeline
from paceline.dispatch.route import route_chain
from paceline.planner.problem import Options
from paceline.planner.replan import Proposal, Replanning, Traffic
from paceline.runtime.catalogue import Catalogue
from paceline.runtime.engine import Engine
from paceline.runtime.keeping import Memory, to_its_end
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.models import Models
from paceline.runtime.placement import Share, shortage
from paceline.runtime.plan_process import Planner, plan_here
from paceline.runtime.provisioning import Provisioning, Step
from paceline.runtime.replanning import Replanner
from paceline.runtime.served import Provision, ServedChains
from paceline.runtime.statistics import Statistics
from paceline.runtime.status import describe

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 1.0


class Controller:
    """See the module docstring. One per process, on the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        statistics: Statistics,
        *,
        hardware: Mapping[str, Hardware] | None,
        options: Options | None = None,
        share: Share | None = None,
        rules: Replanning | None = None,
        memory: Memory | None = None,
        on_step: Callable[[Step], None] | None = None,
        planner: Planner = plan_here,
    ) -> None:
        self._engine = engine
        self._statistics = statistics
        self._share = share or Share()
        self.machines = Machines(engine, self._share)
        on_step = on_step or (lambda step: None)
        self._provisioning = Provisioning(self.machines, hardware, options or Options(), on_step)
        self._memory = memory
        self._catalogue = Catalogue()
        self._models = Models(engine, self.machines, self._catalogue, self._provisioning, on_step)
        self._plan = self._provisioning.nothing
        self._traffic = Traffic()
        self.replanner = Replanner(self, rules or Replanning())
        self._started = False
        self._changing = asyncio.Lock()
        self._served = ServedChains(
            engine, self.machines, self._provisioning, self._catalogue, self._changing, planner
        )

    # -- life -------------------------------------------------------------------------------

    def add_machine(self, machine: Machine) -> None:
        """Use a Triton that answers; before `start`. ConfigError when its hardware has no price."""
        self._provisioning.check(machine)
        self.machines.add(machine)

    async def start(self, chains: Sequence[Chain]) -> Plan:
        """Load every model of the repository, then serve `chains`, under the traffic remembered.

        A model that no chain uses may fail to load: it is reported in the index.
        Raises ConfigError, PlanError, ResidencyError.
        """
        used = {module.model for chain in chains for module in chain.modules}
        await self.machines.adopt(self.machines.named())
        await self._models.load_all(used)
        async with self._changing:
            if self._memory is not None:
                self._traffic = self._memory.traffic(chains)
            plan = await self._apply(chains, as_declared=())
            self._started = True
            return plan

    async def join(self, machine: Machine) -> None:
        """Use one more Triton from now on: models loaded, profiled where its hardware is new.

        Raises ConfigError, ResidencyError; it is not used then.
        """
        self._provisioning.check(machine)
        name = machine.site.name
        async with self._changing:
            self.machines.add(machine)
            try:
                await self.machines.adopt([name])
                await self.machines.grow_to(
                    {name: dict.fromkeys(self._catalogue.loaded(), 1)}, first=True
                )
                await self._served.join(name)
                await self._provisioning.profile(self._catalogue.declared())
            except BaseException:
                await self.machines.remove(name, timeout_s=0.0)
                raise
            self.machines.announce(name)

    async def close(self) -> None:
        """Give up what is under way."""
        await self._served.close()
        await self.machines.close()

    async def leave(self, name: str, *, timeout_s: float) -> bool:
        """Use a Triton no more; False when its batches did not end within `timeout_s`."""
        async with self._changing:
            return await self.machines.remove(name, timeout_s=timeout_s)

    async def machine_up(self, name: str) -> None:
        """A Triton is back, empty; see `Machines.up`."""
        async with self._changing:
            await self.machines.up(name)

    # -- what can be called -----------------------------------------------------------------

    def callable(self, name: str, version: str = "") -> BoundChain:
        """See `core.ports.Control.callable`."""
        return self._catalogue.callable(name, version)

    def callables(self) -> tuple[BoundChain, ...]:
        """See `core.ports.Control.callables`."""
        return self._catalogue.callables()

    def served(self) -> tuple[BoundChain, ...]:
        """The chains of `callables` as they are dispatched: with their runs."""
        return self._served.callable()

    @property
    def ready(self) -> bool:
        return self._started and not self.draining and self.machines.any_up

    @property
    def draining(self) -> bool:
        return self._engine.draining

    def repository_index(self) -> tuple[ModelState, ...]:
        """See `core.ports.Control.repository_index`."""
        return self._catalogue.index()

    async def load(self, name: str) -> None:
        """See `core.ports.Control.load`."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._catalogue.get(name)
            if bound is None or bound.direct:
                await self._models.load(name)
            elif self._catalogue.is_withdrawn(name):
                await self._apply([bound.chain])

    async def unload(self, name: str) -> None:
        """See `core.ports.Control.unload`. Unloading what is not there is no error (as Triton)."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._catalogue.get(name)
            if bound is None or self._catalogue.is_withdrawn(name):
                return
            if bound.direct and (users := self._catalogue.users(name)):
                raise RequestError(
                    ErrorKind.INVALID,
                    f"failed to unload '{name}', it is used by chain '{users[0]}'; "
                    "delete the chain first",
                )
            self._catalogue.withdraw(name)
            self._engine.remove(name)
            if bound.direct:
                await self._models.unload(name)

    # -- chains and plans -------------------------------------------------------------------

    async def apply(self, chains: Sequence[Chain]) -> Plan:
        """See `core.ports.Control.apply`."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            return await self._apply(chains, remember=True)

    async def reload(self, changed: Sequence[Chain], gone: Collection[str]) -> Plan:
        """Serve what chain files say now: `changed` ones as they are, those `gone` no more.

        All or none. Raises ConfigError, PlanError, ResidencyError.
        """
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            return await self._apply(changed, gone=gone)

    async def delete(self, chain: str) -> bool:
        """See `core.ports.Control.delete`. Its models stay callable by their own names."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._catalogue.get(chain)
            if bound is None or bound.direct:
                return False
            await to_its_end(self._forget(chain))
            if self._plan.chains:
                try:
                    self._plan = await self._served.plan(self.served(), self._traffic)
                except PlanError as error:
                    logger.warning("%s is gone, the plan of the others stays: %s", chain, error)
            return True

    async def _forget(self, chain: str) -> None:
        if self._memory is not None:
            await asyncio.to_thread(self._memory.changed, (), (chain,))
        self._remove(chain)
        left = tuple(planned for planned in self._plan.chains if planned.chain != chain)
        self._plan = replace(self._plan, chains=left)

    def chains(self) -> tuple[Chain, ...]:
        """See `core.ports.Control.chains`."""
        return self._catalogue.chains()

    async def plan(self, chains: Sequence[Chain]) -> Plan:
        """See `core.ports.Control.plan`. Profiles models that were not profiled yet."""
        async with self._changing:
            declared = self._catalogue.with_chains(chains)
            bound = self._catalogue.bind(declared)
            await self._provisioning.profile(bound.values())
            traffic = self._provisioning.expected(declared, chains, self._traffic)
            _, plan = await self._served.solve(declared, traffic)
            return plan

    async def replan(self, proposal: Proposal, worth: Callable[[Plan, Plan, float], bool]) -> bool:
        """Plan the served chains for `proposal.traffic`, and follow that plan if it is `worth` it
        (the plan in force, the new one, the cost of the transition in money).

        Make before break: instances are loaded before a request is sent to them, and none is given
        up before requests stop being sent there. Raises PlanError, ResidencyError; the plan in
        force stays then.
        """
        self._check_changeable()
        async with self._changing:
            return await self._replan(proposal.traffic, worth)

    async def rebalance(self, slow: Mapping[str, float]) -> None:
        """Plan and place anew for the machines that are up now, of which those in `slow` take so
        many times as long as their kind. Raises as `replan` does.
        """
        self._check_changeable()
        self._provisioning.slow = dict(slow)
        async with self._changing:
            traffic = self._provisioning.expected(self.chains(), (), self._traffic)
            await self._replan(traffic, lambda before, after, cost: True)

    async def _replan(self, traffic: Traffic, worth: Callable[[Plan, Plan, float], bool]) -> bool:
        chains = [bound for bound in self.callables() if not bound.direct]
        provision = await self._served.provide(
            chains, traffic, worth=lambda plan, cost: worth(self._plan, plan, cost)
        )
        if provision is None:
            return False
        self._install(chains, provision)
        self._traffic = traffic
        if self._memory is not None:
            await asyncio.to_thread(self._memory.keep_traffic, traffic, self.chains())
        await self.machines.shrink_to(provision.placed)
        return True

    def machines_up(self) -> frozenset[str]:
        """Tritons that requests are sent to now."""
        return self.machines.up_now()

    def slowdowns(self) -> dict[tuple[str, str], float]:
        """What batches take over what the profile says, by (model, hardware)."""
        return self._provisioning.slowdowns(self._engine.dispatcher.durations_learned())

    def stragglers(self) -> dict[str, float]:
        """How many times as long as its kind each machine takes."""
        return self._provisioning.stragglers(self._engine.dispatcher.durations_learned())

    @property
    def traffic(self) -> Traffic:
        """What the plan in force was made for."""
        return self._traffic

    def current_plan(self) -> Plan:
        return self._plan

    def shortage(self) -> dict[str, tuple[float, float]]:
        """Hardware of which the plan needs more than there is, stragglers counted as less."""
        return shortage(self._plan, self.machines.usable(), self._provisioning.slow)

    # -- what is shown ----------------------------------------------------------------------

    def statistics(self, name: str = "", version: str = "") -> tuple[ModelStatistics, ...]:
        """See `core.ports.Control.statistics`."""
        if name:
            known = self._catalogue.get(name) is not None
            if not known or (version and version != "1"):
                message = f"requested model '{name}' is not available"
                raise RequestError(ErrorKind.INVALID, message)
        names = [name] if name else self._catalogue.names()
        return tuple(self._statistics.snapshot(n, "1") for n in names)

    def status(self) -> dict[str, Any]:
        """See `core.ports.Control.status`."""
        return describe(
            self,
            self._engine.dispatcher,
            self._statistics,
            self.machines.sites(),
            self.machines.placed,
            now_s=asyncio.get_running_loop().time(),
        )

    async def watch_status(self) -> AsyncIterator[dict[str, Any]]:
        """See `core.ports.Control.watch_status`."""
        last: dict[str, Any] | None = None
        while True:
            status = self.status()
            # Uptime alone is no change.
            seen = {key: value for key, value in status.items() if key != "uptime_s"}
            if seen != last:
                last = seen
                yield status
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def explain(self, request_id: str) -> Timeline | None:
        return self._engine.explain(request_id)

    def observe(self, timeline: Timeline) -> None:
        """Count one ended request."""
        bound = self._catalogue.get(timeline.chain)
        direct = bound.direct if bound is not None else False
        if bound is not None:
            self._statistics.observe_request(timeline, direct=direct, wall_ms=int(time() * 1e3))
            self.replanner.observe(timeline)

    # -- steps of a change ------------------------------------------------------------------

    def _refuse_when_draining(self) -> None:
        """Raises Rejected: what is changed now would be gone in a moment."""
        if self.draining:
            raise Rejected(ErrorKind.DRAINING, "the server is shutting down; nothing is changed")

    async def _apply(
        self,
        chains: Sequence[Chain],
        *,
        gone: Collection[str] = (),
        remember: bool = False,
        as_declared: Sequence[Chain] | None = None,
    ) -> Plan:
        """Serve `chains` too, and those `gone` no more. `as_declared` (left out: `chains`) are
        planned for what their files say, all others for the traffic known.
        """
        declared = self._catalogue.with_chains(chains, gone=gone)
        bound = self._catalogue.bind(declared)
        await self._provisioning.profile(bound.values())
        traffic = self._provisioning.expected(
            declared, chains if as_declared is None else as_declared, self._traffic
        )
        self._provisioning.refused.clear()
        provision = await self._served.provide(
            list(bound.values()), traffic, first=not self._started
        )
        assert provision is not None, "it was not asked what it is worth"
        kept = chains if remember else ()
        await to_its_end(self._follow(bound.values(), provision, traffic, kept=kept, gone=gone))
        await self.machines.shrink_to(provision.placed)
        return provision.plan

    async def _follow(
        self,
        bound: Collection[BoundChain],
        provision: Provision,
        traffic: Traffic,
        *,
        kept: Sequence[Chain],
        gone: Collection[str],
    ) -> None:
        """Write down what is to be `kept`, then serve what was provided."""
        if self._memory is not None and kept:
            await asyncio.to_thread(self._memory.changed, kept, ())
        for name in gone:
            if self._catalogue.get(name) is not None:
                self._remove(name)
        self._install(bound, provision)
        self._traffic = traffic

    def _remove(self, chain: str) -> None:
        self._catalogue.remove(chain)
        self._served.remove(chain)
        self._engine.remove(chain)

    def _check_changeable(self) -> None:
        """Several workers serve the chains they started with: a change would reach one of them."""
        if self._started and self._share.count > 1:
            raise ConfigError(
                "chains and models are fixed while several workers serve; restart to change them",
                key="--workers",
            )

    def _install(self, chains: Collection[BoundChain], provision: Provision) -> None:
        """The moment a change becomes visible; nothing in here can fail or wait."""
        plan = self._plan = provision.plan
        for bound in chains:
            self._catalogue.add(bound)
        models = [m.spec.name for bound in provision.chains for m in bound.modules]
        durations = self._provisioning.durations(models)
        for bound in provision.chains:
            self._engine.install(
                route_chain(bound, plan.chain(bound.name), durations, workers=self._share.count)
            )
        if not self._started:
            for site in self.machines.sites():
                self.machines.announce(site.name)
        self.machines.announce_up()
        self.machines.keep(bound.chain for bound in chains)
        self._served.install(provision.chains)
