"""A chain bound to its models: datatypes and shapes checked, batch axes decided.

How a tensor becomes *rows* of a batch (axis 0 of what Triton sees) depends on the module:

| carry | a chain tensor of shape | becomes rows | rows per request |
|---|---|---|---|
| ONE | `dims` | `[1, *dims]` | 1 |
| ITEMS (`for_each`) | `[N, *dims]` | `[N, *dims]` | N |
| REQUEST (a model called by its own name) | `[n, *dims]` | `[n, *dims]` | n |

A model with `max_batch_size` 0 has no batch axis: it is executed row by row, without axis 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec

MOST_ROWS = 4096
"""Rows of one request: the items of a fan-out, the batch axis of a model called by its name."""


class Carry(Enum):
    """Where a module's rows come from; see the module docstring."""

    ONE = "one"
    ITEMS = "items"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class BoundInput:
    """A model input and its source; `per_item` says whether `for_each` slices it."""

    name: str
    source: Source
    per_item: bool


@dataclass(frozen=True, slots=True)
class BoundModule:
    """A module with its model's declaration; `outputs` are the ones somebody uses."""

    module: Module
    spec: ModelSpec
    carry: Carry
    inputs: tuple[BoundInput, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.module.name


@dataclass(frozen=True, slots=True)
class BoundChain:
    """What the dispatcher runs. `inputs` and `outputs` are what a client sees."""

    chain: Chain
    modules: tuple[BoundModule, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    direct: bool = False
    """A model under its own name: the client's version and parameters reach it."""

    @property
    def name(self) -> str:
        return self.chain.name

    @property
    def most_rows(self) -> int:
        """Rows of a request that carries a batch axis: of those beyond `max_batch_size` several
        batches are made.
        """
        return max(self.max_batch_size, MOST_ROWS)

    def output(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self.outputs if spec.name == name), None)


def bind(chain: Chain, models: Mapping[str, ModelSpec]) -> BoundChain:
    """Check `chain` against its models.

    Raises ConfigError naming the key for an unknown model, tensor, datatype or shape mismatch.
    """
    known: dict[Source, TensorSpec] = {Source(None, spec.name): spec for spec in chain.inputs}
    used = {s for m in chain.modules for s in m.sources} | set(chain.outputs.values())
    bound: list[BoundModule] = []
    for module in chain.modules:
        key = f"modules.{module.name}"
        spec = models.get(module.model)
        if spec is None:
            raise ConfigError(
                f"unknown model {module.model!r}; the repository has "
                f"{', '.join(sorted(models)) or 'none'}",
                key=f"{key}.model",
            )
        inputs = _bind_inputs(module, spec, known, key)
        _check_when(module, known, key)
        for output in spec.outputs:
            shape = (-1, *output.shape) if module.for_each is not None else output.shape
            known[Source(module.name, output.name)] = TensorSpec(
                output.name, output.datatype, shape
            )
        wanted = tuple(o.name for o in spec.outputs if Source(module.name, o.name) in used)
        carry = Carry.ITEMS if module.for_each is not None else Carry.ONE
        bound.append(BoundModule(module, spec, carry, inputs, wanted))
    outputs = tuple(
        _known(known, source, f"outputs.{name}", name) for name, source in chain.outputs.items()
    )
    return BoundChain(chain, tuple(bound), chain.inputs, outputs)


def single_model_chain(spec: ModelSpec) -> BoundChain:
    """The chain of one module that makes a model callable by its own name, as Triton would.

    It has no objective of its own: `slo_s` is a day, the client's deadline is what counts.
    """
    module = Module(
        spec.name.replace(".", "_"), spec.name, {t.name: Source(None, t.name) for t in spec.inputs}
    )
    chain = Chain(
        spec.name,
        slo_s=86_400.0,
        inputs=spec.inputs,
        modules=(module,),
        outputs={t.name: Source(module.name, t.name) for t in spec.outputs},
    )
    axis = (-1,) if spec.batches else ()
    inputs = tuple(TensorSpec(t.name, t.datatype, axis + t.shape, t.optional) for t in spec.inputs)
    outputs = tuple(TensorSpec(t.name, t.datatype, axis + t.shape) for t in spec.outputs)
    bound = BoundModule(
        module,
        spec,
        Carry.REQUEST if spec.batches else Carry.ONE,
        tuple(BoundInput(t.name, Source(None, t.name), per_item=False) for t in spec.inputs),
        tuple(t.name for t in spec.outputs),
    )
    return BoundChain(chain, (bound,), inputs, outputs, spec.max_batch_size, direct=True)


def _known(known: Mapping[Source, TensorSpec], source: Source, key: str, name: str) -> TensorSpec:
    spec = known.get(source)
    if spec is None:
        has = sorted(s.tensor for s in known if s.module == source.module)
        raise ConfigError(
            f"{source}: no such tensor; {source.module or 'inputs'} has {', '.join(has) or 'none'}",
            key=key,
        )
    return TensorSpec(name, spec.datatype, spec.shape)


def _bind_inputs(
    module: Module, spec: ModelSpec, known: Mapping[Source, TensorSpec], key: str
) -> tuple[BoundInput, ...]:
    declared = [t.name for t in spec.inputs]
    for name in module.inputs:
        if name not in declared:
            raise ConfigError(
                f"model {spec.name!r} has no input {name!r}; it has {', '.join(declared)}",
                key=f"{key}.inputs.{name}",
            )
    missing = [t.name for t in spec.inputs if not t.optional and t.name not in module.inputs]
    if missing:
        raise ConfigError(
            f"model {spec.name!r} also needs {', '.join(missing)}", key=f"{key}.inputs"
        )
    if module.for_each is not None:
        items = _known(known, module.for_each, f"{key}.for_each", "items")
        if not items.shape:
            raise ConfigError(f"{module.for_each} has no axis 0 to go over", key=f"{key}.for_each")
    bound: list[BoundInput] = []
    for want in spec.inputs:
        source = module.inputs.get(want.name)
        if source is None:
            continue
        got = _known(known, source, f"{key}.inputs.{want.name}", want.name)
        bound.append(_match(module, want, got, source, f"{key}.inputs.{want.name}"))
    if module.for_each is not None and not any(b.per_item for b in bound):
        raise ConfigError("no input is taken per item", key=f"{key}.for_each")
    return tuple(bound)


def _match(
    module: Module, want: TensorSpec, got: TensorSpec, source: Source, key: str
) -> BoundInput:
    if want.datatype != got.datatype:
        raise ConfigError(
            f"{source} is {got.datatype}, but model {module.model!r} takes {want.datatype}", key=key
        )
    # Under for_each a tensor of one axis more than the model takes is sliced along axis 0;
    # one of equal rank is given whole to every item.
    per_item = module.for_each is not None and len(got.shape) == len(want.shape) + 1
    shape = got.shape[1:] if per_item else got.shape
    if not want.accepts(shape):
        each = " per item" if per_item else ""
        raise ConfigError(
            f"{source} has shape {list(shape)}{each}, but model {module.model!r} takes "
            f"{list(want.shape)}",
            key=key,
        )
    return BoundInput(want.name, source, per_item)


def _check_when(module: Module, known: Mapping[Source, TensorSpec], key: str) -> None:
    if module.when is None:
        return
    spec = _known(known, module.when, f"{key}.when", "when")
    if spec.datatype != "BOOL" or any(axis not in (1, -1) for axis in spec.shape):
        raise ConfigError(
            f"{module.when} must be a one-element BOOL, not {spec.datatype} {list(spec.shape)}",
            key=f"{key}.when",
        )
