"""Machines that are rented for a plan, and how one plan's machines become the next one's.

Invariant: make before break - a machine that a new plan has no use for is given back only when
those that it needs besides have loaded their models; until then both are paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from paceline.core.plan import Plan
from paceline.sim.backend import SimMachine
from paceline.sim.fleet import planned_machines


@dataclass(slots=True)
class Rented:
    """A machine that is paid for, the share of it that is used, from when until when."""

    machine: SimMachine
    price_per_hour: float
    share: float
    from_s: float = 0.0
    until_s: float = inf
    busy_s: float = 0.0

    @property
    def cost_per_hour(self) -> float:
        return self.price_per_hour * self.share


@dataclass(frozen=True, slots=True)
class Transition:
    """From the machines there are to those of `plan`: `started` have to load, `ended` go."""

    plan: Plan
    started: tuple[Rented, ...]
    ended: tuple[Rented, ...]
    shares: tuple[tuple[Rented, float], ...]
    """What is had of the machines that stay."""


@dataclass(slots=True)
class Fleet:
    """All machines of a run; those that were given back too."""

    rented: list[Rented] = field(default_factory=list)
    _names: Iterator[int] = field(default_factory=lambda: count(1))

    @classmethod
    def of(cls, plan: Plan) -> Fleet:
        """The machines of a first plan; their models are there already."""
        prices = prices_of(plan)
        return cls([Rented(m, prices[m.hardware], m.share) for m in planned_machines(plan)])

    def now(self) -> list[Rented]:
        """Those that are paid for."""
        return [rented for rented in self.rented if rented.until_s == inf]

    def towards(self, plan: Plan, now_s: float) -> Transition:
        """What `plan` needs beyond what there is, and what it does not need; changes nothing.

        A machine stays if its hardware is wanted with the models that it holds, or some of them.
        """
        left = sorted(self.now(), key=lambda rented: (-rented.share, rented.machine.name))
        prices = prices_of(plan)
        stay: list[tuple[Rented, float]] = []
        missing: Sequence[SimMachine] = sorted(
            planned_machines(plan), key=lambda machine: (-machine.share, machine.name)
        )
        for same in (True, False):
            unmet = []
            for wanted in missing:
                found = next((r for r in left if _serves(r.machine, wanted, same=same)), None)
                if found is None:
                    unmet.append(wanted)
                    continue
                left.remove(found)
                stay.append((found, wanted.share))
            missing = unmet
        started = tuple(
            Rented(
                SimMachine(
                    f"{m.hardware}+{next(self._names)}", m.hardware, m.slots, m.instances, m.share
                ),
                prices[m.hardware],
                m.share,
                now_s,
            )
            for m in missing
        )
        return Transition(plan, started, tuple(left), tuple(stay))

    def begin(self, transition: Transition) -> None:
        """The new machines are paid for from now on; what stays is had in the larger share."""
        for rented in transition.started:
            rented.machine.alive = False
            self.rented.append(rented)
        for rented, share in transition.shares:
            rented.share = max(rented.share, share)
            rented.machine.share = rented.share

    def end(self, transition: Transition, now_s: float) -> None:
        """The new machines serve: the others are given back."""
        for rented in transition.ended:
            rented.until_s = now_s
        for rented, share in transition.shares:
            rented.share = rented.machine.share = share


def prices_of(plan: Plan) -> dict[str, float]:
    """Price per hour of the hardware that a plan uses."""
    found = {
        allocation.hardware: allocation.price_per_hour
        for chain in plan.chains
        for module in chain.modules
        for allocation in module.allocations
    }
    return found | {machine.hardware: machine.price_per_hour for machine in plan.machines}


def _serves(machine: SimMachine, wanted: SimMachine, *, same: bool) -> bool:
    if machine.hardware != wanted.hardware:
        return False
    if same:
        return machine.instances == wanted.instances
    return set(wanted.instances) <= set(machine.instances)
