"""One request's walk through its chain: what has been computed, what can start, what it answers.

Invariant: a module starts once, when every tensor it needs is there; rows of a fan-out are
gathered in order whatever order their batches end in. A module is *skipped* when its `when` is
false or when it needs a tensor of a skipped module; its outputs are then typed empty tensors.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from math import prod

from paceline.core.bind import Carry
from paceline.core.errors import ErrorKind, Rejected, RequestError
from paceline.core.request import Span, Timeline
from paceline.core.tensor import ITEM_BYTES, Tensor, TensorSpec, encode_bytes, join_rows
from paceline.core.values import value
from paceline.dispatch.admission import Ticket
from paceline.dispatch.events import Submit
from paceline.dispatch.queue import Entry
from paceline.dispatch.stage import Served
from paceline.dispatch.walk import Output, Step, StepInput

ONE, REQUEST, ITEMS = Carry.ONE, Carry.REQUEST, Carry.ITEMS
_NONE: frozenset[int] = frozenset()


@value
class Work:
    """A module that can start now: `inputs` carry a row axis, `rows` long."""

    step: Step
    inputs: tuple[Tensor, ...]
    rows: int


@dataclass(slots=True)
class _Gather:
    """Row ranges that have ended: first row, count, outputs (None: failed, `on_error: skip`)."""

    done: int = 0
    parts: list[tuple[int, int, tuple[Tensor, ...] | None]] = field(default_factory=list)


class ChainRun:
    """See the module docstring. Raises RequestError where the data does not fit the chain."""

    __slots__ = (
        "_gathers",
        "_left",
        "_ready",
        "_rows",
        "_skipped",
        "_values",
        "_waits",
        "_walk",
        "arrived_s",
        "entries",
        "idle",
        "served",
        "spans",
        "submit",
        "ticket",
    )

    def __init__(self, submit: Submit, served: Served, ticket: Ticket, *, now_s: float) -> None:
        walk = served.route.walk(submit.outputs)
        self.submit = submit
        self.served = served
        self.ticket = ticket
        self.arrived_s = now_s
        self.entries: list[Entry] = []
        """What is queued or executed for it."""
        self.idle: list[Step] = []
        """Modules that ended without work, for whoever counts work to take away."""
        self.spans: list[Span] = []
        self._walk = walk
        inputs = submit.inputs
        self._values: list[Tensor | None] = [inputs.get(name) for name in walk.inputs]
        self._values += walk.blank
        self._ready = list(walk.first)
        """Steps that wait for no other, in order, and have not started."""
        self._waits = list(walk.waits)
        """How many parents of each step have not ended."""
        self._left = len(walk.steps)
        self._rows: dict[int, int] = {}
        """Rows of the steps that have started and not ended."""
        self._gathers: dict[int, _Gather] = {}
        self._skipped: frozenset[int] = _NONE

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the chain's modules it may run, in order."""
        return tuple(step.place for step in self._walk.steps)

    @property
    def done(self) -> bool:
        """Whether every module has ended."""
        return not self._left

    def ready(self) -> list[Work]:
        """Modules that can start now, each returned once; skips what does not run."""
        work: list[Work] = []
        steps, ready = self._walk.steps, self._ready
        while ready:
            step = steps[ready.pop(0)]
            started = self._start(step)
            if started is None:
                self.idle.append(step)
            else:
                work.append(started)
        return work

    def rows_done(
        self, step: Step, start: int, count: int, outputs: tuple[Tensor, ...] | None
    ) -> bool:
        """Rows `start ..` of a module have ended. Returns whether that completes the module.

        `outputs` carry the row axis, but of a module that runs once; None is a failure that
        `on_error: skip` allows.
        """
        rows = self._rows[step.number]
        if count < rows:
            gather = self._gathers.get(step.number)
            if gather is None:
                gather = self._gathers[step.number] = _Gather()
            gather.parts.append((start, count, outputs))
            gather.done += count
            assert gather.done <= rows, (step.bound.name, gather.done, rows)
            if gather.done < rows:
                return False
            gather.parts.sort(key=lambda part: part[0])
            failed = any(part[2] is None for part in gather.parts)
            if not failed or step.bound.carry is ITEMS:
                outputs = tuple(_gathered(step, gather, index) for index in range(len(step.wanted)))
            else:
                outputs = None
        elif outputs is None and step.bound.carry is ITEMS:
            gather = _Gather(count, [(start, count, None)])
            outputs = tuple(_gathered(step, gather, index) for index in range(len(step.wanted)))
        if outputs is None:
            self._skipped |= {step.number}
        else:
            values = self._values
            for number, tensor in zip(step.values, outputs, strict=True):
                values[number] = tensor
        self._finish(step)
        return True

    def partial(self, step: Step, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Those of a fan-out's row outputs that the request asked for, under the chain's names."""
        if step.bound.carry is not ITEMS or step.number not in self._rows:
            return ()
        by_value = dict(zip(step.values, outputs, strict=True))
        wanted = {output.name: output.value for output in self._walk.answer}
        return tuple(
            by_value[wanted[name]].renamed(name)
            for name in self.served.route.bound.chain.outputs
            if wanted.get(name) in by_value
        )

    def answer(self) -> tuple[Tensor, ...]:
        """The outputs asked for, under the chain's names."""
        values = self._values
        return tuple(
            [
                found.renamed(output.name)
                if (found := values[output.value]) is not None
                else _nothing(output)
                for output in self._walk.answer
            ]
        )

    def timeline(self, now_s: float, error: RequestError | None = None) -> Timeline:
        submit = self.submit
        return Timeline(
            submit.request,
            submit.request_id,
            submit.chain,
            self.arrived_s,
            now_s,
            submit.deadline_s,
            tuple(self.spans),
            error.message if error is not None else "",
            isinstance(error, Rejected),
        )

    def _start(self, step: Step) -> Work | None:
        """The module's work, or None where it ended at once (skipped or no items)."""
        if (self._skipped or step.when is not None) and self._skips(step):
            self._skipped |= {step.number}
            self._finish(step)
            return None
        if step.bound.carry is ONE:
            rows = 1
        else:
            rows = self._row_count(step)
            if rows == 0 and step.bound.carry is ITEMS:
                for spec, number in zip(step.declared, step.values, strict=True):
                    self._values[number] = _empty(spec, (0, *spec.shape))
                self._finish(step)
                return None
        self._rows[step.number] = rows
        inputs = [
            self._row_input(step, item, found, rows)
            for item in step.inputs
            if (found := self._values[item.value]) is not None
        ]
        return Work(step, tuple(inputs), rows)

    def _finish(self, step: Step) -> None:
        self._left -= 1
        self._rows.pop(step.number, None)
        if self._gathers:
            self._gathers.pop(step.number, None)
        for child in step.children:
            self._waits[child] -= 1
            if not self._waits[child]:
                insort(self._ready, child)

    def _skips(self, step: Step) -> bool:
        """Whether a parent was skipped or its `when` is false."""
        if any(parent in self._skipped for parent in step.parents):
            return True
        if step.when is None:
            return False
        given = self._values[step.when]
        assert given is not None, step
        if len(given.data) != 1:
            raise RequestError(
                ErrorKind.BACKEND,
                f"module {step.bound.name!r}: {step.bound.module.when} must be one BOOL, "
                f"got shape {list(given.shape)}",
            )
        return given.data[0] == 0

    def _row_count(self, step: Step) -> int:
        if step.items is None:
            given = next(v for i in step.inputs if (v := self._values[i.value]) is not None)
            return given.shape[0]
        items = self._values[step.items]
        assert items is not None, step
        rows = items.shape[0]
        if rows > self.served.route.max_items:
            raise RequestError(
                ErrorKind.INVALID,
                f"module {step.bound.name!r}: {step.bound.module.for_each} has {rows} items, "
                f"the limit is {self.served.route.max_items}",
            )
        return rows

    @staticmethod
    def _row_input(step: Step, item: StepInput, given: Tensor, rows: int) -> Tensor:
        carry = step.bound.carry
        if carry is ONE:
            return Tensor(item.name, given.datatype, (1, *given.shape), given.data)
        if carry is REQUEST or item.per_item:
            if given.shape[0] != rows:
                raise RequestError(
                    ErrorKind.BACKEND,
                    f"module {step.bound.name!r}: {item.source} has {given.shape[0]} items "
                    f"where {rows} are expected",
                )
            return given.renamed(item.name)
        return Tensor(item.name, given.datatype, (rows, *given.shape), bytes(given.data) * rows)


def _nothing(output: Output) -> Tensor:
    """The output of a module that did not run."""
    spec = output.spec
    return _empty(spec, (0,) if not spec.shape else (0, *spec.shape[1:]))


def _empty(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    return Tensor(spec.name, spec.datatype, tuple(max(axis, 0) for axis in shape), b"")


def _gathered(step: Step, gather: _Gather, index: int) -> Tensor:
    """One output of a module from its parts, in order; failed items become typed nulls."""
    good = [outputs[index] for _, _, outputs in gather.parts if outputs is not None]
    if len(good) == len(gather.parts):
        tensors = good
    else:
        spec = step.declared[index]
        row = good[0].shape[1:] if good else tuple(max(axis, 0) for axis in spec.shape)
        tensors = [
            outputs[index] if outputs is not None else _null(spec, (count, *row))
            for _, count, outputs in gather.parts
        ]
    try:
        return join_rows(tensors)
    except ValueError as error:
        message = f"module {step.bound.name!r}: {error}"
        raise RequestError(ErrorKind.BACKEND, message) from None


def _null(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    """Zeros, or BYTES elements of no length."""
    size = prod(shape) * ITEM_BYTES.get(spec.datatype, len(encode_bytes([b""])))
    return Tensor(spec.name, spec.datatype, shape, bytes(size))
