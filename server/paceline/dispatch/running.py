"""Batches on their machines, each with the instant at which somebody has to look at it.

A batch is looked at when the first deadline of its rows passes, and when it is overdue: when it has
taken so much longer than is normal there that its rows are worth a second machine (`retries`).
Invariant: a batch has one look ahead of it; looks of batches that have ended are forgotten when
they are as many as the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from math import inf

from paceline.dispatch.batch import Batch

_FEW = 64
"""Looks that are not worth sorting out."""


class Running:
    """See the module docstring."""

    __slots__ = ("_batches", "_looks", "look_s")

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self._looks: list[tuple[float, int]] = []
        self.look_s = inf
        """Not before this a batch has to be looked at; inf without any."""

    def all(self) -> Iterator[Batch]:
        yield from self._batches.values()

    def add(self, number: int, batch: Batch, look_s: float) -> None:
        """A batch goes to its machine."""
        self._batches[number] = batch
        looks = self._looks
        if len(looks) > _FEW and len(looks) > 2 * len(self._batches):
            looks[:] = [look for look in looks if look[1] in self._batches]
            heapq.heapify(looks)
        heapq.heappush(looks, (look_s, number))
        if look_s < self.look_s:
            self.look_s = look_s

    def replace(self, number: int, batch: Batch) -> None:
        """Other rows of it count from now on."""
        self._batches[number] = batch

    def again(self, number: int, look_s: float) -> None:
        """Look at it once more."""
        heapq.heappush(self._looks, (look_s, number))
        self.look_s = self._looks[0][0]

    def pop(self, number: int) -> Batch:
        """It came back."""
        return self._batches.pop(number)

    def due(self, now_s: float) -> list[tuple[float, int, Batch]]:
        """Batches to be looked at now, and since when; their looks are over."""
        looks, found = self._looks, []
        while looks and looks[0][0] <= now_s:
            at_s, number = heapq.heappop(looks)
            if (batch := self._batches.get(number)) is not None:
                found.append((at_s, number, batch))
        self.look_s = looks[0][0] if looks else inf
        return found
