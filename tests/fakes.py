"""Fakes of the ports that rpc and web are written against: no Triton, no planner, no clock.

`FakeControl` knows a few models and chains; `FakeInference` answers with the inputs' bytes under
the outputs' names, waits where it is told to, and remembers what it was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from paceline.core.bind import BoundChain, bind, single_model_chain
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ErrorKind, PacelineError, Rejected, RequestError
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.ports import ModelState, ModelStatistics, OnEnd, OnPartial
from paceline.core.request import InferAnswer, InferRequest, Span, Timeline
from paceline.core.tensor import DATATYPES, Tensor, TensorSpec

PAIR = (TensorSpec("A", "INT32", (16,)), TensorSpec("B", "BYTES", (2,)))
PAIR_OUT = (TensorSpec("C", "INT32", (16,)), TensorSpec("D", "BYTES", (2,)))

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # x and n are what the wording of Triton's errors was recorded with.
        ModelSpec("x", 8, PAIR, PAIR_OUT, platform="python"),
        ModelSpec("n", 0, PAIR, PAIR_OUT, platform="python", versions=("2", "10")),
        ModelSpec(
            "sometimes",
            0,
            (TensorSpec("A", "INT32", (2,)), TensorSpec("M", "BOOL", (1,), optional=True)),
            (TensorSpec("C", "INT32", (2,)),),
            platform="python",
        ),
        *(
            ModelSpec(
                f"echo_{datatype.lower()}",
                0,
                (TensorSpec("in", datatype, (-1,)),),
                (TensorSpec("out", datatype, (-1,)),),
                platform="python",
            )
            for datatype in sorted(DATATYPES)
        ),
        ModelSpec(
            "det",
            0,
            (TensorSpec("image", "UINT8", (-1, -1, 3)),),
            (TensorSpec("crops", "FP32", (-1, 4)),),
        ),
        ModelSpec("rec", 8, (TensorSpec("x", "FP32", (4,)),), (TensorSpec("text", "BYTES", (1,)),)),
    )
}

OCR = Chain(
    "ocr",
    slo_s=0.8,
    inputs=(TensorSpec("image", "UINT8", (-1, -1, 3)),),
    modules=(
        Module("detect", "det", {"image": Source(None, "image")}),
        Module(
            "recognize",
            "rec",
            {"x": Source("detect", "crops")},
            for_each=Source("detect", "crops"),
            fan_out=4.0,
        ),
    ),
    outputs={"text": Source("recognize", "text")},
    rate_rps=20.0,
    priority=1,
)


def plan_of(chains: Iterable[Chain]) -> Plan:
    """A plan of one machine per module, whatever it would take."""
    return Plan(
        "harpagon",
        "fractional",
        tuple(
            ChainPlan(
                chain.name,
                chain.slo_s,
                chain.rate_rps or 1.0,
                chain.slo_s / 2,
                tuple(
                    ModulePlan(
                        module.name,
                        module.model,
                        20.0,
                        0.0,
                        0.4,
                        0.2,
                        (Allocation("cpu", 4, 0.1, 1.0, 2.5),),
                    )
                    for module in chain.modules
                ),
            )
            for chain in chains
        ),
        lower_bound_per_hour=1.25,
        solve_s=0.0012,
    )


class FakeControl:
    """Control over models and chains that are there or not; nothing is ever executed."""

    def __init__(self) -> None:
        self.ready = True
        self.draining = False
        self.bound: dict[str, BoundChain] = {
            name: single_model_chain(spec) for name, spec in MODELS.items()
        }
        self.served: dict[str, Chain] = {}
        self.not_ready: set[str] = set()
        self.timelines: dict[str, Timeline] = {}
        self.counts: dict[str, ModelStatistics] = {}
        self.failure: PacelineError | None = None
        self.loaded: list[str] = []
        self.watchers = 0
        self._changed = asyncio.Event()
        self._serve(OCR)

    def _serve(self, chain: Chain) -> None:
        self.served[chain.name] = chain
        self.bound[chain.name] = bind(chain, MODELS)

    def changed(self) -> None:
        """Tell everyone who watches the status."""
        self._changed.set()
        self._changed = asyncio.Event()

    def callable(self, name: str, version: str = "") -> BoundChain:
        bound = self.bound.get(name)
        what = f"Request for unknown model: '{name}'"
        if bound is None:
            raise RequestError(ErrorKind.UNKNOWN_MODEL, f"{what} is not found")
        if version not in ("", "1", "2", "10"):
            raise RequestError(ErrorKind.UNKNOWN_MODEL, f"{what} version {version} is not found")
        if name in self.not_ready:
            raise RequestError(ErrorKind.NOT_READY, f"{what} has no available versions")
        return bound

    def callables(self) -> tuple[BoundChain, ...]:
        return tuple(b for name, b in sorted(self.bound.items()) if name not in self.not_ready)

    def repository_index(self) -> tuple[ModelState, ...]:
        return tuple(
            ModelState(name, "1", "UNAVAILABLE", "unloaded")
            if name in self.not_ready
            else ModelState(name, "1", "READY")
            for name in sorted(self.bound)
        )

    async def load(self, name: str) -> None:
        self._raise()
        if name not in self.bound:
            raise RequestError(ErrorKind.UNKNOWN_MODEL, f"Request for unknown model: '{name}'")
        self.not_ready.discard(name)
        self.loaded.append(name)

    async def unload(self, name: str) -> None:
        self._raise()
        if name not in self.bound:
            raise RequestError(ErrorKind.UNKNOWN_MODEL, f"Request for unknown model: '{name}'")
        self.not_ready.add(name)

    def statistics(self, name: str = "", version: str = "") -> tuple[ModelStatistics, ...]:
        names = [name] if name else sorted(self.bound)
        if name:
            self.callable(name, version)
        return tuple(self.counts.get(n, ModelStatistics(n, "1")) for n in names)

    async def apply(self, chains: Sequence[Chain]) -> Plan:
        plan = await self.plan(chains)
        for chain in chains:
            self._serve(chain)
        return plan

    async def delete(self, chain: str) -> bool:
        self.bound.pop(chain, None)
        return self.served.pop(chain, None) is not None

    def chains(self) -> tuple[Chain, ...]:
        return tuple(chain for _, chain in sorted(self.served.items()))

    async def plan(self, chains: Sequence[Chain]) -> Plan:
        self._raise()
        for chain in chains:
            bind(chain, MODELS)
        return plan_of(chains)

    def current_plan(self) -> Plan:
        return plan_of(self.chains())

    def status(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "draining": self.draining,
            "uptime_s": 12.5,
            "cost_per_hour": self.current_plan().cost_per_hour,
            "chains": [self._chain_status(chain) for chain in self.chains()],
            "modules": [
                {
                    "chain": chain.name,
                    "module": module.name,
                    "model": module.model,
                    "queued": 3,
                    "oldest_ms": 4.5,
                    "executing": 1,
                    "batch_size": 4,
                    "machines": ["local"],
                }
                for chain in self.chains()
                for module in chain.modules
            ],
            "machines": [
                {
                    "machine": "local",
                    "hardware": "cpu",
                    "state": "up",
                    "executing": 1,
                    "models": ["det", "rec"],
                    "memory_used_mib": 120.0,
                    "memory_mib": 4096.0,
                }
            ],
            "models": [
                {
                    "model": state.name,
                    "version": state.version,
                    "state": state.state,
                    "reason": state.reason,
                    "machines": ["local"],
                }
                for state in self.repository_index()
            ],
        }

    def _chain_status(self, chain: Chain) -> dict[str, Any]:
        return {
            "chain": chain.name,
            "slo_ms": chain.slo_s * 1e3,
            "rate_rps": chain.rate_rps,
            "latency_worst_ms": 400.0,
            "cost_per_hour": 5.0,
            "in_flight": 2,
            "met": 99,
            "missed": 1,
            "failed": 0,
            "rejected": 0,
            "attainment": 0.99,
        }

    async def watch_status(self) -> AsyncIterator[dict[str, Any]]:
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                yield self.status()
                await changed.wait()
        finally:
            self.watchers -= 1

    def explain(self, request_id: str) -> Timeline | None:
        return self.timelines.get(request_id)

    def _raise(self) -> None:
        if self.failure is not None:
            raise self.failure


class FakeInference:
    """Answers with what came in; `gate` holds answers back, `failure` is raised instead."""

    def __init__(self, control: FakeControl) -> None:
        self.control = control
        self.requests: list[InferRequest] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.waiting_most = 0
        self.cancelled = 0
        self._moved = asyncio.Event()
        self._begun: dict[int, asyncio.Task[InferAnswer]] = {}

    async def until_waiting(self, count: int) -> None:
        """Returns as soon as `count` requests wait at the gate."""
        while self.waiting != count:
            self._moved.clear()
            await self._moved.wait()

    async def infer(
        self, request: InferRequest, on_partial: OnPartial | None = None
    ) -> InferAnswer:
        if self.control.draining:
            raise Rejected(ErrorKind.DRAINING, "the server is stopping")
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        await self._pass_gate()
        bound = self.control.callable(request.chain, request.version)
        given = dict(zip((spec.name for spec in bound.outputs), request.inputs, strict=False))
        names = request.outputs or tuple(given)
        timeline = self._timeline(request)
        for key in {request.request_id, str(timeline.request)} - {""}:
            self.control.timelines[key] = timeline
        # As after a split of a batch: a view, not bytes.
        outputs = tuple(
            Tensor(name, given[name].datatype, given[name].shape, memoryview(given[name].data))
            for name in names
        )
        return InferAnswer(request.chain, outputs, timeline)

    def begin(
        self, request: InferRequest, on_end: OnEnd, on_partial: OnPartial | None = None
    ) -> int:
        if self.failure is not None and not isinstance(self.failure, RequestError):
            # As a bug in the engine does.
            raise self.failure
        task = asyncio.get_running_loop().create_task(self.infer(request, on_partial))

        def ended(task: asyncio.Task[InferAnswer]) -> None:
            del self._begun[id(task)]
            if not task.cancelled():
                error = task.exception()
                assert error is None or isinstance(error, RequestError), error
                on_end(error or task.result())

        self._begun[id(task)] = task
        task.add_done_callback(ended)
        return id(task)

    def cancel(self, number: int) -> None:
        if number in self._begun:
            self._begun[number].cancel()

    async def _pass_gate(self) -> None:
        self.waiting += 1
        self.waiting_most = max(self.waiting_most, self.waiting)
        self._moved.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
            self._moved.set()

    def _timeline(self, request: InferRequest) -> Timeline:
        span = Span("only", "m", "local", 2, 8, queued_s=1.001, started_s=1.003, ended_s=1.013)
        number = len(self.requests)
        return Timeline(number, request.request_id, request.chain, 1.0, 1.014, 1.5, (span,))
