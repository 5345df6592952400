"""What residency is told (events) and what it wants done (actions). Instants are seconds on the
caller's clock and never go backwards; `operation` ties an outcome to the action that began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from paceline.residency.ledger import Footprint


@dataclass(frozen=True, slots=True)
class Declare:
    """A model that can be loaded, or what is now known of it. `instances` wanted, by machine.

    `measured` tells that the footprint is no guess.
    """

    model: str
    footprint: Footprint
    instances: Mapping[str, int] = field(default_factory=dict)
    load_s: float | None = None
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """A model was withdrawn: unload it once no lease pins it, grant no more."""

    model: str


@dataclass(frozen=True, slots=True)
class MachineUp:
    """A machine is there, holding `resident` and nothing else. `fill`: load what fits."""

    machine: str
    budget_bytes: float = inf
    resident: Mapping[str, int] = field(default_factory=dict)
    recyclable: bool = False
    fill: bool = True


@dataclass(frozen=True, slots=True)
class MachineDown:
    """A machine is gone, and what it held with it."""

    machine: str


@dataclass(frozen=True, slots=True)
class ChainUp:
    """A chain is served, or by another plan: its models are worth something before they are used.

    `keep_alive_s`: how long they stay without use (None: as long as there is room).
    """

    chain: str
    rates_rps: Mapping[str, float]
    priority: int = 0
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class ChainDown:
    chain: str


@dataclass(frozen=True, slots=True)
class Need:
    """A use of a model: expected `in_s` from now (0: now), with `after_s` of work from its start
    to the request's end. `machine`: only that one will do.
    """

    model: str
    in_s: float = 0.0
    after_s: float = 0.0
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Enter:
    """A request is under way and leases the models it will need. `request` is unique."""

    request: int
    needs: tuple[Need, ...]
    deadline_s: float = inf
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Reach:
    """A request wants to use a model now."""

    request: int
    model: str


@dataclass(frozen=True, slots=True)
class Passed:
    """A request has made one of its uses of a model, or (`used` false) will not make it."""

    request: int
    model: str
    used: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """A request has ended, one way or the other."""

    request: int


@dataclass(frozen=True, slots=True)
class LoadDone:
    """`own_bytes`: what each instance was measured to take (None: not measured) beside `blocks`
    (None: those it was believed to have).
    """

    operation: int
    machine: str
    model: str
    own_bytes: int | None = None
    blocks: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """It did not load, and holds no memory."""

    operation: int
    machine: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadHung:
    """It did not load in time; what it holds, and whether it still comes, nobody knows."""

    operation: int
    machine: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnloadDone:
    """The machine's index says it is gone, and nothing of it was measured any more."""

    operation: int
    machine: str
    model: str


@dataclass(frozen=True, slots=True)
class UnloadStuck:
    """It did not go in time."""

    operation: int
    machine: str
    model: str


@dataclass(frozen=True, slots=True)
class SizeMeasured:
    """A model takes that much for each instance beside `blocks` (None: those it was believed to
    have).
    """

    model: str
    own_bytes: int
    blocks: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class ServerMeasured:
    """A machine's server itself, its models left out, takes that much."""

    machine: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pace:
    """On a machine, batches take `interference[n - 1]` times as long under n loads (>= 1, never
    falling), and what runs can bear `bearable` times as long and still be in time.
    """

    machine: str
    interference: tuple[float, ...]
    bearable: float


@dataclass(frozen=True, slots=True)
class Link:
    """What a machine loads through (its disk, a store): bytes a second (None: not measured), and
    the bytes that are still to come, by model.
    """

    name: str
    bytes_per_s: float | None
    left_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Moving:
    """Parameters are on their way to a machine."""

    machine: str
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed (a `Wake` came due)."""


Event = (
    Declare
    | Forget
    | MachineUp
    | MachineDown
    | ChainUp
    | ChainDown
    | Enter
    | Reach
    | Passed
    | Leave
    | LoadDone
    | LoadFailed
    | LoadHung
    | UnloadDone
    | UnloadStuck
    | SizeMeasured
    | ServerMeasured
    | Pace
    | Moving
    | Tick
)


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model, then say LoadDone, LoadFailed or LoadHung exactly once."""

    operation: int
    machine: str
    model: str
    instances: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Send it nothing more, let it finish, unload it; then say UnloadDone or UnloadStuck once."""

    operation: int
    machine: str
    model: str
    why: str


@dataclass(frozen=True, slots=True)
class Recycle:
    """Restart the machine: memory leaked. Nobody needs it now; MachineDown and MachineUp follow."""

    machine: str
    why: str


@dataclass(frozen=True, slots=True)
class Grant:
    """The model is there for the request that wants it now, and stays until it has been used."""

    request: int
    model: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """A model that a request wants now will not come; its lease is gone."""

    request: int
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Split:
    """The shares of their link, 0 to 1, that loads under way on a machine get, by model."""

    machine: str
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a Tick at `at_s`. Only the latest one said matters."""

    at_s: float


Action = Load | Unload | Recycle | Grant | Refuse | Split | Wake
