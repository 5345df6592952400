"""The bound of plans in whole machines against every way to put modules on machines."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import inf

import pytest

from paceline.core.errors import PlanError
from paceline.core.profile import Configuration
from paceline.planner.assemble import graph_of
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.solve import solve
from paceline.planner.whole_bound import least_cost, least_cost_within

PRICES = {"big": 3.0, "small": 0.5}


def drawn(rng: random.Random) -> PlannedChain:
    """Up to three modules in any shape, batches of one, each with less than a machine's work."""
    modules: list[PlannedModule] = []
    for i in range(rng.randint(1, 3)):
        small_s = rng.randint(2, 30) / 1000
        configurations = [Configuration("big", 1, small_s / rng.choice((1.5, 3.0)), 3.0)]
        if rng.random() < 0.8:
            configurations.append(Configuration("small", 1, small_s, 0.5))
        rate_rps = rng.choice((0.1, 0.4, 0.9)) / small_s
        parents = tuple(f"m{j}" for j in range(i) if rng.random() < 0.7)
        modules.append(PlannedModule(f"m{i}", f"m{i}", rate_rps, parents, tuple(configurations)))
    least_s = sum(min(c.duration_s for c in m.configurations) for m in modules)
    return PlannedChain("c", least_s * rng.choice((1.02, 1.4, 2.0, 4.0)), 1.0, tuple(modules))


def groups(count: int) -> Iterator[tuple[int, ...]]:
    """Every division of the modules among machines."""
    for each in product(range(count), repeat=count):
        if all(number <= max(each[:at], default=-1) + 1 for at, number in enumerate(each)):
            yield each


def brute_force(chain: PlannedChain, limits: Mapping[str, int] = {}) -> float:
    """Least price of machines, each module on one, if all that is asked of a shared machine is that
    it is not asked for too much and that each can wait for the shortest batch of another."""
    graph, count = graph_of(chain), len(chain.modules)
    best = inf
    for chosen in product(*(m.configurations for m in chain.modules)):
        for of in groups(count):
            used = Counter(chosen[of.index(machine)].hardware for machine in set(of))
            if any(used[kind] > limit for kind, limit in limits.items()):
                continue
            if cost(chain.modules, chosen, of) < best:
                waits_s = [
                    min((chosen[j].duration_s for j in others(of, i)), default=0.0)
                    for i in range(count)
                ]
                took_s = [c.duration_s + wait_s for c, wait_s in zip(chosen, waits_s, strict=True)]
                if graph.longest(took_s) <= chain.slo_s + 1e-9:
                    best = cost(chain.modules, chosen, of)
    return best


def others(of: Sequence[int], i: int) -> list[int]:
    return [j for j, machine in enumerate(of) if machine == of[i] and j != i]


def cost(
    modules: Sequence[PlannedModule], chosen: Sequence[Configuration], of: Sequence[int]
) -> float:
    total = 0.0
    for machine in set(of):
        on = [i for i, each in enumerate(of) if each == machine]
        busy = sum(modules[i].rate_rps * chosen[i].duration_s for i in on)
        if busy > 1 + 1e-9 or len({chosen[i].hardware for i in on}) > 1:
            return inf
        total += PRICES[chosen[on[0]].hardware]
    return total


def test_no_way_to_put_modules_on_machines_costs_less_than_the_bound() -> None:
    equal, planned = 0, 0
    for seed in range(120):
        chain = drawn(random.Random(seed))
        bound, least = least_cost([chain], PRICES), brute_force(chain)
        assert bound <= least * (1 + 1e-9), seed
        equal += bound >= least * (1 - 1e-9)
        plan = solve([chain], Options(policy="optimal", billing="machine"))
        assert plan.cost_per_hour >= bound * (1 - 1e-9), seed
        planned += plan.cost_per_hour <= least * (1 + 1e-9)
    assert equal >= 80 and planned >= 80, (equal, planned)


