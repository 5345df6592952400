"""The controller: which chains are served, by which models, under which plan.

Implements `core.ports.Control`. Invariant: a change is bound, profiled, planned and loaded before
anything of it is installed, so a change that fails has changed nothing a request can see; one
change runs at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, time
from typing import Any

from paceline.core.bind import BoundChain, bind, single_model_chain
from paceline.core.chain import Chain
from paceline.core.errors import (
    ConfigError,
    ErrorKind,
    Rejected,
    RequestError,
    ResidencyError,
)
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.ports import ModelState, ModelStatistics
from paceline.core.profile import Durations, Hardware, Profiles
from paceline.core.request import Timeline
from paceline.dispatch.route import route_chain
from paceline.planner.problem import Options, demand
from paceline.planner.solve import solve
from paceline.runtime.engine import Engine
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Share, place, shortage
from paceline.runtime.statistics import Statistics
from paceline.runtime.status import describe

logger = logging.getLogger(__name__)

ASSUMED_RATE_RPS = 1.0
"""What a chain that declares no rate is planned for."""

SETTLE_S = 60.0
"""How long an unload waits for requests that were accepted before."""

_LOADS_AT_ONCE = 4
_WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a long change: `what` ("load", "profile", "plan"), on which `name`, how far."""

    what: str
    name: str
    done: int
    total: int


