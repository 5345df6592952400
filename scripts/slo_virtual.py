"""The systems of `bench_slo.py` in virtual time: no cores, no noise, the same figures everywhere.

Paceline and round-robin are the real dispatcher on simulated machines, planned as `paceline serve`
plans. The ensemble is a model of Triton's dynamic batching, and an ideal one: a batch is formed at
the instant at which a machine takes it, and of the steps that could run the one goes first whose
request has waited longest. Triton's own batches are formed earlier, and smaller.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf
from random import Random

from scripts.slo_report import Figures
from scripts.slo_systems import SLO_MARGIN_MS, Front, Setting, splits
from scripts.slo_workloads import Served, Step

from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.profile import Hardware, ProfileRow, Profiles
from paceline.core.runs import merge, runs_of
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import Action, Answer, Event, route_chain
from paceline.planner.problem import Options, PlannedChain, demand
from paceline.planner.runs import pays, run_rows
from paceline.planner.solve import solve
from paceline.runtime.placement import Site, place
from paceline.sim.backend import SimMachine
from paceline.sim.fleet import BlankModels, batch_limits, blank_chain
from paceline.sim.stimuli import Arrive, Install
from paceline.sim.world import World

OVERHEAD_S = 0.002
"""What an execution takes longer than d(b)."""
NOISE = 0.02
"""The largest relative deviation of an execution."""
SETTLE_S = 0.001
"""As the engine: what comes within it is launched together."""
HARDWARE = "machine"


class _Latencies:
    """Of the answers, by request."""

    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Answer):
                self.of[action.request] = action.timeline.ended_s - action.timeline.arrived_s


def figures(latencies_s: Sequence[float | None], served: Served) -> Figures:
    """As of a replay."""
    answer = {"latencies_s": latencies_s, "refused_s": (), "late_s": ()}
    return Figures.of(answer, served.slo_ms / 1e3)


def front(
    served: Served,
    machines: int,
    how: Front,
    arrivals_s: Sequence[float],
    items: Sequence[int],
    seed: int,
) -> Figures:
    """Paceline with `how.dispatch`, planned for `how.rate_rps`."""
    chain, profiles = _chain(served, how), _profiles(served)
    dispatch: Dispatch = chain.dispatch
    options = Options(
        policy="optimal" if dispatch == "pooled" else "harpagon",
        dispatch=dispatch,
        max_tuples=2 if dispatch == "round-robin" else None,
    )

    def needed(chain: Chain) -> PlannedChain:
        limits = {module.model: served.workload.largest for module in chain.modules}
        hardware = {HARDWARE: Hardware(HARDWARE, 1.0)}
        return demand(chain, how.rate_rps, profiles, hardware, limits, OVERHEAD_S)

    if runs := runs_of(chain):
        for run in runs:
            profiles = profiles.merged(run_rows(run, profiles, {HARDWARE: OVERHEAD_S}))
        merged = merge(chain, runs)
        chain = merged if pays(needed(chain), needed(merged), options) else chain
    plan = solve([needed(chain)], options)
    bound = blank_chain(chain, batch_limits(plan, [chain])[chain.name])
    durations = {}
    for module in chain.modules:
        known = profiles.durations(module.model, HARDWARE)
        assert known is not None
        durations[module.model] = {HARDWARE: known}
    instances = place(plan, [Site("triton", HARDWARE, machines)], list(durations))["triton"]
    latencies = _Latencies()
    world = World(
        [SimMachine("triton", HARDWARE, machines, instances)],
        durations,
        BlankModels({m.spec.name: m.spec for m in bound.modules}),
        seed=seed,
        noise=NOISE,
        settle_s=SETTLE_S,
        observers=(latencies,),
    )
    world.run([Install(0.0, route_chain(bound, plan.chain(chain.name), durations))])
    world.run_stream(_requests(served, chain, arrivals_s, items))
    return figures([latencies.of.get(request) for request in range(len(arrivals_s))], served)


def _chain(served: Served, how: Front) -> Chain:
    """As `slo_workloads.chain_yaml` writes it, with tensors of one byte."""
    work = served.workload
    modules = tuple(
        Module(
            step.name,
            step.name,
            {"x": Source(step.parent or None, "y" if step.parent else "x")},
            for_each=Source(None, "items") if step.fan_out != 1.0 else None,
            fan_out=step.fan_out,
        )
        for step in work.steps
    )
    more = (TensorSpec("items", "UINT8", (-1, 1)),) if work.fans_out else ()
    return Chain(
        work.name,
        (served.slo_ms - SLO_MARGIN_MS) / 1e3,
        (TensorSpec("x", "UINT8", (1,)), *more),
        modules,
        {step.name: Source(step.name, "y") for step in work.sinks},
        dispatch="round-robin" if how.dispatch == "round-robin" else "pooled",
        runs="auto" if how.runs else "off",
        rate_rps=how.rate_rps,
    )


def _profiles(served: Served) -> Profiles:
    return Profiles(
        tuple(
            ProfileRow(step.name, HARDWARE, size, took_s + OVERHEAD_S)
            for step in served.workload.steps
            for size, took_s in served.durations(step).points
        )
    )


def _requests(
    served: Served, chain: Chain, arrivals_s: Sequence[float], items: Sequence[int]
) -> Iterator[Arrive]:
    one = {"rows": Tensor("rows", "UINT8", (1,), b"\0")}
    fans = [step.name for step in served.workload.steps if step.fan_out != 1.0]
    for request, (at_s, count) in enumerate(zip(arrivals_s, items, strict=True)):
        rows = {
            f"rows_{name}": Tensor(f"rows_{name}", "UINT8", (count, 1), bytes(count))
            for name in fans
        }
        yield Arrive(at_s, request, chain.name, {**one, **rows}, chain.slo_s)


class Ensemble:
    """A chain of dynamically batched steps under one of Triton's settings; see the module."""

    def __init__(self, served: Served, machines: int, setting: Setting, seed: int) -> None:
        self._served, self._setting = served, setting
        self._steps = served.workload.steps
        self._size = max(1, served.workload.largest // setting.cut)
        self._slack_s = max(0.02, served.slo_ms / 1e3 - served.path_s(self._size))
        self._delay_s = min(
            self._size / served.rate_rps, setting.wait * self._slack_s / len(self._steps)
        )
        # One pool of machines, or one for each step.
        counts = [machines] if setting.shared else list(splits(served, machines)[setting.split])
        self._free = counts
        self._queues: list[deque[tuple[int, float]]] = [deque() for _ in self._steps]
        self._rng = Random(seed)
        self._due: list[tuple[float, int, int, tuple[int, ...]]] = []
        """(when, order, step, requests whose batch ends; none: a queue has waited enough)."""
        self._order = 0

    def serve(self, arrivals_s: Sequence[float]) -> Figures:
        left = [len(self._served.workload.sinks)] * len(arrivals_s)
        found: list[float | None] = [None] * len(arrivals_s)
        coming = deque(enumerate(arrivals_s))
        while coming or self._due:
            if coming and (not self._due or coming[0][1] <= self._due[0][0]):
                request, now_s = coming.popleft()
                for index, step in enumerate(self._steps):
                    if not step.parent:
                        self._enter(index, request, now_s)
            else:
                now_s, _, index, ended = heapq.heappop(self._due)
                if ended:
                    self._free[self._pool(index)] += 1
                for request in ended:
                    below = self._children(self._steps[index])
                    for child in below:
                        self._enter(child, request, now_s)
                    left[request] -= not below
                    if left[request] == 0:
                        found[request] = now_s - arrivals_s[request]
            self._launch(now_s)
        return figures(found, self._served)

    def _pool(self, index: int) -> int:
        return 0 if self._setting.shared else index

    def _children(self, step: Step) -> list[int]:
        return [i for i, other in enumerate(self._steps) if other.parent == step.name]

    def _push(self, at_s: float, index: int, requests: tuple[int, ...]) -> None:
        self._order += 1
        heapq.heappush(self._due, (at_s, self._order, index, requests))

    def _enter(self, index: int, request: int, now_s: float) -> None:
        self._queues[index].append((request, now_s))
        if self._delay_s:
            self._push(now_s + self._delay_s, index, ())

    def _launch(self, now_s: float) -> None:
        while (index := self._next(now_s)) is not None:
            queue = self._queues[index]
            batch = tuple(queue.popleft()[0] for _ in range(min(self._size, len(queue))))
            self._free[self._pool(index)] -= 1
            took_s = self._served.durations(self._steps[index]).at(len(batch)) + OVERHEAD_S
            took_s *= 1.0 + NOISE * (2.0 * self._rng.random() - 1.0)
            self._push(now_s + took_s, index, batch)

    def _next(self, now_s: float) -> int | None:
        """The step to run: of those with a batch and a machine, the one that has waited longest."""
        best, since_s = None, inf
        for index, queue in enumerate(self._queues):
            while self._setting.reject and queue and now_s - queue[0][1] > self._slack_s:
                queue.popleft()
            if not queue or not self._free[self._pool(index)]:
                continue
            ripe = len(queue) >= self._size or now_s - queue[0][1] >= self._delay_s - 1e-9
            if ripe and queue[0][1] < since_s:
                best, since_s = index, queue[0][1]
        return best
