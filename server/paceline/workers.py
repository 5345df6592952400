"""`paceline serve --workers N`: N front processes on one gRPC port.

The kernel deals connections out to them (SO_REUSEPORT). This process only supervises: it starts
the local Triton, then the workers - the first alone, so that models are profiled once - and ends
them together. Every worker makes the same plan and is given its share of every machine's slots
and instances (`runtime.placement.Share`), so that together they never exceed what one would use.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from paceline.core.errors import ConfigError, ResidencyError
from paceline.serving import (
    LOCAL_HARDWARE,
    Events,
    ServeSettings,
    check_directories,
    local_triton,
    stop_on_signals,
)
from paceline.triton.launcher import ending_with_parent

STOP_MARGIN_S = 15.0


async def serve_workers(
    settings: ServeSettings, count: int, events: Events, log_level: str
) -> None:
    """Serve with `count` workers until SIGTERM or SIGINT.

    Raises PacelineError when it cannot start, or when a worker ends by itself.
    """
    if settings.grpc_port == 0:
        raise ConfigError("must be a fixed port with --workers", key="--grpc-port")
    check_directories(settings)
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
        workers: list[asyncio.subprocess.Process] = []
        stack.push_async_callback(_end, workers, settings.drain_s + STOP_MARGIN_S)
        for index in range(count):
            port = settings.http_port and settings.http_port + index
            own = ["--worker", f"{index}/{count}", "--http-port", str(port)]
            if not await _start(workers, [*shared, *own], stop):
                return
        events.on_note(
            f"{count} workers serve gRPC on {settings.host}:{settings.grpc_port}; Ctrl-C stops"
        )
        await _until_stopped(workers, stop)


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
    workers: list[asyncio.subprocess.Process], options: Sequence[str], stop: asyncio.Event
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
    workers.append(worker)
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
            raise _ended(await worker.wait(), len(workers) - 1)
        return True
    finally:
        loop.remove_reader(read_end)
        os.close(read_end)


async def _until_stopped(workers: list[asyncio.subprocess.Process], stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait(), name="stop")
    ends = {asyncio.create_task(worker.wait()): index for index, worker in enumerate(workers)}
    try:
        await asyncio.wait((stopped, *ends), return_when=asyncio.FIRST_COMPLETED)
        for task, index in ends.items():
            if task.done() and not stop.is_set():
                raise _ended(task.result(), index)
    finally:
        for task in (stopped, *ends):
            task.cancel()


async def _end(workers: list[asyncio.subprocess.Process], limit_s: float) -> None:
    """SIGTERM to all, a bounded wait while they drain, SIGKILL."""
    running = [worker for worker in workers if worker.returncode is None]
    for worker in running:
        worker.terminate()
    waits = [asyncio.create_task(worker.wait()) for worker in running]
    if waits:
        await asyncio.wait(waits, timeout=limit_s)
    for worker in running:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def _ended(code: int, index: int) -> ResidencyError | ConfigError:
    """A worker says itself, on stderr, what was wrong."""
    message = f"worker {index} ended with exit code {code}"
    return ConfigError(message) if code in (2, 3) else ResidencyError(message)
