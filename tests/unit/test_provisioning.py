"""Which planner a served chain gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import pytest

from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.profile import Hardware, ProfileRow
from paceline.core.tensor import TensorSpec
from paceline.dispatch.learned import LearnedDuration
from paceline.planner.problem import Options
from paceline.runtime.machines import Machine, Machines
from paceline.runtime.placement import Site
from paceline.runtime.provisioning import Provisioning

X = TensorSpec("x", "UINT8", (1,))


@dataclass
class Rented:
    """What provisioning asks of the machines."""

    overhead_s: float = 0.003

    def all(self) -> list[Machine]:
        return [cast(Machine, self)]

    def usable(self) -> list[Site]:
        return [Site("t4.0", "t4", 4)]


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
    plan = provisioning.solve(served, SPECS, provisioning.assumed(served))
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
        LearnedDuration("asr", "t4", 1, count=30, median_s=0.01, p95_s=2 * 0.0484),
        LearnedDuration("asr", "t4", 8, count=90, median_s=0.01, p95_s=0.2035),
        LearnedDuration("asr", "t4", 4, count=19, median_s=0.01, p95_s=9.0),
        LearnedDuration("unprofiled", "t4", 1, count=99, median_s=0.01, p95_s=9.0),
    ]
    assert provisioning.slowdowns(learned) == {("asr", "t4"): pytest.approx(1.25)}
