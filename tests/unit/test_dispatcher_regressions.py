"""Regressions of what the simulation found (tests/simulation)."""

from __future__ import annotations

from paceline.core.bind import bind, single_model_chain
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import BackendError, ErrorKind
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import (
    Action,
    Answer,
    BatchFailed,
    Cancel,
    Dispatcher,
    Execute,
    InstallChain,
    MachineUp,
    Submit,
    Tick,
    route_chain,
)

ECHO = ModelSpec("echo", 4, (TensorSpec("x", "UINT8", (1,)),), (TensorSpec("y", "UINT8", (1,)),))


def executes(actions: list[Action]) -> list[Execute]:
    return [action for action in actions if isinstance(action, Execute)]


def rows(action: Execute) -> bytes:
    return b"".join(action.call.inputs[0].parts)


def test_rows_that_a_machine_lost_do_not_come_back_to_it_in_somebody_elses_batch() -> None:
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route_chain(single_model_chain(ECHO))), now_s=0.0)
    for machine in ("m0", "m1"):
        dispatcher.handle(MachineUp(machine, "cpu", 1, {"echo": 1}), now_s=0.0)
    running: dict[str, Execute] = {}
    for request, value in ((1, b"a"), (2, b"b")):
        submit = Submit(request, "echo", {"x": Tensor("x", "UINT8", (1, 1), value)}, 100.0)
        (launch,) = executes(dispatcher.handle(submit, now_s=0.0))
        running[launch.machine] = launch
    lost = BackendError("gone", kind=ErrorKind.UNAVAILABLE)
    for launch in running.values():
        actions = dispatcher.handle(BatchFailed(launch.batch, lost), now_s=0.1)
        assert not executes(actions)  # both machines are in quarantine
    again = executes(dispatcher.handle(Tick(), now_s=10.0))
    assert {probe.machine: rows(probe) for probe in again} == {
        "m0": rows(running["m1"]),
        "m1": rows(running["m0"]),
    }


def test_a_lone_request_does_not_wait_where_machines_are_fewer_than_the_planned_rate_needs() -> (
    None
):
    durations = Durations(((1, 0.2), (4, 0.3)))
    allocation = Allocation("cpu", 4, 0.3, 7.5, 1.0)
    module = ModulePlan("echo", "echo", 100.0, 0.0, 1.0, 1.0, (allocation,))
    plan = ChainPlan("echo", 1.0, 100.0, 1.0, (module,))
    dispatcher = Dispatcher()
    route = route_chain(single_model_chain(ECHO), plan, {"echo": {"cpu": durations}})
    dispatcher.handle(InstallChain(route), now_s=0.0)
    dispatcher.handle(MachineUp("m", "cpu", 1, {"echo": 1}), now_s=0.0)
    submit = Submit(1, "echo", {"x": Tensor("x", "UINT8", (1, 1), b"a")}, 1000.0)
    (launch,) = executes(dispatcher.handle(submit, now_s=0.0))
    assert launch.rows == 1


def test_items_lost_with_the_only_machine_are_nulls_and_not_sent_to_it_again() -> None:
    items = Source(None, "x")
    module = Module("echo", "echo", {"x": items}, for_each=items, on_error="skip")
    inputs = (TensorSpec("x", "UINT8", (-1, 1)),)
    chain = Chain("items", 100.0, inputs, (module,), {"y": Source("echo", "y")})
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route_chain(bind(chain, {"echo": ECHO}))), now_s=0.0)
    dispatcher.handle(MachineUp("m", "cpu", 1, {"echo": 1}), now_s=0.0)
    submit = Submit(1, "items", {"x": Tensor("x", "UINT8", (3, 1), b"abc")}, 90.0)
    (launch,) = executes(dispatcher.handle(submit, now_s=0.0))
    late = BackendError("no answer", kind=ErrorKind.DEADLINE)
    actions = dispatcher.handle(BatchFailed(launch.batch, late), now_s=10.0)
    assert not executes(actions)
    (answer,) = (action for action in actions if isinstance(action, Answer))
    assert (answer.outputs[0].shape, bytes(answer.outputs[0].data)) == ((3, 1), bytes(3))


def test_a_retry_that_is_dealt_out_to_several_machines_leaves_nothing_behind() -> None:
    items = Source(None, "x")
    chain = Chain(
        "items",
        100.0,
        (TensorSpec("x", "UINT8", (-1, 1)),),
        (Module("echo", "echo", {"x": items}, for_each=items),),
        {"y": Source("echo", "y")},
        dispatch="round-robin",
    )
    # Four rows in five go to the first machine: two of them in a row are one part.
    allocations = (Allocation("cpu", 4, 0.3, 1.0, 1.0), Allocation("cpu", 1, 0.3, 1.0, 1.0))
    module = ModulePlan("echo", "echo", 10.0, 0.0, 1.0, 1.0, allocations)
    plan = ChainPlan("items", 1.0, 10.0, 1.0, (module,))
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route_chain(bind(chain, {"echo": ECHO}), plan)), now_s=0.0)
    for machine in ("m0", "m1"):
        dispatcher.handle(MachineUp(machine, "cpu", 1, {"echo": 1}), now_s=0.0)
    submit = Submit(1, "items", {"x": Tensor("x", "UINT8", (5, 1), b"abcde")}, 90.0)
    first, _ = executes(dispatcher.handle(submit, now_s=0.0))
    lost = BackendError("gone", kind=ErrorKind.UNAVAILABLE)
    dispatcher.handle(BatchFailed(first.batch, lost), now_s=1.0)
    dispatcher.handle(Cancel(1), now_s=2.0)
    assert [load.queued for load in dispatcher.loads().values()] == [0]
