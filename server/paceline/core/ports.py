"""Where the inside meets the outside: what the runtime needs, and what it offers.

The runtime implements `Inference` and `Control` for rpc and web; `triton` and `sim` implement
`Executor`, `ModelRepository` and `Profiler` for the runtime. Neither side imports the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from paceline.core.bind import BoundChain
from paceline.core.chain import Chain, Module
from paceline.core.errors import BackendError, RequestError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import ProfileRow
from paceline.core.request import InferAnswer, InferRequest, Parameter, Timeline
from paceline.core.tensor import BatchTensor, Tensor
from paceline.core.values import value


@value
class ModelCall:
    """One execution of one model: a batch."""

    model: str
    inputs: tuple[BatchTensor, ...]
    outputs: tuple[str, ...]
    version: str = ""
    request_id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A line of a repository index. `state` is Triton's: READY, UNAVAILABLE, LOADING, UNLOADING."""

    name: str
    version: str
    state: str
    reason: str = ""


OnExecuted = Callable[[tuple[Tensor, ...] | BackendError], None]
"""Called with the outputs of an execution, or how it failed."""


class Executor(Protocol):
    """Runs batches on machines."""

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        """`execute` without a task, where nothing has to be waited for first: `on_end` is called
        once, after this returned. False where it is: nothing was begun.
        """
        ...

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        """Outputs in the order of `call.outputs`. Raises BackendError; nothing else."""
        ...


class ModelRepository(Protocol):
    """One machine's models (Triton's repository API)."""

    async def index(self) -> tuple[ModelState, ...]:
        """Every model it knows."""
        ...

    async def instances(self) -> Mapping[str, int]:
        """Instances of every model that is loaded now. Raises ResidencyError."""
        ...

    async def spec(self, model: str) -> ModelSpec:
        """Declaration of a loaded model. Raises ResidencyError when it is not loaded."""
        ...

    def compose(self, run: Module, spec: ModelSpec) -> None:
        """From now on `run`'s model can be loaded, declared as `spec`, where its members are;
        until it is unloaded.
        """
        ...

    async def load(self, model: str, *, instances: int) -> None:
        """Load with that many instances; returns when ready. Raises ResidencyError."""
        ...

    async def unload(self, model: str) -> None:
        """Unload; returns when its memory is free. Raises ResidencyError."""
        ...

    def members(self, model: str) -> tuple[str, ...]:
        """What an ensemble hands its requests to; none for other models."""
        ...

    async def repair(self, model: str, *, instances: int | None) -> None:
        """Load afresh a model whose process died or hangs, with that many instances (None: as its
        files say). Raises ResidencyError.
        """
        ...


class ModelMemory(Protocol):
    """What models take on one machine."""

    def blocks(self, model: str) -> Mapping[str, int]:
        """Bytes of the parameter blocks that it shares with models that have them, by block; none
        where that is not known (yet).
        """
        ...

    async def find_blocks(self, model: str) -> None:
        """Have `blocks` know what can be known; that may come from afar, and take long."""
        ...

    def guessed_bytes(self, model: str, blocks: Mapping[str, int]) -> int:
        """What each instance will take beside its blocks: as remembered of the same files, else by
        their size.
        """
        ...

    def remember(self, model: str, own_bytes: int, blocks: Mapping[str, int]) -> None:
        """An instance was measured to take that much beside its blocks."""
        ...

    async def measured_bytes(self, model: str, blocks: Mapping[str, int]) -> int | None:
        """What the instances of a loaded model take in all beside its blocks; None where that
        cannot be told.
        """
        ...

    async def server_bytes(self) -> int | None:
        """What the server itself takes, its models left out; None where that cannot be told."""
        ...

    async def gone(self, model: str) -> bool:
        """Whether nothing of an unloaded model is left, after a moment's patience."""
        ...


class LoadLinks(Protocol):
    """What loads of one machine move their bytes through, where that can be divided."""

    def moving(self) -> Mapping[str, tuple[float | None, Mapping[str, int]]]:
        """By link: bytes a second as measured, and bytes that are still to come by model.

        Blocks for about a millisecond.
        """
        ...

    def split(self, shares: Mapping[str, float]) -> None:
        """Shares of their links by model, from now on. Blocks for some milliseconds."""
        ...


