"""What is loaded where, and what goes for it: the decisions of `Residency`.

Waiting models are taken in the order of `loading.order`. Each goes to the machine where it costs
least: into free room, into room that is being freed, in the place of models nobody leases (those
with the least loss per byte), in the place of models that less urgent requests will want later,
or else, once those are done that use them now, in the place of models that less urgent requests
lease: these are closed, so that no new lease prolongs their stay. What a more urgent request
needs never goes. Room found for a more urgent model is not given to a less urgent one.

Who waits for a model gets one instance: others would take its part of the link and the cores.
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

ABSENCE_S = 5.0
"""How long an evicted model's absence is expected to cost what it costs per second: until it has
been missed, something else has gone for it and it is there again.
"""

LEAST_RANK: Rank = (inf, inf)


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
    """See the module docstring."""

    def __init__(self, residency: Residency) -> None:
        self._r = residency
        self._reserved: dict[str, float] = {}

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
        if any(coming(m, one.model) for m in machines):
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
        if place.kind >= 2 and self._too_soon(one, place, rank, now_s):
            return
        if place.kind == 0 and self._may_load(machine, since_s, now_s):
            self._r.load(machine, model, 1, now_s, actions)
            return
        missing = machine.ledger.missing_bytes(model.footprint)
        self._reserved[machine.name] = self._reserved.get(machine.name, 0.0) + missing
        if place.kind == 2:
            self._evict(machine, place.victims, f"to make room for {model.name}", now_s, actions)
        elif place.kind == 3:
            for victim in place.victims:
                held = held_there(machine, victim)
                if self._may_go(machine, victim) and not self._pinned(machine, victim):
                    why = f"to make room for {model.name}"
                    self._evict(machine, [victim], why, now_s, actions)
                elif held.phase is Phase.RESIDENT:
                    held.closing = True
                    closed.add((machine.name, victim))

    def _too_soon(self, one: Pending, place: _Place, rank: Rank, now_s: float) -> bool:
        """Whether to wait is cheaper yet than what the victims' absence is expected to cost more
        than its own: who takes the place of what is wanted more has waited as long as that in all.
        Nobody waits who would then be late. A request that waits for one model waits for those
        that it needs next as well, so that the loads of a cold chain go side by side.
        """
        if self._r.limits.eviction != "cost" or rank[0] < 0:
            return False
        if min(one.latest_s) - now_s < 2.0 * one.load_s + self._r.unload_s:
            return False
        waited_s = sum(
            self._r.leases.waited_s(lease, now_s)
            for lease in self._r.leases.of(one.model)
            if not lease.granted
        )
        more = place.cost - self._r.loss(self._r.models[one.model], now_s)
        return waited_s < more * ABSENCE_S

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
                    model.load_s + self._r.unload_s if last else 0.0,
                    model.weight,
                    machine.ledger.freed_bytes([held.model]),
                    model.used_s,
                    soon=bool(leases),
                )
            )
        return found

    def _want_recycled(
        self, machine: Machine, why: str = "memory of a model was never given back"
    ) -> None:
        if machine.recyclable and not machine.recycling:
            machine.recycling = why

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


def coming(machine: Machine, model: str) -> bool:
    held = machine.ledger.get(model)
    return held is not None and held.phase is Phase.LOADING


def held_there(machine: Machine, model: str) -> Held:
    held = machine.ledger.get(model)
    assert held is not None, (machine.name, model)
    return held
