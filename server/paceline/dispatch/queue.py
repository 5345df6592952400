"""One module's queue: rows waiting to be batched, most urgent first.

Invariants: `rows` is the number of rows not yet taken of entries that are alive; a batch never
mixes entries of different `key` (datatypes, row shapes, requested outputs, parameters).
Order: priority, then launch-by time (earliest deadline first), then arrival.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from paceline.core.tensor import BatchTensor, Tensor, batch_rows, row_slice
from paceline.core.values import value
from paceline.dispatch.route import ModuleRoute

if TYPE_CHECKING:
    from paceline.dispatch.chain_run import ChainRun


Order = tuple[int, float, int, int]
"""Priority, launch-by time, arrival, row: what is taken first."""


@dataclass(slots=True, eq=False)
class Entry:
    """A request's rows for one module; batches take ranges of them, in order.

    `base` is the index of its first row among the module's rows (above 0 for a retry of some).
    """

    run: ChainRun
    route: ModuleRoute
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    rows: int
    key: Hashable
    priority: int
    launch_by_s: float
    latest_s: float
    queued_s: float
    seq: int
    base: int = 0
    failed_on: frozenset[tuple[str, int]] = frozenset()
    lot: int = 0
    taken: int = 0
    alive: bool = True

    @property
    def order(self) -> Order:
        """Most urgent first; unique."""
        return (self.priority, self.launch_by_s, self.seq, self.base)

    @property
    def waiting(self) -> int:
        """Rows nobody has taken yet."""
        return self.rows - self.taken if self.alive else 0

    def part(self, start: int, count: int) -> Entry:
        """Some of its rows as an entry of their own."""
        inputs = tuple(row_slice(tensor, start, count) for tensor in self.inputs)
        return replace(self, inputs=inputs, rows=count, base=self.base + start, taken=0)


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
        again = self.entry.part(self.start, self.count)
        again.seq = seq
        if failed_on is not None:
            again.failed_on = failed_on
            again.key = (again.key, failed_on)
        if alone:
            again.key = seq
        return again


def batch_inputs(pieces: Sequence[Piece], *, batches: bool) -> tuple[BatchTensor, ...]:
    """The tensors of a batch; a model without batch axis (`batches` false) sees one row alone."""
    first = pieces[0]
    if batches:
        return tuple(
            batch_rows([row_slice(p.entry.inputs[i], p.start, p.count) for p in pieces])
            for i in range(len(first.entry.inputs))
        )
    assert len(pieces) == first.count == 1, pieces
    rows = [row_slice(tensor, first.start, 1) for tensor in first.entry.inputs]
    return tuple(BatchTensor(r.name, r.datatype, r.shape[1:], (r.data,)) for r in rows)


@dataclass(slots=True)
class ModuleQueue:
    """See the module docstring."""

    route: ModuleRoute
    rows: int = 0
    _buckets: dict[Hashable, list[tuple[Order, Entry]]] = field(default_factory=dict)
    _expiry: list[tuple[float, Order, Entry]] = field(default_factory=list)
    _arrivals: deque[Entry] = field(default_factory=deque)

    def add(self, entry: Entry) -> None:
        """Queue an entry with rows to take."""
        assert entry.waiting > 0, entry
        heapq.heappush(self._buckets.setdefault(entry.key, []), (entry.order, entry))
        if entry.latest_s != float("inf"):
            heapq.heappush(self._expiry, (entry.latest_s, entry.order, entry))
        self._arrivals.append(entry)
        self.rows += entry.waiting

    def discard(self, entry: Entry) -> None:
        """Forget what is left of an entry; a no-op when nothing is."""
        self.rows -= entry.waiting
        entry.alive = False

    def head(self) -> Entry | None:
        """The most urgent entry."""
        best: Entry | None = None
        for key in list(self._buckets):
            entry = self._bucket_head(key)
            if entry is not None and (best is None or entry.order < best.order):
                best = entry
        return best

    def heads(self) -> list[Entry]:
        """The most urgent entry of every kind that may share a batch, most urgent first."""
        found = [entry for key in list(self._buckets) if (entry := self._bucket_head(key))]
        return sorted(found, key=lambda entry: entry.order)

    def rows_like(self, entry: Entry, limit: int) -> int:
        """Rows that could join `entry` in a batch, itself included, counted up to `limit`."""
        count = 0
        for _, other in self._buckets[entry.key]:
            count += other.waiting
            if count >= limit:
                return limit
        return count

    def take(self, limit: int, head: Entry | None = None) -> list[Piece]:
        """Up to `limit` rows for one batch, starting with `head` (the most urgent entry)."""
        head = head or self.head()
        pieces: list[Piece] = []
        while head is not None and limit > 0:
            count = min(head.waiting, limit)
            pieces.append(Piece(head, head.taken, count))
            head.taken += count
            limit -= count
            self.rows -= count
            head = self._bucket_head(head.key)
        return pieces

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

    def next_expiry_s(self) -> float | None:
        """When `expired` next has something to say."""
        while self._expiry and not self._expiry[0][2].waiting:
            heapq.heappop(self._expiry)
        return self._expiry[0][0] if self._expiry else None

    def _bucket_head(self, key: Hashable) -> Entry | None:
        bucket = self._buckets.get(key)
        while bucket and not bucket[0][1].waiting:
            heapq.heappop(bucket)
        if not bucket:
            self._buckets.pop(key, None)
            return None
        return bucket[0][1]
