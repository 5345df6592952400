"""Planning where the cheapest machines do not suffice: on others too, then by priority, the lowest
is shed first.

Where the cheapest plans want more machines of a kind than there are, modules run on several kinds
side by side (`mixed`). Where that does not suffice either, each priority gets what those before it
leave: all of its chains the same share of their rates, the largest that fits. A chain for which
nothing is left is planned for `LEAST_SHARE` of its rate, so that it is still served whenever others
leave room. Chains of the most urgent priority are planned for their whole rates all the same where
there is one kind of hardware, which is all theirs; of several their whole plan would leave idle
what it does not want.

Invariant: no chain is planned for less than its rate while one of a lower priority is planned for
more than `LEAST_SHARE` of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from paceline.core.errors import PlanError
from paceline.core.plan import ChainPlan, Plan
from paceline.planner.assemble import chain_plan, graph_of
from paceline.planner.fits import usable
from paceline.planner.mixed import mixed
from paceline.planner.problem import Options, PlannedChain
from paceline.planner.solve import solve

LEAST_SHARE = 0.01
STEPS = 7
"""Halvings of the share that is searched for: to within a hundredth."""

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chain to plan; `priority` 0 is the most urgent."""

    chain: PlannedChain
    options: Options
    priority: int = 0


def plan_by_priority(wanted: Sequence[Wanted], capacity: Mapping[str, float]) -> list[Plan]:
    """A plan for each of `wanted`, in their order; `capacity` is in machines by hardware.

    Raises PlanError when a chain cannot keep its objective on any machine.
    """
    found = {each.chain.name: solve([each.chain], each.options) for each in wanted}
    classes = sorted({each.priority for each in wanted})
    left = dict(capacity)
    for priority in classes:
        alike = [each for each in wanted if each.priority == priority]
        whole = {each.chain.name: found[each.chain.name] for each in alike}
        if not _fits(whole.values(), left):
            if priority != classes[0]:
                found |= _shed(alike, whole, left)
            elif _mixable(alike, left) and (part := _largest(alike, whole, left, left)):
                found |= part[1]
        for hardware, machines in _used(found[each.chain.name] for each in alike).items():
            left[hardware] = max(0.0, left.get(hardware, 0.0) - machines)
    return [found[each.chain.name] for each in wanted]


def _shed(
    alike: Sequence[Wanted], whole: Mapping[str, Plan], left: Mapping[str, float]
) -> dict[str, Plan]:
    """Plans for the largest share of all their rates that fits into what is left.

    The hardware that is the cheapest for a chain may be what is not left: what there is is tried
    together, then each kind for itself. (Other dispatch policies than pooled have no mixed plans.)
    """
    kinds = sorted((h for h, machines in left.items() if machines > _TOLERANCE), key=str)
    best: tuple[float, dict[str, Plan]] | None = None
    for allowed in [kinds, *([kind] for kind in kinds if len(kinds) > 1)]:
        found = _largest(alike, whole, allowed, left)
        if found is not None and (best is None or found[0] > best[0] + _TOLERANCE):
            best = found
    if best is not None:
        return best[1]
    least = _planned(alike, whole, LEAST_SHARE, None)
    return least if least is not None else dict(whole)


def _largest(
    alike: Sequence[Wanted],
    whole: Mapping[str, Plan],
    allowed: Collection[str],
    left: Mapping[str, float],
) -> tuple[float, dict[str, Plan]] | None:
    """The largest share for which plans on the `allowed` hardware fit, with the plans."""

    def fitting(share: float) -> dict[str, Plan] | None:
        plans = _planned(alike, whole, share, allowed)
        if plans is not None and _fits(plans.values(), left):
            return plans
        return _mixed(alike, whole, share, left) if len(allowed) > 1 else None

    if (plans := fitting(1.0)) is not None:
        return 1.0, plans
    low, high = LEAST_SHARE, 1.0
    if (plans := fitting(low)) is None:
        return None
    for _ in range(STEPS):
        share = (low + high) / 2
        if (more := fitting(share)) is not None:
            low, plans = share, more
        else:
            high = share
    return low, plans


def _planned(
    alike: Sequence[Wanted],
    whole: Mapping[str, Plan],
    share: float,
    allowed: Collection[str] | None,
) -> dict[str, Plan] | None:
    """Plans for that share of every rate; None where an objective cannot be kept."""
    found = {}
    for each in alike:
        name = each.chain.name
        chain = _scaled(each.chain, share, allowed)
        if chain is None:
            return None
        try:
            plan = solve([chain], each.options)
        except PlanError:
            return None
        (part,) = plan.chains
        wanted = whole[name].chains[0] if share < 1.0 else None
        found[name] = replace(plan, chains=(replace(part, wanted=wanted),))
    return found


def _mixed(
    alike: Sequence[Wanted], whole: Mapping[str, Plan], share: float, left: Mapping[str, float]
) -> dict[str, Plan] | None:
    """Plans for that share of every rate, on several kinds of hardware where one is too little;
    None where there are none."""
    if not _mixable(alike, left):
        return None
    chains = []
    for each in alike:
        chain = _scaled(usable([each.chain], each.options)[0], share, None)
        assert chain is not None, each
        chains.append(chain)
    schedules = mixed(chains, left)
    if schedules is None:
        return None
    found = {}
    for chain, by_module in zip(chains, schedules, strict=True):
        part = chain_plan(chain, graph_of(chain), by_module)
        plan = whole[chain.name]
        wanted = plan.chains[0] if share < 1.0 else None
        found[chain.name] = replace(
            plan,
            chains=(replace(part, wanted=wanted),),
            # As many times the machines of a part serve the whole, which fills batches sooner.
            lower_bound_per_hour=share * plan.lower_bound_per_hour,
        )
    return found


def _mixable(alike: Iterable[Wanted], left: Mapping[str, float]) -> bool:
    """Whether there are several kinds of hardware that these chains can run on side by side."""
    kinds = sum(machines > _TOLERANCE for machines in left.values())
    return kinds > 1 and all(each.options.dispatch == "pooled" for each in alike)


def _scaled(
    chain: PlannedChain, share: float, allowed: Collection[str] | None
) -> PlannedChain | None:
    """The chain at that share of its rate, on the allowed hardware; None where it cannot run."""
    modules = []
    for module in chain.modules:
        configurations = tuple(
            c for c in module.configurations if allowed is None or c.hardware in allowed
        )
        if not configurations:
            return None
        modules.append(
            replace(module, rate_rps=module.rate_rps * share, configurations=configurations)
        )
    return replace(chain, rate_rps=chain.rate_rps * share, modules=tuple(modules))


def _fits(plans: Iterable[Plan], left: Mapping[str, float]) -> bool:
    used = _used(plans)
    return all(machines <= left.get(h, 0.0) + _TOLERANCE for h, machines in used.items())


def _used(plans: Iterable[Plan]) -> dict[str, float]:
    """Machines by hardware."""
    total: dict[str, float] = {}
    for chain in (chain for plan in plans for chain in plan.chains):
        for hardware, machines in _machines(chain):
            total[hardware] = total.get(hardware, 0.0) + machines
    return total


def _machines(chain: ChainPlan) -> Iterable[tuple[str, float]]:
    return ((a.hardware, a.machines) for m in chain.modules for a in m.allocations)
