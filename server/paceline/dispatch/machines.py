"""Machines as the dispatcher sees them: what they hold, do, and how they have behaved.

A *lane* is one model on one machine: the unit that fails, is quarantined and is learned about.
Invariants: a machine runs at most `slots` batches and of a model at most its instances; a lane in
quarantine runs at most one batch, its probe, and only after its back-off.

Durations are learned per lane as the ratio of what batches took to what the profile says
(exponentially weighted), so that a machine that is slower than its kind is expected to be; and
over all machines by batch size (`learned`), for whoever corrects the profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from paceline.dispatch.learned import Learned
from paceline.dispatch.route import ModuleRoute

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
LEARNING_WEIGHT = 0.1
"""Weight of the newest batch in a lane's learned ratio."""

STRAGGLER_RATIO = 1.5
STRAGGLER_BATCHES = 20
"""A lane is a straggler when it has been that much slower than profiled over that many batches."""


@dataclass(frozen=True, slots=True)
class HangLimits:
    """After how long a batch counts as hanging: `factor` times the p99 of its profile (the p95,
    where that is all there is), on a slow lane as much longer, but `least_s` at least.

    Generous: durations depend on what is in a request, and a false alarm costs a reload. A model
    that was never profiled, because no chain uses it, has `unprofiled_s`.
    """

    factor: float = 20.0
    least_s: float = 10.0
    unprofiled_s: float = 120.0

    def of(self, slow_s: float) -> float:
        """The limit of a batch that hardly ever takes longer than `slow_s`."""
        return max(self.least_s, self.factor * slow_s)


@dataclass(slots=True)
class Lane:
    """One model on one machine."""

    instances: int
    running: int = 0
    ratio: float = 1.0
    batches: int = 0
    failures: int = 0
    blocked_until_s: float = -inf

    @property
    def quarantined(self) -> bool:
        """Whether its last batch failed in a way that says the lane is broken."""
        return self.failures > 0

    @property
    def straggling(self) -> bool:
        return self.batches >= STRAGGLER_BATCHES and self.ratio > STRAGGLER_RATIO

    def free(self, now_s: float) -> bool:
        if self.failures:
            return self.running == 0 and self.instances > 0 and now_s >= self.blocked_until_s
        return self.running < self.instances


@dataclass(slots=True)
class Machine:
    """An executor and its lanes by model; `ends_s` holds the expected end of every batch."""

    name: str
    hardware: str
    slots: int
    incarnation: int = 0
    lanes: dict[str, Lane] = field(default_factory=dict)
    ends_s: dict[int, float] = field(default_factory=dict)
    busy: int = 0
    """Batches it is executing."""
    up: bool = True

    @property
    def identity(self) -> tuple[str, int]:
        """Its name and how often it came up: a restarted machine is another one."""
        return (self.name, self.incarnation)


