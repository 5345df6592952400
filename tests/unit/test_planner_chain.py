"""Harpagon level 3 and the planner's entry point, on DAGs small enough to work out by hand."""

from __future__ import annotations

import pytest

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ConfigError, PlanError
from paceline.core.plan import ModulePlan
from paceline.core.profile import Configuration, Hardware, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Options, PlannedChain, PlannedModule, demand
from paceline.planner.solve import solve

PLAIN = Options(dummy=False, reassign=False, node_merger=False, cost_direct=False)
"""Splitting by latency-cost efficiency alone."""


def module(
    name: str, rate_rps: float, parents: str, *points: tuple[int, float], overhead_s: float = 0.0
) -> PlannedModule:
    configurations = tuple(Configuration("gpu", b, d, 1.0) for b, d in points)
    return PlannedModule(name, name, rate_rps, tuple(parents.split()), configurations, overhead_s)


def chain(slo_s: float, *modules: PlannedModule) -> PlannedChain:
    return PlannedChain("c", slo_s, modules[0].rate_rps, modules)


M3_POINTS = ((2, 0.1), (8, 0.25), (32, 0.8))


def shown(plan: ModulePlan) -> str:
    return " + ".join(f"{a.machines:.6g} x b{a.batch_size}" for a in plan.allocations)


@pytest.mark.parametrize(
    ("options", "schedule", "cost"),
    [
        (Options(dispatch="round-robin", max_tuples=2, dummy=False), "6 x b8 + 0.3 x b2", 6.3),
        (Options(max_tuples=2, dummy=False), "4 x b32 + 1.9 x b2", 5.9),
        (Options(dummy=False), "4 x b32 + 1 x b8 + 0.3 x b2", 5.3),
        (Options(), "5 x b32", 5.0),
        (Options(dispatch="pooled"), "4.95 x b32", 4.95),
    ],
)
def test_a_chain_of_m3_alone_costs_the_published_figures(
    options: Options, schedule: str, cost: float
) -> None:
    plan = solve([chain(1.0, module("m3", 198.0, "", *M3_POINTS))], options)
    assert shown(plan.chains[0].modules[0]) == schedule
    assert plan.cost_per_hour == pytest.approx(cost, abs=1e-9)
    assert plan.lower_bound_per_hour == pytest.approx(4.95)


def test_the_plan_of_m3_reads_as_in_the_published_format() -> None:
    plan = solve([chain(1.0, module("m3", 198.0, "", *M3_POINTS))])
    assert (plan.policy, plan.billing, plan.solve_s) == ("harpagon", "fractional", 0.0)
    (planned,) = plan.as_json()["chains"]
    assert planned["latency_worst_ms"] == 961.616
    (only,) = planned["modules"]
    assert (only["dummy_rps"], only["latency_budget_ms"]) == (2.0, 1000.0)
    assert [(a["batch_size"], a["machines"]) for a in only["allocations"]] == [(32, 5.0)]


def test_a_chain_of_two_gives_latency_to_the_module_that_saves_most_with_it() -> None:
    # a saves 1.25 for 0.25 s more (5 per second), b saves 3 for 0.5 s more (6 per second).
    two = chain(
        0.9,
        module("a", 20.0, "", (1, 0.1), (4, 0.15)),
        module("b", 20.0, "a", (1, 0.2), (8, 0.3)),
    )
    plan = solve([two], PLAIN).chains[0]
    assert [shown(m) for m in plan.modules] == ["2 x b1", "0.75 x b8"]
    assert plan.latency_worst_s == pytest.approx(0.1 + 0.7)
    assert [m.latency_budget_s for m in plan.modules] == pytest.approx([0.1125, 0.7875])


def test_siblings_that_share_a_budget_are_worth_more_together_than_their_parent() -> None:
    # Alone: a gains 1.00 for 0.2 s (5 per second), c 3.50 for 1.0 s (3.5), b 1.75 for 0.9 s (1.9);
    # a goes first and leaves too little for c. As one node b and c gain 5.25 for 1.0 s (5.25).
    fork = chain(
        1.5,
        module("a", 20.0, "", (1, 0.2), (2, 0.3), (16, 0.6)),
        module("b", 20.0, "a", (1, 0.1), (16, 0.2)),
        module("c", 20.0, "a", (1, 0.2), (16, 0.4)),
    )
    apart = solve([fork], PLAIN).chains[0]
    merged = solve([fork], Options(dummy=False, reassign=False, cost_direct=False)).chains[0]
    assert [shown(m) for m in apart.modules] == ["3 x b2", "0.25 x b16", "4 x b1"]
    assert [shown(m) for m in merged.modules] == ["4 x b1", "0.25 x b16", "0.5 x b16"]
    assert (apart.cost_per_hour, merged.cost_per_hour) == pytest.approx((7.25, 4.75))


