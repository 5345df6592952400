"""A child process: its end is told on any loop, and it is started without fork hooks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from paceline.triton.child import Child


def start(tmp_path: Path, code: str) -> Child:
    with (tmp_path / "log").open("ab") as log:
        return Child((sys.executable, "-I", "-S", "-c", code), environment={}, output=log)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_its_end_is_told_to_all_who_wait(tmp_path: Path, run: Callable[..., object]) -> None:
    async def check() -> None:
        one, other = (
            start(tmp_path, "print('said'); raise SystemExit(3)"),
            start(tmp_path, "input()"),
        )
        assert one.returncode is None
        # Its input is empty, so that it does not wait for any.
        ends = await asyncio.gather(one.wait(), one.wait(), other.wait())
        assert list(ends) == [3, 3, 1]
        assert await one.wait() == 3
        one.kill()
        sleeps = start(tmp_path, "import time; time.sleep(60)")
        assert os.getsid(sleeps.pid) == sleeps.pid != os.getsid(0)
        sleeps.send_signal(signal.SIGTERM)
        assert await sleeps.wait() == -signal.SIGTERM

    run(check())
    assert "said" in (tmp_path / "log").read_text()


def test_no_fork_hook_runs_for_it(tmp_path: Path) -> None:
    """Python's clean-up after a fork takes locks that another thread may have held."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(1), after_in_parent=lambda: forks.append(1))

    async def check() -> None:
        assert await start(tmp_path, "").wait() == 0

    uvloop.run(check())
    assert not forks
