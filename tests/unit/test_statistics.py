"""What one ended request adds to the counts of its chain and of the models it used."""

from __future__ import annotations

from paceline.core.request import Span, Timeline
from paceline.runtime.statistics import Statistics

SPANS = (
    Span("a", "m", "t0", 1, 4, queued_s=0.0, started_s=1.0, ended_s=3.0),
    Span("b", "n", "t0", 2, 2, queued_s=3.0, started_s=3.5, ended_s=4.0),
)


def timeline(chain: str, error: str = "", *, rejected: bool = False) -> Timeline:
    return Timeline(1, "", chain, 0.0, 4.0, 5.0, SPANS, error, rejected)


def test_a_chain_counts_requests_and_a_model_its_rows_and_time() -> None:
    statistics = Statistics()
    statistics.observe_request(timeline("c"), direct=False, wall_ms=7)
    chain, first, second = (statistics.snapshot(name, "1") for name in ("c", "m", "n"))
    assert (chain.success_count, chain.success_s, chain.inference_count) == (1, 4.0, 1)
    assert (chain.queue_count, chain.queue_s, chain.compute_infer_s) == (1, 1.5, 2.5)
    assert (first.inference_count, first.queue_s, first.compute_infer_s) == (1, 1.0, 2.0)
    assert (second.inference_count, second.success_s, second.last_inference_ms) == (2, 1.0, 7)
    assert statistics.chains["c"].met_count == 1


def test_a_model_called_by_its_own_name_counts_once() -> None:
    statistics = Statistics()
    statistics.observe_request(timeline("m"), direct=True, wall_ms=7)
    assert not statistics.chains
    assert statistics.snapshot("m", "1").success_count == 1


def test_failures_and_refusals_are_told_apart_and_keep_what_was_executed() -> None:
    statistics = Statistics()
    statistics.observe_request(timeline("c", "late", rejected=True), direct=False, wall_ms=7)
    statistics.observe_request(timeline("c", "boom"), direct=False, wall_ms=8)
    counts = statistics.chains["c"]
    assert (counts.fail_count, counts.rejected_count, counts.success_count) == (2, 1, 0)
    assert counts.last_inference_ms == 0
    assert statistics.snapshot("m", "1").inference_count == 2


def test_executions_are_counted_by_batch_size() -> None:
    statistics = Statistics()
    for rows in (4, 2, 4):
        statistics.observe_batch("m", rows, 0.5)
    snapshot = statistics.snapshot("m", "1")
    assert (snapshot.execution_count, snapshot.batches) == (3, ((2, 1, 0.5), (4, 2, 1.0)))
