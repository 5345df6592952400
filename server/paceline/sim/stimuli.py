"""What happens to the simulated world from outside: requests, cancels, faults, operators.

A run is a function of its configuration and a list of these, so a failing list can be shortened
item by item. Instants are virtual seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from paceline.core.request import Parameter
from paceline.core.tensor import Tensor
from paceline.dispatch import ChainRoute


@dataclass(frozen=True, slots=True)
class Arrive:
    """A request comes; its deadline is `budget_s` after it is handled."""

    at_s: float
    request: int
    chain: str
    inputs: Mapping[str, Tensor]
    budget_s: float
    outputs: tuple[str, ...] = ()
    priority: int | None = None
    version: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    stream: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A client cancels, or goes away."""

    at_s: float
    request: int


@dataclass(frozen=True, slots=True)
class Crash:
    """A machine dies with what it runs; the dispatcher hears of it `notice_s` later."""

    at_s: float
    machine: str
    notice_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Withdraw:
    """A machine is taken out in an orderly way: what it runs still ends."""

    at_s: float
    machine: str


@dataclass(frozen=True, slots=True)
class Start:
    """A machine is (again) there and healthy."""

    at_s: float
    machine: str


@dataclass(frozen=True, slots=True)
class Resize:
    """A machine has other slots or instances from now on."""

    at_s: float
    machine: str
    slots: int
    instances: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Slow:
    """A machine takes `factor` times as long for batches it starts from now on."""

    at_s: float
    machine: str
    factor: float


class Mishap(Enum):
    """What can happen to one batch."""

    HANG = "never answers"
    LOST_REPLY = "executes; the answer is lost"
    ERROR = "the model fails"
    UNREACHABLE = "the connection breaks before it starts"
    ROW_SHORT = "one row too few comes back"
    ROW_MORE = "one row too many comes back"
    NO_ROWS = "an output without row axis comes back"
    NOTHING = "no outputs come back"


@dataclass(frozen=True, slots=True)
class Fault:
    """The next `count` batches that start on a machine end badly."""

    at_s: float
    machine: str
    mishap: Mishap
    count: int = 1


@dataclass(frozen=True, slots=True)
class ClockJump:
    """Nothing is handled for a while (a suspended process): then everything at once, late."""

    at_s: float
    by_s: float


@dataclass(frozen=True, slots=True)
class Install:
    """A chain is served by this route from now on (also: it was planned anew)."""

    at_s: float
    route: ChainRoute


@dataclass(frozen=True, slots=True)
class Remove:
    """A chain is no longer served."""

    at_s: float
    chain: str


@dataclass(frozen=True, slots=True)
class Happen:
    """Something else of the world that is due."""

    at_s: float
    do: Callable[[], None]


Stimulus = (
    Arrive
    | GiveUp
    | Crash
    | Withdraw
    | Start
    | Resize
    | Slow
    | Fault
    | ClockJump
    | Install
    | Remove
    | Happen
)
