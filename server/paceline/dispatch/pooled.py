"""Pooled dispatch: one queue for all machines of a module; see `policy`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import ceil, inf, nextafter

from paceline.core.profile import Durations
from paceline.dispatch.collector import (
    NOTHING_ROWS,
    TIE_S,
    WORTHWHILE,
    Foreseen,
    Offer,
    in_time,
    past_saving,
)
from paceline.dispatch.holders import Machine
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue
from paceline.dispatch.route import ModuleRoute

HALVINGS = 12
"""How exactly it is told when a batch starts where kinds of hardware are mixed: to 1/2000 of what
all slots take for a batch each."""


class _Kind:
    """Slots of one kind of hardware: free at an instant each, then for a batch after the other."""

    __slots__ = ("free_s", "full_s", "known", "now_s", "size")

    def __init__(self, free_s: Sequence[float], size: int, known: Durations, now_s: float) -> None:
        self.free_s = free_s
        self.size = size
        self.known = known
        self.full_s = known.at(size)
        self.now_s = now_s

    def begun(self, after_s: float) -> int:
        """Rows of full batches that start within so long."""
        by_s = self.now_s + after_s
        begun = 0
        for free_s in self.free_s:
            if free_s > by_s:
                break
            begun += int((by_s - free_s) / self.full_s) + 1
        return begun * self.size


class Pooled:
    """One queue for all machines; see the module docstring."""

    __slots__ = ("_at_will", "_away", "_queue", "route")

    def __init__(self, route: ModuleRoute) -> None:
        self.route = route
        self._at_will = route.main if len(route.machines) < 2 else ""
        """The hardware of which it may use every machine; empty where there is none."""
        self._away: dict[str, dict[int, float]] = {}
        """When batches end on other hardware than that, by hardware."""
        self._queue = ModuleQueue()

    @property
    def rows(self) -> int:
        return self._queue.rows

    def add(self, entry: Entry, pool: MachinePool, now_s: float) -> list[Entry]:
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
            if self._has_quicker(pool, head, machine, now_s):
                break
            self._queue.discard(head)
            gone.append(head)
        return gone

    def next_expiry_s(self) -> float:
        return self._queue.next_expiry_s()

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
        """The most urgent closed batch, or else the most urgent one that may go early."""
        early: tuple[Offer, int] | None = None
        look_s = inf
        for head in self._queue.heads():
            machine = self._machine(pool, head, now_s)
            if machine is None:
                if not head.failed_on and not pool.free(self.route.model, now_s):
                    break
                # It waits for another machine than those that are free; others need not.
                continue
            size = self.route.batch_size(machine.hardware)
            rows = self._queue.rows_like(head, size)
            helps = self.route.helps(machine.hardware)
            skips = (helps or now_s > head.launch_by_s) and past_saving(
                self._queue, head, machine, size, now_s
            )
            if skips:
                # It waits for a quicker machine; those behind it need not.
                found = self._behind(head, machine, size, now_s)
                if found is None:
                    continue
                head, rows = found  # noqa: PLW2901
            if rows >= size or now_s >= head.launch_by_s:
                fitting = in_time(head, machine, rows, now_s)
                return Offer(self._queue, head, machine, fitting, True, skips=skips)
            if helps and not head.failed_on and pool.works(self.route.model, self.route.main):
                # Only what is in need of it.
                look_s = min(look_s, head.launch_by_s)
                continue
            early = early or (Offer(self._queue, head, machine, rows, False, skips=skips), size)
            look_s = min(look_s, head.launch_by_s)
        if early is not None:
            offer, size = early
            unsafe_s = self._unsafe_s(pool, offer.machine, offer.size, size, now_s)
            if unsafe_s <= 0:
                return offer
            look_s = min(look_s, nextafter(now_s + unsafe_s, inf))
        return min(look_s, pool.next_probe_s(self.route.model, now_s))

    def foreseen(
        self, rows: float, priority: int, by_s: float, pool: MachinePool, now_s: float
    ) -> Foreseen | None:
        """Rows fill whole batches, which start on the slots as these are expected to be free."""
        route = self.route
        kinds = pool.free_by_kind(route.model, now_s)
        if len(kinds) > 1:
            kinds = self._free_by_kind(pool, now_s)
        if len(kinds) > 1:
            return self._foreseen_on(kinds, rows, now_s)
        if not kinds:
            return None
        hardware, free_s = kinds[0]
        size, known = route.full_rows, route.best
        if hardware != route.best_on:
            size, known = route.batch_size(hardware), route.durations.get(hardware)
        ahead, slots = int(rows + NOTHING_ROWS), len(free_s)
        batches = ahead // size
        start_s = free_s[batches % slots] - now_s
        if batches >= slots and known is not None:
            start_s += batches // slots * known.at(size)
        return start_s, ahead % size + 1, size, known, route.rate_rps, size * slots

    def _foreseen_on(
        self, kinds: Sequence[tuple[str, Sequence[float]]], rows: float, now_s: float
    ) -> Foreseen | None:
        """The same on several kinds of hardware, whose batches differ."""
        route = self.route
        found = [
            _Kind(free_s, route.batch_size(hardware), known, now_s)
            for hardware, free_s in kinds
            if (known := route.durations.get(hardware)) is not None
        ]
        if not found:
            return None
        at_once = sum(kind.size * len(kind.free_s) for kind in found)
        row_s = 1.0 / sum(kind.size * len(kind.free_s) / kind.full_s for kind in found)
        begun, start_s = sum(kind.begun(0.0) for kind in found), 0.0
        before = 0
        if begun <= rows + NOTHING_ROWS:
            # Every slot takes a batch within the time of one, and others each as long after that.
            early_s, start_s = max(0.0, (rows - at_once) * row_s), (rows + at_once + 1) * row_s
            start_s += max(kind.free_s[-1] for kind in found) - now_s
            for _ in range(HALVINGS):
                middle_s = (early_s + start_s) / 2
                begun = sum(kind.begun(middle_s) for kind in found)
                if begun > rows + NOTHING_ROWS:
                    start_s = middle_s
                else:
                    early_s, before = middle_s, begun
            found = [kind for kind in found if kind.begun(start_s) > kind.begun(early_s)]
        kind = min(found, key=lambda kind: kind.full_s / kind.size)
        joined = max(1, min(kind.size, int(rows + NOTHING_ROWS) - before + 1))
        return start_s, joined, kind.size, kind.known, route.rate_rps, at_once

    def launched(self, offer: Offer, batch: int, ends_s: float) -> None:
        if (kind := offer.machine.hardware) != self._at_will:
            self._away.setdefault(kind, {})[batch] = ends_s

    def ended(self, lot: int, batch: int) -> None:
        for ends_s in self._away.values():
            ends_s.pop(batch, None)

    def _machine(self, pool: MachinePool, head: Entry, now_s: float) -> Machine | None:
        """The least busy machine, if the entry is in time there; its main hardware first."""
        main = self.route.main
        in_need: Machine | None = None
        late: Machine | None = None
        for _, _, machine in pool.free(self.route.model, now_s, head.failed_on):
            kind = machine.hardware
            if kind != self._at_will and not self._may_use(kind, pool, head):
                continue
            if now_s > head.launch_by_s and not in_time(head, machine, 1, now_s):
                late = late or machine
            elif kind == main or not main:
                return machine
            else:
                in_need = in_need or machine
        return in_need or late

    def _may_use(self, kind: str, pool: MachinePool, head: Entry) -> bool:
        """Whether a machine of that hardware may be used: as many as the plan has there and nobody
        needs; any, where the main hardware does not work.
        """
        if not self.route.main or head.failed_on:
            return True
        if pool.works(self.route.model, self.route.main):
            return len(self._away.get(kind, ())) < pool.usable(self.route.home).get(kind, 0)
        planned = self.route.batch_sizes
        return kind in planned or not any(pool.works(self.route.model, k) for k in planned)

    def _free_by_kind(
        self, pool: MachinePool, now_s: float
    ) -> Sequence[tuple[str, Sequence[float]]]:
        """When each slot that it may use is expected to be free, earliest first, by hardware."""
        found = pool.free_by_kind(self.route.model, now_s)
        main = self.route.main
        if len(found) < 2 or not pool.works(self.route.model, main):
            return found
        usable, own = pool.usable(self.route.home), []
        for kind, free_s in found:
            if kind != self._at_will:
                most = usable.get(kind, 0)
                ends_s = [max(now_s, end_s) for end_s in self._away.get(kind, {}).values()]
                more = max(0, most - len(ends_s))
                free_s = sorted([*free_s[:more], *ends_s])[:most]  # noqa: PLW2901
            if free_s:
                own.append((kind, free_s))
        return own or found

    def _behind(
        self, head: Entry, machine: Machine, size: int, now_s: float
    ) -> tuple[Entry, int] | None:
        """The most urgent entry behind `head` whose batch there is worth its time, and its rows."""
        known = self.route.durations[machine.hardware]
        rows = size if self._queue.rows_like(head, size) >= size else 1
        took_s = known.at(ceil(WORTHWHILE * rows))
        return self._queue.behind(head, now_s + took_s - self.route.single_s - TIE_S, size)

    def _has_quicker(self, pool: MachinePool, head: Entry, machine: Machine, now_s: float) -> bool:
        """Whether another kind of machine is free early enough to save an entry."""
        if len(self.route.durations) == 1:
            return False
        latest_s = head.latest_s + self.route.single_s
        for kind, free_s in self._free_by_kind(pool, now_s):
            known = self.route.durations.get(kind)
            if known is None or kind == machine.hardware:
                continue
            if free_s[0] + known.at(1) <= latest_s + TIE_S:
                return True
        return False

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
        kinds = self._free_by_kind(pool, now_s)
        others_s = kinds[0][1][1:] if len(kinds) == 1 else _merged(kinds)[1:]
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


def _merged(kinds: Sequence[tuple[str, Sequence[float]]]) -> list[float]:
    return sorted([at_s for _, free_s in kinds for at_s in free_s])