class Controller:
    """See the module docstring. One per process, on the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        statistics: Statistics,
        *,
        hardware: Mapping[str, Hardware],
        options: Options | None = None,
        share: Share | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self._engine = engine
        self._statistics = statistics
        self._hardware = dict(hardware)
        self._options = options or Options()
        self._share = share or Share()
        self.machines = Machines(engine, self._share)
        self._on_step = on_step or (lambda step: None)
        self._models: dict[str, ModelSpec] = {}
        self._failed: dict[str, str] = {}
        self._bound: dict[str, BoundChain] = {}
        self._withdrawn: set[str] = set()
        self._profiles = Profiles()
        self._plan = Plan(self._options.policy, "fractional", ())
        self._started = False
        self._changing = asyncio.Lock()

    # -- life -------------------------------------------------------------------------------

    def add_machine(self, machine: Machine) -> None:
        """Use a Triton that answers; before `start`. ConfigError when its hardware has no price."""
        site = machine.site
        if site.hardware not in self._hardware:
            raise ConfigError(
                f"hardware {site.hardware!r} of {site.name} has no price; "
                f"have {', '.join(sorted(self._hardware)) or 'none'}",
                key="hardware",
            )
        self.machines.add(machine)

    async def start(self, chains: Sequence[Chain]) -> Plan:
        """Load every model of the repository, then serve `chains`.

        A model that no chain uses may fail to load: it is reported in the index.
        Raises ConfigError, PlanError, ResidencyError.
        """
        used = {module.model for chain in chains for module in chain.modules}
        await self._load_all(used)
        plan = await self.apply(chains)
        self._started = True
        return plan

    async def machine_up(self, name: str) -> None:
        """A Triton is back, empty; see `Machines.up`."""
        async with self._changing:
            await self.machines.up(name)

    # -- what can be called -----------------------------------------------------------------

    def callable(self, name: str, version: str = "") -> BoundChain:
        """See `core.ports.Control.callable`."""
        bound = self._bound.get(name)
        if bound is None:
            if name in self._failed:
                message = f"Request for unknown model: '{name}' has no available versions"
                raise RequestError(ErrorKind.NOT_READY, message)
            message = f"Request for unknown model: '{name}' is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        versions = bound.modules[0].spec.versions if bound.direct else ("1",)
        if version and version not in versions:
            message = f"Request for unknown model: '{name}' version {version} is not found"
            raise RequestError(ErrorKind.UNKNOWN_MODEL, message)
        if name in self._withdrawn:
            message = f"Request for unknown model: '{name}' has no available versions"
            raise RequestError(ErrorKind.NOT_READY, message)
        return bound

    def callables(self) -> tuple[BoundChain, ...]:
        """See `core.ports.Control.callables`."""
        return tuple(b for name, b in sorted(self._bound.items()) if name not in self._withdrawn)

    @property
    def ready(self) -> bool:
        return self._started and not self.draining and self.machines.any_up

    @property
    def draining(self) -> bool:
        return self._engine.draining

    def repository_index(self) -> tuple[ModelState, ...]:
        """Chains first, then models."""
        chains: list[ModelState] = []
        models: list[ModelState] = []
        for name, bound in sorted(self._bound.items()):
            gone = name in self._withdrawn
            state = ModelState(
                name, "1", "UNAVAILABLE" if gone else "READY", "unloaded" if gone else ""
            )
            (models if bound.direct else chains).append(state)
        models += [
            ModelState(name, "1", "UNAVAILABLE", reason)
            for name, reason in sorted(self._failed.items())
        ]
        return (*chains, *models)

    async def load(self, name: str) -> None:
        """See `core.ports.Control.load`."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._bound.get(name)
            if bound is None or bound.direct:
                await self._load_model(name)
            elif name in self._withdrawn:
                await self._apply([bound.chain])

    async def unload(self, name: str) -> None:
        """See `core.ports.Control.unload`. Unloading what is not there is no error (as Triton)."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._bound.get(name)
            if bound is None or name in self._withdrawn:
                return
            if bound.direct:
                users = sorted(
                    b.name
                    for b in self._bound.values()
                    if not b.direct and any(m.spec.name == name for m in b.modules)
                )
                if users:
                    raise RequestError(
                        ErrorKind.INVALID,
                        f"failed to unload '{name}', it is used by chain '{users[0]}'; "
                        "delete the chain first",
                    )
            self._withdrawn.add(name)
            self._engine.remove(name)
            if bound.direct:
                await self._unload_model(name)

    # -- chains and plans -------------------------------------------------------------------

    async def apply(self, chains: Sequence[Chain]) -> Plan:
        """See `core.ports.Control.apply`."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            return await self._apply(chains)

    async def delete(self, chain: str) -> bool:
        """See `core.ports.Control.delete`. Its models stay callable by their own names."""
        self._check_changeable()
        self._refuse_when_draining()
        async with self._changing:
            bound = self._bound.get(chain)
            if bound is None or bound.direct:
                return False
            del self._bound[chain]
            self._withdrawn.discard(chain)
            self._engine.remove(chain)
            chains = tuple(c for c in self._plan.chains if c.chain != chain)
            self._plan = replace(self._plan, chains=chains)
            if chains:
                self._plan = self._solve(self.chains())
            return True

    def chains(self) -> tuple[Chain, ...]:
        """See `core.ports.Control.chains`."""
        return tuple(bound.chain for bound in self.callables() if not bound.direct)

    async def plan(self, chains: Sequence[Chain]) -> Plan:
        """See `core.ports.Control.plan`. Profiles models that were not profiled yet."""
        async with self._changing:
            served = self._merged(chains)
            bound = [self._bind(chain) for chain in served]
            await self._profile([m.spec for b in bound for m in b.modules])
            return self._solve(served)

    def current_plan(self) -> Plan:
        return self._plan

    def shortage(self) -> dict[str, tuple[float, int]]:
        """Hardware of which the plan needs more than there is."""
        return shortage(self._plan, self.machines.sites())

    # -- what is shown ----------------------------------------------------------------------

    def statistics(self, name: str = "", version: str = "") -> tuple[ModelStatistics, ...]:
        """See `core.ports.Control.statistics`."""
        if name:
            bound = self._bound.get(name)
            if bound is None or (version and version != "1"):
                message = f"requested model '{name}' is not available"
                raise RequestError(ErrorKind.INVALID, message)
        names = [name] if name else sorted(self._bound)
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
        bound = self._bound.get(timeline.chain)
        direct = bound.direct if bound is not None else False
        if bound is not None:
            self._statistics.observe_request(timeline, direct=direct, wall_ms=int(time() * 1e3))

    # -- steps of a change ------------------------------------------------------------------

    def _refuse_when_draining(self) -> None:
        """Raises Rejected: what is changed now would be gone in a moment."""
        if self.draining:
            raise Rejected(ErrorKind.DRAINING, "the server is shutting down; nothing is changed")

    async def _apply(self, chains: Sequence[Chain]) -> Plan:
        served = self._merged(chains)
        bound = {chain.name: self._bind(chain) for chain in served}
        await self._profile([m.spec for b in bound.values() for m in b.modules])
        plan = self._solve(served)
        placed = place(plan, self.machines.sites(), self._loaded())
        await self.machines.bring_to(placed, first=not self._started)
        self._install(bound, plan)
        return plan

    def _check_changeable(self) -> None:
        """Several workers serve the chains they started with: a change would reach one of them."""
        if self._started and self._share.count > 1:
            raise ConfigError(
                "chains and models are fixed while several workers serve; restart to change them",
                key="--workers",
            )

    def _loaded(self) -> list[str]:
        return sorted(name for name in self._models if name not in self._withdrawn)

    def _merged(self, chains: Sequence[Chain]) -> list[Chain]:
        served = {chain.name: chain for chain in self.chains()}
        for chain in chains:
            if chain.name in self._models:
                raise ConfigError(
                    f"{chain.name!r} is a model of the repository; name the chain otherwise",
                    key="chain",
                )
            served[chain.name] = chain
        return [served[name] for name in sorted(served)]

    def _bind(self, chain: Chain) -> BoundChain:
        for module in chain.modules:
            if (reason := self._failed.get(module.model)) is not None:
                raise ResidencyError(
                    f"chain {chain.name!r} needs model {module.model!r}, "
                    f"which could not be loaded: {reason}"
                )
            if module.model in self._withdrawn:
                raise ResidencyError(
                    f"chain {chain.name!r} needs model {module.model!r}, which was unloaded: "
                    "load it first"
                )
        try:
            return bind(chain, self._models)
        except ConfigError as error:
            raise ConfigError(error.message, key=error.key, where=chain.where(error.key)) from None

    async def _profile(self, specs: Sequence[ModelSpec]) -> None:
        """Measure what was not measured yet, one model after the other, once per hardware."""
        wanted = {spec.name: spec for spec in specs}
        by_hardware: dict[str, Machine] = {}
        for machine in self.machines.all():
            by_hardware.setdefault(machine.site.hardware, machine)
        todo = [
            (spec, hardware, machine)
            for hardware, machine in sorted(by_hardware.items())
            for _, spec in sorted(wanted.items())
            if self._profiles.durations(spec.name, hardware) is None
        ]
        for spec, hardware, machine in todo:
            name = spec.name

            def progress(done: int, total: int, name: str = name) -> None:
                self._on_step(Step("profile", name, done, total))

            rows = await machine.profiler.measure(spec, hardware, on_progress=progress)
            self._profiles = self._profiles.merged(rows)

    def _solve(self, chains: Sequence[Chain]) -> Plan:
        if not chains:
            return Plan(self._options.policy, "fractional", ())
        present = {site.hardware for site in self.machines.sites()}
        hardware = {name: h for name, h in self._hardware.items() if name in present}
        limits = {name: spec.row_limit for name, spec in self._models.items()}
        overhead_s = max(machine.overhead_s for machine in self.machines.all())
        started = perf_counter()
        # Each chain under the bound of the policy by which it is dispatched.
        plans = [
            solve(
                [
                    demand(
                        chain,
                        chain.rate_rps or ASSUMED_RATE_RPS,
                        self._profiles,
                        hardware,
                        limits,
                        overhead_s,
                    )
                ],
                replace(self._options, dispatch=chain.dispatch),
            )
            for chain in chains
        ]
        return replace(
            plans[0],
            chains=tuple(planned for plan in plans for planned in plan.chains),
            lower_bound_per_hour=sum(plan.lower_bound_per_hour for plan in plans),
            solve_s=perf_counter() - started,
        )

    def _install(self, bound: Mapping[str, BoundChain], plan: Plan) -> None:
        """The moment a change becomes visible; nothing in here can fail or wait."""
        self._plan = plan
        durations = self._durations()
        for name, chain in bound.items():
            self._bound[name] = chain
            self._withdrawn.discard(name)
            self._engine.install(
                route_chain(chain, plan.chain(name), durations, workers=self._share.count)
            )
        if not self._started:
            for site in self.machines.sites():
                self.machines.announce(site.name)
        self.machines.announce_up()

    def _durations(self) -> dict[str, dict[str, Durations]]:
        present = sorted({site.hardware for site in self.machines.sites()})
        return {
            model: {
                hardware: known
                for hardware in present
                if (known := self._profiles.durations(model, hardware)) is not None
            }
            for model in self._models
        }

    # -- models -----------------------------------------------------------------------------

    async def _load_all(self, used: set[str]) -> None:
        names = await self.machines.names()
        gate = asyncio.Semaphore(_LOADS_AT_ONCE)
        done = 0

        async def load(name: str) -> None:
            nonlocal done
            async with gate:
                try:
                    await self._load_model(name)
                except RequestError as error:
                    if name in used:
                        raise ResidencyError(error.message) from None
                    logger.warning("model %s is not available: %s", name, error.message)
                done += 1
                self._on_step(Step("load", name, done, len(names)))

        try:
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(load(name))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _load_model(self, name: str) -> None:
        """Load on every machine and make it callable; RequestError in Triton's words."""
        try:
            spec = await self.machines.load(name)
            bound = single_model_chain(spec)
        except (ResidencyError, ConfigError) as error:
            if not await self.machines.exists(name):
                message = f"Request for unknown model: '{name}' is not found"
                raise RequestError(ErrorKind.UNKNOWN_MODEL, message) from None
            # Triton goes on serving a model whose reload failed.
            if name not in self._bound:
                self._failed[name] = str(error)
            raise RequestError(ErrorKind.BACKEND, str(error)) from None
        self._failed.pop(name, None)
        self._models[name] = spec
        self._bound[name] = bound
        self._withdrawn.discard(name)
        self._engine.install(route_chain(bound, None, self._durations()))
        self.machines.announce_up()

    async def _unload_model(self, name: str) -> None:
        """As Triton does, after the requests that were accepted; RequestError in its words."""
        if not await self._engine.settled(name, timeout_s=SETTLE_S):
            logger.warning("unloading %s under %g s old requests", name, SETTLE_S)
        try:
            await self.machines.unload(name)
        except ResidencyError as error:
            raise RequestError(ErrorKind.BACKEND, str(error)) from None
