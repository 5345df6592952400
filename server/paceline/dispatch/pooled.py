"""Pooled dispatch: one queue for all machines of a module; see `policy`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from math import inf, nextafter

from paceline.dispatch.collector import (
    NOTHING_ROWS,
    TIE_S,
    Foreseen,
    Offer,
    in_time,
    past_saving,
)
from paceline.dispatch.holders import Machine
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue
from paceline.dispatch.route import ModuleRoute


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

    def late(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """What has expired, and what no launch now, in a batch worth its time, would save."""
        gone = self._queue.expired(now_s)
        while (head := self._queue.head()) is not None and now_s > head.launch_by_s + TIE_S:
            machine = self._machine(pool, head, now_s)
            if machine is None:
                break
            size = self.route.batch_size(machine.hardware)
            if not past_saving(self._queue, head, machine, size, now_s):
                break
            self._queue.discard(head)
            gone.append(head)
        return gone

    def next_expiry_s(self) -> float:
        return self._queue.next_expiry_s()

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
        """The most urgent closed batch, or else the most urgent one that may go early."""
        early: tuple[Entry, Machine, int, int] | None = None
        look_s = inf
        for head in self._queue.heads():
            machine = self._machine(pool, head, now_s)
            if machine is None:
                if not head.failed_on:
                    break
                # It waits for another machine than those that are free; others need not.
                continue
            size = self.route.batch_size(machine.hardware)
            rows = self._queue.rows_like(head, size)
            if rows >= size or now_s >= head.launch_by_s:
                fitting = in_time(head, machine, rows, now_s)
                return Offer(self._queue, head, machine, fitting, True)
            early = early or (head, machine, rows, size)
            look_s = min(look_s, head.launch_by_s)
        if early is not None:
            head, machine, rows, size = early
            unsafe_s = self._unsafe_s(pool, machine, rows, size, now_s)
            if unsafe_s <= 0:
                return Offer(self._queue, head, machine, rows, False)
            look_s = min(look_s, nextafter(now_s + unsafe_s, inf))
        return min(look_s, pool.next_probe_s(self.route.model, now_s))

    def foreseen(
        self, rows: float, priority: int, by_s: float, pool: MachinePool, now_s: float
    ) -> Foreseen | None:
        """Rows fill whole batches, which start on the slots as these are expected to be free."""
        route = self.route
        size = route.full_rows
        batches, joined = divmod(int(rows + NOTHING_ROWS), size)
        at_once = size * pool.common_slots(route.model, route.model)
        if batches == 0 and at_once and pool.free(route.model, now_s):
            return 0.0, joined + 1, size, route.best, route.rate_rps, at_once
        free_s = pool.free_at_s(route.model, now_s)
        if not free_s:
            return None
        rounds, position = divmod(batches, len(free_s))
        start_s = free_s[position] - now_s + rounds * route.row_s * size
        return start_s, joined + 1, size, route.best, route.rate_rps, at_once

    def launched(self, offer: Offer, batch: int, ends_s: float) -> None:
        """Nothing to keep."""

    def ended(self, lot: int, batch: int) -> None:
        """Nothing to keep."""

    def _machine(self, pool: MachinePool, head: Entry, now_s: float) -> Machine | None:
        """Planned hardware first, then the machine that is the least busy."""
        free = pool.free(self.route.model, now_s, head.failed_on)
        if not free:
            return None
        planned = self.route.batch_sizes
        for _, _, machine in free:
            if machine.hardware in planned:
                return machine
        return free[0][2]

    def _unsafe_s(
        self, pool: MachinePool, machine: Machine, rows: int, size: int, now_s: float
    ) -> float:
        """How long until an early launch might delay no full batch to come; 0 when it does not.

        When nobody else will be busy by the end of the early batch, waiting would not help: that
        happens only where there are fewer machines than the planned rate needs.
        """
        expected_s = pool.expected_s(machine, self.route, rows)
        if self.route.rate_rps <= 0 or expected_s is None:
            return 0.0
        fill_s = size / self.route.rate_rps
        others_s = pool.free_at_s(self.route.model, now_s)[1:]
        if not others_s or others_s[-1] - now_s <= fill_s:
            return 0.0
        own_s = now_s + expected_s
        before = bisect_right(others_s, own_s)
        free_s = others_s
        if before < len(others_s):
            free_s = [*others_s[:before], own_s, *others_s[before:]]
        for j, at_s in enumerate(free_s, start=1):
            if at_s - now_s - j * fill_s > TIE_S:
                break
        else:
            return 0.0
        # It changes when another machine is early enough in its place, or passes this one.
        soonest_s = inf
        full_s = now_s
        for at_s in others_s:
            full_s += fill_s
            wait_s = at_s - full_s
            if TIE_S < wait_s - fill_s < soonest_s:
                soonest_s = wait_s - fill_s
            elif TIE_S < wait_s < soonest_s:
                soonest_s = wait_s
        for at_s in others_s[before:]:
            if at_s - own_s > TIE_S:
                return min(soonest_s, at_s - own_s)
        return soonest_s
