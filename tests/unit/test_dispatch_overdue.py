"""Batches that take far too long: rows end at their deadlines, and are tried on another machine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.core.bind import bind
from paceline.core.chain import Chain, Dispatch, Module, Source
from paceline.core.errors import BackendError, ErrorKind, Rejected
from paceline.core.model import ModelSpec
from paceline.core.plan import Allocation, ChainPlan, ModulePlan
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Dispatcher,
    Event,
    Execute,
    Fail,
    HangLimits,
    InstallChain,
    MachineUp,
    Submit,
    Tick,
    Wake,
    route_chain,
)
from paceline.dispatch.holders import Lane

X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))
ROWS = TensorSpec("rows", "UINT8", (-1, 1))
MODEL = ModelSpec("m", 4, (X,), (Y,))
DETECT = ModelSpec("detect", 0, (X,), (ROWS,))
TIMES = Durations(((1, 0.1), (4, 0.1)), ((1, 0.12), (4, 0.12)))
"""A batch is overdue after 0.36 s."""
SLO_S = 1.0


class Hand:
    """A dispatcher whose time is moved by hand; it is woken when it asks for it."""

    def __init__(self, machines: Sequence[str] = ("a", "b"), limits: HangLimits | None = None):
        self.dispatcher = Dispatcher(limits)
        self.now_s = 0.0
        self.wake_s: float | None = None
        self.actions: list[Action] = []
        for name in machines:
            self.tell(MachineUp(name, "gpu", 1, {"m": 1, "detect": 1}))

    def tell(self, event: Event, at_s: float | None = None) -> list[Action]:
        """What comes of an event, after everything that was to be looked at before it."""
        if at_s is not None:
            self.until(at_s)
        actions = self.dispatcher.handle(event, now_s=self.now_s)
        for action in actions:
            if isinstance(action, Wake):
                self.wake_s = action.at_s
        self.actions += actions
        return actions

    def until(self, at_s: float) -> list[Action]:
        """Let time pass."""
        actions: list[Action] = []
        while self.wake_s is not None and self.wake_s <= at_s:
            self.now_s, self.wake_s = max(self.now_s, self.wake_s), None
            actions += self.tell(Tick())
        self.now_s = max(self.now_s, at_s)
        return actions

    def submit(self, request: int, value: bytes = b"\1", slo_s: float = SLO_S) -> list[Action]:
        x = {"x": Tensor("x", "UINT8", (1,), value)}
        return self.tell(Submit(request, "c", x, self.now_s + slo_s))


def install(policy: Dispatch = "pooled", *, machines: float = 2.0) -> InstallChain:
    chain = Chain(
        "c", SLO_S, (X,), (Module("m", "m", {"x": Source(None, "x")}),), {"y": Source("m", "y")},
        dispatch=policy,
    )  # fmt: skip
    made = (Allocation("gpu", 4, 0.1, machines, 1.0),)
    plan = ChainPlan("c", SLO_S, 10.0, 1.0, (ModulePlan("m", "m", 10.0, 0.0, 1.0, 1.0, made),))
    return InstallChain(route_chain(bind(chain, {"m": MODEL}), plan, {"m": {"gpu": TIMES}}))


def done(execute: Execute) -> BatchDone:
    """The model gives back what it got."""
    (x,) = execute.call.inputs
    data = b"".join(x.parts)
    return BatchDone(execute.batch, (Tensor("y", "UINT8", (execute.rows, 1), data),))


def executed(actions: Sequence[Action]) -> list[Execute]:
    return [action for action in actions if isinstance(action, Execute)]


def ended(actions: Sequence[Action]) -> list[Answer | Fail]:
    return [action for action in actions if isinstance(action, (Answer, Fail))]


def lost(execute: Execute) -> BatchFailed:
    return BatchFailed(execute.batch, BackendError("deadline exceeded", kind=ErrorKind.DEADLINE))


def test_a_hung_batch_is_tried_on_another_machine_in_time_and_answered_once() -> None:
    hand = Hand()
    hand.tell(install())
    (hung,) = executed(hand.submit(1))
    assert not executed(hand.until(0.5)), "an ordinary straggler has all the time there is"
    (again,) = executed(hand.until(0.6))
    assert (hung.machine, again.machine) == ("a", "b")
    assert hand.now_s + 0.1 <= SLO_S
    (answer,) = ended(hand.tell(done(again), 0.95))
    assert isinstance(answer, Answer) and answer.timeline.met
    assert [span.machine for span in answer.timeline.spans] == ["b"]
    assert not ended(hand.tell(done(hung), 1.5)), "nobody is answered twice"
    assert not hand.dispatcher.loads() and hand.dispatcher.in_flight == 0


def test_the_first_answer_counts_though_the_second_attempt_runs() -> None:
    hand = Hand()
    hand.tell(install())
    (slow,) = executed(hand.submit(1, b"\7"))
    (again,) = executed(hand.until(0.9))
    (answer,) = ended(hand.tell(done(slow), 0.91))
    assert isinstance(answer, Answer) and bytes(answer.outputs[0].data) == b"\7"
    assert [span.machine for span in answer.timeline.spans] == ["a"]
    assert not ended(hand.tell(done(again), 0.95))
    lanes = {m.name: m.lanes["m"] for m in hand.dispatcher.machines()}
    assert not any(lane.quarantined for lane in lanes.values()), "it did answer"


def test_an_attempt_that_still_waits_is_taken_back_when_the_first_answers() -> None:
    hand = Hand()
    hand.tell(install())
    (slow,) = executed(hand.submit(1))
    hand.until(0.5)
    (other,) = executed(hand.submit(2))
    assert not executed(hand.until(0.9)) and hand.dispatcher.loads()["c", "m"].queued == 1
    (answer,) = ended(hand.tell(done(slow), 0.91))
    assert answer.request == 1
    assert hand.dispatcher.loads()["c", "m"].queued == 0
    assert [a.request for a in ended(hand.tell(done(other), 0.92))] == [2]


def test_no_batch_is_sent_to_a_lane_that_does_not_answer_and_its_failure_is_told_once() -> None:
    hand = Hand()
    hand.tell(install())
    (hung,) = executed(hand.submit(1))
    (again,) = executed(hand.until(0.9))
    hand.tell(MachineUp("a", "gpu", 4, {"m": 4}))  # it has room, but does not work
    hand.submit(2)
    hand.submit(3)
    later = executed(hand.tell(done(again), 0.95))
    assert [execute.machine for execute in (again, *later)] == ["b", "b"]
    hand.tell(done(later[0]), 1.0)
    hand.tell(lost(hung), 10.0)
    assert [a.machine for a in hand.actions if isinstance(a, Broken)] == ["a"]


def test_without_another_machine_the_request_fails_when_its_deadline_passes() -> None:
    hand = Hand(("a",))
    hand.tell(install(machines=1.0))
    (hung,) = executed(hand.submit(1))
    actions = hand.until(SLO_S + 1e-6)
    (fail,) = ended(actions)
    assert isinstance(fail, Fail) and isinstance(fail.error, Rejected)
    assert fail.error.kind is ErrorKind.DEADLINE and not executed(actions)
    assert "Request timeout expired: module 'm' has been executing on a for 1000" in str(fail.error)
    assert not ended(hand.tell(done(hung), 2.0)) and hand.dispatcher.in_flight == 0


def test_an_answer_that_comes_with_the_deadline_is_in_time() -> None:
    hand = Hand(("a",))
    hand.tell(install(machines=1.0))
    (execute,) = executed(hand.submit(1))
    (answer,) = ended(hand.tell(done(execute), SLO_S))
    assert isinstance(answer, Answer) and answer.timeline.met


def test_the_last_machine_that_works_is_never_given_up_for_being_slow() -> None:
    hand = Hand()
    hand.tell(install())
    (first,) = executed(hand.submit(1))
    (second,) = executed(hand.submit(2))
    assert {first.machine, second.machine} == {"a", "b"}
    assert not executed(hand.until(0.95)), "a stall of all: nothing is executed twice"
    assert [lane.quarantined for lane in lanes(hand)].count(True) == 1
    answers = [*ended(hand.tell(done(second), 0.96)), *ended(hand.tell(done(first), 0.97))]
    assert [(type(a), a.request) for a in answers] == [(Answer, 2), (Answer, 1)]


def lanes(hand: Hand) -> list[Lane]:
    return [machine.lanes["m"] for machine in hand.dispatcher.machines()]


def test_a_machine_that_is_known_to_be_slow_gets_as_much_longer() -> None:
    hand = Hand()
    hand.tell(install())
    for request in range(40):
        (execute,) = executed(hand.submit(request, slo_s=5.0))
        assert execute.machine == "a"
        hand.tell(done(execute), hand.now_s + 0.4)
    began_s = hand.now_s
    hand.submit(99)
    assert not executed(hand.until(began_s + 0.95)), "0.4 s are normal there: 1.2 s would be late"


def test_what_could_not_be_in_time_any_more_is_not_executed_twice() -> None:
    hand = Hand()
    hand.tell(install())
    hand.submit(1, slo_s=0.4)
    actions = hand.until(1.0)
    assert not executed(actions), "it is overdue at 0.36 s and would end at 0.46 s"
    assert [a.request for a in ended(actions)] == [1]


def test_a_stall_of_the_front_itself_is_not_taken_for_a_hung_batch() -> None:
    hand = Hand()
    hand.tell(install())
    (execute,) = executed(hand.submit(1))
    assert hand.wake_s is not None
    hand.now_s = hand.wake_s + 0.05  # it is late itself
    hand.wake_s = None
    assert not executed(hand.tell(Tick()))
    (answer,) = ended(hand.tell(done(execute)))
    assert isinstance(answer, Answer)
    hand.tell(Submit(2, "c", {"x": Tensor("x", "UINT8", (1,), b"\1")}, hand.now_s + SLO_S))
    assert executed(hand.until(hand.now_s + 0.9)), "the next one that takes so long does hang"


def test_siblings_of_a_late_item_are_cancelled_and_its_rows_are_tried_elsewhere_as_a_part() -> None:
    modules = (
        Module("find", "detect", {"x": Source(None, "x")}),
        Module("each", "m", {"x": Source("find", "rows")}, for_each=Source("find", "rows")),
    )
    chain = Chain("c", SLO_S, (X,), modules, {"y": Source("each", "y")})
    bound = bind(chain, {"m": MODEL, "detect": DETECT})
    times = {"m": {"gpu": TIMES}, "detect": {"gpu": TIMES}}
    hand = Hand(("a", "b", "d"))
    hand.tell(InstallChain(route_chain(bound, None, times)))
    (find,) = executed(hand.submit(1, slo_s=1.5))
    rows = Tensor("rows", "UINT8", (10, 1), bytes(range(10)))
    parts = executed(hand.tell(BatchDone(find.batch, (rows,)), 0.1))
    assert [part.rows for part in parts] == [4, 4, 2]
    hand.tell(done(parts[1]), 0.2)
    hand.tell(done(parts[2]), 0.2)
    (again,) = executed(hand.until(1.4))
    assert b"".join(again.call.inputs[0].parts) == bytes(range(4))
    (answer,) = ended(hand.tell(done(again), 1.45))
    assert isinstance(answer, Answer) and bytes(answer.outputs[0].data) == bytes(range(10))

    hand.until(2.0)
    (find,) = executed(hand.submit(2, slo_s=0.5))
    rows = Tensor("rows", "UINT8", (20, 1), bytes(range(20)))
    parts = executed(hand.tell(BatchDone(find.batch, (rows,)), 2.1))
    assert len(parts) == 2 and hand.dispatcher.loads()["c", "each"].queued == 12
    (fail,) = ended(hand.until(3.0))
    assert isinstance(fail, Fail) and hand.dispatcher.loads()["c", "each"].queued == 0
    assert not executed(hand.tell(done(parts[0]), 3.1))


@pytest.mark.parametrize("policy", ["round-robin", "throughput-cost"])
def test_a_lot_whose_machine_hangs_uses_another(policy: Dispatch) -> None:
    hand = Hand(("a", "b", "d"))
    hand.tell(install(policy))
    for request in range(8):
        hand.submit(request, bytes([request]))
    hung = executed(hand.actions)[0]
    for execute in executed(hand.actions)[1:]:
        hand.tell(done(execute))
    again = executed(hand.until(0.95))
    assert hung.machine not in {execute.machine for execute in again}
    assert sum(execute.rows for execute in again) == hung.rows
    for execute in again:
        hand.tell(done(execute))
    hand.until(2.0)
    assert sorted(a.request for a in ended(hand.actions)) == list(range(8))
    assert all(isinstance(a, Answer) for a in ended(hand.actions))


def test_the_factor_is_the_operators() -> None:
    hand = Hand(limits=HangLimits(overdue_factor=7.0))
    hand.tell(install())
    hand.submit(1)
    assert not executed(hand.until(0.83)), "0.84 s"
    (again,) = executed(hand.until(0.85))
    assert again.machine == "b"