class Profiler(Protocol):
    """Measures loaded models, from cache where nothing changed."""

    async def measure(
        self,
        model: ModelSpec,
        hardware: str,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[ProfileRow, ...]:
        """p95 and p99 per batch size 1, 2, 4, ... up to the limit.

        Calls `on_progress(done, total)`.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Cumulative counts of a chain or model since start, in Triton's terms (seconds, not ns)."""

    name: str
    version: str
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success_count: int = 0
    success_s: float = 0.0
    fail_count: int = 0
    fail_s: float = 0.0
    queue_count: int = 0
    queue_s: float = 0.0
    compute_infer_count: int = 0
    compute_infer_s: float = 0.0
    batches: tuple[tuple[int, int, float], ...] = ()
    """(batch size, executions, compute seconds)."""


OnPartial = Callable[[int, tuple[Tensor, ...]], None]
"""Called with the index of the first item and the items' outputs, which carry the item axis."""


OnEnd = Callable[[InferAnswer | RequestError], None]
"""Called with how a request ended."""


class Inference(Protocol):
    """The data path that rpc drives."""

    async def infer(
        self, request: InferRequest, on_partial: OnPartial | None = None
    ) -> InferAnswer:
        """Raises RequestError. Cancelling the awaiting task cancels the request everywhere.

        With `on_partial` the items of fan-outs are also handed over as they come, in any order,
        each once; the answer still holds everything.
        """
        ...

    def begin(
        self, request: InferRequest, on_end: OnEnd, on_partial: OnPartial | None = None
    ) -> int:
        """`infer` without a task: `on_end` is called once, perhaps before this returns.

        It must not begin or cancel requests itself. Returns the number to `cancel` this one by.
        """
        ...

    def cancel(self, number: int) -> None:
        """Drop a request that was begun: `on_end` is not called. A no-op once it has ended."""
        ...


class Control(Protocol):
    """Everything else that rpc and web show and change."""

    def callable(self, name: str, version: str = "") -> BoundChain:
        """A chain or model by name; RequestError (Triton's words) if unknown or not ready."""
        ...

    def callables(self) -> tuple[BoundChain, ...]:
        """Every chain and model that can be called now, by name."""
        ...

    @property
    def ready(self) -> bool:
        """Whether everything declared is loaded and at least one machine answers."""
        ...

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is stopping."""
        ...

    def repository_index(self) -> tuple[ModelState, ...]:
        """Chains and models with their states."""
        ...

    async def load(self, name: str) -> None:
        """Make a chain's models, or one model, ready. RequestError."""
        ...

    async def unload(self, name: str) -> None:
        """Withdraw a chain, or unload a model that no chain uses. RequestError."""
        ...

    def statistics(self, name: str = "", version: str = "") -> tuple[ModelStatistics, ...]:
        """All, or one; RequestError when unknown."""
        ...

    async def apply(self, chains: Sequence[Chain]) -> Plan:
        """Serve these chains (new or replaced), all or none.

        Raises ConfigError, PlanError, ResidencyError; then nothing has changed.
        """
        ...

    async def delete(self, chain: str) -> bool:
        """Stop serving a chain; False when there was none."""
        ...

    def chains(self) -> tuple[Chain, ...]:
        """The chains being served, by name."""
        ...

    async def plan(self, chains: Sequence[Chain]) -> Plan:
        """What `apply` would do, without doing it. ConfigError, PlanError."""
        ...

    def current_plan(self) -> Plan:
        """The plan in force."""
        ...

    def status(self) -> dict[str, Any]:
        """A JSON-able picture: machines, models, chains, queues, counts; units end the keys."""
        ...

    def watch_status(self) -> AsyncIterator[dict[str, Any]]:
        """`status()` now and whenever it changed, at most once a second."""
        ...

    def explain(self, request_id: str) -> Timeline | None:
        """A recent request by its id (the client's, or the one in the answer)."""
        ...
