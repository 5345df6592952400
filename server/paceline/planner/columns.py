"""Which of many patterns a packing's machines have: a linear program prices loads, an integer one
chooses (cutting stock by columns: Gilmore and Gomory 1961).

Invariant: the packing that comes out serves the same loads, costs no more, and every machine of it
is what `urgency.Due` or `cycle.in_cycle` accepts.

Columns are machines: those of a packing that is there, each load's own, and patterns that are worth
more than a machine's price when loads are worth their duals. After some turns few are. Then whole
machines are chosen from the columns so that every load is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
import scipy  # its parts when they are used: to import them takes 0.3 s, few plans need them

from paceline.planner.cycle import SLACK, Load, Size, in_cycle
from paceline.planner.frontier import Floats
from paceline.planner.pack import Machine, Packing, Shared, due_of, pack
from paceline.planner.patterns import (
    Offers,
    Rounds,
    by_urgency,
    in_cycles,
    part_jitter_s,
)
from paceline.planner.schedule import cheaper

TURNS = 16
"""How often patterns are looked for at new prices, at most."""

EAGER = (1.0, 0.7, 0.9, 0.5)
"""What is put on a machine is worth more than so many times the price of its time; in turns."""

NEAR = 0.1
"""Columns that are dearer than their loads by more than this share of a machine are not chosen."""

MANY = 80
"""For fewer loads patterns are not looked for: that takes a second, and they are packed well."""

WHOLE = 0.99
"""Of a machine that the linear program has so much of, all is taken."""

FEW = 250
"""So many loads are left to an integer program."""

ROUNDING = 1e-7
"""A load is served if so little of it is not; that is added to one of its parts."""

GAP, NODES = 0.004, 20
"""Its choice is within this of its best, or is ended after so many nodes of its search."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A machine and how much of which loads it serves."""

    shared: Shared
    parts: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class _Priced:
    """The cost if machines could be had in part; what each load is worth, and one machine more of a
    kind that there are only so many of; and by how much each column is dearer than its loads."""

    cost: float
    worth: Floats
    dearer: Mapping[str, float]
    reduced: Floats


@dataclass(slots=True)
class _Columns:
    """All columns, none of them twice; the first `packed` serve every load."""

    loads: Sequence[Load]
    kinds: dict[str, Machine]
    left: dict[str, float]
    packed: int
    columns: list[_Column] = field(default_factory=list)
    _known: set[tuple[object, ...]] = field(default_factory=set)
    _rows: list[int] = field(default_factory=list)
    _at: list[int] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)

    def add(self, column: _Column) -> bool:
        """Whether it was not known."""
        shared = column.shared
        key = (
            shared.machine.hardware,
            0.0 if shared.cycle is None else shared.cycle.duration_s,
            tuple(sorted((load, round(part, 6)) for load, part in column.parts)),
        )
        if key in self._known:
            return False
        self._known.add(key)
        for load, part in column.parts:
            self._rows.append(load)
            self._at.append(len(self.columns))
            self._values.append(part)
        self.columns.append(column)
        return True

    def prices(self) -> Floats:
        return np.array([column.shared.machine.price_per_hour for column in self.columns])

    def matrix(self) -> scipy.sparse.csc_array:
        """Loads' parts by column."""
        shape = (len(self.loads), len(self.columns))
        return scipy.sparse.csc_array((self._values, (self._rows, self._at)), shape=shape)

    def scarce(self) -> list[str]:
        """Kinds that there are only so many of."""
        return [kind for kind, left in sorted(self.left.items()) if left < inf]

    def limited(self) -> tuple[scipy.sparse.csc_array, Floats]:
        """Which columns are of each scarce kind, and how many of it are left."""
        kinds = self.scarce()
        rows = [[each.shared.machine.hardware == kind for each in self.columns] for kind in kinds]
        matrix = scipy.sparse.csc_array(
            np.array(rows, dtype=float).reshape(len(kinds), len(self.columns))
        )
        return matrix, np.array([self.left[kind] for kind in kinds])

    def priced(self) -> _Priced | None:
        """If machines could be had in part; None if not even so there are enough."""
        limited, left = self.limited()
        answer = scipy.optimize.linprog(
            self.prices(),
            A_ub=scipy.sparse.vstack((-self.matrix(), limited)),
            b_ub=np.concatenate((-np.ones(len(self.loads)), left)),
            method="highs",
        )
        if not answer.success:
            return None
        duals = np.maximum(0.0, -np.asarray(answer.ineqlin.marginals))
        count = len(self.loads)
        dearer = dict(zip(self.scarce(), duals[count:].tolist(), strict=True))
        reduced = self.prices() - self.matrix().T @ duals[:count] + limited.T @ duals[count:]
        return _Priced(float(answer.fun), duals[:count], dearer, reduced)

    def chosen(self, priced: _Priced) -> list[_Column]:
        """Whole machines that serve every load; none where no choice was found.

        Those that the linear program has whole, or nearly, are taken, and it is solved again for
        what is left; when that is little, an integer program chooses.
        """
        near = np.flatnonzero(
            (priced.reduced <= NEAR * self.prices()) | (np.arange(len(self.columns)) < self.packed)
        )
        matrix = self.matrix()[:, near]
        limited, left = self.limited()
        taken: list[int] = []
        unserved, limited = np.ones(len(self.loads)), limited[:, near]
        while np.count_nonzero(unserved) > FEW:
            answer = scipy.optimize.linprog(
                self.prices()[near],
                A_ub=scipy.sparse.vstack((-matrix, limited)),
                b_ub=np.concatenate((ROUNDING - unserved, left)),
                bounds=(0.0, 1.0),
                method="highs",
            )
            if not answer.success:
                return []
            whole = np.flatnonzero(answer.x >= min(WHOLE, float(answer.x.max())))
            for at in whole.tolist():
                taken.append(int(near[at]))
                unserved = np.maximum(0.0, unserved - matrix[:, [at]].toarray()[:, 0])
                left = left - limited[:, [at]].toarray()[:, 0]
            unserved[unserved < SLACK] = 0.0
            useful = matrix.T @ unserved > SLACK
            useful[whole] = False
            near, matrix, limited = near[useful], matrix[:, useful], limited[:, useful]
        if not unserved.any():
            return [self.columns[at] for at in taken]
        answer = scipy.optimize.milp(
            self.prices()[near],
            integrality=np.ones(len(near)),
            bounds=scipy.optimize.Bounds(0.0, 1.0),
            constraints=scipy.optimize.LinearConstraint(
                scipy.sparse.vstack((-matrix, limited)),
                ub=np.concatenate((ROUNDING - unserved, left)),
            ),
            # What presolve saves it takes: the linear program has chosen most of the machines.
            options={"mip_rel_gap": GAP, "node_limit": NODES, "presolve": False},
        )
        if answer.x is None:
            return []
        return [self.columns[at] for at in [*taken, *near[answer.x > 0.5].tolist()]]