def test_the_largest_saving_beats_the_best_ratio_near_the_end() -> None:
    # b gains 2 for 0.2 s (10 per second) and then a, 3.625 for 0.45 s (8.1), no longer fits.
    two = chain(
        0.8,
        module("a", 40.0, "", (1, 0.1), (16, 0.15)),
        module("b", 40.0, "a", (1, 0.1), (4, 0.2)),
    )
    by_ratio = solve([two], PLAIN).chains[0]
    by_saving = solve([two], Options(dummy=False, reassign=False, node_merger=False)).chains[0]
    assert [shown(m) for m in by_ratio.modules] == ["4 x b1", "2 x b4"]
    assert [shown(m) for m in by_saving.modules] == ["0.375 x b16", "4 x b1"]
    assert (by_ratio.cost_per_hour, by_saving.cost_per_hour) == pytest.approx((6.0, 4.375))


def test_latency_that_no_module_uses_gives_a_residual_a_better_configuration() -> None:
    # b's two full machines need 0.45 + 8/40 = 0.65 s. The rest of 4.44 requests/s fits that only
    # with batches of one; with the spare latency it fits b4, which takes 0.3 + 4/4.44 = 1.2 s.
    two = chain(
        2.0,
        module("a", 10.0, "", (1, 0.2), (2, 0.5)),
        module("b", 40.0, "a", (1, 0.2), (4, 0.3), (8, 0.45)),
    )
    without = solve([two], PLAIN).chains[0]
    with_it = solve([two], Options(dummy=False, node_merger=False, cost_direct=False)).chains[0]
    assert shown(without.modules[1]) == "2 x b8 + 0.888889 x b1"
    assert shown(with_it.modules[1]) == "2 x b8 + 0.333333 x b4"
    assert with_it.modules[1].latency_worst_s == pytest.approx(1.2)


def test_parallel_branches_may_both_use_the_time_of_the_slower_one() -> None:
    diamond = chain(
        1.0,
        module("a", 20.0, "", (1, 0.1)),
        module("b", 20.0, "a", (1, 0.1), (8, 0.3)),
        module("c", 20.0, "a", (1, 0.1), (4, 0.2)),
        module("d", 20.0, "b c", (1, 0.1)),
    )
    plan = solve([diamond], Options(dummy=False)).chains[0]
    assert [shown(m) for m in plan.modules] == ["2 x b1", "0.75 x b8", "1 x b4", "2 x b1"]
    assert plan.latency_worst_s == pytest.approx(0.1 + 0.7 + 0.1)


def test_whole_machines_that_dummy_requests_fill_leave_other_modules_time() -> None:
    # Of 1376 requests/s a batch of 16 fills in 11.6 ms; of the 2105 that fill two machines in 7.6.
    sixteen = ((1, 0.0118), (16, 0.0152))
    four = ((1, 0.0053), (4, 0.0055))
    modules = (
        module("first", 1376.0, "", *sixteen),
        module("second", 700.0, "first", *four),
    )
    plan = solve([chain(0.034, *modules)], Options(policy="harpagon", strict=True))
    assert [shown(m) for m in plan.chains[0].modules] == ["2 x b16", "1 x b4"]


def test_budgets_use_up_the_objective_and_no_path_exceeds_it() -> None:
    fork = chain(
        1.0,
        module("a", 10.0, "", (1, 0.1)),
        module("b", 10.0, "a", (1, 0.3)),
        module("c", 10.0, "a", (1, 0.1)),
    )
    a, b, c = (m.latency_budget_s for m in solve([fork]).chains[0].modules)
    assert (a, b, c) == pytest.approx((0.25, 0.75, 0.75))


def test_overhead_counts_into_latency_and_takes_budget_away() -> None:
    plain = chain(1.0, module("m3", 198.0, "", *M3_POINTS))
    slower = chain(1.0, module("m3", 198.0, "", *M3_POINTS, overhead_s=0.1))
    assert solve([plain], Options(dummy=False)).cost_per_hour == pytest.approx(5.3)
    plan = solve([slower], Options(dummy=False))
    assert shown(plan.chains[0].modules[0]) == "6 x b8 + 0.3 x b2"
    assert plan.chains[0].latency_worst_s == pytest.approx(0.1 + 0.1 + 2 / 6)


def test_chains_are_planned_side_by_side() -> None:
    m3 = chain(1.0, module("m3", 198.0, "", *M3_POINTS))
    plan = solve([m3, PlannedChain("other", 1.0, 198.0, m3.modules)])
    assert [c.chain for c in plan.chains] == ["c", "other"]
    assert plan.cost_per_hour == pytest.approx(10.0)
    assert plan.lower_bound_per_hour == pytest.approx(9.9)


