"""Memory in the swarm: what a seed draws of it, and the oracle that watches it.

`MemoryOracle` keeps its own ledger of what residency was told and asked for. The checks:

    memory     bytes loading, resident, unloading and leaked never exceed a machine's budget, unless
               a model turned out larger than believed; then nothing is loaded before that is good
    lease      a model is unloaded only where no batch of it runs and nobody was granted its use
               who could not use it on another machine
    answered   whoever wants a model is granted it or refused once, or ends
    first      a model that somebody waits for comes with one instance, and gets others only when
               one of those who waited is over
    drained    in the end no lease is left, and nothing is being loaded or unloaded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from tests.simulation.book import Violation

from paceline.residency import events as ev
from paceline.residency.state import Limits
from paceline.sim.resident import LoadMishap, Memory, ResidentWorld, SimModel
from paceline.sim.world import EventLog

BLOCKS = {"trunk": 30, "neck": 12}


def draw_memory(
    seed: int, instances: Mapping[str, Mapping[str, int]], models: Sequence[str]
) -> Memory | None:
    """A quarter of the seeds have too little memory. `instances` by machine are those wanted."""
    rng = Random(f"memory {seed}")
    if rng.random() >= 0.25:
        return None
    faults = rng.random() < 0.6
    sizes: dict[str, SimModel] = {}
    for name in models:
        own = rng.randint(5, 60)
        wrong = rng.choice((0.5, 1.0, 2.0)) if faults else 1.0
        blocks = {key: BLOCKS[key] for key in BLOCKS if rng.random() < 0.3}
        load_s, unload_s = rng.choice((0.05, 0.3, 1.0)), rng.choice((0.0, 0.05, 0.5))
        sizes[name] = SimModel(own, max(1, int(own * wrong)), load_s, unload_s, blocks)
    needed = {
        name: max(model.own_bytes, model.believed_bytes) + sum(model.blocks.values())
        for name, model in sizes.items()
    }
    share = rng.choice((0.0, 0.3, 0.5, 0.8, 1.5))
    budget = max(*needed.values(), int(share * sum(needed.values())))
    kinds = (*LoadMishap, LoadMishap.FAIL)
    return Memory(
        budgets=dict.fromkeys(instances, budget),
        models=sizes,
        instances=instances,
        mishaps={
            name: [rng.choice(kinds) for _ in range(rng.choice((0, 1, 3)))] if faults else []
            for name in instances
        },
        limits=Limits(
            most_loads=rng.choice((1, 2, 4)), eviction=rng.choice(("cost", "cost", "lru"))
        ),
    )


def is_calm(memory: Memory | None) -> bool:
    """Whether nothing goes wrong with memory."""
    return memory is None or (
        not any(memory.mishaps.values())
        and all(m.own_bytes == m.believed_bytes for m in memory.models.values())
    )


class MemoryLog:
    """A watcher that writes what residency is told and wants into an event log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def __call__(self, now_s: float, event: ev.Event, actions: Sequence[ev.Action]) -> None:
        self._log.lines.append(f"{now_s:.9f} residency: {event}")
        self._log.lines += [f"    -> {action}" for action in actions]


