"""Planning with fewer machines than the traffic wants: who gets them, and that serving follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import StringIO
from random import Random

import pytest
from rich.console import Console

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import PlanError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import Configuration, Durations
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import Action, Answer, Event, Fail, route_chain
from paceline.planner.problem import Options, PlannedChain, PlannedModule
from paceline.planner.scarce import LEAST_SHARE, Wanted, plan_by_priority
from paceline.report import plan_report
from paceline.runtime.placement import Site, place, shortage
from paceline.sim.backend import SimMachine
from paceline.sim.fleet import BlankModels, blank_chain
from paceline.sim.stimuli import Arrive, Crash, Install, Stimulus
from paceline.sim.workload import poisson
from paceline.sim.world import World

SLO_S = 1.0
POINTS = ((1, 0.1), (8, 0.2))
OPTIONS = Options(policy="optimal", dispatch="pooled")


def wanted(name: str, rate_rps: float, priority: int, *kinds: str) -> Wanted:
    """A chain of one module that needs 1 machine of `kinds` for 40 requests/s."""
    configurations = tuple(
        Configuration(kind, size, took_s, float(price))
        for price, kind in enumerate(kinds or ("gpu",), 1)
        for size, took_s in POINTS
    )
    module = PlannedModule(name, name, rate_rps, (), configurations)
    return Wanted(PlannedChain(name, SLO_S, rate_rps, (module,)), OPTIONS, priority)


def rates(plans: Sequence[Plan]) -> dict[str, float]:
    return {chain.chain: chain.rate_rps for plan in plans for chain in plan.chains}


def test_where_machines_suffice_every_chain_is_planned_whole() -> None:
    plans = plan_by_priority([wanted("a", 40, 0), wanted("b", 40, 3)], {"gpu": 2})
    assert rates(plans) == {"a": 40, "b": 40}
    assert all(chain.wanted is None for plan in plans for chain in plan.chains)


def test_the_most_urgent_are_whole_the_next_share_the_rest_and_the_last_get_nothing() -> None:
    asked = [wanted("last", 40, 2), wanted("b1", 40, 1), wanted("a", 60, 0), wanted("b2", 20, 1)]
    plans = plan_by_priority(asked, {"gpu": 2.25})
    found = rates(plans)
    assert [plan.chains[0].chain for plan in plans] == ["last", "b1", "a", "b2"]
    assert found["a"] == 60
    assert found["b1"] / 40 == pytest.approx(found["b2"] / 20), "equal priorities, equal shares"
    assert found["b1"] + found["b2"] == pytest.approx(30, rel=0.05)
    assert found["last"] == pytest.approx(LEAST_SHARE * 40)
    shed = {c.chain: c.wanted.rate_rps for p in plans for c in p.chains if c.wanted}
    assert shed == {"last": 40, "b1": 40, "b2": 20}
    whole = Plan("optimal", "fractional", tuple(chain for plan in plans for chain in plan.chains))
    ((needed, present),) = shortage(whole, [Site("s", "gpu", 2)], {}).values()
    assert needed == pytest.approx(4.0, rel=0.1) and present == 2, "what all would need"
    assert not shortage(whole, [Site("s", "gpu", 3), Site("t", "gpu", 3)], {})
    ((_, present),) = shortage(
        whole, [Site("s", "gpu", 3), Site("t", "gpu", 3)], {"t": 6.0}
    ).values()
    assert present == 3.5, "a straggler is worth less"


def test_what_is_left_of_dearer_hardware_is_used() -> None:
    plans = plan_by_priority(
        [wanted("a", 40, 0, "gpu", "big"), wanted("b", 40, 1, "gpu", "big")], {"gpu": 1, "big": 1}
    )
    assert rates(plans) == {"a": 40, "b": 40}
    (b,) = plans[1].chains
    assert {a.hardware for m in b.modules for a in m.allocations} == {"big"}


def kinds_of(plan: Plan) -> dict[str, float]:
    found: dict[str, float] = {}
    for allocation in (a for c in plan.chains for m in c.modules for a in m.allocations):
        found[allocation.hardware] = found.get(allocation.hardware, 0.0) + allocation.machines
    return found


def test_the_most_urgent_runs_on_two_kinds_where_the_cheapest_is_too_little() -> None:
    (plan,) = plan_by_priority([wanted("a", 70, 0, "gpu", "big")], {"gpu": 1, "big": 2})
    assert rates([plan]) == {"a": 70} and plan.chains[0].wanted is None
    assert kinds_of(plan) == {"gpu": pytest.approx(1.0), "big": pytest.approx(0.75)}


def test_where_all_kinds_are_too_little_the_most_urgent_uses_all_of_them() -> None:
    """Its whole plan would have the cheapest kind alone, and dispatch keep it from the others."""
    capacity = {"gpu": 1, "big": 0.5}
    first, last = plan_by_priority(
        [wanted("a", 80, 0, "gpu", "big"), wanted("b", 40, 1, "gpu", "big")], capacity
    )
    assert kinds_of(first) == {
        kind: pytest.approx(most, rel=0.03) for kind, most in capacity.items()
    }
    (chain,) = first.chains
    assert chain.rate_rps == pytest.approx(60, rel=0.03)
    assert chain.wanted is not None and chain.wanted.rate_rps == 80
    assert 0 < first.lower_bound_per_hour <= first.cost_per_hour
    shown = StringIO()
    Console(file=shown, width=200).print(plan_report(first))
    assert f"a: {chain.rate_rps:g} of 80 requests/s (the machines" in shown.getvalue()
    assert rates([last])["b"] == pytest.approx(LEAST_SHARE * 40, abs=1.0)
    (plan,) = plan_by_priority([wanted("a", 80, 0)], {"gpu": 1})
    assert rates([plan]) == {"a": 80} and plan.chains[0].wanted is None, "one kind is all its own"


def test_what_is_shed_gets_all_that_is_left_of_two_kinds() -> None:
    asked = [wanted("a", 20, 0, "gpu", "big"), wanted("b", 80, 1, "gpu", "big")]
    first, second = plan_by_priority(asked, {"gpu": 1, "big": 1})
    assert rates([first]) == {"a": 20} and rates([second])["b"] == pytest.approx(60, rel=0.02)
    assert kinds_of(second) == {
        "gpu": pytest.approx(0.5, rel=0.05),
        "big": pytest.approx(1.0, rel=0.05),
    }


def test_other_policies_than_pooled_are_not_mixed() -> None:
    one = wanted("a", 70, 0, "gpu", "big")
    options = Options(policy="harpagon", dispatch="throughput-cost")
    (plan,) = plan_by_priority([Wanted(one.chain, options)], {"gpu": 1, "big": 2})
    assert set(kinds_of(plan)) == {"gpu"}


def test_a_chain_that_no_machine_can_serve_in_time_is_an_error_as_ever() -> None:
    slow = wanted("a", 40, 1)
    slow = Wanted(PlannedChain("a", 0.05, 40, slow.chain.modules), OPTIONS, 1)
    with pytest.raises(PlanError):
        plan_by_priority([wanted("b", 40, 0), slow], {"gpu": 1})


def test_a_plan_for_more_than_all_machines_can_do_keeps_every_kind_busy_in_virtual_time() -> None:
    """As a server replans in overload. The cheapest plan would have the first module on the first
    kind alone, and no machine of the other left that nobody was planned for."""
    slo_s, offered_rps, filled_s, until_s = 0.56, 300.0, 3.0, 15.0
    profiles = {
        "detect": {"gpu": ((1, 0.07), (8, 0.28)), "big": ((1, 0.034), (8, 0.144))},
        "classify": {"gpu": ((1, 0.031), (8, 0.093)), "big": ((1, 0.01), (8, 0.031))},
    }
    prices = {"gpu": 0.5, "big": 1.2}

    def module(name: str, *parents: str) -> PlannedModule:
        configurations = tuple(
            Configuration(kind, size, took_s, prices[kind])
            for kind, points in profiles[name].items()
            for size, took_s in points
        )
        return PlannedModule(name, name, 2 * offered_rps, parents, configurations)

    modules = (module("detect"), module("classify", "detect"))
    asked = Wanted(PlannedChain("c", slo_s, 2 * offered_rps, modules), OPTIONS)
    (plan,) = plan_by_priority([asked], {"gpu": 2, "big": 2})
    most_rps = plan.chains[0].rate_rps
    assert most_rps == pytest.approx(137, rel=0.05), "what these machines do in full batches"

    spec = (TensorSpec("x", "UINT8", (1,)),)
    chain = Chain(
        "c",
        slo_s,
        spec,
        (
            Module("detect", "detect", {"x": Source(None, "x")}),
            Module("classify", "classify", {"x": Source("detect", "y")}),
        ),
        {"y": Source("classify", "y")},
        rate_rps=2 * offered_rps,
    )
    durations = {
        name: {kind: Durations(points) for kind, points in known.items()}
        for name, known in profiles.items()
    }
    bound = blank_chain(chain, {"detect": 8, "classify": 8})
    met = 0

    def watch(due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        nonlocal met
        answers = [action for action in actions if isinstance(action, Answer)]
        met += sum(answer.timeline.met for answer in answers) if now_s >= filled_s else 0

    machines = [
        SimMachine(f"{kind}{number}", kind, 1, {"detect": 1, "classify": 1})
        for kind in prices
        for number in range(2)
    ]
    world = World(
        machines,
        durations,
        BlankModels({module.spec.name: module.spec for module in bound.modules}),
        observers=(watch,),
    )
    x = {"x": Tensor("x", "UINT8", (1,), b"\0")}
    stimuli: list[Stimulus] = [Install(0.0, route_chain(bound, plan.chain("c"), durations))]
    instants = poisson(offered_rps, int(offered_rps * until_s), Random(5))
    stimuli += [Arrive(at_s, number, "c", x, slo_s) for number, at_s in enumerate(instants, 1)]
    world.run(stimuli)
    assert met / (until_s - filled_s) > 0.95 * most_rps, "the whole plan answers 60"


def test_when_a_machine_is_lost_the_lowest_priority_is_shed_in_virtual_time() -> None:
    rate_rps, lost_s, until_s = 30.0, 10.0, 30.0
    asked = [wanted("high", rate_rps, 0), wanted("low", rate_rps, 1)]
    durations = {name: {"gpu": Durations(POINTS)} for name in ("high", "low")}
    rows = (TensorSpec("rows", "UINT8", (1,)),)
    out = (TensorSpec("y", "UINT8", (1,)),)
    bounds = {
        each.chain.name: blank_chain(
            Chain(
                each.chain.name,
                SLO_S,
                (TensorSpec("x", "UINT8", (1,)),),
                (Module(each.chain.name, each.chain.name, {"x": Source(None, "x")}),),
                {"y": Source(each.chain.name, "y")},
                priority=each.priority,
                rate_rps=rate_rps,
            ),
            {each.chain.name: 8},
        )
        for each in asked
    }

    def follow(at_s: float, machines: int) -> tuple[Plan, list[Stimulus]]:
        parts = plan_by_priority(asked, {"gpu": machines})
        plan = Plan("optimal", "fractional", tuple(c for p in parts for c in p.chains))
        routes = [route_chain(b, plan.chain(name), durations) for name, b in bounds.items()]
        return plan, [Install(at_s, route) for route in routes]

    before, install = follow(0.0, 2)
    after, install_again = follow(lost_s + 1.0, 1)
    assert rates([before]) == {"high": 30, "low": 30}
    assert rates([after])["high"] == 30 and rates([after])["low"] < 15

    met: Counter[tuple[str, bool]] = Counter()
    refused: Counter[str] = Counter()
    came: dict[int, tuple[str, float]] = {}

    def watch(due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Answer | Fail):
                chain, at_s = came[action.request]
                late = at_s > lost_s + 1.0
                if isinstance(action, Answer) and now_s - at_s <= SLO_S:
                    met[chain, late] += 1
                elif late:
                    refused[chain] += 1

    models = ["high", "low"]
    instances = place(before, [Site("m0", "gpu", 1), Site("m1", "gpu", 1)], models)
    world = World(
        [SimMachine(name, "gpu", 1, held) for name, held in instances.items()],
        durations,
        BlankModels({name: ModelSpec(name, 8, rows, out) for name in models}),
        observers=(watch,),
    )
    rng = Random(5)
    stimuli: list[Stimulus] = [*install, Crash(lost_s, "m1"), *install_again]
    arrivals = sorted(
        (at_s, name)
        for name in models
        for at_s in poisson(rate_rps, int(rate_rps * until_s), rng)
        if at_s < until_s
    )
    inputs = {name: {"x": Tensor("x", "UINT8", (1,), b"\0")} for name in models}
    for number, (at_s, name) in enumerate(arrivals, start=1):
        came[number] = (name, at_s)
        stimuli.append(Arrive(at_s, number, name, inputs[name], SLO_S))
    world.run(stimuli)
    late = Counter(name for name, at_s in came.values() if at_s > lost_s + 1.0)
    assert met["high", True] >= 0.97 * late["high"], (met, late)
    assert 0 < met["low", True] < 0.6 * late["low"], (met, late)
    assert refused["low"] > 0.3 * late["low"] and refused["high"] < 0.03 * late["high"]
