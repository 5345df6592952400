"""Runs: consecutive modules of a chain that Triton executes at once, as one ensemble.

A module joins the one before it where nothing but the round trip between them is lost: it waits
for that one alone (the chain's own inputs aside), and nobody else needs what that one gives. So a
request needs all modules of a run or none, and none of them waits for anything that the first does
not wait for. Fan-outs, conditions and partial failures stay with the dispatcher.

Invariant: the chain with its runs merged has the inputs and outputs of the chain without, and
computes the same. A run's name is its modules' names, joined by a sign that none of them holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec

JOINT = "+"

MODEL_PREFIX = "paceline-run-"
"""What the models start with that Paceline composes of others."""


def modules_in(name: str) -> list[str]:
    """The modules that a module's name stands for.

    >>> modules_in("a+b"), modules_in("a")
    (['a', 'b'], ['a'])
    """
    return name.split(JOINT)


def runs_of(chain: Chain) -> tuple[Module, ...]:
    """The runs of `chain`, each as long as possible and as one module, in topological order; none
    where its file wants none.
    """
    if chain.runs == "off":
        return ()
    exposed = {source.module for source in chain.outputs.values()}
    runs: dict[str, list[Module]] = {}
    for module in chain.modules:
        (before,) = module.parents if len(module.parents) == 1 else (None,)
        run = runs.get(before or "")
        if run is not None and _joins(chain, run[-1], module) and before not in exposed:
            del runs[run[-1].name]
            runs[module.name] = [*run, module]
        else:
            runs[module.name] = [module]
    return tuple(_as_module(chain, run) for run in runs.values() if len(run) > 1)


def merge(chain: Chain, runs: Collection[Module]) -> Chain:
    """`chain` with each of its `runs` as one module; the chain itself where there are none."""
    if not runs:
        return chain
    last = {run.members[-1].name: run for run in runs}
    inner = {member.name for run in runs for member in run.members[:-1]}

    def moved(source: Source) -> Source:
        run = last.get(source.module or "")
        return source if run is None else Source(run.name, source.tensor)

    def moved_module(module: Module) -> Module:
        module = last.get(module.name, module)
        return replace(
            module,
            inputs={name: moved(source) for name, source in module.inputs.items()},
            for_each=module.for_each and moved(module.for_each),
            when=module.when and moved(module.when),
        )

    return replace(
        chain,
        modules=tuple(moved_module(m) for m in chain.modules if m.name not in inner),
        outputs={name: moved(source) for name, source in chain.outputs.items()},
    )


def run_spec(run: Module, models: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The declaration of a run's model: the inputs are named as the tensors they are in the
    chain, the outputs as its last module's.

    None where its modules cannot be executed at once: some batch and others do not, a model is
    unknown, or a tensor's name means two things.
    """
    specs = [models[member.model] for member in run.members if member.model in models]
    if len(specs) < len(run.members) or len({spec.batches for spec in specs}) > 1:
        return None
    names = {member.name for member in run.members}
    inputs: dict[str, TensorSpec] = {}
    for member, spec in zip(run.members, specs, strict=True):
        for name, source in member.inputs.items():
            wanted = spec.input(name)
            if wanted is not None and source.module not in names:
                tensor = TensorSpec(str(source), wanted.datatype, wanted.shape)
                inputs.setdefault(tensor.name, tensor)
    outputs = specs[-1].outputs
    between = {str(source) for member in run.members for source in member.inputs.values()}
    if any(tensor.name in between for tensor in outputs):
        return None
    return ModelSpec(
        run.model,
        min(spec.max_batch_size for spec in specs),
        tuple(inputs.values()),
        outputs,
        platform="ensemble",
    )


def _joins(chain: Chain, before: Module, module: Module) -> bool:
    plain = all(m.for_each is None and m.when is None for m in (before, module))
    whole = before.on_error == module.on_error == "fail" and before.fan_out == module.fan_out
    return plain and whole and chain.children(before.name) == (module.name,)


def _as_module(chain: Chain, members: Sequence[Module]) -> Module:
    """Named for what it is made of, its model for how that is wired: other wiring, other model."""
    names = {member.name for member in members}
    outside = {
        str(source): source
        for member in members
        for source in member.inputs.values()
        if source.module not in names
    }
    wiring = [(m.name, m.model, sorted((k, str(v)) for k, v in m.inputs.items())) for m in members]
    mark = hashlib.sha256(repr(wiring).encode()).hexdigest()[:12]
    return Module(
        JOINT.join(member.name for member in members),
        f"{MODEL_PREFIX}{chain.name}-{mark}",
        outside,
        fan_out=members[-1].fan_out,
        members=tuple(members),
    )
