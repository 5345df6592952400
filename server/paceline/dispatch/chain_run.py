"""One request's walk through its chain: what has been computed, what can start, what it answers.

Invariant: a module starts once, when every tensor it needs is there; rows of a fan-out are
gathered in order whatever order their batches end in. A module is *skipped* when its `when` is
false or when it needs a tensor of a skipped module; its outputs are then typed empty tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from math import prod

from paceline.core.bind import BoundInput, BoundModule, Carry
from paceline.core.chain import Source
from paceline.core.errors import ErrorKind, Rejected, RequestError
from paceline.core.request import Span, Timeline
from paceline.core.tensor import ITEM_BYTES, Tensor, TensorSpec, encode_bytes, join_rows
from paceline.core.values import value
from paceline.dispatch.admission import Ticket
from paceline.dispatch.events import Submit
from paceline.dispatch.queue import Entry
from paceline.dispatch.route import ChainRoute, ModuleRoute


@value
class Work:
    """A module that can start now: `inputs` carry a row axis, `rows` long."""

    route: ModuleRoute
    inputs: tuple[Tensor, ...]
    rows: int


@dataclass(slots=True)
class _Gather:
    """Row ranges that have ended: first row, count, outputs (None: failed, `on_error: skip`)."""

    rows: int
    done: int = 0
    parts: list[tuple[int, int, tuple[Tensor, ...] | None]] = field(default_factory=list)


class ChainRun:
    """See the module docstring. Raises RequestError where the data does not fit the chain."""

    __slots__ = (
        "_gathers",
        "_left",
        "_skipped",
        "_sources",
        "_started",
        "_values",
        "arrived_s",
        "entries",
        "idle",
        "route",
        "spans",
        "submit",
        "ticket",
    )

    def __init__(self, submit: Submit, route: ChainRoute, ticket: Ticket, *, now_s: float) -> None:
        self.submit = submit
        self.route = route
        self.ticket = ticket
        self.arrived_s = now_s
        self.entries: set[Entry] = set()
        self.idle: list[ModuleRoute] = []
        """Modules that ended without work, for whoever counts work to take away."""
        self.spans: list[Span] = []
        self._values: dict[Source, Tensor] = {
            Source(None, name): tensor for name, tensor in submit.inputs.items()
        }
        self._skipped: set[str] = set()
        self._gathers: dict[str, _Gather] = {}
        needed = _needed(route, submit.outputs)
        self._left = {m.bound.name: m for m in route.modules if m.bound.name in needed}
        self._sources: set[Source] | None = None
        if submit.outputs:
            chain = route.bound.chain
            self._sources = {chain.outputs[name] for name in submit.outputs}
            self._sources |= {s for m in self._left.values() for s in m.bound.module.sources}
        self._started: set[str] = set()

    @property
    def done(self) -> bool:
        """Whether every module has ended."""
        return not self._left

    def ready(self) -> list[Work]:
        """Modules that can start now, each returned once; skips what does not run."""
        work: list[Work] = []
        moved = True
        while moved:
            moved = False
            for name, module in list(self._left.items()):
                waiting = any(parent in self._left for parent in module.bound.module.parents)
                if waiting or name in self._started:
                    continue
                self._started.add(name)
                ready = self._start(module)
                if ready is None:
                    self.idle.append(module)
                    moved = True
                else:
                    work.append(ready)
        return work

    def rows_done(
        self, name: str, start: int, count: int, outputs: tuple[Tensor, ...] | None
    ) -> bool:
        """Rows `start ..` of a module have ended; `outputs` carry the row axis, None is a failure
        that `on_error: skip` allows. Returns whether that completes the module.
        """
        gather = self._gathers[name]
        gather.parts.append((start, count, outputs))
        gather.done += count
        assert gather.done <= gather.rows, (name, gather.done, gather.rows)
        if gather.done < gather.rows:
            return False
        gather.parts.sort(key=lambda part: part[0])
        bound = self._left[name].bound
        if bound.carry is not Carry.ITEMS and any(part[2] is None for part in gather.parts):
            self._skipped.add(name)
        else:
            for index, tensor_name in enumerate(self.wanted(bound)):
                gathered = _gathered(bound, gather, index, tensor_name)
                self._values[Source(name, tensor_name)] = gathered
        self._finish(name)
        return True

    def partial(self, name: str, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Those of a fan-out's row outputs that the request asked for, under the chain's names."""
        bound = self._left[name].bound if name in self._left else None
        if bound is None or bound.carry is not Carry.ITEMS:
            return ()
        by_name = dict(zip(self.wanted(bound), outputs, strict=True))
        chain = self.route.bound.chain
        return tuple(
            by_name[source.tensor].renamed(output)
            for output, source in chain.outputs.items()
            if source.module == name and source.tensor in by_name
            if not self.submit.outputs or output in self.submit.outputs
        )

    def wanted(self, bound: BoundModule) -> tuple[str, ...]:
        """The outputs to ask the model for: those that the request or a later module uses."""
        used = bound.outputs
        if self._sources is not None:
            used = tuple(name for name in used if Source(bound.name, name) in self._sources)
        return used or tuple(spec.name for spec in bound.spec.outputs)

    def answer(self) -> tuple[Tensor, ...]:
        """The outputs asked for, under the chain's names."""
        chain = self.route.bound.chain
        names = self.submit.outputs or tuple(chain.outputs)
        return tuple(self._output(name, chain.outputs[name]) for name in names)

    def timeline(self, now_s: float, error: RequestError | None = None) -> Timeline:
        return Timeline(
            request=self.submit.request,
            request_id=self.submit.request_id,
            chain=self.submit.chain,
            arrived_s=self.arrived_s,
            ended_s=now_s,
            deadline_s=self.submit.deadline_s,
            spans=tuple(self.spans),
            error=error.message if error is not None else "",
            rejected=isinstance(error, Rejected),
        )

    def _output(self, name: str, source: Source) -> Tensor:
        value = self._values.get(source)
        if value is not None:
            return value.renamed(name)
        spec = self.route.bound.output(name)
        assert spec is not None, name
        return _empty(spec, (0,) if not spec.shape else (0, *spec.shape[1:]))

    def _start(self, module: ModuleRoute) -> Work | None:
        """The module's work, or None where it ended at once (skipped or no items)."""
        bound = module.bound
        declared = bound.module
        if any(p in self._skipped for p in declared.parents) or not self._when(bound):
            self._skipped.add(bound.name)
            self._finish(bound.name)
            return None
        rows = self._row_count(bound)
        if rows == 0 and bound.carry is Carry.ITEMS:
            for spec in bound.spec.outputs:
                self._values[Source(bound.name, spec.name)] = _empty(spec, (0, *spec.shape))
            self._finish(bound.name)
            return None
        self._gathers[bound.name] = _Gather(rows)
        inputs = tuple(
            self._row_input(bound, item, rows)
            for item in bound.inputs
            if item.source in self._values
        )
        return Work(module, inputs, rows)

    def _finish(self, name: str) -> None:
        del self._left[name]
        self._gathers.pop(name, None)

    def _when(self, bound: BoundModule) -> bool:
        source = bound.module.when
        if source is None:
            return True
        value = self._values[source]
        if len(value.data) != 1:
            raise RequestError(
                ErrorKind.BACKEND,
                f"module {bound.name!r}: {source} must be one BOOL, got shape {list(value.shape)}",
            )
        return value.data[0] != 0

    def _row_count(self, bound: BoundModule) -> int:
        if bound.carry is Carry.ONE:
            return 1
        if bound.carry is Carry.REQUEST:
            given = next(i.source for i in bound.inputs if i.source in self._values)
            return self._values[given].shape[0]
        assert bound.module.for_each is not None, bound
        rows = self._values[bound.module.for_each].shape[0]
        if rows > self.route.max_items:
            raise RequestError(
                ErrorKind.INVALID,
                f"module {bound.name!r}: {bound.module.for_each} has {rows} items, "
                f"the limit is {self.route.max_items}",
            )
        return rows

    def _row_input(self, bound: BoundModule, item: BoundInput, rows: int) -> Tensor:
        value = self._values[item.source].renamed(item.name)
        if bound.carry is Carry.ONE:
            return value.reshaped((1, *value.shape))
        if bound.carry is Carry.REQUEST or item.per_item:
            if value.shape[0] != rows:
                raise RequestError(
                    ErrorKind.BACKEND,
                    f"module {bound.name!r}: {item.source} has {value.shape[0]} items "
                    f"where {rows} are expected",
                )
            return value
        shape = (rows, *value.shape)
        return Tensor(value.name, value.datatype, shape, bytes(value.data) * rows)


