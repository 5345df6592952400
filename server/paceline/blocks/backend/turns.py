"""Whose load may move bytes next: fair by weight, in small chunks, without starvation. Pure.

Stride scheduling: each load has a virtual time that advances by bytes / weight, and the smallest
one goes next. An urgent load, one that a request waits for, weighs more: it overtakes at the next
chunk and then gets almost everything, but a load of any weight goes on. A load that comes or comes
back starts a turn behind those that are there at most, so nobody saves up turns.
Cicada's priority-aware scheduler. Where Paceline decided which share of the channel a load gets
(`Load.share`, by the deadlines of those who wait), that is its weight: all that are shared out
weigh as much together as one urgent load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .window import CHUNK_BYTES

URGENT_WEIGHT = 16.0
LEASE_S = 2.0
"""A turn that takes longer (a store that hangs) no longer keeps the others waiting."""


@dataclass(frozen=True, slots=True)
class Load:
    """One process's loading on one channel (a disk, a store)."""

    channel: str
    virtual: float = 0.0
    weight: float = 1.0
    waiting: bool = False
    holding_since_s: float | None = None
    share: float = 0.0
    """Of the channel, 0 to 1; 0: nobody decided."""

    @property
    def busy(self) -> bool:
        """Whether it has a turn or waits for one."""
        return self.waiting or self.holding_since_s is not None


def weight(*, urgent: bool, priority: int, share: float = 0.0) -> float:
    """Every priority below the first halves it; a share that was decided has both in it."""
    if share > 0.0:
        return URGENT_WEIGHT * share
    return (URGENT_WEIGHT if urgent else 1.0) / 2.0 ** min(priority, 6)


def asked(loads: Mapping[str, Load], name: str, weight: float) -> Load:
    """`name`'s load, once it has asked for a turn."""
    load = loads[name]
    if load.waiting:
        return replace(load, weight=weight)
    # Whoever asks again at once is not there for a moment; a turn of the others is that long.
    least = [
        other.virtual - CHUNK_BYTES / other.weight
        for key, other in loads.items()
        if key != name and other.channel == load.channel and other.busy
    ]
    return replace(
        load, virtual=max(load.virtual, min(least, default=0.0)), weight=weight, waiting=True
    )


def next_load(loads: Mapping[str, Load], channel: str, now_s: float) -> str | None:
    """Who may go now; None if somebody is at it, or nobody waits.

    >>> loads = {"a": Load("disk", 5.0, waiting=True), "b": Load("disk", 4.0, waiting=True)}
    >>> next_load(loads, "disk", 0.0)
    'b'
    """
    here = {name: load for name, load in loads.items() if load.channel == channel}
    for load in here.values():
        if load.holding_since_s is not None and now_s - load.holding_since_s < LEASE_S:
            return None
    waiting = [(load.virtual, -load.weight, name) for name, load in here.items() if load.waiting]
    return min(waiting)[2] if waiting else None


def began(load: Load, now_s: float) -> Load:
    return replace(load, waiting=False, holding_since_s=now_s)


def ended(load: Load, size_bytes: int) -> Load:
    return replace(load, virtual=load.virtual + size_bytes / load.weight, holding_since_s=None)
