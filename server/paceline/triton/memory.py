"""What models take on a Triton: measured on its processes where they are ours, guessed elsewhere.

The proportional set size (PSS) of its processes counts pages that several map once in all; half as
much of them again is added, because each has more of them to itself once others have gone: sums are
about what is used, or more. Where a model has parameter blocks, those are mapped files, each of
which the ledger counts once: of its processes only what is not a file's is then its own. Where a
model's processes hold memory of a GPU, that is what they are measured by: there the budget is the
GPU's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from paceline.database import Measurements
from paceline.triton.gpu_memory import GpuMemory
from paceline.triton.processes import model_processes
from paceline.triton.repository import TritonRepository, content_mark

logger = logging.getLogger(__name__)

PROCESS_BYTES = 48 << 20
"""A model's process with its interpreter and libraries, before it was measured."""

GONE_S = 5.0
GONE_POLL_S = 0.05
"""How long processes of an unloaded model may take to end, and how often they are looked for."""

_PSS = re.compile(r"^(Pss|Pss_File|Private_Clean|Private_Dirty):\s+(\d+) kB", re.MULTILINE)
_FEWER_SHARE = 0.5
"""Of what a process shares now, how much more of it is its own once most of the others are gone."""
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


BlocksOf = Callable[[Path], Mapping[str, int]]
FindBlocks = Callable[[Path], Awaitable[None]]


def _no_blocks(directory: Path) -> Mapping[str, int]:
    return {}


async def _nowhere(directory: Path) -> None:
    """There is nothing to find."""


class GuessedMemory:
    """A Triton that runs elsewhere: its files are all that is known of its models."""

    def __init__(
        self, repository: TritonRepository, sizes: Measurements, blocks: BlocksOf = _no_blocks
    ) -> None:
        """`blocks`: bytes of the parameter blocks of the model in a directory, by block."""
        self._repository = repository
        self._sizes = sizes
        self._blocks = blocks

    def blocks(self, model: str) -> Mapping[str, int]:
        """See `ModelMemory.blocks`."""
        directory = self._repository.directory(model)
        return self._blocks(directory) if directory is not None else {}

    async def find_blocks(self, model: str) -> None:
        """See `ModelMemory.find_blocks`: what can be read here is known."""

    def guessed_bytes(self, model: str, blocks: Mapping[str, int]) -> int:
        """See `ModelMemory.guessed_bytes`: its files and a process to hold them."""
        directory = self._repository.directory(model)
        if directory is None:
            return PROCESS_BYTES
        try:
            known = self._sizes.size_bytes(model, _mark(directory, blocks))
        except sqlite3.Error as error:
            logger.warning("the size of %s is not remembered: %s", model, error)
            known = None
        if known is not None:
            return known
        if blocks:
            return PROCESS_BYTES
        sizes = (path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return PROCESS_BYTES + sum(sizes)

    def remember(self, model: str, own_bytes: int, blocks: Mapping[str, int]) -> None:
        """See `ModelMemory.remember`. A disk that is full costs only that."""
        directory = self._repository.directory(model)
        if directory is not None:
            try:
                self._sizes.keep_size(model, _mark(directory, blocks), own_bytes)
            except sqlite3.Error as error:
                logger.warning("the size of %s is not kept: %s", model, error)

    async def measured_bytes(self, model: str, blocks: Mapping[str, int]) -> int | None:
        """See `ModelMemory.measured_bytes`."""
        return None

    async def server_bytes(self) -> int | None:
        """See `ModelMemory.server_bytes`."""
        return None

    async def gone(self, model: str) -> bool:
        """See `ModelMemory.gone`: its index has said so, more cannot be told."""
        return True


class ProcessMemory(GuessedMemory):
    """A Triton whose processes can be looked at; `pid` is its process id while it runs, `find`
    has `blocks` know more of the model in a directory.
    """

    def __init__(
        self,
        repository: TritonRepository,
        sizes: Measurements,
        pid: Callable[[], int | None],
        blocks: BlocksOf = _no_blocks,
        find: FindBlocks = _nowhere,
        gpu: GpuMemory | None = None,
    ) -> None:
        super().__init__(repository, sizes, blocks)
        self._pid = pid
        self._find = find
        self._gpu = gpu

    async def find_blocks(self, model: str) -> None:
        """See `ModelMemory.find_blocks`."""
        directory = self._repository.directory(model)
        if directory is not None:
            await self._find(directory)

    async def measured_bytes(self, model: str, blocks: Mapping[str, int]) -> int | None:
        """See `ModelMemory.measured_bytes`."""
        pid = self._pid()
        if pid is None:
            return None
        if self._gpu is not None:
            on_gpu = await asyncio.to_thread(gpu_bytes, pid, model, self._gpu)
            if on_gpu:
                return on_gpu
        return await asyncio.to_thread(model_bytes, pid, model, files=not blocks)

    async def server_bytes(self) -> int | None:
        """See `ModelMemory.server_bytes`: of tritonserver's own process, files and what it shares
        with its models' processes left out.
        """
        pid = self._pid()
        return None if pid is None else await asyncio.to_thread(anonymous_bytes, pid)

    async def gone(self, model: str) -> bool:
        """See `ModelMemory.gone`."""
        for _ in range(round(GONE_S / GONE_POLL_S)):
            pid = self._pid()
            if pid is None or not await asyncio.to_thread(model_processes, pid, model):
                return True
            await asyncio.sleep(GONE_POLL_S)
        return False


def _mark(directory: Path, blocks: Mapping[str, int]) -> str:
    """Of what a size is remembered: one beside blocks is another than one that has them in it."""
    mark = content_mark(directory)
    return f"{mark} beside blocks" if blocks else mark


def model_bytes(triton_pid: int, model: str, *, files: bool = True) -> int | None:
    """PSS of all instances of a model, with or without that of mapped files; None when it has no
    process of its own.
    """
    sizes = [_pss_bytes(process.pid, files) for process in model_processes(triton_pid, model)]
    return sum(sizes) or None


def gpu_bytes(triton_pid: int, model: str, gpu: GpuMemory) -> int:
    """What all instances of a model hold on GPUs; 0 where they have no process that does."""
    held = gpu.by_process()
    return sum(held.get(process.pid, 0) for process in model_processes(triton_pid, model))


def anonymous_bytes(pid: int) -> int | None:
    """Resident memory of a process that is no file's and shared with nobody; None if it ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = _ANONYMOUS.search(text)
    return int(found[1]) << 10 if found is not None else None


def _pss_bytes(pid: int, files: bool) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    found = {name: int(kib) << 10 for name, kib in _PSS.findall(text)}
    size = found.get("Pss", 0)
    if not files:
        return size - found.get("Pss_File", 0)
    private = found.get("Private_Clean", 0) + found.get("Private_Dirty", 0)
    return size + int(_FEWER_SHARE * max(0, size - private))
