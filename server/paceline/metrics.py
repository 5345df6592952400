"""What Prometheus scrapes: Triton's names where Triton has the number, `paceline_` for the rest.

Invariant: a request costs three additions to its chain's own numbers, which become Prometheus's
when they are scraped (its counters, with their locks, cost ten times as much); everything else is
read from `Control` then, so that no number is kept twice. On the event loop's thread. Base units
(seconds, ratios) as Prometheus wants them, except in Triton's own metrics (microseconds).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from paceline.core.ports import Control, ModelStatistics
from paceline.core.request import Timeline

LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
OUTCOMES = ("met", "missed", "failed", "rejected")


class Metrics(Collector):
    """The process's metrics. `watch` adds what `Control` knows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._chains: defaultdict[str, _ChainCounts] = defaultdict(_ChainCounts)
        self.registry.register(self)

    def watch(self, control: Control) -> None:
        """Export what `control` knows at every scrape."""
        self.registry.register(ControlCollector(control))

    def observe(self, timeline: Timeline) -> None:
        """Count one ended request."""
        chain = self._chains[timeline.chain]
        if timeline.error:
            chain.outcomes["rejected" if timeline.rejected else "failed"] += 1
            return
        latency_s = timeline.latency_s
        chain.outcomes["met" if timeline.met else "missed"] += 1
        chain.latencies[bisect_left(LATENCY_BUCKETS_S, latency_s)] += 1
        chain.latency_s += latency_s

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        requests = CounterMetricFamily(
            "paceline_requests",
            "Requests by chain and outcome: met or missed their deadline, failed, rejected.",
            labels=("chain", "outcome"),
        )
        latency = HistogramMetricFamily(
            "paceline_request_duration_seconds",
            "Time from a request's arrival to its answer.",
            labels=("chain",),
        )
        edges = (*map(str, LATENCY_BUCKETS_S), "+Inf")
        for name, chain in sorted(self._chains.items()):
            for outcome, count in chain.outcomes.items():
                requests.add_metric((name, outcome), count)
            within = accumulate(chain.latencies)
            latency.add_metric((name,), list(zip(edges, within, strict=True)), chain.latency_s)
        yield requests
        yield latency


class _ChainCounts:
    """What is counted of one chain; `latencies` by bucket, the last for all above."""

    __slots__ = ("latencies", "latency_s", "outcomes")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.latencies = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.latency_s = 0.0


