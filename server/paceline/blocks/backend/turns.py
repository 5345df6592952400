"""Whose load goes on next: fair by weight, in small pieces, without starvation. Pure.

Loads share disks and stores, one of them at a time, and the cores, on which they build sessions, as
many at a time as there are. Stride scheduling: each load has a virtual time on each of these
channels that advances by bytes (or seconds) / weight, and the smallest one goes next. An urgent
load, one that a request waits for, weighs more: it overtakes at the next piece and then gets almost
everything, but a load of any weight goes on. A load that comes or comes back starts a turn behind
those that are there at most, so nobody saves up turns. Cicada's priority-aware scheduler. Where
Paceline decided which share of a disk or store a load gets (`Load.share`, by the deadlines of those
who wait), that is its weight, at the cores as well: all that are shared out weigh as much together
as one urgent load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

URGENT_WEIGHT = 16.0
TURN_S = 0.02
"""So long what follows the first piece of work is of the same turn."""
LEASE_S = 2.0
"""A turn that takes longer (a store that hangs) no longer keeps the others waiting."""


@dataclass(frozen=True, slots=True)
class Load:
    """One process's loading on one channel: a disk, a store, the cores."""

    channel: str
    virtual: float = 0.0
    weight: float = 1.0
    waiting: bool = False
    holding_since_s: float | None = None
    share: float = 0.0
    """Of the channel, 0 to 1; 0: nobody decided."""
    bell: str = ""
    """Rings when it may be its turn."""

    @property
    def busy(self) -> bool:
        """Whether it has a turn or waits for one."""
        return self.waiting or self.holding_since_s is not None


def weight(*, urgent: bool, priority: int, share: float = 0.0) -> float:
    """Every priority below the first halves it; a share that was decided has both in it."""
    if share > 0.0:
        return URGENT_WEIGHT * share
    return (URGENT_WEIGHT if urgent else 1.0) / 2.0 ** min(priority, 6)


def asked(loads: Mapping[str, Load], name: str, weight: float, *, turn: float) -> Load:
    """`name`'s load, once it has asked for a turn; `turn` is what one uses at most."""
    load = loads[name]
    if load.waiting:
        return replace(load, weight=weight)
    # Whoever asks again at once is not there for a moment; a turn of the others is that long.
    least = [
        other.virtual - turn / other.weight
        for key, other in loads.items()
        if key != name and other.channel == load.channel and other.busy
    ]
    return replace(
        load, virtual=max(load.virtual, min(least, default=0.0)), weight=weight, waiting=True
    )


def next_loads(
    loads: Mapping[str, Load], channel: str, now_s: float, *, places: int = 1, piece: float = 0.0
) -> list[str]:
    """Who may go now: of those that wait as many as fit beside those that are at it.

    Whoever is at its last `piece` of work (at most), its turn being over, need not be waited for by
    who will be next after that: so the disk or store is not idle between two turns. One at a time.

    >>> waiting = {name: Load("disk", virtual=turn, waiting=True) for name, turn in
    ...            (("a", 5.0), ("b", 4.0), ("c", 6.0))}
    >>> next_loads(waiting, "disk", 0.0), next_loads(waiting, "disk", 0.0, places=2)
    (['b'], ['b', 'a'])
    >>> at_it = {**waiting, "d": Load("disk", virtual=3.0, holding_since_s=0.0)}
    >>> next_loads(at_it, "disk", 0.01, piece=8.0), next_loads(at_it, "disk", TURN_S, piece=8.0)
    ([], ['b'])
    >>> next_loads(at_it, "disk", TURN_S, piece=0.5)  # then the turn after this is d's again
    []
    """
    here = {name: load for name, load in loads.items() if load.channel == channel}
    at_it = [
        (now_s - load.holding_since_s, load.virtual + piece / load.weight)
        for load in here.values()
        if load.holding_since_s is not None and now_s - load.holding_since_s < LEASE_S
    ]
    waiting = [(load.virtual, -load.weight, name) for name, load in here.items() if load.waiting]
    following = sorted(waiting)[: max(places - len(at_it), 0)]
    if piece and waiting and len(at_it) == places:
        first = min(waiting)
        if any(held_s >= TURN_S and first[0] < after for held_s, after in at_it):
            following = [first]
    return [name for *_, name in following]


def began(load: Load, now_s: float) -> Load:
    return replace(load, waiting=False, holding_since_s=now_s)


def ended(load: Load, amount: float) -> Load:
    return replace(load, virtual=load.virtual + amount / load.weight, holding_since_s=None)
