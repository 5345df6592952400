"""How many machines each system needs, over a range of rates: `bench_slo.py --measure machines`.

Machines are whole, so that at one rate two systems tie unless they are a whole machine apart. An
operator pays for a day of rates, and they fall differently between whole machines. So rates are
spread evenly over a range, and what a system needs is the sum of the least machines at each.

Virtual time proposes a number of machines for every rate and system. A real Triton then has to
attain the target with it and to miss it with one less; where it does not, the search goes on, one
machine at a time. Nobody is asked with fewer machines than full batches keep busy (the bound). What
attains it at a rate attains it at lower ones, what misses it misses it at higher ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median

from scripts.slo_report import Cell, Figures, Needed, Results, Scenario
from scripts.slo_run import (
    ARRIVALS,
    CLEAR,
    PLANNED_LOAD,
    TARGET,
    Bench,
    cell_of,
    fronts_of,
    running,
    screen,
    settings_of,
    simulate,
)
from scripts.slo_systems import Front, Lane, Setting, possible
from scripts.slo_workloads import Served, busiest_minute, trace_window

LOWEST = 0.5
"""The lowest rate, as a share of the highest."""

COMPARED = 2
"""Replays, at least, with as many machines as Paceline needs."""

Asked = tuple[int, str, int]
"""Machines, lane, rate (by its order)."""


@dataclass(slots=True)
class Counts:
    """One system's least machines by rate, lowest rate first: what is known, what to try next.

    `missed`: the most machines that did not attain the target, at first those below the bound;
    `attained`: the least that did (None: not known); `proposed`: where to look; `most`: the end.
    """

    missed: list[int]
    proposed: Sequence[int]
    most: int
    attained: list[int | None] = field(init=False)

    def __post_init__(self) -> None:
        self.attained = [None] * len(self.missed)

    def next(self, rate: int) -> int | None:
        """Machines to try at a rate; None: its least is known, or above `most`."""
        low, high = self.missed[rate], self.attained[rate]
        if high is not None:
            return high - 1 if high - low > 1 else None
        machines = max(low + 1, min(self.proposed[rate] - 1, self.most))
        return machines if machines <= self.most else None

    def tell(self, rate: int, machines: int, attains: bool) -> None:
        """What was found where `next` had asked."""
        if attains:
            for below in range(rate + 1):
                known = self.attained[below]
                self.attained[below] = machines if known is None else min(known, machines)
        else:
            for above in range(rate, len(self.missed)):
                self.missed[above] = max(self.missed[above], machines)


@dataclass(slots=True)
class Search:
    """All systems' counts in a scenario, by lane."""

    bench: Bench
    results: Results
    scenario: Scenario
    base: Served
    settings: Sequence[Setting]
    served: list[Served] = field(init=False)
    counts: dict[str, Counts] = field(init=False)
    _systems: dict[int, list[Front | Setting]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.served = _rates(self.bench, self.scenario, self.base)
        least = [ceil(each.bound - 1e-6) for each in self.served]
        fronts = fronts_of(self.bench, self.base, self.bench.options.machines)
        names = [front.name for front in fronts] + [setting.name for setting in self.settings]
        most = self.bench.options.most
        self.counts = {name: Counts([n - 1 for n in least], least, most) for name in names}

    def systems(self, machines: int) -> list[Front | Setting]:
        """As they are started on so many machines; ensembles, too, are tuned for 90 % load."""
        if machines not in self._systems:
            planned = self.base.loaded(PLANNED_LOAD * machines)
            fronts = fronts_of(self.bench, self.base, machines)
            settings = (s for s in self.settings if possible(planned, s, machines))
            self._systems[machines] = [*fronts, *settings]
        return self._systems[machines]

    def cell(self, rate: int, machines: int) -> Cell:
        return cell_of(self.scenario, self.served[rate], machines)

    def runs(self, machines: int, lane: str, rate: int) -> list[Figures]:
        return self.results.runs.get(self.cell(rate, machines), {}).get(lane, [])

    def asked(self) -> list[Asked]:
        """What is to be found out. Of a lane only the lowest rate that is open at a number of
        machines, which may answer for the others."""
        found: dict[tuple[int, str], Asked] = {}
        for lane, counts in self.counts.items():
            for rate in range(len(self.served)):
                machines = counts.next(rate)
                if machines is not None:
                    found.setdefault((machines, lane), (machines, lane, rate))
        return list(found.values())

    def compared(self) -> list[Asked]:
        """Which replays lack with the machines that Paceline turned out to need: all get those that
        it had."""
        pooled, found = self.counts["pooled"], []
        for rate in range(len(self.served)):
            machines = pooled.attained[rate]
            if machines is not None and pooled.next(rate) is None:
                names = [how.name for how in self.systems(machines)]
                own = len(self.runs(machines, "pooled", rate))
                wanted = max(own, min(COMPARED, self._repeats))
                found += [
                    (machines, lane, rate)
                    for lane in names
                    if len(self.runs(machines, lane, rate)) < wanted
                ]
        return found

    def decided(self, machines: int, lane: str, rate: int) -> bool:
        """Whether further replays would not change whether most attain the target."""
        runs = self.runs(machines, lane, rate)
        if len(runs) == 1 and runs[0].attainment <= CLEAR[0]:
            return True
        attained = sum(run.attainment >= TARGET for run in runs)
        return 2 * max(attained, len(runs) - attained) > self._repeats

    def tell(self, machines: int, lane: str, rate: int) -> None:
        """What its replays say; a system that does not exist with so many machines misses."""
        runs = self.runs(machines, lane, rate)
        attains = bool(runs) and median(run.attainment for run in runs) >= TARGET
        self.counts[lane].tell(rate, machines, attains)

    def needed(self) -> Needed:
        cells = [self.cell(rate, 1) for rate in range(len(self.served))]
        return Needed(
            tuple(cell.rate_rps for cell in cells),
            tuple(cell.bound for cell in cells),
            self.bench.options.most,
            {lane: tuple(counts.attained) for lane, counts in self.counts.items()},
        )

    @property
    def _repeats(self) -> int:
        repeats: int = self.bench.options.repeats
        return repeats


def _rates(bench: Bench, scenario: Scenario, base: Served) -> list[Served]:
    """Evenly spread up to the rate whose busiest minute keeps `--machines` machines busy."""
    options, window = bench.options, ARRIVALS[scenario.arrivals].window
    peak = busiest_minute(trace_window(options.traces, window)) if window else 1.0
    step = (1.0 - LOWEST) / max(1, options.rates - 1)
    shares = [1.0 - step * below for below in reversed(range(options.rates))]
    return [base.loaded(options.machines * share / peak) for share in shares]


# -- in virtual time -----------------------------------------------------------------------------


def simulate_machines(bench: Bench, scenario: Scenario, base: Served) -> None:
    """In virtual time throughout; every setting of Triton is searched."""
    search = Search(bench, bench.machines, scenario, base, settings_of(bench, base))
    _simulate(search)
    for machines, lane, rate in search.compared():
        _simulate_cell(search, machines, lane, rate)
    bench.needed[scenario] = search.needed()


def _simulate(search: Search) -> None:
    while asked := search.asked():
        for machines, lane, rate in asked:
            if search.counts[lane].next(rate) == machines:
                _simulate_cell(search, machines, lane, rate)
                search.tell(machines, lane, rate)
    for lane, counts in search.counts.items():
        search.bench.note.print(
            f"{search.scenario.title}, {lane}: machines in virtual time {counts.attained}",
            highlight=False,
        )


def _simulate_cell(search: Search, machines: int, lane: str, rate: int) -> None:
    for how in search.systems(machines):
        if how.name == lane and not search.runs(machines, lane, rate):
            cell = search.cell(rate, machines)
            simulate(search.bench, search.results, cell, search.served[rate], how)


# -- on real Tritons -----------------------------------------------------------------------------


async def measure_machines(bench: Bench, work: Path, scenario: Scenario, base: Served) -> None:
    """On a fleet after the other, the smallest that anything is to be found out with first."""
    settings = await screen(bench, work, scenario, base, bench.options.machines)
    virtual = Search(bench, Results(TARGET), scenario, base, settings)
    _simulate(virtual)
    search = Search(bench, bench.machines, scenario, base, settings)
    for lane, counts in search.counts.items():
        found = virtual.counts[lane].attained
        counts.proposed = [counts.most if n is None else n for n in found]
    while pending := [*search.asked(), *search.compared()]:
        machines = min(machines for machines, _, _ in pending)
        await _measure_fleet(search, work, machines)
        bench.needed[scenario] = search.needed()


async def _measure_fleet(search: Search, work: Path, machines: int) -> None:
    """Everything there is to find out with so many machines."""
    wanted = {lane for count, lane, _ in [*search.asked(), *search.compared()] if count == machines}
    if "pooled" in wanted:  # The others will be compared with it.
        wanted = set(search.counts)
    hows = [how for how in search.systems(machines) if how.name in wanted]
    fronts = [how for how in hows if isinstance(how, Front)]
    settings = [how for how in hows if isinstance(how, Setting)]
    planned = search.base.loaded(PLANNED_LOAD * machines)
    async with running(search.bench, work, planned, machines, fronts, settings) as started:
        await _measure(search, {lane.name: lane for lane in started}, machines)


async def _measure(search: Search, lanes: Mapping[str, Lane], machines: int) -> None:
    """Rounds of replays, one to each system that anything is to be found out of."""
    bench, size = search.bench, search.bench.options.side_by_side
    while True:
        for each in search.asked():
            if each[0] == machines and (each[1] not in lanes or search.decided(*each)):
                search.tell(*each)
        wanted: dict[str, Asked] = {}
        for each in [*search.asked(), *search.compared()]:
            if each[0] == machines and each[1] in lanes:
                wanted.setdefault(each[1], each)
        if not wanted:
            return
        for start in range(0, len(wanted), size):
            group = list(wanted.values())[start : start + size]
            found = await bench.replay(
                [search.cell(rate, machines) for _, _, rate in group],
                search.base,
                [lanes[lane] for _, lane, _ in group],
                [bench.seed(len(search.runs(*each))) for each in group],
            )
            for (_, lane, rate), figures in zip(group, found, strict=True):
                search.results.add(search.cell(rate, machines), lane, figures)