class MachinePool:
    """All machines; see the module docstring."""

    def __init__(self, hang: HangLimits | None = None) -> None:
        self.learned = Learned()
        self._hang = hang or HangLimits()
        self._machines: dict[str, Machine] = {}
        self._incarnations: dict[str, int] = {}
        self._lanes: dict[str, list[tuple[Machine, Lane]]] = {}
        """Every machine that has the model, in the order in which they came up."""
        self._sharing: dict[str, frozenset[str]] = {}
        self._free_at: dict[str, list[float]] = {}
        """What `free_at_s` found for the instant `_free_at_s`, until something changes."""
        self._free_at_s = -inf
        self.slots = 0
        """Batches that can run at a time in all."""

    def up(self, name: str, hardware: str, slots: int, instances: Mapping[str, int]) -> None:
        """A machine, new or changed; lanes keep what was learned of them."""
        machine = self._machines.get(name)
        known = machine is not None and machine.lanes.keys() >= instances.keys()
        if machine is None:
            incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
            machine = self._machines[name] = Machine(name, hardware, 0, incarnation)
        self.slots += slots - machine.slots
        machine.slots = slots
        for model, lane in machine.lanes.items():
            if lane.instances == 0 and instances.get(model, 0) > 0:
                # Loaded afresh: what it did before says nothing any more.
                lane.failures, lane.blocked_until_s = 0, -inf
            lane.instances = instances.get(model, 0)
        for model, count in instances.items():
            machine.lanes.setdefault(model, Lane(count)).instances = count
        self._free_at.clear()
        if not known:
            self._index()

    def down(self, name: str) -> None:
        """A machine is gone; its batches are reported on their own."""
        machine = self._machines.pop(name, None)
        if machine is not None:
            machine.up = False
            self.slots -= machine.slots
            self._index()

    def get(self, name: str) -> Machine | None:
        """A machine that is up."""
        return self._machines.get(name)

    def all(self) -> tuple[Machine, ...]:
        """Machines that are up, by name."""
        return tuple(machine for _, machine in sorted(self._machines.items()))

    def free(
        self, model: str, now_s: float, but: frozenset[tuple[str, int]] = frozenset()
    ) -> list[Machine]:
        """Machines that can start a batch of `model` now, `but` those identities."""
        free = [
            machine
            for machine, lane in self._lanes.get(model, ())
            if machine.busy < machine.slots and lane.free(now_s)
        ]
        return [m for m in free if m.identity not in but] if but else free

    def any_free(self, model: str, now_s: float) -> bool:
        """Whether `free` would find one."""
        for machine, lane in self._lanes.get(model, ()):
            if machine.busy < machine.slots and lane.free(now_s):
                return True
        return False

    def others(self, model: str, but: frozenset[tuple[str, int]]) -> bool:
        """Whether any machine holds `model` besides those identities."""
        return any(
            lane.instances > 0 and machine.identity not in but
            for machine, lane in self._lanes.get(model, ())
        )

    def sharing(self, model: str) -> frozenset[str]:
        """The models that some machine holds beside `model`, itself included."""
        return self._sharing.get(model, frozenset())

    def free_at_s(self, model: str, now_s: float) -> Sequence[float]:
        """When each slot that can run `model` is expected to be free, earliest first."""
        if now_s != self._free_at_s:
            self._free_at.clear()
            self._free_at_s = now_s
        found = self._free_at.get(model)
        if found is None:
            found = self._free_at[model] = self._free_times(model, now_s)
        return found

    def next_probe_s(self, model: str, now_s: float) -> float | None:
        """When a quarantined lane of `model` may be probed next."""
        due = [
            lane.blocked_until_s
            for _, lane in self._lanes.get(model, ())
            if lane.failures and lane.blocked_until_s > now_s
        ]
        return min(due, default=None)

    def expected_s(self, machine: Machine, route: ModuleRoute, rows: int) -> float | None:
        """How long a batch should take there; None without a profile."""
        profiled_s = route.duration_s(machine.hardware, rows)
        if profiled_s is None:
            return None
        return profiled_s * machine.lanes[route.model].ratio

    def started(
        self, machine: Machine, route: ModuleRoute, rows: int, batch: int, now_s: float
    ) -> float:
        """A batch went to a machine; returns after how long it counts as hanging."""
        lane = machine.lanes[route.model]
        lane.running += 1
        machine.busy += 1
        self._free_at.clear()
        known = route.durations.get(machine.hardware)
        if known is None:
            machine.ends_s[batch] = now_s
            return self._hang.unprofiled_s
        machine.ends_s[batch] = now_s + known.at(rows) * lane.ratio
        return self._hang.of(known.slow_at(rows) * max(1.0, lane.ratio))

    def ended(self, machine: Machine, model: str, batch: int) -> None:
        """A batch came back, one way or the other."""
        machine.lanes[model].running -= 1
        machine.busy -= 1
        del machine.ends_s[batch]
        self._free_at.clear()

    def succeeded(self, machine: Machine, route: ModuleRoute, rows: int, took_s: float) -> None:
        """The lane works: learn how fast, end a quarantine."""
        lane = machine.lanes[route.model]
        if lane.failures:
            lane.failures = 0
            lane.blocked_until_s = -inf
            self._free_at.clear()
        self.learned.add(route.model, machine.hardware, rows, took_s)
        profiled_s = route.duration_s(machine.hardware, rows)
        if profiled_s is None:
            return
        lane.batches += 1
        lane.ratio += LEARNING_WEIGHT * (took_s / profiled_s - lane.ratio)

    def broke(self, machine: Machine, model: str, now_s: float) -> bool:
        """The lane lost or garbled a batch: quarantine it. True when that is news."""
        lane = machine.lanes[model]
        news = not lane.quarantined
        backoff_s = min(FIRST_BACKOFF_S * 2**lane.failures, LONGEST_BACKOFF_S)
        lane.failures = min(lane.failures + 1, 16)
        self._free_at.clear()
        lane.blocked_until_s = now_s + backoff_s
        return news

    def _index(self) -> None:
        """Machines came, went or got other models."""
        self._free_at.clear()
        self._lanes = {}
        sharing: dict[str, set[str]] = {}
        for machine in self._machines.values():
            for model, lane in machine.lanes.items():
                self._lanes.setdefault(model, []).append((machine, lane))
                sharing.setdefault(model, set()).update(machine.lanes)
        self._sharing = {model: frozenset(others) for model, others in sharing.items()}

    def _free_times(self, model: str, now_s: float) -> list[float]:
        times: list[float] = []
        for machine, lane in self._lanes.get(model, ()):
            if lane.failures:
                continue
            most = min(machine.slots, lane.instances)
            idle = machine.slots - machine.busy
            if idle >= most:
                times += [now_s] * most
                continue
            ends = sorted(end_s if end_s > now_s else now_s for end_s in machine.ends_s.values())
            times += [now_s] * idle + ends[: most - idle]
        times.sort()
        return times