class MemoryOracle:
    """See the module docstring."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._own = {name: model.believed_bytes for name, model in memory.models.items()}
        self._held: dict[str, dict[str, int]] = {}
        self._going: dict[str, set[str]] = {}
        self._coming: dict[str, dict[str, tuple[int, int]]] = {}
        """Instances of what is being loaded, before and after."""
        self._awaited: dict[str, set[int]] = {}
        """Who waited for a model that had come nowhere else, none of whom is over."""
        self._wants: dict[tuple[int, str], str] = {}
        self.world: ResidentWorld | None = None

    def __call__(self, now_s: float, event: ev.Event, actions: Sequence[ev.Action]) -> None:
        self._told(event)
        for action in actions:
            match action:
                case ev.Load():
                    self._load(action)
                case ev.Unload():
                    self._unload(action)
                case ev.Grant() | ev.Refuse():
                    key = (action.request, action.model)
                    self._require(
                        self._wants.get(key) == "now", "answered", f"{action}: {self._wants}"
                    )
                    self._wants[key] = "granted"
                    if isinstance(action, ev.Refuse):
                        del self._wants[key]
                        self._over(action.request)

    def watch(self, world: ResidentWorld) -> None:
        """The world it looks at, before anything happens there."""
        self.world = world

    def finish(self) -> None:
        """After the last event."""
        assert self.world is not None
        left = len(self.world.residency.leases)
        self._require(not left, "drained", f"{left} leases are left")
        self._require(not self._wants, "drained", f"wanted for ever: {self._wants}")
        for name, machine in self.world.residency.machines.items():
            told = {held.model for held in machine.ledger.held()}
            really = set(self.world.loaded[name])
            self._require(told == really, "drained", f"{name} holds {really}, told {told}")
            self._require(machine.loading == 0, "drained", f"{name} is still loading")

    def _told(self, event: ev.Event) -> None:
        match event:
            case ev.Enter():
                for need in event.needs:
                    self._wants.setdefault((event.request, need.model), "later")
                    if need.in_s <= 0.0:
                        self._wants[event.request, need.model] = "now"
            case ev.Reach():
                if self._wants.get((event.request, event.model)) == "later":
                    self._wants[event.request, event.model] = "now"
            case ev.Passed():
                self._settle()
            case ev.Leave():
                self._settle()
                self._over(event.request)
            case ev.MachineUp():
                self._lost(event.machine)
                self._held[event.machine] = {}
                self._going[event.machine], self._coming[event.machine] = set(), {}
            case ev.MachineDown():
                self._lost(event.machine)
            case ev.LoadDone():
                if event.model in self._coming.get(event.machine, {}):
                    before, after = self._coming[event.machine].pop(event.model)
                    self._held[event.machine][event.model] = after
                    if not before:
                        self._came(event.machine, event.model)
                    if event.own_bytes is not None:
                        self._own[event.model] = event.own_bytes
            case ev.LoadFailed():
                if event.machine in self._held:
                    before, _ = self._coming[event.machine].pop(event.model, (0, 0))
                    self._held[event.machine].pop(event.model, None)
                    if before:
                        self._held[event.machine][event.model] = before
            case ev.UnloadDone():
                if event.machine in self._held:
                    self._held[event.machine].pop(event.model, None)
                    self._going[event.machine].discard(event.model)

    def _lost(self, machine: str) -> None:
        """Whoever was granted what only this machine held may be granted again, elsewhere."""
        lost = self._held.pop(machine, {})
        for (request, model), state in self._wants.items():
            elsewhere = any(self._serves(name, model) for name in self._held)
            if state == "granted" and model in lost and not elsewhere:
                self._wants[request, model] = "now"

    def _settle(self) -> None:
        """Leases that are over, by residency's own table."""
        assert self.world is not None
        for request, model in list(self._wants):
            lease = self.world.residency.leases.get(request, model)
            if lease is None:
                del self._wants[request, model]
            elif not lease.current:
                self._wants[request, model] = "later"

    def _wanting(self, model: str) -> set[int]:
        """Who will need it, and has not been granted it."""
        return {
            request
            for (request, wanted), state in self._wants.items()
            if wanted == model and state != "granted"
        }

    def _is_alone(self, machine: str, model: str) -> bool:
        """Whether no other machine has anything of it."""
        return not any(model in held for name, held in self._held.items() if name != machine)

    def _came(self, machine: str, model: str) -> None:
        self._awaited.pop(model, None)
        waited = self._wanting(model)
        if waited and self._is_alone(machine, model):
            self._awaited[model] = waited

    def _over(self, request: int) -> None:
        over = [model for model, waited in self._awaited.items() if request in waited]
        for model in over:
            del self._awaited[model]

    def _used(self, name: str) -> int:
        held = self._held[name]
        blocks = {k: s for model in held for k, s in self._memory.models[model].blocks.items()}
        return sum(self._own[model] * n for model, n in held.items()) + sum(blocks.values())

    def _load(self, action: ev.Load) -> None:
        name, model, budget = action.machine, action.model, self._memory.budgets[action.machine]
        before = self._held[name].get(model, 0)
        over = self._used(name) > budget
        self._require(
            not over or action.instances < before, "memory", f"{action} while too much is held"
        )
        self._held[name][model] = max(before, action.instances)
        self._coming[name][model] = before, action.instances
        used = self._used(name)
        self._require(
            over or used <= budget, "memory", f"{action}: {used} of {budget} bytes on {name}"
        )
        if before:
            early = action.instances > before and model in self._awaited
            self._require(not early, "first", f"{action} before {self._awaited} are over")
        elif self._is_alone(name, model) and self._wanting(model):
            self._require(action.instances == 1, "first", f"{action}, which somebody waits for")

    def _unload(self, action: ev.Unload) -> None:
        name, model = action.machine, action.model
        self._require(model not in self._going[name], "memory", f"{action} twice")
        self._going[name].add(model)
        self._coming[name].pop(model, None)
        users = [
            key for key, state in self._wants.items() if key[1] == model and state == "granted"
        ]
        others = [m for m in self._held if m != name and self._serves(m, model)]
        self._require(not users or bool(others), "lease", f"{action} while {users} use it")

    def _serves(self, name: str, model: str) -> bool:
        """One whose instances are being changed serves with those it had."""
        there = model in self._held[name] and model not in self._going[name]
        before, _ = self._coming[name].get(model, (1, 1))
        return there and before > 0

    def _require(self, holds: bool, check: str, message: str) -> None:
        if not holds:
            raise Violation(check, message)
