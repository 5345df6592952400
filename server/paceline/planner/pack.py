"""Loads that fill no machine of their own, packed onto shared machines (algorithms 1.4).

Invariant: a `Shared` machine serves its loads by urgency (`urgency.Due`), in a duty cycle (`cycle`)
or, if it serves one load alone, as fast as it can. Models fit into its memory.

Urgency is what the dispatcher does, and suits modules that cannot wait for a whole cycle; a cycle
suits batches that fill it exactly. A machine keeps whichever its loads allow. By urgency a load may
be divided among machines, so that they fill up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from paceline.planner.cycle import SLACK, Cycle, Load, Size, together
from paceline.planner.schedule import TOLERANCE
from paceline.planner.urgency import Due, Stream

PARTS = 3
"""Among how many machines a load may be divided."""

WAITS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
"""Shares of the longest wait for which batch sizes are made small enough, one after the other."""

TRIES, TRIES_EACH, AT_ONCE = 300, 6, 5
"""How often machines are packed anew: at most, and for each of them; 2 to `AT_ONCE` + 1 at once."""

LEAST_PART = 0.03
"""The share of a machine below which a part is not worth its model's memory."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine as the packing sees it; `memory_bytes` 0: unknown, not checked."""

    hardware: str
    price_per_hour: float
    memory_bytes: int = 0
    limit: float = inf


@dataclass(slots=True, eq=False)
class Shared:
    """One machine and its loads, with the batch size of each when they go by urgency.

    With neither `due` nor `cycle` it serves one load as fast as it can, with batches of
    `batch_size` (0: as the module's full machines). `joined` and `room` remember what it was found
    to be with a load more, and how much of one it has time for: a packing asks again and again.
    """

    machine: Machine
    loads: tuple[Load, ...]
    sizes: tuple[Size, ...] = ()
    due: Due | None = None
    cycle: Cycle | None = None
    batch_size: int = 0
    joined: dict[_Ask, Shared | None] = field(default_factory=dict, repr=False)
    room: dict[_Ask, _Room | None] = field(default_factory=dict, repr=False)

    @property
    def busy(self) -> float:
        if self.cycle is not None:
            return self.cycle.busy
        return 1.0 if self.due is None else self.due.busy

    @property
    def memory_bytes(self) -> int:
        return _memory_bytes(self.loads, self.machine.hardware)

    def take(self, other: Shared) -> None:
        """Become what `other` is."""
        self.machine, self.loads, self.sizes = other.machine, other.loads, other.sizes
        self.due, self.cycle, self.batch_size = other.due, other.cycle, other.batch_size
        self.joined, self.room = other.joined, other.room


def _stream(load: Load, size: Size) -> Stream:
    return Stream(size.duration_s, size.deadline_s, load.rate_rps * size.row_s, load.jitter_s)


def due_of(loads: Sequence[Load], sizes: Sequence[Size]) -> Due:
    """These loads by urgency, in these batch sizes."""
    return Due.of(tuple(_stream(*pair) for pair in zip(loads, sizes, strict=True)))


def _that_waits(sizes: Sequence[Size], wait_s: float) -> Size:
    """The first that can wait so long; the last can wait the longest."""
    for size in sizes:
        if size.deadline_s - size.duration_s >= wait_s:
            return size
    return sizes[-1]


def _memory_bytes(loads: Iterable[Load], hardware: str) -> int:
    """A model that several loads use is resident once."""
    return sum({load.model: load.memory_bytes.get(hardware, 0) for load in loads}.values())


_Key = tuple[str, str, str, float]
"""Chain, module, hardware and budget."""

_Ask = tuple[str, str, float, float, bool]
"""A load, in one packing: chain, module, rate, jitter, and whether it is a part."""

_Room = tuple[float, Size, float]
"""The rate that a machine has time for, its batch size, and the jitter of such a part."""


def _ask(load: Load) -> _Ask:
    return (load.chain, load.module, load.rate_rps, load.jitter_s, load.part)


@dataclass(frozen=True, slots=True)
class _State:
    """What every machine was, which there were, and how many were used."""

    then: list[Shared]
    shared: list[Shared]
    used: dict[str, int]
    cost_per_hour: float


