"""Pooled dispatch: one queue for all machines of a module; see `policy`."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

from paceline.dispatch.collector import TIE_S, Offer
from paceline.dispatch.machines import Machine, MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue
from paceline.dispatch.route import ModuleRoute

WORTHWHILE = 0.75
"""The share of a full batch below which it is not shrunk to save its most urgent request."""


class Pooled:
    """One queue for all machines; see the module docstring."""

    __slots__ = ("_queue", "route")

    def __init__(self, route: ModuleRoute) -> None:
        self.route = route
        self._queue = ModuleQueue()

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
        while (head := self._queue.head()) is not None and now_s > head.launch_by_s + TIE_S:
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
        others_s = pool.free_at_s(self.route.model, now_s)[1:]
        if not others_s or others_s[-1] - now_s <= fill_s:
            return 0.0
        own_s = now_s + expected_s
        free_s = sorted([own_s, *others_s])
        if free_s[-1] == own_s:
            free_s.pop()
        late_s = (at - now_s - j * fill_s for j, at in enumerate(free_s, start=1))
        if max(late_s, default=0.0) <= TIE_S:
            return 0.0
        # It changes when another machine is early enough in its place, or passes this one.
        changes_s = [
            at - j * fill_s - now_s for i, at in enumerate(others_s) for j in (i + 1, i + 2)
        ]
        changes_s += [at - own_s for at in others_s]
        return min((wait_s for wait_s in changes_s if wait_s > TIE_S), default=inf)


def _in_time(head: Entry, machine: Machine, rows: int, now_s: float) -> int:
    """Rows that a batch may hold so that its most urgent one is still answered in time."""
    route = head.stage.route
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
