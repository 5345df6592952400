"""The load generator of `bench_slo.py`: open loop, in a process of its own.

Reads one JSON object a line (see `Load`) and answers with one (see `replay`). Requests are sent at
instants fixed in advance, never waiting for answers; a latency counts from the scheduled instant,
so a generator or server that falls behind shows in it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
import grpc.aio
import uvloop

INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, slots=True)
class Load:
    """`start_s` is on this machine's monotonic clock; `kinds` picks each request's message."""

    target: str
    messages: list[str]
    kinds: list[int]
    arrivals_s: list[float]
    start_s: float
    give_up_s: float


async def replay(load: Load) -> dict[str, Any]:
    """Latency in seconds of every request in order (null: failed or given up), by how much the
    sending was late, what failed by status, and how long refusals took from their sending.
    """
    messages = [bytes.fromhex(message) for message in load.messages]
    latencies: list[float | None] = [None] * len(load.arrivals_s)
    late_s: list[float] = []
    refused_s: list[float] = []
    failures: Counter[str] = Counter()
    # Compared on `monotonic`, not on the loop's clock, which has milliseconds only.
    async with grpc.aio.insecure_channel(load.target) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10.0)
        call: Any = channel.unary_unary(INFER, None, None)

        async def send(index: int, due_s: float) -> None:
            sent_s = monotonic()
            late_s.append(sent_s - due_s)
            try:
                await call(messages[load.kinds[index]], timeout=load.give_up_s)
            except grpc.aio.AioRpcError as error:
                failures[error.code().name] += 1
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refused_s.append(monotonic() - sent_s)
            else:
                latencies[index] = monotonic() - due_s

        async with asyncio.TaskGroup() as group:
            for index, at_s in enumerate(load.arrivals_s):
                due_s = load.start_s + at_s
                if (wait_s := due_s - monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(send(index, due_s))
    return {
        "latencies_s": latencies,
        "late_s": late_s,
        "refused_s": refused_s,
        "failures": dict(failures),
    }


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = await replay(Load(**json.loads(line)))
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve())
