"""Which planner a served chain gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from typing import cast

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.errors import PlanError, ResidencyError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, ProfileRow
from paceline.core.runs import runs_of
from paceline.core.tensor import TensorSpec
from paceline.dispatch.learned import LearnedDuration
from paceline.planner.problem import Options
from paceline.planner.replan import Traffic
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Site
from paceline.runtime.provisioning import Provisioning

X = TensorSpec("x", "UINT8", (1,))
MIB = 1 << 20


@dataclass
class Rented:
    """What provisioning asks of the machines."""

    overhead_s: float = 0.003
    round_trip_s: float = 0.001
    site: Site = field(default_factory=lambda: Site("t4.0", "t4", 4))
    budget_bytes: float = inf

    def all(self) -> list[Machine]:
        return [cast(Machine, self)]

    def usable(self) -> list[Site]:
        return [self.site]


SPECS = {
    name: ModelSpec(name, 8, (X,), (TensorSpec("y", "UINT8", (1,)),)) for name in ("asr", "answer")
}
PROFILES = {
    "asr": ((1, 0.0484), (2, 0.0819), (4, 0.115), (8, 0.2035)),
    "answer": ((1, 0.0306), (2, 0.0374), (4, 0.0565), (8, 0.0843)),
}


@pytest.mark.parametrize(
    ("dispatch", "policy"), [("pooled", "optimal"), ("round-robin", "harpagon")]
)
def test_pooled_chains_get_the_optimum_and_others_a_plan_by_their_own_bound(
    dispatch: Dispatch, policy: str
) -> None:
    modules = (
        Module("asr", "asr", {"x": Source(None, "x")}),
        Module("answer", "answer", {"x": Source("asr", "y")}),
    )
    # Tight enough for Harpagon to halve the batches of `asr`, at 8 % more than the optimum.
    chain = Chain("c", 0.422, (X,), modules, {"y": Source("answer", "y")}, rate_rps=100.0)
    provisioning = Provisioning(
        cast(Machines, Rented()), {"t4": Hardware("t4", 1.0)}, Options(), lambda step: None
    )
    provisioning.profiles = provisioning.profiles.merged(
        ProfileRow(name, "t4", size, took_s)
        for name, points in PROFILES.items()
        for size, took_s in points
    )
    slo_s = 0.422 if dispatch == "pooled" else 0.9
    served = [replace(chain, dispatch=dispatch, slo_s=slo_s)]
    plan = planned_by(provisioning, served, SPECS, provisioning.assumed(served))
    assert plan.policy == policy
    if dispatch == "pooled":
        assert plan.cost_per_hour == pytest.approx(plan.lower_bound_per_hour, rel=1e-3)


def test_slowdowns_are_learned_over_profiled_p95_weighted_by_batches() -> None:
    provisioning = Provisioning(
        cast(Machines, Rented()), {"t4": Hardware("t4", 1.0)}, Options(), lambda step: None
    )
    provisioning.profiles = provisioning.profiles.merged(
        ProfileRow("asr", "t4", size, took_s) for size, took_s in PROFILES["asr"]
    )
    learned = [
        LearnedDuration("asr", "g0", "t4", 1, count=30, median_s=0.01, p95_s=2 * 0.0484),
        LearnedDuration("asr", "g0", "t4", 8, count=90, median_s=0.01, p95_s=0.2035),
        LearnedDuration("asr", "g0", "t4", 4, count=19, median_s=0.01, p95_s=9.0),
        LearnedDuration("unprofiled", "g0", "t4", 1, count=99, median_s=0.01, p95_s=9.0),
    ]
    assert provisioning.slowdowns(learned) == {("asr", "t4"): pytest.approx(1.25)}


@pytest.mark.parametrize("machines", [2, 3, 4])
def test_one_slow_machine_is_a_straggler_and_its_kind_is_as_fast_as_before(machines: int) -> None:
    provisioning = Provisioning(
        cast(Machines, Rented()), {"t4": Hardware("t4", 1.0)}, Options(), lambda step: None
    )
    provisioning.profiles = provisioning.profiles.merged(
        ProfileRow("asr", "t4", size, took_s) for size, took_s in PROFILES["asr"]
    )
    learned = [
        LearnedDuration("asr", f"g{at}", "t4", 8, 50, 0.2, 0.2035 * (1.0 if at else 3.0))
        for at in range(machines)
    ]
    assert provisioning.slowdowns(learned) == {("asr", "t4"): pytest.approx(1.0)}
    others = {f"g{at}": pytest.approx(1.0) for at in range(1, machines)}
    assert provisioning.stragglers(learned) == {"g0": pytest.approx(3.0), **others}
    alone = provisioning.slowdowns(learned[:1])
    assert alone == {("asr", "t4"): pytest.approx(3.0)}, "nobody says that its kind is faster"


def test_a_straggler_counts_as_less_of_a_machine_where_machines_are_scarce() -> None:
    provisioning = Provisioning(
        cast(Machines, Rented()), {"t4": Hardware("t4", 1.0)}, Options(), lambda step: None
    )
    provisioning.profiles = provisioning.profiles.merged(
        ProfileRow("asr", "t4", size, took_s) for size, took_s in PROFILES["asr"]
    )
    module = Module("asr", "asr", {"x": Source(None, "x")})
    chains = [
        Chain(name, 1.0, (X,), (module,), {"y": Source("asr", "y")}, priority=at, rate_rps=70.0)
        for at, name in enumerate(("high", "low"))
    ]
    traffic = provisioning.assumed(chains)
    planned = planned_by(provisioning, chains, SPECS, traffic).chain("low")
    assert planned is not None and planned.rate_rps == 70.0, "four slots suffice for both"
    provisioning.slow = {"t4.0": 2.0}
    plan = planned_by(provisioning, chains, SPECS, traffic)
    high, low = plan.chain("high"), plan.chain("low")
    assert high is not None and high.rate_rps == 70.0
    assert low is not None and low.rate_rps < 10.0, "two do not"


def planned_by(
    provisioning: Provisioning,
    served: Sequence[Chain],
    specs: Mapping[str, ModelSpec],
    traffic: Traffic,
) -> Plan:
    """The plan of chains in the form in which they are served."""
    return provisioning.task(served, specs, traffic, runs=False).plan(served)


Points = Mapping[str, Sequence[tuple[int, float]]]


def two(**keys: object) -> Chain:
    """`asr`, then `answer`, with runs."""
    modules = (
        Module("asr", "asr", {"x": Source(None, "x")}),
        Module("answer", "answer", {"x": Source("asr", "y")}),
    )
    outputs = {"y": Source("answer", "y")}
    chain = Chain("c", 2.0, (X,), modules, outputs, rate_rps=100.0, runs="auto")
    return replace(chain, **keys)  # type: ignore[arg-type]


async def profiled(points: Points, chain: Chain) -> Provisioning:
    """What is known when the models take that long, by batch size."""
    provisioning = Provisioning(
        cast(Machines, Rented()), {"t4": Hardware("t4", 1.0)}, Options(), lambda step: None
    )
    provisioning.profiles = provisioning.profiles.merged(
        ProfileRow(name, "t4", size, took_s)
        for name, known in points.items()
        for size, took_s in known
    )
    await provisioning.profile([bind(chain, SPECS)])
    return provisioning


ALIKE = {"asr": ((1, 0.01), (8, 0.02)), "answer": ((1, 0.02), (8, 0.04))}
"""Both serve most in batches of eight."""

UNLIKE = {"asr": ((1, 0.01), (8, 0.02)), "answer": ((1, 0.02), (8, 0.4))}
"""`answer` loses by batches what `asr` gains."""


async def test_a_run_takes_what_its_models_take_less_the_round_trips_and_is_planned_as_one() -> (
    None
):
    chain = two()
    provisioning = await profiled(ALIKE, chain)
    (served,) = provisioning.task([chain], SPECS, provisioning.assumed([chain]), runs=True).served()
    (run,) = served.modules
    durations = provisioning.profiles.durations(run.model, "t4")
    assert durations is not None
    assert dict(durations.points) == pytest.approx({1: 0.029, 8: 0.059})
    plan = planned_by(provisioning, [served], SPECS, provisioning.assumed([chain]))
    (planned,) = plan.chains[0].modules
    assert (planned.module, planned.batch_size) == ("asr+answer", 8)
    rows = provisioning.profiles.rows
    await provisioning.profile([bind(chain, SPECS)])
    assert provisioning.profiles.rows == rows, "what is known is not written down again"


async def test_modules_stay_apart_where_their_best_batches_differ() -> None:
    chain = two()
    provisioning = await profiled(UNLIKE, chain)
    (served,) = provisioning.task([chain], SPECS, provisioning.assumed([chain]), runs=True).served()
    assert served is chain


@pytest.mark.parametrize("why", ["off", "refused", "one does not batch", "seen by the client"])
async def test_modules_stay_apart_where_they_have_to(why: str) -> None:
    chain, specs = two(), dict(SPECS)
    if why == "off":
        chain = two(runs="off")
    elif why == "seen by the client":
        outputs = {"y": Source("answer", "y"), "heard": Source("asr", "y")}
        chain = two(outputs=outputs)
    elif why == "one does not batch":
        specs["asr"] = replace(specs["asr"], max_batch_size=0)
    provisioning = await profiled(ALIKE, chain)
    if why == "refused":
        provisioning.refused |= {run.model for run in runs_of(chain)}
    (served,) = provisioning.task([chain], specs, provisioning.assumed([chain]), runs=True).served()
    assert served is chain


async def test_what_was_learned_of_a_run_is_planned_with_and_does_not_take_it_apart() -> None:
    chain = two()
    provisioning = await profiled(ALIKE, chain)
    assumed = provisioning.assumed([chain])
    (run,) = runs_of(chain)
    slow = replace(assumed, slowdowns={**assumed.slowdowns, (run.model, "t4"): 2.0})
    (served,) = provisioning.task([chain], SPECS, slow, runs=True).served()
    assert [m.model for m in served.modules] == [run.model]
    cost, slow_cost = (
        planned_by(provisioning, [served], SPECS, traffic).cost_per_hour
        for traffic in (assumed, slow)
    )
    assert slow_cost == pytest.approx(2 * cost)


async def test_a_run_is_executed_as_often_as_its_modules_are() -> None:
    chain = two()
    provisioning = await profiled(ALIKE, chain)
    half = Traffic({"c": 100.0}, {("c", "asr"): 0.5, ("c", "answer"): 0.5})
    (served,) = provisioning.task([chain], SPECS, half, runs=True).served()
    plan = planned_by(provisioning, [served], SPECS, half)
    assert plan.chains[0].modules[0].rate_rps == pytest.approx(50.0)


@dataclass
class Kind:
    """A machine of a kind, and what measuring on it finds: `asr` takes so long."""

    site: Site
    took_s: float
    budget_bytes: float
    overhead_s: float = 0.003
    round_trip_s: float = 0.001
    measured: list[str] = field(default_factory=list)

    @property
    def profiler(self) -> Kind:
        return self

    async def measure(
        self, model: ModelSpec, hardware: str, *, on_progress: object
    ) -> tuple[ProfileRow, ...]:
        self.measured.append(model.name)
        return tuple(ProfileRow(model.name, hardware, size, self.took_s) for size in (1, 8))


@dataclass
class Fleet:
    """Machines of several kinds; every model needs as much."""

    kinds: list[Kind]
    needed: int

    def all(self) -> list[Kind]:
        return self.kinds

    def usable(self) -> list[Site]:
        return [kind.site for kind in self.kinds]

    def needed_bytes(self, model: str) -> int:
        return self.needed

    def using(self, model: str, name: str) -> AbstractAsyncContextManager[None]:
        (kind,) = (kind for kind in self.kinds if kind.site.name == name)
        if self.needed > kind.budget_bytes:
            raise ResidencyError(f"model {model!r} needs more than {name} has")
        return nullcontext()


def two_kinds(needed_mib: int, small_mib: float = 100) -> tuple[Fleet, Provisioning]:
    """A cheap kind with little memory, and one three times as dear with more."""
    small = Kind(Site("t4.0", "t4", 4), 0.01, small_mib * MIB)
    large = Kind(Site("a100.0", "a100", 4), 0.01, 400 * MIB)
    fleet = Fleet([small, large], needed_mib * MIB)
    prices = {"t4": Hardware("t4", 1.0), "a100": Hardware("a100", 3.0)}
    return fleet, Provisioning(cast(Machines, fleet), prices, Options(), lambda step: None)


ASR = Chain(
    "c",
    0.5,
    (X,),
    (Module("asr", "asr", {"x": Source(None, "x")}),),
    {"y": Source("asr", "y")},
    rate_rps=10.0,
)


def planned_on(provisioning: Provisioning) -> set[str]:
    plan = planned_by(provisioning, [ASR], SPECS, provisioning.assumed([ASR]))
    return {a.hardware for m in plan.chains[0].modules for a in m.allocations}


async def test_a_model_is_measured_and_planned_only_where_it_fits_into_memory() -> None:
    fleet, provisioning = two_kinds(needed_mib=100)
    await provisioning.profile([bind(ASR, SPECS)])
    assert planned_on(provisioning) == {"t4"}
    fleet, provisioning = two_kinds(needed_mib=101)
    await provisioning.profile([bind(ASR, SPECS)])
    assert [kind.measured for kind in fleet.kinds] == [[], ["asr"]]
    assert planned_on(provisioning) == {"a100"}


async def test_a_model_that_has_grown_out_of_a_kind_is_planned_there_no_more() -> None:
    fleet, provisioning = two_kinds(needed_mib=60)
    await provisioning.profile([bind(ASR, SPECS)])
    fleet.needed = 150 * MIB
    assert planned_on(provisioning) == {"a100"}
    fleet.needed = 500 * MIB
    with pytest.raises(PlanError, match=r"needs 500 MiB on a100, which has 400 MiB and 500 MiB on"):
        planned_on(provisioning)
    fleet.needed = 60 * MIB
    assert planned_on(provisioning) == {"t4"}, "what is believed of it has been put right"


async def test_where_memory_has_no_bound_any_model_fits() -> None:
    _, provisioning = two_kinds(needed_mib=101, small_mib=inf)
    await provisioning.profile([bind(ASR, SPECS)])
    assert planned_on(provisioning) == {"t4"}


async def test_a_model_that_fits_nowhere_is_said() -> None:
    _, provisioning = two_kinds(needed_mib=500)
    with pytest.raises(ResidencyError, match="'asr' needs more than"):
        await provisioning.profile([bind(ASR, SPECS)])