def _needed(route: ChainRoute, outputs: Iterable[str]) -> Set[str]:
    """Modules that the requested outputs depend on; all when none are named."""
    chain = route.bound.chain
    wanted = [chain.outputs[name].module for name in outputs]
    if not wanted:
        return route.names
    found: set[str] = set()
    stack = [name for name in wanted if name is not None]
    while stack:
        name = stack.pop()
        if name not in found:
            found.add(name)
            stack += chain.module(name).parents
    return found


def _empty(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    return Tensor(spec.name, spec.datatype, tuple(max(axis, 0) for axis in shape), b"")


def _gathered(bound: BoundModule, gather: _Gather, index: int, tensor_name: str) -> Tensor:
    """One output of a module from its parts, in order; failed items become typed nulls."""
    name = bound.module.name
    good = [outputs[index] for _, _, outputs in gather.parts if outputs is not None]
    if len(good) == len(gather.parts):
        tensors = good
    else:
        spec = bound.spec.output(tensor_name)
        assert spec is not None, (name, tensor_name)
        row = good[0].shape[1:] if good else tuple(max(axis, 0) for axis in spec.shape)
        tensors = [
            outputs[index] if outputs is not None else _null(spec, (count, *row))
            for _, count, outputs in gather.parts
        ]
    try:
        joined = join_rows(tensors)
    except ValueError as error:
        raise RequestError(ErrorKind.BACKEND, f"module {name!r}: {error}") from None
    return joined.reshaped(joined.shape[1:]) if bound.carry is Carry.ONE else joined


def _null(spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    """Zeros, or BYTES elements of no length."""
    size = prod(shape) * ITEM_BYTES.get(spec.datatype, len(encode_bytes([b""])))
    return Tensor(spec.name, spec.datatype, shape, bytes(size))