def packed(
    loads: Sequence[Load],
    machines: Mapping[str, Machine],
    used: Mapping[str, int],
    below: float = inf,
) -> Packing | None:
    """The cheapest packing found of `loads`; `used` machines count towards the limits.

    None when a limit leaves no machine for a load. If none costs less than `below`, just any.
    """
    many = len(loads) >= MANY
    found = pack(loads, machines, used, thorough=not many)
    return repacked(found, loads, below) if found is not None and many else found


def repacked(packing: Packing, loads: Sequence[Load], below: float = inf) -> Packing:
    """A packing of the same `loads` that costs no more; or just any, if none costs less than
    `below`."""
    left = {
        hardware: machine.limit
        - packing.used.get(hardware, 0)
        + sum(each.machine.hardware == hardware for each in packing.shared)
        for hardware, machine in packing.machines.items()
    }
    columns = _Columns(loads, dict(packing.machines), left, len(packing.shared))
    for column in _known(packing, loads):
        columns.add(column)
    _search(columns, packing)
    priced = columns.priced()
    if priced is None or not cheaper(priced.cost, min(below, packing.cost_per_hour)):
        return packing
    shared = list(_without_surplus(columns.chosen(priced), loads))
    if not shared or not cheaper(_cost(shared), packing.cost_per_hour):
        return packing
    if not all(each.cycle or each.due is None or each.due.in_time for each in shared):
        return packing
    used = dict(packing.used)
    for each in packing.shared:
        used[each.machine.hardware] -= 1
    for each in shared:
        used[each.machine.hardware] = used.get(each.machine.hardware, 0) + 1
    return replace(packing, used=used, shared=shared)


def _cost(shared: Sequence[Shared]) -> float:
    return sum(each.machine.price_per_hour for each in shared)


def _known(packing: Packing, loads: Sequence[Load]) -> Iterator[_Column]:
    """The packing's machines, and one of every kind for each load alone."""
    index = {(load.chain, load.module): at for at, load in enumerate(loads)}
    for each in packing.shared:
        at = [index[load.chain, load.module] for load in each.loads]
        parts = [load.rate_rps / loads[i].rate_rps for i, load in zip(at, each.loads, strict=True)]
        yield _Column(each, tuple(zip(at, parts, strict=True)))
    for i, load in enumerate(loads):
        for _, machine in sorted(packing.machines.items()):
            if (alone := packing.alone(load, machine)) is not None:
                yield _Column(alone, ((i, 1.0),))


