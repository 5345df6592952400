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
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Protocol

from paceline.core.errors import BackendError, ErrorKind, Rejected, RequestError
from paceline.core.ports import Executor, OnEnd, OnPartial
from paceline.core.request import InferAnswer, InferRequest, Timeline
from paceline.core.tensor import Tensor
from paceline.core.values import value
from paceline.dispatch import (
    Abort,
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Dispatcher,
    Entered,
    Event,
    Execute,
    Fail,
    HangLimits,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    Passed,
    Reached,
    RemoveChain,
    Settled,
    Submit,
    Tick,
    TooCold,
    Wake,
)
from paceline.dispatch.refusals import queue_full
from paceline.dispatch.route import ChainRoute
from paceline.runtime.suspicions import Suspicions

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
    hang: HangLimits = field(default_factory=HangLimits)


@value
class _Call:
    """A request under way."""

    chain: str
    size_bytes: int
    on_end: OnEnd
    on_partial: OnPartial | None


class Leasing(Protocol):
    """Who has models loaded for the requests that will use them."""

    def ready_in_s(self, model: str, now_s: float) -> float:
        """How long from `now_s` on until it can be used; 0 when it can."""
        ...

    def told(self, action: Entered | Reached | Passed | TooCold) -> None:
        """What the dispatcher says about the use of models."""
        ...

    def ended(self, request: int) -> None:
        """A request is over, however it ended."""
        ...

    def executed(self, machine: str, model: str, rows: int, took_s: float) -> None:
        """A batch came back in order."""
        ...

    def installed(self, route: ChainRoute) -> None:
        """A chain, or a model by its own name, is served by that route."""
        ...

    def removed(self, chain: str) -> None:
        """It is no longer served."""
        ...


