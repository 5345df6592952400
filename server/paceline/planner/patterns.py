"""What one machine might do that is worth more than its price, for `columns` to choose from.

Invariant: a pattern by urgency is what `urgency.Due` accepts, stream by stream as it was found; one
in a duty cycle is what `cycle.in_cycle` accepts.

Loads have a worth each (the duals of a linear program). A pattern begins with one load and takes on
whatever is worth most above the price of the time it takes, until nothing fits. It is the same rule
as `Due.room`, for all machines and all loads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.planner.cycle import SLACK, Load, Size
from paceline.planner.frontier import Floats
from paceline.planner.hull import Index
from paceline.planner.pack import LEAST_PART
from paceline.planner.schedule import TOLERANCE

Truths = npt.NDArray[np.bool_]

MOST_LOADS = 9
"""So many loads at most are put on a machine by urgency."""

ROUNDING = 1e-4
"""Parts leave so much of their room: added up they may have to be a little more."""

AT_ONCE = 64
"""So many machines are filled at the same time: the arrays stay in the processor's caches."""


@dataclass(frozen=True, slots=True)
class Offers:
    """Every load in every batch size that it may have on one kind of machine, one entry each.

    A machine has one load at most of each `owner`.
    """

    load: Index
    owner: Index
    duration_s: Floats
    deadline_s: Floats
    busy: Floats
    jitter_s: Floats
    part_jitter_s: Floats
    memory_bytes: Floats
    model: Index
    size: Index

    @classmethod
    def of(
        cls,
        loads: Sequence[Load],
        sizes: Sequence[Sequence[Size]],
        part_jitters_s: Sequence[float],
        hardware: str,
    ) -> Offers:
        """`sizes`: of every load on this hardware; none: it does not run there."""
        owners: dict[tuple[str, str], int] = {}
        models = {name: at for at, name in enumerate(sorted({load.model for load in loads}))}
        rows = [
            (
                at,
                owners.setdefault((load.chain, load.module), len(owners)),
                size.duration_s,
                size.deadline_s,
                load.rate_rps * size.row_s,
                load.jitter_s,
                jitter_s,
                load.memory_bytes.get(hardware, 0),
                models[load.model],
                i,
            )
            for at, (load, own, jitter_s) in enumerate(
                zip(loads, sizes, part_jitters_s, strict=True)
            )
            for i, size in enumerate(own)
        ]
        columns = list(zip(*rows, strict=True)) or [()] * len(fields(cls))
        whole = {"load", "owner", "model", "size"}
        arrays: list[Any] = [
            np.array(column, dtype=np.intp if field.name in whole else np.float64)
            for field, column in zip(fields(cls), columns, strict=True)
        ]
        return cls(*arrays)

    def __getitem__(self, at: Index) -> Offers:
        return Offers(*(getattr(self, field.name)[at] for field in fields(self)))


@dataclass(slots=True)
class Machines:
    """Several machines, one a row, with as many streams each: what `Due` knows of one of them."""

    duration_s: Floats
    deadline_s: Floats
    busy: Floats
    jitter_s: Floats

    @classmethod
    def empty(cls, count: int) -> Machines:
        nothing = np.zeros((count, 0))
        return cls(nothing, nothing, nothing, nothing)

    def joined(
        self, rows: Index, duration_s: Floats, deadline_s: Floats, busy: Floats, jitter_s: Floats
    ) -> Machines:
        """These rows with one stream more each."""

        def add(all_rows: Floats, one: Floats) -> Floats:
            return np.concatenate((all_rows[rows], one[:, None]), axis=1)

        return Machines(
            add(self.duration_s, duration_s),
            add(self.deadline_s, deadline_s),
            add(self.busy, busy),
            add(self.jitter_s, jitter_s),
        )

    def _left(self) -> tuple[Floats, Floats]:
        """At each stream's deadline the time left, and the longest batch due later."""
        at_s, of_s = self.deadline_s[:, :, None], self.deadline_s[:, None, :]
        within, duration_s = of_s <= at_s, self.duration_s[:, None, :]
        late_s = at_s - of_s + self.jitter_s[:, None, :]
        taken_s = np.where(within, duration_s + self.busy[:, None, :] * late_s, 0.0).sum(axis=2)
        later_s = np.where(within, 0.0, duration_s).max(axis=2, initial=0.0)
        return self.deadline_s - taken_s, later_s

    def rooms(self, offers: Offers) -> tuple[Floats, Floats]:
        """By machine and offer the share of its time that it may give: whole loads, parts."""
        left_s, later_s = self._left()
        shape = (len(self.busy), len(offers.load))
        own_s = np.broadcast_to(offers.deadline_s - offers.duration_s, shape).copy()
        blocked_s, late = np.zeros(shape), np.zeros(shape, dtype=bool)
        most = np.broadcast_to(1.0 - self.busy.sum(axis=1)[:, None], shape)
        most_part = most
        for k in range(self.busy.shape[1]):
            deadline_s, duration_s = self.deadline_s[:, k, None], self.duration_s[:, k, None]
            before_s = offers.deadline_s - deadline_s
            before = before_s > 0
            spare_s = left_s[:, k, None] - np.where(before, 0.0, later_s[:, k, None])
            spare_s = spare_s - offers.duration_s
            late |= spare_s < -TOLERANCE
            most = _least(most, spare_s, offers.jitter_s - before_s, before)
            most_part = _least(most_part, spare_s, offers.part_jitter_s - before_s, before)
            taken_s = duration_s + self.busy[:, k, None] * (before_s + self.jitter_s[:, k, None])
            own_s -= np.where(before_s >= 0, taken_s, 0.0)
            np.maximum(blocked_s, np.where(before_s < 0, duration_s, 0.0), out=blocked_s)
        own_s -= blocked_s
        late |= own_s < -TOLERANCE
        nothing = np.zeros(shape, dtype=bool)
        most = _least(most, own_s, np.broadcast_to(offers.jitter_s, shape), nothing)
        most_part = _least(most_part, own_s, np.broadcast_to(offers.part_jitter_s, shape), nothing)
        return np.where(late, 0.0, most).clip(0.0), np.where(late, 0.0, most_part).clip(0.0)


