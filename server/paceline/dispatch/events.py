"""What the dispatcher is told (events) and what it wants done (actions).

Instants are seconds on the caller's clock and never go backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.core.errors import RequestError
from paceline.core.ports import ModelCall
from paceline.core.request import Parameter, Timeline
from paceline.core.tensor import Tensor
from paceline.core.values import value
from paceline.dispatch.route import ChainRoute, ModuleRoute


@value
class Submit:
    """A request enters a chain. `request` is unique; `outputs` empty means all.

    `stream`: report the items of fan-outs as they come.
    """

    request: int
    chain: str
    inputs: Mapping[str, Tensor]
    deadline_s: float
    outputs: tuple[str, ...] = ()
    priority: int | None = None
    request_id: str = ""
    version: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    stream: bool = False


@value
class Cancel:
    """Its client is gone: drop it from every queue; no answer is wanted."""

    request: int


@value
class BatchDone:
    """Outputs of an `Execute`, in the order it asked for."""

    batch: int
    outputs: tuple[Tensor, ...]


@value
class BatchFailed:
    """An `Execute` failed."""

    batch: int
    error: RequestError


@value
class Tick:
    """Time passed (a `Wake` came due)."""


@value
class Settled:
    """Nothing new: what earlier events held back (`settled` false) can be launched."""


@dataclass(frozen=True, slots=True)
class Abort:
    """A request that is under way can come to nothing: it fails with this error."""

    request: int
    error: RequestError


@dataclass(frozen=True, slots=True)
class InstallChain:
    """Serve new requests of this chain by `route`; those under way keep the route they have."""

    route: ChainRoute


@dataclass(frozen=True, slots=True)
class RemoveChain:
    """Refuse new requests of this chain; those under way finish."""

    chain: str


@value
class MachineUp:
    """A machine can execute: `slots` batches at a time, of each model at most its instances."""

    machine: str
    hardware: str
    slots: int
    instances: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MachineDown:
    """Nothing more is sent to this machine; batches it runs are reported on their own."""

    machine: str


Event = (
    Submit
    | Abort
    | Cancel
    | BatchDone
    | BatchFailed
    | Tick
    | Settled
    | InstallChain
    | RemoveChain
    | MachineUp
    | MachineDown
)


@value
class Execute:
    """Run one batch on `machine`, then say BatchDone or BatchFailed exactly once."""

    batch: int
    machine: str
    call: ModelCall
    rows: int
    timeout_s: float


@value
class Partial:
    """Items `start ..` of a request's fan-out are there (only for a `stream` request)."""

    request: int
    start: int
    outputs: tuple[Tensor, ...]


@value
class Entered:
    """A request was admitted that may use the models of these modules, in the chain's order."""

    request: int
    modules: tuple[ModuleRoute, ...]
    deadline_s: float
    priority: int


@value
class Reached:
    """A module of a request waits for its model from now on."""

    request: int
    model: str


@value
class Passed:
    """A module of a request has ended; `used` false: without having wanted its model."""

    request: int
    model: str
    used: bool = True


@dataclass(frozen=True, slots=True)
class TooCold:
    """A request was refused because loading its chain's models would take too long."""

    chain: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """A model on a machine lost or garbled a batch and is quarantined: repair it if you can."""

    machine: str
    model: str
    reason: str


@value
class Answer:
    """A request succeeded."""

    request: int
    outputs: tuple[Tensor, ...]
    timeline: Timeline


@value
class Fail:
    """A request failed or was refused."""

    request: int
    error: RequestError
    timeline: Timeline


@value
class Wake:
    """Send a Tick at `at_s`. Only the earliest one outstanding matters."""

    at_s: float


Action = Execute | Partial | Answer | Fail | Entered | Reached | Passed | TooCold | Broken | Wake
