"""Two priorities on the same machines when there is too little for both, in virtual time."""

from __future__ import annotations

from random import Random

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Durations, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.dispatch import route_chain
from paceline.dispatch.admission import Admission
from paceline.dispatch.foresight import SHARE, Foresight, Shares
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.stage import Served, served
from paceline.sim.results import ChainResult
from paceline.sim.verify import simulate

STEPS = {
    "hear": Durations(((1, 0.05), (2, 0.08), (4, 0.115), (8, 0.2))),
    "read": Durations(((1, 0.03), (2, 0.04), (4, 0.055), (8, 0.085))),
    "speak": Durations(((1, 0.02), (2, 0.025), (4, 0.04), (8, 0.07))),
}
PATH_S = sum(known.at(8) for known in STEPS.values())
ALONE_S = sum(known.at(1) for known in STEPS.values())
"""Machine time of a request that shares no batch."""
X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))
MACHINES = 8
FULL_RPS = MACHINES / (PATH_S / 8)
"""What the machines take in full batches."""
SECONDS = 10.0
PROFILES = Profiles(
    tuple(
        ProfileRow(name, "gpu", size, took_s)
        for name, known in STEPS.items()
        for size, took_s in known.points
    )
)


def chain_of(name: str, slo_s: float, priority: int) -> Chain:
    modules = (
        Module("hear", "hear", {"x": Source(None, "x")}),
        Module("read", "read", {"x": Source("hear", "y")}),
        Module("speak", "speak", {"x": Source("read", "y")}),
    )
    return Chain(name, slo_s, (X,), modules, {"y": Source("speak", "y")}, priority=priority)


def plan_of(name: str, slo_s: float, rate_rps: float) -> ChainPlan:
    modules = []
    for module, known in STEPS.items():
        took_s = known.at(8)
        made = Allocation("gpu", 8, took_s, rate_rps * took_s / 8, 1.0)
        modules.append(ModulePlan(module, module, rate_rps, 0.0, took_s, took_s, (made,)))
    return ChainPlan(name, slo_s, rate_rps, slo_s, tuple(modules))


def poisson(load: float, rng: Random) -> list[float]:
    arrivals_s, now_s = [], 0.0
    while load and (now_s := now_s + rng.expovariate(load * FULL_RPS)) < SECONDS:
        arrivals_s.append(now_s)
    return arrivals_s


def serve(
    high: float,
    low: float,
    *,
    planned: tuple[float, float] = (0.6, 0.4),
    objectives: tuple[float, float] = (3.0, 3.0),
) -> tuple[ChainResult, ChainResult]:
    """Both chains' results; loads in shares of what the machines take, objectives in paths."""
    names = ("high", "low")
    slos_s = [PATH_S * objective for objective in objectives]
    chains = [chain_of(name, slos_s[at], at) for at, name in enumerate(names)]
    plans = tuple(
        plan_of(name, slos_s[at], planned[at] * FULL_RPS) for at, name in enumerate(names)
    )
    shares = tuple(Share(name, module, 8, 0.16) for name in names for module in STEPS)
    packed = tuple(PackedMachine("gpu", 1.0, shares) for _ in range(MACHINES))
    plan = Plan("optimal", "machine", plans, machines=packed)
    arrivals = {"high": poisson(high, Random(1)), "low": poisson(low, Random(2))}
    result = simulate(chains, plan, PROFILES, arrivals=arrivals, seed=3)
    return result.chain("high"), result.chain("low")


@pytest.mark.parametrize("objective", [1.6, 3.0])
def test_goodput_stays_within_5_percent_of_its_peak_when_low_priority_floods(
    objective: float,
) -> None:
    # Where admission does not foresee who will go before them, low-priority requests run the
    # first module and expire before the others: 68 % of the peak at five times the rate.
    goodput = {}
    for factor in (1, 2, 5):
        high, low = serve(0.6, 0.4 * factor, objectives=(objective, objective))
        assert high.attainment > 0.999
        goodput[factor] = high.met + low.met
    assert min(goodput.values()) >= 0.95 * max(goodput.values()), goodput


def test_low_priority_is_answered_now_and_then_when_high_priority_takes_everything() -> None:
    alone, _ = serve(2.0, 0.0, planned=(0.8, 0.2))
    owed = SHARE * MACHINES * SECONDS / ALONE_S
    for objective in (1.6, 3.0):
        high, low = serve(2.0, 0.4, planned=(0.8, 0.2), objectives=(3.0, objective))
        assert low.met > 0.7 * owed, "also where it has less time than those before it"
        assert high.missed == 0 and high.met > 0.97 * alone.met


def placed(names: str, pool: MachinePool, machines: int, called: str) -> None:
    """Machines that hold these chains' models."""
    models = {f"{name} {module}": 1 for name in names.split() for module in STEPS}
    for at in range(machines):
        pool.up(f"{called}{at}", "gpu", 1, models)