def _least(most: Floats, spare_s: Floats, over_s: Floats, before: Truths) -> Floats:
    """`most` or what is spare per second over, whichever is less."""
    limited = ~before & (over_s > 0)
    found = np.full(most.shape, inf)
    np.divide(spare_s, over_s, out=found, where=limited)
    least: Floats = np.minimum(most, found)
    return least


def by_urgency(
    offers: Offers, worth: Floats, price: float, most_bytes: int, *, eager: float, turn: int
) -> Iterator[list[tuple[int, float]]]:
    """Patterns worth more than `price`: offers, and how much of each load.

    One begins with each load, in a batch size that changes with `turn`; what is taken on must be
    worth more than `eager` times the price of its time. `most_bytes` 0: no limit.
    """
    above = worth[offers.load] - eager * price * offers.busy
    useful = np.flatnonzero(above > 0)
    for seeds in _seeds(offers, worth, turn):
        filling = Filling.begun(offers, worth, seeds)
        # Patterns differ although they are filled by one rule: every other time loads are preferred
        # by fractions of multiples of irrational numbers, which is as good as chance.
        liked = np.broadcast_to(above[useful], (len(filling.rows), len(useful)))
        if turn % 2:
            mixed = seeds[filling.rows][:, None] * 0.7548776662 + useful * 0.5698402910
            liked = liked * (1.0 + 0.3 * ((mixed + turn * 0.6180339887) % 1.0))
        for _ in range(MOST_LOADS - 1):
            if not len(useful) or not len(filling.rows):
                break
            liked = liked[filling.take_best(useful, liked, most_bytes)]
        for pattern, value in zip(filling.found, filling.total.tolist(), strict=True):
            if value > price * (1 + 1e-6):
                yield pattern


def _seeds(offers: Offers, worth: Floats, turn: int) -> Iterator[Index]:
    """A batch size of each load that is worth something, some at a time."""
    first = np.flatnonzero(np.diff(offers.load, prepend=-1))
    counts = np.diff(np.append(first, len(offers.load)))
    seeds = (first + turn % np.maximum(counts, 1))[worth[offers.load[first]] > 0]
    for at in range(0, len(seeds), AT_ONCE):
        yield seeds[at : at + AT_ONCE]