class ControlCollector(Collector):
    """Reads `Control` at scrape time, on the event loop's thread."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def collect(self) -> Iterable[Metric]:
        status = self._control.status()
        statistics = self._control.statistics()
        yield from _triton_counters(statistics)
        yield _pending(status)
        yield _batch_sizes(statistics)
        yield from _gauges(status, self._control)
        yield from _residency(status)


def _triton_counters(statistics: Iterable[ModelStatistics]) -> Iterator[Metric]:
    """Triton's names have no `_total`; prometheus_client would add it to a counter's, so that
    these are exported as untyped."""
    statistics = tuple(statistics)
    for name, about, value in (
        ("request_success", "Successful requests.", lambda s: s.success_count),
        ("request_failure", "Failed requests.", lambda s: s.fail_count),
        ("count", "Inferences: rows, not requests.", lambda s: s.inference_count),
        ("exec_count", "Executions: batches.", lambda s: s.execution_count),
        ("request_duration_us", "Cumulative request time.", lambda s: _us(s.success_s)),
        ("queue_duration_us", "Cumulative time in queues.", lambda s: _us(s.queue_s)),
        ("compute_infer_duration_us", "Cumulative execution.", lambda s: _us(s.compute_infer_s)),
    ):
        metric = Metric(f"nv_inference_{name}", about, "unknown")
        for counts in statistics:
            labels = {"model": counts.name, "version": counts.version or "1"}
            metric.add_sample(metric.name, labels, value(counts))
        yield metric


def _pending(status: dict[str, Any]) -> Metric:
    metric = GaugeMetricFamily(
        "nv_inference_pending_request_count",
        "Requests of a chain, or rows for a model, that are not executed yet.",
        labels=("model", "version"),
    )
    pending: dict[str, int] = {}
    for chain in status.get("chains", ()):
        pending[chain["chain"]] = chain.get("in_flight", 0)
    for module in status.get("modules", ()):
        name = module["model"]
        pending[name] = pending.get(name, 0) + module.get("queued", 0)
    for name, count in sorted(pending.items()):
        metric.add_metric((name, "1"), count)
    return metric


def _batch_sizes(statistics: Iterable[ModelStatistics]) -> Metric:
    metric = HistogramMetricFamily(
        "paceline_batch_size", "Rows of the batches that were executed.", labels=("model",)
    )
    for counts in statistics:
        if not counts.batches:
            continue
        buckets = [
            (f"{float(edge)}", sum(n for size, n, _ in counts.batches if size <= edge))
            for edge in BATCH_SIZE_BUCKETS
        ]
        executions = sum(n for _, n, _ in counts.batches)
        rows = sum(size * n for size, n, _ in counts.batches)
        metric.add_metric((counts.name,), [*buckets, ("+Inf", executions)], rows)
    return metric


def _gauges(status: dict[str, Any], control: Control) -> Iterator[Metric]:
    yield _gauge("paceline_ready", "1 if everything is loaded.", (), [((), status.get("ready"))])
    yield _gauge(
        "paceline_cost_per_hour", "Of the plan in force.", (), [((), status.get("cost_per_hour"))]
    )
    chains = status.get("chains", ())
    for name, about, key, scale in (
        ("paceline_in_flight_requests", "Accepted, not answered.", "in_flight", 1.0),
        ("paceline_slo_attainment_ratio", "Requests that met it, of all.", "attainment", 1.0),
        ("paceline_slo_seconds", "The chain's objective.", "slo_ms", 1e-3),
        ("paceline_planned_rate_rps", "Requests/s planned for.", "rate_rps", 1.0),
        ("paceline_planned_worst_seconds", "Latency planned for.", "latency_worst_ms", 1e-3),
    ):
        rows = [((c["chain"],), c[key] * scale) for c in chains if c.get(key) is not None]
        yield _gauge(name, about, ("chain",), rows)
    targets = [((chain.name,), chain.attainment) for chain in control.chains()]
    yield _gauge("paceline_slo_target_ratio", "Share that must meet it.", ("chain",), targets)
    modules = status.get("modules", ())
    for name, about, key, scale in (
        ("paceline_queue_depth", "Rows that wait.", "queued", 1.0),
        ("paceline_queue_oldest_seconds", "Age of the oldest of them.", "oldest_ms", 1e-3),
        ("paceline_executing_rows", "Rows that are executed.", "executing", 1.0),
    ):
        depths = [((m["chain"], m["module"]), m.get(key, 0) * scale) for m in modules]
        yield _gauge(name, about, ("chain", "module"), depths)
    machines = [((m["machine"],), m.get("state") == "up") for m in status.get("machines", ())]
    yield _gauge("paceline_machine_up", "1 if it answers.", ("machine",), machines)


def _residency(status: dict[str, Any]) -> Iterator[Metric]:
    """What models came and went, and what memory they take; where there is a bound."""
    counts = status.get("residency") or {}
    for key, about in (
        ("hits", "Uses of a model that was in memory."),
        ("misses", "Uses of a model that was not."),
        ("loads", "Models loaded."),
        ("load_failures", "Loads that failed or hung."),
        ("loaded_bytes", "Bytes of the models loaded."),
        ("evictions", "Models unloaded for others."),
        ("unloads", "Models unloaded, for whatever reason."),
        ("leaks", "Unloads that never ended."),
    ):
        if key in counts:
            yield CounterMetricFamily(f"paceline_model_{key}", about, value=counts[key])
    machines = [m for m in status.get("machines", ()) if "memory_used_mib" in m]
    for name, about, key in (
        ("paceline_memory_used_bytes", "Loading, resident, unloading.", "memory_used_mib"),
        ("paceline_memory_budget_bytes", "0: no bound.", "memory_mib"),
    ):
        yield _gauge(
            name, about, ("machine",), [((m["machine"],), m[key] * 2**20) for m in machines]
        )


def _gauge(
    name: str, about: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], Any]]
) -> Metric:
    metric = GaugeMetricFamily(name, about, labels=labels)
    for values, value in rows:
        metric.add_metric(values, float(value or 0))
    return metric


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
