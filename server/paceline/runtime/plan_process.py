"""Plans are made in a process of their own, so that no request waits for one.

A plan takes milliseconds for a chain and a second for many, of Python: in a thread beside the event
loop it would hold the interpreter for 5 ms between any two steps that the loop makes.

Invariant: a process plans one task after the other and ends with its parent, as its input does;
one that ended by itself is replaced once a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import select
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock, Timer
from time import perf_counter

import paceline
from paceline.core.chain import Chain
from paceline.core.errors import PlanError
from paceline.core.plan import Plan
from paceline.planner.task import PlanTask

Planned = tuple[list[Chain], Plan]
"""Chains as they are to be served, and the plan of that."""

Planner = Callable[[PlanTask], Awaitable[Planned]]

IDLE_S = 300.0
"""How long the process waits for the next task before it gives its memory (40 MiB) back."""

MOST_S = 120.0
"""How long a plan may take; a process that takes longer, or stands still, is ended."""

_NICE = 5
"""What is served now goes before what will be better later."""

_TRIES = 2
"""A process that has given up idling looks like one that broke: the next one tells."""


def perform(task: PlanTask) -> Planned:
    """Plan, here and now. Raises PlanError."""
    started_s = perf_counter()
    served = task.served()
    plan = task.plan(served)
    return served, replace(plan, solve_s=perf_counter() - started_s)


async def plan_here(task: PlanTask) -> Planned:
    """`perform`, for where nothing is served meanwhile."""
    return perform(task)


class PlanningProcess:
    """See the module docstring. Of the event loop's thread; its imports take 0.3 s from now on."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = _start()
        self._one_at_a_time = Lock()
        self._closed = False

    async def __call__(self, task: PlanTask) -> Planned:
        """As `perform`. PlanError as well where the process ended or took over `MOST_S`, twice,
        and after `close`. Who is cancelled does not wait; the plan is made to its end all the same.
        """
        return await asyncio.to_thread(self._ask, task)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        with self._one_at_a_time:
            self._end()

    def _ask(self, task: PlanTask) -> Planned:
        message = pickle.dumps(task)
        with self._one_at_a_time:
            for _ in range(_TRIES):
                if self._closed:
                    raise PlanError("shutting down: nothing is planned any more")
                try:
                    answer = self._exchange(message)
                except (OSError, EOFError, pickle.UnpicklingError):
                    self._end()
                else:
                    if isinstance(answer, Exception):
                        raise answer
                    planned: Planned = answer
                    return planned
        raise PlanError(
            "the process that makes plans ended twice by itself; the server's log says why"
        )

    def _exchange(self, message: bytes) -> Planned | Exception:
        """Raises OSError, EOFError and UnpicklingError when the process is no more."""
        if self._process is None:
            self._process = _start()
        sent, received = self._process.stdin, self._process.stdout
        assert sent is not None and received is not None
        limit = Timer(MOST_S, self._process.kill)
        limit.start()
        try:
            sent.write(message)
            sent.flush()
            answer: Planned | Exception = pickle.load(received)
        finally:
            limit.cancel()
        return answer

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    here = str(Path(paceline.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import work; work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        # A Ctrl-C is for the server, which then ends this.
        start_new_session=True,
    )


def work() -> None:
    """What the process does: task after task, until its input ends or it was idle for too long."""
    with contextlib.suppress(OSError):  # where that is not allowed, plans are made all the same
        # A server that runs at real-time priority would wait for this otherwise.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.nice(_NICE)
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever else is printed does not get between the answers.
    os.dup2(2, 1)
    while select.select([sys.stdin.buffer], [], [], IDLE_S)[0]:
        try:
            task: PlanTask = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(_answer(task), answers)
        answers.flush()


def _answer(task: PlanTask) -> Planned | Exception:
    try:
        return perform(task)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
