"""Throughput-cost and round-robin dispatch: rows are dealt to lots; see `policy`.

A row goes to the lot whose turn it is. Where it would be late there and another lot could start it
sooner, it goes to that one instead: with the planned rate, evenly spaced, that never happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from paceline.core.plan import Allocation
from paceline.core.profile import Durations
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
from paceline.dispatch.queue import Entry, ModuleQueue, Piece
from paceline.dispatch.route import ModuleRoute


class LotQueue(ModuleQueue):
    """A queue that knows how many rows wait by priority."""

    __slots__ = ("by_priority",)

    def __init__(self) -> None:
        super().__init__()
        self.by_priority: dict[int, int] = {}

    def add(self, entry: Entry) -> None:
        super().add(entry)
        self._count(entry, entry.waiting)

    def discard(self, entry: Entry) -> None:
        self._count(entry, -entry.waiting)
        super().discard(entry)

    def take(
        self, limit: int, head: Entry | None = None, *, skips: bool = False
    ) -> tuple[Piece, ...]:
        pieces = super().take(limit, head, skips=skips)
        for piece in pieces:
            self._count(piece.entry, -piece.count)
        return pieces

    def drain(self) -> list[Entry]:
        self.by_priority.clear()
        return super().drain()

    def before(self, priority: int) -> int:
        """Rows that are taken before one more of this priority."""
        known = self.by_priority
        if len(known) == 1 and priority in known:
            return self.rows
        return sum(rows for other, rows in known.items() if other <= priority)

    def _count(self, entry: Entry, rows: int) -> None:
        if rows:
            priority = entry.priority
            left = self.by_priority.get(priority, 0) + rows
            if left:
                self.by_priority[priority] = left
            else:
                del self.by_priority[priority]


@dataclass(slots=True)
class _Lot:
    """A queue whose batches run on at most `machines` machines of one hardware.

    A full batch takes `full_s`; `ends_s` has when those that run are expected to end.
    """

    hardware: str
    size: int
    machines: int
    rate_rps: float
    full_s: float
    known: Durations | None
    queue: LotQueue = field(default_factory=LotQueue)
    ends_s: dict[int, float] = field(default_factory=dict)

    def start_s(self, rows: float, now_s: float) -> float:
        """How long until its own machines could start a batch with one row behind `rows`."""
        batches = int(rows + NOTHING_ROWS) // self.size
        rounds, position = divmod(batches, self.machines)
        position -= self.machines - len(self.ends_s)
        if position < 0:
            return rounds * self.full_s
        ends_s = self.ends_s.values()
        end_s = max(ends_s) if len(ends_s) == 1 else sorted(ends_s)[position]
        return max(0.0, end_s - now_s) + rounds * self.full_s

    def end_s(self, priority: int, now_s: float) -> float:
        """How long until a full batch with one more row of that priority could be over."""
        return self.start_s(self.queue.before(priority), now_s) + self.full_s


class _Lots:
    """What throughput-cost and round-robin share: rows are dealt to lots, lots launch batches."""

    __slots__ = ("_all", "_kinds", "_longest_s", "_lots", "route")

    def __init__(self, route: ModuleRoute, lots: list[_Lot]) -> None:
        self.route = route
        self._lots = lots
        self._all = range(len(lots))
        self._kinds = dict.fromkeys(lot.hardware for lot in lots)
        self._longest_s = max(lot.full_s for lot in lots)

    @property
    def rows(self) -> int:
        return sum(queue.rows for queue in self.queues())

    def discard(self, entry: Entry) -> None:
        self._lots[entry.lot].queue.discard(entry)

    def queues(self) -> Iterator[ModuleQueue]:
        for lot in self._lots:
            yield lot.queue

    def launched(self, offer: Offer, batch: int, ends_s: float) -> None:
        self._lots[offer.lot].ends_s[batch] = ends_s

    def ended(self, lot: int, batch: int) -> None:
        del self._lots[lot].ends_s[batch]

    def late(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """What has expired, and what no launch now, in a batch worth its time, would save."""
        gone: list[Entry] = []
        for lot in self._lots:
            queue = lot.queue
            gone += queue.expired(now_s)
            while (head := queue.head()) is not None and now_s > head.launch_by_s + TIE_S:
                machine = self._machine(lot, head, pool, now_s)
                if machine is None:
                    break
                size = min(lot.size, self.route.batch_size(machine.hardware))
                if not past_saving(queue, head, machine, size, now_s):
                    break
                queue.discard(head)
                gone.append(head)
        return gone

    def next_expiry_s(self) -> float:
        return min(lot.queue.next_expiry_s() for lot in self._lots)

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
        working = self._working(pool)
        if len(working) < len(self._lots):
            self._move(working, now_s)
        best: Offer | None = None
        look_s = pool.next_probe_s(self.route.model, now_s)
        for index, lot in enumerate(self._lots):
            if len(lot.ends_s) >= lot.machines:
                continue
            offer = self._lot_offer(index, pool, now_s)
            if not isinstance(offer, Offer):
                look_s = min(look_s, offer)
            elif best is None or offer.rank < best.rank:
                best = offer
        return look_s if best is None else best

    def foreseen(
        self, rows: float, priority: int, by_s: float, pool: MachinePool, now_s: float
    ) -> Foreseen | None:
        """Of the lot that the row would go to; where others are still to be dealt before it, of
        the one that would have it done last.
        """
        kinds = pool.free_by_kind(self.route.model, now_s)
        if not kinds:
            return None
        lots, working = self._lots, self._working(pool)
        rate_rps = sum(lots[index].rate_rps for index in working)
        waiting = {index: lots[index].queue.before(priority) for index in working}
        coming = rows - sum(waiting.values())
        if coming < 1:
            index = self._in_time(self._turn(working, now_s), working, priority, by_s, now_s)
        else:
            for at in working:
                waiting[at] += int(coming * lots[at].rate_rps / rate_rps)
            index = max(
                working, key=lambda at: lots[at].start_s(waiting[at], now_s) + lots[at].full_s
            )
        lot, before = lots[index], waiting[index]
        firsts_s = {kind: free_s[0] for kind, free_s in kinds}
        free_s = firsts_s.get(lot.hardware, min(firsts_s.values()))
        return (
            max(free_s - now_s, lot.start_s(before, now_s)),
            before % lot.size + 1,
            lot.size,
            lot.known,
            lot.rate_rps,
            lot.size * lot.machines * rate_rps / lot.rate_rps,
        )

    def _working(self, pool: MachinePool) -> Sequence[int]:
        """Lots of whose hardware a machine works; all, where none does."""
        if len(self._kinds) == 1:
            return self._all
        works = {kind: pool.works(self.route.model, kind) for kind in self._kinds}
        return [at for at, lot in enumerate(self._lots) if works[lot.hardware]] or self._all

    def _move(self, working: Sequence[int], now_s: float) -> None:
        """What waits for machines that do not work any more is dealt out anew."""
        for at, lot in enumerate(self._lots):
            if at not in working and lot.queue.rows:
                for entry in lot.queue.drain():
                    self._put(entry, self._turn(working, now_s), working, now_s)

    def _turn(self, working: Sequence[int], now_s: float) -> Sequence[int]:
        """Where the next row should go of these lots, best first."""
        raise NotImplementedError

    def _machine(self, lot: _Lot, head: Entry, pool: MachinePool, now_s: float) -> Machine | None:
        """One of its hardware; of any, where none works of all that was planned."""
        free = pool.free(self.route.model, now_s, head.failed_on)
        for _, _, machine in free:
            if machine.hardware == lot.hardware:
                return machine
        if not free or any(pool.works(self.route.model, kind) for kind in self._kinds):
            return None
        return free[0][2]

    def _lot_offer(self, index: int, pool: MachinePool, now_s: float) -> Offer | float:
        """The lot's most urgent closed batch that a machine could take, or when one closes."""
        lot = self._lots[index]
        look_s = inf
        for head in lot.queue.heads():
            machine = self._machine(lot, head, pool, now_s)
            if machine is None:
                continue
            size = min(lot.size, self.route.batch_size(machine.hardware))
            rows = lot.queue.rows_like(head, size)
            # Further down there are batches to be filled as well, or several follow each other.
            close_s = head.launch_by_s - self.route.collects_s
            if now_s >= close_s or rows >= size:
                fitting = in_time(head, machine, rows, now_s)
                if fitting:
                    return Offer(lot.queue, head, machine, fitting, True, index)
                continue
            look_s = min(look_s, close_s)
        return look_s

    def _put(
        self, entry: Entry, turn: Sequence[int], working: Sequence[int], now_s: float
    ) -> Entry:
        by_s = entry.launch_by_s - now_s
        entry.lot = self._in_time(turn, working, entry.priority, by_s, now_s)
        self._lots[entry.lot].queue.add(entry)
        return entry

    def _in_time(
        self,
        turn: Sequence[int],
        working: Sequence[int],
        priority: int,
        by_s: float,
        now_s: float,
    ) -> int:
        """The first lot on turn that could have a row done in time, which is to be launched `by_s`
        from now; else that of all working ones which would be the first to have it done.
        """
        latest_s = by_s + self._longest_s
        for index in turn:
            if self._lots[index].end_s(priority, now_s) <= latest_s:
                return index
        return min(working, key=lambda at: self._lots[at].end_s(priority, now_s))


