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

    __slots__ = ("_longest_s", "_lots", "_rate_rps", "route")

    def __init__(self, route: ModuleRoute, lots: list[_Lot]) -> None:
        self.route = route
        self._lots = lots
        self._rate_rps = sum(lot.rate_rps for lot in lots)
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
                if machine is None or not past_saving(queue, head, machine, lot.size, now_s):
                    break
                queue.discard(head)
                gone.append(head)
        return gone

    def next_expiry_s(self) -> float:
        return min(lot.queue.next_expiry_s() for lot in self._lots)

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
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
        free_s = pool.free_at_s(self.route.model, now_s)
        if not free_s:
            return None
        waiting = [lot.queue.before(priority) for lot in self._lots]
        coming = rows - sum(waiting)
        if coming < 1:
            index = self._in_time(self._turn(now_s), priority, by_s, now_s)
        else:
            for at, lot in enumerate(self._lots):
                waiting[at] += int(coming * lot.rate_rps / self._rate_rps)
            ends_s = [
                lot.start_s(before, now_s) + lot.full_s
                for lot, before in zip(self._lots, waiting, strict=True)
            ]
            index = ends_s.index(max(ends_s))
        lot, before = self._lots[index], waiting[index]
        return (
            max(free_s[0] - now_s, lot.start_s(before, now_s)),
            before % lot.size + 1,
            lot.size,
            lot.known,
            lot.rate_rps,
            lot.size * lot.machines * self._rate_rps / lot.rate_rps,
        )

    def _turn(self, now_s: float) -> Sequence[int]:
        """Where the next row should go, best first."""
        raise NotImplementedError

    def _machine(self, lot: _Lot, head: Entry, pool: MachinePool, now_s: float) -> Machine | None:
        free = pool.free(self.route.model, now_s, head.failed_on)
        return next((m for _, _, m in free if m.hardware == lot.hardware), None)

    def _lot_offer(self, index: int, pool: MachinePool, now_s: float) -> Offer | float:
        """The lot's most urgent closed batch that a machine could take, or when one closes."""
        lot = self._lots[index]
        look_s = inf
        for head in lot.queue.heads():
            machine = self._machine(lot, head, pool, now_s)
            if machine is None:
                continue
            rows = lot.queue.rows_like(head, lot.size)
            if now_s >= head.launch_by_s or rows >= lot.size:
                fitting = in_time(head, machine, rows, now_s)
                if fitting:
                    return Offer(lot.queue, head, machine, fitting, True, index)
                continue
            look_s = min(look_s, head.launch_by_s)
        return look_s

    def _put(self, entry: Entry, turn: Sequence[int], now_s: float) -> Entry:
        entry.lot = self._in_time(turn, entry.priority, entry.launch_by_s - now_s, now_s)
        self._lots[entry.lot].queue.add(entry)
        return entry

    def _in_time(self, turn: Sequence[int], priority: int, by_s: float, now_s: float) -> int:
        """The first of these lots that could have a row done in time, which is to be launched
        `by_s` from now; else that of all which would be the first to have it done.
        """
        latest_s = by_s + self._longest_s
        for index in turn:
            if self._lots[index].end_s(priority, now_s) <= latest_s:
                return index
        ends_s = [lot.end_s(priority, now_s) for lot in self._lots]
        return ends_s.index(min(ends_s))


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
            return [self._put(entry, turns[0][1:], now_s)]
        ends = [start for start, _ in turns[1:]] + [entry.rows]
        return [
            self._put(entry.part(start, end - start), (index,), now_s)
            for (start, index), end in zip(turns, ends, strict=True)
        ]

    def _turn(self, now_s: float) -> Sequence[int]:
        credit = [has + lot.rate_rps for has, lot in zip(self._credit, self._lots, strict=True)]
        return (credit.index(max(credit)),)


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

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
        """Give the rows to the ranks that are due."""
        parts: list[Entry] = []
        start = 0
        while start < entry.rows:
            turn = self._turn(now_s)
            left = count = entry.rows - start
            if len(turn) == 1:
                rank = self._due[turn[0]]
                rank.open(now_s)
                count = min(rank.wanted, left)
                rank.wanted -= count
            whole = count == entry.rows
            parts.append(self._put(entry if whole else entry.part(start, count), turn, now_s))
            start += count
        return parts

    def _turn(self, now_s: float) -> Sequence[int]:
        """The best rank that is collecting or due; all, where more comes than was planned for."""
        last = len(self._due) - 1
        for index, rank in enumerate(self._due):
            # The last gets nothing while better ranks collect, and all that comes in between.
            early_s = self._ahead_s if index == last else TIE_S
            if rank.wanted > 0 or now_s >= rank.at_s - early_s:
                return (index,)
        return range(last + 1)


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
