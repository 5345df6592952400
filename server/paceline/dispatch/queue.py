"""One module's queue: rows waiting to be batched, most urgent first.

Invariants: `rows` is the number of rows not yet taken of entries that are alive; a batch never
mixes entries of different `key` (datatypes, row shapes, requested outputs, parameters).
Order: priority, then launch-by time (earliest deadline first), then arrival.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from typing import TYPE_CHECKING

from paceline.core.tensor import BatchTensor, Tensor, row_slice
from paceline.core.values import value

if TYPE_CHECKING:
    from paceline.dispatch.chain_run import ChainRun
    from paceline.dispatch.stage import Stage
    from paceline.dispatch.walk import Step


Order = tuple[int, float, int, int]
"""Priority, launch-by time, arrival, first row: what is taken first."""


class Entry:
    """A request's rows for one module; batches take ranges of them, in order.

    `order` is unique; its last part is the index of the first row among the module's rows (above
    0 for a retry of some). `latest_s` is when a launch would be too late. `race`: other entries, of
    the opposite number, hold the same rows, and those count that are done first; 0 where none do.
    """

    # No dataclass: one that is compiled has to know its fields' classes when it is made, and these
    # are of modules that import this one.
    __slots__ = (
        *("alive", "failed_on", "inputs", "key", "latest_s", "lot", "order", "queued_s", "race"),
        *("rows", "run", "stage", "step", "taken"),
    )

    def __init__(
        self,
        run: ChainRun,
        stage: Stage,
        step: Step,
        inputs: tuple[Tensor, ...],
        rows: int,
        key: Hashable,
        order: Order,
        latest_s: float,
        queued_s: float,
        failed_on: frozenset[tuple[str, int]] = frozenset(),
        lot: int = 0,
        taken: int = 0,
        alive: bool = True,
        race: int = 0,
    ) -> None:
        self.run = run
        self.stage = stage
        self.step = step
        self.inputs = inputs
        self.rows = rows
        self.key = key
        self.order = order
        self.latest_s = latest_s
        self.queued_s = queued_s
        self.failed_on = failed_on
        self.lot = lot
        self.taken = taken
        self.alive = alive
        self.race = race

    @property
    def priority(self) -> int:
        return self.order[0]

    @property
    def launch_by_s(self) -> float:
        return self.order[1]

    @property
    def base(self) -> int:
        """The index of its first row among the module's."""
        return self.order[3]

    @property
    def waiting(self) -> int:
        """Rows nobody has taken yet."""
        return self.rows - self.taken if self.alive else 0

    def part(self, start: int, count: int, *, seq: int | None = None) -> Entry:
        """Some of its rows as an entry of their own, which came when it did or as number `seq`."""
        inputs = tuple(row_slice(tensor, start, count) for tensor in self.inputs)
        priority, launch_by_s, own, base = self.order
        order = (priority, launch_by_s, own if seq is None else seq, base + start)
        return Entry(
            self.run,
            self.stage,
            self.step,
            inputs,
            count,
            self.key,
            order,
            self.latest_s,
            self.queued_s,
            self.failed_on,
            self.lot,
            0,
            self.alive,
            self.race,
        )


@value
class Piece:
    """A range of an entry's rows in a batch."""

    entry: Entry
    start: int
    count: int

    def retry(
        self, *, seq: int, alone: bool = False, failed_on: frozenset[tuple[str, int]] | None = None
    ) -> Entry:
        """The same rows as an entry of their own, to be executed once more.

        `alone`: in a batch that no other entry joins; `failed_on`: not on those machines, so
        only with rows that must avoid the same ones.
        """
        again = self.entry.part(self.start, self.count, seq=seq)
        if failed_on is not None:
            again.failed_on = failed_on
            again.key = (again.key, failed_on)
        if alone:
            again.key = seq
        return again


def batch_inputs(pieces: Sequence[Piece], rows: int, *, batches: bool) -> tuple[BatchTensor, ...]:
    """The tensors of a batch; a model without batch axis (`batches` false) sees one row alone."""
    given = pieces[0].entry.inputs
    if not batches:
        assert len(pieces) == rows == 1, pieces
        alone = [row_slice(tensor, pieces[0].start, 1) for tensor in given]
        return tuple(BatchTensor(t.name, t.datatype, t.shape[1:], (t.data,)) for t in alone)
    tensors = []
    for index, first in enumerate(given):
        parts = []
        for piece in pieces:
            tensor = piece.entry.inputs[index]
            if piece.count != piece.entry.rows:
                tensor = row_slice(tensor, piece.start, piece.count)
            parts.append(tensor.data)
        shape = (rows, *first.shape[1:])
        tensors.append(BatchTensor(first.name, first.datatype, shape, tuple(parts)))
    return tuple(tensors)


@dataclass(slots=True)
class _Bucket:
    """Entries that may share batches, most urgent first, and how many rows of them wait."""

    heap: list[tuple[Order, Entry]] = field(default_factory=list)
    rows: int = 0


