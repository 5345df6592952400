"""One queue for machines of two kinds: which of them a batch may go to."""

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
    """A dispatcher with `there` machines by kind (`slow`, or `slow0` and so on where there are
    several), and the batches that run by machine. A plan has `planned` machines by kind for model
    `m`, and as many slow ones for others as `needed`.
    """

    def __init__(
        self,
        planned: dict[str, float],
        there: dict[str, int],
        needed: float = 0.0,
        rate_rps: float = 10.0,
    ) -> None:
        self.dispatcher = Dispatcher()
        self.running: dict[str, Execute] = {}
        self.answered: list[int] = []
        self.failed: list[int] = []
        for name, machines in (("m", planned), ("n", {"slow": needed})):
            module = Module(name, name, {"x": Source(None, "x")})
            chain = Chain(f"c{name}", 5.0, (X,), (module,), {"y": Source(name, "y")})
            made = tuple(
                Allocation(kind, 2, KNOWN[kind].at(2), most, 1.0)
                for kind, most in machines.items()
                if most > 0
            )
            rows = ModulePlan(name, name, rate_rps, 0.0, 5.0, 5.0, made)
            bound = bind(chain, {name: ModelSpec(name, 2, (X,), (Y,))})
            plan = ChainPlan(chain.name, 5.0, rate_rps, 5.0, (rows,))
            route = route_chain(bound, plan, {name: KNOWN})
            self.dispatcher.handle(InstallChain(route), now_s=0.0)
        for kind, count in there.items():
            for index in range(count):
                name = f"{kind}{index}" if count > 1 else kind
                up = MachineUp(name, kind, 1, {"m": 1, "n": 1})
                self.dispatcher.handle(up, now_s=0.0)

    def submit(
        self, request: int, deadline_s: float, now_s: float, chain: str = "cm", priority: int = 0
    ) -> None:
        x = Tensor("x", "UINT8", (1,), b"x")
        submit = Submit(request, chain, {"x": x}, deadline_s, priority=priority)
        self._see(self.dispatcher.handle(submit, now_s=now_s))

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
    served = Served({"quick": 1.0, "slow": 1.0}, {"quick": 1, "slow": 1})
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


def test_a_machine_that_others_need_takes_nothing_that_was_planned_elsewhere() -> None:
    # It took whatever waited, and those who need it found it busy.
    served = Served({"quick": 1.0}, {"quick": 1, "slow": 1}, needed=0.7)
    for request in range(6):
        served.submit(request, 5.0, 0.0)
    assert list(served.running) == ["quick"]
    served.machine_down("quick", 0.01)
    assert list(served.running) == ["quick", "slow"], "better there than nowhere"


def test_a_machine_that_nobody_needs_takes_full_batches_that_are_in_time_there() -> None:
    served = Served({"quick": 1.0}, {"quick": 1, "slow": 1})
    served.submit(0, 5.0, 0.0)
    served.submit(1, 5.0, 0.0)
    assert list(served.running) == ["quick"]
    served.submit(2, 5.0, 0.0)
    assert served.running["slow"].rows == 2
    tight = Served({"quick": 1.0}, {"quick": 1, "slow": 1})
    for request in range(3):
        tight.submit(request, 0.45, 0.0)
    assert list(tight.running) == ["quick"]


def test_of_other_machines_than_the_main_ones_no_more_are_used_than_planned() -> None:
    served = Served({"quick": 1.0, "slow": 0.4}, {"quick": 1, "slow": 3}, needed=2.6)
    for request in range(8):
        served.submit(request, 5.0, 0.0)
    assert list(served.running) == ["quick", "slow0"]
    served.done("slow0", 0.4)
    assert list(served.running) == ["quick", "slow0"]


def test_urgent_rows_hold_no_machine_back_that_they_may_not_use() -> None:
    served = Served({"quick": 1.0}, {"quick": 1, "slow": 1}, needed=1.0, rate_rps=4.0)
    served.submit(0, 5.0, 0.0)
    # It has to be launched at 0.06 s, but the quick machine is busy until 0.1 s.
    served.submit(1, 0.21, 0.0)
    served.submit(2, 5.0, 0.0, "cn", 1)
    assert list(served.running) == ["quick", "slow"] and not served.failed
