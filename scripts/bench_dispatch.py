"""What a request costs in the dispatcher, and in the engine around it, without any transport.

A closed loop keeps so many requests in flight. Executions answer at once with the bytes that they
were given, so what is left is the decision: admission, queues, batches, gathering, timelines.

    dispatcher  events by hand, as the engine sends them: what one pass of the event loop brings
                is taken in first, then batches are launched
    engine      `Engine.begin` on a running loop (uvloop) with metrics and statistics, no sockets

Three chains: `1`, one model; `3`, three of them in a row; `fan-out 8`, one after which eight items
go through another. Two slots, batches of up to 32 rows, tensors of 64 bytes. Per request it prints
the processor's time, the best of the repeats (other processes only ever add), and the dispatcher's
calls, of Python functions and of functions written in C.

Then what the simulator takes for a row of a module: chains of one and of three at 198 requests/s,
Poisson, in which the same dispatcher runs in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import process_time, time
from typing import Any

import uvloop
from rich.table import Table

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import RequestError
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.core.ports import ModelCall, OnExecuted
from paceline.core.profile import Durations, ProfileRow, Profiles
from paceline.core.request import InferAnswer, InferRequest, Timeline
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    ChainRoute,
    Dispatcher,
    Execute,
    Fail,
    InstallChain,
    MachineUp,
    Settled,
    Submit,
    route_chain,
)
from paceline.metrics import Metrics
from paceline.report import console
from paceline.runtime.engine import Engine
from paceline.runtime.statistics import Statistics
from paceline.sim.verify import simulate

BYTES = 64
BATCH = 32
SLOTS = 2
SLO_S = 120.0
ITEMS = 8
PASS_S = 1e-4
"""How long a pass of the event loop takes in the dispatcher's time."""
M3 = ((1, 0.08), (2, 0.1), (8, 0.25), (32, 0.8))
DURATIONS = Durations(((1, 0.0005), (8, 0.0008), (32, 0.002)))


def spec(name: str, *, row: int = BYTES) -> ModelSpec:
    """A model that gives back what it gets."""
    return ModelSpec(
        name, BATCH, (TensorSpec("x", "UINT8", (row,)),), (TensorSpec("y", "UINT8", (row,)),)
    )


def chain_of(modules: tuple[Module, ...], output: str) -> Chain:
    inputs = (TensorSpec("x", "UINT8", (BYTES,)),)
    return Chain("c", SLO_S, inputs, modules, {"y": Source(output, "y")})


def line(length: int) -> ChainRoute:
    """Identity models in a row."""
    modules, source = [], Source(None, "x")
    for name in (f"m{index}" for index in range(length)):
        modules.append(Module(name, name, {"x": source}))
        source = Source(name, "y")
    chain = chain_of(tuple(modules), f"m{length - 1}")
    return planned(chain, {m.name: spec(m.name) for m in modules})


def fan_out() -> ChainRoute:
    """A model whose output is read as eight items, which another model takes one by one."""
    crop = BYTES // ITEMS
    cut = ModelSpec(
        "cut",
        BATCH,
        (TensorSpec("x", "UINT8", (BYTES,)),),
        (TensorSpec("y", "UINT8", (ITEMS, crop)),),
    )
    items = Source("cut", "y")
    modules = (
        Module("cut", "cut", {"x": Source(None, "x")}),
        Module("read", "read", {"x": items}, for_each=items, fan_out=float(ITEMS)),
    )
    return planned(chain_of(modules, "read"), {"cut": cut, "read": spec("read", row=crop)})


def planned(chain: Chain, models: Mapping[str, ModelSpec]) -> ChainRoute:
    allocation = Allocation("cpu", BATCH, DURATIONS.at(BATCH), 1.0, 1.0)
    modules = tuple(
        ModulePlan(m.name, m.model, m.fan_out, 0.0, SLO_S, SLO_S, (allocation,))
        for m in chain.modules
    )
    plan = ChainPlan(chain.name, SLO_S, 1.0, SLO_S, modules)
    return route_chain(bind(chain, models), plan, {name: {"cpu": DURATIONS} for name in models})


