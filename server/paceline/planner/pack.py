"""Loads that fill no machine of their own, packed onto shared machines (algorithms 1.4, Nexus 4.1).

Invariant: on a `Shared` machine one batch of every load runs in each duty cycle D: the batches'
durations add up to D at most, each batch holds what arrives in a cycle, and a request waits until
its batch is collected and executed: D + d(b) <= budget, for each. Models fit into the memory.
Where the module also has full machines, its batches are collected from one queue at the module's
whole rate T, of which the load is r: D * r / T + d(b) <= budget (pooled, algorithms 1.4).

Nexus's two worked cases: A (64 requests/s within 200 ms) has a duty cycle of 125 ms for its batch
of 8. B's 50 ms fit in beside A's 75 ms, C's 60 ms do not:

>>> def load(name, rate_rps, budget_s, b, d):
...     durations_s = [d * (b + size) / (2 * b) for size in range(1, b + 1)]
...     return Load("nexus", name, name, rate_rps, rate_rps, budget_s, {"gpu": durations_s})
>>> a = load("A", 64.0, 0.2, 8, 0.075)
>>> b, c = load("B", 32.0, 0.25, 4, 0.05), load("C", 32.0, 0.25, 4, 0.06)
>>> together([a, b], "gpu")
Cycle(duration_s=0.125, batch_sizes=(8, 4), busy=1.0)
>>> together([a, c], "gpu") is None
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf

SLACK = 1e-9
"""Rounding: seconds for times, relative for counts."""


@dataclass(frozen=True, slots=True)
class Load:
    """`rate_rps` of a module's `total_rps`. `durations_s` by hardware, for batches of 1, 2, ...

    `extra` says that the module has full machines elsewhere on some hardware, of which one more may
    serve this load alone, collecting from the module's whole rate.
    """

    chain: str
    module: str
    model: str
    rate_rps: float
    total_rps: float
    budget_s: float
    durations_s: Mapping[str, Sequence[float]]
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    extra: str = ""

    def longest_cycle_s(self, hardware: str) -> float:
        """The longest duty cycle within the budget; 0 if there is none."""
        longer = self.total_rps / self.rate_rps
        best_s = 0.0
        for size, duration_s in enumerate(self.durations_s[hardware], 1):
            within_s = (self.budget_s - duration_s) * longer
            if within_s <= best_s:
                break
            best_s = min(size / self.rate_rps, within_s)
        return best_s

    def worst_s(self, cycle_s: float, duration_s: float) -> float:
        """Collection and execution."""
        return cycle_s * self.rate_rps / self.total_rps + duration_s

    def alone(self, hardware: str) -> int:
        """The batch size with which a machine of its own serves it; 0 if none does.

        All of the module's machines take batches from one queue, which fills at its whole rate.
        """
        for size, duration_s in enumerate(self.durations_s.get(hardware, ()), 1):
            collection_s = 0.0 if size == 1 else size / self.total_rps
            if duration_s + collection_s > self.budget_s + SLACK:
                return 0
            if size >= self.rate_rps * duration_s * (1 - SLACK):
                return size
        return 0

    def batch_size(self, cycle_s: float) -> int:
        """What arrives within a cycle, in whole requests."""
        return max(1, ceil(self.rate_rps * cycle_s - 1e-6))


@dataclass(frozen=True, slots=True)
class Cycle:
    """A duty cycle, the batch of every load in it, and the share of it that is busy."""

    duration_s: float
    batch_sizes: tuple[int, ...]
    busy: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine as the packing sees it; `memory_bytes` 0: unknown, not checked."""

    hardware: str
    price_per_hour: float
    memory_bytes: int = 0
    limit: float = inf


def together(
    loads: Sequence[Load], hardware: str, longest_s: Sequence[float] | None = None
) -> Cycle | None:
    """The least busy duty cycle in which one machine serves `loads`, or None."""
    cycles_s = longest_s or [load.longest_cycle_s(hardware) for load in loads]
    most_s = min(cycles_s)
    if most_s <= 0:
        return None
    best: Cycle | None = None
    # Batches are whole: the cycle may be cut to where one of the loads has no request to spare.
    candidates = {most_s}
    for load in loads:
        if (count := floor(load.rate_rps * most_s + 1e-6)) >= 1:
            candidates.add(min(most_s, count / load.rate_rps))
    for cycle_s in sorted(candidates, reverse=True):
        found = _in_cycle(loads, hardware, cycle_s)
        if found and (best is None or found.busy < best.busy - SLACK):
            best = found
    return best


def _in_cycle(loads: Sequence[Load], hardware: str, cycle_s: float) -> Cycle | None:
    busy_s = 0.0
    sizes: list[int] = []
    for load in loads:
        size = load.batch_size(cycle_s)
        durations_s = load.durations_s[hardware]
        if size > len(durations_s):
            return None
        duration_s = durations_s[size - 1]
        busy_s += duration_s
        sizes.append(size)
        if (
            busy_s > cycle_s * (1 + SLACK)
            or load.worst_s(cycle_s, duration_s) > load.budget_s + SLACK
        ):
            return None
    return Cycle(cycle_s, tuple(sizes), busy_s / cycle_s)


@dataclass(slots=True)
class Shared:
    """One machine, its loads and their duty cycle.

    Without a cycle it serves one load as fast as it can, with batches of `batch_size` (0: as the
    module's full machines).
    """

    machine: Machine
    loads: list[Load]
    cycle: Cycle | None
    batch_size: int = 0

    @property
    def busy(self) -> float:
        return 1.0 if self.cycle is None else self.cycle.busy

    @property
    def memory_bytes(self) -> int:
        return _memory_bytes(self.loads, self.machine.hardware)


