"""How `bench_slo.py` measures: systems are brought up side by side, replays sent, tables filled.

Two measurements. *goodput*: the largest rate at which a fixed number of machines attains the
target, by bisection over a grid, for every system on its own. *overload*: goodput at multiples of
the planned rate. The third, *machines*, is in `slo_machines.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from scripts import slo_virtual, slo_workloads
from scripts.slo_report import TRITON, Cell, Figures, Needed, Results, Scenario
from scripts.slo_systems import (
    SETTINGS,
    Front,
    Lane,
    Setting,
    possible,
    profile,
    round_robin,
    start_ensembles,
    start_front,
)
from scripts.slo_workloads import Served


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What is replayed: a window of the trace file ("": Poisson at a constant rate).

    `tuned`: mean load at which Triton is tuned, where most systems still come near the target.
    """

    window: str
    tuned: float


ARRIVALS = {
    "poisson": Arrivals("", 0.85),
    "steady": Arrivals("ipa_steady_high", 0.85),
    "steady-low": Arrivals("ipa_steady_low", 0.85),
    "fluctuating-a": Arrivals("ipa_fluctuating_a", 0.75),
    "fluctuating-b": Arrivals("ipa_fluctuating_b", 0.6),
    "bursty": Arrivals("ipa_bursty", 0.5),
}

PLANNED_LOAD = 0.9
"""Of a fixed number of machines: what Paceline is told to expect when they are loaded variously."""

LOADS = (0.2, 1.02)
"""Goodput is looked for between them, in steps of --resolution."""

WARM_LOAD = 0.3
"""Every system first serves at this load: the first executions of a process are slow."""

OFFERED = (0.5, 1.0, 1.5, 2.0, 5.0)
"""Multiples of the planned rate."""

WARM_UP_S = 3.0
HEAD_START_S = 0.5
GIVE_UP_S = 5.0
TARGET = 0.99
CLEAR = (0.97, 0.997)
"""A replay outside of this is not repeated when it is only asked whether the target is attained."""

LATE_MS = 20.0
"""A replay is sent once more if 1 % of its requests left later than this: the cores were elsewhere,
whatever was served."""


@dataclass(slots=True)
class Bench:
    """Everything that lasts for the whole run."""

    options: argparse.Namespace
    generators: list[subprocess.Popen[str]]
    goodput: Results = field(default_factory=lambda: Results(TARGET))
    machines: Results = field(default_factory=lambda: Results(TARGET))
    overload: Results = field(default_factory=lambda: Results(TARGET))
    needed: dict[Scenario, Needed] = field(default_factory=dict)
    disturbed: int = 0
    leaving: list[asyncio.Task[None]] = field(default_factory=list)
    errors: list[tuple[int, float]] = field(default_factory=list)
    note: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True))

    async def replay(
        self, cells: Sequence[Cell], served: Served, lanes: Sequence[Lane], seeds: Sequence[int]
    ) -> list[Figures]:
        """Requests to some systems at once, to each at the rate of its cell; equal cells and seeds
        get equal arrivals."""
        found = await self._replay(cells, served, lanes, seeds)
        if max(figures.late_p99_ms for figures in found) > LATE_MS:
            self.disturbed += 1
            found = await self._replay(cells, served, lanes, seeds)
        for cell, lane, figures in zip(cells, lanes, found, strict=True):
            self.note.print(
                f"  {cell.scenario.title}: {cell.machines} machines, {cell.rate_rps:.0f}/s "
                f"({cell.load:.1%}), {lane.name}: {figures.attainment:.1%}, rejected "
                f"{figures.rejected:.1%}, p50 {figures.p50_ms:.0f} ms, p99 {figures.p99_ms:.0f} ms"
                + (f", sent {figures.late_p99_ms:.0f} ms late" * (figures.late_p99_ms > LATE_MS)),
                highlight=False,
            )
        return found

    async def _replay(
        self, cells: Sequence[Cell], served: Served, lanes: Sequence[Lane], seeds: Sequence[int]
    ) -> list[Figures]:
        start_s = time.monotonic() + HEAD_START_S
        answers = await asyncio.gather(
            *(
                asyncio.to_thread(ask, generator, lane, *self.load(cell, served, seed), start_s)
                for generator, lane, cell, seed in zip(
                    self.generators, lanes, cells, seeds, strict=False
                )
            )
        )
        return [Figures.of(answer, served.slo_ms / 1e3) for answer in answers]

    async def warm_up(self, served: Served, lanes: Sequence[Lane]) -> None:
        """A replay that does not count."""
        arrivals_s = slo_workloads.poisson(served.rate_rps, WARM_UP_S, self.options.seed)
        kinds = [0] * len(arrivals_s)
        if served.workload.fans_out:
            kinds = slo_workloads.item_counts(served.workload, len(arrivals_s), self.options.seed)
        for start in range(0, len(lanes), self.options.side_by_side):
            start_s = time.monotonic() + HEAD_START_S
            group = lanes[start : start + self.options.side_by_side]
            await asyncio.gather(
                *(
                    asyncio.to_thread(ask, generator, lane, kinds, arrivals_s, start_s)
                    for generator, lane in zip(self.generators, group, strict=False)
                )
            )

    async def alone(self) -> None:
        """Wait until systems that are being taken down are gone."""
        while self.leaving:
            await self.leaving.pop()

    def load(self, cell: Cell, served: Served, seed: int) -> tuple[list[int], list[float]]:
        """Kinds of messages and instants."""
        options, window = self.options, ARRIVALS[cell.scenario.arrivals].window
        shape = slo_workloads.trace_window(options.traces, window) if window else [1.0]
        arrivals_s = slo_workloads.varying(shape, cell.rate_rps, options.seconds, seed)
        if not served.workload.fans_out:
            return [0] * len(arrivals_s), arrivals_s
        return slo_workloads.item_counts(served.workload, len(arrivals_s), seed), arrivals_s

    def seed(self, repeat: int) -> int:
        seed: int = self.options.seed + 1000 * repeat
        return seed


