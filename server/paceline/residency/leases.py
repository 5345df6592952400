"""Leases: which request will need which model, which of them wait, which pin what they use.

A lease is *current* once its request wants to use the model now, and *granted* once the model is
there for it: only then it pins. A lease of a later module of a chain pins nothing, because a
request that waits for its first model while it holds the room that model needs would wait for
ever; it makes its model the last that is evicted, for nobody who is less urgent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from paceline.residency.events import Enter

K = TypeVar("K")

AGED_S = 5.0
"""A lease that waited this long goes before all others, the oldest first."""

Rank = tuple[float, float]
"""(priority, until when it is needed): the least is the most urgent."""


@dataclass(slots=True)
class Lease:
    request: int
    model: str
    machine: str
    priority: int
    latest_s: float
    since_s: float
    uses: int = 1
    """Uses of the model that are to come."""
    later_s: list[float] = field(default_factory=list)
    """Until when each use after the next one is needed."""
    active: int = 0
    """Those that the request wants now."""
    current: bool = False
    granted: bool = False

    def rank(self, now_s: float) -> Rank:
        if self.current and not self.granted and now_s - self.since_s >= AGED_S:
            return (-1.0, self.since_s)
        return (float(self.priority), self.latest_s)


class Leases:
    """All of them, by request and by model, in the order in which they came."""

    def __init__(self) -> None:
        self._by_request: dict[int, dict[str, Lease]] = {}
        self._by_model: dict[str, dict[int, Lease]] = {}
        self._pins: dict[str, int] = {}
        self._bound: dict[tuple[str, str], int] = {}
        self._awaited: dict[str, set[int]] = {}
        """For whom a model came last, while none of them is over."""

    def __len__(self) -> int:
        return sum(len(leases) for leases in self._by_model.values())

    def enter(self, event: Enter, now_s: float) -> list[Lease]:
        """The request's leases; several uses of one model are one lease."""
        assert event.request not in self._by_request, event
        made: dict[str, Lease] = {}
        for need in event.needs:
            latest_s = event.deadline_s - need.after_s
            known = made.get(need.model)
            if known is not None:
                known.uses += 1
                known.later_s = sorted([known.latest_s, *known.later_s, latest_s])
                known.latest_s = known.later_s.pop(0)
                known.current = known.current or need.in_s <= 0.0
                known.active += need.in_s <= 0.0
                continue
            made[need.model] = Lease(
                event.request,
                need.model,
                need.machine,
                event.priority,
                latest_s,
                now_s,
                current=need.in_s <= 0.0,
                active=int(need.in_s <= 0.0),
            )
        self._by_request[event.request] = made
        for model, lease in made.items():
            self._by_model.setdefault(model, {})[event.request] = lease
        return list(made.values())

    def get(self, request: int, model: str) -> Lease | None:
        return self._by_request.get(request, {}).get(model)

    def of(self, model: str) -> Iterator[Lease]:
        """The leases of a model."""
        return iter(tuple(self._by_model.get(model, {}).values()))

    def any(self, model: str) -> bool:
        return model in self._by_model

    def of_request(self, request: int) -> list[Lease]:
        return list(self._by_request.get(request, {}).values())

    def waited_s(self, lease: Lease, now_s: float) -> float:
        """How long its request has been waiting: for this model, or one that it needs before."""
        since = [
            other.since_s
            for other in self._by_request[lease.request].values()
            if other.current and not other.granted
        ]
        return now_s - min(since, default=now_s)

    def pins(self, model: str) -> int:
        """Granted leases of a model, on whatever machine."""
        return self._pins.get(model, 0)

    def bound(self, model: str, machine: str) -> int:
        """Granted leases of a model that only this machine will do for."""
        return self._bound.get((model, machine), 0)

    def grant(self, lease: Lease) -> None:
        assert lease.current and not lease.granted, lease
        lease.granted = True
        self._count(lease, 1)

    def revoke(self, lease: Lease) -> None:
        """It does not pin any more: the model is gone with its machine, or is not used now."""
        assert lease.granted, lease
        lease.granted = False
        self._count(lease, -1)

    def drop(self, lease: Lease) -> None:
        if lease.granted:
            self._count(lease, -1)
        leases = self._by_request[lease.request]
        del leases[lease.model]
        if not leases:
            del self._by_request[lease.request]
        of_model = self._by_model[lease.model]
        del of_model[lease.request]
        if not of_model:
            del self._by_model[lease.model]

    def came(self, model: str, waiting: Sequence[Lease]) -> None:
        """A model has just come, for those that wait."""
        if waiting:
            self._awaited[model] = {lease.request for lease in waiting}
        else:
            self._awaited.pop(model, None)

    def awaited(self, model: str) -> bool:
        """Whether it came for requests that waited, none of which is over yet."""
        return model in self._awaited

    def over(self, request: int) -> bool:
        """A request has ended, or will at once; whether some model is no longer `awaited`."""
        came = [model for model, waited in self._awaited.items() if request in waited]
        for model in came:
            del self._awaited[model]
        return bool(came)

    def _count(self, lease: Lease, change: int) -> None:
        _add(self._pins, lease.model, change)
        if lease.machine:
            _add(self._bound, (lease.model, lease.machine), change)


def _add(counts: dict[K, int], key: K, change: int) -> None:
    left = counts.get(key, 0) + change
    assert left >= 0, (key, left)
    if left:
        counts[key] = left
    else:
        counts.pop(key, None)
