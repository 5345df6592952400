"""Measurements of `bench_gateway.py` and the tables made of them.

Invariant: a ratio or difference is computed within one repeat, where both sides met the same
machine, and then the median over the repeats is taken.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

_ENOUGH_REPEATS = 7

Repeat = dict[str, dict[str, float]]
"""What one repeat measured: by case and quantity (p50_ms, p99_ms, rps, cpu_us)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is varied."""

    size: str
    stream: bool
    in_flight: int

    @property
    def title(self) -> str:
        return f"{self.size} {'stream' if self.stream else 'unary'}, {self.in_flight} in flight"


@dataclass(slots=True)
class Results:
    """Measurements by cell and case, one per repeat (same order for every case)."""

    runs: dict[Cell, dict[str, list[dict[str, float]]]] = field(default_factory=dict)

    def add(self, cell: Cell, case: str, figures: dict[str, float]) -> None:
        self.runs.setdefault(cell, {}).setdefault(case, []).append(figures)

    def median(self, cell: Cell, case: str, key: str) -> float:
        return statistics.median(run[key] for run in self.runs[cell][case])

    def paired(self, cell: Cell, combine: Callable[[Repeat], float]) -> list[float]:
        """Something that is computed from one repeat's cases, of every repeat, least first."""
        by_case = self.runs[cell]
        repeats = zip(*by_case.values(), strict=True)
        return sorted(combine(dict(zip(by_case, r, strict=True))) for r in repeats)


def _of(key: str, case: str) -> Callable[[Repeat], float]:
    return lambda r: r[case][key]


def _ratio(key: str, one: str, other: str) -> Callable[[Repeat], float]:
    return lambda r: r[one][key] / max(r[other][key], 1e-9)


def _per_core(case: str) -> Callable[[Repeat], float]:
    return lambda r: 1e6 / max(r[case]["cpu_us"], 1.0)


def _added_ms(case: str, modules: int) -> Callable[[Repeat], float]:
    return lambda r: r[case]["p50_ms"] / modules - r["triton"]["p50_ms"]


def _beside_ensemble_ms(r: Repeat) -> float:
    return (r["paceline-3"]["p50_ms"] - r["ensemble"]["p50_ms"]) / 3


ONE, THREE, APART, NAIVE = "paceline-1", "paceline-3", "apart-3", "naive"
FRONTED = (ONE, THREE, APART)
BEFORE = ("before-1", "before-3", "before-a")
"""The same chains by the code of another source tree."""
FIGURES: tuple[tuple[str, tuple[str, ...], Callable[[Repeat], float], str], ...] = (
    ("added latency per module, chain of 1 (ms)", (ONE, "triton"), _added_ms(ONE, 1), ".2f"),
    ("added latency per module, chain of 3 (ms)", (THREE, "triton"), _added_ms(THREE, 3), ".2f"),
    ("chain of 3 less ensemble, per step (ms)", (THREE, "ensemble"), _beside_ensemble_ms, ".2f"),
    ("CPU: own server / echo", ("own", "echo"), _ratio("cpu_us", "own", "echo"), ".2f"),
    ("CPU: relay / echo", ("relay", "echo"), _ratio("cpu_us", "relay", "echo"), ".2f"),
    ("CPU: chain of 1 / echo", (ONE, "echo"), _ratio("cpu_us", ONE, "echo"), ".2f"),
    ("CPU: chain of 3 / echo", (THREE, "echo"), _ratio("cpu_us", THREE, "echo"), ".2f"),
    ("requests/s per core, echo", ("echo",), _per_core("echo"), ".0f"),
    ("requests/s per front core, chain of 1", (ONE,), _per_core(ONE), ".0f"),
    ("requests/s per front core, chain of 3", (THREE,), _per_core(THREE), ".0f"),
    ("requests/s: chain of 1 / triton", (ONE, "triton"), _ratio("rps", ONE, "triton"), ".2f"),
    ("requests/s: chain of 1 / dynamic", (ONE, "dynamic"), _ratio("rps", ONE, "dynamic"), ".2f"),
    (
        "requests/s: chain of 3 / ensemble",
        (THREE, "ensemble"),
        _ratio("rps", THREE, "ensemble"),
        ".2f",
    ),
    (
        "requests/s: chain of 3 apart / ensemble",
        (APART, "ensemble"),
        _ratio("rps", APART, "ensemble"),
        ".2f",
    ),
    ("requests/s: chain of 3 / apart", (THREE, APART), _ratio("rps", THREE, APART), ".2f"),
    ("requests/s: chain of 1 / naive", (ONE, NAIVE), _ratio("rps", ONE, NAIVE), ".2f"),
    ("CPU: naive / chain of 1", (ONE, NAIVE), _ratio("cpu_us", NAIVE, ONE), ".2f"),
    *(
        (f"requests/s: {now} / {old}", (now, old), _ratio("rps", now, old), ".2f")
        for now, old in zip(FRONTED, BEFORE, strict=True)
    ),
    *(
        (f"CPU: {now} / {old}", (now, old), _ratio("cpu_us", now, old), ".2f")
        for now, old in zip(FRONTED, BEFORE, strict=True)
    ),
)
"""Name, cases it needs, how it is computed from one repeat, format."""


