"""Chains as they are served, which is not always as they were declared: with runs where those pay.

A plan is made for chains as they are served and routes follow it; what can be called, what is kept
on disk and what traffic is counted by are the chains as declared. This is where one becomes the
other (`core.runs`), and where runs are loaded and unloaded.

Invariant: a run that a chain is served with is composed on every machine; one that none is served
with any more goes after the requests that were accepted with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paceline.core.bind import BoundChain, bind
from paceline.core.chain import Chain, Module
from paceline.core.errors import RunError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.runs import run_spec
from paceline.planner.replan import Traffic
from paceline.runtime.catalogue import Catalogue
from paceline.runtime.engine import Engine
from paceline.runtime.machines import Machines, Placed
from paceline.runtime.placement import place
from paceline.runtime.plan_process import Planned, Planner, plan_here
from paceline.runtime.provisioning import Provisioning

logger = logging.getLogger(__name__)

SETTLE_S = 60.0
"""How long an unload waits for requests that were accepted before."""

Worth = Callable[[Plan, float], bool]
"""Whether a plan is worth following, at that cost of the transition to it."""


@dataclass(frozen=True, slots=True)
class Provision:
    """A plan, the chains as they are served by it, and the instances that this takes."""

    plan: Plan
    chains: Sequence[BoundChain]
    placed: Placed


class ServedChains:
    """See the module docstring. The controller's; `changing` is held while it changes anything."""

    def __init__(
        self,
        engine: Engine,
        machines: Machines,
        provisioning: Provisioning,
        catalogue: Catalogue,
        changing: asyncio.Lock,
        planner: Planner = plan_here,
    ) -> None:
        self._engine = engine
        self._machines = machines
        self._provisioning = provisioning
        self._catalogue = catalogue
        self._changing = changing
        self._planner = planner
        self._chains: dict[str, BoundChain] = {}
        self._composed: dict[str, str] = {}
        """The chain of each run that is composed, by the run's model."""
        self._going: dict[str, asyncio.Task[None]] = {}

    def callable(self) -> tuple[BoundChain, ...]:
        """Those that can be called, by name."""
        return tuple(self._chains[chain.name] for chain in self._catalogue.chains())

    def runs(self) -> list[Module]:
        """Those that some chain is served with."""
        return [run for bound in self._chains.values() for run in _runs(bound)]

    async def solve(self, chains: Sequence[Chain], traffic: Traffic) -> Planned:
        """Declared `chains` as they are to be served, and the plan of that. Raises PlanError."""
        # Where residency decides what is in memory, a lease is of one model.
        runs = not self._machines.come_and_go(chains)
        return await self._planner(
            self._provisioning.task(chains, self._catalogue.models, traffic, runs=runs)
        )

    async def plan(self, chains: Iterable[BoundChain], traffic: Traffic) -> Plan:
        """The plan of chains in the form in which they are served now. Raises PlanError."""
        forms = [bound.chain for bound in chains]
        _, plan = await self._planner(
            self._provisioning.task(forms, self._catalogue.models, traffic, runs=False)
        )
        return plan

    async def provide(
        self,
        declared: Sequence[BoundChain],
        traffic: Traffic,
        *,
        first: bool = False,
        worth: Worth = lambda plan, cost: True,
    ) -> Provision | None:
        """Plan and, if that is `worth` it, load what the plan takes (`first`: on all machines):
        without a run that some Triton does not load. Raises PlanError, ResidencyError.
        """
        chains = [bound.chain for bound in declared]
        while True:
            forms, plan = await self.solve(chains, traffic)
            served = [self._bound(*pair) for pair in zip(declared, forms, strict=True)]
            runs = [run for bound in served for run in _runs(bound)]
            placed = place(plan, self._machines.usable(), self._catalogue.loaded(), runs)
            if not worth(plan, self._provisioning.transition_cost(placed)):
                return None
            try:
                await self._machines.grow_to(placed, first=first)
            except RunError as error:
                logger.warning("modules stay apart: %s", error)
                self._provisioning.refused.add(error.model)
            else:
                return Provision(plan, served, placed)

    def install(self, chains: Iterable[BoundChain]) -> None:
        """These are served from now on, in place of those that had their names."""
        self._chains |= {bound.name: bound for bound in chains}
        self._let_go()

    def remove(self, chain: str) -> None:
        """It is served no more."""
        self._chains.pop(chain, None)
        self._let_go()

    async def join(self, machine: str) -> None:
        """Load the runs in use on a machine; it is of use without them as well."""
        try:
            await self._machines.grow_to({machine: {r.model: 1 for r in self.runs()}}, first=True)
        except RunError as error:
            logger.warning("%s", error)

    async def close(self) -> None:
        """Leave what is loaded as it is."""
        tasks = list(self._going.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _bound(self, declared: BoundChain, form: Chain) -> BoundChain:
        """A chain in the form it is served in; its runs can be loaded from now on."""
        if form is declared.chain:
            return declared
        specs: dict[str, ModelSpec] = dict(self._catalogue.models)
        for run in (module for module in form.modules if module.members):
            spec = run_spec(run, self._catalogue.models)
            assert spec is not None, f"{run.name} of {form.name} cannot be executed at once"
            specs[run.model] = spec
            self._composed[run.model] = form.name
            self._machines.compose(run, spec)
        return bind(form, specs)

    def _let_go(self) -> None:
        used = {run.model for run in self.runs()}
        for model in self._composed.keys() - used - self._going.keys():
            self._going[model] = asyncio.create_task(self._unload(model), name=f"unload {model}")

    async def _unload(self, model: str) -> None:
        """After the requests that were accepted with it, unless it is used again by then."""
        try:
            if not await self._engine.settled(self._composed[model], timeout_s=SETTLE_S):
                logger.info("unloading %s under %g s old requests", model, SETTLE_S)
            async with self._changing:
                if all(model != run.model for run in self.runs()):
                    await self._machines.drop(model)
                    del self._composed[model]
        finally:
            del self._going[model]


def _runs(bound: BoundChain) -> list[Module]:
    return [module.module for module in bound.modules if module.module.members]