@dataclass(slots=True)
class Packing:
    """Shared machines that serve every load; grows by `add`."""

    machines: Mapping[str, Machine]
    used: dict[str, int]
    shared: list[Shared] = field(default_factory=list)
    _sizes: dict[_Key, tuple[Size, ...]] = field(default_factory=dict)
    _cycles_s: dict[_Key, float] = field(default_factory=dict)

    @property
    def cost_per_hour(self) -> float:
        return sum(each.machine.price_per_hour for each in self.shared)

    def add(self, load: Load) -> bool:
        """Put `load` where it costs least: on shared machines or a new one; False if nowhere."""
        if (places := self.places(load, self.shared)) is not None:
            for each, then in places:
                each.take(then)
            return True
        return self._open(load)

    def places(self, load: Load, among: Sequence[Shared]) -> list[tuple[Shared, Shared]] | None:
        """Machines that can serve it beside what they do, and what each then is; None if none."""
        best: tuple[float, Shared, Shared] | None = None
        ask = _ask(load)
        for each in among:
            if ask not in each.joined:
                each.joined[ask] = self._joined(each, load)
            if (then := each.joined[ask]) is not None:
                added = (then.busy - each.busy) * each.machine.price_per_hour
                if best is None or added < best[0] - SLACK:
                    best = (added, each, then)
        return self._divided(load, among) if best is None else [best[1:]]

    def _divided(self, load: Load, among: Sequence[Shared]) -> list[tuple[Shared, Shared]] | None:
        """The same in parts, the largest first."""
        offers: list[tuple[float, int, Shared, Size, float]] = []
        ask = _ask(load)
        for at, each in enumerate(among):
            if ask not in each.room:
                each.room[ask] = self._room(each, load)
            if (room := each.room[ask]) is not None:
                most_rps, size, jitter_s = room
                offers.append((most_rps, -at, each, size, jitter_s))
        offers.sort(key=lambda offer: (-offer[0], -offer[1]))
        left_rps = load.rate_rps
        found: list[tuple[Shared, Shared]] = []
        for most_rps, _, each, size, jitter_s in offers[:PARTS]:
            taken_rps = min(most_rps * (1 - SLACK), left_rps)
            part = replace(load, rate_rps=taken_rps, jitter_s=jitter_s, part=True)
            found.append((each, self._with(each, part, size)))
            left_rps -= taken_rps
            if left_rps <= SLACK * load.rate_rps:
                return found
        return None

    def _room(self, each: Shared, load: Load) -> _Room | None:
        """What the machine has time for of the load, in the batch size that gets the most done."""
        if each.due is None or each.due.busy > 1 - LEAST_PART:
            return None
        sizes = self.sizes_of(load, each.machine.hardware)
        if not sizes or not self._fits(each, load):
            return None
        jitter_s = max(load.jitter_s, max(s.batch_size for s in sizes) / load.total_rps)
        rooms = [
            (each.due.room(s.duration_s, s.deadline_s, jitter_s) / s.row_s, -i)
            for i, s in enumerate(sizes)
        ]
        most_rps, i = max(rooms)
        size = sizes[-i]
        return (most_rps, size, jitter_s) if most_rps * size.row_s > LEAST_PART else None

    def _joined(self, each: Shared, load: Load) -> Shared | None:
        hardware = each.machine.hardware
        if each.busy > 1 - 1e-3 or hardware not in load.durations_s or not self._fits(each, load):
            return None
        loads = (*each.loads, load)
        if sum(self._least_busy(one, hardware) for one in loads) > 1:
            return None
        whole = not any(one.part for one in loads)
        if whole and (each.cycle is not None or len(each.loads) == 1):
            cycle = together(loads, hardware, [self._longest_s(one, hardware) for one in loads])
            if cycle is not None:
                return Shared(each.machine, loads, cycle=cycle)
        if each.due is not None:
            for size in self.sizes_of(load, hardware):
                busy = load.rate_rps * size.row_s
                if each.due.room(size.duration_s, size.deadline_s, load.jitter_s) >= busy:
                    return self._with(each, load, size)
        return self._resized(each, load) if each.due is not None else None

    def _resized(self, each: Shared, load: Load) -> Shared | None:
        """With smaller batches for everybody, so that each can wait for the others'."""
        loads = (*each.loads, load)
        sizes = [self.sizes_of(one, each.machine.hardware) for one in loads]
        if not all(sizes):
            return None
        waits_s = [own[-1].deadline_s - own[-1].duration_s for own in sizes]
        shortest_s = [own[-1].duration_s for own in sizes]
        # Of two, each has to wait for the other's batch: that one may have begun, or is due first.
        for at, wait_s in enumerate(waits_s):
            if max(shortest_s[:at] + shortest_s[at + 1 :]) > wait_s + TOLERANCE:
                return None
        longest_s = max(waits_s)
        known: tuple[Size, ...] = ()
        for share in WAITS:
            chosen = tuple(
                _that_waits(own, min(wait_s, longest_s * share))
                for own, wait_s in zip(sizes, waits_s, strict=True)
            )
            if chosen == known:
                continue
            known = chosen
            due = due_of(loads, chosen)
            if due.busy > 1:
                return None
            if due.in_time:
                return Shared(each.machine, loads, chosen, due)
        return None

    def _with(self, each: Shared, load: Load, size: Size) -> Shared:
        loads, sizes = (*each.loads, load), (*each.sizes, size)
        return Shared(each.machine, loads, sizes, due_of(loads, sizes))

    def _fits(self, each: Shared, load: Load) -> bool:
        if any(one.module == load.module and one.chain == load.chain for one in each.loads):
            return False
        hardware = each.machine.hardware
        most_bytes = self.machines[hardware].memory_bytes
        return not most_bytes or _memory_bytes((*each.loads, load), hardware) <= most_bytes

    def sizes_of(self, load: Load, hardware: str) -> tuple[Size, ...]:
        key = (load.chain, load.module, hardware, load.budget_s)
        if key not in self._sizes:
            self._sizes[key] = load.sizes(hardware)
        return self._sizes[key]

    def _least_busy(self, load: Load, hardware: str) -> float:
        """Of its time that a machine needs at least; batches that cannot wait included."""
        sizes = self.sizes_of(load, hardware)
        return load.rate_rps * sizes[0].row_s if sizes else inf

    def _longest_s(self, load: Load, hardware: str) -> float:
        key = (load.chain, load.module, hardware, load.budget_s)
        if key not in self._cycles_s:
            self._cycles_s[key] = load.longest_cycle_s(hardware)
        return self._cycles_s[key]

    def alone(self, load: Load, machine: Machine) -> Shared | None:
        """A machine of that kind with this load only."""
        hardware = machine.hardware
        if machine.memory_bytes and load.memory_bytes.get(hardware, 0) > machine.memory_bytes:
            return None
        if hardware not in load.durations_s:
            return Shared(machine, (load,)) if load.extra == hardware else None
        cycle = None if load.part else together([load], hardware)
        sizes = self.sizes_of(load, hardware)
        for size in sizes:
            busy = load.rate_rps * size.row_s
            # Rather a size that leaves time for others' batches of the same length.
            waits = size.deadline_s >= 2 * size.duration_s or size is sizes[-1]
            if waits and Due().room(size.duration_s, size.deadline_s, load.jitter_s) >= busy:
                return Shared(machine, (load,), (size,), due_of((load,), (size,)), cycle)
        if cycle is not None:
            return Shared(machine, (load,), cycle=cycle)
        if (batch_size := load.alone(hardware)) or load.extra == hardware:
            return Shared(machine, (load,), batch_size=batch_size)
        return None

    def _open(self, load: Load) -> bool:
        best: tuple[float, Shared] | None = None
        for hardware, machine in sorted(self.machines.items()):
            if self.used.get(hardware, 0) >= machine.limit:
                continue
            if (found := self.alone(load, machine)) is not None:
                share = machine.price_per_hour * found.busy
                if best is None or share < best[0]:
                    best = (share, found)
        if best is None:
            return False
        hardware = best[1].machine.hardware
        self.used[hardware] = self.used.get(hardware, 0) + 1
        self.shared.append(best[1])
        return True

    def _state(self) -> _State:
        return _State(
            [replace(each) for each in self.shared],
            list(self.shared),
            dict(self.used),
            self.cost_per_hour,
        )

    def _restore(self, was: _State) -> None:
        for each, then in zip(was.shared, was.then, strict=True):
            each.take(then)
        self.shared[:] = was.shared
        self.used.clear()
        self.used.update(was.used)

    def drop(self, each: Shared) -> None:
        self.shared.remove(each)
        self.used[each.machine.hardware] -= 1

    def dissolve(self) -> bool:
        """Empty machines into the others, or move their loads to cheaper ones; False if none."""
        found = False
        for each in sorted(self.shared, key=lambda s: (s.busy, -s.machine.price_per_hour)):
            if self._spread(each) or self._cheaper_host(each):
                found = True
        return found

    def again(self) -> None:
        """Empty a few machines at once and pack their loads anew, wherever that helps."""
        tries = min(TRIES, TRIES_EACH * len(self.shared))
        for at in range(tries if len(self.shared) > 1 else 0):
            by_idle = sorted(self.shared, key=lambda s: (s.busy - 1) * s.machine.price_per_hour)
            first, stride = at % len(by_idle), 1 + at // len(by_idle)
            chosen = by_idle[first::stride][: 2 + at % AT_ONCE]
            loads = sorted(
                (load for each in chosen for load in each.loads),
                key=lambda load: self._rank(load, at % 3),
            )
            self._anew(chosen, loads)

    def _rank(self, load: Load, order: int) -> tuple[float, str, str]:
        """Least for what is packed first: the largest, the tightest, or what has most time."""
        waits = [
            sizes[-1].deadline_s / sizes[-1].duration_s
            for hardware in load.durations_s
            if (sizes := self.sizes_of(load, hardware))
        ]
        wait = max(waits, default=0.0)
        busy = min((self._least_busy(load, h) for h in load.durations_s), default=inf)
        return ((-busy, wait, -wait)[order], load.chain, load.module)

    def _anew(self, chosen: Sequence[Shared], loads: Sequence[Load]) -> None:
        """Pack `loads` without the machines `chosen`; back to as it was if that does not help.

        At the same cost it helps if some machines get fuller and others emptier.
        """
        was, crowded = self._state(), self._crowded()
        for each in chosen:
            self.drop(each)
        for load in loads:
            if self.cost_per_hour > was.cost_per_hour + SLACK or not self.add(load):
                self._restore(was)
                return
        saved = was.cost_per_hour - self.cost_per_hour
        if saved < -SLACK or (saved <= SLACK and self._crowded() <= crowded + SLACK):
            self._restore(was)

    def _crowded(self) -> float:
        """Larger if some machines are full and others empty than if all are half full."""
        return sum(each.machine.price_per_hour * each.busy**2 for each in self.shared)

    def _spread(self, each: Shared) -> bool:
        others = [other for other in self.shared if other is not each]
        before: list[tuple[Shared, Shared]] = []
        for load in sorted(each.loads, key=lambda one: -one.rate_rps):
            places = self.places(load, others)
            if places is None:
                for other, was in reversed(before):
                    other.take(was)
                return False
            for other, then in places:
                before.append((other, replace(other)))
                other.take(then)
        self.drop(each)
        return True

    def _cheaper_host(self, each: Shared) -> bool:
        for hardware, machine in sorted(
            self.machines.items(), key=lambda pair: pair[1].price_per_hour
        ):
            if machine.price_per_hour >= each.machine.price_per_hour * (1 - SLACK):
                break
            if self.used.get(hardware, 0) >= machine.limit:
                continue
            found = self.alone(each.loads[0], machine)
            for load in each.loads[1:]:
                found = found and self._joined(found, load)
            if found:
                self.used[each.machine.hardware] -= 1
                self.used[hardware] = self.used.get(hardware, 0) + 1
                each.take(found)
                return True
        return False


