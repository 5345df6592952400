"""Measurements of `bench_slo.py` and the tables made of them.

A system's figure is the median over repeats. A Triton ensemble's is that of whichever of its
settings has the best median in the cell, of those that split the machines over the steps and of
those that share them. Chosen on the measured runs themselves, that favours Triton.
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
class Cell:
    """What is varied."""

    workload: str
    arrivals: str
    machines: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One replay of one system. Latencies are those of its answers; 0 without any.

    `rejected`: share answered with an error; `late_p99_ms`: how late the generator was.
    """

    attainment: float
    p50_ms: float
    p99_ms: float
    rejected: float
    late_p99_ms: float

    @classmethod
    def of(cls, answer: dict[str, Any], slo_s: float) -> Figures:
        """From what the load generator returned."""
        every: Sequence[float | None] = answer["latencies_s"]
        answered = sorted(latency_s for latency_s in every if latency_s is not None)
        total = max(1, len(every))
        return cls(
            attainment=sum(latency_s <= slo_s for latency_s in answered) / total,
            p50_ms=percentile(answered, 0.5) * 1e3,
            p99_ms=percentile(answered, 0.99) * 1e3,
            rejected=1.0 - len(answered) / total,
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
        lanes = self.runs.get(cell, {})
        if system not in TRITON:
            return system if system in lanes else None
        shared = system == "shared"
        settings = [
            lane for lane in lanes if lane not in SYSTEMS and lane.startswith("shared") is shared
        ]
        return max(settings, key=lambda lane: self.attainment(cell, lane), default=None)

    def attains(self, cell: Cell, system: str) -> bool:
        lane = self.lane_of(cell, system)
        return lane is not None and self.attainment(cell, lane) >= self.target

    def machines_for(self, workload: str, arrivals: str, system: str) -> int | None:
        """The least number with which it attained the target; None if none measured did."""
        counts = [
            cell.machines for cell in self.cells(workload, arrivals) if self.attains(cell, system)
        ]
        return min(counts, default=None)

    def cells(self, workload: str, arrivals: str) -> list[Cell]:
        """In order of machines."""
        found = [c for c in self.runs if (c.workload, c.arrivals) == (workload, arrivals)]
        return sorted(found, key=lambda cell: cell.machines)

    def scenarios(self) -> list[tuple[str, str]]:
        """(workload, arrivals) in the order of measuring."""
        return list(dict.fromkeys((cell.workload, cell.arrivals) for cell in self.runs))

    def flat(self) -> list[dict[str, Any]]:
        """Every replay, for --json."""
        return [
            {**asdict(cell), "lane": lane, "repeat": repeat, **asdict(run)}
            for cell, lanes in self.runs.items()
            for lane, runs in lanes.items()
            for repeat, run in enumerate(runs)
        ]


def report(results: Results, set_up: str, controls: Sequence[str]) -> str:
    """Everything as markdown."""
    parts = [
        set_up,
        "",
        f"## Machines needed for {results.target:.0%} attainment",
        "",
        *_needed(results),
        "",
        "## Attainment at equal machines",
        "",
        "Median over the repeats, least and most in brackets; then the p99 latency of answers. "
        "Triton: the best setting of each kind in that cell.",
    ]
    for workload, arrivals in results.scenarios():
        parts += ["", f"**{workload}, {arrivals}**", "", *_equal(results, workload, arrivals)]
    parts += ["", "## Every setting of Triton that was measured", "", *_settings(results)]
    parts += ["", "## Control", "", *(f"* {line}" for line in controls), ""]
    return "\n".join(parts)


def _needed(results: Results) -> Iterator[str]:
    yield f"| workload | arrivals | {' | '.join(SYSTEMS.values())} | verdict |"
    yield "|---|---" + "|---" * (len(SYSTEMS) + 1) + "|"
    for workload, arrivals in results.scenarios():
        most = results.cells(workload, arrivals)[-1].machines
        counts = {s: results.machines_for(workload, arrivals, s) for s in SYSTEMS}
        cells = []
        for system, count in counts.items():
            measured = any(results.lane_of(c, system) for c in results.cells(workload, arrivals))
            cells.append(str(count) if count else f"more than {most}" if measured else "cannot")
        yield f"| {workload} | {arrivals} | {' | '.join(cells)} | {_verdict(counts)} |"


def _verdict(counts: dict[str, int | None]) -> str:
    own = counts["pooled"]
    if own is None:
        return "Paceline missed the target"
    others = {system: count for system, count in counts.items() if system != "pooled"}
    worse = [system for system, count in others.items() if count is not None and count < own]
    equal = [system for system, count in others.items() if count == own]
    if worse:
        return f"more than {' and '.join(worse)}"
    return f"fewest, with {' and '.join(equal)}" if equal else "fewest"


def _equal(results: Results, workload: str, arrivals: str) -> Iterator[str]:
    yield f"| machines | {' | '.join(SYSTEMS.values())} |"
    yield "|---" * (len(SYSTEMS) + 1) + "|"
    for cell in results.cells(workload, arrivals):
        texts = [_text(results, cell, results.lane_of(cell, system)) for system in SYSTEMS]
        yield f"| {cell.machines} | {' | '.join(texts)} |"


def _text(results: Results, cell: Cell, lane: str | None) -> str:
    if lane is None:
        return "-"
    runs = results.runs[cell][lane]
    values = [run.attainment * 100 for run in runs]
    bounds = f" [{min(values):.1f}-{max(values):.1f}]" if len(values) > 1 else ""
    p99_ms = median(run.p99_ms for run in runs)
    return f"{median(values):.1f} %{bounds}, {p99_ms:.0f} ms"


def _settings(results: Results) -> Iterator[str]:
    yield "| workload | arrivals | machines | setting: median attainment (replays) |"
    yield "|---|---|---|---|"
    for cell, lanes in results.runs.items():
        tried = sorted(
            (lane for lane in lanes if lane not in SYSTEMS),
            key=lambda lane: -results.attainment(cell, lane),
        )
        texts = [
            f"{lane}: {results.attainment(cell, lane) * 100:.1f} % ({len(lanes[lane])})"
            for lane in tried
        ]
        if texts:
            yield f"| {cell.workload} | {cell.arrivals} | {cell.machines} | {'; '.join(texts)} |"