def _memory_bytes(loads: Iterable[Load], hardware: str) -> int:
    """A model that several loads use is resident once."""
    return sum({load.model: load.memory_bytes.get(hardware, 0) for load in loads}.values())


@dataclass(slots=True)
class Packing:
    """Shared machines that serve every load; grows by `add`."""

    machines: Mapping[str, Machine]
    used: dict[str, int]
    shared: list[Shared] = field(default_factory=list)
    _longest_s: dict[tuple[str, str, str], float] = field(default_factory=dict)

    @property
    def cost_per_hour(self) -> float:
        return sum(each.machine.price_per_hour for each in self.shared)

    def add(self, load: Load) -> bool:
        """Put `load` where it costs least: on a shared machine or a new one; False if nowhere."""
        best = self._cheapest_place(load, self.shared)
        if best is not None:
            at, cycle = best
            at.loads.append(load)
            at.cycle = cycle
            return True
        return self._open(load)

    def _cheapest_place(self, load: Load, among: Sequence[Shared]) -> tuple[Shared, Cycle] | None:
        best: tuple[float, Shared, Cycle] | None = None
        for each in among:
            cycle = self._joined(each, load)
            if cycle is not None:
                added = (cycle.busy - each.busy) * each.machine.price_per_hour
                if best is None or added < best[0] - SLACK:
                    best = (added, each, cycle)
        return None if best is None else best[1:]

    def _joined(self, each: Shared, load: Load) -> Cycle | None:
        hardware = each.machine.hardware
        if each.cycle is None or each.busy > 1 - 1e-3 or hardware not in load.durations_s:
            return None
        loads = [*each.loads, load]
        most_bytes = self.machines[hardware].memory_bytes
        if most_bytes and _memory_bytes(loads, hardware) > most_bytes:
            return None
        return together(loads, hardware, [self._longest(one, hardware) for one in loads])

    def _longest(self, load: Load, hardware: str) -> float:
        key = (load.chain, load.module, hardware)
        if key not in self._longest_s:
            self._longest_s[key] = load.longest_cycle_s(hardware)
        return self._longest_s[key]

    def _open(self, load: Load) -> bool:
        best: tuple[float, Machine, Cycle | None, int] | None = None
        for hardware, machine in sorted(self.machines.items()):
            if self.used.get(hardware, 0) >= machine.limit:
                continue
            memory_bytes = load.memory_bytes.get(hardware, 0)
            if machine.memory_bytes and memory_bytes > machine.memory_bytes:
                continue
            cycle = together([load], hardware) if hardware in load.durations_s else None
            size = load.alone(hardware) if cycle is None else 0
            if cycle is None and not size and load.extra != hardware:
                continue
            share = machine.price_per_hour * (1.0 if cycle is None else cycle.busy)
            if best is None or share < best[0]:
                best = (share, machine, cycle, size)
        if best is None:
            return False
        self.used[best[1].hardware] = self.used.get(best[1].hardware, 0) + 1
        self.shared.append(Shared(best[1], [load], best[2], best[3]))
        return True

    def drop(self, each: Shared) -> None:
        self.shared.remove(each)
        self.used[each.machine.hardware] -= 1

    def dissolve(self) -> bool:
        """Empty a machine into the others, or move its loads to a cheaper one; False if none."""
        for each in sorted(self.shared, key=lambda s: (s.busy, -s.machine.price_per_hour)):
            if self._spread(each) or self._cheaper_host(each):
                return True
        return False

    def _spread(self, each: Shared) -> bool:
        others = [other for other in self.shared if other is not each]
        before = [(other, list(other.loads), other.cycle) for other in others]
        for load in sorted(each.loads, key=lambda one: -one.rate_rps):
            place = self._cheapest_place(load, others)
            if place is None:
                for other, loads, cycle in before:
                    other.loads, other.cycle = loads, cycle
                return False
            place[0].loads.append(load)
            place[0].cycle = place[1]
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
            if any(hardware not in load.durations_s for load in each.loads):
                continue
            if machine.memory_bytes and _memory_bytes(each.loads, hardware) > machine.memory_bytes:
                continue
            cycle = together(each.loads, hardware)
            size = each.loads[0].alone(hardware) if len(each.loads) == 1 else 0
            if cycle is not None or size:
                self.used[each.machine.hardware] -= 1
                self.used[hardware] = self.used.get(hardware, 0) + 1
                each.machine, each.cycle, each.batch_size = machine, cycle, size
                return True
        return False


def pack(
    loads: Sequence[Load], machines: Mapping[str, Machine], used: Mapping[str, int]
) -> Packing | None:
    """The cheapest packing found of `loads`; `used` machines count towards the limits.

    None when a limit leaves no machine for a load.
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
    return best


def _orders(loads: Sequence[Load], machines: Mapping[str, Machine]) -> list[list[Load]]:
    """Largest first, and grouped by how long their duty cycles may be."""
    size: dict[tuple[str, str], float] = {}
    cycle_s: dict[tuple[str, str], float] = {}
    for load in loads:
        alone = [
            (machines[hardware].price_per_hour * found.busy, found)
            for hardware in sorted(load.durations_s)
            if hardware in machines and (found := together([load], hardware)) is not None
        ]
        key = (load.chain, load.module)
        size[key] = min((cost for cost, _ in alone), default=inf)
        cycle_s[key] = max((found.duration_s for _, found in alone), default=0.0)

    def name(load: Load) -> tuple[str, str]:
        return (load.chain, load.module)

    return [
        sorted(loads, key=lambda one: (-size[name(one)], name(one))),
        sorted(loads, key=lambda one: (-cycle_s[name(one)], -size[name(one)], name(one))),
        sorted(loads, key=lambda one: (cycle_s[name(one)], -size[name(one)], name(one))),
    ]
