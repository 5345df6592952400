"""What `scripts/bench_slo.py` makes of its replays, and the rule for rates and objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.slo_machines import Counts
from scripts.slo_report import (
    Cell,
    Figures,
    Needed,
    Results,
    Scenario,
    equal_tables,
    goodput_table,
    machines_table,
    needed_tables,
    overload_table,
)
from scripts.slo_workloads import WORKLOADS, Workload, busiest_minute, read

PROFILES = Path(__file__).parents[2] / "examples" / "data" / "profiles.csv"
SCENARIO = Scenario("chain2", "poisson", 2.0)


def figures(attainment: float, sent: int = 100) -> Figures:
    return Figures(sent, attainment, 100.0, 200.0, 1.0 - attainment, 1.0, 2.0, 0.5)


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
    assert "| below 5.0 | 6.0 (60.0%) | 9.0 (90.0%) | +50% over shared |" in row


def test_machines_are_summed_over_the_rates_of_the_best_setting() -> None:
    counts = {
        "pooled": (3, 4, 5),
        "shared, eager": (4, 4, 6),
        "shared, wait to fill": (3, 5, 6),
        "round-robin": (5, 6, None),
    }
    need = Needed((20.0, 30.0, 40.0), (2.0, 3.0, 4.0), 6, counts)
    row = list(machines_table({SCENARIO: need}))[-1]
    assert "| 20 to 40/s | 9 | 13 | at least 18 | 12 |" in row
    assert "8% fewer than shared, 33% or more fewer than round-robin" in row
    assert list(needed_tables({SCENARIO: need}))[-1] == ("| 40 | 4.00 | 6 | more than 6 | 5 |")


def test_no_verdict_is_made_where_paceline_itself_missed_a_rate() -> None:
    need = Needed((20.0, 30.0), (2.0, 3.0), 4, {"pooled": (3, None), "eager": (4, None)})
    row = list(machines_table({SCENARIO: need}))[-1]
    assert "| at least 9 | at least 8 | open: Paceline did not attain it at every rate |" in row


def test_attainment_is_compared_with_the_machines_that_paceline_needs() -> None:
    need = Needed((20.0,), (2.0,), 6, {"pooled": (3,), "eager": (4,)})
    results = Results(0.99)
    for machines, attained in ((3, 1.0), (4, 0.5)):
        cell = Cell(SCENARIO, machines, 2.0, 20.0)
        for value in (attained, attained - 0.04):
            results.add(cell, "pooled", figures(value))
        # The third replay was its alone: who is asked for longer meets other arrivals, too.
        for value in (0.9, 0.92, 1.0):
            results.add(cell, "eager", figures(value))
    assert list(equal_tables({SCENARIO: need}, results))[-1] == (
        "| 20 | 3 | 91.0 % [90.0-92.0], 200 ms | 98.0 % [96.0-100.0], 200 ms |"
    )


@pytest.mark.parametrize("proposed", [1, 4, 5, 6, 9])
def test_the_least_machines_are_found_wherever_the_search_begins(proposed: int) -> None:
    least = [3, 5, 5, 8]
    counts = Counts([1, 2, 3, 4], [proposed] * len(least), 7)
    asked = []
    for rate in range(len(least)):
        while (machines := counts.next(rate)) is not None:
            asked.append((rate, machines))
            counts.tell(rate, machines, machines >= least[rate])
    assert counts.attained == [3, 5, 5, None]
    assert counts.missed[:3] == [2, 4, 4]
    assert len(asked) == len(set(asked))


def test_the_busiest_minute_is_told_as_a_multiple_of_the_mean() -> None:
    assert busiest_minute([1.0] * 60 + [5.0] * 60) == pytest.approx(5 / 3)


def test_overload_is_told_as_a_share_of_the_peak() -> None:
    results = Results(0.99)
    # In 10 s; by chance 1 % fewer came than 180 a second.
    for offered, attainment, sent in ((1.0, 1.0, 360), (5.0, 0.192, 1782)):
        results.add(at(4, 0.9 * offered), "pooled", figures(attainment, sent))
    rows = list(overload_table(results, 0.9, 10.0))[-2:]
    assert rows[0] == "| 1 | 36 | 36.0 (100.0% of its peak) |"
    assert rows[1].startswith("| 5 | 180 | 34.2 (95.0% of its peak), 80.8%, p50 1.0 ms")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_load_is_the_machines_that_full_batches_keep_busy(workload: Workload) -> None:
    served = read(workload, PROFILES).held_to(2.0).loaded(3.8)
    busy = sum(served.load(step) for step in workload.steps)
    assert served.bound == pytest.approx(3.8) == pytest.approx(busy)
    assert served.slo_ms == pytest.approx(2e3 * served.path_s(workload.largest), abs=0.5)
