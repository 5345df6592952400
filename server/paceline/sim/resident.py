"""A world whose machines have not room for every model: residency in virtual time.

The real `Residency` decides; loads and unloads take their time here, and can fail, hang, never end
or show that a model takes twice what was believed. Invariant: a machine executes a model only
while it is loaded there, and unloads it only after its last batch; who restarts, restarts empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import count
from typing import Any, Protocol

from paceline.core.errors import BackendError, ErrorKind
from paceline.dispatch import (
    Abort,
    Action,
    Entered,
    Event,
    InstallChain,
    MachineDown,
    Passed,
    Reached,
    RemoveChain,
    TooCold,
)
from paceline.dispatch import Answer as Answered
from paceline.dispatch import Cancel as Cancelled
from paceline.dispatch import Fail as Failed
from paceline.residency import events as ev
from paceline.residency.ledger import Footprint
from paceline.residency.residency import Residency
from paceline.residency.state import Limits
from paceline.runtime.needs import needs
from paceline.sim.backend import SimMachine
from paceline.sim.stimuli import Crash, Happen, Resize, Start, Stimulus, Withdraw
from paceline.sim.world import World


class LoadMishap(Enum):
    """What can happen to a load or an unload."""

    FAIL = "the load fails"
    HANG = "the load never ends"
    STUCK = "the unload never ends"


@dataclass(frozen=True, slots=True)
class SimModel:
    """What a model really takes, and is believed to take before it was measured."""

    own_bytes: int
    believed_bytes: int
    load_s: float
    unload_s: float
    blocks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """Budgets by machine, models by name; what goes wrong next, by machine."""

    budgets: Mapping[str, int]
    models: Mapping[str, SimModel]
    instances: Mapping[str, Mapping[str, int]]
    mishaps: Mapping[str, Sequence[LoadMishap]] = field(default_factory=dict)
    patience_s: float = 5.0
    """How long a load or unload may take before it counts as hanging."""
    restart_s: float = 1.0
    limits: Limits = field(default_factory=Limits)


class MemoryObserver(Protocol):
    """Sees every event residency is told, with the actions it led to."""

    def __call__(self, now_s: float, event: ev.Event, actions: Sequence[ev.Action]) -> None: ...


class ResidentWorld(World):
    """See the module docstring."""

    def __init__(
        self,
        machines: Iterable[SimMachine],
        *arguments: Any,
        memory: Memory,
        residency: Residency | None = None,
        watchers: Sequence[MemoryObserver] = (),
        observers: Sequence[Any] = (),
        on_made: Callable[[ResidentWorld], None] | None = None,
        **options: Any,
    ) -> None:
        """As `World`; machines begin without models, whatever instances they were given.

        `on_made` is shown the world before residency is told anything.
        """
        self.memory = memory
        self.residency = residency or Residency(memory.limits)
        self.loaded: dict[str, dict[str, int]] = {name: {} for name in memory.budgets}
        """Instances of the models that really are in memory, by machine."""
        self._watchers = tuple(watchers)
        self._mishaps = {name: deque(found) for name, found in memory.mishaps.items()}
        self._lives = dict.fromkeys(memory.budgets, 0)
        self._leaving: dict[tuple[str, str], ev.Unload] = {}
        self._restarting: set[str] = set()
        self._wishes: dict[int, str] = {}
        self._ids = count(-1, -1)
        self._inbox: deque[Action | Event] = deque()
        self._busy = False
        self._tick = 0
        self._due_s = 0.0
        """When what is being looked at should have come."""
        found = list(machines)
        for machine in found:
            machine.instances = {}
        super().__init__(found, *arguments, observers=(*observers, self._overhear), **options)
        self.dispatcher.lease(self._ready_in_s)
        if on_made is not None:
            on_made(self)
        for name, model in sorted(memory.models.items()):
            wanted = {m: held[name] for m, held in memory.instances.items() if name in held}
            footprint = Footprint(model.believed_bytes, model.blocks)
            self._tell(ev.Declare(name, footprint, wanted, model.load_s))
        for machine in found:
            if machine.alive:
                self._tell(self._up(machine.name))

    def _ready_in_s(self, model: str, now_s: float) -> float:
        return self.residency.ready_in_s(model, now_s)

    # -- from the dispatcher ----------------------------------------------------------------

    def _overhear(
        self, due_s: float, now_s: float, event: Event, actions: Sequence[Action]
    ) -> None:
        """What is said about models, in order; looked at when the actions have been performed."""
        if isinstance(event, InstallChain | RemoveChain | Cancelled):
            self._inbox.append(event)
        self._inbox.extend(
            a
            for a in actions
            if isinstance(a, Entered | Reached | Passed | TooCold | Answered | Failed)
        )

    def _handle(self, due_s: float, event: Event, *, settled: bool = True) -> None:
        self._due_s = due_s
        super()._handle(due_s, event, settled=settled)
        self._drain()

    def _drain(self) -> None:
        if self._busy:
            return
        self._busy = True
        while self._inbox:
            self._hear(self._inbox.popleft())
        self._busy = False
        for unload in [u for u in self._leaving.values() if not self._runs(u.machine, u.model)]:
            self._go(unload)

    def _hear(self, said: Action | Event) -> None:
        match said:
            case Entered():
                wanted = needs(said.modules)
                self._tell(ev.Enter(said.request, wanted, said.deadline_s, said.priority))
            case Reached():
                self._tell(ev.Reach(said.request, said.model))
            case Passed():
                self._tell(ev.Passed(said.request, said.model, said.used))
            case Answered() | Failed() | Cancelled():
                self._tell(ev.Leave(said.request))
            case TooCold():
                for model in said.models:
                    waited_for = model in self._wishes.values()
                    if not waited_for and not self.residency.leases.any(model):
                        number = next(self._ids)
                        self._wishes[number] = model
                        self._tell(ev.Enter(number, (ev.Need(model),)))
            case InstallChain():
                rates = {m.model: m.rate_rps for m in said.route.modules}
                chain = said.route.bound.chain
                self._tell(ev.ChainUp(chain.name, rates, chain.priority, chain.keep_alive_s))
            case RemoveChain():
                self._tell(ev.ChainDown(said.chain))

    def _runs(self, machine: str, model: str) -> bool:
        running = self.backend.machines[machine].running.values()
        return any(action.call.model == model for action in running)

    # -- to and from residency --------------------------------------------------------------

    def _tell(self, event: ev.Event) -> None:
        actions = self.residency.handle(event, now_s=self.now_s)
        for watcher in self._watchers:
            watcher(self.now_s, event, actions)
        for action in actions:
            match action:
                case ev.Load():
                    self._load(action)
                case ev.Unload():
                    self._place(action.machine, action.model, 0)
                    self._leaving[action.machine, action.model] = action
                    if not self._runs(action.machine, action.model):
                        self._go(action)
                case ev.Recycle():
                    self._restart(action.machine)
                case ev.Grant() if self._wishes.pop(action.request, None) is not None:
                    self._later(0.0, partial(self._tell, ev.Leave(action.request)))
                case ev.Refuse() if self._wishes.pop(action.request, None) is None:
                    error = BackendError(action.reason, kind=ErrorKind.UNAVAILABLE)
                    abort = Abort(action.request, error)
                    self._later(0.0, partial(self._abort, abort))
                case ev.Wake():
                    self._tick += 1
                    self._push_happen(action.at_s, partial(self._ticked, self._tick))

    def _abort(self, abort: Abort) -> None:
        self._handle(self._due_s, abort)

    def _ticked(self, tick: int) -> None:
        if tick == self._tick:
            self._tell(ev.Tick())

    def _later(self, after_s: float, do: Any) -> None:
        self._push_happen(self.now_s + after_s, do)

    def _push_happen(self, at_s: float, do: Any) -> None:
        self._push(at_s, Happen(at_s, do))

    def _mishap(self, machine: str, *kinds: LoadMishap) -> LoadMishap | None:
        """The next thing that goes wrong there, if it is of this kind."""
        waiting = self._mishaps.get(machine)
        return waiting.popleft() if waiting and waiting[0] in kinds else None

    def _is_dead(self, machine: str) -> bool:
        """Died, though residency may not have heard of it: what it is asked for does not happen."""
        return not self.backend.machines[machine].alive

    def _load(self, action: ev.Load) -> None:
        name, model = action.machine, self.memory.models[action.model]
        mishap = self._mishap(name, LoadMishap.FAIL, LoadMishap.HANG)
        if self._is_dead(name):
            mishap = LoadMishap.FAIL
        if action.model not in self.loaded[name] and mishap is not LoadMishap.FAIL:
            self.loaded[name][action.model] = action.instances
        after_s = self.memory.patience_s if mishap is LoadMishap.HANG else model.load_s
        end = partial(self._load_ended, action, self._lives[name], mishap)
        self._later(after_s, end)

    def _load_ended(self, action: ev.Load, life: int, mishap: LoadMishap | None) -> None:
        name, model = action.machine, action.model
        if life != self._lives[name]:
            return
        known = (action.operation, name, model)
        if mishap is LoadMishap.HANG:
            self._tell(ev.LoadHung(*known, "not ready in time"))
        elif mishap is LoadMishap.FAIL:
            self._tell(ev.LoadFailed(*known, "it does not load"))
        elif self.residency.is_under_way(name, model, action.operation):
            self.loaded[name][model] = action.instances
            self._tell(ev.LoadDone(*known, self.memory.models[model].own_bytes))
            if self.residency.machines[name].ledger.get(model) is not None:
                self._place(name, model, action.instances)

    def _place(self, name: str, model: str, instances: int) -> None:
        """Have the dispatcher use that many instances, unless it is about to go."""
        machine = self.backend.machines[name]
        placed = {m: n for m, n in machine.instances.items() if m != model}
        if instances and (name, model) not in self._leaving:
            placed[model] = instances
        machine.instances = dict(sorted(placed.items()))
        if machine.alive and not machine.withdrawn and name not in self._restarting:
            self._handle(self._due_s, machine.up())

    def _go(self, action: ev.Unload) -> None:
        """No batch of it runs any more: it is unloaded."""
        name = action.machine
        if self._leaving.get((name, action.model)) is not action:
            return
        del self._leaving[name, action.model]
        stuck = self._mishap(name, LoadMishap.STUCK) or self._is_dead(name)
        after_s = self.memory.patience_s if stuck else self.memory.models[action.model].unload_s
        self._later(after_s, partial(self._gone, action, self._lives[name], bool(stuck)))

    def _gone(self, action: ev.Unload, life: int, stuck: bool) -> None:
        if life != self._lives[action.machine]:
            return
        if stuck:
            self._tell(ev.UnloadStuck(action.operation, action.machine, action.model))
            return
        del self.loaded[action.machine][action.model]
        self._tell(ev.UnloadDone(action.operation, action.machine, action.model))

    # -- machines that come and go ----------------------------------------------------------

    def _up(self, name: str) -> ev.MachineUp:
        return ev.MachineUp(name, self.memory.budgets[name], recyclable=True)

    def _emptied(self, name: str) -> None:
        """Whatever it held is gone, and nobody hears any more of what was being done there."""
        self._lives[name] += 1
        self.loaded[name].clear()
        self._leaving = {key: u for key, u in self._leaving.items() if key[0] != name}
        self.backend.machines[name].instances = {}

    def _restart(self, name: str) -> None:
        """As the runtime does it: what runs ends first."""
        machine = self.backend.machines[name]
        if machine.running:
            self._later(0.01, partial(self._restart_if, name, self._lives[name]))
            return
        self._restarting.add(name)
        self._emptied(name)
        self._handle(self._due_s, MachineDown(name))
        self._tell(ev.MachineDown(name))
        self._later(self.memory.restart_s, partial(self._restarted, name, self._lives[name]))

    def _restart_if(self, name: str, life: int) -> None:
        if life == self._lives[name]:
            self._restart(name)

    def _restarted(self, name: str, life: int) -> None:
        if life == self._lives[name]:
            self._started(name)

    def _started(self, name: str) -> None:
        self._restarting.discard(name)
        self._emptied(name)
        self._tell(self._up(name))
        machine = self.backend.machines[name]
        if machine.alive and not machine.withdrawn:
            self._handle(self._due_s, machine.up())

    def _stimulate(self, due_s: float, item: Stimulus | Event) -> None:
        self._due_s = due_s
        machines = self.backend.machines
        match item:
            case Crash():
                self._emptied(item.machine)
                self._restarting.discard(item.machine)
                super()._stimulate(due_s, item)
            case Withdraw():
                super()._stimulate(due_s, item)
                self._emptied(item.machine)
                self._restarting.discard(item.machine)
                self._tell(ev.MachineDown(item.machine))
            case MachineDown():
                super()._stimulate(due_s, item)
                if not machines[item.machine].alive:
                    self._tell(ev.MachineDown(item.machine))
            case Start():
                machine = machines[item.machine]
                if machine.alive and not machine.withdrawn:
                    machine.slow = 1.0
                    return
                machine.alive, machine.withdrawn, machine.slow = True, False, 1.0
                self._started(item.machine)
            case Resize():
                machine = machines[item.machine]
                machine.slots = item.slots
                if machine.alive and not machine.withdrawn:
                    self._place(item.machine, "", 0)
            case _:
                super()._stimulate(due_s, item)
