"""When rows that are on their way to a module could start there: not before they have come.

`Arrivals` is the queue that admitted requests are foreseen to form at a module: each comes when its
parents' batches are expected to end, and joins a batch, on the slot that is free first. What is
ahead of a request says less: work that has not come yet cannot be done, though machines be free for
it now.

It is a forecast of a forecast and never corrected: what waits here is the least that a request has
to wait for others, were everything in time. Rows that one batch brings come together, in one batch.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from paceline.core.profile import Durations
from paceline.dispatch.collector import NOTHING_ROWS
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.route import ModuleRoute

if TYPE_CHECKING:
    from paceline.dispatch.stage import Served


class Arrivals:
    """See the module docstring; of one priority. Rows may be expected ones, and so fractions.

    Batches of up to `size` rows run on `slots` slots as long as `known` says, and `more_s` longer a
    row: what is done there for the same request before others of this module get their turn.
    """

    __slots__ = (
        "_apart_s",
        "_at_s",
        "_ends_s",
        "_free_s",
        "_known",
        "_more_s",
        "_rows",
        "_size",
        "_slots",
        "_slower",
        "_start_s",
        "layout",
    )

    def __init__(self, size: int, known: Durations) -> None:
        self.layout = -1
        """Of the machines that `placed` was told of."""
        self._size = size
        self._known = known
        self._slots = 1
        self._slower = 1.0
        self._more_s = 0.0
        self._apart_s = 0.0
        self._at_s = -inf
        """When the last row that was admitted comes."""
        self._ends_s: list[float] = []
        """When slots are free again, but for that of the last batch: a heap."""
        self._free_s = -inf
        """When the last batch's slot is free for it,"""
        self._start_s = -inf
        """when it starts, and"""
        self._rows = 0.0
        """its rows; 0 before there is any."""

    def placed(self, layout: int, slots: float, more_s: float, apart_s: float) -> None:
        """Machines came or went. `apart_s`: by how much those who come together may have been
        expected apart. A part of a slot makes the others as much faster.
        """
        self.layout = layout
        self._apart_s = apart_s
        self._slots = max(1, round(slots))
        self._slower = self._slots / slots if slots > 0 else 1.0
        self._more_s = more_s

    def wait_s(self, company: float, at_s: float) -> float:
        """How long a row would wait that comes at that instant, with `company` rows before it."""
        if at_s < self._at_s:
            at_s = self._in_order_s(at_s)
        rows = self._rows
        if not rows:
            return 0.0
        if rows < self._size - NOTHING_ROWS and (
            at_s <= self._start_s or rows <= company + NOTHING_ROWS
        ):
            free_s = self._free_s
        elif len(self._ends_s) + 1 < self._slots:
            return 0.0
        else:
            free_s = self._end_s()
            if self._ends_s and self._ends_s[0] < free_s:
                free_s = self._ends_s[0]
        return free_s - at_s if free_s > at_s else 0.0

    def add(self, rows: float, company: float, at_s: float) -> None:
        """A request was admitted that comes at that instant with so many rows."""
        if at_s < self._at_s:
            at_s = self._in_order_s(at_s)
        self._at_s = at_s
        while rows > NOTHING_ROWS:
            there = self._rows
            if not 0.0 < there < self._size - NOTHING_ROWS or (
                at_s > self._start_s and there > company + NOTHING_ROWS
            ):
                there = 0.0
                self._open(at_s)
            elif at_s > self._start_s:
                self._start_s = at_s
            joined = self._size - there
            if joined > rows:
                joined = rows
            self._rows = there + joined
            rows -= joined

    def _in_order_s(self, at_s: float) -> float:
        """Not before whoever was admitted before. Where that one was expected long after it, those
        ahead are gone (they were cancelled, or machines came up): they are forgotten.
        """
        if at_s < self._at_s - self._apart_s:
            self._ends_s.clear()
            self._free_s = self._start_s = -inf
            self._rows = 0.0
            self._at_s = at_s
        return self._at_s

    def _open(self, at_s: float) -> None:
        """Another batch, on the slot that is free first."""
        ends_s = self._ends_s
        if self._rows:
            heappush(ends_s, self._end_s())
        free_s = at_s
        while ends_s and len(ends_s) >= self._slots:
            # More than one where slots have gone.
            free_s = heappop(ends_s)
        self._free_s = free_s
        self._start_s = free_s if free_s > at_s else at_s

    def _end_s(self) -> float:
        """When the last batch is over; what is less than a row takes as much less."""
        rows = self._rows
        took_s = self._known.at(round(rows)) if rows >= 1.0 else self._known.at(1) * rows
        return self._start_s + took_s * self._slower + self._more_s * rows


def first_arrivals(served: Served, place: int, at_level: int, pool: MachinePool) -> Arrivals | None:
    """The module's first ones of a priority; None where it is not known how long it takes."""
    stage = served.stages[place]
    if stage.route.best is None:
        return None
    arrivals = stage.arrivals[at_level] = Arrivals(stage.route.full_rows, stage.route.best)
    placed(arrivals, served, place, pool)
    return arrivals


def placed(arrivals: Arrivals, served: Served, place: int, pool: MachinePool) -> None:
    """Tell it of the machines: its slots, and what a request takes of them at modules that do not
    come before this one. (What comes before it waits for those who entered earlier.)
    """
    route = served.stages[place].route
    home = route.home
    slots = _slots_of(route, pool)
    work_s = sum(
        served.fan_outs[other] * stage.route.row_s * pool.part_of(home, stage.route.home)
        for other, stage in enumerate(served.stages)
        if other != place and other not in served.above[place]
    )
    own = served.fan_outs[place]
    more_s = work_s * slots / own if own > 0 else 0.0
    # How long a batch takes there is foreseen by its rows up to then.
    parents = [served.stages[parent].route for parent in served.parents[place]]
    apart_s = max((route.best_s(route.full_rows) for route in parents), default=0.0)
    arrivals.placed(pool.layout, slots, more_s, apart_s)


def _slots_of(route: ModuleRoute, pool: MachinePool) -> float:
    """How many slots of the best hardware do as much as those that it may use."""
    usable = pool.usable(route.home)
    if len(usable) < 2:
        return sum(usable.values())
    found = 0.0
    for kind, slots in usable.items():
        known, size = route.durations.get(kind), route.batch_size(kind)
        found += slots * route.row_s * size / known.at(size) if known is not None else slots
    return found
