"""What `scripts/bench_slo.py` makes of its replays, and the rule for rates and objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.slo_report import (
    Cell,
    Figures,
    Results,
    Scenario,
    goodput_table,
    machines_table,
    overload_table,
)
from scripts.slo_workloads import WORKLOADS, Workload, read

PROFILES = Path(__file__).parents[2] / "examples" / "data" / "profiles.csv"
SCENARIO = Scenario("chain2", "poisson", 2.0)


def figures(attainment: float) -> Figures:
    return Figures(attainment, 100.0, 200.0, 1.0 - attainment, 1.0, 2.0, 0.5)


def at(machines: int, load: float) -> Cell:
    """Ten requests/s keep a machine busy."""
    return Cell(SCENARIO, machines, load * machines, load * machines * 10.0)


def test_goodput_is_the_largest_rate_below_every_rate_that_failed() -> None:
    results = Results(0.99)
    for load, attainment in ((0.5, 1.0), (0.6, 0.995), (0.7, 0.9), (0.8, 0.999)):
        results.add(at(4, load), "shared, eager", figures(attainment))
    for load, attainment in ((0.8, 1.0), (0.9, 0.992)):
        results.add(at(4, load), "pooled", figures(attainment))
    results.add(at(4, 0.5), "eager", figures(0.3))
    best = results.most(SCENARIO, "shared")
    assert best is not None and best.load == pytest.approx(0.6)
    assert results.most(SCENARIO, "split") is None
    row = list(goodput_table(results))[-1]
    assert "| below 5.0 | 6.0 (60.0%) | cannot | 9.0 (90.0%) | +50% over shared |" in row


def test_machines_are_the_least_that_attain_it_and_ties_are_named() -> None:
    results = Results(0.99)
    for machines, pooled, shared in ((4, 0.97, 0.9), (5, 1.0, 1.0)):
        cell = Cell(SCENARIO, machines, 3.8, 38.0)
        results.add(cell, "pooled", figures(pooled))
        results.add(cell, "shared, eager", figures(shared))
        results.add(cell, "round-robin", figures(0.5))
    row = list(machines_table(results))[-1]
    assert "| 38 | 3.80 | cannot | 5 | more than 5 | 5 | fewest, with shared |" in row


def test_overload_is_told_as_a_share_of_the_peak() -> None:
    results = Results(0.99)
    for offered, attainment in ((1.0, 1.0), (5.0, 0.19)):
        results.add(at(4, 0.9 * offered), "pooled", figures(attainment))
    rows = list(overload_table(results, 0.9))[-2:]
    assert rows[0] == "| 1 | 36 | 36.0 (100.0% of its peak) |"
    assert rows[1].startswith("| 5 | 180 | 34.2 (95.0% of its peak), 81.0%, p50 1.0 ms")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_load_is_the_machines_that_full_batches_keep_busy(workload: Workload) -> None:
    served = read(workload, PROFILES).held_to(2.0).loaded(3.8)
    busy = sum(served.load(step) for step in workload.steps)
    assert served.bound == pytest.approx(3.8) == pytest.approx(busy)
    assert served.slo_ms == pytest.approx(2e3 * served.path_s(workload.largest), abs=0.5)
