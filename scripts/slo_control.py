"""How many emulated machines do this machine's cores carry? The control run of `bench_slo.py`.

Triton is called directly, by one process, with as many full batches in flight as there are
machines, and each answer's time is compared with d(b). What it exceeds d(b) by is the stack's and
the cores' doing: as long as it is small against d(b), the cores are not what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from scripts.slo_report import percentile
from scripts.slo_workloads import ROW
from scripts.timed_model import write_timed

from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings

BATCH = 8
DURATION_S = 0.1
LOAD_TIMEOUT_S = 120.0


async def carried(work: Path, counts: Sequence[int], seconds_s: float) -> list[str]:
    """A markdown table: batches of 100 ms on each number of machines, all busy all the time."""
    models = work / "control"
    models.mkdir()
    settings = LocalTritonSettings(
        state_directory=work / "control-triton", model_repositories=(models,)
    )
    lines = ["| machines | batches/s | median over d(b) | p99 over d(b) |", "|---|---|---|---|"]
    async with LocalTriton(settings) as triton:
        client = TritonClient(triton.url)
        try:
            for count in counts:
                name = f"timed{count}"
                group = f"instance_group [{{count: {count} kind: KIND_CPU}}]\n"
                write_timed(
                    models, {BATCH: DURATION_S * 1e3}, name, max_batch_size=BATCH, extra=group
                )
                await client.load(name, timeout_s=LOAD_TIMEOUT_S)
                over = sorted(await _excesses(client, name, count, seconds_s))
                await client.unload(name)
                lines.append(
                    f"| {count} | {len(over) / seconds_s:.0f} | {percentile(over, 0.5):+.1%} | "
                    f"{percentile(over, 0.99):+.1%} |"
                )
        finally:
            await client.close()
    return lines


async def _excesses(
    client: TritonClient, model: str, machines: int, seconds_s: float
) -> list[float]:
    """Relative excesses of all executions."""
    loop = asyncio.get_running_loop()
    x = BatchTensor("x", "FP32", (BATCH, ROW), (bytes(4 * ROW * BATCH),))
    found: list[float] = []

    async def execute() -> float:
        started_s = loop.time()
        await client.execute(ModelCall(model, (x,), ("y",)), timeout_s=30.0)
        return (loop.time() - started_s) / DURATION_S - 1.0

    async def keep_busy() -> None:
        while loop.time() < until_s:
            found.append(await execute())

    # The first executions of a process are slow.
    await asyncio.gather(*(execute() for _ in range(2 * machines)))
    until_s = loop.time() + seconds_s

    async with asyncio.TaskGroup() as group:
        for _ in range(machines):
            group.create_task(keep_busy())
    return found
