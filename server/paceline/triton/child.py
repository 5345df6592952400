"""A child process that is started without Python's fork hooks and awaited on any event loop.

uvloop forks, and runs Python's own clean-up after a fork in the child; a lock that another thread
held at that instant keeps it there for ever, before it became the program. `subprocess` goes
straight to the program, and the kernel tells when it has ended (pidfd).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO


class Child:
    """One process, in a session and group of its own; of the running loop's thread.

    It is reaped on that thread alone, so a signal never reaches another process with its id.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes]
    ) -> None:
        """Starts it. Raises OSError."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; below 0 the signal that ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Until it has ended; its `returncode`."""
        await self._ended.wait()
        assert self._process.returncode is not None
        return self._process.returncode

    def send_signal(self, number: int) -> None:
        """Nothing when it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; nothing when it has ended."""
        self._process.kill()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()