CASES: dict[str, Callable[[], ChainRoute]] = {
    "1": lambda: line(1),
    "3": lambda: line(3),
    "fan-out 8": fan_out,
}


def answer_of(route: ChainRoute, call: ModelCall) -> tuple[Tensor, ...]:
    """What the model returns: the bytes it was given."""
    given = call.inputs[0]
    declared = next(m.bound.spec for m in route.modules if m.model == call.model).outputs[0]
    shape = (given.shape[0], *declared.shape)
    return (Tensor("y", "UINT8", shape, b"".join(given.parts)),)


def instances(route: ChainRoute) -> dict[str, int]:
    return {module.model: SLOTS for module in route.modules}


class DispatcherLoop:
    """`in_flight` requests at a time through a dispatcher, as the engine would drive it."""

    def __init__(self, route: ChainRoute, in_flight: int) -> None:
        self._route = route
        self._dispatcher = Dispatcher()
        self._dispatcher.handle(InstallChain(route), now_s=0.0)
        up = MachineUp("a", "cpu", SLOTS, instances(route))
        self._dispatcher.handle(up, now_s=0.0)
        self._now_s = 0.0
        self._running: deque[Execute] = deque()
        self._ended = 0
        self._next = 0
        self.batches = 0
        for _ in range(in_flight):
            self._submit()
        self._settle()

    def run(self, requests: int) -> None:
        """Until so many more requests were answered."""
        until = self._ended + requests
        while self._ended < until:
            self._now_s += PASS_S
            batch = self._running.popleft()
            self.batches += 1
            done = BatchDone(batch.batch, answer_of(self._route, batch.call))
            before = self._ended
            self._perform(self._dispatcher.handle(done, now_s=self._now_s, settled=False))
            for _ in range(self._ended - before):
                self._submit()
            self._settle()

    def _submit(self) -> None:
        self._next += 1
        x = Tensor("x", "UINT8", (BYTES,), bytes(BYTES))
        submit = Submit(self._next, "c", {"x": x}, self._now_s + SLO_S)
        self._perform(self._dispatcher.handle(submit, now_s=self._now_s, settled=False))

    def _settle(self) -> None:
        self._perform(self._dispatcher.handle(Settled(), now_s=self._now_s))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Execute):
                self._running.append(action)
            elif isinstance(action, Answer):
                self._ended += 1
            elif isinstance(action, Fail):
                raise action.error


class Echo:
    """An executor that is done one turn of the event loop after it was asked."""

    def __init__(self, route: ChainRoute) -> None:
        self._route = route
        self.batches = 0

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        self.batches += 1
        asyncio.get_running_loop().call_soon(on_end, answer_of(self._route, call))
        return True

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        raise AssertionError("everything is begun without a task")


class EngineLoop:
    """The same through an engine with the observers that `paceline serve` gives it.

    What ended in one pass of the event loop is followed by as many new requests in the next.
    """

    def __init__(self, route: ChainRoute, in_flight: int) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._executor = Echo(route)
        self._in_flight = in_flight
        self._request = InferRequest("c", (Tensor("x", "UINT8", (BYTES,), bytes(BYTES)),))
        self._left = self._ended = 0
        self._done: asyncio.Future[None] | None = None
        self._engine = self._runner.run(self._start(route))

    @property
    def batches(self) -> int:
        return self._executor.batches

    def run(self, requests: int) -> None:
        self._runner.run(self._serve(requests))

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    async def _start(self, route: ChainRoute) -> Engine:
        engine = Engine(self._executor)
        metrics, statistics = Metrics(), Statistics()

        def observe(timeline: Timeline) -> None:
            metrics.observe(timeline)
            statistics.observe_request(timeline, direct=False, wall_ms=int(time() * 1e3))

        engine.watch(on_timeline=observe, on_batch=statistics.observe_batch)
        engine.install(route)
        engine.machine_up("a", "cpu", SLOTS, instances(route))
        return engine

    async def _serve(self, requests: int) -> None:
        self._left, self._ended = requests, 0
        self._done = asyncio.get_running_loop().create_future()
        self._begin(self._in_flight)
        await self._done

    def _begin(self, count: int) -> None:
        for _ in range(min(count, self._left)):
            self._left -= 1
            self._engine.begin(self._request, self._on_end)

    def _on_end(self, outcome: InferAnswer | RequestError) -> None:
        if isinstance(outcome, RequestError):
            raise outcome
        self._ended += 1
        if self._ended == 1:
            asyncio.get_running_loop().call_soon(self._follow)

    def _follow(self) -> None:
        count, self._ended = self._ended, 0
        self._begin(count)
        if not self._left and not self._engine.dispatcher.in_flight and self._done is not None:
            self._done.set_result(None)


