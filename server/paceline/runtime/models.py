"""Single models of the repository: loaded on every machine, callable by their own names.

Whoever calls keeps changes apart (`Controller`, by its lock once it serves); RequestError is in
Triton's words.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from paceline.core.errors import ConfigError, ErrorKind, RequestError, ResidencyError
from paceline.dispatch.route import route_chain
from paceline.runtime.catalogue import Catalogue
from paceline.runtime.engine import Engine
from paceline.runtime.machines import Machines
from paceline.runtime.provisioning import Provisioning, Step
from paceline.runtime.served import SETTLE_S

logger = logging.getLogger(__name__)

_LOADS_AT_ONCE = 4


class Models:
    """See the module docstring."""

    def __init__(
        self,
        engine: Engine,
        machines: Machines,
        catalogue: Catalogue,
        provisioning: Provisioning,
        on_step: Callable[[Step], None],
    ) -> None:
        self._engine = engine
        self._machines = machines
        self._catalogue = catalogue
        self._provisioning = provisioning
        self._on_step = on_step

    async def load_all(self, used: Collection[str]) -> None:
        """Every model there is; ResidencyError when one of `used` does not load. Others are
        reported in the index.
        """
        names = await self._machines.names()
        gate = asyncio.Semaphore(_LOADS_AT_ONCE)
        done = 0

        async def load(name: str) -> None:
            nonlocal done
            async with gate:
                try:
                    await self.load(name)
                except RequestError as error:
                    if name in used:
                        raise ResidencyError(error.message) from None
                    logger.warning("model %s is not available: %s", name, error.message)
                done += 1
                self._on_step(Step("load", name, done, len(names)))

        try:
            # What others are made of first: Triton would load it with them, and then again.
            for some in self._machines.by_level(names):
                async with asyncio.TaskGroup() as group:
                    for name in some:
                        group.create_task(load(name))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def load(self, name: str) -> None:
        """Load on every machine and make it callable. Raises RequestError."""
        try:
            spec = await self._machines.load(name)
            bound = self._catalogue.add_model(spec)
        except (ResidencyError, ConfigError) as error:
            if not await self._machines.exists(name):
                message = f"Request for unknown model: '{name}' is not found"
                raise RequestError(ErrorKind.UNKNOWN_MODEL, message) from None
            self._catalogue.model_failed(name, str(error))
            raise RequestError(ErrorKind.BACKEND, str(error)) from None
        durations = self._provisioning.durations(self._catalogue.models)
        self._engine.install(route_chain(bound, None, durations))
        self._machines.announce_up()

    async def unload(self, name: str) -> None:
        """As Triton does, after the requests that were accepted. Raises RequestError."""
        if not await self._engine.settled(name, timeout_s=SETTLE_S):
            logger.warning("unloading %s under %g s old requests", name, SETTLE_S)
        try:
            await self._machines.unload(name)
        except ResidencyError as error:
            raise RequestError(ErrorKind.BACKEND, str(error)) from None
