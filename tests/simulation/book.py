"""What the oracle knows: requests, their rows, machines and batches as seen from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.simulation.reference import Expected, RowKey, row_key

from paceline.core.bind import BoundModule
from paceline.core.model import ModelSpec
from paceline.core.tensor import BatchTensor, Tensor, split_rows
from paceline.dispatch import ChainRoute, Execute, Submit

Answered = tuple[tuple[str, str, tuple[int, ...], bytes], ...]
"""Name, datatype, shape and bytes of each output."""


class Violation(AssertionError):
    """Something that must never happen; `check` names which rule."""

    def __init__(self, check: str, message: str) -> None:
        self.check = check
        super().__init__(f"{check}: {message}")


@dataclass(slots=True, eq=False)
class Row:
    request: Request
    module: str
    index: int
    on: list[BatchSeen] = field(default_factory=list)
    """Batches that hold it now."""
    done: bool = False
    failed: bool = False
    lost_on: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Request:
    submit: Submit
    route: ChainRoute
    expected: Expected
    rows: dict[str, list[Row]] = field(default_factory=dict)
    end: str = ""
    streamed: dict[str, set[int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"request {self.submit.request} ({self.submit.chain})"


@dataclass(slots=True)
class MachineSeen:
    hardware: str
    slots: int
    instances: Mapping[str, int]
    running: dict[int, str] = field(default_factory=dict)
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class BatchSeen:
    machine: str
    incarnation: str
    rows: tuple[Row, ...]
    outputs: tuple[str, ...]
    spec: ModelSpec
    overdue_s: float
    """From when on its rows may be tried elsewhere as well."""


def module_of(row: Row) -> BoundModule:
    return next(m for m in row.request.route.bound.modules if m.name == row.module)


def skips(row: Row) -> bool:
    return module_of(row).module.on_error == "skip"


def with_nulls(request: Request, got: Answered) -> Answered:
    """The expected answer; a failed item that may be skipped is null: zeros, or no text."""
    chain = request.route.bound.chain
    expected = []
    for place, (name, datatype, planned, data) in enumerate(request.expected.answer):
        shape = planned
        source = chain.outputs[name].module
        rows = request.rows.get(source or "", [])
        if source is None or all(row.done for row in rows) or place >= len(got):
            expected.append((name, datatype, shape, data))
            continue
        right = split_rows(Tensor(name, datatype, shape, data), [1] * len(rows))
        parts = [bytes(t.data) for t in right]
        if got[place][2] == shape and any(row.done for row in rows):
            theirs = split_rows(Tensor(*got[place]), [1] * len(rows))
            nulls = {row.index: bytes(theirs[row.index].data) for row in rows if not row.done}
            parts = [nulls.get(index, part) for index, part in enumerate(parts)]
            if any(any(null) for null in nulls.values()):
                parts = []  # an item that failed must not look like one that did not
        elif not any(got[place][3]):
            shape, parts = got[place][2], [got[place][3]]  # nothing tells how long its rows are
        expected.append((name, datatype, shape, b"".join(parts)))
    return tuple(expected)


def row_keys(action: Execute, batches: bool) -> list[RowKey]:
    joined = [_joined(tensor) for tensor in action.call.inputs]
    if not batches:
        return [row_key(action.call.model, joined)]
    try:
        columns = [split_rows(tensor, [1] * action.rows) for tensor in joined]
    except ValueError as error:
        raise Violation("batch", f"batch {action.batch}: {error}") from None
    return [
        row_key(action.call.model, [t.reshaped(t.shape[1:]) for t in row])
        for row in zip(*columns, strict=True)
    ]


def _joined(tensor: BatchTensor) -> Tensor:
    return Tensor(tensor.name, tensor.datatype, tensor.shape, b"".join(tensor.parts))