def simulated_us(length: int, requests: int) -> float:
    """Processor time per row of a module: `length` times Harpagon's M3, six machines each."""
    rate_rps, slo_s = 198.0, 1.5 * length
    modules = line(length).bound.chain.modules
    chain = chain_of(modules, modules[-1].name)
    chain = replace(chain, slo_s=slo_s)
    rows = [ProfileRow(m.model, "gpu", size, took_s) for m in modules for size, took_s in M3]
    allocation = Allocation("gpu", 32, 0.8, 6.0, 1.0)
    planned = tuple(
        ModulePlan(m.name, m.model, rate_rps, 0.0, 1.5, 1.5, (allocation,)) for m in modules
    )
    plans = (ChainPlan(chain.name, slo_s, rate_rps, slo_s, planned),)
    plan = Plan("pooled", "fractional", plans)
    started_s = process_time()
    simulate([chain], plan, Profiles(tuple(rows)), arrivals="poisson", requests=requests, seed=1)
    return (process_time() - started_s) / (requests * length) * 1e6


def calls_of(run: Callable[[int], None], requests: int) -> tuple[float, float]:
    """Calls per request, of Python functions and of those written in C."""
    python = c = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal python, c
        python += event == "call"
        c += event == "c_call"

    sys.setprofile(count)
    try:
        run(requests)
    finally:
        sys.setprofile(None)
    return python / requests, c / requests


def best_us(run: Callable[[int], None], requests: int, repeats: int) -> float:
    """Processor time per request."""
    found = []
    for _ in range(repeats):
        started_s = process_time()
        run(requests)
        found.append((process_time() - started_s) / requests * 1e6)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=4000, help="per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    options = parser.parse_args()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    if options.profile:
        profile(options)
        return
    table = Table(box=None, title_justify="left")
    for name in ("chain", "in flight", "mean batch", "dispatcher us", "engine us", "calls", "in C"):
        table.add_column(name, justify="right")
    for name, made in CASES.items():
        for in_flight in options.in_flight:
            alone = DispatcherLoop(made(), in_flight)
            engine = EngineLoop(made(), in_flight)
            engine.run(200)
            alone_us = best_us(alone.run, options.requests, options.repeats)
            engine_us = best_us(engine.run, options.requests, options.repeats)
            rows = options.requests * options.repeats + 200
            width = len(made().modules)
            python, c = calls_of(alone.run, 2000)
            table.add_row(
                name,
                str(in_flight),
                f"{rows * width / engine.batches:.1f}",
                f"{alone_us:.1f}",
                f"{engine_us:.1f}",
                f"{python:.0f}",
                f"{c:.0f}",
            )
            engine.close()
    console().print(table)
    for length in (1, 3):
        us = min(simulated_us(length, 2 * options.requests) for _ in range(3))
        console().print(f"simulated, chain of {length}: {us:.0f} us per row of a module")


def profile(options: argparse.Namespace) -> None:
    """The functions of the dispatcher by their own time."""
    import cProfile
    import pstats

    for name, made in CASES.items():
        for in_flight in options.in_flight:
            loop = DispatcherLoop(made(), in_flight)
            loop.run(500)
            profiler = cProfile.Profile()
            profiler.runcall(loop.run, options.requests)
            print(f"chain {name}, {in_flight} in flight, {options.requests} requests")
            pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