def ask(
    generator: subprocess.Popen[str],
    lane: Lane,
    kinds: list[int],
    arrivals_s: list[float],
    start_s: float,
) -> dict[str, Any]:
    assert generator.stdin is not None and generator.stdout is not None
    load = {
        "target": lane.target,
        "messages": lane.messages,
        "kinds": kinds,
        "arrivals_s": arrivals_s,
        "start_s": start_s,
        "give_up_s": GIVE_UP_S,
    }
    generator.stdin.write(json.dumps(load) + "\n")
    generator.stdin.flush()
    line = generator.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "the generator ended"}
    if "error" in answer:
        raise SystemExit(f"bench_slo: {lane.name} at {lane.target}: {answer['error']}")
    return answer


def cell_of(scenario: Scenario, served: Served, machines: int) -> Cell:
    return Cell(scenario, machines, round(served.bound, 6), round(served.rate_rps, 6))


@asynccontextmanager
async def running(
    bench: Bench,
    work: Path,
    served: Served,
    machines: int,
    fronts: Sequence[Front],
    settings: Sequence[Setting],
) -> AsyncIterator[list[Lane]]:
    """Bring up systems on so many machines; they are taken down while the next ensembles start."""
    settings = [setting for setting in settings if possible(served, setting, machines)]
    stack, processes = AsyncExitStack(), ExitStack()
    try:
        lanes, ensembles = await start_ensembles(work, served, machines, settings, stack)
        await bench.alone()  # Paceline measures round trips when it starts.
        if fronts:
            await profile(work, served)
        starting = (start_front(work, served, front, machines, processes) for front in fronts)
        lanes = [*await asyncio.gather(*starting), *lanes]
        await bench.warm_up(served.loaded(WARM_LOAD * machines), lanes)
        yield lanes
        for each in ensembles:
            bench.errors += await each.execution_errors()
    finally:
        bench.leaving.append(asyncio.create_task(stack.aclose()))
        bench.leaving.append(asyncio.create_task(asyncio.to_thread(processes.close)))


def fronts_of(bench: Bench, base: Served, machines: int) -> list[Front]:
    """Paceline and round-robin, planned for 90 % load of so many machines, whatever comes."""
    planned = base.loaded(PLANNED_LOAD * machines)
    pooled = Front("pooled", planned.rate_rps)
    fronts = (pooled, replace(pooled, runs=True), round_robin(planned, machines, 1.0))
    return [front for front in fronts if front.name in bench.options.systems]


def settings_of(bench: Bench, base: Served) -> list[Setting]:
    """Of Triton's that are compared: none for what an ensemble cannot express."""
    kinds = [shared for name, shared in TRITON.items() if name in bench.options.systems]
    return [s for s in SETTINGS if s.shared in kinds and not base.workload.fans_out]


async def screen(
    bench: Bench, work: Path, scenario: Scenario, served: Served, machines: int
) -> list[Setting]:
    """Triton's best settings, of all measured once: one that splits machines, one that shares."""
    served = served.loaded(ARRIVALS[scenario.arrivals].tuned * machines)
    tried = [s for s in settings_of(bench, served) if possible(served, s, machines)]
    if not tried:
        return []
    cell = cell_of(scenario, served, machines)
    bench.note.print(f"{scenario.title}: tuning Triton on {machines} machines")
    scores: dict[str, Figures] = {}
    size = bench.options.side_by_side
    for start in range(0, len(tried), size):
        group = tried[start : start + size]
        async with AsyncExitStack() as stack:
            lanes, _ = await start_ensembles(work, served, machines, group, stack)
            await bench.warm_up(served.loaded(WARM_LOAD * machines), lanes)
            found = await bench.replay(
                [cell] * len(lanes), served, lanes, [bench.seed(0) - 1] * len(lanes)
            )
        scores |= {lane.name: figures for lane, figures in zip(lanes, found, strict=True)}
    tried.sort(key=lambda s: (-round(scores[s.name].attainment, 3), scores[s.name].p99_ms))
    best = {s.shared: s for s in reversed(tried)}
    return [best[shared] for shared in sorted(best)]


