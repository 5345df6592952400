"""One queue for machines of two kinds: what only the quick one can save waits for it."""

from __future__ import annotations

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
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
    route_chain,
)

KNOWN = {
    "quick": Durations(((1, 0.1), (2, 0.15))),
    "slow": Durations(((1, 0.4), (2, 0.5))),
}
X, Y = TensorSpec("x", "UINT8", (1,)), TensorSpec("y", "UINT8", (1,))


class Served:
    """A dispatcher with one machine of each kind, and the batches that run by machine."""

    def __init__(self) -> None:
        chain = Chain(
            "c", 5.0, (X,), (Module("m", "m", {"x": Source(None, "x")}),), {"y": Source("m", "y")}
        )
        made = (Allocation("quick", 2, 0.15, 1.0, 1.0), Allocation("slow", 2, 0.5, 1.0, 1.0))
        planned = ModulePlan("m", "m", 10.0, 0.0, 5.0, 5.0, made)
        bound = bind(chain, {"m": ModelSpec("m", 2, (X,), (Y,))})
        plan = ChainPlan("c", 5.0, 10.0, 5.0, (planned,))
        self.dispatcher = Dispatcher()
        self.running: dict[str, Execute] = {}
        self.answered: list[int] = []
        self.failed: list[int] = []
        self.dispatcher.handle(InstallChain(route_chain(bound, plan, {"m": KNOWN})), now_s=0.0)
        for kind in KNOWN:
            self.dispatcher.handle(MachineUp(kind, kind, 1, {"m": 1}), now_s=0.0)

    def submit(self, request: int, deadline_s: float, now_s: float) -> None:
        x = Tensor("x", "UINT8", (1,), b"x")
        self._see(self.dispatcher.handle(Submit(request, "c", {"x": x}, deadline_s), now_s=now_s))

    def done(self, machine: str, now_s: float) -> None:
        launch = self.running.pop(machine)
        y = Tensor("y", "UINT8", (launch.rows, 1), bytes(launch.rows))
        self._see(self.dispatcher.handle(BatchDone(launch.batch, (y,)), now_s=now_s))

    def _see(self, actions: list[Action]) -> None:
        self.running |= {a.machine: a for a in actions if isinstance(a, Execute)}
        self.answered += [a.request for a in actions if isinstance(a, Answer)]
        self.answered.sort()
        self.failed += [a.request for a in actions if isinstance(a, Fail)]

    def machine_down(self, machine: str, now_s: float) -> None:
        self._see(self.dispatcher.handle(MachineDown(machine), now_s=now_s))


def urgent(*behind: int) -> Served:
    """At 0.4 s the slow machine is free and request 9 has 0.22 s left; the quick one still executes
    a batch that should have been over long ago. Requests `behind` have all time.
    """
    served = Served()
    for request in range(4):
        served.submit(request, 5.0, 0.0)
    served.done("quick", 0.1)
    assert {name: batch.rows for name, batch in served.running.items()} == {"slow": 1, "quick": 2}
    served.submit(9, 0.62, 0.3)
    for request in behind:
        served.submit(request, 5.0, 0.3)
    served.done("slow", 0.4)
    return served


def test_rows_that_a_slow_machine_cannot_answer_in_time_wait_for_a_quick_one() -> None:
    served = urgent()
    assert "slow" not in served.running
    served.done("quick", 0.45)
    assert served.running["quick"].rows == 1
    served.done("quick", 0.55)
    assert served.answered == [0, 1, 2, 3, 9]
    assert not served.failed


def test_rows_behind_those_are_not_held_up() -> None:
    served = urgent(10, 11)
    assert served.running["slow"].rows == 2
    served.done("quick", 0.45)
    served.done("quick", 0.55)
    assert served.answered == [0, 1, 2, 3, 9]
    served.done("slow", 0.9)
    assert served.answered == [0, 1, 2, 3, 9, 10, 11]


def test_rows_that_no_machine_can_answer_in_time_are_given_up_at_once() -> None:
    served = urgent()
    served.machine_down("quick", 0.41)
    assert served.failed == [9]
    assert "slow" not in served.running
