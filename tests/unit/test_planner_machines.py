"""Whole machines: Nexus's worked cases, and what holds for every packing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.urgency import latest_s

from paceline.core.errors import PlanError
from paceline.core.plan import ModulePlan, Plan, Share
from paceline.core.profile import Configuration
from paceline.planner.columns import MANY
from paceline.planner.cycle import Load, together
from paceline.planner.machines import whole_machines
from paceline.planner.pack import Machine, Packing, pack
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.rounded import rounded
from paceline.planner.solve import HEURISTICS, solve
from paceline.planner.urgency import Stream
from paceline.planner.whole_bound import least_price

MACHINE = Options(policy="optimal", billing="machine")


def nexus_load(
    name: str, rate_rps: float, budget_s: float, batch_size: int, duration_s: float
) -> Load:
    """A session of Nexus section 4.1; durations of other sizes on a line through half at 0."""
    durations_s = [duration_s * (batch_size + b) / (2 * batch_size) for b in range(1, 17)]
    return Load("nexus", name, name, rate_rps, rate_rps, budget_s, {"gpu": durations_s})


A = nexus_load("A", 64.0, 0.2, 8, 0.075)
B = nexus_load("B", 32.0, 0.25, 4, 0.05)
C = nexus_load("C", 32.0, 0.25, 4, 0.06)


def test_nexus_a_and_b_share_a_machine_in_a_duty_cycle_of_125_ms() -> None:
    cycle = together([A, B], "gpu")
    assert cycle is not None
    assert (cycle.duration_s, cycle.batch_sizes) == (0.125, (8, 4))
    assert A.worst_s(cycle.duration_s, 0.075) == pytest.approx(0.200)
    assert B.worst_s(cycle.duration_s, 0.05) == pytest.approx(0.175)


def test_nexus_c_does_not_fit_in_beside_a() -> None:
    assert together([A, C], "gpu") is None


def test_packing_puts_a_and_b_together_and_gives_c_its_own() -> None:
    found = pack([A, B, C], {"gpu": Machine("gpu", 1.0)}, {})
    assert found is not None
    names = sorted(sorted(load.module for load in each.loads) for each in found.shared)
    assert names == [["A", "B"], ["C"]] or names == [["A"], ["B", "C"]]
    assert found.cost_per_hour == 2.0


def test_packing_anew_serves_the_same_in_time_and_only_ever_for_less() -> None:
    cheaper = 0
    for seed in range(12):
        rng = random.Random(seed)
        loads = []
        for i in range(14):
            first_s = rng.choice((0.002, 0.005, 0.01, 0.02))
            durations_s = {"gpu": [first_s * (1 + 0.6 * b) for b in range(8)]}
            rate_rps = rng.choice((0.05, 0.2, 0.4)) / first_s
            budget_s = first_s * rng.choice((1.5, 3.0, 6.0, 12.0))
            loads.append(Load(f"c{i}", "m", f"m{i}", rate_rps, rate_rps, budget_s, durations_s))
        packing = Packing({"gpu": Machine("gpu", 1.0)}, {})
        assert all(packing.add(load) for load in loads)
        before = packing.cost_per_hour
        packing.again()
        assert packing.cost_per_hour <= before
        assert packing.used["gpu"] == len(packing.shared) == packing.cost_per_hour
        cheaper += packing.cost_per_hour < before
        served = dict.fromkeys((load.chain for load in loads), 0.0)
        for each in packing.shared:
            assert each.due is None or each.cycle is not None or each.due.in_time
            for load in each.loads:
                served[load.chain] += load.rate_rps
        assert served == pytest.approx({load.chain: load.rate_rps for load in loads})
    assert cheaper >= 2, cheaper


def test_a_high_rate_fills_whole_machines_at_the_published_throughput() -> None:
    # The largest batch within half of 200 ms is 16 in 100 ms: 160 requests/s a machine.
    module = PlannedModule("A", "A", 640.0, (), (Configuration("gpu", 16, 0.1, 1.0),))
    plan = solve([PlannedChain("A", 0.2, 640.0, (module,))], MACHINE)
    assert plan.cost_per_hour == 4.0
    assert [a.batch_size for a in plan.chains[0].modules[0].allocations] == [16]


def chain(name: str, rng: random.Random, rate_rps: float | None = None) -> PlannedChain:
    rate_rps = rate_rps or rng.choice((2.0, 15.0, 60.0, 300.0))
    modules: list[PlannedModule] = []
    for i in range(rng.randint(1, 3)):
        configurations: list[Configuration] = []
        memory = {}
        for hardware, price in (("big", 3.0), ("small", 0.5)):
            duration_s = rng.choice((0.004, 0.01, 0.03)) / price**0.7
            memory[hardware] = rng.randint(1, 6) << 30
            for size in (1, 2, 4, 8, 16):
                configurations.append(Configuration(hardware, size, duration_s, price))
                duration_s *= rng.choice((1.1, 1.4, 1.8))
        parents = (f"m{i - 1}",) if i and rng.random() < 0.7 else ()
        fan_out = rng.choice((0.5, 1.0, 2.0))
        modules.append(
            PlannedModule(
                f"m{i}",
                f"model{rng.randint(0, 5)}",
                rate_rps * fan_out,
                parents,
                tuple(configurations),
                memory_bytes=memory,
            )
        )
    least_s = sum(min(c.duration_s for c in m.configurations) for m in modules)
    return PlannedChain(name, least_s * rng.choice((1.3, 2.0, 4.0)), rate_rps, tuple(modules))


def stream(share: Share, module: ModulePlan, hardware: str) -> Stream:
    """What a share asks of a machine that goes by urgency, from the plan alone."""
    sizes = {(a.hardware, a.batch_size): a.duration_s for a in module.allocations}
    duration_s = sizes[hardware, share.batch_size]
    collection_s = 0.0 if share.batch_size == 1 else share.batch_size / module.rate_rps
    # Batches that other machines of the module collect may be in the way of its own's beginning.
    jitter_s = module.batch_size / module.rate_rps if len(sizes) > 1 else 0.0
    within_s = module.latency_budget_s - collection_s
    return Stream(duration_s, within_s, share.utilisation, jitter_s)


def check(plan: Plan, chains: list[PlannedChain], memory_bytes: int) -> None:
    """Every rule of the module docstrings, from the plan alone."""
    rates = {(c.name, m.name): m.rate_rps for c in chains for m in c.modules}
    served = dict.fromkeys(rates, 0.0)
    durations, found = {}, {}
    for c in plan.chains:
        assert c.latency_worst_s <= c.slo_s + 1e-6
        for m in c.modules:
            found[c.chain, m.module] = m
            assert m.latency_worst_s <= m.latency_budget_s + 1e-6
            for a in m.allocations:
                durations[c.chain, m.module, a.hardware, a.batch_size] = a.duration_s
    for machine in plan.machines:
        busy_s, cycle_s = 0.0, 0.0
        for share in machine.shares:
            key = (share.chain, share.module)
            duration_s = durations[*key, machine.hardware, share.batch_size]
            served[key] += share.utilisation * share.batch_size / duration_s
            busy_s, cycle_s = busy_s + duration_s, share.cycle_s
        assert sum(share.utilisation for share in machine.shares) <= 1 + 1e-6
        if cycle_s:
            assert busy_s <= cycle_s + 1e-9
        elif len(machine.shares) > 1:
            streams = [
                stream(share, found[share.chain, share.module], machine.hardware)
                for share in machine.shares
            ]
            assert latest_s(streams, random.Random(str(machine))) <= 1e-9
        assert machine.memory_bytes <= memory_bytes
    assert served == pytest.approx(rates, rel=1e-5)
    assert plan.cost_per_hour == pytest.approx(sum(m.price_per_hour for m in plan.machines))
    assert plan.cost_per_hour >= plan.lower_bound_per_hour * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(16))
def test_every_plan_in_whole_machines_keeps_cycles_memory_rates_and_objectives(seed: int) -> None:
    rng = random.Random(seed)
    chains = [chain(f"c{i}", rng) for i in range(rng.randint(1, 6))]
    memory_bytes = 7 << 30
    options = replace(MACHINE, memory_bytes={"big": memory_bytes, "small": memory_bytes})
    plan = solve(chains, options)
    check(plan, chains, memory_bytes)
    assert plan == solve(chains, options)


def test_so_does_one_whose_machines_are_chosen_among_patterns() -> None:
    rng = random.Random(41)
    chains = [chain(f"c{i}", rng) for i in range(50)]
    assert sum(len(each.modules) for each in chains) >= MANY
    memory_bytes = 7 << 30
    options = replace(MACHINE, memory_bytes={"big": memory_bytes, "small": memory_bytes})
    check(solve(chains, options), chains, memory_bytes)


def test_machine_limits_are_respected_at_a_higher_cost_or_named_as_the_reason() -> None:
    planned = 0
    for seed in range(6):
        rng = random.Random(seed)
        chains = [chain(f"c{i}", rng, 60.0) for i in range(3)]
        kinds = [m.hardware for m in solve(chains, MACHINE).machines]
        most = max(set(kinds), key=lambda kind: (kinds.count(kind), kind))
        limit = kinds.count(most) - 1
        try:
            limited = solve(chains, replace(MACHINE, machine_limits={most: limit}))
        except PlanError as error:
            assert f"{limit} x {most}" in str(error)
            continue
        planned += 1
        assert sum(m.hardware == most for m in limited.machines) <= limit
        check(limited, chains, 1 << 60)
    assert planned >= 4


def test_too_few_machines_are_an_error_that_names_the_limits() -> None:
    chains = [chain("c", random.Random(1), 300.0)]
    with pytest.raises(PlanError, match=r"do not suffice \(0 x big, 0 x small\)"):
        solve(chains, replace(MACHINE, machine_limits={"big": 0, "small": 0}))


def test_small_loads_of_many_chains_cost_less_together_than_apart() -> None:
    rng = random.Random(3)
    chains = [replace(chain(f"c{i}", rng, 2.0), slo_s=1.0) for i in range(8)]
    apart = sum(solve([each], MACHINE).cost_per_hour for each in chains)
    assert solve(chains, MACHINE).cost_per_hour <= apart / 2


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_is_cheaper_than_the_optimum_in_whole_machines_either(seed: int) -> None:
    rng = random.Random(f"policies {seed}")
    chains = [chain(f"c{i}", rng) for i in range(rng.randint(1, 3))]
    optimal = solve(chains, MACHINE)
    for policy in HEURISTICS:
        try:
            plan = solve(chains, replace(MACHINE, policy=policy))
        except PlanError:
            continue  # Clipper may not split an objective that others can
        check(plan, chains, 1 << 40)
        assert (plan.policy, optimal.policy) == (policy, "optimal")
        assert optimal.cost_per_hour <= plan.cost_per_hour * (1 + 1e-9)
        assert optimal.lower_bound_per_hour == plan.lower_bound_per_hour


def test_nor_where_many_chains_share_machines() -> None:
    # Harpagon's plans for these pack into cheaper machines than what is best in fractions.
    rng = random.Random("many 26")
    chains = [chain(f"c{i}", rng, rng.choice((2.0, 15.0))) for i in range(20)]
    harpagon = solve(chains, replace(MACHINE, policy="harpagon", bound=False))
    assert harpagon.cost_per_hour < whole_machines(chains, MACHINE).cost_per_hour
    assert solve(chains, replace(MACHINE, bound=False)).cost_per_hour <= harpagon.cost_per_hour


@pytest.mark.parametrize("seed", range(8))
def test_a_policy_is_left_out_only_where_it_costs_no_less(seed: int) -> None:
    rng = random.Random(f"left out {seed}")
    chains = [chain(f"c{i}", rng) for i in range(rng.randint(1, 5))]
    for policy, plan_of in HEURISTICS.items():
        options = replace(MACHINE, policy=policy)
        try:
            schedules = [plan_of(each, options) for each in chains]
        except PlanError:
            continue
        cost = solve(chains, options).cost_per_hour
        assert rounded(chains, schedules, options, cost) is None
        found = rounded(chains, schedules, options, cost * (1 + 1e-6))
        assert found is not None and found.cost_per_hour == pytest.approx(cost)


def test_the_bound_is_rounded_up_to_a_sum_of_whole_machines() -> None:
    assert least_price(0.6, [3.0, 0.5]) == 1.0
    assert least_price(3.2, [3.0, 0.5]) == 3.5
    assert least_price(1000.3, [3.0, 0.5]) == 1000.3
    assert least_price(0.7, [1.0]) == 1.0


def test_a_plan_is_the_same_without_its_bound() -> None:
    chains = [chain(f"c{i}", random.Random(i), 3.0 * 4**i) for i in range(4)]
    plan = solve(chains, MACHINE)
    assert plan.lower_bound_per_hour > 0
    without = solve(chains, replace(MACHINE, bound=False))
    assert without == replace(plan, lower_bound_per_hour=0.0)


def test_the_packing_is_published_as_machines_with_shares() -> None:
    plan = solve([chain("c", random.Random(1))], MACHINE)
    published = plan.as_json()
    assert published["billing"] == "machine"
    (first, *_) = published["machines"]
    assert set(first) == {"hardware", "shares", "memory_mib"}
    assert set(first["shares"][0]) >= {"chain", "module", "batch_size", "utilisation"}
