"""The only right answer of a request: its chain evaluated row by row, without any batching.

Written against formats.md and `core.bind`'s table alone; shares nothing with the dispatcher but
the models (`TracingModels.row_outputs`, a pure function of one row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paceline.core.bind import BoundChain, BoundModule, Carry
from paceline.core.chain import Source
from paceline.core.tensor import Tensor, TensorSpec, split_rows
from paceline.sim.content import TracingModels

RowKey = tuple[str, tuple[tuple[str, tuple[int, ...], bytes], ...]]
"""A row as a model sees it: the model's name and each input's name, shape and bytes."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request must execute and answer. `rows` by module, in order of items."""

    rows: Mapping[str, tuple[RowKey, ...]]
    wanted: Mapping[str, tuple[str, ...]]
    answer: tuple[tuple[str, str, tuple[int, ...], bytes], ...]


def row_key(model: str, inputs: list[Tensor]) -> RowKey:
    """`inputs` without row axis."""
    return model, tuple((t.name, t.shape, bytes(t.data)) for t in inputs)


def evaluate(
    bound: BoundChain,
    models: TracingModels,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
) -> Expected:
    """Everything that follows from a request's inputs and the outputs it asks for."""
    chain = bound.chain
    names = outputs or tuple(chain.outputs)
    values: dict[Source, Tensor] = {Source(None, name): t for name, t in inputs.items()}
    needed = _needed(bound, names) if outputs else {m.name for m in bound.modules}
    rows: dict[str, tuple[RowKey, ...]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    skipped: set[str] = set()
    for module in bound.modules:
        if module.name not in needed:
            continue
        when = module.module.when
        if any(parent in skipped for parent in module.module.parents) or (
            when is not None and bytes(values[when].data) == b"\0"
        ):
            skipped.add(module.name)
            rows[module.name] = ()
            continue
        items = _rows(module, values)
        wanted[module.name] = _wanted(bound, module, names if outputs else (), needed)
        rows[module.name] = tuple(row_key(module.spec.name, row) for row in items)
        answers = [models.row_outputs(module.spec, row) for row in items]
        for spec in module.spec.outputs:
            values[Source(module.name, spec.name)] = _gathered(
                module, spec, [answer[spec.name] for answer in answers]
            )
    answer = []
    for name in names:
        declared = bound.output(name)
        assert declared is not None
        value = values.get(chain.outputs[name])
        empty = (0, *(max(axis, 0) for axis in declared.shape[1:]))
        shape, data = (empty, b"") if value is None else (value.shape, bytes(value.data))
        answer.append((name, declared.datatype, shape, data))
    return Expected(rows, wanted, tuple(answer))


def _rows(module: BoundModule, values: Mapping[Source, Tensor]) -> list[list[Tensor]]:
    """Each row's inputs, without row axis."""
    whole = [(item, values[item.source].renamed(item.name)) for item in module.inputs]
    if module.carry is Carry.ONE:
        return [[tensor for _, tensor in whole]]
    if module.carry is Carry.ITEMS:
        assert module.module.for_each is not None
        count = values[module.module.for_each].shape[0]
    else:
        count = whole[0][1].shape[0]
    columns = []
    for item, tensor in whole:
        if module.carry is Carry.REQUEST or item.per_item:
            columns.append([_one(t) for t in split_rows(tensor, [1] * count)])
        else:
            columns.append([tensor] * count)
    return [list(row) for row in zip(*columns, strict=True)]


def _one(tensor: Tensor) -> Tensor:
    return tensor.reshaped(tensor.shape[1:])


def _gathered(module: BoundModule, spec: TensorSpec, parts: list[Tensor]) -> Tensor:
    if module.carry is Carry.ONE:
        return parts[0]
    inner = parts[0].shape if parts else tuple(max(axis, 0) for axis in spec.shape)
    data = b"".join(part.data for part in parts)
    return Tensor(spec.name, spec.datatype, (len(parts), *inner), data)


def _needed(bound: BoundChain, names: tuple[str, ...]) -> set[str]:
    needed = {bound.chain.outputs[name].module for name in names}
    for module in reversed(bound.modules):
        if module.name in needed:
            needed |= set(module.module.parents)
    return {name for name in needed if name is not None}


def _wanted(
    bound: BoundChain, module: BoundModule, names: tuple[str, ...], needed: set[str]
) -> tuple[str, ...]:
    """Outputs of a module that somebody uses, in the order of its declaration."""
    used = {bound.chain.outputs[name] for name in names or tuple(bound.chain.outputs)}
    used |= {s for m in bound.modules if m.name in needed for s in m.module.sources}
    declared = tuple(spec.name for spec in module.spec.outputs)
    return tuple(name for name in declared if Source(module.name, name) in used) or declared
