"""Rows of different shapes in one module: none waits behind what it cannot share a batch with."""

from __future__ import annotations

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import (
    Action,
    Dispatcher,
    Execute,
    InstallChain,
    MachineUp,
    Submit,
    Tick,
    Wake,
    route_chain,
)

MODEL = ModelSpec("w", 4, (TensorSpec("x", "UINT8", (-1,)),), (TensorSpec("y", "UINT8", (-1,)),))
DURATIONS = Durations(((1, 0.7), (4, 0.8)))
SLO_S = 6.0


def serving(policy: Dispatch, machines: int) -> Dispatcher:
    """Planned for batches of 4 at 8 rows/s."""
    chain = Chain(
        "c",
        SLO_S,
        (TensorSpec("x", "UINT8", (-1,)),),
        (Module("w", "w", {"x": Source(None, "x")}),),
        {"y": Source("w", "y")},
        dispatch=policy,
    )
    made = Allocation("gpu", 4, DURATIONS.at(4), float(machines), 1.0)
    plan = ChainPlan(
        "c", SLO_S, 8.0, SLO_S, (ModulePlan("w", "w", 8.0, 0.0, SLO_S, SLO_S, (made,)),)
    )
    dispatcher = Dispatcher()
    route = route_chain(bind(chain, {"w": MODEL}), plan, {"w": {"gpu": DURATIONS}})
    dispatcher.handle(InstallChain(route), now_s=0.0)
    for index in range(machines):
        dispatcher.handle(MachineUp(f"g{index}", "gpu", 1, {"w": 1}), now_s=0.0)
    return dispatcher


def submit(dispatcher: Dispatcher, request: int, length: int, *, now_s: float) -> list[Action]:
    x = Tensor("x", "UINT8", (length,), bytes(length))
    return dispatcher.handle(Submit(request, "c", {"x": x}, now_s + SLO_S), now_s=now_s)


def executed(actions: list[Action]) -> list[tuple[int, ...]]:
    return [a.call.inputs[0].shape for a in actions if isinstance(a, Execute)]


@pytest.mark.parametrize(
    ("policy", "machines", "lengths"),
    [
        ("pooled", 2, [3, 5, 3, 3, 3, 3]),  # the first one goes at once, alone
        ("throughput-cost", 1, [5, 3, 3, 3, 3]),
        ("round-robin", 1, [5, 3, 3, 3, 3]),
    ],
)
def test_a_full_batch_goes_though_an_older_request_of_another_shape_waits_for_company(
    policy: Dispatch, machines: int, lengths: list[int]
) -> None:
    dispatcher = serving(policy, machines)
    begun = [
        executed(submit(dispatcher, number, length, now_s=0.0))
        for number, length in enumerate(lengths)
    ]
    alone: list[list[tuple[int, ...]]] = [[(1, 3)], []] if policy == "pooled" else [[]]
    assert begun == [*alone, [], [], [], [(4, 3)]]


def test_a_request_that_nobody_joins_goes_when_its_slack_runs_out() -> None:
    dispatcher = serving("throughput-cost", machines=1)
    waits = submit(dispatcher, 0, 5, now_s=0.0)
    assert not executed(waits)
    (wake,) = [a.at_s for a in waits if isinstance(a, Wake)]
    assert wake == pytest.approx(SLO_S - DURATIONS.at(4))
    assert executed(dispatcher.handle(Tick(), now_s=wake)) == [(1, 5)]
