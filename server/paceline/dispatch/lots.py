"""Throughput-cost and round-robin dispatch: rows are dealt to lots; see `policy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf

from paceline.core.plan import Allocation
from paceline.dispatch.collector import TIE_S, Offer
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue
from paceline.dispatch.route import ModuleRoute


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

    def late(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """What has expired; the published policies have no other rule."""
        return [entry for lot in self._lots for entry in lot.queue.expired(now_s)]

    def next_expiry_s(self) -> float:
        return min(lot.queue.next_expiry_s() for lot in self._lots)

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
        best: Offer | None = None
        look_s = pool.next_probe_s(self.route.model, now_s)
        for index, lot in enumerate(self._lots):
            if lot.running >= lot.machines:
                continue
            offer = self._lot_offer(index, pool, now_s)
            if not isinstance(offer, Offer):
                look_s = min(look_s, offer)
            elif best is None or offer.rank < best.rank:
                best = offer
        return look_s if best is None else best

    def _lot_offer(self, index: int, pool: MachinePool, now_s: float) -> Offer | float:
        """The lot's most urgent closed batch that a machine could take, or when one closes."""
        lot = self._lots[index]
        look_s = inf
        for head in lot.queue.heads():
            free = pool.free(self.route.model, now_s, head.failed_on)
            machine = next((m for _, _, m in free if m.hardware == lot.hardware), None)
            if machine is None:
                continue
            if now_s >= head.launch_by_s or lot.queue.rows_like(head, lot.size) >= lot.size:
                return Offer(lot.queue, head, machine, lot.size, True, index)
            look_s = min(look_s, head.launch_by_s)
        return look_s

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
            while left > TIE_S:
                share = min(1.0, left)
                rate_rps = share * allocation.batch_size / allocation.duration_s
                size = min(allocation.batch_size, route.bound.spec.row_limit)
                lots.append(_Lot(ModuleQueue(), allocation.hardware, size, 1, rate_rps))
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
            machines = ceil(allocation.machines - TIE_S)
            rate_rps = allocation.rate_rps
            queue = ModuleQueue()
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
            if rank.wanted <= 0 and now_s >= rank.at_s - TIE_S:
                # From due time to due time, so that the rank's rate is kept exactly; from now
                # after a pause, so that it does not collect two batches at once.
                start_s = rank.at_s if now_s - rank.at_s < rank.every_s else now_s
                rank.at_s = start_s + rank.every_s
                rank.wanted = self._lots[index].size
            if rank.wanted > 0:
                return index
        return len(self._due) - 1


def _ranked(route: ModuleRoute) -> list[Allocation]:
    """Allocations by throughput-cost ratio, best first (Harpagon 1.1)."""
    return sorted(
        route.allocations,
        key=lambda a: (-a.batch_size / a.duration_s / a.price_per_hour, a.hardware, a.batch_size),
    )