def pack(
    loads: Sequence[Load],
    machines: Mapping[str, Machine],
    used: Mapping[str, int],
    *,
    thorough: bool = True,
) -> Packing | None:
    """The cheapest packing found of `loads`; `used` machines count towards the limits.

    None when a limit leaves no machine for a load. Without `thorough` the first order that
    leaves none without one is enough, and machines are not packed anew.
    """
    best: Packing | None = None
    for order in _orders(loads, machines):
        packing = Packing(machines, dict(used))
        if not all(packing.add(load) for load in order):
            continue
        while packing.dissolve():
            pass
        if best is None or packing.cost_per_hour < best.cost_per_hour - SLACK:
            best = packing
        if not thorough:
            return best
    if best is not None:
        best.again()
        while best.dissolve():
            pass
    return best


def _orders(loads: Sequence[Load], machines: Mapping[str, Machine]) -> list[list[Load]]:
    """Largest first, and those first that can wait the least."""
    size: dict[tuple[str, str], float] = {}
    wait_s: dict[tuple[str, str], float] = {}
    for load in loads:
        found = [
            (machines[hardware].price_per_hour * load.rate_rps * each.row_s, each)
            for hardware in sorted(load.durations_s)
            if hardware in machines
            for each in load.sizes(hardware)
        ]
        key = (load.chain, load.module)
        size[key] = min((cost for cost, _ in found), default=inf)
        wait_s[key] = max((s.deadline_s - s.duration_s for _, s in found), default=0.0)

    def name(load: Load) -> tuple[str, str]:
        return (load.chain, load.module)

    return [
        sorted(loads, key=lambda one: (-size[name(one)], name(one))),
        sorted(loads, key=lambda one: (-wait_s[name(one)], -size[name(one)], name(one))),
        sorted(loads, key=lambda one: (wait_s[name(one)], -size[name(one)], name(one))),
    ]
