"""Plans come from a process of their own: the same ones, the same errors, whatever befalls it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import PlanError
from paceline.core.model import ModelSpec
from paceline.core.plan import Plan
from paceline.core.profile import Hardware, ProfileRow, Profiles
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Options
from paceline.planner.replan import Traffic
from paceline.planner.task import PlanTask
from paceline.runtime.plan_process import PlanningProcess, perform

X = TensorSpec("x", "UINT8", (1,))
CHAIN = Chain(
    "c",
    1.0,
    (X,),
    (
        Module("asr", "asr", {"x": Source(None, "x")}),
        Module("answer", "answer", {"x": Source("asr", "y")}),
    ),
    {"y": Source("answer", "y")},
    rate_rps=100.0,
    runs="off",
)
TASK = PlanTask(
    chains=(CHAIN,),
    specs={
        name: ModelSpec(name, 8, (X,), (TensorSpec("y", "UINT8", (1,)),))
        for name in ("asr", "answer")
    },
    traffic=Traffic({"c": 100.0}, {("c", "asr"): 1.0, ("c", "answer"): 1.0}, {}),
    profiles=Profiles(
        tuple(
            ProfileRow(model, "t4", size, size / 100)
            for model in ("asr", "answer")
            for size in (1, 8)
        )
    ),
    hardware={"t4": Hardware("t4", 1.0)},
    capacity={"t4": 4.0},
    overhead_s=0.002,
    options=Options(),
)


@pytest.fixture
async def process() -> AsyncIterator[PlanningProcess]:
    planner = PlanningProcess()
    yield planner
    planner.close()


def child() -> psutil.Process:
    (found,) = (p for p in psutil.Process().children() if "runtime.plan_process" in p.cmdline()[-1])
    return found


def timeless(planned: tuple[list[Chain], Plan]) -> tuple[list[Chain], Plan]:
    served, plan = planned
    assert plan.solve_s > 0
    return served, replace(plan, solve_s=0.0)


async def test_it_plans_as_this_process_does(process: PlanningProcess) -> None:
    found = await asyncio.gather(*(process(TASK) for _ in range(3)))
    assert [timeless(each) for each in found] == [timeless(perform(TASK))] * 3


async def test_an_error_comes_as_it_was_raised(process: PlanningProcess) -> None:
    short = replace(TASK, chains=(replace(CHAIN, slo_s=0.001),))
    with pytest.raises(PlanError) as raised:
        await process(short)
    with pytest.raises(PlanError) as here:
        perform(short)
    assert str(raised.value) == str(here.value) and raised.value.chain == "c"
    assert vars(raised.value) == vars(here.value) | {"__notes__": raised.value.__notes__}
    assert timeless(await process(TASK)) == timeless(perform(TASK))


async def test_a_fault_of_the_planner_says_where_it_was(process: PlanningProcess) -> None:
    with pytest.raises(KeyError) as raised:
        await process(replace(TASK, traffic=Traffic({}, TASK.traffic.fan_outs, {})))
    assert "in _demands" in raised.value.__notes__[0]


async def test_a_process_that_is_gone_is_replaced(process: PlanningProcess) -> None:
    await process(TASK)
    first = child()
    first.kill()
    psutil.wait_procs([first], timeout=10)
    assert timeless(await process(TASK)) == timeless(perform(TASK))
    assert child() != first


async def test_a_process_that_stands_still_is_replaced(
    process: PlanningProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await process(TASK)
    first = child()
    first.suspend()
    monkeypatch.setattr("paceline.runtime.plan_process.MOST_S", 3.0)
    assert timeless(await process(TASK)) == timeless(perform(TASK))
    assert child() != first


async def test_one_that_breaks_under_a_task_twice_is_said(process: PlanningProcess) -> None:
    broken = replace(TASK, specs={"asr": _Exits()})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match="ended twice"):
        await process(broken)
    assert timeless(await process(TASK)) == timeless(perform(TASK))


class _Exits:
    """Ends whoever reads it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


async def test_closing_ends_it_in_the_middle_of_a_task_and_nothing_is_planned_after() -> None:
    planner = PlanningProcess()
    await planner(TASK)
    process = child()
    process.send_signal(signal.SIGSTOP)
    asked = asyncio.ensure_future(planner(TASK))
    await asyncio.sleep(0.05)
    planner.close()
    with pytest.raises(PlanError, match="shutting down"):
        await asked
    assert not process.is_running()
    with pytest.raises(PlanError, match="shutting down"):
        await planner(TASK)


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os, signal; from paceline.runtime.plan_process import PlanningProcess as P;"
        "print(P()._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert parent.returncode == -signal.SIGKILL
    pid = int(parent.stdout)
    if psutil.pid_exists(pid):
        psutil.Process(pid).wait(timeout=10)
