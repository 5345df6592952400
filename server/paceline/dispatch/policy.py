"""Dispatch policies: when a batch is closed, and which machine collects it.

One interface, `Collector`, a module each. All close a batch when it is full or when its oldest
request's slack has run out (its launch-by time has come).

* **pooled** (ours; worst case `d + b/T`): one queue. A batch that is neither full nor out of
  slack is also launched when waiting could not fill it before a machine idles anyway: when, after
  launching it now, a machine will be free for every full batch that the planned rate can form.
  With sorted expected free times `f_1 <= f_2 <= ...`: `f_j <= now + j b/T` for all j. At low load
  nobody waits; at planned load machines stay staggered and the bound holds.
* **throughput-cost** (Harpagon 1.1; full machines `d + b/w`): allocations ranked by
  throughput-cost ratio; whole batches are cut from the stream, the best rank that is due first.
  A rank of n machines is due every `d/n`; what no rank is due for goes to the next one.
* **round-robin** (what Nexus does; `2d`): every machine has a queue of its own, requests are dealt
  out in proportion to throughput.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf, nextafter
from typing import Protocol

from paceline.core.plan import Allocation
from paceline.core.values import value
from paceline.dispatch.machines import Machine, MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue, Order, Piece
from paceline.dispatch.route import ChainRoute, ModuleRoute

WORTHWHILE = 0.75
"""The share of a full batch below which it is not shrunk to save its most urgent request."""

_TIE_S = 1e-9
"""Instants this close are the same: planned rates fill batches exactly when machines free up."""


@value
class Offer:
    """A batch that could be launched now. `closed` ones go first, then by `order`."""

    queue: ModuleQueue
    head: Entry
    machine: Machine
    size: int
    closed: bool
    lot: int = 0

    @property
    def rank(self) -> tuple[bool, Order]:
        return (not self.closed, self.head.order)

    def led_by(self, entry: Entry) -> Offer:
        """The batch of the same queue that starts with another entry."""
        return replace(self, head=entry)

    def take(self) -> tuple[Piece, ...]:
        """Its rows, taken out of the queue."""
        return tuple(self.queue.take(self.size, self.head))


class Collector(Protocol):
    """One module's waiting rows under one policy."""

    route: ModuleRoute

    @property
    def rows(self) -> int:
        """Rows waiting."""
        ...

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
        """Queue an entry; returns it, or the parts it was split into."""
        ...

    def discard(self, entry: Entry) -> None:
        """Forget what is left of an entry."""
        ...

    def queues(self) -> Iterator[ModuleQueue]:
        """Every queue it has, for expiry and for looking."""
        ...

    def doomed(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """Take out entries that would be late even if launched now, in a batch worth its time.

        Behind a full batch's worth of rows, an entry past its launch-by time could only be saved
        by a smaller batch, at the cost of those behind it, which then are late in turn.
        """
        ...

    def offer(self, pool: MachinePool, now_s: float) -> Offer | None:
        """The batch to launch next, or None."""
        ...

    def next_offer_s(self, pool: MachinePool, now_s: float) -> float | None:
        """When time alone could make it offer something; None if only an event can."""
        ...

    def launched(self, offer: Offer) -> None:
        """An offer was taken up."""
        ...

    def ended(self, lot: int) -> None:
        """A batch of that lot came back."""
        ...


def collector(chain: ChainRoute, route: ModuleRoute) -> Collector:
    """The module's collector under its chain's policy; unplanned modules are always pooled."""
    if chain.policy == "throughput-cost" and route.allocations:
        return ThroughputCost(route)
    if chain.policy == "round-robin" and route.allocations:
        return RoundRobin(route)
    return Pooled(route)


class Pooled:
    """One queue for all machines; see the module docstring."""

    __slots__ = ("_queue", "route")

    def __init__(self, route: ModuleRoute) -> None:
        self.route = route
        self._queue = ModuleQueue(route)

    @property
    def rows(self) -> int:
        return self._queue.rows

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
        self._queue.add(entry)
        return [entry]

    def discard(self, entry: Entry) -> None:
        self._queue.discard(entry)

    def queues(self) -> Iterator[ModuleQueue]:
        yield self._queue

    def doomed(self, pool: MachinePool, now_s: float) -> list[Entry]:
        gone: list[Entry] = []
        while (head := self._queue.head()) is not None and now_s > head.launch_by_s + _TIE_S:
            machine = self._machine(pool, head, now_s)
            if machine is None:
                break
            size = self.route.batch_size(machine.hardware)
            if size == 1 or self._queue.rows_like(head, size) < size:
                break
            if _in_time(head, machine, size, now_s) >= WORTHWHILE * size:
                break
            self._queue.discard(head)
            gone.append(head)
        return gone

    def offer(self, pool: MachinePool, now_s: float) -> Offer | None:
        first = self._first(pool, now_s)
        if first is None:
            return None
        head, machine = first
        size = self.route.batch_size(machine.hardware)
        rows = self._queue.rows_like(head, size)
        closed = rows >= size or now_s >= head.launch_by_s
        if not closed and self._unsafe_s(pool, machine, rows, now_s) > 0:
            return None
        return Offer(self._queue, head, machine, _in_time(head, machine, rows, now_s), closed)

    def next_offer_s(self, pool: MachinePool, now_s: float) -> float | None:
        first = self._first(pool, now_s)
        if first is None:
            return pool.next_probe_s(self.route.model, now_s) if self._queue.rows else None
        head, machine = first
        rows = self._queue.rows_like(head, self.route.batch_size(machine.hardware))
        unsafe_s = self._unsafe_s(pool, machine, rows, now_s)
        return min(head.launch_by_s, nextafter(now_s + unsafe_s, inf))

    def launched(self, offer: Offer) -> None:
        """Nothing to keep."""

    def ended(self, lot: int) -> None:
        """Nothing to keep."""

    def _first(self, pool: MachinePool, now_s: float) -> tuple[Entry, Machine] | None:
        """The most urgent entry that a free machine may take, and the machine."""
        head = self._queue.head()
        if head is None:
            return None
        if (machine := self._machine(pool, head, now_s)) is not None:
            return head, machine
        if head.failed_on:
            # It waits for another machine than those that are free; others need not wait with it.
            for other in self._queue.heads():
                if (machine := self._machine(pool, other, now_s)) is not None:
                    return other, machine
        return None

    def _machine(self, pool: MachinePool, head: Entry, now_s: float) -> Machine | None:
        """Planned hardware first, then the machine that is the least busy."""
        free = pool.free(self.route.model, now_s, head.failed_on)
        if len(free) <= 1:
            return free[0] if free else None
        planned = self.route.batch_sizes
        return min(free, key=lambda m: (m.hardware not in planned, m.busy, m.name))

    def _unsafe_s(self, pool: MachinePool, machine: Machine, rows: int, now_s: float) -> float:
        """How long until an early launch might delay no full batch to come; 0 when it does not.

        When nobody else will be busy by the end of the early batch, waiting would not help: that
        happens only where there are fewer machines than the planned rate needs.
        """
        expected_s = pool.expected_s(machine, self.route, rows)
        if self.route.rate_rps <= 0 or expected_s is None:
            return 0.0
        fill_s = self.route.batch_size(machine.hardware) / self.route.rate_rps
        own_s = now_s + expected_s
        others_s = pool.free_at_s(self.route.model, now_s)[1:]
        free_s = sorted([own_s, *others_s])
        if free_s[-1] == own_s:
            free_s.pop()
        late_s = (at - now_s - j * fill_s for j, at in enumerate(free_s, start=1))
        if max(late_s, default=0.0) <= _TIE_S:
            return 0.0
        # It changes when another machine is early enough in its place, or passes this one.
        changes_s = [
            at - j * fill_s - now_s for i, at in enumerate(others_s) for j in (i + 1, i + 2)
        ]
        changes_s += [at - own_s for at in others_s]
        return min((wait_s for wait_s in changes_s if wait_s > _TIE_S), default=inf)


@dataclass(slots=True)
class _Lot:
    """A queue whose batches run on at most `machines` machines of one hardware."""

    queue: ModuleQueue
    hardware: str
    size: int
    machines: int
    rate_rps: float
    running: int = 0


class _Lots:
    """What throughput-cost and round-robin share: rows are dealt to lots, lots launch batches."""

    __slots__ = ("_lots", "route")

    def __init__(self, route: ModuleRoute, lots: list[_Lot]) -> None:
        self.route = route
        self._lots = lots

    @property
    def rows(self) -> int:
        return sum(queue.rows for queue in self.queues())

    def discard(self, entry: Entry) -> None:
        self._lots[entry.lot].queue.discard(entry)

    def queues(self) -> Iterator[ModuleQueue]:
        for lot in self._lots:
            yield lot.queue

    def launched(self, offer: Offer) -> None:
        self._lots[offer.lot].running += 1

    def ended(self, lot: int) -> None:
        self._lots[lot].running -= 1

    def doomed(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """The published policies have no such rule."""
        return []

    def offer(self, pool: MachinePool, now_s: float) -> Offer | None:
        offers = [
            offer
            for index in range(len(self._lots))
            if (offer := self._lot_offer(index, pool, now_s)) is not None and offer.closed
        ]
        return min(offers, key=lambda offer: offer.rank, default=None)

    def next_offer_s(self, pool: MachinePool, now_s: float) -> float | None:
        due = [
            offer.head.launch_by_s
            for index in range(len(self._lots))
            if (offer := self._lot_offer(index, pool, now_s)) is not None
        ]
        if not due and self.rows and (probe_s := pool.next_probe_s(self.route.model, now_s)):
            due.append(probe_s)
        return min(due, default=None)

    def _lot_offer(self, index: int, pool: MachinePool, now_s: float) -> Offer | None:
        """The lot's next batch if a machine could take it, closed or not."""
        lot = self._lots[index]
        head = lot.queue.head() if lot.running < lot.machines else None
        if head is None:
            return None
        free = pool.free(self.route.model, now_s, head.failed_on)
        free = [machine for machine in free if machine.hardware == lot.hardware]
        if not free:
            return None
        machine = min(free, key=lambda m: (m.busy, m.name))
        closed = now_s >= head.launch_by_s or lot.queue.rows_like(head, lot.size) >= lot.size
        return Offer(lot.queue, head, machine, lot.size, closed, index)

    def _put(self, entry: Entry, index: int) -> Entry:
        entry.lot = index
        self._lots[index].queue.add(entry)
        return entry


class RoundRobin(_Lots):
    """One lot per machine; rows are dealt in proportion to throughput (smooth weighted)."""

    __slots__ = ("_credit",)

    def __init__(self, route: ModuleRoute) -> None:
        lots = []
        for allocation in _ranked(route):
            left = allocation.machines
            while left > _TIE_S:
                share = min(1.0, left)
                rate_rps = share * allocation.batch_size / allocation.duration_s
                size = min(allocation.batch_size, route.bound.spec.row_limit)
                lots.append(_Lot(ModuleQueue(route), allocation.hardware, size, 1, rate_rps))
                left -= share
        super().__init__(route, lots)
        self._credit = [0.0] * len(lots)

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
        """Deal the rows out; consecutive rows of one lot stay together."""
        total = sum(lot.rate_rps for lot in self._lots)
        turns: list[tuple[int, int]] = []
        for row in range(entry.rows):
            for index, lot in enumerate(self._lots):
                self._credit[index] += lot.rate_rps
            chosen = max(range(len(self._lots)), key=lambda index: (self._credit[index], -index))
            self._credit[chosen] -= total
            if not turns or turns[-1][1] != chosen:
                turns.append((row, chosen))
        if len(turns) == 1:
            return [self._put(entry, turns[0][1])]
        ends = [start for start, _ in turns[1:]] + [entry.rows]
        return [
            self._put(entry.part(start, end - start), index)
            for (start, index), end in zip(turns, ends, strict=True)
        ]


@dataclass(slots=True)
class _Due:
    """When a rank may start its next batch, and how much of the open one is still wanted."""

    every_s: float
    at_s: float = -inf
    wanted: int = 0


class ThroughputCost(_Lots):
    """One lot per allocation, best throughput-cost ratio first.

    A rank of n machines starts a batch every `d/n` and takes consecutive rows until it is full;
    rows that no rank is due for go to the last one, whose share they are.
    """

    __slots__ = ("_due",)

    def __init__(self, route: ModuleRoute) -> None:
        lots, due = [], []
        for allocation in _ranked(route):
            size = min(allocation.batch_size, route.bound.spec.row_limit)
            machines = ceil(allocation.machines - _TIE_S)
            rate_rps = allocation.rate_rps
            queue = ModuleQueue(route)
            lots.append(_Lot(queue, allocation.hardware, size, machines, rate_rps))
            due.append(_Due(every_s=size / rate_rps))
        super().__init__(route, lots)
        self._due = due

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
        """Give the rows to the ranks that are due."""
        parts: list[Entry] = []
        start = 0
        while start < entry.rows:
            index = self._open(now_s)
            left = entry.rows - start
            last = index == len(self._lots) - 1
            count = left if last else min(self._due[index].wanted, left)
            whole = count == entry.rows
            parts.append(self._put(entry if whole else entry.part(start, count), index))
            self._due[index].wanted -= count
            start += count
        return parts

    def _open(self, now_s: float) -> int:
        """The best rank that is collecting, starting a new batch where one is due."""
        for index, rank in enumerate(self._due[:-1]):
            if rank.wanted <= 0 and now_s >= rank.at_s - _TIE_S:
                # From due time to due time, so that the rank's rate is kept exactly; from now
                # after a pause, so that it does not collect two batches at once.
                start_s = rank.at_s if now_s - rank.at_s < rank.every_s else now_s
                rank.at_s = start_s + rank.every_s
                rank.wanted = self._lots[index].size
            if rank.wanted > 0:
                return index
        return len(self._due) - 1


def _in_time(head: Entry, machine: Machine, rows: int, now_s: float) -> int:
    """Rows that a batch may hold so that its most urgent one is still answered in time."""
    route = head.route
    if now_s <= head.launch_by_s or rows == 1:
        return rows
    known = route.durations.get(machine.hardware)
    if known is None:
        return rows
    left_s = head.latest_s + known.at(1) - now_s
    low, high = 1, rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if known.at(middle) <= left_s else (low, middle - 1)
    return low


def _ranked(route: ModuleRoute) -> list[Allocation]:
    """Allocations by throughput-cost ratio, best first (Harpagon 1.1)."""
    return sorted(
        route.allocations,
        key=lambda a: (-a.batch_size / a.duration_s / a.price_per_hour, a.hardware, a.batch_size),
    )
