"""Requests that arrive together are batched together, and one that is alone does not wait."""

from __future__ import annotations

import asyncio

from paceline.core.bind import single_model_chain
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall, OnExecuted
from paceline.core.request import InferAnswer, InferRequest
from paceline.core.tensor import Tensor, TensorSpec
from paceline.dispatch.route import route_chain
from paceline.runtime.engine import Engine

X, Y = TensorSpec("x", "UINT8", (2,)), TensorSpec("y", "UINT8", (2,))
MODEL = ModelSpec("m", 64, (X,), (Y,))


class Recorder:
    """An executor that echoes and remembers how many rows each batch had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def begin(self, machine: str, call: ModelCall, on_end: OnExecuted, *, timeout_s: float) -> bool:
        return False

    async def execute(
        self, machine: str, call: ModelCall, *, timeout_s: float
    ) -> tuple[Tensor, ...]:
        given = call.inputs[0]
        self.rows.append(given.shape[0])
        await asyncio.sleep(0)
        return (Tensor("y", "UINT8", given.shape, b"".join(given.parts)),)


def stand() -> tuple[Engine, Recorder]:
    executor = Recorder()
    engine = Engine(executor)
    engine.install(route_chain(single_model_chain(MODEL)))
    engine.machine_up("a", "cpu", 1, {"m": 1})
    return engine, executor


async def ask(engine: Engine, value: int) -> InferAnswer:
    data = bytes((value, value))
    return await engine.infer(InferRequest("m", (Tensor("x", "UINT8", (1, 2), data),)))


async def test_requests_of_one_pass_of_the_loop_share_batches() -> None:
    engine, executor = stand()
    answers = await asyncio.gather(*(ask(engine, value) for value in range(40)))
    assert [bytes(a.outputs[0].data) for a in answers] == [bytes((v, v)) for v in range(40)]
    assert sum(executor.rows) == 40
    assert len(executor.rows) <= 3
    await engine.close()


async def test_a_request_that_is_alone_is_launched_at_once() -> None:
    engine, executor = stand()
    task = asyncio.create_task(ask(engine, 1))
    await asyncio.sleep(0)  # the request is submitted, its batch is a task
    await asyncio.sleep(0)
    assert executor.rows == [1]
    await task
    await engine.close()


async def test_a_request_cancelled_before_the_launch_is_not_executed() -> None:
    engine, executor = stand()
    kept = asyncio.create_task(ask(engine, 1))
    await asyncio.sleep(0)
    dropped = asyncio.create_task(ask(engine, 2))
    await asyncio.sleep(0)
    dropped.cancel()
    await asyncio.gather(dropped, return_exceptions=True)
    assert bytes((await kept).outputs[0].data) == b"\1\1"
    assert executor.rows == [1]
    assert engine.dispatcher.in_flight == 0
    await engine.close()
