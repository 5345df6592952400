"""What residency does by itself: idle, withdrawn and hung models go, what is worth having is loaded
ahead of any request, machines that leak are restarted.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from paceline.residency import bandwidth
from paceline.residency.events import Action, Moving, Split
from paceline.residency.evict import choose
from paceline.residency.leases import Rank
from paceline.residency.ledger import Held, Phase
from paceline.residency.room import LEAST_RANK, Room, coming, held_there
from paceline.residency.state import RECYCLE_EVERY_S, Machine, Model

if TYPE_CHECKING:
    from paceline.residency.residency import Residency

FILL_GAIN = 2.0
"""A model takes another's place ahead of any request only if its loss per byte is so many times
as large: what is moved for nothing costs a load."""

SPLIT_TOLERANCE = 0.05
"""Shares that differ by less are not said again."""

MOST_RANK: Rank = (-inf, -inf)

_LOADED = (Phase.LOADING, Phase.RESIDENT)


class Upkeep(Room):
    """See the module docstring. `hung` loads are to be unloaded."""

    def __init__(self, residency: Residency) -> None:
        super().__init__(residency)
        self.hung: list[tuple[str, str]] = []

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
                    held_there(machine, model).closing = True
            self._evict(
                machine, victims, "models are larger than they were believed", now_s, actions
            )

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
        worth = self._r.loss(model, now_s) / max(1, missing)
        candidates = [
            c
            for c in self._candidates(machine, LEAST_RANK, now_s, closable=False)
            if not c.soon and FILL_GAIN * c.loss / max(1, c.size_bytes) < worth
        ]
        victims = choose(candidates, short, ledger.freed_bytes, self._r.limits.eviction)
        lost = sum(c.loss for c in candidates if victims is not None and c.model in victims)
        if victims is None or lost >= self._r.loss(model, now_s):
            machine.fill.pop(0)
            return True
        why = f"{model.name} is worth more than it"
        self._evict(machine, victims, why, now_s, actions)
        return False

    def _instances(self, machine: Machine, model: Model) -> int:
        """To begin with: as many as are wanted and fit, but one where somebody waits for it."""
        if self.waits(model.name):
            return 1
        wanted = max(1, model.instances.get(machine.name, 1))
        free = machine.ledger.free_bytes - self._reserved.get(machine.name, 0.0)
        while wanted > 1 and machine.ledger.missing_bytes(model.footprint, wanted) > free:
            wanted -= 1
        return wanted

    def _grow(self, machine: Machine, actions: list[Action]) -> None:
        """Bring resident models to the instances that are wanted, as far as there is room; what
        came for requests that waited, after the first of them is over: its weights may still be
        on their way, and a process that starts takes the cores that compute.
        """
        if machine.recycling or machine.ledger.over_bytes or self._r.waiting or machine.fill:
            return
        for held in machine.ledger.held():
            model = self._r.models[held.model]
            wanted = model.instances.get(machine.name, 1)
            if not held.open or held.operation or wanted == held.instances:
                continue
            busy = machine.starting >= self._r.limits.most_loads
            if wanted > held.instances and (busy or self._r.leases.awaited(held.model)):
                continue
            room = machine.ledger.free_bytes
            own = held.footprint.own_bytes
            while wanted > held.instances and (wanted - held.instances) * own > room:
                wanted -= 1
            if wanted != held.instances:
                self._r.resize(machine, held, wanted, actions)

    # -- what is on its way -----------------------------------------------------------------

    def split(self, moving: Moving, now_s: float, actions: list[Action]) -> None:
        """How loads under way share their links, said when that has changed."""
        machine = self._r.machines.get(moving.machine)
        if machine is None:
            return
        shares: dict[str, float] = {}
        for link in moving.links:
            under_way = [
                self._transfer(model, left_bytes, now_s)
                for model, left_bytes in sorted(link.left_bytes.items())
                if left_bytes > 0 and model in self._r.models
            ]
            shares |= bandwidth.split(under_way, now_s, link.bytes_per_s)
        before = machine.shares
        same = shares.keys() == before.keys()
        if not same or any(abs(shares[m] - before[m]) > SPLIT_TOLERANCE for m in shares):
            machine.shares = shares
            if shares:
                actions.append(Split(machine.name, shares))

    def _transfer(self, model: str, left_bytes: int, now_s: float) -> bandwidth.Transfer:
        leases = list(self._r.leases.of(model))
        footprint = self._r.models[model].footprint
        return bandwidth.Transfer(
            model,
            left_bytes,
            tuple(lease.latest_s for lease in leases),
            min((lease.rank(now_s)[0] for lease in leases), default=inf),
            footprint.blocks,
            sum(footprint.blocks.values()),
        )

    # -- leaks ------------------------------------------------------------------------------

    def recycle(self, now_s: float, actions: list[Action]) -> None:
        """Restart machines that leak, once their models are elsewhere and nobody uses them."""
        for _, machine in sorted(self._r.machines.items()):
            bearable = self._r.limits.leak_share * machine.ledger.budget_bytes
            if machine.ledger.bytes_in(Phase.LEAKED) > bearable:
                self._want_recycled(machine)
            if machine.ledger.grown_bytes > bearable and self._is_due(machine, now_s):
                self._want_recycled(machine, "the server itself has grown")
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
            self._r.restart(machine, now_s, actions)

    def _is_due(self, machine: Machine, now_s: float) -> bool:
        return now_s - self._r.recycled_s.get(machine.name, -inf) >= RECYCLE_EVERY_S

    def _move(self, source: Machine, held: Held, now_s: float, actions: list[Action]) -> bool:
        """Have a model of a machine that is to be restarted loaded elsewhere; True while it is on
        its way. Where nobody has room it is not moved: its requests wait for the restart.
        """
        if held.phase is not Phase.RESIDENT or not self._is_last(source, held.model):
            return False
        model = self._r.models[held.model]
        others = [m for m in self._r.machines.values() if m is not source]
        if any(coming(m, held.model) for m in others):
            return True
        if self._r.loss(model, now_s) <= 0.0 and not self._r.leases.any(held.model):
            return False
        for machine in others:
            if not self._eligible(machine, model, now_s):
                continue
            place = self._place(machine, model, LEAST_RANK, False, now_s)
            if place is None:
                continue
            if place.kind == 0:
                if self._may_load(machine, held.since_s, now_s):  # else it waits for its turn
                    self._r.load(machine, model, self._instances(machine, model), now_s, actions)
            elif place.kind == 2:
                why = f"{held.model} has to leave {source.name}"
                self._evict(machine, place.victims, why, now_s, actions)
            return True
        return False
