"""Arrivals: generators and traces."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from paceline.core.errors import ConfigError
from paceline.sim import workload


def test_poisson_arrivals_have_the_rate_asked_for_and_follow_from_the_seed() -> None:
    arrivals = workload.poisson(50.0, 20_000, Random(3))
    assert arrivals == workload.poisson(50.0, 20_000, Random(3))
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(50.0, rel=0.03)


def test_bursts_come_at_the_same_instant_at_the_mean_rate() -> None:
    arrivals = workload.bursts(50.0, 10_000, Random(3), size=10)
    assert len(arrivals) == 10_000
    assert len(set(arrivals)) == 1000
    assert len(arrivals) / arrivals[-1] == pytest.approx(50.0, rel=0.15)


def test_fractional_counts_keep_their_running_total() -> None:
    arrivals = workload.from_counts([0.4] * 100, bucket_s=1.0, rng=Random(1))
    assert len(arrivals) == 40
    assert arrivals == sorted(arrivals)


def test_a_trace_of_instants_is_stretched_to_a_rate(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,tokens\n5.0,1\n6.0,1\n8.0,1\n")
    assert workload.read_trace(trace, Random(0)) == [0.0, 1.0, 3.0]
    assert workload.read_trace(trace, Random(0), rate_rps=2.0) == pytest.approx([0.0, 1 / 3, 1.0])


def test_a_trace_of_counts_is_scaled_by_its_counts_and_a_window_is_chosen(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "window,second_in_window,requests\nquiet,0,1\nbusy,0,30\nbusy,1,10\nbusy,2,20\n"
    )
    arrivals = workload.read_trace(trace, Random(0), window="busy")
    assert [sum(int(at_s) == second for at_s in arrivals) for second in range(3)] == [30, 10, 20]
    scaled = workload.read_trace(trace, Random(0), window="busy", rate_rps=10.0)
    assert [sum(int(at_s) == second for at_s in scaled) for second in range(3)] == [15, 5, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the trace has no rows"),
        ("requests\n3\n", "t.csv:1: a trace has a column 'arrival_s'"),
        ("arrival_s\n1.0\nsoon\n", "t.csv:3: arrival_s must be a number of at least 0, got 'soon'"),
        ("second,requests\n0,-3\n", "t.csv:2: requests must be a number"),
        ("# how it was\n# made\narrival_s\n1.0\nsoon\n", "t.csv:5: arrival_s must be a number"),
        ("second,requests\n0,0\n", "the trace holds no requests"),
    ],
)
def test_a_malformed_trace_is_an_error_that_names_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(text)
    with pytest.raises(ConfigError) as caught:
        workload.read_trace(trace, Random(0))
    assert message in str(caught.value)


def test_an_unknown_window_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("window,second,requests\na,0,1\n")
    with pytest.raises(ConfigError, match="no window 'b'; it has a"):
        workload.read_trace(trace, Random(0), window="b")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        workload.read_trace(tmp_path / "none.csv", Random(0))


def test_more_rows_than_requests_can_be_simulated_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "MOST_REQUESTS", 3)
    trace = tmp_path / "t.csv"
    trace.write_text("window,arrival_s\n" + "a,1\n" * 3 + "b,1\n")
    with pytest.raises(ConfigError, match="more than 3 rows; take one of its windows"):
        workload.read_trace(trace, Random(0))
    assert workload.read_trace(trace, Random(0), window="a") == [0.0, 0.0, 0.0]
