"""Machines as the dispatcher sees them: what they hold, do, and how they have behaved.

A *lane* is one model on one machine: the unit that fails, is quarantined and is learned about.
Invariants: a machine runs at most `slots` batches and of a model at most its instances; a lane in
quarantine gets at most one batch, its probe, only after its back-off and when it executes nothing.

Durations are learned per lane and batch size as the ratio of what batches took to what the profile
says (`Lane.took`), so that a machine that is slower than its kind is expected to be; the newest
themselves are kept (`learned`), for whoever corrects the profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf

from paceline.core.errors import ConfigError
from paceline.dispatch.holders import Holders, Lane, Machine, Rank
from paceline.dispatch.learned import Learned
from paceline.dispatch.route import ModuleRoute

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
NOTHING = 1e-6
"""Planned fractions of machines are sums of floats: as much more or less is none."""

Home = tuple[str, tuple[tuple[str, float], ...]]
"""A model, and how many machines of which hardware a plan has for it, its main one first; none
without a plan (`ModuleRoute.home`)."""


@dataclass(frozen=True, slots=True)
class HangLimits:
    """After how long a batch counts as hanging: `factor` times the p99 of its profile (the p95,
    where that is all there is), on a slow lane as much longer, but `least_s` at least.

    Generous: durations depend on what is in a request, and a false alarm costs a reload. A model
    that was never profiled, because no chain uses it, has `unprofiled_s`.

    Long before, a batch is overdue: after `overdue_factor` times as long as that p99, or as the p95
    of what such batches took lately, but `overdue_least_s` at least. From then on its rows may be
    tried on another machine as well, when no later attempt could be in time.
    """

    factor: float = 20.0
    least_s: float = 10.0
    unprofiled_s: float = 120.0
    overdue_factor: float = 3.0
    overdue_least_s: float = 0.05

    def __post_init__(self) -> None:
        if not 1.0 <= self.overdue_factor <= self.factor < inf:
            raise ConfigError(
                f"a batch cannot be overdue after {self.overdue_factor:g} and hang after "
                f"{self.factor:g} times its p99: the first is 1 at least, the other not below it"
            )
        if not 0.0 < self.least_s < inf:
            raise ConfigError(f"no batch can hang after {self.least_s:g} s")

    def overdue_of(self, slow_s: float) -> float:
        """After how long a batch is overdue that hardly ever takes longer than `slow_s`."""
        return max(self.overdue_least_s, self.overdue_factor * slow_s)


class MachinePool:
    """All machines; see the module docstring."""

    def __init__(self, hang: HangLimits | None = None) -> None:
        self.learned = Learned()
        self._hang = hang or HangLimits()
        self._machines: dict[str, Machine] = {}
        self._incarnations: dict[str, int] = {}
        self._holders: dict[str, Holders] = {}
        """By model; none that no machine holds."""
        self.layout = 0
        """Another number whenever machines come, go, or hold other models or instances, and when
        plans need others.
        """
        self._usable: dict[Home, dict[str, int]] = {}
        """What `usable` found under this layout."""
        self._spare: dict[str, int] = {}
        """What `spare` found under this layout."""
        self._needed: Mapping[str, float] = {}
        self._parts: dict[tuple[Home, Home], float] = {}
        """What `part_of` found under this layout."""
        self.versions: dict[str, int] = {}
        """By model that some machine holds: another number whenever one of them changed at all."""
        self._changes = 0
        self.slots = 0
        """Batches that can run at a time in all."""

    def up(self, name: str, hardware: str, slots: int, instances: Mapping[str, int]) -> None:
        """A machine, new or changed; lanes keep what was learned of them."""
        machine = self._machines.get(name)
        if machine is None:
            incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
            machine = self._machines[name] = Machine(name, hardware, 0, incarnation)
        self._laid_out()
        self.slots += slots - machine.slots
        machine.slots = slots
        for model, lane in machine.lanes.items():
            if lane.instances == 0 and instances.get(model, 0) > 0:
                # Loaded afresh: what it did before says nothing any more.
                lane.failures, lane.blocked_until_s = 0, -inf
            lane.instances = instances.get(model, 0)
        for model, most in instances.items():
            if model not in machine.lanes:
                self._hold(machine, model, most)
        self._changed(machine)

    def down(self, name: str) -> None:
        """A machine is gone; its batches are reported on their own."""
        machine = self._machines.pop(name, None)
        if machine is None:
            return
        self._changed(machine)
        self._laid_out()
        machine.up = False
        self.learned.forget(name)
        self.slots -= machine.slots
        for model in machine.lanes:
            holders = self._holders[model]
            holders.remove(machine)
            if not holders.lanes:
                del self._holders[model], self.versions[model]

    def get(self, name: str) -> Machine | None:
        """A machine that is up."""
        return self._machines.get(name)

    def all(self) -> tuple[Machine, ...]:
        """Machines that are up, by name."""
        return tuple(machine for _, machine in sorted(self._machines.items()))

    def free(
        self, model: str, now_s: float, but: frozenset[tuple[str, int]] = frozenset()
    ) -> Sequence[Rank]:
        """Machines that can start a batch of `model` now, `but` those identities: the least busy
        first, then by name. To be looked at, not kept.
        """
        holders = self._holders.get(model)
        if holders is None:
            return ()
        free = holders.free(now_s)
        return [rank for rank in free if rank[2].identity not in but] if but else free

    def others(self, model: str, but: frozenset[tuple[str, int]], *, sound: bool = False) -> bool:
        """Whether any machine holds `model` besides those identities; `sound`: and works."""
        holders = self._holders.get(model)
        return holders is not None and any(
            lane.instances > 0 and machine.identity not in but and not (sound and lane.quarantined)
            for machine, lane in holders.lanes.values()
        )

    def is_up(self, identity: tuple[str, int]) -> bool:
        """Whether that machine is there, and has been since."""
        machine = self._machines.get(identity[0])
        return machine is not None and machine.identity == identity

    def works(self, model: str, kind: str) -> bool:
        """Whether a machine of that hardware holds the model and works."""
        holders = self._holders.get(model)
        return holders is not None and holders.works_on(kind)

    def spare(self, kind: str) -> int:
        """Slots of that hardware that nobody was planned for."""
        found = self._spare.get(kind)
        if found is None:
            slots = sum(m.slots for m in self._machines.values() if m.hardware == kind)
            left = slots - self._needed.get(kind, 0.0)
            found = self._spare[kind] = max(0, floor(left + NOTHING))
        return found

    def planned_for(self, needed: Mapping[str, float]) -> None:
        """By hardware the machines that plans have for all chains together."""
        self._needed = needed
        self._laid_out()

    def usable(self, home: Home) -> Mapping[str, int]:
        """How many slots it may use at a time, by hardware: all of the only one that it was planned
        for; of several and of others as many as it was planned for, and those that nobody was.
        """
        found = self._usable.get(home)
        if found is None:
            found = {kind: sum(slots.values()) for kind, slots in self._slots_on(home[0]).items()}
            for kind, most in self._limits(home, found).items():
                found[kind] = min(found[kind], most + self.spare(kind))
            self._usable[home] = found
        return found

    def slots_of(self, home: Home) -> int:
        """How many slots it may use at a time."""
        return sum(self.usable(home).values())

    def part_of(self, home: Home, other: Home) -> float:
        """What a second of work of `other`, spread over all slots that run it, takes of each slot
        that runs `home`; 0 where they share no machine.
        """
        found = self._parts.get((home, other))
        if found is None:
            found = self._parts[home, other] = self._part_of(home, other)
        return found

    def free_at_s(self, model: str, now_s: float) -> Sequence[float]:
        """When each slot that can run `model` is expected to be free, earliest first."""
        holders = self._holders.get(model)
        return holders.free_at_s(now_s) if holders is not None else ()

    def free_by_kind(self, model: str, now_s: float) -> Sequence[tuple[str, Sequence[float]]]:
        """The same by hardware."""
        holders = self._holders.get(model)
        return holders.free_by_kind(now_s) if holders is not None else ()

    def next_probe_s(self, model: str, now_s: float) -> float:
        """When a quarantined lane of `model` may be probed next; inf without any."""
        holders = self._holders.get(model)
        return holders.next_probe_s(now_s) if holders is not None else inf

    def expected_s(self, machine: Machine, route: ModuleRoute, rows: int) -> float | None:
        """How long a batch should take there; None without a profile."""
        profiled_s = route.duration_s(machine.hardware, rows)
        if profiled_s is None:
            return None
        return profiled_s * machine.lanes[route.model].slower(rows)

    def started(
        self, machine: Machine, route: ModuleRoute, rows: int, batch: int, now_s: float
    ) -> tuple[float, float]:
        """A batch went to a machine; returns after how long it counts as hanging, and the least
        after which it is overdue (`overdue_s`).
        """
        lane = machine.lanes[route.model]
        lane.running += 1
        machine.busy += 1
        self._changed(machine)
        known = route.durations.get(machine.hardware)
        if known is None:
            machine.ends_s[batch] = now_s
            return self._hang.unprofiled_s, inf
        ratio = lane.slower(rows)
        machine.ends_s[batch] = now_s + known.at(rows) * ratio
        slow_s = known.slow_at(rows) * (ratio if ratio > 1.0 else 1.0)
        hang = self._hang
        hang_s, overdue_s = hang.factor * slow_s, hang.overdue_factor * slow_s
        if hang_s < hang.least_s:
            hang_s = hang.least_s
        return hang_s, overdue_s if overdue_s > hang.overdue_least_s else hang.overdue_least_s

    def overdue_s(self, machine: Machine, route: ModuleRoute, rows: int) -> float:
        """After how long a batch is overdue, by all that is known; inf without a profile."""
        known = route.durations.get(machine.hardware)
        if known is None:
            return inf
        slow_s = known.slow_at(rows) * max(1.0, machine.lanes[route.model].slower(rows))
        lately_s = self.learned.p95_s(route.model, machine.name, machine.hardware, rows)
        return self._hang.overdue_of(max(slow_s, lately_s))

    def overdue(self, machine: Machine, model: str) -> None:
        """A batch of it is tried elsewhere: nothing more is sent there until it ends."""
        machine.lanes[model].overdue += 1
        self._changed(machine)

    def ended(self, machine: Machine, model: str, batch: int, *, overdue: bool = False) -> None:
        """A batch came back, one way or the other."""
        lane = machine.lanes[model]
        lane.running -= 1
        lane.overdue -= overdue
        machine.busy -= 1
        del machine.ends_s[batch]
        self._changed(machine)

    def succeeded(self, machine: Machine, route: ModuleRoute, rows: int, took_s: float) -> None:
        """The lane works: learn how fast, end a quarantine."""
        lane = machine.lanes[route.model]
        if lane.failures:
            lane.failures = 0
            lane.blocked_until_s = -inf
            self._changed(machine)
        self.learned.add(route.model, machine.name, machine.hardware, rows, took_s)
        profiled_s = route.duration_s(machine.hardware, rows)
        if profiled_s is None:
            return
        lane.took(rows, took_s / profiled_s)

    def broke(self, machine: Machine, model: str, now_s: float) -> bool:
        """The lane lost or garbled a batch: quarantine it. True when that is news."""
        lane = machine.lanes[model]
        news = not lane.failures
        backoff_s = min(FIRST_BACKOFF_S * 2**lane.failures, LONGEST_BACKOFF_S)
        lane.failures = min(lane.failures + 1, 16)
        lane.blocked_until_s = now_s + backoff_s
        self._changed(machine)
        return news

    def _hold(self, machine: Machine, model: str, instances: int) -> None:
        """A machine got another model."""
        lane = machine.lanes[model] = Lane(instances)
        holders = self._holders.get(model)
        if holders is None:
            holders = self._holders[model] = Holders(model)
        holders.add(machine, lane)

    def _part_of(self, home: Home, other: Home) -> float:
        own, others = self._slots_on(home[0]), self._slots_on(other[0])
        of_own, of_others = self._planned_on(home, own), self._planned_on(other, others)
        total = sum(of_own.values()) * sum(of_others.values())
        part = 0.0
        for kind in of_own:
            here, there = own[kind], others.get(kind, {})
            common = sum(slots for name, slots in here.items() if name in there)
            if common:
                # Of each what it uses of these, and of that what is on the same machines.
                used = of_own[kind] * of_others[kind] / total
                part += used * common / (sum(here.values()) * sum(there.values()))
        return part

    def _planned_on(self, home: Home, slots: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
        """Of these slots by hardware and machine those that it was planned for, by hardware."""
        found = {kind: sum(on.values()) for kind, on in slots.items()}
        for kind, most in self._limits(home, found).items():
            found[kind] = min(found[kind], most)
        return found

    @staticmethod
    def _limits(home: Home, slots: Mapping[str, int]) -> dict[str, int]:
        """How many slots it was planned for of these kinds, where that limits it: of all but the
        only one that it was planned for. It limits nothing where its main one is not there.
        """
        planned = dict(home[1])
        if not planned or not slots.get(home[1][0][0]):
            return {}
        main = "" if len(planned) > 1 else home[1][0][0]
        kinds = [kind for kind in slots if kind != main]
        return {kind: ceil(planned.get(kind, 0.0) - NOTHING) for kind in kinds}

    def _slots_on(self, model: str) -> dict[str, dict[str, int]]:
        """Slots of the machines that can run it, by hardware, then by name."""
        holders = self._holders.get(model)
        found: dict[str, dict[str, int]] = {}
        for machine, lane in holders.lanes.values() if holders is not None else ():
            if lane.instances > 0:
                found.setdefault(machine.hardware, {})[machine.name] = machine.slots
        return found

    def _laid_out(self) -> None:
        self.layout += 1
        self._parts.clear()
        self._usable.clear()
        self._spare.clear()

    def _changed(self, machine: Machine) -> None:
        """What was known of the models that it holds is so no more."""
        if not machine.up:
            return
        self._changes += 1
        name, holders, versions = machine.name, self._holders, self.versions
        for model in machine.lanes:
            versions[model] = self._changes
            holders[model].stale[name] = None