def report(results: Results, set_up: str) -> str:
    """Markdown: `set_up`, a table per tensor size and call type, then the derived figures."""
    lines: list[str] = []
    groups = itertools.groupby(results.runs, key=lambda cell: (cell.size, cell.stream))
    for (size, stream), group in groups:
        lines += [f"### {size}, {'stream' if stream else 'unary'}", ""]
        lines += _cell_table(results, list(group))
    lines += ["### Derived", "", *_derived_table(results)]
    entries = (
        "Each entry: median latency in ms / requests per second / CPU microseconds per request "
        "(of the front or echo processes; of all of Triton's processes for triton, dynamic and "
        "ensemble)."
    )
    return "\n".join([f"{set_up} {entries}", "", *lines])


def _cell_table(results: Results, cells: list[Cell]) -> list[str]:
    cases = list(results.runs[cells[0]])
    lines = ["| | " + " | ".join(f"{cell.in_flight} in flight" for cell in cells) + " |"]
    lines.append("|---" * (len(cells) + 1) + "|")
    for case in cases:
        entries = (
            f"{results.median(cell, case, 'p50_ms'):.2f} / {results.median(cell, case, 'rps'):.0f}"
            f" / {results.median(cell, case, 'cpu_us'):.0f}"
            for cell in cells
        )
        lines.append(f"| {case} | " + " | ".join(entries) + " |")
    return [*lines, ""]


def _spread(values: list[float], form: str) -> str:
    """The median, and the least and the greatest where there are enough to tell."""
    median = format(statistics.median(values), form)
    if len(values) < _ENOUGH_REPEATS:
        return median
    return f"{median} ({values[0]:{form}} to {values[-1]:{form}})"


def _derived_table(results: Results) -> list[str]:
    """One line per figure, one column per cell; those without their cases are left out."""
    lines: list[str] = []
    groups = itertools.groupby(results.runs, key=lambda cell: (cell.size, cell.stream))
    for (size, stream), group in groups:
        cells = list(group)
        title = f"{size} {'stream' if stream else 'unary'}"
        lines.append(f"| {title} | " + " | ".join(f"{c.in_flight} in flight" for c in cells) + " |")
        lines.append("|---" * (len(cells) + 1) + "|")
        for name, needs, combine, form in FIGURES:
            if all(need in results.runs[cells[0]] for need in needs):
                values = (_spread(results.paired(cell, combine), form) for cell in cells)
                lines.append(f"| {name} | " + " | ".join(values) + " |")
        lines.append("")
    return lines
