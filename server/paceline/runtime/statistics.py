"""Counting what was served, in the terms of Triton's statistics extension.

A chain counts requests. A model counts its share of each: queue and compute time of the spans
in which it worked, inferences in rows, executions in batches.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from paceline.core.ports import ModelStatistics
from paceline.core.request import Timeline


@dataclass(slots=True)
class Counts:
    """Cumulative counts of one chain or model. What succeeded was queued and computed once."""

    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success_count: int = 0
    success_s: float = 0.0
    fail_count: int = 0
    fail_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    met_count: int = 0
    rejected_count: int = 0
    batches: dict[int, list[float]] = field(default_factory=dict)


class Statistics:
    """Observes ended requests and executed batches; read by `snapshot`."""

    def __init__(self) -> None:
        self.chains: defaultdict[str, Counts] = defaultdict(Counts)
        self.models: defaultdict[str, Counts] = defaultdict(Counts)

    def observe_request(self, timeline: Timeline, *, direct: bool, wall_ms: int) -> None:
        """One ended request; `direct` when the model was called by its own name."""
        waited_s = ran_s = 0.0
        for span in timeline.spans:
            counts = self.models[span.model]
            queue_s = span.started_s - span.queued_s
            compute_s = span.ended_s - span.started_s
            waited_s += queue_s
            ran_s += compute_s
            counts.success_count += 1
            counts.success_s += queue_s + compute_s
            counts.queue_s += queue_s
            counts.compute_s += compute_s
            counts.inference_count += span.rows
            counts.last_inference_ms = wall_ms
        if timeline.error:
            counts = (self.models if direct else self.chains)[timeline.chain]
            counts.fail_count += 1
            counts.fail_s += timeline.latency_s
            counts.rejected_count += timeline.rejected
        elif not direct:
            counts = self.chains[timeline.chain]
            counts.success_count += 1
            counts.success_s += timeline.latency_s
            counts.met_count += timeline.met
            counts.queue_s += waited_s
            counts.compute_s += ran_s
            counts.inference_count += 1
            counts.last_inference_ms = wall_ms
            counts.execution_count += 1

    def observe_batch(self, model: str, rows: int, duration_s: float) -> None:
        """One executed batch."""
        counts = self.models[model]
        counts.execution_count += 1
        batch = counts.batches.setdefault(rows, [0, 0.0])
        batch[0] += 1
        batch[1] += duration_s

    def snapshot(self, name: str, version: str) -> ModelStatistics:
        """Everything known of a chain or model; zeros when it was never called."""
        counts = self.chains.get(name) or self.models.get(name) or Counts()
        return ModelStatistics(
            name=name,
            version=version,
            last_inference_ms=counts.last_inference_ms,
            inference_count=counts.inference_count,
            execution_count=counts.execution_count,
            success_count=counts.success_count,
            success_s=counts.success_s,
            fail_count=counts.fail_count,
            fail_s=counts.fail_s,
            queue_count=counts.success_count,
            queue_s=counts.queue_s,
            compute_infer_count=counts.success_count,
            compute_infer_s=counts.compute_s,
            batches=tuple((rows, int(n), s) for rows, (n, s) in sorted(counts.batches.items())),
        )
