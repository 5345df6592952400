"""The published worst-case bounds hold on a real Triton: 2d, d + b/w and d + b/T on module M3.

The schedules are those of algorithms.md 1.2 at 198 evenly spaced requests a second; machines are
instances of a timed model. What the stack adds to an execution is measured first and taken off
what the model sleeps, so that a batch takes d(b) as seen from the front, less the little without
which a machine that is planned to be busy 99 % of the time would fall behind for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import inf

import pytest
import pytest_asyncio
from scripts.timed_model import write_timed

from paceline.core.bind import bind
from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.ports import ModelCall, OnExecuted
from paceline.core.profile import Durations
from paceline.core.request import InferAnswer, InferRequest
from paceline.core.tensor import BatchTensor, Tensor, TensorSpec
from paceline.dispatch.route import ChainRoute, route_chain
from paceline.runtime.engine import Engine
from paceline.triton.client import TritonClient, TritonFleet
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

M3 = Durations(((1, 0.08), (2, 0.1), (8, 0.25), (32, 0.8)))
RATE_RPS = 198.0
MACHINES = 7
REQUESTS = 500
TAIL = 80
"""More requests that keep the machines collecting while the last of the measured ones wait."""

KEPT_UP = 0.97
"""Share of d(b) that an execution takes: a machine that is 99 % busy has no time to catch up."""

SLO_S = 2.5
"""Far beyond every bound: no batch is closed because slack runs out, no request is refused."""

MOSTLY = 0.97
"""Share of the requests that must stay within: a stall of this machine bunches arrivals up, which
are then not evenly spaced, and what throughput-cost ranks are not due for waits at the last one.
"""

TRIES = 2
QUIET = 0.15
"""A run can tell something if what disturbed it is at most this share of the bound."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A policy, its allocations as (batch size, machines), whole machines, worst-case latency."""

    policy: Dispatch
    allocations: tuple[tuple[int, float], ...]
    machines: int
    bound_s: float


ROUND_ROBIN = Schedule("round-robin", ((8, 6.0), (2, 0.3)), 7, 2 * 0.25)
SCHEDULES = (
    ROUND_ROBIN,
    Schedule("throughput-cost", ((32, 4.0), (8, 1.0), (2, 0.3)), 6, 0.8 + 32 / RATE_RPS),
    Schedule("pooled", ((32, 4.95),), 5, 0.8 + 32 / RATE_RPS),
)


@dataclass(frozen=True, slots=True)
class Run:
    """Latencies (infinite: not answered), and what disturbed them: by how much batches took longer
    than d(b), in all but 1 % of cases, and by how much requests came too late at most.
    """

    latencies_s: tuple[float, ...]
    excess_s: float
    late_s: float

    @property
    def overhead_s(self) -> float:
        """A request waits for its own batch and for the one before it on its machine, both
        longer by the excess, and for the requests that fill its batch, which may come late.
        """
        return 2 * self.excess_s + self.late_s

    def disturbed(self, bound_s: float) -> bool:
        """Whether it can tell nothing."""
        return self.overhead_s > QUIET * bound_s

    def within(self, bound_s: float) -> float:
        """Share of the requests that stayed within the bound plus the measured overhead."""
        met = sum(latency_s <= bound_s + self.overhead_s for latency_s in self.latencies_s)
        return met / len(self.latencies_s)

    def told(self, schedule: Schedule) -> str:
        """For `pytest -s`: docs/benchmarks/slo.md."""
        alone = sum(latency_s <= schedule.bound_s for latency_s in self.latencies_s)
        return (
            f"{schedule.policy}: worst {max(self.latencies_s) * 1e3:.0f} ms, bound "
            f"{schedule.bound_s * 1e3:.0f} ms ({alone / len(self.latencies_s):.1%} within), "
            f"disturbed by {self.overhead_s * 1e3:.0f} ms ({self.within(schedule.bound_s):.1%})"
        )


@dataclass(frozen=True, slots=True)
class Machines:
    """A Triton with instances of `m3`, which takes d(b) for a batch of b."""

    fleet: TritonFleet
    spec: ModelSpec


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Machines]:
    models = tmp_path_factory.mktemp("models")
    settings = LocalTritonSettings(
        state_directory=tmp_path_factory.mktemp("triton"),
        model_repositories=(models,),
        stop_timeout_s=0.5,
    )
    write_timed(models, {2: 100}, "probe", max_batch_size=32)
    async with LocalTriton(settings) as triton:
        client = await TritonClient.connect(triton.url, name="triton")
        repository = TritonRepository(client, (models,))
        await repository.load("probe", instances=MACHINES)
        overhead_s = await added_s(client)
        durations_ms = {
            size: max(1.0, 1e3 * (KEPT_UP * duration_s - overhead_s))
            for size, duration_s in M3.points
        }
        write_timed(models, durations_ms, "m3", max_batch_size=32)
        await repository.load("m3", instances=MACHINES)
        fleet = TritonFleet({"triton": client})
        yield Machines(fleet, await repository.spec("m3"))
        await fleet.close()


