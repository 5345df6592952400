"""The oracles themselves: a planted bug is caught, and the story told about it is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.simulation.replay import explain, violation
from tests.simulation.swarm import draw

import paceline
from paceline.dispatch import (
    Action,
    Answer,
    Dispatcher,
    Event,
    Execute,
    Fail,
    HangLimits,
    Wake,
)
from paceline.residency import events as ev
from paceline.residency.leases import Leases
from paceline.residency.residency import Residency
from paceline.residency.state import Limits, Machine
from paceline.residency.upkeep import Upkeep

pytestmark = pytest.mark.skipif(
    paceline.COMPILED,
    reason="bugs are planted by subclasses: scripts/test runs it interpreted, too",
)

Tamper = Callable[[list[Action]], list[Action]]


class Sabotaged(Dispatcher):
    """Changes what the real dispatcher wants done."""

    tamper: Tamper

    def handle(self, event: Event, *, now_s: float, settled: bool = True) -> list[Action]:
        return type(self).tamper(super().handle(event, now_s=now_s, settled=settled))


def sabotaged(tamper: Tamper) -> type[Sabotaged]:
    return type("Sabotaged", (Sabotaged,), {"tamper": staticmethod(tamper)})


def answer_twice(actions: list[Action]) -> list[Action]:
    return [*actions, *(a for a in actions if isinstance(a, Answer))]


def swallow_failures(actions: list[Action]) -> list[Action]:
    return [a for a in actions if not isinstance(a, Fail)]


def forget_wakes(actions: list[Action]) -> list[Action]:
    return [a for a in actions if not isinstance(a, Wake)]


def swap_answers(actions: list[Action]) -> list[Action]:
    """Two answers that come together get each other's outputs."""
    answers = [a for a in actions if isinstance(a, Answer)]
    if len(answers) < 2:
        return actions
    first, second = answers[:2]
    swapped = {first.request: second.outputs, second.request: first.outputs}
    return [
        replace(a, outputs=swapped[a.request])
        if isinstance(a, Answer) and a.request in swapped
        else a
        for a in actions
    ]


def reverse_rows(actions: list[Action]) -> list[Action]:
    """Items of a gathered answer come in the wrong order."""
    return [
        replace(
            a,
            outputs=tuple(
                replace(t, data=bytes(t.data)[::-1]) if len(t.shape) > 1 else t for t in a.outputs
            ),
        )
        if isinstance(a, Answer)
        else a
        for a in actions
    ]


def one_machine_for_all(actions: list[Action]) -> list[Action]:
    return [replace(a, machine="m0") if isinstance(a, Execute) else a for a in actions]


@pytest.mark.parametrize(
    ("tamper", "checks"),
    [
        (answer_twice, {"once"}),
        (swallow_failures, {"once", "drained", "wake"}),
        (forget_wakes, {"wake", "drained"}),
        (swap_answers, {"answer"}),
        (reverse_rows, {"answer"}),
        (one_machine_for_all, {"capacity"}),
    ],
)
def test_a_planted_bug_is_caught_and_shown_by_few_stimuli(tamper: Tamper, checks: set[str]) -> None:
    dispatcher = sabotaged(tamper)
    for seed in range(60):
        case = replace(draw(seed), dispatcher=dispatcher)
        found = violation(case)
        if found is None:
            continue
        assert found.check in checks, found
        story = explain(case, found)
        assert f"make sim SEED={seed}" in story
        shortest = int(story.split("that shows it (")[1].split(" of ")[0])
        assert shortest <= 6
        return
    pytest.fail("no seed noticed")


class Impatient(Dispatcher):
    """Has an ordinary batch executed twice."""

    def __init__(self) -> None:
        super().__init__(HangLimits(overdue_factor=1.0, overdue_least_s=0.0))


class Patient(Dispatcher):
    """Waits for a batch whatever the deadlines of its rows."""

    def _look_at(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("dispatcher", "check"), [(Impatient, "work"), (Patient, "wake")])
def test_wrong_patience_is_caught(dispatcher: type[Dispatcher], check: str) -> None:
    for seed in range(200):
        found = violation(replace(draw(seed), dispatcher=dispatcher))
        if found is not None:
            assert found.check == check, found
            return
    pytest.fail("no seed noticed")


class Unpinned(Upkeep):
    """Thinks that nothing is in use."""

    def _pinned(self, machine: Machine, model: str) -> bool:
        return False


class Careless(Residency):
    """Unloads what is in use."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self._room = Unpinned(self)


class Greedy(Residency):
    """Loads ten instances more than its ledger has room for."""

    def handle(self, event: ev.Event, *, now_s: float) -> list[ev.Action]:
        return [
            replace(action, instances=action.instances + 10)
            if isinstance(action, ev.Load)
            else action
            for action in super().handle(event, now_s=now_s)
        ]


class Deaf(Leases):
    """Does not know who waited."""

    def awaited(self, model: str) -> bool:
        return False


class Hasty(Residency):
    """Starts what is wanted of a model beside the first request that uses it."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.leases = Deaf()


@pytest.mark.parametrize(
    ("residency", "check"), [(Careless, "lease"), (Greedy, "memory"), (Hasty, "first")]
)
def test_a_planted_bug_of_residency_is_caught(residency: type[Residency], check: str) -> None:
    cases = (case for seed in range(120) if (case := draw(seed)).memory is not None)
    found = (violation(replace(case, residency=residency)) for case in cases)
    assert any(broken is not None and broken.check == check for broken in found)
