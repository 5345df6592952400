"""A chain compiled for the outputs that a request asks for.

What every request would look up by name - where a tensor comes from, who waits for whom, which
outputs to ask a model for - is worked out once: modules become steps, tensors become numbered
values. Invariants: steps are in topological order, so that children come after their parents; a
walk holds exactly the modules that its outputs depend on (all of them when none are named).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from paceline.core.bind import BoundChain, BoundModule
from paceline.core.chain import Source
from paceline.core.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class StepInput:
    """A model input: the value it is, and whether it is taken per item."""

    name: str
    value: int
    per_item: bool
    source: Source


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One module. `wanted` are the outputs to ask its model for, `values` where they go.

    `number` is its index among the steps, `place` the module's in the chain.
    """

    number: int
    place: int
    bound: BoundModule
    parents: tuple[int, ...]
    children: tuple[int, ...]
    inputs: tuple[StepInput, ...]
    when: int | None
    items: int | None
    wanted: tuple[str, ...]
    declared: tuple[TensorSpec, ...]
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """An output under the chain's name: the value it is, and what it is declared as."""

    name: str
    value: int
    source: Source
    spec: TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """See the module docstring. The first values are the chain's `inputs`.

    `blank` holds a None for each of the others, `waits` how many parents each step has.
    """

    steps: tuple[Step, ...]
    first: tuple[int, ...]
    """Steps that wait for no other."""
    waits: tuple[int, ...]
    inputs: tuple[str, ...]
    blank: tuple[None, ...]
    answer: tuple[Output, ...]


def walk_of(chain: BoundChain, outputs: tuple[str, ...]) -> Walk:
    """The walk that gives these outputs, all of the chain's when none are named."""
    declared = chain.chain.outputs
    needed = _needed(chain, outputs)
    modules = [(place, m) for place, m in enumerate(chain.modules) if m.name in needed]
    used: set[Source] | None = None
    if outputs:
        used = {declared[name] for name in outputs}
        used |= {source for _, m in modules for source in m.module.sources}
    values = {Source(None, spec.name): number for number, spec in enumerate(chain.inputs)}
    wanted = [_wanted(m, used) for _, m in modules]
    for (_, module), names in zip(modules, wanted, strict=True):
        for name in names:
            values[Source(module.name, name)] = len(values)
    order = [m.name for _, m in modules]
    steps = tuple(
        _step(chain, place, names, order, values)
        for (place, _), names in zip(modules, wanted, strict=True)
    )
    specs = {spec.name: spec for spec in chain.outputs}
    return Walk(
        steps,
        tuple(step.number for step in steps if not step.parents),
        tuple(len(step.parents) for step in steps),
        tuple(spec.name for spec in chain.inputs),
        (None,) * (len(values) - len(chain.inputs)),
        tuple(
            Output(name, values[declared[name]], declared[name], specs[name])
            for name in outputs or declared
        ),
    )


def _step(
    chain: BoundChain,
    place: int,
    wanted: tuple[str, ...],
    order: list[str],
    values: dict[Source, int],
) -> Step:
    bound = chain.modules[place]
    module = bound.module
    children = chain.chain.children(bound.name)
    declared = {spec.name: spec for spec in bound.spec.outputs}
    return Step(
        number=order.index(bound.name),
        place=place,
        bound=bound,
        parents=tuple(order.index(parent) for parent in module.parents),
        children=tuple(number for number, name in enumerate(order) if name in children),
        inputs=tuple(
            StepInput(i.name, values[i.source], i.per_item, i.source) for i in bound.inputs
        ),
        when=values[module.when] if module.when is not None else None,
        items=values[module.for_each] if module.for_each is not None else None,
        wanted=wanted,
        declared=tuple(declared[name] for name in wanted),
        values=tuple(values[Source(bound.name, name)] for name in wanted),
    )


def _wanted(bound: BoundModule, used: Set[Source] | None) -> tuple[str, ...]:
    """The outputs that the request or a later module uses; all where nobody uses any."""
    names = bound.outputs
    if used is not None:
        names = tuple(name for name in names if Source(bound.name, name) in used)
    return names or tuple(spec.name for spec in bound.spec.outputs)


def _needed(chain: BoundChain, outputs: tuple[str, ...]) -> Set[str]:
    """Modules that these outputs depend on; all when none are named."""
    if not outputs:
        return {module.name for module in chain.modules}
    found: set[str] = set()
    stack = [chain.chain.outputs[name].module for name in outputs]
    while stack:
        name = stack.pop()
        if name is not None and name not in found:
            found.add(name)
            stack += chain.chain.module(name).parents
    return found
