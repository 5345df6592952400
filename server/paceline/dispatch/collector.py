"""What every dispatch policy is to the dispatcher: a collector of one module's waiting rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from paceline.core.profile import Durations
from paceline.core.values import value
from paceline.dispatch.holders import Machine
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue, Order, Piece
from paceline.dispatch.route import ModuleRoute

TIE_S = 1e-9
"""Instants this close are the same: planned rates fill batches exactly when machines free up."""
NOTHING_ROWS = 1e-6
"""Expected rows are sums of floats: as many more or less are none."""
WORTHWHILE = 0.75
"""The share of a full batch below which it is not shrunk to save its most urgent request."""

Foreseen = tuple[float, int, int, Durations | None, float, float]
"""A batch to come: how long until it could start, its rows so far, the most it takes, durations
where it would run, the rate at which it fills, and how many rows can be started at once."""


@value
class Offer:
    """A batch that could be launched now. `closed` ones go first, then by `order`.

    `skips`: rows before `head` stay, as they wait for a quicker machine.
    """

    queue: ModuleQueue
    head: Entry
    machine: Machine
    size: int
    closed: bool
    lot: int = 0
    skips: bool = False

    @property
    def rank(self) -> tuple[bool, Order]:
        return (not self.closed, self.head.order)

    def led_by(self, entry: Entry) -> Offer:
        """The batch of the same queue that starts with another entry."""
        return replace(self, head=entry, skips=False)

    def take(self) -> tuple[Piece, ...]:
        """Its rows, taken out of the queue."""
        return self.queue.take(self.size, self.head, skips=self.skips)


class Collector(Protocol):
    """One module's waiting rows under one policy."""

    route: ModuleRoute

    @property
    def rows(self) -> int:
        """Rows waiting."""
        ...

    def add(self, entry: Entry, pool: MachinePool, now_s: float) -> list[Entry]:
        """Queue an entry; returns it, or the parts it was split into."""
        ...

    def discard(self, entry: Entry) -> None:
        """Forget what is left of an entry."""
        ...

    def queues(self) -> Iterator[ModuleQueue]:
        """Every queue it has, for looking."""
        ...

    def late(self, pool: MachinePool, now_s: float) -> list[Entry]:
        """Take out entries that cannot be in time any more."""
        ...

    def next_expiry_s(self) -> float:
        """The last instant at which a launch is in time for every entry; inf without any."""
        ...

    def offer(self, pool: MachinePool, now_s: float) -> Offer | float:
        """The batch to launch next; or when time alone could make it offer one (inf: only an event
        can).
        """
        ...

    def foreseen(
        self, rows: float, priority: int, by_s: float, pool: MachinePool, now_s: float
    ) -> Foreseen | None:
        """The batch that one more row would join, which has to be launched within `by_s`, behind
        `rows` rows of that priority or a more urgent one, which wait here or are on their way; None
        where nobody can tell.
        """
        ...

    def launched(self, offer: Offer, batch: int, ends_s: float) -> None:
        """An offer was taken up, by batch number `batch`, expected to end at `ends_s`."""
        ...

    def ended(self, lot: int, batch: int) -> None:
        """A batch of that lot came back."""
        ...


def in_time(head: Entry, machine: Machine, rows: int, now_s: float) -> int:
    """Rows that a batch may hold so that its most urgent one is still answered in time; 0 where
    not even that one would be.
    """
    route = head.stage.route
    if now_s <= head.launch_by_s and not route.helps(machine.hardware):
        return rows
    known = route.durations.get(machine.hardware)
    if known is None:
        return rows
    # `latest_s` is by the hardware that is the quickest with one row.
    left_s = head.latest_s + route.single_s - now_s + TIE_S
    low, high = 0, rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if known.at(middle) <= left_s else (low, middle - 1)
    return low


def past_saving(queue: ModuleQueue, head: Entry, machine: Machine, size: int, now_s: float) -> bool:
    """Whether the machine cannot save `head`, or only by a batch so small that it costs those
    behind it.

    Behind a full batch's worth of rows, what is past its launch-by time needs a smaller batch;
    then those behind it are late in turn.
    """
    fitting = in_time(head, machine, size, now_s)
    return fitting == 0 or (fitting < WORTHWHILE * size and queue.rows_like(head, size) >= size)
