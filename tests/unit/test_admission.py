"""Who is refused at the door: predictions of chains that share machines, and their margin."""

from __future__ import annotations

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ErrorKind, Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan, PackedMachine, Plan, Share
from paceline.core.profile import Durations, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.dispatch import route_chain
from paceline.dispatch.admission import MARGIN_FADES_S, Admission
from paceline.dispatch.machines import MachinePool
from paceline.dispatch.stage import Served, served
from paceline.sim.verify import SimResult, simulate

STEPS = {
    "hear": Durations(((1, 0.05), (2, 0.08), (4, 0.115), (8, 0.2))),
    "read": Durations(((1, 0.03), (2, 0.04), (4, 0.055), (8, 0.085))),
    "speak": Durations(((1, 0.02), (2, 0.025), (4, 0.04), (8, 0.07))),
}
PATH_S = sum(known.at(8) for known in STEPS.values())
X = TensorSpec("x", "UINT8", (1,))
MACHINES = 8


def three_steps(slo_s: float) -> Chain:
    modules = (
        Module("hear", "hear", {"x": Source(None, "x")}),
        Module("read", "read", {"x": Source("hear", "y")}),
        Module("speak", "speak", {"x": Source("read", "y")}),
    )
    return Chain("c", slo_s, (X,), modules, {"y": Source("speak", "y")})


def plan_of(slo_s: float, rate_rps: float) -> ChainPlan:
    """Full batches everywhere; budgets do not matter to the dispatcher."""
    modules = []
    for name, known in STEPS.items():
        took_s = known.at(8)
        made = Allocation("gpu", 8, took_s, rate_rps * took_s / 8, 1.0)
        modules.append(ModulePlan(name, name, rate_rps, 0.0, took_s, took_s, (made,)))
    return ChainPlan("c", slo_s, rate_rps, slo_s, tuple(modules))


def serve(load: float, tightness: float) -> SimResult:
    """Machines that all modules share, `load` busy with full batches; Poisson arrivals."""
    slo_s = tightness * PATH_S
    rate_rps = load * MACHINES / (PATH_S / 8)
    shares = tuple(Share("c", name, 8, 0.3) for name in STEPS)
    packed = tuple(PackedMachine("gpu", 1.0, shares) for _ in range(MACHINES))
    plan = Plan("optimal", "machine", (plan_of(slo_s, rate_rps),), machines=packed)
    profiles = Profiles(
        tuple(
            ProfileRow(name, "gpu", size, took_s)
            for name, known in STEPS.items()
            for size, took_s in known.points
        )
    )
    chain = three_steps(slo_s)
    return simulate([chain], plan, profiles, arrivals="poisson", requests=4000, seed=3)


def test_few_are_refused_for_rows_that_the_queues_put_behind_them() -> None:
    # Counting all rows of the other modules as work that goes first, 4.2 % were refused here
    # though even the slowest answer took 92 % of the objective only.
    result = serve(0.85, 1.3)
    assert result.attainment > 0.985
    assert result.chain("c").missed == 0


@pytest.mark.parametrize("load", [1.5, 2.5])
def test_what_is_admitted_in_overload_still_ends_in_time(load: float) -> None:
    # Requests that enter later go first further up: without them the prediction is too early,
    # and machines are spent on requests that expire between the modules.
    result = serve(load, 1.6)
    assert result.attainment * load > 0.97
    assert result.chain("c").missed == 0


def served_alone(slo_s: float) -> tuple[Served, MachinePool]:
    chain = three_steps(slo_s)
    y = TensorSpec("y", "UINT8", (1,))
    specs = {name: ModelSpec(name, 8, (X,), (y,)) for name in STEPS}
    durations = {name: {"gpu": known} for name, known in STEPS.items()}
    route = route_chain(bind(chain, specs), plan_of(slo_s, 20.0), durations)
    pool = MachinePool()
    pool.up("g", "gpu", 1, dict.fromkeys(STEPS, 1))
    return served(route, {}), pool


def test_a_miss_widens_the_margin_for_a_while_and_only_for_those_who_would_wait() -> None:
    chain, pool = served_alone(slo_s=1.0)
    admission = Admission()
    alone_s = admission.predicted_s(chain, 0, pool, 0.0)
    tickets = [admission.admit(chain, 0, 100.0, pool, 0.0) for _ in range(20)]
    just_s = admission.predicted_s(chain, 0, pool, 0.0) + 0.01
    tickets.append(admission.admit(chain, 0, just_s, pool, 0.0))
    for miss in range(3):
        admission.missed(chain, 0.2 * miss)
    just_s = admission.predicted_s(chain, 0, pool, 0.0) + 0.01
    with pytest.raises(Rejected) as refused:
        admission.admit(chain, 0, just_s, pool, 0.0)
    assert refused.value.kind is ErrorKind.OVERLOADED
    later_s = 3 * MARGIN_FADES_S
    tickets.append(admission.admit(chain, 0, just_s, pool, later_s))
    for ticket in tickets:
        admission.ended(ticket)
    for miss in range(100):
        admission.missed(chain, later_s + 0.2 * miss)
    # Nothing waits: what such a request takes more than the least is all that it is held to.
    admission.admit(chain, 0, 2 * alone_s, pool, later_s + 20.0)
