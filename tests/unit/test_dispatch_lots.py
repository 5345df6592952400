"""Throughput-cost and round-robin when more comes than was planned for, by hand."""

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
    BatchDone,
    Dispatcher,
    Execute,
    Fail,
    InstallChain,
    MachineUp,
    Submit,
    route_chain,
)

KNOWN = {
    "big": Durations(((1, 0.1), (4, 0.2))),
    "small": Durations(((1, 0.2), (2, 0.3))),
}
X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))


def serving(policy: Dispatch, slo_s: float) -> Dispatcher:
    """One big machine, batches of 4 at 20 rows/s, and one small one, of 2 at 2 rows/s (planned)."""
    module = Module("m", "m", {"x": Source(None, "x")})
    chain = Chain("c", slo_s, (X,), (module,), {"y": Source("m", "y")}, dispatch=policy)
    made = (Allocation("big", 4, 0.2, 1.0, 1.0), Allocation("small", 2, 0.3, 0.3, 1.0))
    planned = ModulePlan("m", "m", 22.0, 0.0, slo_s, slo_s, made)
    plan = ChainPlan("c", slo_s, 22.0, slo_s, (planned,))
    bound = bind(chain, {"m": ModelSpec("m", 4, (X,), (Y,))})
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route_chain(bound, plan, {"m": KNOWN})), now_s=0.0)
    for hardware in KNOWN:
        dispatcher.handle(MachineUp(hardware, hardware, 1, {"m": 1}), now_s=0.0)
    return dispatcher


def submit(dispatcher: Dispatcher, request: int, slo_s: float) -> list[Action]:
    x = Tensor("x", "UINT8", (1,), b"x")
    return dispatcher.handle(Submit(request, "c", {"x": x}, slo_s), now_s=0.0)


def launched(actions: list[Action]) -> list[tuple[str, int]]:
    return [(a.machine, a.rows) for a in actions if isinstance(a, Execute)]


def refused(actions: list[Action]) -> bool:
    return any(isinstance(action, Fail) for action in actions)


@pytest.mark.parametrize("policy", ["round-robin", "throughput-cost"])
def test_a_burst_fills_every_machine_up_to_its_own_deadline_and_the_rest_is_refused(
    policy: Dispatch,
) -> None:
    # Within 0.65 s the big machine can do three batches of 4, the small one two batches of 2.
    dispatcher = serving(policy, 0.65)
    ended = [refused(submit(dispatcher, request, 0.65)) for request in range(40)]
    assert ended.count(False) == 16
    assert True not in ended[:12], "by its published turn alone a machine would be full before"


def test_rows_beyond_the_plan_go_to_the_best_rank_that_has_them_in_time() -> None:
    dispatcher = serving("throughput-cost", 5.0)
    running = [action for request in range(24) for action in submit(dispatcher, request, 5.0)]
    done: dict[str, int] = {}
    now_s = 0.0
    while launches := [action for action in running if isinstance(action, Execute)]:
        now_s += 0.3
        running = []
        for launch in launches:
            done[launch.machine] = done.get(launch.machine, 0) + launch.rows
            y = Tensor("y", "UINT8", (launch.rows, 1), bytes(launch.rows))
            running += dispatcher.handle(BatchDone(launch.batch, (y,)), now_s=now_s)
    # Four for the rank that is due, eight for the last, which may be ahead of its rate by what
    # better ranks collect; the other twelve are more than was planned for.
    assert done == {"big": 16, "small": 8}


def test_a_machine_that_is_late_gives_up_rows_that_only_a_small_batch_would_save() -> None:
    dispatcher = serving("round-robin", 0.5)
    actions = {request: submit(dispatcher, request, 0.5) for request in range(20)}
    accepted = {request for request, told in actions.items() if not refused(told)}
    assert len(accepted) == 11, "two batches of 4, one of 2, and one row alone"
    (first, *_) = [a for told in actions.values() for a in told if isinstance(a, Execute)]
    # The big machine takes 0.2 s longer than was expected: of its second batch nothing would be in
    # time but a row alone, at the cost of those that come.
    x = Tensor("x", "UINT8", (1,), b"x")
    for request in range(100, 104):
        assert not refused(dispatcher.handle(Submit(request, "c", {"x": x}, 2.0), now_s=0.39))
    y = Tensor("y", "UINT8", (4, 1), bytes(4))
    told = dispatcher.handle(BatchDone(first.batch, (y,)), now_s=0.395)
    assert launched(told) == [("big", 4)]
    given_up = {action.request for action in told if isinstance(action, Fail)}
    assert len(given_up) == 4 and given_up < accepted
