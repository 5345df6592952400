"""Residency: which models are in which machine's memory, decided; nothing is done here.

`handle` is the one door. Invariants: a machine's ledger never exceeds its budget (except where a
model turned out larger than believed; then nothing is loaded before that is made good); a model
is not unloaded from its last machine while a granted lease uses it; every lease whose request
wants its model is granted, refused or ended; a load or unload is reported back exactly once, and
reports of those that were forgotten (their machine went) change nothing.

`room.Room` decides what is loaded and what goes for it, `upkeep.Upkeep` what happens without being
asked for; this module keeps the books.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import count
from math import inf

from paceline.residency.events import (
    Action,
    ChainDown,
    ChainUp,
    Declare,
    Enter,
    Event,
    Forget,
    Grant,
    Leave,
    Load,
    LoadDone,
    LoadFailed,
    LoadHung,
    MachineDown,
    MachineUp,
    Moving,
    Pace,
    Passed,
    Reach,
    Recycle,
    Refuse,
    ServerMeasured,
    SizeMeasured,
    Tick,
    Unload,
    UnloadDone,
    UnloadStuck,
    Wake,
)
from paceline.residency.evict import Rate
from paceline.residency.leases import AGED_S, Lease, Leases
from paceline.residency.ledger import Footprint, Held, Ledger, Phase
from paceline.residency.state import (
    LOAD_WEIGHT,
    Change,
    Counts,
    Gone,
    Limits,
    Machine,
    Model,
    Worth,
)
from paceline.residency.upkeep import Upkeep

RECENT = 64
"""Unloads that are remembered, to be shown."""


class Residency:
    """See the module docstring."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.models: dict[str, Model] = {}
        self.machines: dict[str, Machine] = {}
        self.leases = Leases()
        self.counts = Counts()
        self.recent: deque[Gone] = deque(maxlen=RECENT)
        self.recycled_s: dict[str, float] = {}
        """When machines were restarted last."""
        self.unload_s = 0.0
        """Until a model that goes has given its memory back, learned."""
        self._ids = count(1)
        self._wanted: dict[str, None] = {}
        self._stuck = False
        """Something is waited for that is not being loaded: every event may change that."""
        self._attention = False
        self._idle_s = inf
        self._wake_s = inf
        self._room = Upkeep(self)

    def handle(self, event: Event, *, now_s: float) -> list[Action]:
        """Take one event in and return what to do about it, in order."""
        actions: list[Action] = []
        match event:
            case Enter():
                for lease in self.leases.enter(event, now_s):
                    self.models[lease.model].rate.count(now_s)
                    self._want(lease, actions)
            case Reach():
                reached = self.leases.get(event.request, event.model)
                if reached is not None:
                    reached.active += 1
                    if not reached.current:
                        reached.current, reached.since_s = True, now_s
                        self._want(reached, actions)
            case Passed():
                passed = self.leases.get(event.request, event.model)
                if passed is not None:
                    self._passed(passed, now_s, used=event.used)
            case Leave():
                for lease in self.leases.of_request(event.request):
                    self._ended(lease, now_s)
                self._attention = self.leases.over(event.request) or self._attention
            case Tick():
                self._wake_s, self._attention = inf, True
            case Moving():
                self._room.split(event, now_s, actions)
            case _:
                self._attention = True
                self._changed(event, now_s)
        if self._stuck or self._attention or now_s >= self._idle_s:
            self._serve(now_s, actions)
        self._schedule_wake(now_s, actions)
        return actions

    # -- what can be asked ------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether some request waits for a model that is not there."""
        return bool(self._wanted)

    def copies(self, model: str) -> list[str]:
        """Machines on which leases of it can be granted, by name."""
        return [name for name, m in sorted(self.machines.items()) if m.copy(model) is not None]

    def holders(self, model: str) -> list[str]:
        """Machines on which it is resident, closed or not, by name."""
        return [
            name
            for name, machine in sorted(self.machines.items())
            if (held := machine.ledger.get(model)) is not None and held.phase is Phase.RESIDENT
        ]

    def ready_in_s(self, model: str, now_s: float) -> float:
        """How long until a request that comes now could use it; 0 when it is there.

        Those that wait already go first; a load under way has only its rest to go.
        """
        if self.copies(model):
            return 0.0
        own_s = self.models[model].load_s
        for machine in self.machines.values():
            held = machine.ledger.get(model)
            if held is not None and held.phase is Phase.LOADING:
                return max(0.0, held.since_s + own_s - now_s)
        others_s = sum(
            self.models[other].load_s
            for other in self._wanted
            if other != model and not self._is_loading(other)
        )
        return own_s + others_s / self.limits.most_loads

    def loss(self, model: Model, now_s: float) -> float:
        """What the absence of a model costs, per second."""
        return model.loss(now_s, self.unload_s)

    # -- leases -----------------------------------------------------------------------------

    def _want(self, lease: Lease, actions: list[Action]) -> None:
        """A lease is new or became current."""
        there = self.has_copy_for(lease)
        if lease.current:
            if there:
                self.counts.hits += 1
                self._grant(lease, actions)
                return
            self.counts.misses += 1
        if not there:
            self._wanted[lease.model] = None
            self._stuck = self._stuck or not self._is_loading(lease.model)

    def has_copy_for(self, lease: Lease) -> bool:
        if lease.machine:
            machine = self.machines.get(lease.machine)
            return machine is not None and machine.copy(lease.model) is not None
        return any(m.copy(lease.model) is not None for m in self.machines.values())

    def waiting_for(self, model: str, machine: str) -> list[Lease]:
        """Leases of a model that have no copy, and for which one on that machine would do."""
        return [
            lease
            for lease in self.leases.of(model)
            if lease.machine in ("", machine) and not lease.granted and not self.has_copy_for(lease)
        ]

    def _is_resident_for(self, lease: Lease) -> bool:
        """Whether the lease can still be used, if not granted: also on a copy that is closed."""
        holders = self.holders(lease.model)
        return lease.machine in holders if lease.machine else bool(holders)

    def _grant(self, lease: Lease, actions: list[Action]) -> None:
        self.leases.grant(lease)
        actions.append(Grant(lease.request, lease.model))

    def grant_waiting(self, model: str, actions: list[Action]) -> None:
        """Grant what can be granted now that a copy is open."""
        for lease in self.leases.of(model):
            if lease.current and not lease.granted and self.has_copy_for(lease):
                self._grant(lease, actions)

    def refuse(self, lease: Lease, reason: str, actions: list[Action]) -> None:
        self.counts.refused += 1
        self.leases.drop(lease)
        self.leases.over(lease.request)  # what came for it may grow: `_serve` is under way
        actions.append(Refuse(lease.request, lease.model, reason))

    def _passed(self, lease: Lease, now_s: float, *, used: bool) -> None:
        """Between two uses a lease pins nothing: what comes between may need the room."""
        lease.uses -= 1
        lease.active -= used
        if lease.later_s:
            lease.latest_s = lease.later_s.pop(0)
        if not lease.uses:
            self._ended(lease, now_s)
        elif not lease.active and lease.current:
            lease.current = False
            if lease.granted:
                self.leases.revoke(lease)
            if not self.has_copy_for(lease):
                self._wanted[lease.model] = None

    def _ended(self, lease: Lease, now_s: float) -> None:
        self.leases.drop(lease)
        self._used(self.models[lease.model], now_s)

    def _used(self, model: Model, now_s: float) -> None:
        """Its keep-alive begins anew."""
        model.used_s, model.asleep = now_s, False
        self._notice_idle(model)

    def _notice_idle(self, model: Model) -> None:
        if model.keep_alive_s is not None and not model.asleep:
            self._idle_s = min(self._idle_s, model.used_s + model.keep_alive_s)

    # -- what else it is told ---------------------------------------------------------------

    def _changed(self, event: Event, now_s: float) -> None:
        match event:
            case Declare():
                self._declare(event, now_s)
            case Forget():
                if (model := self.models.get(event.model)) is not None:
                    model.withdrawn = True
            case MachineUp():
                self._machine_up(event, now_s)
            case MachineDown():
                self._machine_down(event.machine)
            case ChainUp():
                self._chain_up(event, now_s)
            case ChainDown():
                for model in self.models.values():
                    model.chains.pop(event.chain, None)
            case LoadDone():
                self._load_done(event, now_s)
            case LoadFailed():
                self._load_failed(event, now_s)
            case LoadHung():
                self._load_hung(event, now_s)
            case UnloadDone():
                gone = self.under_way(event.machine, event.model, event.operation)
                if gone is not None:
                    self.unload_s += LOAD_WEIGHT * (now_s - gone.since_s - self.unload_s)
                    self.machines[event.machine].ledger.freed(event.model)
            case UnloadStuck():
                if self.under_way(event.machine, event.model, event.operation) is not None:
                    self.machines[event.machine].ledger.leaked(event.model, now_s)
                    self.counts.leaks += 1
            case SizeMeasured():
                self._measured(event.model, event.own_bytes, event.blocks)
            case ServerMeasured():
                if (machine := self.machines.get(event.machine)) is not None:
                    machine.server_measured(event.size_bytes)
            case Pace():
                if (machine := self.machines.get(event.machine)) is not None:
                    machine.interference = event.interference
                    machine.bearable = event.bearable
            case _:
                raise AssertionError(f"nothing to do for {event!r}")

    def _declare(self, event: Declare, now_s: float) -> None:
        model = self.models.get(event.model)
        if model is None:
            model = Model(event.model, event.footprint, dict(event.instances), used_s=now_s)
            self.models[event.model] = model
        elif event.measured or not model.loads:
            model.footprint = event.footprint
        model.instances, model.withdrawn = dict(event.instances), False
        model.failures.clear()
        if event.load_s is not None and not model.loads:
            model.load_s = event.load_s

    def _machine_up(self, event: MachineUp, now_s: float) -> None:
        self._machine_down(event.machine)
        machine = Machine(event.machine, Ledger(event.budget_bytes), event.recyclable)
        self.machines[event.machine] = machine
        for name, instances in sorted(event.resident.items()):
            machine.ledger.adopt(name, self.models[name].footprint, instances, now_s)
            self._used(self.models[name], now_s)
        if event.fill:
            machine.fill = self._by_worth(now_s)

    def _machine_down(self, name: str) -> None:
        machine = self.machines.pop(name, None)
        if machine is None:
            return
        for held in machine.ledger.held():
            for lease in self.leases.of(held.model):
                if lease.granted and not self._is_resident_for(lease):
                    self.leases.revoke(lease)
                if not lease.granted and not self.has_copy_for(lease):
                    self._wanted[held.model] = None

    def _chain_up(self, event: ChainUp, now_s: float) -> None:
        before = {m.name for m in self.models.values() if m.chains.pop(event.chain, None)}
        for name, rate_rps in event.rates_rps.items():
            model = self.models[name]
            model.chains[event.chain] = Worth(rate_rps, event.priority, event.keep_alive_s)
            if name in before:  # another plan of the chain is no use of its models
                self._notice_idle(model)  # but may keep them for another time
            else:
                self._used(model, now_s)
            declared_rps = sum(worth.rate_rps for worth in model.chains.values())
            if model.rate.at(now_s) < declared_rps:
                model.rate = Rate(declared_rps, now_s)
        for machine in self.machines.values():
            machine.fill = self._by_worth(now_s)

    def _by_worth(self, now_s: float) -> list[str]:
        """Models to have, the greatest loss per byte first."""

        def rank(model: Model) -> tuple[float, str]:
            return (-self.loss(model, now_s) / max(1, model.footprint.alone_bytes()), model.name)

        models = (m for m in self.models.values() if not m.withdrawn and not m.asleep)
        return [model.name for model in sorted(models, key=rank)]

    def is_under_way(self, machine: str, model: str, operation: int) -> bool:
        """Whether that load or unload is still what is being done."""
        return self.under_way(machine, model, operation) is not None

    def under_way(self, machine: str, model: str, operation: int) -> Held | None:
        """What that operation is about; None when it is of a machine's earlier life."""
        found = self.machines.get(machine)
        held = found.ledger.get(model) if found is not None else None
        return held if held is not None and held.operation == operation else None

    def _load_done(self, event: LoadDone, now_s: float) -> None:
        held = self.under_way(event.machine, event.model, event.operation)
        if held is None:
            return
        machine, model = self.machines[event.machine], self.models[event.model]
        if held.phase is Phase.LOADING:
            model.learn_load(now_s - held.since_s, whole=held.whole)
            self.leases.came(event.model, self.waiting_for(event.model, event.machine))
            machine.ledger.loaded(event.model, now_s)
            self.counts.loads += 1
            self.counts.loaded_bytes += held.footprint.own_bytes * held.instances
            self._used(model, now_s)
        elif (change := machine.growing.pop(event.model, None)) is not None:
            machine.ledger.correct(event.model, held.footprint, change.after)
        held.operation = 0
        model.failures.pop(event.machine, None)
        if event.own_bytes is not None:
            self._measured(event.model, event.own_bytes, event.blocks)

    def _load_failed(self, event: LoadFailed, now_s: float) -> None:
        held = self.under_way(event.machine, event.model, event.operation)
        if held is None:
            return
        machine, model = self.machines[event.machine], self.models[event.model]
        self.counts.load_failures += 1
        if held.phase is Phase.LOADING:
            model.failed(event.machine, event.reason, now_s)
            machine.ledger.freed(event.model)
            return
        # Its instances could not be changed: it goes on with those it had.
        change = machine.growing.pop(event.model)
        held.operation = 0
        machine.ledger.correct(event.model, held.footprint, change.before)
        model.instances = {**model.instances, event.machine: change.before}

    def _load_hung(self, event: LoadHung, now_s: float) -> None:
        held = self.under_way(event.machine, event.model, event.operation)
        if held is None:
            return
        self.counts.load_failures += 1
        self.models[event.model].failed(event.machine, event.reason, now_s)
        self.machines[event.machine].growing.pop(event.model, None)
        self._room.hung.append((event.machine, event.model))

    def _measured(self, model: str, own_bytes: int, blocks: Mapping[str, int] | None) -> None:
        """The model is that large on every machine; where it is held, the ledger is corrected."""
        known = self.models.get(model)
        if known is None:
            return
        known.footprint = Footprint(own_bytes, known.footprint.blocks if blocks is None else blocks)
        for machine in self.machines.values():
            if (held := machine.ledger.get(model)) is not None:
                machine.ledger.correct(model, known.footprint, held.instances)

    # -- decisions --------------------------------------------------------------------------

    def _serve(self, now_s: float, actions: list[Action]) -> None:
        room = self._room
        room.unload_hung(now_s, actions)
        if now_s >= self._idle_s:
            self._idle_s = room.unload_idle(now_s, actions)
        room.unload_withdrawn(now_s, actions)
        room.relieve(now_s, actions)
        room.meet(list(self._wanted), now_s, actions)
        room.recycle(now_s, actions)
        self._wanted = {m: None for m in self._wanted if room.waits(m)}
        room.fill(now_s, actions)
        self._wanted = {m: None for m in self._wanted if room.waits(m)}
        self._stuck = not all(self._is_loading(model) for model in self._wanted)
        self._attention = any(
            m.fill or m.recycling or m.ledger.over_bytes for m in self.machines.values()
        ) or any(m.withdrawn and self.holders(name) for name, m in self.models.items())

    def _schedule_wake(self, now_s: float, actions: list[Action]) -> None:
        """For what time alone changes: idle models, leases that age, loads held back, retries."""
        at_s = self._idle_s
        if self._wanted:
            at_s = min(at_s, now_s + min(self.limits.held_s, AGED_S) / 2)
        if at_s < self._wake_s:
            self._wake_s = at_s
            actions.append(Wake(at_s))

    def _is_loading(self, model: str) -> bool:
        return any(
            (held := m.ledger.get(model)) is not None and held.phase is Phase.LOADING
            for m in self.machines.values()
        )

    # -- performed by `Room` ----------------------------------------------------------------

    def load(
        self, machine: Machine, model: Model, instances: int, now_s: float, actions: list[Action]
    ) -> None:
        """Begin a load, which fits."""
        operation = next(self._ids)
        machine.ledger.begin_load(model.name, model.footprint, instances, operation, now_s)
        actions.append(Load(operation, machine.name, model.name, instances))

    def resize(self, machine: Machine, held: Held, instances: int, actions: list[Action]) -> None:
        """Change a resident model's instances in place; growth fits, and counts at once."""
        held.operation = operation = next(self._ids)
        machine.growing[held.model] = Change(held.instances, instances)
        machine.ledger.correct(held.model, held.footprint, max(instances, held.instances))
        actions.append(Load(operation, machine.name, held.model, instances))

    def unload(
        self, machine: Machine, model: str, why: str, now_s: float, actions: list[Action]
    ) -> None:
        """Begin an unload."""
        operation = next(self._ids)
        size_bytes = machine.ledger.freed_bytes([model])
        machine.ledger.begin_unload(model, operation, now_s)
        if self.leases.any(model):
            self._wanted[model] = None
        self.counts.unloads += 1
        self.recent.append(Gone(now_s, machine.name, model, size_bytes, why))
        actions.append(Unload(operation, machine.name, model, why))

    def restart(self, machine: Machine, now_s: float, actions: list[Action]) -> None:
        """Begin a restart of a machine."""
        machine.asked = True
        self.recycled_s[machine.name] = now_s
        self.counts.recycles += 1
        actions.append(Recycle(machine.name, machine.recycling))
