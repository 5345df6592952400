"""What happened when in a run: arrivals and how they ended, queues, machines, cost, by stretch.

Invariant: a request counts in the stretch in which it arrived, a batch in those in which it ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.core.request import Timeline
from paceline.dispatch import Action, Answer, BatchDone, BatchFailed, Event, Execute, Fail
from paceline.dispatch.loads import ModuleLoad
from paceline.sim.rental import Fleet, Rented
from paceline.sim.replan import Seen


@dataclass(slots=True)
class Stretch:
    """One part of a run; times in machine-seconds by hardware, `cost` in money."""

    at_s: float
    span_s: float = 0.0
    requests: int = 0
    met: int = 0
    missed: int = 0
    rejected: int = 0
    queued_row_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    rented_s: dict[str, float] = field(default_factory=dict)
    cost: float = 0.0

    @property
    def attainment(self) -> float:
        return self.met / self.requests if self.requests else 1.0

    @property
    def queued(self) -> float:
        """Rows that waited, on average."""
        return self.queued_row_s / self.span_s if self.span_s else 0.0

    @property
    def cost_per_hour(self) -> float:
        return self.cost / self.span_s * 3600 if self.span_s else 0.0

    def utilisation(self, hardware: str | None = None) -> float:
        """Share of the rented machine time in which batches ran."""
        if hardware is not None:
            busy, rented = self.busy_s.get(hardware, 0.0), self.rented_s.get(hardware, 0.0)
        else:
            busy, rented = sum(self.busy_s.values()), sum(self.rented_s.values())
        return busy / rented if rented else 0.0


@dataclass(slots=True)
class Depth:
    """Rows of a module that waited, as looked at again and again."""

    total: int = 0
    looks: int = 0
    most: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.looks if self.looks else 0.0


class Recorder:
    """An observer; `look` is to be called regularly besides."""

    def __init__(
        self, fleet: Fleet, slo_s: Mapping[str, float], stretch_s: float, stretches: int
    ) -> None:
        """The last of `stretches` lasts until everything has ended."""
        self._fleet = fleet
        self._slo_s = slo_s
        self._stretch_s = stretch_s
        self._machines = {r.machine.name: r for r in fleet.rented}
        self._running: dict[int, tuple[str, float]] = {}
        self._looked_s = 0.0
        self._seen: dict[str, Seen] = {}
        self.stretches = [Stretch(index * stretch_s) for index in range(stretches)]
        self.depths: dict[tuple[str, str], Depth] = {}
        self._looks = 0

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        if isinstance(event, (BatchDone, BatchFailed)):
            self._ran(event.batch, now_s)
        for action in actions:
            if isinstance(action, Execute):
                self._running[action.batch] = (action.machine, now_s)
            elif isinstance(action, Answer):
                self._ended(action.timeline, answered=True)
            elif isinstance(action, Fail):
                self._ended(action.timeline, answered=False)

    def look(self, now_s: float, loads: Mapping[tuple[str, str], ModuleLoad]) -> None:
        """Note the queues as they are, and what was rented since the last look."""
        self._looks += 1
        queued = 0
        for key, load in loads.items():
            depth = self.depths.setdefault(key, Depth())
            depth.total += load.queued
            depth.most = max(depth.most, load.queued)
            queued += load.queued
        for depth in self.depths.values():
            depth.looks = self._looks
        for stretch, span_s in self._parts(self._looked_s, now_s):
            stretch.span_s += span_s
            stretch.queued_row_s += queued * span_s
            for rented in self._fleet.now():
                hardware = rented.machine.hardware
                known_s = stretch.rented_s.get(hardware, 0.0)
                stretch.rented_s[hardware] = known_s + span_s * rented.share
                stretch.cost += rented.cost_per_hour * span_s / 3600
        self._looked_s = now_s

    def take(self) -> dict[str, Seen]:
        """What ended since this was called before, by chain."""
        seen, self._seen = self._seen, {}
        return seen

    def _ended(self, timeline: Timeline, *, answered: bool) -> None:
        stretch = self._stretch(timeline.arrived_s)
        stretch.requests += 1
        seen = self._seen.setdefault(timeline.chain, Seen())
        seen.requests += 1
        if not answered:
            stretch.rejected += 1
            return
        if timeline.latency_s <= self._slo_s[timeline.chain] + 1e-9:
            stretch.met += 1
        else:
            stretch.missed += 1
        seen.answered += 1
        for span in timeline.spans:
            seen.rows[span.module] = seen.rows.get(span.module, 0) + span.rows

    def _ran(self, batch: int, now_s: float) -> None:
        name, since_s = self._running.pop(batch)
        rented = self._machine(name)
        rented.busy_s += now_s - since_s
        hardware = rented.machine.hardware
        for stretch, span_s in self._parts(since_s, now_s):
            stretch.busy_s[hardware] = stretch.busy_s.get(hardware, 0.0) + span_s

    def _machine(self, name: str) -> Rented:
        if name not in self._machines:
            self._machines = {r.machine.name: r for r in self._fleet.rented}
        return self._machines[name]

    def _parts(self, since_s: float, until_s: float) -> list[tuple[Stretch, float]]:
        """What of a time falls into which stretch."""
        parts = []
        index = self._index(since_s)
        while since_s < until_s:
            last = index + 1 == len(self.stretches)
            end_s = until_s if last else min(until_s, (index + 1) * self._stretch_s)
            parts.append((self.stretches[index], max(0.0, end_s - since_s)))
            since_s, index = max(since_s, end_s), index + 1
        return parts

    def _stretch(self, at_s: float) -> Stretch:
        return self.stretches[self._index(at_s)]

    def _index(self, at_s: float) -> int:
        return min(int(at_s / self._stretch_s), len(self.stretches) - 1)
