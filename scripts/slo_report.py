"""Measurements of `bench_slo.py` and the tables made of them.

A system's figure is the median over repeats. A Triton ensemble's is that of whichever of its
settings does best, of those that split the machines over the steps and of those that share them.
Chosen on the measured runs themselves, that favours Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from statistics import median
from typing import Any

SYSTEMS = {
    "split": "Triton ensemble, machines split",
    "shared": "Triton ensemble, machines shared",
    "round-robin": "round-robin",
    "pooled": "Paceline",
    "runs": "Paceline, `runs: auto`",
}
PACELINE = ("pooled", "runs")

TRITON = {"split": False, "shared": True}
"""Each stands for the best of its settings, which share machines or do not."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is served: `tightness` is the objective as a multiple of full batches' path."""

    workload: str
    arrivals: str
    tightness: float

    @property
    def title(self) -> str:
        return f"{self.workload}, {self.arrivals}, {self.tightness:g}x"


@dataclass(frozen=True, slots=True)
class Cell:
    """What is varied. `bound`: machines that the rate keeps busy in full batches."""

    scenario: Scenario
    machines: int
    bound: float
    rate_rps: float

    @property
    def load(self) -> float:
        return self.bound / self.machines


@dataclass(frozen=True, slots=True)
class Figures:
    """One replay of one system. Latencies are those of its answers; 0 without any.

    `sent`: requests, of which chance makes more or fewer than the rate says.
    `rejected`: share answered with an error; `refused_*`: time to such an answer from its sending;
    `late_p99_ms`: how late the generator was.
    """

    sent: int
    attainment: float
    p50_ms: float
    p99_ms: float
    rejected: float
    refused_p50_ms: float
    refused_p99_ms: float
    late_p99_ms: float

    def goodput_rps(self, seconds: float) -> float:
        """Answers within the objective, of a replay that took so long."""
        return self.attainment * self.sent / seconds

    @classmethod
    def of(cls, answer: dict[str, Any], slo_s: float) -> Figures:
        """From what the load generator returned."""
        every: Sequence[float | None] = answer["latencies_s"]
        answered = sorted(latency_s for latency_s in every if latency_s is not None)
        refused = sorted(answer["refused_s"])
        total = max(1, len(every))
        return cls(
            sent=len(every),
            attainment=sum(latency_s <= slo_s for latency_s in answered) / total,
            p50_ms=percentile(answered, 0.5) * 1e3,
            p99_ms=percentile(answered, 0.99) * 1e3,
            rejected=1.0 - len(answered) / total,
            refused_p50_ms=percentile(refused, 0.5) * 1e3,
            refused_p99_ms=percentile(refused, 0.99) * 1e3,
            late_p99_ms=percentile(sorted(answer["late_s"]), 0.99) * 1e3,
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """0 of nothing."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass(slots=True)
class Results:
    """Replays by cell and lane (a setting of Triton's, or a dispatch policy), one per repeat."""

    target: float
    runs: dict[Cell, dict[str, list[Figures]]] = field(default_factory=dict)

    def add(self, cell: Cell, lane: str, figures: Figures) -> None:
        self.runs.setdefault(cell, {}).setdefault(lane, []).append(figures)

    def attainment(self, cell: Cell, lane: str) -> float:
        return median(run.attainment for run in self.runs[cell][lane])

    def lane_of(self, cell: Cell, system: str) -> str | None:
        """The lane that stands for a system."""
        lanes = [lane for lane in self.runs.get(cell, {}) if _system(lane) == system]
        return max(lanes, key=lambda lane: self.attainment(cell, lane), default=None)

    def cells(self, scenario: Scenario) -> list[Cell]:
        """In order of machines, then of rates."""
        found = [cell for cell in self.runs if cell.scenario == scenario]
        return sorted(found, key=lambda cell: (cell.machines, cell.rate_rps))

    def scenarios(self) -> list[Scenario]:
        """In the order of measuring."""
        return list(dict.fromkeys(cell.scenario for cell in self.runs))

    def lanes(self) -> set[str]:
        return {lane for lanes in self.runs.values() for lane in lanes}

    def measured(self, scenario: Scenario, system: str) -> bool:
        return any(self.lane_of(cell, system) for cell in self.cells(scenario))

    def most(self, scenario: Scenario, system: str) -> Cell | None:
        """The largest rate at which it attained the target, below every rate at which it did not;
        of its lanes the best."""
        cells = self.cells(scenario)
        found: Cell | None = None
        for lane in {lane for cell in cells for lane in self.runs[cell] if _system(lane) == system}:
            best: Cell | None = None
            for cell in cells:
                if lane not in self.runs[cell]:
                    continue
                if self.attainment(cell, lane) < self.target:
                    break
                best = cell
            if best is not None and (found is None or best.rate_rps > found.rate_rps):
                found = best
        return found

    def flat(self) -> list[dict[str, Any]]:
        """Every replay, for --json."""
        return [
            {**asdict(cell), "lane": lane, "repeat": repeat, **asdict(run)}
            for cell, lanes in self.runs.items()
            for lane, runs in lanes.items()
            for repeat, run in enumerate(runs)
        ]


@dataclass(frozen=True, slots=True)
class Needed:
    """The least machines of every lane (None: more than `most`) at each rate, lowest rate first.

    `bounds`: machines that the rates keep busy in full batches.
    """

    rates_rps: tuple[float, ...]
    bounds: tuple[float, ...]
    most: int
    counts: Mapping[str, Sequence[int | None]]

    def has(self, system: str) -> bool:
        return any(_system(lane) == system for lane in self.counts)

    def least(self, rate: int, system: str) -> int | None:
        """Of its lanes the best."""
        counts = [counts[rate] for lane, counts in self.counts.items() if _system(lane) == system]
        return min((count for count in counts if count is not None), default=None)

    def total(self, system: str) -> tuple[int, bool]:
        """Over all rates, and whether it is exact: where it is not, one more than `most` counts."""
        found = [self.least(rate, system) for rate in range(len(self.rates_rps))]
        return sum(self.most + 1 if n is None else n for n in found), None not in found


def _system(lane: str) -> str:
    if lane in SYSTEMS:
        return lane
    return "shared" if lane.startswith("shared") else "split"


def _columns(lanes: Iterable[str]) -> dict[str, str]:
    """Those of the systems that have lanes."""
    seen = {_system(lane) for lane in lanes}
    return {system: title for system, title in SYSTEMS.items() if system in seen}


def goodput_table(results: Results) -> Iterator[str]:
    """The largest rate that a fixed number of machines carries, by system."""
    systems = _columns(results.lanes())
    yield f"| scenario | machines | bound | {' | '.join(systems.values())} | verdict |"
    yield "|---|---|---|" + "---|" * (len(systems) + 1)
    for scenario in results.scenarios():
        cells = results.cells(scenario)
        machines = cells[0].machines
        bound_rps = cells[0].rate_rps / cells[0].bound
        most = {s: results.most(scenario, s) for s in systems}
        texts = []
        for system, cell in most.items():
            if cell is not None:
                each_rps = cell.rate_rps / machines
                texts.append(f"{each_rps:.1f} ({each_rps / bound_rps:.1%})")
            elif results.measured(scenario, system):
                texts.append(f"below {cells[0].rate_rps / machines:.1f}")
            else:
                texts.append("cannot")
        rates = {s: cell.rate_rps if cell else 0.0 for s, cell in most.items()}
        yield (
            f"| {scenario.title} | {machines} | {bound_rps:.1f} | {' | '.join(texts)} | "
            f"{_verdict(rates)} |"
        )


def _verdict(rates: dict[str, float]) -> str:
    others = {s: rate for s, rate in rates.items() if s not in PACELINE and rate > 0}
    if not others:
        return "no other attains it"
    best = max(others, key=lambda system: others[system])
    gain = rates.get("pooled", 0.0) / others[best] - 1.0
    return f"{gain:+.0%} over {best}" if abs(gain) > 1e-9 else f"as {best}"


def machines_table(needed: Mapping[Scenario, Needed]) -> Iterator[str]:
    """The machines that each system needs, summed over the rates."""
    systems = _columns(lane for need in needed.values() for lane in need.counts)
    yield f"| scenario | rates | full batches | {' | '.join(systems.values())} | verdict |"
    yield "|---|---|---|" + "---|" * (len(systems) + 1)
    for scenario, need in needed.items():
        texts = [_sum_text(need, system) for system in systems]
        least = sum(ceil(round(bound, 6)) for bound in need.bounds)
        yield (
            f"| {scenario.title} | {min(need.rates_rps):.0f} to {max(need.rates_rps):.0f}/s | "
            f"{least} | {' | '.join(texts)} | {_fewest(need)} |"
        )


def _sum_text(need: Needed, system: str) -> str:
    if not need.has(system):
        return "cannot"
    count, exact = need.total(system)
    return str(count) if exact else f"at least {count}"


def _fewest(need: Needed) -> str:
    """By how much Paceline needs fewer than every other. Another's open sum makes that a least; its
    own leaves it open."""
    own, known = need.total("pooled")
    if not known:
        return "open: Paceline did not attain it at every rate"
    texts = []
    for system in SYSTEMS:
        if system not in PACELINE and need.has(system):
            other, exact = need.total(system)
            share = f"{abs(1 - own / other):.0%}" + ("" if exact else " or more")
            if own == other and exact:
                texts.append(f"as many as {system}")
            else:
                texts.append(f"{share} {'fewer' if own <= other else 'more'} than {system}")
    return ", ".join(texts)


def needed_tables(needed: Mapping[Scenario, Needed]) -> Iterator[str]:
    """The least machines at each rate."""
    for scenario, need in needed.items():
        systems = _columns(need.counts)
        yield from ("", f"**{scenario.title}**", "")
        yield f"| requests/s | keeps busy | {' | '.join(systems.values())} |"
        yield "|---|---|" + "---|" * len(systems)
        for rate, (rate_rps, bound) in enumerate(zip(need.rates_rps, need.bounds, strict=True)):
            texts = []
            for system in systems:
                count = need.least(rate, system)
                texts.append(str(count) if count is not None else f"more than {need.most}")
            yield f"| {rate_rps:.0f} | {bound:.2f} | {' | '.join(texts)} |"


def equal_tables(needed: Mapping[Scenario, Needed], results: Results) -> Iterator[str]:
    """What everybody attains on as many machines as Paceline needs, in the replays that all have: a
    system that was asked for longer met other arrivals, too."""
    for scenario, need in needed.items():
        systems = _columns(need.counts)
        yield from ("", f"**{scenario.title}**", "")
        yield f"| requests/s | machines | {' | '.join(systems.values())} |"
        yield "|---|---|" + "---|" * len(systems)
        for rate, rate_rps in enumerate(need.rates_rps):
            machines = need.least(rate, "pooled") or need.most
            for cell in results.cells(scenario):
                if cell.machines == machines and cell.rate_rps == rate_rps:
                    lanes = [results.lane_of(cell, system) for system in systems]
                    common = min(len(results.runs[cell][lane]) for lane in lanes if lane)
                    texts = [_text(results, cell, lane, common) for lane in lanes]
                    yield f"| {rate_rps:.0f} | {machines} | {' | '.join(texts)} |"


def attainment_tables(results: Results) -> Iterator[str]:
    """Every cell: median over the repeats, least and most in brackets, p99 of the answers."""
    systems = _columns(results.lanes())
    for scenario in results.scenarios():
        yield from ("", f"**{scenario.title}**", "")
        yield f"| machines | load | {' | '.join(systems.values())} |"
        yield "|---|---|" + "---|" * len(systems)
        for cell in results.cells(scenario):
            texts = [_text(results, cell, results.lane_of(cell, system)) for system in systems]
            yield f"| {cell.machines} | {cell.load:.1%} | {' | '.join(texts)} |"


def _text(results: Results, cell: Cell, lane: str | None, replays: int | None = None) -> str:
    """Of all replays, or of so many."""
    if lane is None:
        return ""
    runs = results.runs[cell][lane][:replays]
    values = [run.attainment * 100 for run in runs]
    bounds = f" [{min(values):.1f}-{max(values):.1f}]" if len(values) > 1 else ""
    p99_ms = median(run.p99_ms for run in runs)
    return f"{median(values):.1f} %{bounds}, {p99_ms:.0f} ms"


def settings_table(results: Results) -> Iterator[str]:
    """Which of Triton's settings were measured beyond the screening."""
    yield "| scenario | settings |"
    yield "|---|---|"
    for scenario in results.scenarios():
        lanes = dict.fromkeys(lane for c in results.cells(scenario) for lane in results.runs[c])
        names = [lane for lane in lanes if lane not in SYSTEMS]
        if names:
            yield f"| {scenario.title} | {'; '.join(names)} |"


def overload_table(results: Results, planned: float, seconds: float) -> Iterator[str]:
    """Goodput by offered rate, as a multiple of the planned one; `planned` is a load, and a replay
    takes so many `seconds`.

    Time to rejection is that of refusals at the door (RESOURCE_EXHAUSTED), where there are any.
    """
    for scenario in results.scenarios():
        cells = results.cells(scenario)
        lanes = list(results.runs[cells[0]])
        yield from ("", f"**{scenario.title}, {cells[0].machines} machines**", "")
        yield "| offered / planned | requests/s |" + "".join(
            f" {SYSTEMS.get(lane, lane)}: goodput, rejected, time to rejection |" for lane in lanes
        )
        yield "|---|---|" + "---|" * len(lanes)
        goodput_rps = {
            lane: {
                cell: median(run.goodput_rps(seconds) for run in results.runs[cell][lane])
                for cell in cells
            }
            for lane in lanes
        }
        for cell in cells:
            texts = []
            for lane in lanes:
                runs = results.runs[cell][lane]
                own_rps = goodput_rps[lane]
                share = own_rps[cell] / max(own_rps.values())
                text = f"{own_rps[cell]:.1f} ({share:.1%} of its peak)"
                rejected = median(run.rejected for run in runs)
                if rejected > 0:
                    p50_ms = median(run.refused_p50_ms for run in runs)
                    p99_ms = median(run.refused_p99_ms for run in runs)
                    text += f", {rejected:.1%}"
                    text += f", p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms" * (p99_ms > 0)
                texts.append(text)
            yield f"| {cell.load / planned:.2g} | {cell.rate_rps:.0f} | {' | '.join(texts)} |"
