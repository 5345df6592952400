"""How the members of a fused chain are wired, and what a request of it has to run. Pure.

The part `wiring` of a manifest; docs/blocks-format.md. Standard library only, as `manifest`.
Invariant: a Wiring that exists is sound - every value a step takes is an input of the model or
made by an earlier step, and every name that becomes a file's leads nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("blocks", "python")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}\Z")


class WiringError(ValueError):
    """A wiring that cannot be."""


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor as config.pbtxt declares it: `dims` without the batch axis."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One member. `batched`: its tensors have a batch axis. `config` is its own ModelConfig."""

    module: str
    model: str
    kind: str
    version: str
    batched: bool
    inputs: Mapping[str, str]
    """Its input -> the value it is."""
    outputs: tuple[Port, ...]
    config: Mapping[str, Any]

    def value(self, output: str) -> str:
        return value_name(self.module, output)


@dataclass(frozen=True, slots=True)
class Wiring:
    """Steps in the order of execution. `inputs` are what they need from outside, `outputs` values.

    Members that are `own` can also be called alone: their inputs are then given as
    `<module>/<input>` (`own_inputs`), which goes before what they are wired to.
    """

    max_batch: int
    code: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    own_inputs: tuple[Port, ...]
    steps: tuple[Step, ...]

    def needed(self, outputs: Collection[str], given: Collection[str] = ()) -> tuple[Planned, ...]:
        """The steps that contribute to `outputs`, in order, for a request that brings `given`."""
        replaced = {port.name for port in self.own_inputs}.intersection(given)
        wanted = set(outputs)
        chosen = []
        for step in reversed(self.steps):
            names = tuple(port.name for port in step.outputs if step.value(port.name) in wanted)
            if names:
                takes = {
                    name: GIVEN + own if (own := step.value(name)) in replaced else value
                    for name, value in step.inputs.items()
                }
                chosen.append(Planned(step, takes, names))
                wanted.update(takes.values())
        return tuple(reversed(chosen))

    def forks(self, module: str) -> bool:
        """Whether some other step neither needs what this one makes nor makes what it needs."""
        before: dict[str, set[str]] = {}
        makers = {
            step.value(port.name): step.module for step in self.steps for port in step.outputs
        }
        for step in self.steps:
            parents = {makers[value] for value in step.inputs.values() if value in makers}
            before[step.module] = parents.union(*(before[parent] for parent in parents))
        return any(
            other != module and other not in before[module] and module not in behind
            for other, behind in before.items()
        )

    @property
    def optional(self) -> frozenset[str]:
        """Inputs that a request for some output need not bring."""
        ports = frozenset(port.name for port in self.inputs)
        own = frozenset(port.name for port in self.own_inputs)
        if own:
            return ports | own
        return ports - frozenset.intersection(
            *(
                frozenset(v for plan in self.needed([port.name]) for v in plan.takes.values())
                for port in self.outputs
            )
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """A step of a request: the value each of its inputs is, and the outputs it has to give."""

    step: Step
    takes: Mapping[str, str]
    gives: tuple[str, ...]


GIVEN = "="
"""Before the name of an `own_inputs` port: the value that a request brings for it."""


def value_name(module: str | None, tensor: str) -> str:
    """What a module's tensor is called outside; `module` None: an input of the chain."""
    return tensor if module is None else f"{module}/{tensor}"


def parse_wiring(entry: Any, members: Collection[str]) -> Wiring:
    """The wiring of a manifest with these members. Raises WiringError, KeyError, TypeError."""
    wiring = Wiring(
        max_batch=int(entry["max_batch"]),
        code=_name(entry["code"]),
        inputs=tuple(map(_port, entry["inputs"])),
        outputs=tuple(map(_port, entry["outputs"])),
        own_inputs=tuple(map(_port, entry["own_inputs"])),
        steps=tuple(map(_step, entry["steps"])),
    )
    known = {port.name for port in wiring.inputs}
    for step in wiring.steps:
        if step.kind == "blocks" and step.module not in members:
            raise WiringError(f"wiring: step {step.module!r} has no member")
        for value in step.inputs.values():
            if value not in known:
                raise WiringError(f"wiring: step {step.module!r}: nothing gives {value!r}")
        known.update(step.value(port.name) for port in step.outputs)
    for port in wiring.outputs:
        if port.name not in known:
            raise WiringError(f"wiring: no step gives the output {port.name!r}")
    return wiring


def _step(entry: Any) -> Step:
    if entry["kind"] not in KINDS:
        raise WiringError(f"wiring: kind is {entry['kind']!r}, known are {', '.join(KINDS)}")
    return Step(
        module=_name(entry["module"]),
        model=str(entry["model"]),
        kind=entry["kind"],
        version=_name(entry["version"]),
        batched=bool(entry["batched"]),
        inputs={str(name): str(value) for name, value in entry["inputs"].items()},
        outputs=tuple(map(_port, entry["outputs"])),
        config=dict(entry["config"]),
    )


def _port(entry: Any) -> Port:
    return Port(str(entry["name"]), str(entry["dtype"]), tuple(map(int, entry["dims"])))


def _name(text: Any) -> str:
    if not isinstance(text, str) or not _NAME.match(text):
        raise WiringError(f"wiring: {text!r} is no name of a directory")
    return text
