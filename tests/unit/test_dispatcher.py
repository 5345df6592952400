"""The dispatcher's decisions, driven by hand with explicit instants."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from paceline.core.bind import bind, single_model_chain
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import BackendError, ErrorKind, Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec, bytes_elements, encode_bytes
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Dispatcher,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    RemoveChain,
    Submit,
    Tick,
    Wake,
    route_chain,
)

ECHO = ModelSpec("echo", 4, (TensorSpec("x", "INT32", (1,)),), (TensorSpec("y", "INT32", (1,)),))
DETECT = ModelSpec(
    "detect",
    0,
    (TensorSpec("image", "UINT8", (-1,)),),
    (TensorSpec("crops", "BYTES", (-1, 1)), TensorSpec("found", "BOOL", (1,))),
)
READ = ModelSpec(
    "read", 2, (TensorSpec("crop", "BYTES", (1,)),), (TensorSpec("text", "BYTES", (1,)),)
)


def ints(name: str, *values: int) -> Tensor:
    return Tensor(name, "INT32", (len(values), 1), struct.pack(f"<{len(values)}i", *values))


def unpack(tensor: Tensor) -> tuple[int, ...]:
    return struct.unpack(f"<{len(tensor.data) // 4}i", bytes(tensor.data))


def executes(actions: list[Action]) -> list[Execute]:
    return [a for a in actions if isinstance(a, Execute)]


def echo(action: Execute, *, at: int = 0) -> BatchDone:
    """What an echoing model returns for a batch."""
    tensor = action.call.inputs[at]
    data = b"".join(tensor.parts)
    return BatchDone(
        action.batch, (Tensor(action.call.outputs[0], tensor.datatype, tensor.shape, data),)
    )


def single(
    *, instances: int = 1, slots: int = 1, batch: int = 4, duration_s: float = 0.0
) -> Dispatcher:
    """The model `echo` called by its own name, on one machine."""
    dispatcher = Dispatcher()
    dispatcher.handle(MachineUp("m", "cpu", slots, {"echo": instances}), now_s=0.0)
    bound = single_model_chain(ECHO)
    if duration_s:
        allocation = Allocation("cpu", batch, duration_s, 1.0, 1.0)
        module = ModulePlan("echo", "echo", 1.0, 0.0, 1.0, 1.0, (allocation,))
        plan = ChainPlan("echo", 1.0, 1.0, 1.0, (module,))
        durations = {"echo": {"cpu": Durations(((1, duration_s), (batch, duration_s)))}}
        dispatcher.handle(InstallChain(route_chain(bound, plan, durations)), now_s=0.0)
    else:
        dispatcher.handle(InstallChain(route_chain(bound)), now_s=0.0)
    return dispatcher


def submit(
    dispatcher: Dispatcher,
    request: int,
    *values: int,
    now_s: float = 0.0,
    deadline_s: float = 100.0,
    priority: int | None = None,
    chain: str = "echo",
    inputs: Mapping[str, Tensor] | None = None,
    outputs: tuple[str, ...] = (),
) -> list[Action]:
    return dispatcher.handle(
        Submit(
            request,
            chain,
            inputs or {"x": ints("x", *values)},
            deadline_s,
            outputs=outputs,
            priority=priority,
        ),
        now_s=now_s,
    )


def test_an_idle_machine_takes_a_lone_request_at_once_and_answers_it() -> None:
    dispatcher = single()
    launch, wake = submit(dispatcher, 1, 7)
    assert isinstance(launch, Execute) and launch.rows == 1
    assert isinstance(wake, Wake) and wake.at_s == pytest.approx(100.0)
    (answer,) = dispatcher.handle(echo(launch), now_s=0.5)
    assert isinstance(answer, Answer)
    assert unpack(answer.outputs[0]) == (7,) and answer.outputs[0].name == "y"
    (span,) = answer.timeline.spans
    assert (span.queued_s, span.started_s, span.ended_s, span.batch_size) == (0.0, 0.0, 0.5, 1)
    assert dispatcher.in_flight == 0


def test_requests_that_wait_for_a_busy_machine_leave_it_as_one_full_batch() -> None:
    dispatcher = single()
    first = executes(submit(dispatcher, 1, 0))[0]
    for request in range(2, 8):
        assert not executes(submit(dispatcher, request, request))
    actions = dispatcher.handle(echo(first), now_s=1.0)
    (launch,) = executes(actions)
    assert launch.rows == 4 and launch.call.inputs[0].shape == (4, 1)
    actions = dispatcher.handle(echo(launch), now_s=2.0)
    answers = {a.request: unpack(a.outputs[0]) for a in actions if isinstance(a, Answer)}
    assert answers == {2: (2,), 3: (3,), 4: (4,), 5: (5,)}
    assert executes(actions)[0].rows == 2


def test_a_request_larger_than_the_batch_limit_is_split_and_reassembled_in_order() -> None:
    dispatcher = single(instances=3, slots=3)
    launches = executes(submit(dispatcher, 1, *range(10)))
    assert [launch.rows for launch in launches] == [4, 4, 2]
    assert not dispatcher.handle(echo(launches[2]), now_s=1.0)
    assert not dispatcher.handle(echo(launches[0]), now_s=1.1)
    (answer,) = dispatcher.handle(echo(launches[1]), now_s=1.2)
    assert isinstance(answer, Answer)
    assert unpack(answer.outputs[0]) == tuple(range(10))


def test_rows_of_different_shape_never_share_a_batch() -> None:
    wide = ModelSpec(
        "wide", 8, (TensorSpec("x", "UINT8", (-1,)),), (TensorSpec("y", "UINT8", (-1,)),)
    )
    dispatcher = Dispatcher()
    dispatcher.handle(InstallChain(route_chain(single_model_chain(wide))), now_s=0.0)
    for request, length in enumerate((2, 3, 2), start=1):
        tensor = Tensor("x", "UINT8", (1, length), bytes(length))
        submit(dispatcher, request, chain="wide", inputs={"x": tensor})
    actions = dispatcher.handle(MachineUp("m", "cpu", 2, {"wide": 2}), now_s=0.0)
    assert [launch.call.inputs[0].shape for launch in executes(actions)] == [(2, 2), (1, 3)]


def test_a_machine_never_runs_more_batches_than_slots_or_instances() -> None:
    dispatcher = single(instances=2, slots=4)
    assert len(executes(submit(dispatcher, 1, *range(12)))) == 2
    dispatcher = single(instances=4, slots=1)
    assert len(executes(submit(dispatcher, 1, *range(12)))) == 1


def test_within_a_priority_the_earliest_deadline_goes_first_and_priority_beats_deadline() -> None:
    dispatcher = single()
    blocker = executes(submit(dispatcher, 1, *range(4)))[0]
    submit(dispatcher, 2, *range(4), deadline_s=50.0, priority=1)
    submit(dispatcher, 3, *range(4), deadline_s=90.0, priority=0)
    submit(dispatcher, 4, *range(4), deadline_s=80.0, priority=0)
    order = []
    launch = blocker
    for now_s in (1.0, 2.0, 3.0, 4.0):
        actions = dispatcher.handle(echo(launch), now_s=now_s)
        order += [a.request for a in actions if isinstance(a, Answer)]
        if launches := executes(actions):
            launch = launches[0]
    assert order == [1, 4, 3, 2]


def test_a_closed_batch_of_a_later_deadline_goes_before_an_unfinished_one() -> None:
    other = ModelSpec("other", 4, ECHO.inputs, ECHO.outputs)
    dispatcher = Dispatcher()
    dispatcher.handle(MachineUp("m", "cpu", 1, {"echo": 1, "other": 1}), now_s=0.0)
    for spec in (ECHO, other):
        dispatcher.handle(InstallChain(route_chain(single_model_chain(spec))), now_s=0.0)
    blocker = executes(submit(dispatcher, 1, 0))[0]
    submit(dispatcher, 2, 0, deadline_s=50.0)
    submit(dispatcher, 3, *range(4), deadline_s=90.0, chain="other")
    (launch,) = executes(dispatcher.handle(echo(blocker), now_s=1.0))
    assert launch.call.model == "other"


def test_a_batch_is_closed_when_its_oldest_requests_slack_has_run_out() -> None:
    other = ModelSpec("other", 4, ECHO.inputs, ECHO.outputs)
    dispatcher = Dispatcher()
    dispatcher.handle(MachineUp("m", "cpu", 1, {"echo": 1, "other": 1}), now_s=0.0)
    bound = single_model_chain(ECHO)
    allocation = Allocation("cpu", 4, 2.0, 1.0, 1.0)
    module = ModulePlan("echo", "echo", 1.0, 0.0, 1.0, 1.0, (allocation,))
    plan = ChainPlan("echo", 1.0, 1.0, 1.0, (module,))
    durations = {"echo": {"cpu": Durations(((1, 1.0), (4, 2.0)))}}
    dispatcher.handle(InstallChain(route_chain(bound, plan, durations)), now_s=0.0)
    dispatcher.handle(InstallChain(route_chain(single_model_chain(other))), now_s=0.0)
    blocker = executes(submit(dispatcher, 1, 0, deadline_s=9.0))[0]
    submit(dispatcher, 2, 0, deadline_s=10.0)
    submit(dispatcher, 3, *range(4), deadline_s=9.5, chain="other")
    # At 8.0 the lone row of `echo` must go (10 - 2), and before `other`, which has until 9.5.
    (launch,) = executes(dispatcher.handle(echo(blocker), now_s=8.0))
    assert launch.call.model == "echo"


def test_a_request_that_cannot_finish_in_time_is_refused_with_its_shortfall() -> None:
    dispatcher = single(duration_s=2.0)
    (fail,) = submit(dispatcher, 1, 0, deadline_s=1.5)
    assert isinstance(fail, Fail) and fail.error.kind is ErrorKind.DEADLINE
    assert "500.0 ms more than are left" in str(fail.error)
    assert fail.error.shortfall_s == pytest.approx(0.5)  # type: ignore[attr-defined]


def test_a_queued_request_fails_as_soon_as_it_can_no_longer_finish() -> None:
    dispatcher = single(duration_s=2.0)
    blocker = executes(submit(dispatcher, 1, *range(4)))[0]
    (wake,) = submit(dispatcher, 2, 0, deadline_s=5.0)
    assert isinstance(wake, Wake) and wake.at_s == pytest.approx(3.0)
    fail, wake = dispatcher.handle(Tick(), now_s=wake.at_s)
    assert isinstance(fail, Fail) and fail.request == 2
    assert isinstance(wake, Wake) and wake.at_s > 4.0, "the other is executed"
    actions = dispatcher.handle(echo(blocker), now_s=4.0)
    assert [type(a) for a in actions] == [Answer]


def test_a_cancelled_request_leaves_every_queue_and_is_never_answered() -> None:
    dispatcher = single()
    blocker = executes(submit(dispatcher, 1, 0))[0]
    submit(dispatcher, 2, 5, 6)
    assert dispatcher.loads()[("echo", "echo")].queued == 2
    assert not dispatcher.handle(Cancel(2), now_s=0.1)
    assert dispatcher.loads()[("echo", "echo")].queued == 0
    assert not dispatcher.handle(Cancel(1), now_s=0.2)
    assert not dispatcher.handle(echo(blocker), now_s=0.3)
    assert dispatcher.in_flight == 0


def test_a_batch_lost_with_its_machine_is_executed_once_more_elsewhere() -> None:
    dispatcher = single()
    (first,) = executes(submit(dispatcher, 1, 3))
    dispatcher.handle(MachineDown("m"), now_s=0.1)
    lost = BackendError("connection lost", kind=ErrorKind.UNAVAILABLE)
    actions = dispatcher.handle(BatchFailed(first.batch, lost), now_s=0.2)
    assert not executes(actions) and not any(isinstance(a, Fail) for a in actions)
    (second,) = executes(dispatcher.handle(MachineUp("n", "cpu", 1, {"echo": 1}), now_s=0.3))
    broken, fail = dispatcher.handle(BatchFailed(second.batch, lost), now_s=0.4)
    assert isinstance(broken, Broken) and (broken.machine, broken.model) == ("n", "echo")
    assert isinstance(fail, Fail) and fail.error.kind is ErrorKind.UNAVAILABLE


def test_a_failing_model_fails_its_requests_at_once() -> None:
    dispatcher = single()
    (launch,) = executes(submit(dispatcher, 1, 3))
    (fail,) = dispatcher.handle(BatchFailed(launch.batch, BackendError("boom")), now_s=0.1)
    assert isinstance(fail, Fail) and str(fail.error) == "boom"


@pytest.mark.parametrize("shape", [(2, 1), ()])
def test_outputs_that_do_not_hold_the_batchs_rows_fail_its_requests(
    shape: tuple[int, ...],
) -> None:
    dispatcher = single()
    (launch,) = executes(submit(dispatcher, 1, 3))
    wrong = Tensor("y", "INT32", shape, bytes(8))
    _, fail = dispatcher.handle(BatchDone(launch.batch, (wrong,)), now_s=0.1)
    assert isinstance(fail, Fail) and "malformed" in str(fail.error)


def test_an_unknown_chain_and_a_full_chain_are_refused_in_tritons_words() -> None:
    dispatcher = single()
    (fail,) = submit(dispatcher, 1, 0, chain="nope")
    assert isinstance(fail, Fail)
    assert str(fail.error) == "Request for unknown model: 'nope' is not found"
    for request in range(2, 2 + 4096):
        submit(dispatcher, request, 0)
    (fail,) = submit(dispatcher, 9999, 0)
    assert isinstance(fail, Fail) and str(fail.error) == "Exceeds maximum queue size"
    assert isinstance(fail.error, Rejected) and fail.error.retry_after_s > 0


# -- chains -------------------------------------------------------------------------------------


def ocr(*, when: bool = False) -> Dispatcher:
    detect = Module("detect", "detect", {"image": Source(None, "image")})
    read = Module(
        "read",
        "read",
        {"crop": Source("detect", "crops")},
        for_each=Source("detect", "crops"),
        when=Source("detect", "found") if when else None,
        fan_out=3.0,
    )
    chain = Chain(
        "ocr",
        slo_s=10.0,
        inputs=(TensorSpec("image", "UINT8", (-1,)),),
        modules=(read, detect),
        outputs={"text": Source("read", "text"), "crops": Source("detect", "crops")},
    )
    dispatcher = Dispatcher()
    dispatcher.handle(
        InstallChain(route_chain(bind(chain, {"detect": DETECT, "read": READ}))), now_s=0.0
    )
    dispatcher.handle(MachineUp("m", "cpu", 3, {"detect": 3, "read": 3}), now_s=0.0)
    return dispatcher


def detected(action: Execute, *crops: bytes, found: bool = True) -> BatchDone:
    known = {
        "crops": Tensor("crops", "BYTES", (len(crops), 1), encode_bytes(crops)),
        "found": Tensor("found", "BOOL", (1,), bytes([found])),
    }
    return BatchDone(action.batch, tuple(known[name] for name in action.call.outputs))


def start_ocr(dispatcher: Dispatcher, request: int = 1, outputs: tuple[str, ...] = ()) -> Execute:
    image = Tensor("image", "UINT8", (3,), b"abc")
    actions = submit(dispatcher, request, chain="ocr", inputs={"image": image}, outputs=outputs)
    (launch,) = executes(actions)
    return launch


def test_a_model_without_batch_axis_gets_the_tensor_as_the_chain_has_it() -> None:
    launch = start_ocr(ocr())
    assert launch.call.inputs[0].shape == (3,)


def test_fan_out_runs_items_in_batches_and_gathers_them_in_order() -> None:
    dispatcher = ocr()
    launch = start_ocr(dispatcher)
    reads = executes(dispatcher.handle(detected(launch, b"a", b"bb", b"ccc"), now_s=1.0))
    assert [r.call.inputs[0].shape for r in reads] == [(2, 1), (1, 1)]
    assert not dispatcher.handle(echo(reads[1]), now_s=2.0)
    (answer,) = dispatcher.handle(echo(reads[0]), now_s=3.0)
    assert isinstance(answer, Answer)
    text, crops = answer.outputs
    assert (text.name, text.shape) == ("text", (3, 1))
    assert bytes_elements(text) == bytes_elements(crops) == [b"a", b"bb", b"ccc"]


def test_items_of_different_requests_share_a_batch() -> None:
    dispatcher = ocr()
    first, second = start_ocr(dispatcher, 1), start_ocr(dispatcher, 2)
    blocked = start_ocr(dispatcher, 3)
    dispatcher.handle(MachineUp("m", "cpu", 0, {"detect": 3, "read": 3}), now_s=0.5)
    assert not dispatcher.handle(detected(first, b"a"), now_s=1.0)[:-1]
    dispatcher.handle(detected(second, b"b"), now_s=1.0)
    actions = dispatcher.handle(MachineUp("m", "cpu", 3, {"read": 3}), now_s=2.0)
    (read,) = executes(actions)
    assert read.rows == 2
    answers = [a for a in dispatcher.handle(echo(read), now_s=3.0) if isinstance(a, Answer)]
    assert [bytes_elements(a.outputs[0]) for a in answers] == [[b"a"], [b"b"]]
    assert blocked.rows == 1


def test_zero_items_is_a_normal_answer_of_zero_rows() -> None:
    dispatcher = ocr()
    (answer,) = dispatcher.handle(detected(start_ocr(dispatcher)), now_s=1.0)
    assert isinstance(answer, Answer)
    assert [t.shape for t in answer.outputs] == [(0, 1), (0, 1)]


def test_a_module_whose_when_is_false_is_skipped_and_answers_a_typed_empty_tensor() -> None:
    dispatcher = ocr(when=True)
    launch = start_ocr(dispatcher)
    assert launch.call.outputs == ("crops", "found")
    (answer,) = dispatcher.handle(detected(launch, b"a", found=False), now_s=1.0)
    assert isinstance(answer, Answer)
    text = answer.outputs[0]
    assert (text.name, text.datatype, text.shape, text.data) == ("text", "BYTES", (0, 1), b"")


def test_modules_that_the_requested_outputs_do_not_need_are_not_run() -> None:
    dispatcher = ocr()
    launch = start_ocr(dispatcher, outputs=("crops",))
    (answer,) = dispatcher.handle(detected(launch, b"a"), now_s=1.0)
    assert isinstance(answer, Answer) and [t.name for t in answer.outputs] == ["crops"]


def test_one_failed_item_batch_fails_the_request_and_the_others_are_not_run() -> None:
    dispatcher = ocr()
    launch = start_ocr(dispatcher)
    dispatcher.handle(MachineUp("m", "cpu", 1, {"detect": 1, "read": 1}), now_s=0.5)
    (read,) = executes(dispatcher.handle(detected(launch, b"a", b"b", b"c"), now_s=1.0))
    actions = dispatcher.handle(BatchFailed(read.batch, BackendError("boom")), now_s=2.0)
    assert [type(a) for a in actions] == [Fail]
    assert dispatcher.in_flight == 0 and not dispatcher.loads()


def test_a_removed_chain_refuses_new_requests_and_finishes_old_ones() -> None:
    dispatcher = ocr()
    launch = start_ocr(dispatcher)
    dispatcher.handle(RemoveChain("ocr"), now_s=0.5)
    (fail,) = submit(dispatcher, 2, chain="ocr", inputs={})
    assert isinstance(fail, Fail) and fail.error.kind is ErrorKind.UNKNOWN_MODEL
    (read,) = executes(dispatcher.handle(detected(launch, b"a"), now_s=1.0))
    (answer,) = dispatcher.handle(echo(read), now_s=2.0)
    assert isinstance(answer, Answer)
