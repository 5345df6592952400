"""Which machines hold a model, which of them can start a batch of it, and when the others can.

With hundreds of machines these questions, asked several times for every event, must not look at
all of them: what each machine adds to the answers is kept in order, and put right for those alone
that changed since the last question (`stale`). Invariant: what a lane has added stands in the
lane, so that it can be taken away again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

LEARNING_WEIGHT = 0.1
"""Of the newest batch in what is learned of a lane."""
STRAGGLER_RATIO = 1.5
STRAGGLER_BATCHES = 20
"""A lane is a straggler when it has been that much slower than profiled over that many batches."""
REMEMBERED_BATCHES = 32
"""What is known of a batch size says nothing any more after so many batches of others."""

Rank = tuple[int, str, "Machine"]
"""Batches that a machine executes, its name, and the machine: the least busy sorts first."""


@dataclass(slots=True)
class Lane:
    """One model on one machine."""

    instances: int
    running: int = 0
    ratio: float = 1.0
    """What its batches take over what the profile says, whatever their size."""
    ratios: dict[int, tuple[float, int]] = field(default_factory=dict)
    """The same by rows of a batch, of those that were executed, and which batch was the last."""
    batches: int = 0
    failures: int = 0
    overdue: int = 0
    """Batches it executes that take so long that they are tried elsewhere."""
    blocked_until_s: float = -inf
    rank: Rank | None = None
    """Its place among those that can start a batch, as `Holders` has it; None where it cannot."""
    idle: int = 0
    """How many batches it could start at once, as `Holders` has it."""
    ends_s: Sequence[float] = ()
    """When it could start one more each, as `Holders` has it."""
    sound: bool = False
    """Whether it has instances and works, as `Holders` has it."""

    @property
    def quarantined(self) -> bool:
        """Whether its last batch failed in a way that says the lane is broken, or does not end."""
        return self.failures > 0 or self.overdue > 0

    def slower(self, rows: int) -> float:
        """What a batch of so many rows is expected to take over what the profile says."""
        known = self.ratios.get(rows)
        if known is None or self.batches - known[1] > REMEMBERED_BATCHES:
            return self.ratio
        return known[0]

    def took(self, rows: int, ratio: float) -> None:
        """A batch of so many rows took `ratio` times what the profile says.

        A stall, or the first execution of a process, takes ten times as long and says nothing of
        those to come: a batch counts as `STRAGGLER_RATIO` times what was expected at most.
        """
        self.batches += 1
        self.ratios[rows] = _learned(self.slower(rows), ratio), self.batches
        self.ratio = _learned(self.ratio, ratio)

    @property
    def straggling(self) -> bool:
        return self.batches >= STRAGGLER_BATCHES and self.ratio > STRAGGLER_RATIO

    def probed(self, now_s: float) -> bool:
        """Whether a quarantined lane may be tried again."""
        return self.running == 0 and self.instances > 0 and now_s >= self.blocked_until_s


@dataclass(slots=True, eq=False)
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


class _Slots:
    """Slots of one kind of hardware: how many are free, and when the others are, in order."""

    __slots__ = ("ends_s", "idle")

    def __init__(self) -> None:
        self.idle = 0
        self.ends_s: list[float] = []


class Holders:
    """All machines that hold one model; see the module docstring."""

    __slots__ = ("_free", "_quarantined", "_slots", "_sound", "lanes", "model", "stale")

    def __init__(self, model: str) -> None:
        self.model = model
        self.lanes: dict[str, tuple[Machine, Lane]] = {}
        """By the machine's name."""
        self.stale: dict[str, None] = {}
        """Machines that changed since the last question (an ordered set)."""
        self._free: list[Rank] = []
        self._slots: dict[str, _Slots] = {}
        """By hardware; none of which there is no machine that works."""
        self._sound: dict[str, int] = {}
        """How many machines have it and work, by hardware."""
        self._quarantined: dict[str, None] = {}

    def free(self, now_s: float) -> Sequence[Rank]:
        """Machines that can start a batch now, the least busy first, then by name."""
        if self.stale:
            self._renew()
        if not self._quarantined:
            return self._free
        probes = [
            (machine.busy, machine.name, machine)
            for machine, lane in map(self.lanes.__getitem__, self._quarantined)
            if machine.busy < machine.slots and lane.probed(now_s)
        ]
        return sorted([*self._free, *probes]) if probes else self._free

    def works_on(self, kind: str) -> bool:
        """Whether a machine of that hardware has it and works."""
        if self.stale:
            self._renew()
        return self._sound.get(kind, 0) > 0

    def free_at_s(self, now_s: float) -> list[float]:
        """When each slot that can run the model is expected to be free, earliest first."""
        kinds = self.free_by_kind(now_s)
        if len(kinds) == 1:
            return kinds[0][1]
        return sorted([at_s for _, free_s in kinds for at_s in free_s])

    def free_by_kind(self, now_s: float) -> list[tuple[str, list[float]]]:
        """The same by hardware."""
        if self.stale:
            self._renew()
        found = []
        for kind, slots in self._slots.items():
            ends_s = slots.ends_s
            over = bisect_right(ends_s, now_s)
            found.append((kind, [now_s] * (slots.idle + over) + ends_s[over:]))
        return found

    def next_probe_s(self, now_s: float) -> float:
        """When a quarantined lane may be probed next; inf without any."""
        if self.stale:
            self._renew()
        waits_s = (self.lanes[name][1].blocked_until_s for name in self._quarantined)
        return min((at_s for at_s in waits_s if at_s > now_s), default=inf)

    def add(self, machine: Machine, lane: Lane) -> None:
        """A machine got the model."""
        self.lanes[machine.name] = (machine, lane)
        self.stale[machine.name] = None

    def remove(self, machine: Machine) -> None:
        """A machine went down."""
        _, lane = self.lanes.pop(machine.name)
        self.stale.pop(machine.name, None)
        self._quarantined.pop(machine.name, None)
        self._take_away(machine, lane)

    def machines(self) -> Iterator[Machine]:
        for machine, _ in self.lanes.values():
            yield machine

    def _renew(self) -> None:
        for name in self.stale:
            machine, lane = self.lanes[name]
            self._take_away(machine, lane)
            if lane.quarantined:
                self._quarantined[name] = None
            else:
                self._quarantined.pop(name, None)
                self._count_in(machine, lane)
        self.stale.clear()

    def _take_away(self, machine: Machine, lane: Lane) -> None:
        if lane.rank is not None:
            del self._free[bisect_left(self._free, lane.rank)]
            lane.rank = None
        if lane.sound:
            lane.sound = False
            self._sound[machine.hardware] -= 1
        slots = self._slots.get(machine.hardware)
        if slots is None:
            return
        slots.idle -= lane.idle
        lane.idle = 0
        if lane.ends_s:
            for end_s in lane.ends_s:
                del slots.ends_s[bisect_left(slots.ends_s, end_s)]
            lane.ends_s = ()
        if not slots.idle and not slots.ends_s:
            del self._slots[machine.hardware]

    def _count_in(self, machine: Machine, lane: Lane) -> None:
        if lane.instances > 0:
            # Also while it has no slots: a machine that rests (`sim.fleet`) has them again soon.
            lane.sound = True
            self._sound[machine.hardware] = self._sound.get(machine.hardware, 0) + 1
        idle = machine.slots - machine.busy
        most = min(machine.slots, lane.instances)
        if most > 0:
            slots = self._slots.get(machine.hardware)
            if slots is None:
                slots = self._slots[machine.hardware] = _Slots()
            if idle >= most:
                lane.idle = most
            else:
                # A machine that lost slots has to end as many batches before one can start.
                lane.idle = max(0, idle)
                lane.ends_s = sorted(machine.ends_s.values())[max(0, -idle) : most - idle]
                for end_s in lane.ends_s:
                    insort(slots.ends_s, end_s)
            slots.idle += lane.idle
        if idle > 0 and lane.running < lane.instances:
            lane.rank = (machine.busy, machine.name, machine)
            insort(self._free, lane.rank)


def _learned(known: float, ratio: float) -> float:
    """Exponentially weighted."""
    most = STRAGGLER_RATIO * known
    return known + LEARNING_WEIGHT * ((ratio if ratio < most else most) - known)
