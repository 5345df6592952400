"""Loads that a Triton of ours never ends.

Triton 2.51 waits for the first message of a python-based model's process without a limit: one that
is killed before it (by the kernel, where memory is short) leaves the load pending for ever, and the
model's name taken. Nothing but a new tritonserver helps. The process stays a zombie then: Triton
looks after the children of loads that it knows have failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from paceline.triton.processes import dead_children, model_processes

LOOK_EVERY_S = 2.5
STUCK_LOOKS = 3
"""So many looks in a row find the same dead child: Triton ends loads that it knows have failed
within a second."""
_CLOCK_SLACK_S = 1.0
"""Processes' start times are told in hundredths since boot, and the boot's in whole seconds."""


class StuckLoads:
    """Sees that a load will not end; `pid` is tritonserver's while it runs, `restart` ends it."""

    def __init__(self, pid: Callable[[], int | None], restart: Callable[[], None]) -> None:
        self._pid = pid
        self.restart = restart

    async def found(self, instances: Mapping[str, int]) -> None:
        """Return when the load of these models, begun now, is stuck: a child that was started
        since is dead and left, and not all instances have a process.
        """
        began_s = time.time() - _CLOCK_SLACK_S
        suspects: list[set[int]] = []
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            pid = self._pid()
            dead = set() if pid is None else await asyncio.to_thread(_dead, pid, began_s, instances)
            suspects = [*suspects, dead][-STUCK_LOOKS:]
            if len(suspects) == STUCK_LOOKS and set.intersection(*suspects):
                return


def _dead(triton_pid: int, since_s: float, instances: Mapping[str, int]) -> set[int]:
    """Children that were started since then and are dead, where these models lack processes."""
    if all(len(model_processes(triton_pid, model)) >= n for model, n in instances.items()):
        return set()
    return dead_children(triton_pid, since_s)
