"""Simulated machines: how long batches take, what they answer, and how they fail.

A machine executes a batch for its profiled duration (times `slow`, plus noise) and answers what
the models say. Mishaps hit the next batches it starts. Invariant: every `Execute` is reported
back exactly once, as the engine does it - a hang by its timeout, a crash at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from paceline.core.errors import BackendError, ErrorKind
from paceline.core.model import ModelSpec
from paceline.core.ports import ModelCall
from paceline.core.profile import Durations
from paceline.core.tensor import Tensor
from paceline.core.values import value
from paceline.dispatch import BatchDone, BatchFailed, Event, Execute, MachineUp
from paceline.sim.stimuli import Mishap


class Models(Protocol):
    """What the simulated models are and answer."""

    @property
    def specs(self) -> Mapping[str, ModelSpec]:
        """Declarations by name."""
        ...

    def __call__(self, call: ModelCall, rows: int) -> tuple[Tensor, ...]:
        """The answer of a batch of that many rows, in the order of `call.outputs`."""
        ...


REFUSED_S = 0.001
"""How soon a machine that is gone refuses a batch."""


@dataclass(slots=True)
class SimMachine:
    """One machine. `share` below 1: it belongs to others for the rest of the time."""

    name: str
    hardware: str
    slots: int
    instances: Mapping[str, int]
    share: float = 1.0
    alive: bool = True
    withdrawn: bool = False
    slow: float = 1.0
    mishaps: deque[Mishap] = field(default_factory=deque)
    running: dict[int, Execute] = field(default_factory=dict)

    def up(self) -> MachineUp:
        """What the dispatcher is told when it can be used."""
        return MachineUp(self.name, self.hardware, self.slots, dict(self.instances))


@value
class Started:
    """A batch on its way: it ends at `at_s`; with an error, or as its models answer."""

    at_s: float
    machine: SimMachine
    action: Execute
    error: BackendError | None = None
    mishap: Mishap | None = None
    took_s: float = 0.0


class Backend:
    """All machines of a world."""

    def __init__(
        self,
        machines: Iterable[SimMachine],
        durations: Mapping[str, Mapping[str, Durations]],
        models: Models,
        *,
        rng: Random,
        noise: float = 0.0,
    ) -> None:
        """`durations` by model and hardware; `noise` is the largest relative deviation."""
        self.machines = {machine.name: machine for machine in machines}
        self._durations = durations
        self._models = models
        self._rng = rng
        self._noise = noise
        self._known_s: dict[tuple[str, str, int], float] = {}
        self.busy_s = dict.fromkeys(self.machines, 0.0)

    def add(self, machine: SimMachine) -> None:
        """One more machine; it is announced when it starts."""
        self.machines[machine.name] = machine
        self.busy_s[machine.name] = 0.0

    def start(self, action: Execute, now_s: float) -> Started:
        """A batch arrives at its machine."""
        machine = self.machines[action.machine]
        assert action.batch not in machine.running, (action.batch, machine.name)
        machine.running[action.batch] = action
        if not machine.alive:
            return Started(now_s + REFUSED_S, machine, action, _unreachable(machine))
        mishap = machine.mishaps.popleft() if machine.mishaps else None
        took_s = self._duration_s(machine, action)
        if mishap is Mishap.UNREACHABLE:
            return Started(now_s + REFUSED_S, machine, action, _unreachable(machine))
        hangs = mishap in (Mishap.HANG, Mishap.LOST_REPLY)
        if hangs or took_s > action.timeout_s:
            late = BackendError(
                f"deadline exceeded while waiting for {machine.name}", kind=ErrorKind.DEADLINE
            )
            return Started(now_s + action.timeout_s, machine, action, late, mishap, took_s)
        failed = None
        if mishap is Mishap.ERROR:
            failed = BackendError(f"model '{action.call.model}' failed")
        return Started(now_s + took_s, machine, action, failed, mishap, took_s)

    def finish(self, started: Started) -> Event | None:
        """A batch ends; None where its machine was lost before."""
        batch, machine = started.action.batch, started.machine
        if machine.running.pop(batch, None) is None:
            return None
        self.busy_s[machine.name] += started.took_s
        if started.error is not None:
            return BatchFailed(batch, started.error)
        outputs = self._models(started.action.call, started.action.rows)
        if started.mishap is not None:
            batches = self._models.specs[started.action.call.model].batches
            outputs = _spoiled(outputs, started.mishap, batches=batches)
        return BatchDone(batch, outputs)

    def crash(self, machine: SimMachine) -> list[Event]:
        """A machine dies: what it runs fails now."""
        lost: list[Event] = [
            BatchFailed(batch, _unreachable(machine)) for batch in sorted(machine.running)
        ]
        machine.alive = False
        machine.running.clear()
        machine.mishaps.clear()
        return lost

    def _duration_s(self, machine: SimMachine, action: Execute) -> float:
        key = (action.call.model, machine.hardware, action.rows)
        known_s = self._known_s.get(key)
        if known_s is None:
            known_s = self._durations[key[0]][key[1]].at(action.rows)
            self._known_s[key] = known_s
        if self._noise:
            known_s *= 1.0 + self._noise * (2.0 * self._rng.random() - 1.0)
        return known_s * machine.slow


def _unreachable(machine: SimMachine) -> BackendError:
    return BackendError(f"{machine.name} is not reachable", kind=ErrorKind.UNAVAILABLE)


def _spoiled(outputs: tuple[Tensor, ...], mishap: Mishap, *, batches: bool) -> tuple[Tensor, ...]:
    """What a broken model returns instead; consistent in itself, as the client checks that."""
    if mishap is Mishap.NOTHING or not outputs:
        return ()
    first = outputs[0]
    rows = first.shape[0] if first.shape else 0
    row_bytes = len(first.data) // rows if rows else 1
    if not batches:
        mishap = Mishap.NO_ROWS  # any number of items would be a fine answer
    match mishap:
        case Mishap.NO_ROWS:
            first = Tensor(first.name, first.datatype, (), bytes(first.data)[:row_bytes])
        case Mishap.ROW_SHORT:
            size = max(0, rows - 1)
            data = bytes(first.data)[: size * row_bytes]
            first = Tensor(first.name, first.datatype, (size, *first.shape[1:]), data)
        case _:
            data = bytes(first.data) + bytes(row_bytes)
            first = Tensor(first.name, first.datatype, (rows + 1, *first.shape[1:]), data)
    return (first, *outputs[1:])