@dataclass(slots=True)
class Filling:
    """Machines that are being filled; those that may take more are `rows` of the others' arrays."""

    offers: Offers
    worth: Floats
    rows: Index
    machines: Machines
    found: list[list[tuple[int, float]]]
    total: Floats
    taken: Truths
    resident: Truths
    memory_bytes: Floats

    @classmethod
    def begun(cls, offers: Offers, worth: Floats, seeds: Index) -> Filling:
        count = len(seeds)
        filling = cls(
            offers,
            worth,
            np.arange(count),
            Machines.empty(count),
            [[] for _ in seeds],
            np.zeros(count),
            np.zeros((count, int(offers.owner.max(initial=0)) + 1), dtype=bool),
            np.zeros((count, int(offers.model.max(initial=0)) + 1), dtype=bool),
            np.zeros(count),
        )
        first = offers[seeds]
        rooms, part_rooms = (each.diagonal() for each in filling.machines.rooms(first))
        share, whole = _shares(rooms, part_rooms, first.busy)
        at = np.flatnonzero(share)
        filling._take(at, seeds[at], share[at], whole[at])
        return filling

    def take_best(self, useful: Index, liked: Floats, most_bytes: int) -> Index:
        """Each takes on what is liked best, as far as there is room; which ones took something."""
        offers = self.offers[useful]
        rooms, part_rooms = self.machines.rooms(offers)
        share, whole = _shares(rooms, part_rooms, offers.busy)
        share[self.taken[self.rows][:, offers.owner]] = 0.0
        if most_bytes:
            there = self.resident[self.rows][:, offers.model]
            more_bytes = np.where(there, 0.0, offers.memory_bytes)
            share[self.memory_bytes[self.rows, None] + more_bytes > most_bytes] = 0.0
        gain = share * liked
        best = gain.argmax(axis=1)
        at = np.flatnonzero(gain[np.arange(len(best)), best] > TOLERANCE)
        best = best[at]
        self._take(at, useful[best], share[at, best], whole[at, best])
        return at

    def _take(self, at: Index, chosen: Index, share: Floats, whole: Truths) -> None:
        offers, rows = self.offers[chosen], self.rows[at]
        jitter_s = np.where(whole, offers.jitter_s, offers.part_jitter_s)
        self.machines = self.machines.joined(
            at, offers.duration_s, offers.deadline_s, share * offers.busy, jitter_s
        )
        for row, offer, part in zip(rows.tolist(), chosen.tolist(), share.tolist(), strict=True):
            self.found[row].append((offer, part))
        self.rows = rows
        self.total[rows] += self.worth[offers.load] * share
        self.taken[rows, offers.owner] = True
        there = self.resident[rows, offers.model]
        self.memory_bytes[rows] += np.where(there, 0.0, offers.memory_bytes)
        self.resident[rows, offers.model] = True


def _shares(rooms: Floats, part_rooms: Floats, busy: Floats) -> tuple[Floats, Truths]:
    """How much of each load there is room for; whether all of it as one."""
    whole = rooms >= busy - SLACK
    part = np.minimum(1.0, part_rooms * (1 - ROUNDING) / busy)
    return np.where(whole, 1.0, np.where(part * busy > LEAST_PART, part, 0.0)), whole


@dataclass(frozen=True, slots=True)
class Rounds:
    """All loads as a duty cycle on one kind of machine has them."""

    rate_rps: Floats
    total_rps: Floats
    budget_s: Floats
    longest_s: Floats
    sizes: Index
    duration_s: Floats

    @classmethod
    def of(cls, loads: Sequence[Load], hardware: str) -> Rounds:
        """`duration_s`: by load and batch size, infinite above what it has."""
        durations = [load.durations_s.get(hardware, ()) for load in loads]
        longest_s = [
            load.longest_cycle_s(hardware) if hardware in load.durations_s else 0.0
            for load in loads
        ]
        table = np.full((len(loads), max(map(len, durations), default=0)), inf)
        for row, each in zip(table, durations, strict=True):
            row[: len(each)] = each
        return cls(
            np.array([load.rate_rps for load in loads]),
            np.array([load.total_rps for load in loads]),
            np.array([load.budget_s for load in loads]),
            np.array(longest_s),
            np.array([len(each) for each in durations], dtype=np.intp),
            table,
        )


def in_cycles(
    rounds: Rounds, worth: Floats, price: float, *, eager: float
) -> Iterator[tuple[float, list[int]]]:
    """Cycles worth more than `price`, and their loads; each as long as some load can have it."""
    cycles_s = np.unique(rounds.longest_s[(rounds.longest_s > 0) & (worth > 0)])[:, None]
    if not len(cycles_s):
        return
    size = np.maximum(1, np.ceil(rounds.rate_rps * cycles_s - 1e-6)).astype(np.intp)
    fits = size <= rounds.sizes
    at = np.minimum(size, np.maximum(rounds.sizes, 1)) - 1
    duration_s = rounds.duration_s[np.arange(len(worth)), at]
    worst_s = cycles_s * rounds.rate_rps / rounds.total_rps + duration_s
    fits &= (worst_s <= rounds.budget_s) & (worth > eager * price * duration_s / cycles_s)
    density = np.where(fits, worth / duration_s, 0.0)
    order = np.argsort(-density, axis=1, kind="stable")
    rows = np.arange(len(cycles_s))
    busy_s, total = np.zeros(len(rows)), np.zeros(len(rows))
    taken = np.zeros(density.shape, dtype=bool)
    for best in order.T[: int(fits.sum(axis=1).max())]:
        after_s = busy_s + duration_s[rows, best]
        takes = fits[rows, best] & (after_s <= cycles_s[:, 0])
        busy_s = np.where(takes, after_s, busy_s)
        total += np.where(takes, worth[best], 0.0)
        taken[rows, best] = takes
    for row in np.flatnonzero(total > price * (1 + 1e-6)):
        yield float(cycles_s[row, 0]), np.flatnonzero(taken[row]).tolist()


def part_jitter_s(load: Load, sizes: Mapping[str, Sequence[Size]]) -> float:
    """How long a batch of a part may wait for one of the same module's that fills before it."""
    largest = max((size.batch_size for own in sizes.values() for size in own), default=0)
    return max(load.jitter_s, largest / load.total_rps)
