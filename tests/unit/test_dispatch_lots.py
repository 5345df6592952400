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
    Answer,
    BatchDone,
    Dispatcher,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Submit,
    Tick,
    Wake,
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


def submit(dispatcher: Dispatcher, request: int, slo_s: float, now_s: float = 0.0) -> list[Action]:
    x = Tensor("x", "UINT8", (1,), b"x")
    return dispatcher.handle(Submit(request, "c", {"x": x}, now_s + slo_s), now_s=now_s)


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


def follow(dispatcher: Dispatcher, actions: list[Action]) -> list[Action]:
    """End whatever runs, and what is launched then; what is not full goes at 29.85 s."""
    seen = list(actions)
    running = [action for action in actions if isinstance(action, Execute)]
    for now_s in (*(1.0 + passed for passed in range(20)), 29.85):
        told = dispatcher.handle(Tick(), now_s=now_s)
        for launch in running:
            y = Tensor("y", "UINT8", (launch.rows, 1), bytes(launch.rows))
            told += dispatcher.handle(BatchDone(launch.batch, (y,)), now_s=now_s)
        running = [action for action in told if isinstance(action, Execute)]
        seen += told
    for launch in running:
        y = Tensor("y", "UINT8", (launch.rows, 1), bytes(launch.rows))
        seen += dispatcher.handle(BatchDone(launch.batch, (y,)), now_s=30.0)
    return seen


@pytest.mark.parametrize("policy", ["round-robin", "throughput-cost"])
@pytest.mark.parametrize("lost", ["big", "small"])
def test_what_waits_for_machines_that_are_gone_goes_to_others(policy: Dispatch, lost: str) -> None:
    # What had been dealt to them, and every row whose turn was theirs, waited for its deadline.
    dispatcher = serving(policy, 30.0)
    actions = [action for request in range(16) for action in submit(dispatcher, request, 30.0)]
    actions += dispatcher.handle(MachineDown(lost), now_s=0.1)
    for request in range(16, 24):
        actions += submit(dispatcher, request, 30.0, 0.1)
    left = [a for a in actions if not (isinstance(a, Execute) and a.machine == lost)]
    seen = follow(dispatcher, left)
    lost_rows = sum(a.rows for a in actions if isinstance(a, Execute) and a.machine == lost)
    assert sum(isinstance(action, Answer) for action in seen) == 24 - lost_rows


@pytest.mark.parametrize("policy", ["round-robin", "throughput-cost"])
def test_where_all_planned_hardware_is_gone_any_that_holds_the_model_is_used(
    policy: Dispatch,
) -> None:
    dispatcher = serving(policy, 30.0)
    for hardware in KNOWN:
        dispatcher.handle(MachineDown(hardware), now_s=0.0)
    dispatcher.handle(MachineUp("other", "other", 1, {"m": 1}), now_s=0.0)
    actions = [action for request in range(8) for action in submit(dispatcher, request, 30.0)]
    seen = follow(dispatcher, actions)
    assert {action.machine for action in seen if isinstance(action, Execute)} == {"other"}


@pytest.mark.parametrize("policy", ["round-robin", "throughput-cost"])
def test_a_batch_closes_so_early_that_what_follows_has_the_time_that_the_plan_gives_it(
    policy: Dispatch,
) -> None:
    # Of four rows that came together two wait for the others at the second module: they died there.
    modules = (
        Module("a", "a", {"x": Source(None, "x")}),
        Module("b", "b", {"x": Source("a", "y")}),
    )
    chain = Chain("c", 1.0, (X,), modules, {"y": Source("b", "y")}, dispatch=policy)
    known = {name: {"big": KNOWN["big"]} for name in ("a", "b")}
    first = (Allocation("big", 4, 0.2, 1.0, 1.0),)
    second = (Allocation("big", 2, KNOWN["big"].at(2), 1.0, 1.0),)
    plans = (
        ModulePlan("a", "a", 10.0, 0.0, 0.6, 0.6, first),
        ModulePlan("b", "b", 10.0, 0.0, 0.4, 0.4, second),
    )
    bound = bind(chain, {name: ModelSpec(name, 4, (X,), (Y,)) for name in ("a", "b")})
    route = route_chain(bound, ChainPlan("c", 1.0, 10.0, 1.0, plans), known)
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route), now_s=0.0)
    for name in ("a", "b"):
        dispatcher.handle(MachineUp(name, "big", 1, {name: 1}), now_s=0.0)
    (wake,) = [action for action in submit(dispatcher, 1, 1.0) if isinstance(action, Wake)]
    assert wake.at_s == pytest.approx(1.0 - 0.2 - 0.4)
    assert launched(dispatcher.handle(Tick(), now_s=wake.at_s)) == [("a", 1)]
