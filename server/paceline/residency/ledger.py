"""What one machine's memory holds, in bytes: loading, resident, unloading and leaked all count,
and what the server itself has grown by.

Parameter blocks that models share count once (PartialLoading: what is there need not be loaded).
Invariant: a load begins only when it fits, so `used_bytes <= budget_bytes`, except right after a
model turned out larger than it was believed to be (`over_bytes`); `used_bytes` is the sum over
what is held, each block once, and `grown_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes: `own_bytes` for each instance, and blocks by what makes them one.

    >>> Footprint(10, {"backbone": 90}).alone_bytes(2)
    110
    """

    own_bytes: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.own_bytes >= 0 and all(size > 0 for size in self.blocks.values()), self

    def alone_bytes(self, instances: int = 1) -> int:
        """On a machine that holds nothing else."""
        return self.own_bytes * instances + sum(self.blocks.values())


class Phase(Enum):
    """Where a model on a machine is; it holds memory in all of them."""

    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"
    LEAKED = "leaked"
    """Its unload never ended: only a restart of the machine gives its memory back."""


@dataclass(slots=True)
class Held:
    """One model on one machine. `operation` is the load or unload under way."""

    model: str
    footprint: Footprint
    instances: int
    phase: Phase
    operation: int = 0
    since_s: float = 0.0
    closing: bool = False
    """Resident, but no new lease may pin it: something more urgent needs its room."""
    whole: bool = True
    """Whether its load found less than half of it there, in blocks of others."""

    @property
    def open(self) -> bool:
        return self.phase is Phase.RESIDENT and not self.closing


class Ledger:
    """See the module docstring."""

    def __init__(self, budget_bytes: float = inf) -> None:
        assert budget_bytes > 0, budget_bytes
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.grown_bytes = 0
        """What the server takes beyond what it should."""
        self._held: dict[str, Held] = {}
        self._users: dict[str, int] = {}

    def get(self, model: str) -> Held | None:
        return self._held.get(model)

    def held(self) -> tuple[Held, ...]:
        """Everything it holds, by name."""
        return tuple(held for _, held in sorted(self._held.items()))

    def leaks(self, model: str) -> bool:
        """Whether its unload never ended."""
        return model in self._held and self._held[model].phase is Phase.LEAKED

    def bytes_in(self, phase: Phase) -> int:
        """Bytes that would be free if everything in that phase went."""
        return self.freed_bytes(h.model for h in self._held.values() if h.phase is phase)

    @property
    def free_bytes(self) -> float:
        """Room that is left; below 0 while too much is held."""
        return self.budget_bytes - self.used_bytes

    @property
    def over_bytes(self) -> float:
        return max(0.0, -self.free_bytes)

    def missing_bytes(self, footprint: Footprint, instances: int = 1) -> int:
        """What a load would add: its own bytes and the blocks that are not there."""
        there = self._users
        blocks = sum(size for key, size in footprint.blocks.items() if key not in there)
        return footprint.own_bytes * instances + blocks

    def freed_bytes(self, models: Iterable[str]) -> int:
        """What would be free if these all went: blocks only when nobody else has them."""
        own = 0
        users: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for model in models:
            held = self._held[model]
            own += held.footprint.own_bytes * held.instances
            for key, size in held.footprint.blocks.items():
                users[key] = users.get(key, 0) + 1
                sizes[key] = size
        return own + sum(sizes[key] for key, count in users.items() if count == self._users[key])

    # -- changes ----------------------------------------------------------------------------

    def begin_load(
        self, model: str, footprint: Footprint, instances: int, operation: int, now_s: float
    ) -> None:
        """A load begins; it must fit."""
        missing = self.missing_bytes(footprint, instances)
        assert missing <= self.free_bytes, (model, missing, self)
        held = Held(model, footprint, instances, Phase.LOADING, operation, now_s)
        held.whole = 2 * missing >= footprint.alone_bytes(instances)
        self._add(held)

    def adopt(self, model: str, footprint: Footprint, instances: int, now_s: float) -> None:
        """It is there already (a Triton that was running before us); it may be too much."""
        self._add(Held(model, footprint, instances, Phase.RESIDENT, 0, now_s))

    def loaded(self, model: str, now_s: float) -> None:
        self._move(model, Phase.LOADING, Phase.RESIDENT, 0, now_s)

    def begin_unload(self, model: str, operation: int, now_s: float) -> None:
        """An unload begins; its bytes count until `freed`."""
        held = self._held[model]
        assert held.phase in (Phase.RESIDENT, Phase.LOADING), held
        held.phase, held.operation, held.since_s = Phase.UNLOADING, operation, now_s
        held.closing = False

    def leaked(self, model: str, now_s: float) -> None:
        self._move(model, Phase.UNLOADING, Phase.LEAKED, 0, now_s)

    def freed(self, model: str) -> None:
        """Its memory is free: the machine said so, and nothing of it was found any more."""
        held = self._held.pop(model)
        self.used_bytes -= held.footprint.own_bytes * held.instances
        for key, size in held.footprint.blocks.items():
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self.used_bytes -= size
        assert self.used_bytes >= 0, self

    def correct(self, model: str, footprint: Footprint, instances: int) -> None:
        """Its size is another than believed. This may show that too much is held."""
        held = self._held[model]
        self.freed(model)
        held.footprint, held.instances = footprint, instances
        self._add(held)

    def grown(self, size_bytes: int) -> None:
        """The server itself takes that much more than it should."""
        self.used_bytes += size_bytes - self.grown_bytes
        self.grown_bytes = size_bytes

    def _add(self, held: Held) -> None:
        assert held.model not in self._held, held
        self._held[held.model] = held
        self.used_bytes += held.footprint.own_bytes * held.instances
        for key, size in held.footprint.blocks.items():
            if key not in self._users:
                self._users[key] = 0
                self.used_bytes += size
            self._users[key] += 1

    def _move(self, model: str, before: Phase, after: Phase, operation: int, now_s: float) -> None:
        held = self._held[model]
        assert held.phase is before, (held, after)
        held.phase, held.operation, held.since_s = after, operation, now_s

    def __repr__(self) -> str:
        held = ", ".join(f"{h.model}: {h.phase.value}" for h in self.held())
        return f"Ledger({self.used_bytes} of {self.budget_bytes}: {held})"
