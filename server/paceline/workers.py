"""`paceline serve --workers N`: N front processes on one gRPC port.

The kernel deals connections out to them (SO_REUSEPORT). This process only supervises: it starts
the local Triton, then the workers - the first alone, so that models are profiled once - starts
those anew that end by themselves, and ends them together. Every worker makes the same plan and is
given its share of every machine's slots and instances (`runtime.placement.Share`), so that together
they never exceed what one would use; they take turns at loading models (`triton.turns`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from itertools import count

from paceline.core.errors import ConfigError, ResidencyError
from paceline.runtime.suspicions import Suspicions
from paceline.serving import (
    LOCAL_HARDWARE,
    Events,
    ServeSettings,
    check_directories,
    local_triton,
    stop_on_signals,
    suspicions_file,
    turns_directory,
)
from paceline.triton.launcher import ending_with_parent

STOP_MARGIN_S = 15.0
RESTART_WAIT_S = 0.5
"""Before a worker that ended is started anew."""
MOST_ENDS = 4
"""So many ends of one worker within `ENDS_WITHIN_S`, and no more is tried."""
ENDS_WITHIN_S = 300.0


async def serve_workers(
    settings: ServeSettings, number: int, events: Events, log_level: str
) -> None:
    """Serve with `number` workers until SIGTERM or SIGINT.

    Raises PacelineError when one cannot start, or ends by itself too often.
    """
    if settings.grpc_port == 0:
        raise ConfigError("must be a fixed port with --workers", key="--grpc-port")
    check_directories(settings)
    turns = turns_directory(settings)
    shutil.rmtree(turns, ignore_errors=True)
    turns.mkdir(exist_ok=True)
    Suspicions.create(suspicions_file(settings))
    stop = stop_on_signals(events)
    async with AsyncExitStack() as stack:
        targets = [str(target) for target in settings.tritons]
        slots = settings.slots
        if not targets:
            triton = local_triton(settings, events)
            stack.push_async_callback(triton.stop)
            targets = [f"{LOCAL_HARDWARE}@{await triton.start()}"]
            slots = slots or os.cpu_count() or 1
        shared = _options(settings, log_level)
        shared += [part for target in targets for part in ("--triton", target)]
        shared += ["--slots", str(slots)] if slots else []
        workers: dict[int, asyncio.subprocess.Process] = {}
        stack.push_async_callback(_end, workers, settings.drain_s + STOP_MARGIN_S)

        async def start(index: int) -> bool:
            port = settings.http_port and settings.http_port + index
            own = ["--worker", f"{index}/{number}", "--http-port", str(port)]
            return await _start(workers, index, [*shared, *own], stop)

        for index in range(number):
            if not await start(index):
                return
        events.on_note(
            f"{number} workers serve gRPC on {settings.host}:{settings.grpc_port}; Ctrl-C stops"
        )
        await _until_stopped(workers, start, stop, events)


def _options(settings: ServeSettings, log_level: str) -> list[str]:
    """The options of `paceline serve` that every worker gets."""
    options = [
        *("--state-dir", str(settings.state_directory)),
        *("--host", settings.host),
        *("--grpc-port", str(settings.grpc_port)),
        *("--max-message-mib", str(settings.max_message_bytes >> 20)),
        *("--drain-s", str(settings.drain_s)),
        *("--overdue-factor", str(settings.hang.overdue_factor)),
        *("--hang-factor", str(settings.hang.factor)),
        *("--hang-least-s", str(settings.hang.least_s)),
        *("--log-level", log_level),
    ]
    for path in settings.chains:
        options += ["--chains", str(path)]
    for path in settings.model_repositories:
        options += ["--model-repository", str(path)]
    if settings.hardware is not None:
        options += ["--hardware", str(settings.hardware)]
    return options


async def _start(
    workers: dict[int, asyncio.subprocess.Process],
    index: int,
    options: Sequence[str],
    stop: asyncio.Event,
) -> bool:
    """Start a worker and wait until it serves; False when told to stop meanwhile."""
    read_end, write_end = os.pipe()
    try:
        worker = await asyncio.create_subprocess_exec(
            *ending_with_parent(sys.executable, "-m", "paceline", "serve", *options),
            *("--ready-fd", str(write_end)),
            pass_fds=(write_end,),
            # Ctrl-C reaches this process, which tells the workers once.
            start_new_session=True,
        )
    finally:
        os.close(write_end)
    workers[index] = worker
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(read_end, ready.set)
    try:
        waits = [asyncio.create_task(event.wait()) for event in (ready, stop)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if stop.is_set():
            return False
        if not os.read(read_end, 1):
            raise _ended(await worker.wait(), index)
        return True
    finally:
        loop.remove_reader(read_end)
        os.close(read_end)


async def _until_stopped(
    workers: dict[int, asyncio.subprocess.Process],
    start: Callable[[int], Coroutine[None, None, bool]],
    stop: asyncio.Event,
    events: Events,
) -> None:
    """Keep every worker running; the first failure ends them all."""
    stopped = asyncio.create_task(stop.wait(), name="stop")
    kept = [
        asyncio.create_task(_keep(workers, index, start, stop, events), name=f"worker-{index}")
        for index in workers
    ]
    try:
        await asyncio.wait((stopped, *kept), return_when=asyncio.FIRST_COMPLETED)
        for task in kept:
            if task.done():
                task.result()
    finally:
        stopped.cancel()
        for task in kept:
            task.cancel()
        await asyncio.gather(*kept, return_exceptions=True)


async def _keep(
    workers: dict[int, asyncio.subprocess.Process],
    index: int,
    start: Callable[[int], Coroutine[None, None, bool]],
    stop: asyncio.Event,
    events: Events,
) -> None:
    """Start worker `index` anew whenever it ends. The others serve on meanwhile, and who was
    connected to it connects to them.
    """
    loop = asyncio.get_running_loop()
    ends_s: deque[float] = deque(maxlen=MOST_ENDS)
    for starts in count(1):
        code = await workers[index].wait()
        if stop.is_set():
            return
        ends_s.append(loop.time())
        if len(ends_s) == MOST_ENDS and ends_s[-1] - ends_s[0] < ENDS_WITHIN_S:
            raise _ended(code, index, f", {MOST_ENDS} times within {ENDS_WITHIN_S:g} s")
        events.on_note(f"worker {index} ended with exit code {code}; started anew")
        await asyncio.sleep(RESTART_WAIT_S)
        if not await start(index):
            return
        events.on_note(f"worker {index} serves again (start {starts + 1})")


async def _end(workers: dict[int, asyncio.subprocess.Process], limit_s: float) -> None:
    """SIGTERM to all, a bounded wait while they drain, SIGKILL."""
    running = [worker for worker in workers.values() if worker.returncode is None]
    for worker in running:
        worker.terminate()
    waits = [asyncio.create_task(worker.wait()) for worker in running]
    if waits:
        await asyncio.wait(waits, timeout=limit_s)
    for worker in running:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def _ended(code: int, index: int, often: str = "") -> ResidencyError | ConfigError:
    """A worker says itself, on stderr, what was wrong."""
    message = f"worker {index} ended with exit code {code}{often}"
    return ConfigError(message) if code in (2, 3) else ResidencyError(message)
