"""A world in virtual time around the real dispatcher: no event loop, no sleeping, no wall clock.

`World` holds a heap of what is due - stimuli from outside, ends of batches, the one wake-up the
dispatcher asked for - and steps from one to the next, feeding events to `Dispatcher.handle` and
performing its actions as `runtime.engine` does. Invariant: a run is a function of the machines,
the stimuli and the seed; `EventLog` shows it byte for byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from random import Random
from typing import Protocol
from zlib import crc32

from paceline.core.profile import Durations
from paceline.dispatch import (
    Action,
    Answer,
    BatchDone,
    BatchFailed,
    Broken,
    Cancel,
    Dispatcher,
    Event,
    Execute,
    Fail,
    InstallChain,
    MachineDown,
    MachineUp,
    Partial,
    RemoveChain,
    Settled,
    Submit,
    Tick,
    Wake,
)
from paceline.sim.backend import Backend, Models, SimMachine, Started
from paceline.sim.stimuli import (
    Arrive,
    ClockJump,
    Crash,
    Fault,
    GiveUp,
    Happen,
    Install,
    Remove,
    Resize,
    Slow,
    Start,
    Stimulus,
    Withdraw,
)

INSTANT_S = 1e-6
MOST_AT_ONCE = 10_000
"""Events within `INSTANT_S` after which the world is said to have stopped."""


class StandstillError(AssertionError):
    """Time does not go on: the dispatcher asks to be woken again and again at once."""


class Observer(Protocol):
    """Sees every event with the actions it led to; `due_s` is when it should have come."""

    def __call__(
        self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]
    ) -> None: ...


class World:
    """See the module docstring."""

    def __init__(
        self,
        machines: Iterable[SimMachine],
        durations: Mapping[str, Mapping[str, Durations]],
        models: Models,
        *,
        seed: int = 0,
        noise: float = 0.0,
        settle_s: float | None = None,
        dispatcher: Dispatcher | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """`durations` by model and hardware. Machines are announced when they are there.

        `settle_s`: how long the engine collects requests and results before it launches batches
        (None: every event is settled by itself).
        """
        self.dispatcher = dispatcher or Dispatcher()
        self.backend = Backend(
            machines,
            durations,
            models,
            rng=Random(seed),
            noise=noise,
        )
        self.now_s = 0.0
        self.events = 0
        self._settle_s = settle_s
        self._settling = False
        self._observers = tuple(observers)
        self._due: list[tuple[float, int, Stimulus | Started | Event]] = []
        self._seq = 0
        self._wake: tuple[float, int] | None = None
        self._open: set[int] = set()
        for machine in self.backend.machines.values():
            if machine.alive:
                self._handle(0.0, machine.up())

    def run(self, stimuli: Iterable[Stimulus] = (), *, until_s: float = inf) -> None:
        """Go on until nothing is due any more, or to `until_s`."""
        for stimulus in stimuli:
            self._push(stimulus.at_s, stimulus)
        due, since_s, events = self._due, self.now_s, self.events
        while due and due[0][0] <= until_s:
            due_s, seq, item = heapq.heappop(due)
            if due_s > self.now_s:
                self.now_s = due_s
                if due_s > since_s + INSTANT_S:
                    since_s, events = due_s, self.events
            if self.events - events > MOST_AT_ONCE:
                raise StandstillError(f"{MOST_AT_ONCE} events between {since_s} and {due_s}")
            self._step(due_s, seq, item)

    def run_stream(self, stimuli: Iterable[Stimulus]) -> None:
        """As `run`, with stimuli in order of time that are drawn only when they are due."""
        for stimulus in stimuli:
            self._push(stimulus.at_s, stimulus)
            self.run(until_s=stimulus.at_s)
        self.run()

    def _step(self, due_s: float, seq: int, item: Stimulus | Started | Event) -> None:
        if isinstance(item, Started):
            self._finish(due_s, item)
        elif isinstance(item, MachineUp):
            machine = self.backend.machines[item.machine]
            if machine.alive and not machine.withdrawn:
                self._handle(due_s, item)
        elif isinstance(item, Arrive):
            self._arrive(due_s, item)
        elif isinstance(item, Tick):
            if self._wake == (due_s, seq):
                self._wake = None
                self._handle(due_s, item)
        elif isinstance(item, Settled):
            self._settling = False
            self._handle(due_s, item)
        else:
            self._stimulate(due_s, item)

    def _push(self, at_s: float, item: Stimulus | Started | Event) -> None:
        self._seq += 1
        heapq.heappush(self._due, (at_s, self._seq, item))

    def _handle_soon(self, due_s: float, event: Event) -> None:
        """As the engine: what comes at about the same time is launched together."""
        if self._settle_s is None or self.dispatcher.in_flight == 0:
            self._handle(due_s, event)
            return
        self._handle(due_s, event, settled=False)
        if not self._settling:
            self._settling = True
            self._push(self.now_s + self._settle_s, Settled())

    def _handle(self, due_s: float, event: Event, *, settled: bool = True) -> None:
        now_s = self.now_s
        self.events += 1
        actions = self.dispatcher.handle(event, now_s=now_s, settled=settled)
        for observer in self._observers:
            observer(due_s, now_s, event, actions)
        for action in actions:
            match action:
                case Execute():
                    started = self.backend.start(action, now_s)
                    self._push(started.at_s, started)
                case Answer() | Fail():
                    self._open.discard(action.request)
                case Wake():
                    # The engine keeps one timer: a later Wake replaces the one before.
                    at_s = max(action.at_s, now_s)
                    self._push(at_s, Tick())
                    self._wake = (at_s, self._seq)

    def _finish(self, due_s: float, started: Started) -> None:
        event = self.backend.finish(started)
        if event is None:
            return
        machine = started.machine
        if machine.share < 1.0 and not machine.withdrawn:
            # The rest of its time belongs to others: it is back when its share is right again.
            rests = MachineUp(machine.name, machine.hardware, 0, machine.instances)
            self._handle(due_s, rests, settled=False)
            rest_s = started.took_s * (1.0 - machine.share) / machine.share
            self._push(self.now_s + rest_s, machine.up())
        if isinstance(event, BatchDone):
            self._handle_soon(due_s, event)
        else:
            self._handle(due_s, event)

    def _arrive(self, due_s: float, arrival: Arrive) -> None:
        self._open.add(arrival.request)
        submit = Submit(
            arrival.request,
            arrival.chain,
            arrival.inputs,
            self.now_s + arrival.budget_s,
            outputs=arrival.outputs,
            priority=arrival.priority,
            version=arrival.version,
            parameters=arrival.parameters,
            stream=arrival.stream,
        )
        self._handle_soon(due_s, submit)

    def _stimulate(self, due_s: float, item: Stimulus | Event) -> None:
        machines = self.backend.machines
        match item:
            case GiveUp():
                if item.request in self._open:
                    self._open.discard(item.request)
                    self._handle(due_s, Cancel(item.request))
            case Crash():
                for event in self.backend.crash(machines[item.machine]):
                    self._handle(due_s, event)
                self._push(due_s + item.notice_s, MachineDown(item.machine))
            case Withdraw():
                machines[item.machine].withdrawn = True
                self._handle(due_s, MachineDown(item.machine))
            case Start():
                machine = machines[item.machine]
                machine.alive, machine.withdrawn, machine.slow = True, False, 1.0
                self._handle(due_s, machine.up())
            case Resize():
                machine = machines[item.machine]
                machine.slots, machine.instances = item.slots, dict(item.instances)
                if machine.alive:
                    self._handle(due_s, machine.up())
            case Slow():
                machines[item.machine].slow = item.factor
            case Fault():
                machines[item.machine].mishaps.extend([item.mishap] * item.count)
            case ClockJump():
                self.now_s += item.by_s
            case Happen():
                item.do()
            case Install():
                self._handle(due_s, InstallChain(item.route))
            case Remove():
                self._handle(due_s, RemoveChain(item.chain))
            case MachineDown():
                if not machines[item.machine].alive:
                    self._handle(due_s, item)
            case _:
                raise AssertionError(f"nothing to do for {item!r}")


class EventLog:
    """An observer that writes everything down, a line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]) -> None:
        late = f" (due {due_s:.9f})" if due_s < now_s else ""
        self.lines.append(f"{now_s:.9f}{late} {_told(event)}")
        self.lines += [f"    -> {_wanted(action)}" for action in actions]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def _told(event: Event) -> str:
    match event:
        case Submit():
            rest = f" outputs={','.join(event.outputs)}" if event.outputs else ""
            rest += f" priority={event.priority}" if event.priority is not None else ""
            return f"submit {event.request} {event.chain} deadline={event.deadline_s:.9f}{rest}"
        case Cancel():
            return f"cancel {event.request}"
        case BatchDone():
            shapes = " ".join(f"{t.name}{list(t.shape)}" for t in event.outputs)
            digest = crc32(b"".join(t.data for t in event.outputs))
            return f"batch {event.batch} done {shapes} {digest:08x}"
        case BatchFailed():
            return f"batch {event.batch} failed: {event.error.kind.value}: {event.error}"
        case Tick() | Settled():
            return type(event).__name__.lower()
        case InstallChain():
            sizes = {m.bound.name: dict(m.batch_sizes) for m in event.route.modules}
            return f"install {event.route.bound.name} {sizes}"
        case RemoveChain():
            return f"remove {event.chain}"
        case MachineUp():
            instances = dict(sorted(event.instances.items()))
            return f"up {event.machine} {event.hardware} slots={event.slots} {instances}"
        case MachineDown():
            return f"down {event.machine}"
        case _:
            return repr(event)


def _wanted(action: Action) -> str:
    match action:
        case Execute():
            call = action.call
            digest = crc32(b"".join(part for tensor in call.inputs for part in tensor.parts))
            shapes = " ".join(f"{tensor.name}{list(tensor.shape)}" for tensor in call.inputs)
            return (
                f"execute {action.batch} on {action.machine}: {call.model} rows={action.rows} "
                f"{shapes} {digest:08x}"
            )
        case Answer():
            digest = crc32(b"".join(tensor.data for tensor in action.outputs))
            met = "" if action.timeline.met else " (late)"
            return f"answer {action.request} {digest:08x}{met}"
        case Fail():
            return f"fail {action.request}: {action.error.kind.value}: {action.error}"
        case Partial():
            digest = crc32(b"".join(tensor.data for tensor in action.outputs))
            shapes = " ".join(f"{tensor.name}{list(tensor.shape)}" for tensor in action.outputs)
            return f"partial {action.request} from {action.start}: {shapes} {digest:08x}"
        case Broken():
            return f"broken {action.model} on {action.machine}: {action.reason}"
        case Wake():
            return f"wake at {action.at_s:.9f}"
        case _:
            return repr(action)
