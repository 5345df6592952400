"""Counts a simulated run into a result.

Invariant: every request is counted once, where it is answered or fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.chain import Chain
from paceline.core.plan import Plan
from paceline.core.quantities import percentile
from paceline.core.request import Timeline
from paceline.dispatch import Action, Answer, Event, Fail
from paceline.sim.results import ChainResult, ModuleResult, SimResult
from paceline.sim.world import World

SEGMENTS = 40
"""Stretches of a run whose shares of misses are compared (`ChainResult.clumping`)."""


class Tally:
    """An observer that keeps what a result of `requests` requests, numbered from 1, needs."""

    def __init__(self, chains: Sequence[Chain], plan: Plan, requests: int) -> None:
        self._machines = {(c.chain, m.module): m.machines for c in plan.chains for m in c.modules}
        self._busy_s: dict[tuple[str, str], float] = {}
        self._slo_s = {chain.name: chain.slo_s for chain in chains}
        self._last_s = 0.0
        self._met = dict.fromkeys(self._slo_s, 0)
        self._requests = requests
        self._missed_in = {name: [0] * SEGMENTS for name in self._slo_s}
        self._ended_in = {name: [0] * SEGMENTS for name in self._slo_s}
        self.ended = dict.fromkeys(self._slo_s, 0)
        """Requests so far that were answered or refused, by chain."""
        self.missed = dict.fromkeys(self._slo_s, 0)
        """Those of them that were refused or late."""
        self._rejected = dict.fromkeys(self._slo_s, 0)
        self._latencies: dict[str, list[float]] = {name: [] for name in self._slo_s}
        self._queues: dict[tuple[str, str], list[float]] = {}
        self._runs: dict[tuple[str, str], list[float]] = {}
        self._batches: dict[tuple[str, str], dict[int, float]] = {}

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Answer):
                self._answered(action.timeline)
                self._spans(action.timeline)
            elif isinstance(action, Fail):
                self._rejected[action.timeline.chain] += 1
                self._ended(action.timeline, met=False)
                self._spans(action.timeline)

    def _answered(self, timeline: Timeline) -> None:
        self._last_s = timeline.ended_s
        chain = timeline.chain
        latency_s = timeline.ended_s - timeline.arrived_s
        self._latencies[chain].append(latency_s)
        met = latency_s <= self._slo_s[chain] + 1e-9
        self._met[chain] += met
        self._ended(timeline, met=met)

    def _ended(self, timeline: Timeline, *, met: bool) -> None:
        segment = (timeline.request - 1) * SEGMENTS // self._requests
        self.ended[timeline.chain] += 1
        self.missed[timeline.chain] += not met
        self._ended_in[timeline.chain][segment] += 1
        self._missed_in[timeline.chain][segment] += not met

    def _spans(self, timeline: Timeline) -> None:
        for span in timeline.spans:
            key = (timeline.chain, span.module)
            queues = self._queues.get(key)
            if queues is None:
                queues = self._queues[key] = []
                self._runs[key] = []
                self._batches[key] = {}
            queues.append(span.started_s - span.queued_s)
            self._runs[key].append(span.ended_s - span.started_s)
            # A batch shows up once for each of its requests, with its rows: weigh them.
            sizes = self._batches[key]
            part = span.rows / span.batch_size
            sizes[span.batch_size] = sizes.get(span.batch_size, 0.0) + part
            self._busy_s[key] = self._busy_s.get(key, 0.0) + part * (span.ended_s - span.started_s)

    def result(self, world: World) -> SimResult:
        """After the run."""
        span_s = max(self._last_s, 1e-9)
        busy_s = world.backend.busy_s
        shares = {name: machine.share for name, machine in world.backend.machines.items()}
        chains = []
        for name, latencies in self._latencies.items():
            met, rejected = self._met[name], self._rejected[name]
            answered = len(latencies)
            chains.append(
                ChainResult(
                    name,
                    self._slo_s[name],
                    answered + rejected,
                    met,
                    answered - met,
                    rejected,
                    sorted(latencies),
                    _clumping(self._missed_in[name], self._ended_in[name]),
                )
            )
        modules = [self._module(key, span_s) for key in sorted(self._queues)]
        total = sum(shares.values())
        used = sum(busy_s.values()) / span_s / total if total else 0.0
        return SimResult(tuple(chains), tuple(modules), span_s, world.events, used)

    def _module(self, key: tuple[str, str], span_s: float) -> ModuleResult:
        queues, runs = sorted(self._queues[key]), self._runs[key]
        sizes = self._batches[key]
        batches = {size: round(n) for size, n in sorted(sizes.items())}
        had_s = self._machines[key] * span_s
        return ModuleResult(
            chain=key[0],
            module=key[1],
            rows=round(sum(size * n for size, n in sizes.items())),
            batches=batches,
            queue_s=sum(queues) / len(queues),
            queue_p99_s=percentile(queues, 0.99) if queues else 0.0,
            execute_s=sum(runs) / len(runs),
            utilisation=self._busy_s[key] / had_s if had_s else 0.0,
        )


def _clumping(missed: Sequence[int], ended: Sequence[int]) -> float:
    """The variance of the share of misses between segments, over that of independent misses.

    >>> _clumping([1, 1, 1, 1], [100] * 4), round(_clumping([4, 0, 0, 0], [100] * 4), 1)
    (1.0, 4.0)
    """
    parts = [(bad, all_) for bad, all_ in zip(missed, ended, strict=True) if all_]
    total = sum(all_ for _, all_ in parts)
    share = sum(bad for bad, _ in parts) / total if total else 0.0
    if len(parts) < 2 or not 0.0 < share < 1.0:
        return 1.0
    between = sum((bad - share * all_) ** 2 / all_ for bad, all_ in parts) / (len(parts) - 1)
    return max(1.0, between / (share * (1.0 - share)))
