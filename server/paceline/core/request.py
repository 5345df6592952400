"""A request, its answer and where its time went. Instants are seconds on the event loop's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from paceline.core.tensor import Tensor
from paceline.core.values import value

Parameter = bool | int | float | str


@value
class InferRequest:
    """One inference as a client asked for it, validated only for its own consistency.

    `chain` is a chain's or a model's name; `outputs` empty means all. `budget_s` is the tightest
    of the client's deadline, `slo_ms` and `timeout`, None when it stated none. `parameters` are
    those that are not Paceline's: they are given to the model.
    """

    chain: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    request_id: str = ""
    version: str = ""
    budget_s: float | None = None
    priority: int | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    stream_items: bool = False
    """Whether the client of a stream wants the items of fan-outs as they come."""

    @property
    def size_bytes(self) -> int:
        return sum([len(tensor.data) for tensor in self.inputs])


@value
class Span:
    """Rows of one module in one batch: waited `queued_s .. started_s`, ran `.. ended_s`."""

    module: str
    model: str
    machine: str
    rows: int
    batch_size: int
    queued_s: float
    started_s: float
    ended_s: float


@value
class Timeline:
    """Everything that happened to one request."""

    request: int
    request_id: str
    chain: str
    arrived_s: float
    ended_s: float
    deadline_s: float
    spans: tuple[Span, ...]
    error: str = ""
    rejected: bool = False
    """Refused, or given up before all work was spent on it."""

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.arrived_s

    @property
    def met(self) -> bool:
        """Whether it was answered within its deadline."""
        return not self.error and self.ended_s <= self.deadline_s


@value
class InferAnswer:
    """Outputs in the order of the declaration (or of the request's own list)."""

    chain: str
    outputs: tuple[Tensor, ...]
    timeline: Timeline