def test_no_way_within_limits_costs_less_than_the_bound_that_knows_them() -> None:
    raised = planned = 0
    for seed in range(20):
        chain = drawn(random.Random(seed))
        limits = random.Random(f"limits {seed}").choice(
            ({"small": 0}, {"small": 1}, {"big": 1}, {"small": 1, "big": 1}, {"small": 2})
        )
        options = Options(policy="optimal", billing="machine", machine_limits=limits)
        least = brute_force(chain, limits)
        free = least_cost([chain], PRICES)
        try:
            plan = solve([chain], options)
        except PlanError:
            continue
        bound = plan.lower_bound_per_hour
        assert bound <= least * (1 + 1e-9), seed
        assert free * (1 - 1e-9) <= bound <= plan.cost_per_hour * (1 + 1e-9), seed
        within = Counter(machine.hardware for machine in plan.machines)
        assert all(within[kind] <= limit for kind, limit in limits.items()), seed
        raised += bound > free * (1 + 1e-6)
        planned += 1
    assert raised >= 3 and planned >= 10, (raised, planned)


def test_a_limit_makes_the_bound_dearer_where_machines_have_to_be_of_another_kind() -> None:
    # Each keeps a small machine 90 % busy; two may be small, the third is a big one.
    modules = [
        PlannedModule(
            f"m{i}",
            f"m{i}",
            90.0,
            (),
            (Configuration("big", 1, 0.006, 3.0), Configuration("small", 1, 0.010, 0.5)),
        )
        for i in range(3)
    ]
    chains = [PlannedChain(m.name, 0.011, 90.0, (m,)) for m in modules]
    assert least_cost(chains, PRICES) == pytest.approx(1.5)
    assert least_cost_within(chains, PRICES, {"small": 2}) == pytest.approx(4.0)
    limited = Options(policy="optimal", billing="machine", machine_limits={"small": 2})
    assert solve(chains, limited).cost_per_hour == pytest.approx(4.0)


def test_hardware_that_a_model_does_not_fit_into_counts_neither_for_plan_nor_for_bound() -> None:
    large = PlannedModule(
        "a",
        "a",
        250.0,
        (),
        (Configuration("big", 1, 0.005, 3.0), Configuration("small", 1, 0.010, 0.5)),
        memory_bytes={"big": 9 << 30, "small": 9 << 30},
    )
    chain = PlannedChain("c", 1.0, 250.0, (large,))
    for policy in ("optimal", "harpagon", "clipper"):
        options = Options(policy=policy, billing="machine", memory_bytes={"small": 8 << 30})
        plan = solve([chain], options)
        assert {machine.hardware for machine in plan.machines} == {"big"}
        assert plan.cost_per_hour == plan.lower_bound_per_hour == 6.0
    with pytest.raises(PlanError, match="memory"):
        solve([chain], replace(options, memory_bytes={"small": 8 << 30, "big": 8 << 30}))


def test_a_module_that_cannot_wait_pays_for_a_machine_of_its_own() -> None:
    one = PlannedModule("a", "a", 1.0, (), (Configuration("big", 1, 0.010, 3.0),))
    two = PlannedModule("b", "b", 1.0, (), (Configuration("big", 1, 0.004, 3.0),))
    chains = [PlannedChain("x", 0.013, 1.0, (one,)), PlannedChain("y", 0.013, 1.0, (two,))]
    # The first has 3 ms to wait, the other's batch takes 4; with 15 ms both have their place.
    assert least_cost(chains, {"big": 3.0}) == pytest.approx(6.0, rel=0.01)
    assert solve(chains, Options(policy="optimal", billing="machine")).cost_per_hour == 6.0
    chains = [PlannedChain("x", 0.015, 1.0, (one,)), PlannedChain("y", 0.015, 1.0, (two,))]
    assert least_cost(chains, {"big": 3.0}) == 3.0
    assert solve(chains, Options(policy="optimal", billing="machine")).cost_per_hour == 3.0


def test_every_kind_of_machine_that_is_needed_is_paid_for_in_full() -> None:
    fast = PlannedModule("a", "a", 1.0, (), (Configuration("big", 1, 0.010, 3.0),))
    slow = PlannedModule("b", "b", 1.0, ("a",), (Configuration("small", 1, 0.010, 0.5),))
    assert least_cost([PlannedChain("c", 1.0, 1.0, (fast, slow))], PRICES) == 3.5
