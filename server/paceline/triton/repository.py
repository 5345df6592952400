"""One machine's models through Triton's repository API (a `ModelRepository`).

Invariants: a load states the whole configuration with the wanted instance count, because Triton
replaces the whole and keeps it; an unload returns only when Triton has freed the model, which it
does some time after it answered. The caller runs one operation per model at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any

from paceline.core.chain import Module
from paceline.core.errors import (
    BackendError,
    ConfigError,
    ErrorKind,
    LoadTimeoutError,
    ResidencyError,
)
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelState
from paceline.triton import ensemble
from paceline.triton.client import TritonClient
from paceline.triton.config import (
    CONFIG_FILE,
    CONTENT,
    ModelConfig,
    config_json,
    find_models,
    instances_of,
    members_of,
    read_config,
    spec_of,
    versions_of,
    with_instances,
)
from paceline.triton.stuck_loads import StuckLoads
from paceline.triton.turns import Turn, Turns

logger = logging.getLogger(__name__)

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 0.25
REPAIR_WAIT_S = 1.0


class TritonRepository:
    """The models of one Triton; `directories` are those it serves that this process can read."""

    def __init__(
        self,
        client: TritonClient,
        directories: Sequence[Path] = (),
        *,
        load_timeout_s: float = 600.0,
        unload_timeout_s: float = 60.0,
        on_load: Callable[[Path, ModelConfig], None] | None = None,
        turns: Turns | None = None,
        stuck: StuckLoads | None = None,
    ) -> None:
        """`on_load` is told the directory and configuration of a model that is about to load;
        `turns` are taken where other processes change the same Triton's models; `stuck` sees loads
        that will not end, where that can be seen.
        """
        self._stuck = stuck
        self._turns = turns
        self._on_load = on_load
        self._client = client
        self._directories = tuple(directories)
        self._load_timeout_s = load_timeout_s
        self._unload_timeout_s = unload_timeout_s
        self._runs: dict[str, ModelConfig] = {}
        self._members: dict[str, tuple[str, ...]] = {}
        self._loaded: dict[str, int] = {}
        """Instances of what was loaded from files, as asked for last."""

    @property
    def client(self) -> TritonClient:
        return self._client

    def names(self) -> tuple[str, ...]:
        """Models found in the directories. Raises ConfigError (missing directory, double name)."""
        return tuple(find_models(self._directories))

    def directory(self, model: str) -> Path | None:
        """The model's directory, None for one that only the server can see."""
        return find_models(self._directories).get(model)

    def declaration(self, model: str) -> ModelSpec:
        """What the model's config.pbtxt declares, loaded or not.

        Raises ConfigError naming file and line, ResidencyError when no directory holds the model.
        """
        directory = self.directory(model)
        if directory is None:
            raise ResidencyError(self._nowhere(model))
        return spec_of(
            read_config(directory), versions_of(directory), where=str(directory / CONFIG_FILE)
        )

    async def index(self) -> tuple[ModelState, ...]:
        """See `ModelRepository.index`. Raises ResidencyError when the server is unreachable."""
        try:
            return await self._client.index()
        except BackendError as error:
            raise ResidencyError(
                f"no repository index from {self._client.name}: {error.message}"
            ) from None

    async def instances(self) -> Mapping[str, int]:
        """See `ModelRepository.instances`."""
        ready = sorted({state.name for state in await self.index() if state.state == "READY"})
        configs = {model: await self.config(model) for model in ready}
        self._members |= {model: members_of(config) for model, config in configs.items()}
        return {model: max(1, instances_of(config)) for model, config in configs.items()}

    def members(self, model: str) -> tuple[str, ...]:
        """See `ModelRepository.members`: as it was loaded last, or as its files say."""
        if model not in self._members:
            # All at once: to look for one takes as long. What is wrong is said when it is loaded.
            with suppress(ConfigError):
                for name, directory in find_models(self._directories).items():
                    if name not in self._members:
                        self._members[name] = ()
                        with suppress(ConfigError):
                            self._members[name] = members_of(read_config(directory))
        return self._members.setdefault(model, ())

    async def config(self, model: str) -> ModelConfig:
        """`ModelConfig` of a loaded model. Raises ResidencyError when it is not loaded."""
        try:
            return await self._client.config(model)
        except BackendError as error:
            raise ResidencyError(
                f"model {model!r} is not loaded on {self._client.name}: {error.message}"
            ) from None

    async def spec(self, model: str) -> ModelSpec:
        """See `ModelRepository.spec`."""
        config = await self.config(model)
        try:
            metadata = await self._client.metadata(model)
            return spec_of(config, tuple(metadata.versions), where=self._client.name)
        except (BackendError, ConfigError) as error:
            raise ResidencyError(
                f"model {model!r} on {self._client.name} cannot be described: {error}"
            ) from None

    def compose(self, run: Module, spec: ModelSpec) -> None:
        """See `ModelRepository.compose`."""
        self._runs[run.model] = ensemble.ensemble_config(run, spec)

    async def load(self, model: str, *, instances: int) -> None:
        """See `ModelRepository.load`. Loading again with another count changes it in place.

        A model that the server holds already, from the same files and as often, is adopted; so is
        a run's, which has no instances of its own.
        """
        async with self._turn(model):
            if (run := self._runs.get(model)) is not None:
                if not await self._holds(model, run.parameters[CONTENT].string_value, 1):
                    await self._load(model, config_json(run), ensemble.FILES)
                    await self._restore(members_of(run))
            else:
                await self._load_files(model, instances, adopt=True)

    async def _restore(self, members: Sequence[str]) -> None:
        """Loading an ensemble for the first time, Triton loads what it is made of once more, as its
        files say: with their number of instances, and without our mark.
        """
        for member in members:
            if (instances := self._loaded.get(member)) is not None:
                async with self._turn(member):
                    await self._load_files(member, instances, adopt=True)

    def _turn(self, model: str) -> AbstractAsyncContextManager[Turn | None]:
        if self._turns is None:
            return nullcontext()
        return self._turns.at(self._client.url, model, limit_s=self._load_timeout_s)

    async def _load_files(self, model: str, instances: int | None, *, adopt: bool) -> None:
        if instances is not None and instances < 1:
            raise ResidencyError(f"model {model!r} needs at least one instance, not {instances}")
        try:
            directory = self.directory(model)
            config = read_config(directory) if directory is not None else None
        except ConfigError as error:
            raise ResidencyError(f"model {model!r} cannot be loaded: {error}") from None
        if config is None or directory is None:
            config = await self._server_config(model)
            self._members[model] = members_of(config)
            if instances is None or instances_of(config) == instances:
                return
        else:
            self._members[model] = members_of(config)
            config.parameters[CONTENT].string_value = content = content_mark(directory)
            if instances is None:
                instances = max(1, instances_of(config))
            if adopt and await self._holds(model, content, instances):
                if not self._members[model]:
                    self._loaded[model] = instances
                return
            if self._on_load is not None:
                self._on_load(directory, config)
        members = self._members[model]
        expected = dict.fromkeys(members, 1) if members else {model: instances}
        await self._load(model, config_json(with_instances(config, instances)), instances=expected)
        if members:
            await self._restore(members)
        else:
            self._loaded[model] = instances

    async def unload(self, model: str) -> None:
        """See `ModelRepository.unload`. A model that is not loaded is fine; a run is forgotten."""
        self._runs.pop(model, None)
        self._loaded.pop(model, None)
        try:
            await self._client.unload(model)
        except BackendError as error:
            raise ResidencyError(
                f"model {model!r} was not unloaded from {self._client.name}: {error.message}"
            ) from None
        await self._await_unloaded(model, self._unload_timeout_s)

    async def repair(self, model: str, *, instances: int | None) -> None:
        """Load afresh a model whose process died, which Triton still calls READY.

        A process killed while it executed leaves its instance UNLOADING for ever, so the unload
        is given only `REPAIR_WAIT_S`; the new load does not depend on it. Raises ResidencyError.
        """
        asked_s = monotonic()
        async with self._turn(model) as turn:
            if turn is not None and turn.repaired_since(asked_s):
                return
            try:
                await self._client.unload(model)
                await self._await_unloaded(model, min(REPAIR_WAIT_S, self._unload_timeout_s))
            except (BackendError, ResidencyError) as error:
                logger.warning("repairing model %r without having unloaded it: %s", model, error)
            await self._load_files(model, instances, adopt=False)
            if turn is not None:
                turn.repaired()

    async def _holds(self, model: str, content: str, instances: int) -> bool:
        """Whether the server serves the model from these files with that many instances."""
        try:
            config = await self._client.config(model)
            ready = await self._client.model_ready(model)
        except BackendError:
            return False
        same = config.parameters[CONTENT].string_value == content
        return ready and same and instances_of(config) == instances

    async def _await_unloaded(self, model: str, limit_s: float) -> None:
        """Triton tells nobody when an unload is done: its index has to be asked."""
        pause_s = FIRST_POLL_S
        states = ""
        try:
            async with asyncio.timeout(limit_s):
                while states := _still_held(await self.index(), model):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_POLL_S)
        except TimeoutError:
            raise ResidencyError(
                f"model {model!r} is still {states or 'not unloaded'} on {self._client.name} after "
                f"{limit_s:g} s"
            ) from None

    async def _server_config(self, model: str) -> ModelConfig:
        """The configuration of a model that only the server can see; loads it to read that."""
        try:
            return await self._client.config(model)
        except BackendError as error:
            if error.kind not in (ErrorKind.UNKNOWN_MODEL, ErrorKind.NOT_READY):
                raise ResidencyError(
                    f"no configuration of model {model!r} from {self._client.name}: {error.message}"
                ) from None
        await self._load(model, "")
        return await self.config(model)

    async def _load(
        self,
        model: str,
        config: str,
        files: Mapping[str, bytes] = MappingProxyType({}),
        instances: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        try:
            await self._ended(
                model,
                self._client.load(
                    model, config=config, files=files, timeout_s=self._load_timeout_s
                ),
                instances,
            )
        except BackendError as error:
            if error.kind is ErrorKind.DEADLINE:
                raise LoadTimeoutError(
                    f"model {model!r} did not load on {self._client.name}: "
                    f"not ready after {self._load_timeout_s:g} s"
                ) from None
            if "failed to poll from model repository" in error.message:
                reason = f"{error.message} ({self._nowhere(model)})"
            else:
                reason = " ".join(error.message.split())
            raise ResidencyError(
                f"model {model!r} did not load on {self._client.name}: {reason}"
            ) from None

    async def _ended(
        self, model: str, load: Coroutine[Any, Any, None], instances: Mapping[str, int]
    ) -> None:
        """Wait for a load, or until it is stuck."""
        if self._stuck is None or not instances:
            return await load
        loading = asyncio.create_task(load, name=f"load {model}")
        stuck = asyncio.create_task(self._stuck.found(instances), name=f"watch load {model}")
        try:
            await asyncio.wait((loading, stuck), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                return loading.result()
        finally:
            stuck.cancel()
            loading.cancel()
            await asyncio.gather(loading, stuck, return_exceptions=True)
        logger.error("a process of model %r died as it started; restarting Triton", model)
        self._stuck.restart()
        raise ResidencyError(
            f"model {model!r} did not load on {self._client.name}: its process died before Triton "
            "had heard of it, which it waits for without end"
        )

    def _nowhere(self, model: str) -> str:
        where = ", ".join(map(str, self._directories)) or "the server's model repository"
        return f"no readable directory {model!r} with a numeric version directory in {where}"


def content_mark(directory: Path) -> str:
    """Changes when a file of the model does: by names, sizes and times, nothing is read."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            stat = path.stat()
            name = path.relative_to(directory)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _still_held(states: Sequence[ModelState], model: str) -> str:
    """States in which a version of the model still holds memory, "" when none does.

    A version that failed or was unloaded is UNAVAILABLE; while one is waiting to be taken down
    the reason is not yet set.
    """
    held = sorted(
        {
            line.state
            for line in states
            if line.name == model and (line.state != "UNAVAILABLE" or line.reason == "unloading")
        }
    )
    return ", ".join(held)
