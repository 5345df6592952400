"""From planned machine counts to instances of each model on each Triton.

A Triton of hardware `h` with `slots` stands for that many of the plan's machines of kind `h`:
each slot executes one batch at a time. A plan says what is busy on average; how much of a model
is wanted at once varies about that as a Poisson number does, by sqrt(x) for x machines. So a model
gets ceil(x + 2 sqrt(x)) instances (square-root staffing), no more than there are slots, spread over
the Tritons of that hardware: with ceil(x) a burst waits for one instance while slots are idle.
Every model has at least one on every machine, so that it can be called wherever there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from types import MappingProxyType

from paceline.core.chain import Module
from paceline.core.plan import Plan

_EPSILON = 1e-6
"""Planned fractions are sums of floats: 2.0000001 machines are two."""

_SPREAD = 2.0
"""Standard deviations of the number of batches wanted at once that find an instance."""


@dataclass(frozen=True, slots=True)
class Site:
    """One Triton: its hardware and how many batches it executes at a time."""

    name: str
    hardware: str
    slots: int


@dataclass(frozen=True, slots=True)
class Share:
    """Worker `index` of `count` front processes that divide the same machines."""

    index: int = 0
    count: int = 1

    def of(self, whole: int) -> int:
        """This worker's part of `whole` slots or instances, at least 1.

        >>> [Share(index, 2).of(5) for index in range(2)], Share(1, 2).of(1)
        ([3, 2], 1)
        """
        return max(1, whole // self.count + (self.index < whole % self.count))


def place(
    plan: Plan,
    sites: Iterable[Site],
    models: Iterable[str],
    runs: Iterable[Module] = (),
) -> dict[str, dict[str, int]]:
    """Instances by site and model, for all `models` and those of `runs`.

    Those of a run are batches at a time. Its members get as many more as the run was planned for;
    a burst of it may use as many slots as its members would apart, one after the other in Triton.

    >>> from paceline.core.plan import Allocation, ChainPlan, ModulePlan
    >>> module = ModulePlan("m", "net", 10, 0, 1, 1, (Allocation("cpu", 4, 0.5, 1.25, 1.0),))
    >>> plan = Plan("harpagon", "fractional", (ChainPlan("c", 1, 10, 1, (module,)),))
    >>> place(plan, [Site("a", "cpu", 4), Site("b", "cpu", 4)], ["net", "other"])
    {'a': {'net': 2, 'other': 1}, 'b': {'net': 2, 'other': 1}}
    >>> place(plan, [Site("a", "cpu", 3)], ["net"])
    {'a': {'net': 3}}
    """
    ordered = sorted(sites, key=lambda site: site.name)
    members = {run.model: sorted({member.model for member in run.members}) for run in runs}
    models = sorted({*models, *members})
    placed = {site.name: dict.fromkeys(models, 1) for site in ordered}
    for (model, hardware), machines in sorted(_machines(plan, members).items()):
        homes = [site for site in ordered if site.hardware == hardware]
        if not homes or model not in models:
            continue
        wanted = ceil(machines + _SPREAD * sqrt(machines) - _EPSILON)
        for index, site in enumerate(homes):
            share = wanted // len(homes) + (index < wanted % len(homes))
            placed[site.name][model] = max(1, min(share, site.slots))
    for site in ordered:
        counts = placed[site.name]
        for run, made_of in members.items():
            counts[run] = min(site.slots, sum(counts[model] for model in made_of))
    return placed


def worth(sites: Iterable[Site], slow: Mapping[str, float]) -> dict[str, float]:
    """How many machines there are, by hardware. Sites in `slow` take so many times as long as their
    kind: they are worth as much less.
    """
    found: dict[str, float] = {}
    for site in sites:
        machines = site.slots / slow.get(site.name, 1.0)
        found[site.hardware] = found.get(site.hardware, 0.0) + machines
    return found


def shortage(
    plan: Plan, sites: Iterable[Site], slow: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Hardware of which the whole traffic needs more machines than there are: (needed, present)."""
    present = worth(sites, slow)
    needed: dict[str, float] = {}
    whole = replace(plan, chains=tuple(chain.wanted or chain for chain in plan.chains))
    for (_, hardware), machines in _machines(whole).items():
        needed[hardware] = needed.get(hardware, 0.0) + machines
    return {
        hardware: (machines, present.get(hardware, 0))
        for hardware, machines in sorted(needed.items())
        if machines > present.get(hardware, 0) + _EPSILON
    }


def _machines(
    plan: Plan, members: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Mapping[tuple[str, str], float]:
    """Machines by (model, hardware), over all chains; those of a run for its `members` as well."""
    total: dict[tuple[str, str], float] = {}
    for chain in plan.chains:
        for module in chain.modules:
            for allocation in module.allocations:
                for model in (module.model, *members.get(module.model, ())):
                    key = (model, allocation.hardware)
                    total[key] = total.get(key, 0.0) + allocation.machines
    return total