def _search(columns: _Columns, packing: Packing) -> None:
    """Add patterns until none is worth more than its machine, or enough is enough."""
    loads = columns.loads
    sizes = [{h: packing.sizes_of(load, h) for h in load.durations_s} for load in loads]
    jitters_s = [part_jitter_s(load, own) for load, own in zip(loads, sizes, strict=True)]
    offers = {
        h: Offers.of(loads, [own.get(h, ()) for own in sizes], jitters_s, h) for h in columns.kinds
    }
    rounds = {h: Rounds.of(loads, h) for h in columns.kinds}
    idle = 0
    for turn in range(TURNS):
        priced = columns.priced()
        if priced is None:
            return
        eager, added = EAGER[turn % len(EAGER)], 0
        for hardware, machine in sorted(columns.kinds.items()):
            price = machine.price_per_hour + priced.dearer.get(hardware, 0.0)
            for pattern in by_urgency(
                offers[hardware], priced.worth, price, machine.memory_bytes, eager=eager, turn=turn
            ):
                found = _by_urgency(columns, machine, offers[hardware], sizes, jitters_s, pattern)
                added += found is not None and columns.add(found)
            for cycle_s, members in in_cycles(rounds[hardware], priced.worth, price, eager=eager):
                found = _in_cycle(loads, machine, cycle_s, members)
                added += found is not None and columns.add(found)
        idle = 0 if added else idle + 1
        if idle == len(EAGER):
            return


def _by_urgency(
    columns: _Columns,
    machine: Machine,
    offers: Offers,
    sizes: Sequence[Mapping[str, Sequence[Size]]],
    jitters_s: Sequence[float],
    pattern: Sequence[tuple[int, float]],
) -> _Column | None:
    loads, chosen, parts = [], [], []
    for offer, share in pattern:
        at = int(offers.load[offer])
        load = columns.loads[at]
        if share < 1.0:
            load = replace(load, rate_rps=load.rate_rps * share, jitter_s=jitters_s[at], part=True)
        loads.append(load)
        chosen.append(sizes[at][machine.hardware][int(offers.size[offer])])
        parts.append((at, share))
    due = due_of(loads, chosen)
    shared = Shared(machine, tuple(loads), tuple(chosen), due)
    if not due.in_time or 0 < machine.memory_bytes < shared.memory_bytes:
        return None
    return _Column(shared, tuple(parts))


def _in_cycle(
    loads: Sequence[Load], machine: Machine, cycle_s: float, members: Sequence[int]
) -> _Column | None:
    own = tuple(loads[at] for at in members)
    cycle = in_cycle(own, machine.hardware, cycle_s)
    shared = Shared(machine, own, cycle=cycle)
    if cycle is None or 0 < machine.memory_bytes < shared.memory_bytes:
        return None
    return _Column(shared, tuple((at, 1.0) for at in members))


def _without_surplus(chosen: Sequence[_Column], loads: Sequence[Load]) -> Iterator[Shared]:
    """The chosen machines; what several serve is left to as few as need be."""
    serves: list[list[tuple[float, int]]] = [[] for _ in loads]
    for at, column in enumerate(chosen):
        for load, part in column.parts:
            serves[load].append((-part, at))
    kept: list[dict[int, float]] = [{} for _ in chosen]
    for load, offers in enumerate(serves):
        left = 1.0
        for part, at in sorted(offers):
            if left > SLACK:
                kept[at][load] = min(-part, left)
                left -= kept[at][load]
        if left > 0 and offers:
            # Rounding: patterns leave so much room.
            kept[sorted(offers)[0][1]][load] += left
    for column, parts in zip(chosen, kept, strict=True):
        if parts == dict(column.parts):
            yield column.shared
        elif parts:
            yield _with_parts(column, parts, loads)


def _with_parts(column: _Column, parts: dict[int, float], loads: Sequence[Load]) -> Shared:
    """The column's machine with less to do."""
    shared = column.shared
    at = [i for i, (load, _) in enumerate(column.parts) if load in parts]
    own = tuple(
        replace(shared.loads[i], rate_rps=loads[load].rate_rps * parts[load])
        if parts[load] < 1.0
        else shared.loads[i]
        for i in at
        for load in (column.parts[i][0],)
    )
    if shared.cycle is not None:
        cycle = in_cycle(own, shared.machine.hardware, shared.cycle.duration_s)
        assert cycle is not None, f"with fewer loads a cycle of {shared.cycle} is too short"
        return Shared(shared.machine, own, cycle=cycle)
    assert shared.due is not None, f"{own} alone on a machine, and on another"
    sizes = tuple(shared.sizes[i] for i in at)
    return Shared(shared.machine, own, sizes, due_of(own, sizes))
