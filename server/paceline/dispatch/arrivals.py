"""When rows that are on their way to a module could start there: not before they have come.

`Arrivals` is the queue that the admitted requests would form at a module if each came there the
moment it is admitted, on as many slots, in batches that start as soon as a slot is free. They come
later, but one after the other as they were admitted: whoever would wait there waits as long when it
has come. What is ahead of a request says less: work that has not come yet cannot be done, though
machines be free for it.

Rows that one batch brings come together, and share a batch here.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from paceline.core.profile import Durations
from paceline.dispatch.collector import NOTHING_ROWS


class Arrivals:
    """See the module docstring; of one priority. Rows may be expected ones, and so fractions."""

    __slots__ = ("_at_s", "_ends_s", "_free_s", "_rows", "_start_s")

    def __init__(self) -> None:
        self._at_s = -inf
        self._ends_s: list[float] = []
        """When slots are free again, but for that of the last batch: a heap."""
        self._free_s = -inf
        """When the last batch's slot is free for it,"""
        self._start_s = -inf
        """when it starts, and"""
        self._rows = 0.0
        """its rows; 0 before there is any."""

    def wait_s(self, company: float, size: int, slots: int, known: Durations, at_s: float) -> float:
        """How long a row would wait that comes at that instant, with `company` rows before it."""
        if at_s < self._at_s:
            at_s = self._in_order_s(at_s, known.at(size))
        rows = self._rows
        if not rows:
            return 0.0
        if rows < size - NOTHING_ROWS and (at_s <= self._start_s or rows <= company + NOTHING_ROWS):
            free_s = self._free_s
        elif len(self._ends_s) + 1 < slots:
            return 0.0
        else:
            free_s = self._end_s(known)
            if self._ends_s and self._ends_s[0] < free_s:
                free_s = self._ends_s[0]
        return free_s - at_s if free_s > at_s else 0.0

    def add(
        self, rows: float, company: float, size: int, slots: int, known: Durations, at_s: float
    ) -> None:
        """A request with so many rows was admitted; `known` durations of batches."""
        if at_s < self._at_s:
            at_s = self._in_order_s(at_s, known.at(size))
        self._at_s = at_s
        while rows > NOTHING_ROWS:
            there = self._rows
            if not 0.0 < there < size - NOTHING_ROWS or (
                at_s > self._start_s and there > company + NOTHING_ROWS
            ):
                there = 0.0
                self._open(slots, known, at_s)
            elif at_s > self._start_s:
                self._start_s = at_s
            joined = size - there
            if joined > rows:
                joined = rows
            self._rows = there + joined
            rows -= joined

    def _in_order_s(self, at_s: float, batch_s: float) -> float:
        """Not before whoever was admitted before. Where that one was expected long after it, those
        ahead are gone (they were cancelled, or machines came up): they are forgotten.
        """
        if at_s < self._at_s - batch_s:
            self._ends_s.clear()
            self._free_s = self._start_s = -inf
            self._rows = 0.0
            self._at_s = at_s
        return self._at_s

    def _open(self, slots: int, known: Durations, at_s: float) -> None:
        """Another batch, on the slot that is free first."""
        ends_s = self._ends_s
        if self._rows:
            heappush(ends_s, self._end_s(known))
        free_s = at_s
        while len(ends_s) >= slots:
            # More than one where slots have gone.
            free_s = heappop(ends_s)
        self._free_s = free_s
        self._start_s = free_s if free_s > at_s else at_s

    def _end_s(self, known: Durations) -> float:
        """When the last batch is over; what is less than a row takes as much less."""
        rows = self._rows
        if rows < 1.0:
            return self._start_s + known.at(1) * rows
        return self._start_s + known.at(round(rows))