# -- goodput -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Search:
    """Bisection over loads for one lane: it attains at `low` (-1: nowhere yet), not at `high`."""

    lane: Lane
    step: float
    high: int
    low: int = -1

    @classmethod
    def of(cls, lane: Lane, step: float) -> _Search:
        return cls(lane, step, round((LOADS[1] - LOADS[0]) / step) + 1)

    @property
    def over(self) -> bool:
        return self.high - self.low <= 1

    @property
    def probe(self) -> int:
        return (self.low + self.high) // 2

    @property
    def load(self) -> float:
        return LOADS[0] + self.probe * self.step


async def measure_goodput(bench: Bench, work: Path, scenario: Scenario, base: Served) -> None:
    """The largest load that each system attains the target at, on `--machines` machines."""
    machines = bench.options.machines
    settings = await screen(bench, work, scenario, base, machines)
    planned = base.loaded(PLANNED_LOAD * machines)
    fronts = fronts_of(bench, base, machines)
    async with running(bench, work, planned, machines, fronts, settings) as lanes:
        searches = [_Search.of(lane, bench.options.resolution) for lane in lanes]
        while left := [search for search in searches if not search.over]:
            for start in range(0, len(left), bench.options.side_by_side):
                await _probe(
                    bench, scenario, base, left[start : start + bench.options.side_by_side]
                )


async def _probe(
    bench: Bench, scenario: Scenario, base: Served, searches: Sequence[_Search]
) -> None:
    """Replay to some lanes at the loads that their searches are at, until it is clear."""
    results, machines = bench.goodput, bench.options.machines
    cells = [
        cell_of(scenario, base.loaded(search.load * machines), machines) for search in searches
    ]
    open_ = list(range(len(searches)))
    for repeat in range(bench.options.repeats):
        lanes = [searches[index].lane for index in open_]
        found = await bench.replay(
            [cells[i] for i in open_], base, lanes, [bench.seed(repeat)] * len(lanes)
        )
        for index, figures in zip(open_, found, strict=True):
            results.add(cells[index], searches[index].lane.name, figures)
        if repeat == 0:
            still = zip(open_, found, strict=True)
            open_ = [index for index, f in still if CLEAR[0] < f.attainment < CLEAR[1]]
        if not open_:
            break
    for search, cell in zip(searches, cells, strict=True):
        if results.attainment(cell, search.lane.name) >= TARGET:
            search.low = search.probe
        else:
            search.high = search.probe


def simulate_goodput(bench: Bench, scenario: Scenario, base: Served) -> None:
    """As `measure_goodput`, in virtual time; every setting of Triton is searched."""
    machines = bench.options.machines
    planned = base.loaded(PLANNED_LOAD * machines)
    settings = settings_of(bench, base)
    systems: list[Front | Setting] = [*fronts_of(bench, base, machines)]
    systems += [setting for setting in settings if possible(planned, setting, machines)]
    for how in systems:
        name = how.name
        search = _Search.of(Lane(name, "", ()), bench.options.resolution)
        while not search.over:
            served = base.loaded(search.load * machines)
            cell = cell_of(scenario, served, machines)
            simulate(bench, bench.goodput, cell, served, how)
            if bench.goodput.attainment(cell, name) >= TARGET:
                search.low = search.probe
            else:
                search.high = search.probe
        bench.note.print(
            f"{scenario.title}, {name}: below {LOADS[0] + search.high * search.step:.1%}"
        )


def simulate(
    bench: Bench, results: Results, cell: Cell, served: Served, how: Front | Setting
) -> None:
    """All replays of a cell, in virtual time."""
    for repeat in range(bench.options.repeats):
        seed = bench.seed(repeat)
        items, arrivals_s = bench.load(cell, served, seed)
        if isinstance(how, Front):
            found = slo_virtual.front(served, cell.machines, how, arrivals_s, items, seed)
        else:
            found = slo_virtual.Ensemble(served, cell.machines, how, seed).serve(arrivals_s)
        results.add(cell, how.name, found)


# -- overload ------------------------------------------------------------------------------------


async def measure_overload(bench: Bench, work: Path, scenario: Scenario, base: Served) -> None:
    """Goodput of Paceline, and of an ensemble that rejects late requests, at multiples of the
    planned rate; one system at a time."""
    machines = bench.options.machines
    planned = base.loaded(PLANNED_LOAD * machines)
    settings = [s for s in settings_of(bench, base) if s.reject]
    fronts = [front for front in fronts_of(bench, base, machines) if front.name == "pooled"]
    async with running(bench, work, planned, machines, fronts, settings) as lanes:
        for offered in OFFERED:
            cell = cell_of(scenario, base.loaded(PLANNED_LOAD * machines * offered), machines)
            for lane in lanes:
                for repeat in range(bench.options.repeats):
                    found = await bench.replay([cell], base, [lane], [bench.seed(repeat)])
                    bench.overload.add(cell, lane.name, found[0])