def chain_alone(name: str, slo_s: float = 1.0) -> Served:
    """Planned for 20 a second, with models of its own."""
    steps = ("hear", "read", "speak")
    modules = tuple(
        Module(
            step,
            f"{name} {step}",
            {"x": Source(steps[at - 1], "y") if at else Source(None, "x")},
        )
        for at, step in enumerate(steps)
    )
    chain = Chain(name, slo_s, (X,), modules, {"y": Source("speak", "y")})
    specs = {f"{name} {step}": ModelSpec(f"{name} {step}", 8, (X,), (Y,)) for step in STEPS}
    durations = {f"{name} {step}": {"gpu": known} for step, known in STEPS.items()}
    return served(route_chain(bind(chain, specs), plan_of(name, slo_s, 20.0), durations), {})


def test_what_urgent_chains_take_elsewhere_is_not_foreseen_here() -> None:
    foresight, pool = Foresight(), MachinePool()
    placed("high low", pool, 2, "both")
    placed("high", pool, 6, "apart")
    high, low = chain_alone("high"), chain_alone("low")
    for request in range(1000):
        foresight.admitted(high, 0, request / 100)
    urgent = foresight.urgent(1, 10.0)
    (flow, rate_rps), *_ = urgent
    hear = low.stages[0].route.home
    taken_s, *_ = flow.of_slot_s(hear, pool)
    assert rate_rps == pytest.approx(100.0, rel=0.1)
    assert taken_s == pytest.approx(PATH_S / 8 / 8), "its work is spread over all its machines"
    placed("low", pool, 4, "other")
    taken_s, *_ = flow.of_slot_s(hear, pool)
    assert taken_s == pytest.approx(PATH_S / 8 / 8 * 2 / 6), "of six slots two are shared"
    placed("", pool, 2, "both")
    pool.down("both0")
    pool.down("both1")
    assert flow.of_slot_s(hear, pool)[:2] == (0.0, 0.0)
    assert foresight.urgent(0, 10.0) == [] and foresight.urgent(1, 100.0) == []
    assert low.alone_s == pytest.approx(ALONE_S)


def test_a_wait_behind_urgent_requests_lasts_longer_by_what_they_take() -> None:
    admission, pool = Admission(), MachinePool()
    placed("high low", pool, 2, "g")
    high, low = chain_alone("high"), chain_alone("low")
    waiting = [admission.admit(low, 1, 100.0, pool, 10.0) for _ in range(64)]
    before_s = admission.predicted_s(low, 1, pool, 10.0)
    for request in range(300):
        # Of a machine of two, half.
        ticket = admission.admit(high, 0, 100.0, pool, request / 300 * 10.0)
        admission.ended(ticket)
    behind_s = admission.predicted_s(low, 1, pool, 10.0)
    assert 1.5 * before_s < behind_s < 4.0 * before_s
    for ticket in waiting:
        admission.ended(ticket)
    nobody_s = Admission().predicted_s(low, 1, pool, 10.0)
    assert admission.predicted_s(low, 1, pool, 10.0) == nobody_s, "where nothing waits"


def test_what_is_owed_to_all_grows_by_the_share_and_is_divided_evenly() -> None:
    shares, pool = Shares(), MachinePool()
    placed("one two", pool, 4, "g")
    chains = [chain_alone("one"), chain_alone("two")]
    given = {"one": 0, "two": 0}
    for tick in range(20_000):
        asks = chains[0] if tick % 10 else chains[1]
        if shares.owes(asks, 1, pool, tick / 20):
            shares.admitted(asks, 1)
            given[asks.route.bound.name] += 1
    most = SHARE * 4 * 1000.0 / ALONE_S
    assert 0.9 * most < sum(given.values()) <= most
    assert min(given.values()) > 0.8 * max(given.values()), "who asks ten times as often as well"
    shares.admitted(chains[0], 1)
    assert not shares.owes(chains[0], 1, pool, 1000.0)


def test_a_miss_at_low_priority_takes_nothing_from_high_priority_of_the_same_chain() -> None:
    admission, pool, chain = Admission(), MachinePool(), chain_alone("c")
    placed("c", pool, 1, "g")
    for _ in range(20):
        admission.admit(chain, 0, 100.0, pool, 0.0)
    just_s = admission.predicted_s(chain, 0, pool, 1.0) + 0.01
    admission.missed(chain, 1.0, 1)
    admission.admit(chain, 0, just_s, pool, 1.0)
    admission.missed(chain, 1.0, 0)
    just_s = admission.predicted_s(chain, 0, pool, 1.0) + 0.01
    with pytest.raises(Rejected):
        admission.admit(chain, 0, just_s, pool, 1.0)
