"""What models take on a Triton: measured on its processes where they are ours, guessed elsewhere.

Every instance of a python-based model is a process of its own, a child of tritonserver, that
carries `<model>_<group>_<number>` in its command line. Its proportional set size (PSS) counts
pages that several processes map once in all, so that sums are what the machine really uses.


"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import psutil

from paceline.triton.repository import TritonRepository

PROCESS_BYTES = 48 << 20
"""A model's process with its interpreter and libraries, before it was measured."""

GONE_S = 5.0
GONE_POLL_S = 0.05
"""How long processes of an unloaded model may take to end, and how often they are looked for."""

_INSTANCE = re.compile(r"(.+)_\d+_\d+")


class GuessedMemory:
    """A Triton that runs elsewhere: its files are all that is known of its models."""

    def __init__(self, repository: TritonRepository) -> None:
        self._repository = repository

    def guessed_bytes(self, model: str) -> int:
        """See `ModelMemory.guessed_bytes`: its files and a process to hold them."""
        directory = self._repository.directory(model)
        if directory is None:
            return PROCESS_BYTES
        sizes = (path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return PROCESS_BYTES + sum(sizes)

    async def measured_bytes(self, model: str) -> int | None:
        """See `ModelMemory.measured_bytes`."""
        return None

    async def gone(self, model: str) -> bool:
        """See `ModelMemory.gone`: its index has said so, more cannot be told."""
        return True


class ProcessMemory(GuessedMemory):
    """A Triton whose processes can be looked at; `pid` is its process id while it runs."""

    def __init__(self, repository: TritonRepository, pid: Callable[[], int | None]) -> None:
        super().__init__(repository)
        self._pid = pid

    async def measured_bytes(self, model: str) -> int | None:
        """See `ModelMemory.measured_bytes`."""
        pid = self._pid()
        if pid is None:
            return None
        return await asyncio.to_thread(model_bytes, pid, model)

    async def gone(self, model: str) -> bool:
        """See `ModelMemory.gone`."""
        for _ in range(round(GONE_S / GONE_POLL_S)):
            pid = self._pid()
            if pid is None or not await asyncio.to_thread(model_processes, pid, model):
                return True
            await asyncio.sleep(GONE_POLL_S)
        return False


def model_processes(triton_pid: int, model: str) -> list[psutil.Process]:
    """The living processes of a model's instances."""
    found = []
    try:
        children = psutil.Process(triton_pid).children()
    except psutil.Error:
        return []
    for process in children:
        try:
            named = (_INSTANCE.fullmatch(word) for word in process.cmdline()[-2:])
            ours = any(match is not None and match[1] == model for match in named)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def model_bytes(triton_pid: int, model: str) -> int | None:
    """PSS of all instances of a model; None when it has no process of its own."""
    sizes = [_pss_bytes(process.pid) for process in model_processes(triton_pid, model)]
    return sum(sizes) or None


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) << 10 if match is not None else 0
