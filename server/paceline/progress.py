"""What `paceline serve` shows while it comes up: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from paceline.core.plan import Plan
from paceline.report import console, plan_report
from paceline.runtime.provisioning import Step
from paceline.serving import Events


class ServeProgress:
    """Turns the server's events into output on stderr."""

    def __init__(self, host: str, *, ready_fd: int | None = None) -> None:
        """`ready_fd`: a pipe of the supervisor's that is told when requests are served."""
        self._host = host
        self._ready_fd = ready_fd
        self._console: Console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._bars: dict[str, TaskID] = {}
        self._told: set[str] = set()
        self.events = Events(on_step=self._step, on_note=self._note, on_ready=self._ready)

    def __enter__(self) -> ServeProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _step(self, step: Step) -> None:
        text = f"loading {step.name}" if step.what == "load" else f"profiling {step.name}"
        if self._progress.disable:
            if (step.what == "load" or step.done == step.total) and text not in self._told:
                self._told.add(text)
                self._note(f"{text} ({step.done}/{step.total})")
            return
        # One bar for all loads; one for each model that is profiled.
        key = step.what if step.what == "load" else text
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(text, total=step.total)
        self._progress.update(
            self._bars[key], description=text, completed=step.done, total=step.total
        )

    def _note(self, text: str) -> None:
        # Not folded: a note is one line, also where it is longer than a table would be.
        self._console.print(f"paceline: {text}", markup=False, soft_wrap=True)

    def _ready(self, plan: Plan, grpc_port: int, http_port: int, priced: bool) -> None:
        self._progress.stop()
        if plan.chains:
            self._console.print(plan_report(plan, priced=priced))
        self._note(
            f"serving gRPC on {self._host}:{grpc_port}, "
            f"HTTP on {self._host}:{http_port}; Ctrl-C stops"
        )
        if self._ready_fd is not None:
            os.write(self._ready_fd, b"1")
            os.close(self._ready_fd)
