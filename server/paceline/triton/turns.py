"""Several front processes before the same Tritons: one at a time changes a model of one of them.

A lock file per Triton and model, which the kernel releases when its holder dies; in it, when the
model was last loaded afresh, so that one who waited for another's repair does not make a second.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from paceline.core.errors import ResidencyError

_POLL_S = 0.02


class Turn:
    """This process's turn at a model, while it lasts."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def repaired_since(self, when_s: float) -> bool:
        """Whether another process has loaded the model afresh since then (`time.monotonic`, which
        is the same in all processes of a machine).
        """
        text = os.pread(self._handle, 32, 0)
        return bool(text) and float(text) > when_s

    def repaired(self) -> None:
        """It was loaded afresh now."""
        os.pwrite(self._handle, f"{time.monotonic():031.9f}".encode(), 0)


class Turns:
    """The turns at the models of Tritons; `directory` is what the processes have in common."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @asynccontextmanager
    async def at(self, url: str, model: str, *, limit_s: float) -> AsyncIterator[Turn]:
        """Wait for the turn, keep it while the block runs.

        Raises ResidencyError when the directory cannot be written, or it is others' turn all along.
        """
        key = hashlib.sha256(f"{url}\0{model}".encode()).hexdigest()[:32]
        try:
            handle = os.open(self._directory / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ResidencyError(
                f"model {model!r} at {url}: no lock in {self._directory}: {error.strerror}"
            ) from None
        try:
            try:
                async with asyncio.timeout(limit_s):
                    while not _locked(handle):  # noqa: ASYNC110 - the kernel tells nobody
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                raise ResidencyError(
                    f"model {model!r} at {url} is being changed by another worker for {limit_s:g} s"
                ) from None
            yield Turn(handle)
        finally:
            os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
