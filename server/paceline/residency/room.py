"""What is loaded where, and what goes for it: the decisions of `Residency`.

Waiting models are taken in the order of `loading.order`. Each goes to the machine where it costs
least: into free room, into room that is being freed, in the place of models nobody leases (those
with the least loss per byte), in the place of models that less urgent requests will want later,
or else, once those are done that use them now, in the place of models that less urgent requests
lease: these are closed, so that no new lease prolongs their stay. What a more urgent request
needs never goes. Room found for a more urgent model is not given to a less urgent one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from paceline.residency.events import Action
from paceline.residency.evict import Candidate, choose
from paceline.residency.leases import Rank
from paceline.residency.ledger import Held, Phase
from paceline.residency.loading import Pending, order
from paceline.residency.state import Machine, Model

if TYPE_CHECKING:
    from paceline.residency.residency import Residency

FILL_GAIN = 2.0
"""A model takes another's place ahead of any request only if its loss per byte is so many times
as large: what is moved for nothing costs a load."""

LEAST_RANK: Rank = (inf, inf)
MOST_RANK: Rank = (-inf, -inf)


@dataclass(frozen=True, slots=True)
class _Place:
    """How a model could come to a machine. `kind`: 0 fits, 1 will fit when what is unloading has
    gone, 2 takes the place of `victims`, 3 closes them.
    """

    machine: Machine
    kind: int
    cost: float = 0.0
    victims: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[int, float, int, str]:
        return (self.kind, self.cost, self.machine.loading, self.machine.name)


class Room:
    """See the module docstring. `hung` loads are to be unloaded."""

    def __init__(self, residency: Residency) -> None:
        self._r = residency
        self.hung: list[tuple[str, str]] = []
        self._reserved: dict[str, float] = {}

    # -- what goes by itself ----------------------------------------------------------------

    def unload_hung(self, now_s: float, actions: list[Action]) -> None:
        for name, model in self.hung:
            machine = self._r.machines.get(name)
            held = machine.ledger.get(model) if machine is not None else None
            if machine is not None and held is not None and held.phase in _LOADED:
                self._r.unload(machine, model, "it did not load in time", now_s, actions)
        self.hung.clear()

    def unload_idle(self, now_s: float, actions: list[Action]) -> float:
        """Unload what nobody has used for its chains' keep-alive; when to look again."""
        next_s = inf
        for model in self._r.models.values():
            keep_s = model.keep_alive_s
            if keep_s is None or model.withdrawn or self._r.leases.any(model.name):
                continue
            held = [m for m in self._r.machines.values() if m.ledger.get(model.name) is not None]
            there = [m for m in held if self._may_go(m, model.name)]
            due_s = model.used_s + keep_s
            if due_s > now_s or len(there) < len(held):
                next_s = min(next_s, max(due_s, now_s + 1.0)) if held else next_s
                continue
            model.asleep = True
            for machine in there:
                why = f"not used for {keep_s:g} s"
                self._r.unload(machine, model.name, why, now_s, actions)
        return next_s

    def unload_withdrawn(self, now_s: float, actions: list[Action]) -> None:
        for model in self._r.models.values():
            if not model.withdrawn:
                continue
            for lease in self._r.leases.of(model.name):
                if lease.current and not lease.granted:
                    self._r.refuse(lease, f"model {model.name!r} was unloaded", actions)
            if not self._r.leases.pins(model.name):
                for machine in self._r.machines.values():
                    if self._may_go(machine, model.name):
                        self._r.unload(machine, model.name, "its unload was asked", now_s, actions)

    def relieve(self, now_s: float, actions: list[Action]) -> None:
        """Where more is held than there is room: something was larger than believed."""
        for machine in self._r.machines.values():
            over = machine.ledger.over_bytes - machine.ledger.bytes_in(Phase.UNLOADING)
            if over <= 0:
                continue
            free = self._candidates(machine, MOST_RANK, now_s, closable=False)
            freed = machine.ledger.freed_bytes
            victims = choose(free, over, freed, self._r.limits.eviction)
            if victims is None:
                victims = [candidate.model for candidate in free]
                rest = over - freed(victims)
                others = self._candidates(machine, MOST_RANK, now_s, closable=True)
                others = [c for c in others if c.model not in victims]
                for model in choose(others, rest, freed, self._r.limits.eviction) or ():
                    _held(machine, model).closing = True
            self._evict(
                machine, victims, "models are larger than they were believed", now_s, actions
            )

    # -- what is wanted ---------------------------------------------------------------------

    def meet(self, wanted: Sequence[str], now_s: float, actions: list[Action]) -> None:
        """Grant what is there; bring what else is waited for, or make room for it."""
        self._reserved = {}
        for model in wanted:
            self._r.grant_waiting(model, actions)
        pending = [p for model in sorted(wanted) for p in self._pending(model, now_s)]
        closed: set[tuple[str, str]] = set()
        ranks = {(p.model, p.machine): self._rank(p, now_s) for p in pending}
        for one in order(pending, now_s, self._blocks_there()):
            if not self._reopened(one, closed, actions):
                self._bring(one, ranks[one.model, one.machine], closed, now_s, actions)
        for machine in self._r.machines.values():
            for held in machine.ledger.held():
                kept = machine.ledger.over_bytes or (machine.name, held.model) in closed
                if held.closing and not kept:
                    held.closing = False
                    self._r.grant_waiting(held.model, actions)

    def waits(self, model: str) -> bool:
        """Whether some lease of it has no copy that it could use."""
        return any(
            not lease.granted and not self._r.has_copy_for(lease)
            for lease in self._r.leases.of(model)
        )

    def _pending(self, name: str, now_s: float) -> list[Pending]:
        """Who waits for a model that is not there, by the machine that alone will do ("": any)."""
        model = self._r.models[name]
        latest: dict[str, list[float]] = {}
        priority: dict[str, float] = {}
        for lease in self._r.leases.of(name):
            if lease.granted or self._r.has_copy_for(lease):
                continue
            latest.setdefault(lease.machine, []).append(lease.latest_s)
            rank = lease.rank(now_s)[0]
            priority[lease.machine] = min(priority.get(lease.machine, inf), rank)
        footprint = model.footprint
        return [
            Pending(
                name,
                model.load_s,
                tuple(latest[machine]),
                priority[machine],
                footprint.own_bytes,
                footprint.blocks,
                machine,
            )
            for machine in sorted(latest)
        ]

    def _rank(self, one: Pending, now_s: float) -> tuple[Rank, float | None]:
        """The most urgent rank of those that wait; since when one has been wanting it now."""
        waiting = [
            lease
            for lease in self._r.leases.of(one.model)
            if lease.machine == one.machine and not lease.granted
        ]
        since = [lease.since_s for lease in waiting if lease.current]
        return min(lease.rank(now_s) for lease in waiting), min(since, default=None)

    def _blocks_there(self) -> frozenset[str]:
        """Parameter blocks that some machine holds."""
        return frozenset(
            key
            for machine in self._r.machines.values()
            for held in machine.ledger.held()
            for key in held.footprint.blocks
        )

    def _reopened(self, one: Pending, closed: set[tuple[str, str]], actions: list[Action]) -> bool:
        """Whether a copy that was closed need not be any more."""
        found = False
        for machine in self._r.machines.values():
            held = machine.ledger.get(one.model)
            if held is None or not held.closing or machine.recycling or machine.ledger.over_bytes:
                continue
            if one.machine in ("", machine.name) and (machine.name, one.model) not in closed:
                held.closing, found = False, True
        if found:
            self._r.grant_waiting(one.model, actions)
        return found

    def _bring(
        self,
        one: Pending,
        wanted: tuple[Rank, float | None],
        closed: set[tuple[str, str]],
        now_s: float,
        actions: list[Action],
    ) -> None:
        """Load it, or make room for it; refuse those that want it now if it cannot come."""
        model, (rank, since_s) = self._r.models[one.model], wanted
        machines = [m for m in self._r.machines.values() if one.machine in ("", m.name)]
        if any(_coming(m, one.model) for m in machines):
            return
        eligible = [m for m in machines if self._eligible(m, model, now_s)]
        if not eligible:
            self._refuse_all(one, machines, now_s, actions)
            return
        current = since_s is not None
        places = [self._place(m, model, rank, current, now_s) for m in eligible]
        place = min((p for p in places if p is not None), key=lambda p: p.rank, default=None)
        if place is None:
            if current and (leaking := [m for m in eligible if m.ledger.bytes_in(Phase.LEAKED)]):
                self._want_recycled(leaking[0])
            return
        machine = place.machine
        if place.kind == 0 and self._may_load(machine, since_s, now_s):
            self._r.load(machine, model, self._instances(machine, model), now_s, actions)
            return
        missing = machine.ledger.missing_bytes(model.footprint)
        self._reserved[machine.name] = self._reserved.get(machine.name, 0.0) + missing
        if place.kind == 2:
            self._evict(machine, place.victims, f"to make room for {model.name}", now_s, actions)
        elif place.kind == 3:
            for victim in place.victims:
                held = _held(machine, victim)
                if self._may_go(machine, victim) and not self._pinned(machine, victim):
                    why = f"to make room for {model.name}"
                    self._evict(machine, [victim], why, now_s, actions)
                elif held.phase is Phase.RESIDENT:
                    held.closing = True
                    closed.add((machine.name, victim))

    def _eligible(self, machine: Machine, model: Model, now_s: float) -> bool:
        """Whether the model might come to that machine, now or when room was made."""
        if machine.recycling or model.withdrawn or machine.ledger.get(model.name) is not None:
            return False
        fits = model.footprint.alone_bytes() <= machine.ledger.budget_bytes
        return fits and model.barred(machine.name, now_s) is None

    def _refuse_all(
        self, one: Pending, machines: Sequence[Machine], now_s: float, actions: list[Action]
    ) -> None:
        """No machine can take it: if that will not change by itself, say so to who wants it now."""
        model, reason = self._r.models[one.model], ""
        for machine in machines:
            held = machine.ledger.get(model.name)
            if machine.recycling or (held is not None and held.phase is not Phase.LEAKED):
                return
            if held is not None:
                if machine.recyclable:
                    self._want_recycled(machine)
                    return
                reason = f"model {model.name!r} was never unloaded by {machine.name}"
            elif (failure := model.barred(machine.name, now_s)) is not None:
                reason = failure.reason
            else:
                needed = model.footprint.alone_bytes()
                reason = reason or (
                    f"model {model.name!r} needs {needed / 2**20:.0f} MiB, "
                    f"{machine.name} has {machine.ledger.budget_bytes / 2**20:.0f} MiB"
                )
        if not reason:
            return  # no machine is up: one may come
        for lease in self._r.leases.of(one.model):
            if lease.current and not lease.granted and lease.machine == one.machine:
                self._r.refuse(lease, reason, actions)

    def _place(
        self, machine: Machine, model: Model, rank: Rank, current: bool, now_s: float
    ) -> _Place | None:
        """How the model could come to that machine; None when it has to wait."""
        ledger = machine.ledger
        free = ledger.free_bytes - self._reserved.get(machine.name, 0.0)
        missing = ledger.missing_bytes(model.footprint)
        if missing <= free:
            return _Place(machine, 0)
        short = missing - free - ledger.bytes_in(Phase.UNLOADING)
        if short <= 0:
            return _Place(machine, 1)
        for closable in (False, True) if current else (False,):
            candidates = self._candidates(machine, rank, now_s, closable=closable)
            if not current:
                candidates = [c for c in candidates if not c.soon]
            victims = choose(candidates, short, ledger.freed_bytes, self._r.limits.eviction)
            if victims is not None:
                cost = sum(c.loss for c in candidates if c.model in victims)
                return _Place(machine, 3 if closable else 2, cost, tuple(victims))
        return None

    def _candidates(
        self, machine: Machine, rank: Rank, now_s: float, *, closable: bool
    ) -> list[Candidate]:
        """Resident models that may go for somebody of that rank; `closable`: also once those that
        use them now are done.
        """
        found = []
        for held in machine.ledger.held():
            if not self._may_go(machine, held.model):
                continue
            if self._pinned(machine, held.model) and not closable:
                continue
            model, last = self._r.models[held.model], self._is_last(machine, held.model)
            leases = list(self._r.leases.of(held.model)) if last else []
            if min((lease.rank(now_s) for lease in leases), default=LEAST_RANK) < rank:
                continue
            found.append(
                Candidate(
                    held.model,
                    model.rate.at(now_s),
                    model.load_s if last else 0.0,
                    model.weight,
                    machine.ledger.freed_bytes([held.model]),
                    model.used_s,
                    soon=bool(leases),
                )
            )
        return found

    # -- ahead of any request ---------------------------------------------------------------

    def fill(self, now_s: float, actions: list[Action]) -> None:
        """Load what is worth having, while nobody waits and what runs can bear it."""
        for _, machine in sorted(self._r.machines.items()):
            while machine.fill and not machine.recycling and not machine.ledger.over_bytes:
                model = self._r.models[machine.fill[0]]
                if model.asleep or not self._eligible(machine, model, now_s):
                    machine.fill.pop(0)
                    continue
                if not self._may_load(machine, None, now_s):
                    break
                if not self._fill_with(machine, model, now_s, actions):
                    break
            self._grow(machine, actions)

    def _fill_with(
        self, machine: Machine, model: Model, now_s: float, actions: list[Action]
    ) -> bool:
        """Load it if there is room or another is worth much less; False: wait for an unload."""
        ledger = machine.ledger
        free = ledger.free_bytes - self._reserved.get(machine.name, 0.0)
        missing = ledger.missing_bytes(model.footprint)
        if missing <= free:
            machine.fill.pop(0)
            self._r.load(machine, model, self._instances(machine, model), now_s, actions)
            return True
        short = missing - free - ledger.bytes_in(Phase.UNLOADING)
        if short <= 0:
            return False
        worth = model.loss(now_s) / max(1, missing)
        candidates = [
            c
            for c in self._candidates(machine, LEAST_RANK, now_s, closable=False)
            if not c.soon and FILL_GAIN * c.loss / max(1, c.size_bytes) < worth
        ]
        victims = choose(candidates, short, ledger.freed_bytes, self._r.limits.eviction)
        if victims is None or sum(c.loss for c in candidates if c.model in victims) >= model.loss(
            now_s
        ):
            machine.fill.pop(0)
            return True
        why = f"{model.name} is worth more than it"
        self._evict(machine, victims, why, now_s, actions)
        return False

    def _grow(self, machine: Machine, actions: list[Action]) -> None:
        """Bring resident models to the instances that are wanted, as far as there is room."""
        if machine.recycling or machine.ledger.over_bytes or self._r.waiting or machine.fill:
            return
        for held in machine.ledger.held():
            model = self._r.models[held.model]
            wanted = model.instances.get(machine.name, 1)
            if not held.open or held.operation or wanted == held.instances:
                continue
            room = machine.ledger.free_bytes
            own = held.footprint.own_bytes
            while wanted > held.instances and (wanted - held.instances) * own > room:
                wanted -= 1
            if wanted != held.instances:
                self._r.resize(machine, held, wanted, actions)

    # -- leaks ------------------------------------------------------------------------------

    def recycle(self, now_s: float, actions: list[Action]) -> None:
        """Restart machines that leak, once their models are elsewhere and nobody uses them."""
        for _, machine in sorted(self._r.machines.items()):
            leaked = machine.ledger.bytes_in(Phase.LEAKED)
            if leaked > self._r.limits.leak_share * machine.ledger.budget_bytes:
                self._want_recycled(machine)
            if not machine.recycling or machine.asked:
                continue
            moving = [
                h.model for h in machine.ledger.held() if self._move(machine, h, now_s, actions)
            ]
            if moving or any(
                self._r.leases.pins(h.model) and self._is_last(machine, h.model)
                for h in machine.ledger.held()
                if h.phase is Phase.RESIDENT
            ):
                continue
            self._r.restart(machine, actions)

    def _want_recycled(self, machine: Machine) -> None:
        if machine.recyclable and not machine.recycling:
            machine.recycling = "memory of a model was never given back"

    def _move(self, source: Machine, held: Held, now_s: float, actions: list[Action]) -> bool:
        """Have a model of a machine that is to be restarted loaded elsewhere; True while it is on
        its way. Where nobody has room it is not moved: its requests wait for the restart.
        """
        if held.phase is not Phase.RESIDENT or not self._is_last(source, held.model):
            return False
        model = self._r.models[held.model]
        others = [m for m in self._r.machines.values() if m is not source]
        if any(_coming(m, held.model) for m in others):
            return True
        if model.loss(now_s) <= 0.0 and not self._r.leases.any(held.model):
            return False
        for machine in others:
            if not self._eligible(machine, model, now_s):
                continue
            place = self._place(machine, model, LEAST_RANK, False, now_s)
            if place is None:
                continue
            if place.kind == 0:
                self._r.load(machine, model, self._instances(machine, model), now_s, actions)
            elif place.kind == 2:
                why = f"{held.model} has to leave {source.name}"
                self._evict(machine, place.victims, why, now_s, actions)
            return True
        return False

    # -- small questions --------------------------------------------------------------------

    def _may_go(self, machine: Machine, model: str) -> bool:
        """Resident, and nothing is being done with it."""
        held = machine.ledger.get(model)
        return held is not None and held.phase is Phase.RESIDENT and not held.operation

    def _is_last(self, machine: Machine, model: str) -> bool:
        """Whether no other machine could serve the model's leases."""
        if self._r.leases.bound(model, machine.name):
            return True
        return not any(
            m.copy(model) is not None for m in self._r.machines.values() if m is not machine
        )

    def _pinned(self, machine: Machine, model: str) -> bool:
        return self._r.leases.pins(model) > 0 and self._is_last(machine, model)

    def _may_load(self, machine: Machine, since_s: float | None, now_s: float) -> bool:
        """Whether one more load may begin: what runs can bear it, or a request has waited
        `held_s` for it and nothing else is being loaded.
        """
        limits = self._r.limits
        loading = machine.loading
        if loading >= limits.most_loads:
            return False
        if loading < machine.allowed_loads(limits.most_loads):
            return True
        return loading == 0 and since_s is not None and now_s - since_s >= limits.held_s

    def _instances(self, machine: Machine, model: Model) -> int:
        """As many as are wanted and fit: only the first is worth another model's place."""
        wanted = max(1, model.instances.get(machine.name, 1))
        free = machine.ledger.free_bytes - self._reserved.get(machine.name, 0.0)
        while wanted > 1 and machine.ledger.missing_bytes(model.footprint, wanted) > free:
            wanted -= 1
        return wanted

    def _evict(
        self,
        machine: Machine,
        models: Sequence[str],
        why: str,
        now_s: float,
        actions: list[Action],
    ) -> None:
        for model in models:
            assert not self._pinned(machine, model), (machine.name, model)
            self._r.counts.evictions += 1
            self._r.unload(machine, model, why, now_s, actions)


_LOADED = (Phase.LOADING, Phase.RESIDENT)


def _coming(machine: Machine, model: str) -> bool:
    held = machine.ledger.get(model)
    return held is not None and held.phase is Phase.LOADING


def _held(machine: Machine, model: str) -> Held:
    held = machine.ledger.get(model)
    assert held is not None, (machine.name, model)
    return held
