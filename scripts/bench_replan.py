"""What requests wait for while a plan is made: on the event loop, in a thread, in a process.

A front server answers over a socket pair on its event loop (uvloop); a client on another process
asks every millisecond. Meanwhile plans are made, one after the other: not at
all, on the loop itself, in a thread beside it (`asyncio.to_thread`), or in a process of their own
(`runtime.plan_process`, as `paceline serve` does). Printed is what answers take
from the instants at which they were due to be asked for, and how long a plan takes.

Each chain to plan is six measured models in a row, on all of the hardware in `examples/data`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep

import uvloop
from rich.table import Table

from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec
from paceline.planner.problem import Options
from paceline.planner.replan import Traffic
from paceline.planner.task import PlanTask
from paceline.report import console
from paceline.runtime.plan_process import PlanningProcess, perform

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.planner_workloads import percentile, source

MODULES = 6
SLO_S = 20.0
"""Enough for six of the slowest models; what is planned for is not the point here."""
EVERY_S = 0.001


@dataclass
class Front:
    """Answers, and makes plans in one of the ways."""

    task: PlanTask
    planner: PlanningProcess

    async def nowhere(self) -> None:
        await asyncio.sleep(1.0)

    async def on_loop(self) -> None:
        perform(self.task)

    async def in_thread(self) -> None:
        await asyncio.to_thread(perform, self.task)

    async def in_process(self) -> None:
        await self.planner(self.task)

    async def answer(self, asked: socket.socket) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while question := await loop.sock_recv(asked, 64):
            await loop.sock_sendall(asked, question)


def task_of(chains: int) -> PlanTask:
    """`chains` chains of six models that were measured on at least two kinds of hardware."""
    rng, workloads, x = random.Random(0), source(), TensorSpec("x", "UINT8", (1,))
    prices, profiles = workloads.prices, workloads.profiles
    models = [m for m in workloads.models if len(set(profiles.hardware_of(m)) & set(prices)) >= 2]
    declared = []
    for at in range(chains):
        modules = tuple(
            Module(f"m{i}", rng.choice(models), {"x": Source(f"m{i - 1}" if i else None, "x")})
            for i in range(MODULES)
        )
        outputs = {"x": Source(modules[-1].name, "x")}
        declared.append(Chain(f"c{at}", SLO_S, (x,), modules, outputs, rate_rps=100.0))
    return PlanTask(
        chains=tuple(declared),
        specs={model: ModelSpec(model, 64, (x,), (x,)) for model in models},
        traffic=Traffic(
            {chain.name: 100.0 for chain in declared},
            {(chain.name, module.name): 1.0 for chain in declared for module in chain.modules},
            {},
        ),
        profiles=profiles,
        hardware=prices,
        capacity=dict.fromkeys(prices, 1000.0),
        overhead_s=0.002,
        options=Options(),
    )


def _ask(questions: socket.socket, figures: Connection) -> None:
    """The client: asks until the front closes its end."""
    took_s = []
    due_s = perf_counter()
    while True:
        due_s += EVERY_S
        sleep(max(0.0, due_s - perf_counter()))
        try:
            questions.sendall(b"?")
            if not questions.recv(64):
                break
        except OSError:
            break
        took_s.append(perf_counter() - due_s)
    figures.send(took_s)


async def measure(
    front: Front, plan: Callable[[], Awaitable[None]], plans: int
) -> tuple[list[float], float]:
    """What each answer took, and a plan's seconds in the median."""
    here, there = socket.socketpair()
    received, sent = get_context("spawn").Pipe(duplex=False)
    client = get_context("spawn").Process(target=_ask, args=(there, sent))
    client.start()
    there.close()
    here.setblocking(False)
    # The client is up with its first question, and the planning process with its first plan.
    await asyncio.get_running_loop().sock_recv(here, 64)
    await asyncio.get_running_loop().sock_sendall(here, b"!")
    answering = asyncio.create_task(front.answer(here))
    took_s = []
    for _ in range(plans):
        began_s = perf_counter()
        await plan()
        took_s.append(perf_counter() - began_s)
        # What waited for the plan is answered, where nothing was meanwhile.
        await asyncio.sleep(0.001)
    answering.cancel()
    here.close()
    answers: list[float] = await asyncio.to_thread(received.recv)
    client.join()
    return answers[1:], percentile(took_s, 0.5)


async def run(chains: int, plans: int) -> None:
    front = Front(task_of(chains), PlanningProcess())
    table = Table(title=f"{chains} chains of {MODULES} modules, {plans} plans")
    columns = ("planned", "p50 ms", "p99 ms", "most ms", "a plan's s")
    for column in columns:
        table.add_column(column, justify="left" if column == "planned" else "right")
    try:
        await front.in_process()
        for name, plan in (
            ("not at all", front.nowhere),
            ("on the event loop", front.on_loop),
            ("in a thread", front.in_thread),
            ("in a process", front.in_process),
        ):
            answers_s, plan_s = await measure(front, plan, plans)
            figures = [percentile(answers_s, share) * 1e3 for share in (0.5, 0.99, 1.0)]
            plan_s = plan_s if plan != front.nowhere else 0.0
            table.add_row(
                name,
                *(f"{ms:.2f}" for ms in figures),
                f"{plan_s:.2f}",
            )
    finally:
        front.planner.close()
    console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=20, help="to plan at once (default 20)")
    parser.add_argument("--plans", type=int, default=3, help="one after the other (default 3)")
    options = parser.parse_args()
    uvloop.run(run(options.chains, options.plans))