def test_an_infeasible_chain_names_the_slowest_path_and_the_module_with_the_largest_share() -> None:
    ocr = PlannedChain(
        "ocr",
        0.8,
        10.0,
        (
            module("detect", 10.0, "", (1, 0.4), (2, 0.5)),
            module("orient", 10.0, "detect", (1, 0.1)),
            module("recognize", 10.0, "detect", (1, 0.5), (4, 0.9), overhead_s=0.012),
        ),
    )
    with pytest.raises(PlanError) as raised:
        solve([ocr])
    assert str(raised.value) == (
        "chain 'ocr' needs at least 912 ms, 112 ms more than its slo_ms 800; "
        "slowest path detect 400 ms -> recognize 512 ms; largest share: recognize; "
        "raise slo_ms, or take a faster model or faster hardware"
    )
    assert (raised.value.chain, raised.value.module) == ("ocr", "recognize")
    assert raised.value.lacking_s == pytest.approx(0.112)


def test_an_objective_missed_by_less_than_a_millisecond_is_still_said_in_milliseconds() -> None:
    with pytest.raises(PlanError, match=r"needs at least 100\.3 ms, 0\.3 ms more than"):
        solve([chain(0.1, module("a", 10.0, "", (1, 0.1003)))])


def test_an_objective_of_exactly_the_least_latency_is_feasible() -> None:
    two = chain(0.3, module("a", 10.0, "", (1, 0.1)), module("b", 10.0, "a", (1, 0.2), (2, 0.3)))
    assert solve([two]).chains[0].latency_worst_s == pytest.approx(0.3)


def test_a_chain_that_only_dummy_requests_make_feasible_is_planned_with_them() -> None:
    slow = chain(0.25, module("a", 10.0, "", (4, 0.1)))
    assert solve([slow]).chains[0].modules[0].dummy_rps == 30.0
    with pytest.raises(PlanError, match="needs at least 500 ms"):
        solve([slow], Options(dummy=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Options(dispatch="random"), "dispatch: unknown dispatch 'random'; choose one of"),  # type: ignore[arg-type]
        (lambda: Options(max_tuples=0), "max_tuples: must be 1 or more, got 0"),
        (lambda: solve([], Options(policy="magic")), "policy: unknown policy 'magic'"),
        (lambda: module("a", 0.0, "", (1, 0.1)), "modules.a: needs a rate above 0"),
        (lambda: module("a", float("nan"), "", (1, 0.1)), "modules.a: needs a rate above 0"),
        (lambda: module("a", 1.0, ""), "modules.a: model 'a' has no configuration"),
        (lambda: module("a", 1.0, "", (1, 0.1), overhead_s=-1), "needs an overhead of 0 or more"),
        (lambda: PlannedChain("c", 1.0, 1.0, ()), "chain 'c' has no modules"),
        (lambda: chain(0.0, module("a", 1.0, "", (1, 0.1))), "slo_ms: chain 'c' needs slo_ms"),
        (lambda: chain(1.0, module("a", 1.0, "b", (1, 0.1))), "waits for 'b', which is not before"),
        (lambda: chain(1.0, *[module("a", 1.0, "", (1, 0.1))] * 2), "is twice in chain 'c'"),
        (
            lambda: PlannedChain("c", 1.0, float("inf"), (module("a", 1.0, "", (1, 0.1)),)),
            "rate_rps: chain 'c' needs rate_rps above 0",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as raised:
        make()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def ocr_chain() -> Chain:
    return Chain(
        name="ocr",
        slo_s=0.8,
        inputs=(TensorSpec("image", "UINT8", (-1, -1, 3)),),
        modules=(
            Module(
                "recognize",
                "rec",
                {"x": Source("detect", "crops")},
                for_each=Source("detect", "crops"),
                fan_out=4.0,
            ),
            Module("detect", "det", {"image": Source(None, "image")}),
        ),
        outputs={"text": Source("recognize", "text")},
    )


def test_demand_multiplies_the_chain_rate_by_each_fan_out_and_respects_batch_limits() -> None:
    rows = [("det", 1, 0.05), ("rec", 1, 0.01), ("rec", 8, 0.04), ("rec", 16, 0.07)]
    profiles = Profiles(tuple(ProfileRow(m, "cpu", b, d) for m, b, d in rows))
    hardware = {"cpu": Hardware("cpu", 2.0)}
    found = demand(ocr_chain(), 20.0, profiles, hardware, {"rec": 8}, 0.002)
    assert (found.name, found.slo_s, found.rate_rps) == ("ocr", 0.8, 20.0)
    detect, recognize = found.modules
    assert (detect.name, detect.rate_rps, detect.parents) == ("detect", 20.0, ())
    assert (recognize.rate_rps, recognize.parents) == (80.0, ("detect",))
    assert [c.batch_size for c in recognize.configurations] == [1, 8]
    assert recognize.configurations[1] == Configuration("cpu", 8, 0.04, 2.0)
    assert recognize.overhead_s == 0.002
    assert solve([found]).chains[0].module("recognize").rate_rps == 80.0


def test_demand_refuses_a_model_that_was_never_measured() -> None:
    with pytest.raises(ConfigError, match="no profile of model 'det'"):
        demand(ocr_chain(), 20.0, Profiles(), {"cpu": Hardware("cpu", 1.0)}, {}, 0.0)
