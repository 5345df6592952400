"""What the urgent take of the machines, and what is left to others: for admission.

While a request waits, more urgent ones come and go before it. `Foresight` measures at what rate
each chain was admitted lately. Of every slot that a module could run on, what more urgent chains
take at that rate is not there for it, so that the work before it lasts longer by that factor:
W / (1 - utilisation by the more urgent), as in a queue with priorities (Cobham 1954).

`Shares`: a chain to which more urgent ones leave less than `SHARE` of its machines is owed the rest
of that, a request at a time, which is then `FIRST`: it is launched at once, before everything.
Invariant: what all chains are owed together grows by at most `SHARE` of the slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp

from paceline.dispatch.machines import Home, MachinePool
from paceline.dispatch.stage import Served

RECENT_S = 3.0
"""Rates are of requests weighted by exp(-age / this)."""
LEAST_KNOWN_S = 0.5
"""A chain's first requests count as that long a time's."""
FORGOTTEN = 1e-3
"""A chain of which less than so many requests are left by these weights takes nothing."""
LEAST_LEFT = 0.01
"""What more urgent work leaves at the least, as far as predictions go: they stay finite."""
SHARE = 0.01
"""Of the machines' time, guaranteed to all less urgent chains together."""
MOST_LEVELS = 16
"""Priorities from this one on are told apart by the queues alone: clients may name any number."""

FIRST = -1
"""The priority of what is owed: before all that a request can have."""


def level(priority: int) -> int:
    """The priority, as far as it is told apart here."""
    return priority if priority < MOST_LEVELS else MOST_LEVELS - 1


@dataclass(slots=True)
class Flow:
    """A chain's requests of one priority that were admitted lately."""

    served: Served
    level: int
    since_s: float
    requests: float = 0.0
    """Weighted by their age at `at_s`."""
    at_s: float = 0.0
    layout: int = -1
    taken_s: dict[Home, tuple[float, float, float]] = field(default_factory=dict)
    """What `of_slot_s` found with that layout."""

    def recent(self, now_s: float) -> float:
        """Requests by their weights."""
        return self.requests * exp((self.at_s - now_s) / RECENT_S)

    def of_slot_s(self, home: Home, pool: MachinePool) -> tuple[float, float, float]:
        """Time that one request takes of each slot which runs `home`, in full batches; what
        the chain's batches that are not full yet would take, a quarter of a batch each; and its
        objective.
        """
        if self.layout != pool.layout:
            self.layout = pool.layout
            self.taken_s.clear()
        found = self.taken_s.get(home)
        if found is None:
            found = self.taken_s[home] = _of_slot_s(self.served, home, pool)
        return found


Urgent = list[tuple[Flow, float]]
"""Flows with their rates."""


class Foresight:
    """See the module docstring."""

    def __init__(self) -> None:
        self._flows: dict[int, dict[str, Flow]] = {}
        """By level, then chain."""

    def admitted(self, served: Served, priority: int, now_s: float) -> None:
        """A request entered."""
        at = level(priority)
        flows = self._flows.get(at)
        if flows is None:
            flows = self._flows[at] = {}
        flow = flows.get(served.name)
        if flow is None:
            flow = flows[served.name] = Flow(served, at, now_s)
        if flow.served is not served:
            flow.served, flow.layout = served, -1
        recent = flow.recent(now_s)
        if recent < FORGOTTEN:
            flow.since_s = now_s
        flow.requests = recent + 1.0
        flow.at_s = now_s

    def urgent(self, priority: int, now_s: float) -> Urgent:
        """What comes at more urgent priorities."""
        found: Urgent = []
        at = level(priority)
        for other, flows in self._flows.items():
            if other >= at:
                continue
            faint = []
            for chain, flow in flows.items():
                recent = flow.recent(now_s)
                if recent > FORGOTTEN:
                    known_s = max(LEAST_KNOWN_S, now_s - flow.since_s)
                    window_s = RECENT_S - RECENT_S * exp(-known_s / RECENT_S)
                    found.append((flow, recent / window_s))
                else:
                    faint.append(chain)
            for chain in faint:
                del flows[chain]
        return found

    def behind(self, priority: int, now_s: float) -> bool:
        """Whether any of them has a priority of its own."""
        return any(flow.level > FIRST for flow, _ in self.urgent(priority, now_s))

    @staticmethod
    def start_s(
        urgent: Urgent, work_s: float, waits_s: float, home: Home, pool: MachinePool
    ) -> float:
        """When a batch of `home` could start behind `work_s` of its own priority and `waits_s` of
        more urgent work on each slot, which grows meanwhile. Batches that are not full by then
        do not go before it.
        """
        taken = open_s = 0.0
        for flow, rate_rps in urgent:
            took_s, most_open_s, slo_s = flow.of_slot_s(home, pool)
            part = rate_rps * took_s
            taken += part
            # Nor is more open than came within an objective.
            came_s = part * slo_s / 2
            open_s += came_s if came_s < most_open_s else most_open_s
        left = 1.0 - taken if taken < 1.0 - LEAST_LEFT else LEAST_LEFT
        behind_s = (work_s + waits_s - open_s) / left
        return behind_s if behind_s > work_s else work_s


@dataclass(slots=True)
class _Owed:
    """Machine time that a chain may still take, at most one request's; of `slots` slots."""

    slots: int = 0
    most_s: float = 0.0
    has_s: float = 0.0


class Shares:
    """See the module docstring."""

    def __init__(self) -> None:
        self._owed: dict[tuple[str, int], _Owed] = {}
        """By chain and level: of those that were refused once behind more urgent ones."""
        self._at_s = 0.0

    def admitted(self, served: Served, priority: int) -> None:
        """It got in as everybody does: nothing is owed for that."""
        if self._owed:
            owed = self._owed.get((served.name, level(priority)))
            if owed is not None:
                owed.has_s = max(0.0, owed.has_s - served.alone_s)

    def owes(self, served: Served, priority: int, pool: MachinePool, now_s: float) -> bool:
        """Whether a request that was refused is owed to be served."""
        key = (served.name, level(priority))
        owed = self._owed.get(key)
        if owed is None:
            owed = self._owed[key] = _Owed()
        self._grow(now_s)
        owed.most_s = served.alone_s
        owed.slots = min(pool.slots_of(s.route.home) for s in served.stages)
        return owed.has_s >= owed.most_s > 0

    def _grow(self, now_s: float) -> None:
        """Whoever has less than a request's worth gets an even part."""
        growing = [owed for owed in self._owed.values() if owed.has_s < owed.most_s]
        passed_s = now_s - self._at_s
        self._at_s = now_s
        for owed in growing:
            more_s = SHARE * owed.slots * passed_s / len(growing)
            owed.has_s = min(owed.most_s, owed.has_s + more_s)


def _of_slot_s(served: Served, home: Home, pool: MachinePool) -> tuple[float, float, float]:
    took_s = open_s = 0.0
    for stage, rows in zip(served.stages, served.fan_outs, strict=True):
        route = stage.route
        row_s = route.row_s * pool.part_of(home, route.home)
        took_s += rows * row_s
        open_s += (route.full_rows - 1) / 4 * row_s
    return took_s, open_s, served.route.bound.chain.slo_s