class ModuleQueue:
    """See the module docstring."""

    __slots__ = ("_arrivals", "_buckets", "_expiry", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self._buckets: dict[Hashable, _Bucket] = {}
        self._expiry: list[tuple[float, Order, Entry]] = []
        self._arrivals: deque[Entry] = deque()

    def add(self, entry: Entry) -> None:
        """Queue an entry with rows to take."""
        rows = entry.waiting
        assert rows > 0, entry
        bucket = self._buckets.get(entry.key)
        if bucket is None:
            bucket = self._buckets[entry.key] = _Bucket()
        heapq.heappush(bucket.heap, (entry.order, entry))
        bucket.rows += rows
        if entry.latest_s != inf:
            heapq.heappush(self._expiry, (entry.latest_s, entry.order, entry))
        self._arrivals.append(entry)
        self.rows += rows

    def discard(self, entry: Entry) -> None:
        """Forget what is left of an entry; a no-op when nothing is."""
        if rows := entry.waiting:
            self.rows -= rows
            self._buckets[entry.key].rows -= rows
        entry.alive = False

    def drain(self) -> list[Entry]:
        """Everything that waits, most urgent first, which is forgotten here."""
        heaps = [bucket.heap for bucket in self._buckets.values()]
        found = [entry for _, entry in sorted(chain(*heaps)) if entry.waiting]
        self._buckets.clear()
        self._expiry.clear()
        self._arrivals.clear()
        self.rows = 0
        return found

    def head(self) -> Entry | None:
        """The most urgent entry."""
        heads = self.heads()
        return heads[0] if heads else None

    def heads(self) -> list[Entry]:
        """The most urgent entry of every kind that may share a batch, most urgent first."""
        found = [entry for key in list(self._buckets) if (entry := self._bucket_head(key))]
        if len(found) > 1:
            found.sort(key=lambda entry: entry.order)
        return found

    def rows_like(self, entry: Entry, limit: int) -> int:
        """Rows that could join `entry` in a batch, itself included, counted up to `limit`."""
        return min(self._buckets[entry.key].rows, limit)

    def behind(self, head: Entry, by_s: float, limit: int) -> tuple[Entry, int] | None:
        """The most urgent entry behind `head` in its batches that may be launched as late as
        `by_s`, and how many rows there are from it on, counted up to `limit`; None without any.
        """
        found: Entry | None = None
        rows = 0
        for _, entry in sorted(self._buckets[head.key].heap):
            if found is None and entry.latest_s >= by_s and entry.waiting:
                found = entry
            if found is not None:
                rows += entry.waiting
                if rows >= limit:
                    break
        return (found, min(rows, limit)) if found is not None else None

    def take(
        self, limit: int, head: Entry | None = None, *, skips: bool = False
    ) -> tuple[Piece, ...]:
        """Up to `limit` rows for one batch, starting with `head` (the most urgent entry). `skips`:
        none of those before it.
        """
        head = head or self.head()
        if head is None:
            return ()
        bucket = self._buckets[head.key]
        heap, pieces, left = bucket.heap, [], limit
        skipped: list[tuple[Order, Entry]] = []
        while skips and heap and heap[0][0] < head.order:
            skipped.append(heapq.heappop(heap))
        entry: Entry | None = head
        while entry is not None:
            start = entry.taken
            count = min(entry.rows - start, left)
            pieces.append(Piece(entry, start, count))
            entry.taken = start + count
            left -= count
            entry = None
            while left and heap:
                entry = heap[0][1]
                if entry.alive and entry.rows > entry.taken:
                    break
                heapq.heappop(heap)
                entry = None
        for before in skipped:
            heapq.heappush(heap, before)
        bucket.rows -= limit - left
        self.rows -= limit - left
        self._forget_taken()
        return tuple(pieces)

    def oldest(self) -> Entry | None:
        """The entry that has waited longest."""
        while self._arrivals and not self._arrivals[0].waiting:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def expired(self, now_s: float) -> list[Entry]:
        """Remove and return entries whose latest launch has passed."""
        gone: list[Entry] = []
        while self._expiry and self._expiry[0][0] < now_s:
            entry = heapq.heappop(self._expiry)[2]
            if entry.waiting:
                self.discard(entry)
                gone.append(entry)
        return gone

    def next_expiry_s(self) -> float:
        """Behind which instant `expired` next has something to say; inf for none."""
        expiry = self._expiry
        while expiry:
            latest_s, _, entry = expiry[0]
            if entry.alive and entry.rows > entry.taken:
                return latest_s
            heapq.heappop(expiry)
        return inf

    def _forget_taken(self) -> None:
        """What is taken must not keep its tensors alive here."""
        if not self.rows:
            self._buckets.clear()
            self._expiry.clear()
            self._arrivals.clear()
            return
        self.oldest()
        self.next_expiry_s()

    def _bucket_head(self, key: Hashable) -> Entry | None:
        heap = self._buckets[key].heap
        while heap:
            entry = heap[0][1]
            if entry.alive and entry.rows > entry.taken:
                return entry
            heapq.heappop(heap)
        del self._buckets[key]
        return None
