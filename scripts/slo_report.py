"""Measurements of `bench_slo.py` and the tables made of them.

A system's figure is the median over repeats. A Triton ensemble's is that of whichever of its
settings does best, of those that split the machines over the steps and of those that share them.
Chosen on the measured runs themselves, that favours Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SYSTEMS = {
    "split": "Triton ensemble, machines split",
    "shared": "Triton ensemble, machines shared",
    "round-robin": "round-robin",
    "pooled": "Paceline",
}

TRITON = ("split", "shared")
"""Each stands for its best setting."""


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

    `rejected`: share answered with an error; `refused_*`: time to such an answer from its sending;
    `late_p99_ms`: how late the generator was.
    """

    attainment: float
    p50_ms: float
    p99_ms: float
    rejected: float
    refused_p50_ms: float
    refused_p99_ms: float
    late_p99_ms: float

    @classmethod
    def of(cls, answer: dict[str, Any], slo_s: float) -> Figures:
        """From what the load generator returned."""
        every: Sequence[float | None] = answer["latencies_s"]
        answered = sorted(latency_s for latency_s in every if latency_s is not None)
        refused = sorted(answer["refused_s"])
        total = max(1, len(every))
        return cls(
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

    def attains(self, cell: Cell, system: str) -> bool:
        lane = self.lane_of(cell, system)
        return lane is not None and self.attainment(cell, lane) >= self.target

    def cells(self, scenario: Scenario) -> list[Cell]:
        """In order of machines, then of rates."""
        found = [cell for cell in self.runs if cell.scenario == scenario]
        return sorted(found, key=lambda cell: (cell.machines, cell.rate_rps))

    def scenarios(self) -> list[Scenario]:
        """In the order of measuring."""
        return list(dict.fromkeys(cell.scenario for cell in self.runs))

    def measured(self, scenario: Scenario, system: str) -> bool:
        return any(self.lane_of(cell, system) for cell in self.cells(scenario))

    def least_machines(self, scenario: Scenario, system: str) -> int | None:
        """The least number with which it attained the target; None if none measured did."""
        counts = [cell.machines for cell in self.cells(scenario) if self.attains(cell, system)]
        return min(counts, default=None)

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


def _system(lane: str) -> str:
    if lane in SYSTEMS:
        return lane
    return "shared" if lane.startswith("shared") else "split"


def goodput_table(results: Results) -> Iterator[str]:
    """The largest rate that a fixed number of machines carries, by system."""
    yield f"| scenario | machines | bound | {' | '.join(SYSTEMS.values())} | verdict |"
    yield "|---|---|---|" + "---|" * (len(SYSTEMS) + 1)
    for scenario in results.scenarios():
        cells = results.cells(scenario)
        machines = cells[0].machines
        bound_rps = cells[0].rate_rps / cells[0].bound
        most = {s: results.most(scenario, s) for s in SYSTEMS}
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
    others = {system: rate for system, rate in rates.items() if system != "pooled" and rate > 0}
    if not others:
        return "no other attains it"
    best = max(others, key=lambda system: others[system])
    gain = rates["pooled"] / others[best] - 1.0
    return f"{gain:+.0%} over {best}" if abs(gain) > 1e-9 else f"as {best}"


def machines_table(results: Results) -> Iterator[str]:
    """The least machines for one rate, by system."""
    yield f"| scenario | requests/s | bound | {' | '.join(SYSTEMS.values())} | verdict |"
    yield "|---|---|---|" + "---|" * (len(SYSTEMS) + 1)
    for scenario in results.scenarios():
        cells = results.cells(scenario)
        counts = {s: results.least_machines(scenario, s) for s in SYSTEMS}
        texts = []
        for system, count in counts.items():
            if count is None and results.measured(scenario, system):
                texts.append(f"more than {cells[-1].machines}")
            else:
                texts.append(str(count) if count is not None else "cannot")
        yield (
            f"| {scenario.title} | {cells[0].rate_rps:.0f} | {cells[0].bound:.2f} | "
            f"{' | '.join(texts)} | {_fewest(counts)} |"
        )


def _fewest(counts: dict[str, int | None]) -> str:
    own = counts["pooled"]
    if own is None:
        return "Paceline missed the target"
    others = {system: count for system, count in counts.items() if system != "pooled"}
    worse = [system for system, count in others.items() if count is not None and count < own]
    equal = [system for system, count in others.items() if count == own]
    if worse:
        return f"more than {' and '.join(worse)}"
    return f"fewest, with {' and '.join(equal)}" if equal else "fewest"


def attainment_tables(results: Results) -> Iterator[str]:
    """Every cell: median over the repeats, least and most in brackets, p99 of the answers."""
    for scenario in results.scenarios():
        yield from ("", f"**{scenario.title}**", "")
        yield f"| machines | load | {' | '.join(SYSTEMS.values())} |"
        yield "|---|---|" + "---|" * len(SYSTEMS)
        for cell in results.cells(scenario):
            texts = [_text(results, cell, results.lane_of(cell, system)) for system in SYSTEMS]
            yield f"| {cell.machines} | {cell.load:.1%} | {' | '.join(texts)} |"


def _text(results: Results, cell: Cell, lane: str | None) -> str:
    if lane is None:
        return ""
    runs = results.runs[cell][lane]
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


def overload_table(results: Results, planned: float) -> Iterator[str]:
    """Goodput by offered rate, as a multiple of the planned one; `planned` is a load.

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
        peaks = {lane: max(_goodput_rps(results, c, lane) for c in cells) for lane in lanes}
        for cell in cells:
            texts = []
            for lane in lanes:
                runs = results.runs[cell][lane]
                goodput_rps = _goodput_rps(results, cell, lane)
                text = f"{goodput_rps:.1f} ({goodput_rps / peaks[lane]:.1%} of its peak)"
                rejected = median(run.rejected for run in runs)
                if rejected > 0:
                    p50_ms = median(run.refused_p50_ms for run in runs)
                    p99_ms = median(run.refused_p99_ms for run in runs)
                    text += f", {rejected:.1%}"
                    text += f", p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms" * (p99_ms > 0)
                texts.append(text)
            yield f"| {cell.load / planned:.2g} | {cell.rate_rps:.0f} | {' | '.join(texts)} |"


def _goodput_rps(results: Results, cell: Cell, lane: str) -> float:
    return results.attainment(cell, lane) * cell.rate_rps