class Engine:
    """Implements `core.ports.Inference` over an Executor."""

    def __init__(
        self,
        executor: Executor,
        *,
        limits: EngineLimits | None = None,
        suspicions: Suspicions | None = None,
    ) -> None:
        self._executor = executor
        self.suspicions = suspicions or Suspicions()
        """Told by who repairs models: answers that are not to be believed."""
        self._limits = limits or EngineLimits()
        self._on_timeline: list[Callable[[Timeline], object]] = []
        self._on_batch: list[Callable[[str, int, float], object]] = []
        self._on_broken: list[Callable[[str, str, str], object]] = []
        self._dispatcher = Dispatcher(self._limits.hang)
        self._ids = count(1)
        self._calls: dict[int, _Call] = {}
        self._executions: set[asyncio.Task[None]] = set()
        self._routes: dict[str, ChainRoute] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._last_ones: dict[str | None, list[asyncio.Future[None]]] = {}
        self._timelines: deque[Timeline] = deque(maxlen=self._limits.kept_timelines)
        self._settling = self._news = False
        self._read_s = 0.0
        self._leasing: Leasing | None = None
        self._watched_lanes: dict[tuple[str, str], list[asyncio.Future[None]]] = {}
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
        future: asyncio.Future[InferAnswer] = asyncio.get_running_loop().create_future()

        def on_end(outcome: InferAnswer | RequestError) -> None:
            if future.done():
                return
            if isinstance(outcome, RequestError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        number = self.begin(request, on_end, on_partial)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(number)
            raise

    def begin(
        self, request: InferRequest, on_end: OnEnd, on_partial: OnPartial | None = None
    ) -> int:
        """See `core.ports.Inference.begin`."""
        number = next(self._ids)
        size_bytes = request.size_bytes
        if self.draining:
            on_end(Rejected(ErrorKind.DRAINING, "the server is shutting down; retry elsewhere"))
        elif self._bytes + size_bytes > self._limits.max_in_flight_bytes:
            route = self._routes.get(request.chain)
            floor_s = route.longest.floor_s if route is not None else 0.0
            on_end(queue_full(floor_s, "bytes of requests in flight"))
        else:
            self._calls[number] = _Call(request.chain, size_bytes, on_end, on_partial)
            self._bytes += size_bytes
            now_s = self._read_s if self._settling else self._now_s()
            stream = on_partial is not None
            try:
                self._handle_soon(self._submit(number, request, now_s, stream=stream), now_s)
            except BaseException:
                self.cancel(number)
                raise
        return number

    def cancel(self, number: int) -> None:
        """See `core.ports.Inference.cancel`."""
        call = self._calls.pop(number, None)
        if call is not None:
            try:
                self._handle(Cancel(number))
            finally:
                self._forget(call)
                if self._leasing is not None:
                    self._leasing.ended(number)

    def lease(self, leasing: Leasing) -> None:
        """From now on models come and go: tell `leasing` what requests do with them."""
        self._leasing = leasing
        self._dispatcher.lease(leasing.ready_in_s)
        for route in self._routes.values():
            leasing.installed(route)

    def abort(self, number: int, error: RequestError) -> None:
        """A request that was begun can come to nothing."""
        self._handle(Abort(number, error))

    def install(self, route: ChainRoute) -> None:
        """Serve a chain by `route` from now on."""
        self._routes[route.bound.name] = route
        self._handle(InstallChain(route))
        if self._leasing is not None:
            self._leasing.installed(route)

    def remove(self, chain: str) -> None:
        """Refuse new requests of a chain."""
        self._routes.pop(chain, None)
        self._handle(RemoveChain(chain))
        if self._leasing is not None:
            self._leasing.removed(chain)

    def machine_up(
        self, machine: str, hardware: str, slots: int, instances: Mapping[str, int]
    ) -> None:
        """A machine executes these models from now on (also: its models changed)."""
        self._handle(MachineUp(machine, hardware, slots, instances))

    def machine_down(self, machine: str) -> None:
        """Send nothing more to a machine."""
        self._handle(MachineDown(machine))

    async def lane_idle(self, machine: str, model: str) -> None:
        """Wait until no batch of a model runs on a machine (which should get no more of them)."""
        while self._dispatcher.running(machine, model):
            ended = asyncio.get_running_loop().create_future()
            self._watched_lanes.setdefault((machine, model), []).append(ended)
            await ended

    async def settled(self, chain: str, *, timeout_s: float) -> bool:
        """Wait until no request of a chain is under way; False when time ran out first."""
        return not self._dispatcher.in_flight_of(chain) or await self._last(chain, timeout_s)

    async def drain(self, *, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others; False when time ran out first."""
        self.draining = True
        return not self._calls or await self._last(None, timeout_s)

    async def _last(self, chain: str | None, timeout_s: float) -> bool:
        """Wait for the last request of a chain, or of all (None); False when time ran out."""
        ended = asyncio.get_running_loop().create_future()
        self._last_ones.setdefault(chain, []).append(ended)
        try:
            await asyncio.wait_for(ended, timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Cancel what is still executing in a task; what was begun ends with its connection."""
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

    def _submit(self, number: int, request: InferRequest, now_s: float, *, stream: bool) -> Submit:
        route = self._routes.get(request.chain)
        slo_s = self._limits.default_budget_s
        if route is not None:
            slo_s = min(slo_s, route.bound.chain.slo_s)
        budget_s = slo_s if request.budget_s is None else min(slo_s, request.budget_s)
        return Submit(
            request=number,
            chain=request.chain,
            inputs={tensor.name: tensor for tensor in request.inputs},
            deadline_s=now_s + budget_s,
            outputs=request.outputs,
            priority=request.priority,
            request_id=request.request_id,
            version=request.version,
            parameters=request.parameters,
            stream=stream,
        )

    def _handle_soon(self, event: Event, now_s: float) -> None:
        """Take an event in now, and launch batches when what arrived with it has been read too.

        One pass of the event loop reads many requests, each in a task of its own: launching for
        the first of them would make a batch of one, and a second one of all others.
        """
        others = self._dispatcher.in_flight - isinstance(event, BatchDone)
        if others <= 0:
            self._perform(self._dispatcher.handle(event, now_s=now_s))
            return
        self._perform(self._dispatcher.handle(event, now_s=now_s, settled=False))
        self._news = True
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_soon(self._settle, 0, now_s + SETTLING_LIMIT_S)

    def _settle(self, quiet: int, latest_s: float) -> None:
        """Launch after a pass or two that brought nothing, or when it is late enough."""
        quiet = 0 if self._news else quiet + 1
        self._news = False
        if quiet < QUIET_PASSES and self._now_s() < latest_s:
            asyncio.get_running_loop().call_soon(self._settle, quiet, latest_s)
            return
        self._settling = False
        self._handle(Settled())

    def _handle(self, event: Event) -> None:
        self._perform(self._dispatcher.handle(event, now_s=self._now_s()))

    def _now_s(self) -> float:
        """The event loop's clock. uvloop's own answer is in whole milliseconds and as old as the
        pass, which is too coarse to learn durations from; what arrives in one pass has one time.
        """
        self._read_s = monotonic()
        return self._read_s

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Execute():
                    self._start(action)
                case Answer():
                    # Who waits first: what follows is for the metrics.
                    timeline = action.timeline
                    self._end(action.request, InferAnswer(timeline.chain, action.outputs, timeline))
                    self._record(timeline)
                case Fail():
                    self._end(action.request, _copy(action.error))
                    self._record(action.timeline)
                case Entered() | Reached() | Passed() | TooCold():
                    if self._leasing is not None:
                        self._leasing.told(action)
                case Partial():
                    call = self._calls.get(action.request)
                    if call is not None and call.on_partial is not None:
                        call.on_partial(action.start, action.outputs)
                case Broken():
                    for tell in self._on_broken:
                        tell(action.machine, action.model, action.reason)
                case Wake():
                    if self._wake is not None:
                        self._wake.cancel()
                    loop = asyncio.get_running_loop()
                    self._wake = loop.call_at(action.at_s, self._handle, Tick())

    def _start(self, action: Execute) -> None:
        """Have a batch executed: without a task where that is possible."""
        started_s = self._now_s()

        def on_end(outcome: tuple[Tensor, ...] | BackendError) -> None:
            self._executed(action, outcome, started_s)

        machine, call, timeout_s = action.machine, action.call, action.timeout_s
        try:
            if self._executor.begin(machine, call, on_end, timeout_s=timeout_s):
                return
        except Exception:
            # `execute` tells why, where it fails as well.
            logger.exception("beginning %s on %s", call.model, machine)
        task = asyncio.get_running_loop().create_task(self._execute(action, started_s))
        self._executions.add(task)
        task.add_done_callback(self._executions.discard)

    async def _execute(self, action: Execute, started_s: float) -> None:
        try:
            outcome: tuple[Tensor, ...] | BackendError = await self._executor.execute(
                action.machine, action.call, timeout_s=action.timeout_s
            )
        except BackendError as error:
            outcome = error
        except Exception as error:
            # Never lose a batch: an executor's bug fails its requests, not the server.
            logger.exception("executing %s on %s", action.call.model, action.machine)
            outcome = BackendError(f"executor failed: {error}")
        self._executed(action, outcome, started_s)

    def _executed(
        self, action: Execute, outcome: tuple[Tensor, ...] | BackendError, started_s: float
    ) -> None:
        machine, model = action.machine, action.call.model
        if not isinstance(outcome, BackendError) and self.suspicions.any(machine, model, started_s):
            said = f"the process of model '{model}' on {machine} was found dead meanwhile"
            outcome = BackendError(said, kind=ErrorKind.UNAVAILABLE)
        if isinstance(outcome, BackendError):
            self._handle(BatchFailed(action.batch, outcome))
        else:
            ended_s = self._now_s()
            took_s = ended_s - started_s
            for tell in self._on_batch:
                tell(model, action.rows, took_s)
            if self._leasing is not None:
                self._leasing.executed(machine, model, action.rows, took_s)
            self._handle_soon(BatchDone(action.batch, outcome), ended_s)
        for ended in self._watched_lanes.pop((machine, model), ()):
            if not ended.done():
                ended.set_result(None)

    def _record(self, timeline: Timeline) -> None:
        self._timelines.append(timeline)
        for tell in self._on_timeline:
            tell(timeline)

    def _end(self, number: int, outcome: InferAnswer | RequestError) -> None:
        if self._leasing is not None:
            self._leasing.ended(number)
        call = self._calls.pop(number, None)
        if call is None:
            return
        try:
            call.on_end(outcome)
        except Exception:
            # Others in the same pass are still to be told.
            logger.exception("telling how request %d to %s ended", number, call.chain)
        self._forget(call)

    def _forget(self, call: _Call) -> None:
        """After its end: what it held is free, and who waits for the last one is told."""
        self._bytes -= call.size_bytes
        if not self._last_ones:
            return
        waiting: list[asyncio.Future[None]] = []
        if not self._dispatcher.in_flight_of(call.chain):
            waiting += self._last_ones.pop(call.chain, ())
        if not self._calls:
            waiting += self._last_ones.pop(None, ())
        for ended in waiting:
            if not ended.done():
                ended.set_result(None)


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
