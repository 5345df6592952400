"""Attainment of plans by simulation: chains with fan-out and conditions, fractions, intervals."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ConfigError
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.sim.fleet import RequestInputs
from paceline.sim.verify import simulate, wilson

PROFILES = Profiles(
    tuple(
        ProfileRow(model, "gpu", size, 0.01 + 0.005 * size)
        for model in ("det", "cls", "rec")
        for size in (1, 8)
    )
)


def traffic(name: str = "traffic") -> Chain:
    """A detector, a condition that holds for 40 %, a fan-out to 3 items, one item each to `rec`."""
    image = Source(None, "image")
    return Chain(
        name,
        slo_s=0.4,
        inputs=(TensorSpec("image", "UINT8", (-1,)),),
        modules=(
            Module("det", "det", {"x": image}),
            Module("alarm", "cls", {"x": image}, when=Source("det", "flag"), fan_out=0.4),
            Module("cls", "cls", {"x": Source("det", "crops")}, Source("det", "crops"), fan_out=3),
            Module("rec", "rec", {"x": Source("cls", "y")}, Source("cls", "y"), fan_out=3),
        ),
        outputs={"text": Source("rec", "y")},
    )


def planned(chain: Chain, rate_rps: float, machines: float = 3.0) -> Plan:
    modules = tuple(
        ModulePlan(
            m.name,
            m.model,
            rate_rps * m.fan_out,
            0.0,
            0.2,
            0.2,
            (Allocation("gpu", 8, 0.05, machines, 1.0),),
        )
        for m in chain.modules
    )
    chain_plan = ChainPlan(chain.name, chain.slo_s, rate_rps, 0.4, modules)
    return Plan("optimal", "fractional", (chain_plan,))


def test_a_chain_with_a_condition_and_fan_outs_is_served_and_measured() -> None:
    chain = traffic()
    result = simulate([chain], planned(chain, 40.0), PROFILES, requests=2000, seed=1)
    served = result.chain("traffic")
    assert served.requests == 2000
    assert served.met + served.missed + served.rejected == 2000
    assert served.attainment > 0.95
    rows = {m.module: m.rows / (served.met + served.missed) for m in result.modules}
    assert rows["det"] == pytest.approx(1.0)
    assert rows["alarm"] == pytest.approx(0.4, rel=0.1)
    assert rows["cls"] == pytest.approx(3.0, rel=0.05)
    assert rows["rec"] == pytest.approx(rows["cls"])
    assert 0.0 < result.utilisation < 1.0
    assert served.percentile_s(0.5) <= served.percentile_s(0.99) <= served.percentile_s(1.0)


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    chain = traffic()
    plan = planned(chain, 40.0)
    first, again, other = (
        simulate([chain], plan, PROFILES, requests=300, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert list(first.chains[0].latencies_s) == list(again.chains[0].latencies_s)
    assert list(first.chains[0].latencies_s) != list(other.chains[0].latencies_s)


def test_a_fraction_of_a_machine_works_for_that_share_of_the_time() -> None:
    chain = Chain(
        "one",
        10.0,
        (TensorSpec("x", "UINT8", (1,)),),
        (Module("det", "det", {"x": Source(None, "x")}),),
        {"y": Source("det", "y")},
    )
    plan = planned(chain, 500.0, machines=0.5)
    arrivals = {"one": [0.0] * 400}
    half = simulate([chain], plan, PROFILES, arrivals=arrivals, shed=False)
    whole = simulate([chain], plan, PROFILES, arrivals=arrivals, shed=False, whole=True)
    assert whole.duration_s == pytest.approx(50 * 0.05, rel=0.02)
    assert half.duration_s == pytest.approx(50 * 0.05 * 2, rel=0.02)


def test_modules_that_a_plan_packs_on_one_machine_take_turns_on_it() -> None:
    chain = traffic()
    alone = planned(chain, 2.0, machines=0.25)
    shares = tuple(Share("traffic", m.module, 8, 0.25) for m in alone.chains[0].modules)
    packed = replace(alone, machines=(PackedMachine("gpu", 1.0, shares),))
    result = simulate([chain], packed, PROFILES, requests=200, seed=1)
    assert result.attainment > 0.9
    busy = sum(m.utilisation * 0.25 for m in result.modules)
    assert busy == pytest.approx(result.utilisation, rel=0.05)
    assert result.utilisation < 1.0


def test_two_chains_are_served_together_for_the_same_time() -> None:
    fast, slow = traffic("fast"), traffic("slow")
    plans = (planned(fast, 40.0).chains[0], planned(slow, 10.0).chains[0])
    plan = Plan("optimal", "fractional", plans)
    result = simulate([fast, slow], plan, PROFILES, requests=500, seed=1)
    assert (result.chain("fast").requests, result.chain("slow").requests) == (400, 100)


def test_a_chain_without_plan_is_an_error() -> None:
    with pytest.raises(ConfigError, match="chain 'b' is not in the plan"):
        simulate([traffic("b")], planned(traffic("a"), 1.0), PROFILES)


def test_drawn_items_have_the_expected_mean_and_below_a_false_condition_nothing_runs() -> None:
    image, flag = Source(None, "image"), Source("det", "flag")
    chain = Chain(
        "c",
        1.0,
        (TensorSpec("image", "UINT8", (-1,)),),
        (
            Module("det", "det", {"x": image}),
            Module("maybe", "cls", {"x": image}, when=flag, fan_out=0.5),
            Module("after", "rec", {"x": Source("maybe", "y")}, fan_out=0.5),
        ),
        {"y": Source("after", "y")},
    )
    inputs = RequestInputs(chain, Random(5))
    drawn = [inputs.draw() for _ in range(4000)]
    maybe = [d["rows_maybe"].shape[0] for d in drawn]
    after = [d["rows_after"].shape[0] for d in drawn]
    assert sum(maybe) / len(maybe) == pytest.approx(0.5, abs=0.03)
    assert maybe == after


def test_wilsons_interval_holds_the_share_and_narrows() -> None:
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == 1.0
    assert wilson(500, 1000)[0] > low