async def added_s(client: TritonClient) -> float:
    """What the stack adds to a batch while all machines are busy: the median of 35."""
    loop = asyncio.get_running_loop()
    x = BatchTensor("x", "FP32", (2, 4), (bytes(32),))

    async def one() -> float:
        started_s = loop.time()
        await client.execute(ModelCall("probe", (x,), ("y",)), timeout_s=10.0)
        return loop.time() - started_s - 0.1

    rounds = [await asyncio.gather(*(one() for _ in range(MACHINES))) for _ in range(5)]
    added = sorted(each for took in rounds for each in took)
    return max(0.0, added[len(added) // 2])


def route_of(schedule: Schedule, spec: ModelSpec) -> ChainRoute:
    chain = Chain(
        "m3_chain",
        SLO_S,
        (TensorSpec("x", "FP32", (4,)),),
        (Module("m3", "m3", {"x": Source(None, "x")}),),
        {"y": Source("m3", "y")},
        dispatch=schedule.policy,
    )
    allocations = tuple(
        Allocation("gpu", size, M3.at(size), machines, 1.0)
        for size, machines in schedule.allocations
    )
    module = ModulePlan("m3", "m3", RATE_RPS, 0.0, SLO_S, schedule.bound_s, allocations)
    plan = ChainPlan("m3_chain", SLO_S, RATE_RPS, schedule.bound_s, (module,))
    return route_chain(bind(chain, {"m3": spec}), plan, {"m3": {"gpu": M3}})


class Counted:
    """An executor that knows when nothing runs: Triton goes on with what is cancelled."""

    def __init__(self, fleet: TritonFleet) -> None:
        self._fleet = fleet
        self._running = 0
        self.idle = asyncio.Event()

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        return False

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        self._running += 1
        self.idle.clear()
        try:
            return await self._fleet.execute(machine, call, timeout_s=timeout_s)
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()


async def serve_evenly_spaced(schedule: Schedule, machines: Machines) -> Run:
    """REQUESTS at RATE_RPS, however slowly they are answered, and TAIL more that are cancelled."""
    loop = asyncio.get_running_loop()
    executor = Counted(machines.fleet)
    engine = Engine(executor)
    engine.install(route_of(schedule, machines.spec))
    engine.machine_up("triton", "gpu", schedule.machines, {"m3": schedule.machines})
    request = InferRequest("m3_chain", (Tensor("x", "FP32", (4,), bytes(16)),))
    start_s = loop.time() + 0.05
    answers: dict[int, asyncio.Task[InferAnswer]] = {}
    late_s: list[float] = []
    all_sent = loop.create_future()

    def send(index: int) -> None:
        late_s.append(loop.time() - start_s - index / RATE_RPS)
        answers[index] = loop.create_task(engine.infer(request))
        if len(answers) == REQUESTS + TAIL:
            all_sent.set_result(None)

    for index in range(REQUESTS + TAIL):
        loop.call_at(start_s + index / RATE_RPS, send, index)
    try:
        await all_sent
        measured = await asyncio.gather(
            *(answers[index] for index in range(REQUESTS)), return_exceptions=True
        )
    finally:
        for task in answers.values():
            task.cancel()
        await asyncio.gather(*answers.values(), return_exceptions=True)
        await executor.idle.wait()
        await engine.close()
    timelines = [answer.timeline for answer in measured if isinstance(answer, InferAnswer)]
    excess_s = sorted(
        span.ended_s - span.started_s - M3.at(span.batch_size)
        for timeline in timelines
        for span in timeline.spans
    )
    unanswered = [inf] * (REQUESTS - len(timelines))
    return Run(
        (*(timeline.latency_s for timeline in timelines), *unanswered),
        excess_s=max(0.0, excess_s[int(0.99 * len(excess_s))]),
        late_s=max(late_s),
    )


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=[s.policy for s in SCHEDULES])
async def test_evenly_spaced_requests_stay_within_the_policys_bound_plus_the_stacks_overhead(
    schedule: Schedule, machines: Machines
) -> None:
    for _ in range(TRIES):
        run = await serve_evenly_spaced(schedule, machines)
        print(run.told(schedule))
        if not run.disturbed(schedule.bound_s):
            break
    else:
        pytest.skip(
            f"the machine is too busy to tell: {run.overhead_s * 1e3:.0f} ms of overhead on a "
            f"bound of {schedule.bound_s * 1e3:.0f} ms"
        )
    assert run.within(schedule.bound_s) >= MOSTLY, (sorted(run.latencies_s)[-20:], run.overhead_s)
