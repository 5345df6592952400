"""A fused chain that forks: what runs beside what, and what becomes of a member that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from paceline.blocks.backend.manifest import Member
from paceline.blocks.backend.wired import StepError, WiredModel
from paceline.blocks.backend.wiring import Port, Step, Wiring

PATIENCE_S = 20.0
X = np.ones(1, np.float32)

# x -> (near -> far, beside) -> end
STEPS = {
    "near": {"a": "x"},
    "far": {"a": "near/y"},
    "beside": {"a": "x"},
    "end": {"a": "far/y", "b": "beside/y"},
}


def wiring(steps: Mapping[str, Mapping[str, str]] = STEPS) -> Wiring:
    made = tuple(
        Step(
            module=name,
            model=f"m_{name}",
            kind="python",
            version="1",
            batched=False,
            inputs=inputs,
            outputs=(Port("y", "FP32", (1,)),),
            config={},
        )
        for name, inputs in steps.items()
    )
    own = tuple(
        Port(f"{name}/{tensor}", "FP32", (1,)) for name, of in steps.items() for tensor in of
    )
    return Wiring(0, "python", (Port("x", "FP32", (1,)),), (), own, made)


class NoBlocks:
    """There are no networks."""

    members: Sequence[Member] = ()

    def infer(
        self, member: str, feed: Mapping[str, Any], outputs: Sequence[str], rows: int = 1
    ) -> dict[str, Any]:
        raise AssertionError(member)

    def close(self) -> None: ...


class Hosted:
    """Gives the sum of what it takes; `first` runs before."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self.first = first
        self.threads: list[int] = []

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        self.threads.append(threading.get_ident())
        self.first()
        return {"y": np.asarray(sum(feed.values()))}

    def close(self) -> None: ...


@contextmanager
def opened(
    steps: Mapping[str, Mapping[str, str]] = STEPS, **firsts: Callable[[], object]
) -> Iterator[tuple[WiredModel, dict[str, Hosted]]]:
    hosted = {name: Hosted(firsts.get(name, lambda: None)) for name in steps}
    model = WiredModel(wiring(steps), NoBlocks(), hosted)
    yield model, hosted
    model.close()


def test_a_step_runs_when_what_it_takes_is_there_whatever_runs_beside_it() -> None:
    """`beside` ends only when the two steps of the other branch are done, one after the other."""
    done = threading.Event()

    def wait() -> None:
        assert done.wait(PATIENCE_S), "the other branch waits for this one"

    with opened(beside=wait, far=done.set) as (model, hosted):
        assert model.infer("", {"x": X}, ["end/y"])["end/y"] == 2
        assert all(len(one.threads) == 1 for one in hosted.values())


def test_requests_at_a_time_fork_each_for_itself() -> None:
    """Two requests, each with two branches: four steps that all wait for each other."""
    barrier = threading.Barrier(4)
    steps = {"left": {"a": "x"}, "right": {"a": "x"}}
    hosted = dict.fromkeys(steps, Hosted(lambda: barrier.wait(PATIENCE_S)))
    model = WiredModel(wiring(steps), NoBlocks(), hosted, parallel=2)
    wanted = ["left/y", "right/y"]
    requests = [threading.Thread(target=model.infer, args=("", {"x": X}, wanted)) for _ in "ab"]
    for request in requests:
        request.start()
    for request in requests:
        request.join()
    model.close()
    assert not barrier.broken and len(hosted["left"].threads) == 4


def test_what_has_nothing_beside_it_runs_in_the_requests_own_thread() -> None:
    """A chain, and inputs that a request brings instead of what members are wired to."""
    chain = {"a": {"x": "x"}, "b": {"x": "a/y"}, "c": {"x": "b/y"}}
    with opened(chain) as (model, hosted):
        model.infer("", {"x": X}, ["c/y"])
        model.infer("", {"x": X, "b/x": X, "c/x": X}, ["a/y", "b/y", "c/y"])
        here = threading.get_ident()
        assert all(set(one.threads) == {here} for one in hosted.values())
    with opened() as (model, hosted):
        model.infer("", {"x": X}, ["end/y"])
        assert hosted["end"].threads == [threading.get_ident()]


def test_a_failure_beside_others_is_told_when_those_are_over() -> None:
    """No step outlives its request, and none begins after the failure."""
    began, over = threading.Event(), threading.Event()

    def fail() -> None:
        assert began.wait(PATIENCE_S)
        raise ValueError("too dark")

    def last() -> None:
        began.set()
        threading.Event().wait(0.1)
        over.set()

    with opened(beside=fail, near=last) as (model, hosted):
        with pytest.raises(StepError, match=r"member 'beside' \(m_beside\): too dark"):
            model.infer("", {"x": X}, ["end/y"])
        assert over.is_set() and not hosted["far"].threads and not hosted["end"].threads


def test_members_that_can_run_beside_others_are_known() -> None:
    made = wiring()
    assert [made.forks(name) for name in STEPS] == [True, True, True, False]
    assert not any(wiring({"a": {"x": "x"}, "b": {"x": "a/y"}}).forks(name) for name in "ab")
