"""From planned machines to instances: who may use an idle slot."""

from __future__ import annotations

from paceline.core.chain import Module, Source
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, Plan
from paceline.runtime.placement import Site, place


def planned(**machines: float) -> Plan:
    """A chain whose models keep so many machines busy."""
    modules = tuple(
        ModulePlan(name, name, 10.0, 0.0, 1.0, 1.0, (Allocation("gpu", 8, 0.2, count, 1.0),))
        for name, count in machines.items()
    )
    return Plan("harpagon", "fractional", (ChainPlan("c", 1.0, 10.0, 1.0, modules),))


def test_a_burst_finds_an_instance_where_slots_are_spare() -> None:
    placed = place(planned(wide=2.4, narrow=1.0), [Site("a", "gpu", 8)], ["wide", "narrow"])
    assert placed["a"] == {"wide": 6, "narrow": 3}


def test_instances_are_no_more_than_slots_and_no_fewer_than_one() -> None:
    placed = place(planned(wide=2.4, rare=0.001), [Site("a", "gpu", 3)], ["wide", "rare", "other"])
    assert placed["a"] == {"wide": 3, "rare": 1, "other": 1}


def test_a_rarely_busy_model_gets_no_more_instances_on_a_machine_of_many_slots() -> None:
    placed = place(planned(small=0.2), [Site("a", "gpu", 64)], ["small"])
    assert placed["a"] == {"small": 2}


def test_instances_are_spread_over_the_machines_of_the_planned_hardware() -> None:
    sites = [Site("a", "gpu", 4), Site("b", "gpu", 4), Site("c", "cpu", 4)]
    placed = place(planned(wide=2.4), sites, ["wide"])
    assert {name: counts["wide"] for name, counts in placed.items()} == {"a": 3, "b": 3, "c": 1}


def test_members_of_a_run_get_its_instances_and_bursts_of_it_the_slots_of_all_members() -> None:
    members = tuple(Module(name, name, {"x": Source(None, "x")}) for name in ("wide", "narrow"))
    run = Module("wide+narrow", "run", {"x": Source(None, "x")}, members=members)
    models = ["wide", "narrow", "other"]
    placed = place(planned(run=1.0, wide=2.4), [Site("a", "gpu", 16)], models, [run])
    assert placed["a"] == {"run": 11, "narrow": 3, "wide": 8, "other": 1}
    placed = place(planned(run=0.01), [Site("a", "gpu", 16), Site("b", "gpu", 1)], models, [run])
    assert (placed["a"]["run"], placed["b"]["run"]) == (2, 1)