class RoundRobin(_Lots):
    """One lot per machine; rows are dealt in proportion to throughput (smooth weighted)."""

    __slots__ = ("_credit",)

    def __init__(self, route: ModuleRoute) -> None:
        lots = []
        for allocation in _ranked(route):
            left = allocation.machines
            while left > TIE_S:
                share = min(1.0, left)
                rate_rps = share * allocation.batch_size / allocation.duration_s
                lots.append(_lot(route, allocation, 1, rate_rps))
                left -= share
        super().__init__(route, lots)
        self._credit = [0.0] * len(lots)

    def add(self, entry: Entry, pool: MachinePool, now_s: float) -> list[Entry]:
        """Deal the rows out; consecutive rows of one lot stay together."""
        working = self._working(pool)
        total = sum(self._lots[index].rate_rps for index in working)
        turns: list[tuple[int, int]] = []
        for row in range(entry.rows):
            for index in working:
                self._credit[index] += self._lots[index].rate_rps
            chosen = max(working, key=lambda index: (self._credit[index], -index))
            self._credit[chosen] -= total
            if not turns or turns[-1][1] != chosen:
                turns.append((row, chosen))
        if len(turns) == 1:
            return [self._put(entry, turns[0][1:], working, now_s)]
        ends = [start for start, _ in turns[1:]] + [entry.rows]
        return [
            self._put(entry.part(start, end - start), (index,), working, now_s)
            for (start, index), end in zip(turns, ends, strict=True)
        ]

    def _turn(self, working: Sequence[int], now_s: float) -> Sequence[int]:
        return (max(working, key=lambda at: self._credit[at] + self._lots[at].rate_rps),)


