"""What every dispatch policy is to the dispatcher: a collector of one module's waiting rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from paceline.core.values import value
from paceline.dispatch.holders import Machine
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.queue import Entry, ModuleQueue, Order, Piece
from paceline.dispatch.route import ModuleRoute

TIE_S = 1e-9
"""Instants this close are the same: planned rates fill batches exactly when machines free up."""


@value
class Offer:
    """A batch that could be launched now. `closed` ones go first, then by `order`."""

    queue: ModuleQueue
    head: Entry
    machine: Machine
    size: int
    closed: bool
    lot: int = 0

    @property
    def rank(self) -> tuple[bool, Order]:
        return (not self.closed, self.head.order)

    def led_by(self, entry: Entry) -> Offer:
        """The batch of the same queue that starts with another entry."""
        return replace(self, head=entry)

    def take(self) -> tuple[Piece, ...]:
        """Its rows, taken out of the queue."""
        return self.queue.take(self.size, self.head)


class Collector(Protocol):
    """One module's waiting rows under one policy."""

    route: ModuleRoute

    @property
    def rows(self) -> int:
        """Rows waiting."""
        ...

    def add(self, entry: Entry, now_s: float) -> list[Entry]:
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

    def launched(self, offer: Offer) -> None:
        """An offer was taken up."""
        ...

    def ended(self, lot: int) -> None:
        """A batch of that lot came back."""
        ...
