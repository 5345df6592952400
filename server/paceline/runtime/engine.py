"""The engine: feeds events to the dispatcher and performs its actions on the event loop.

The one owner of the dispatcher; everything runs on one loop, so there are no locks. Invariant:
every `infer` that was accepted ends exactly once - answered, failed or cancelled - and every
`Execute` is reported back exactly once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from paceline.core.errors import BackendError, ErrorKind, Rejected, RequestError
from paceline.core.ports import Executor, OnPartial
from paceline.core.request import InferAnswer, InferRequest, Timeline
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Dispatcher,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    RemoveChain,
    Settled,
    Submit,
    Tick,
    Wake,
)
from paceline.dispatch.route import ChainRoute

logger = logging.getLogger(__name__)

QUIET_PASSES = 1
SETTLING_LIMIT_S = 0.001
"""A launch waits for so many passes of the event loop without news, and no longer than this."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds on what is held at once; see ARCHITECTURE.md."""

    default_budget_s: float = 300.0
    max_in_flight_bytes: int = 2 << 30
    kept_timelines: int = 2048


class Engine:
    """Implements `core.ports.Inference` over an Executor."""

    def __init__(self, executor: Executor, *, limits: EngineLimits | None = None) -> None:
        self._executor = executor
        self._limits = limits or EngineLimits()
        self._on_timeline: list[Callable[[Timeline], object]] = []
        self._on_batch: list[Callable[[str, int, float], object]] = []
        self._on_broken: list[Callable[[str, str, str], object]] = []
        self._dispatcher = Dispatcher()
        self._ids = count(1)
        self._waiting: dict[int, asyncio.Future[InferAnswer]] = {}
        self._partials: dict[int, OnPartial] = {}
        self._executions: set[asyncio.Task[None]] = set()
        self._routes: dict[str, ChainRoute] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._last_ones: dict[str, list[asyncio.Future[None]]] = {}
        self._timelines: deque[Timeline] = deque(maxlen=self._limits.kept_timelines)
        self._idle = asyncio.Event()
        self._idle.set()
        self._settling = self._news = False
        self.draining = False

    def watch(
        self,
        *,
        on_timeline: Callable[[Timeline], object] | None = None,
        on_batch: Callable[[str, int, float], object] | None = None,
        on_broken: Callable[[str, str, str], object] | None = None,
    ) -> None:
        """From now on tell of ended requests, of executed batches `(model, rows, duration_s)`,
        and of models that have to be repaired `(machine, model, reason)`.
        """
        self._on_timeline += [on_timeline] if on_timeline is not None else []
        self._on_batch += [on_batch] if on_batch is not None else []
        self._on_broken += [on_broken] if on_broken is not None else []

    async def infer(
        self, request: InferRequest, on_partial: OnPartial | None = None
    ) -> InferAnswer:
        """See `core.ports.Inference.infer`."""
        if self.draining:
            raise Rejected(ErrorKind.DRAINING, "the server is shutting down; retry elsewhere")
        size_bytes = request.size_bytes
        if self._bytes + size_bytes > self._limits.max_in_flight_bytes:
            raise Rejected(ErrorKind.QUEUE_FULL, "Exceeds maximum bytes of requests in flight")
        loop = asyncio.get_running_loop()
        identity = next(self._ids)
        future: asyncio.Future[InferAnswer] = loop.create_future()
        self._waiting[identity] = future
        self._bytes += size_bytes
        self._idle.clear()
        try:
            if on_partial is not None:
                self._partials[identity] = on_partial
            self._handle_soon(self._submit(identity, request, loop.time()))
            return await future
        except asyncio.CancelledError:
            self._handle(Cancel(identity))
            raise
        finally:
            del self._waiting[identity]
            self._partials.pop(identity, None)
            self._bytes -= size_bytes
            if not self._waiting:
                self._idle.set()
            if self._last_ones and not self._dispatcher.in_flight_of(request.chain):
                for ended in self._last_ones.pop(request.chain, ()):
                    if not ended.done():
                        ended.set_result(None)

    def install(self, route: ChainRoute) -> None:
        """Serve a chain by `route` from now on."""
        self._routes[route.bound.name] = route
        self._handle(InstallChain(route))

    def remove(self, chain: str) -> None:
        """Refuse new requests of a chain."""
        self._routes.pop(chain, None)
        self._handle(RemoveChain(chain))

    def machine_up(
        self, machine: str, hardware: str, slots: int, instances: Mapping[str, int]
    ) -> None:
        """A machine executes these models from now on (also: its models changed)."""
        self._handle(MachineUp(machine, hardware, slots, instances))

    def machine_down(self, machine: str) -> None:
        """Send nothing more to a machine."""
        self._handle(MachineDown(machine))

    async def settled(self, chain: str, *, timeout_s: float) -> bool:
        """Wait until no request of a chain is under way; False when time ran out first."""
        if not self._dispatcher.in_flight_of(chain):
            return True
        ended = asyncio.get_running_loop().create_future()
        self._last_ones.setdefault(chain, []).append(ended)
        try:
            await asyncio.wait_for(ended, timeout_s)
        except TimeoutError:
            return False
        return True

    async def drain(self, *, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others; False when time ran out first."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Cancel whatever is still executing."""
        if self._wake is not None:
            self._wake.cancel()
        for task in list(self._executions):
            task.cancel()
        await asyncio.gather(*self._executions, return_exceptions=True)

    def explain(self, request_id: str) -> Timeline | None:
        """The latest request of that id, among those kept."""
        for timeline in reversed(self._timelines):
            if request_id in (timeline.request_id, str(timeline.request)):
                return timeline
        return None

    @property
    def dispatcher(self) -> Dispatcher:
        """For reading its state only; events go through the engine."""
        return self._dispatcher

    def _submit(self, identity: int, request: InferRequest, now_s: float) -> Submit:
        route = self._routes.get(request.chain)
        slo_s = self._limits.default_budget_s
        if route is not None:
            slo_s = min(slo_s, route.bound.chain.slo_s)
        budget_s = slo_s if request.budget_s is None else min(slo_s, request.budget_s)
        return Submit(
            request=identity,
            chain=request.chain,
            inputs={tensor.name: tensor for tensor in request.inputs},
            deadline_s=now_s + budget_s,
            outputs=request.outputs,
            priority=request.priority,
            request_id=request.request_id,
            version=request.version,
            parameters=request.parameters,
            stream=identity in self._partials,
        )

    def _handle_soon(self, event: Event) -> None:
        """Take an event in now, and launch batches when what arrived with it has been read too.

        One pass of the event loop reads many requests, each in a task of its own: launching for
        the first of them would make a batch of one, and a second one of all others.
        """
        others = self._dispatcher.in_flight - isinstance(event, BatchDone)
        if others <= 0:
            self._handle(event)
            return
        now_s = self._loop_s()
        self._perform(self._dispatcher.handle(event, now_s=now_s, settled=False))
        self._news = True
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle, 0, now_s + SETTLING_LIMIT_S)

    def _settle(self, quiet: int, latest_s: float) -> None:
        """Launch after a pass or two that brought nothing, or when it is late enough."""
        quiet = 0 if self._news else quiet + 1
        self._news = False
        if quiet < QUIET_PASSES and self._loop_s() < latest_s:
            asyncio.get_running_loop().call_soon(self._settle, quiet, latest_s)
            return
        self._settling = False
        self._handle(Settled())

    def _handle(self, event: Event) -> None:
        self._perform(self._dispatcher.handle(event, now_s=self._loop_s()))

    @staticmethod
    def _loop_s() -> float:
        return asyncio.get_running_loop().time()

    def _perform(self, actions: Sequence[Action]) -> None:
        loop = asyncio.get_running_loop()
        for action in actions:
            match action:
                case Execute():
                    task = loop.create_task(self._execute(action))
                    self._executions.add(task)
                    task.add_done_callback(self._executions.discard)
                case Answer():
                    self._record(action.timeline)
                    self._resolve(action)
                case Fail():
                    self._record(action.timeline)
                    self._reject(action)
                case Partial():
                    if (on_partial := self._partials.get(action.request)) is not None:
                        on_partial(action.start, action.outputs)
                case Broken():
                    for tell in self._on_broken:
                        tell(action.machine, action.model, action.reason)
                case Wake():
                    if self._wake is not None:
                        self._wake.cancel()
                    self._wake = loop.call_at(action.at_s, self._handle, Tick())

    async def _execute(self, action: Execute) -> None:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            outputs = await self._executor.execute(
                action.machine, action.call, timeout_s=action.timeout_s
            )
        except BackendError as error:
            self._handle(BatchFailed(action.batch, error))
        except Exception as error:
            # Never lose a batch: an executor's bug fails its requests, not the server.
            logger.exception("executing %s on %s", action.call.model, action.machine)
            self._handle(BatchFailed(action.batch, BackendError(f"executor failed: {error}")))
        else:
            for tell in self._on_batch:
                tell(action.call.model, action.rows, loop.time() - started_s)
            self._handle_soon(BatchDone(action.batch, outputs))

    def _record(self, timeline: Timeline) -> None:
        self._timelines.append(timeline)
        for tell in self._on_timeline:
            tell(timeline)

    def _resolve(self, action: Answer) -> None:
        future = self._waiting.get(action.request)
        if future is not None and not future.done():
            chain = action.timeline.chain
            future.set_result(InferAnswer(chain, action.outputs, action.timeline))

    def _reject(self, action: Fail) -> None:
        future = self._waiting.get(action.request)
        if future is not None and not future.done():
            future.set_exception(_copy(action.error))


def _copy(error: RequestError) -> RequestError:
    """Its own exception for each waiter: a shared one would collect all their tracebacks."""
    if isinstance(error, Rejected):
        return Rejected(
            error.kind,
            error.message,
            shortfall_s=error.shortfall_s,
            retry_after_s=error.retry_after_s,
        )
    return RequestError(error.kind, error.message)