@dataclass(slots=True)
class _Due:
    """When a rank may start its next batch, and how much of the open one is still wanted."""

    size: int
    every_s: float
    at_s: float = -inf
    wanted: int = 0

    def open(self, now_s: float) -> None:
        """Start a new batch, unless one is being collected."""
        if self.wanted <= 0:
            # From due time to due time, so that the rank's rate is kept exactly; from now after a
            # pause, so that it does not collect two batches at once.
            start_s = self.at_s if now_s - self.at_s < self.every_s else now_s
            self.at_s = start_s + self.every_s
            self.wanted = self.size


class ThroughputCost(_Lots):
    """One lot per allocation, best throughput-cost ratio first.

    A rank of n machines starts a batch every `d/n` and takes consecutive rows until it is full;
    rows that no rank is due for go to the last one, whose share they are.
    """

    __slots__ = ("_ahead_s", "_due")

    def __init__(self, route: ModuleRoute) -> None:
        lots, due = [], []
        for allocation in _ranked(route):
            machines = ceil(allocation.machines - TIE_S)
            lot = _lot(route, allocation, machines, allocation.rate_rps)
            lots.append(lot)
            due.append(_Due(lot.size, lot.size / lot.rate_rps))
        super().__init__(route, lots)
        self._due = due
        self._ahead_s = sum(lot.size for lot in lots) / lots[-1].rate_rps

    def add(self, entry: Entry, pool: MachinePool, now_s: float) -> list[Entry]:
        """Give the rows to the ranks that are due."""
        working = self._working(pool)
        parts: list[Entry] = []
        start = 0
        while start < entry.rows:
            turn = self._turn(working, now_s)
            left = count = entry.rows - start
            if len(turn) == 1:
                rank = self._due[turn[0]]
                rank.open(now_s)
                count = min(rank.wanted, left)
                rank.wanted -= count
            whole = count == entry.rows
            parts.append(
                self._put(entry if whole else entry.part(start, count), turn, working, now_s)
            )
            start += count
        return parts

    def _turn(self, working: Sequence[int], now_s: float) -> Sequence[int]:
        """The best rank that is collecting or due; all, where more comes than was planned for."""
        for index in working:
            rank = self._due[index]
            # The last gets nothing while better ranks collect, and all that comes in between.
            early_s = self._ahead_s if index == working[-1] else TIE_S
            if rank.wanted > 0 or now_s >= rank.at_s - early_s:
                return (index,)
        return working


def _lot(route: ModuleRoute, allocation: Allocation, machines: int, rate_rps: float) -> _Lot:
    size = min(allocation.batch_size, route.bound.spec.row_limit)
    known = route.durations.get(allocation.hardware)
    full_s = known.at(size) if known is not None else allocation.duration_s
    return _Lot(allocation.hardware, size, machines, rate_rps, full_s, known)


def _ranked(route: ModuleRoute) -> list[Allocation]:
    """Allocations by throughput-cost ratio, best first (Harpagon 1.1)."""
    return sorted(
        route.allocations,
        key=lambda a: (-a.batch_size / a.duration_s / a.price_per_hour, a.hardware, a.batch_size),
    )
