"""A process that owns a local Triton, for tests that kill it: prints "PID URL" and waits.

python triton_owner.py STATE_DIRECTORY MODEL_REPOSITORY [MODEL [BUSY]]: loads MODEL, and with BUSY
has one execution of it under way.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository


async def main(state: Path, models: Path, model: str = "", busy: str = "") -> None:
    settings = LocalTritonSettings(state_directory=state, model_repositories=(models,))
    async with LocalTriton(settings) as triton:
        client = await TritonClient.connect(triton.url)
        if model:
            await TritonRepository(client, (models,)).load(model, instances=2)
        if busy:
            x = BatchTensor("x", "FP32", (1, 4), (bytes(16),))
            call = asyncio.create_task(
                client.execute(ModelCall(model, (x,), ("y",)), timeout_s=600)
            )
            await asyncio.wait((call,), timeout=0.3)
        print(triton.pid, triton.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
