"""Chains: DAGs of modules with an end-to-end objective, as declared in a chain file.

Invariant: a `Chain` that exists is well formed - names are unique, every reference resolves,
there is no cycle, `modules` is in topological order (ties in the order of the file).
Datatypes and shapes need the models: `core.bind` checks those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from paceline.core.errors import ConfigError
from paceline.core.tensor import TensorSpec

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""What chains and modules may be called; a module's name has no dot."""

ARRIVALS = ("poisson", "uniform")
ON_ERROR = ("fail", "skip")
Dispatch = Literal["pooled", "throughput-cost", "round-robin"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)
Runs = Literal["auto", "off"]
RUNS: tuple[Runs, ...] = get_args(Runs)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor comes from: a module's output, or (module None) the chain's input."""

    module: str | None
    tensor: str

    @classmethod
    def parse(cls, text: str, *, key: str) -> Source:
        """`inputs.image` or `detect.crops`; ConfigError otherwise."""
        module, dot, tensor = text.partition(".")
        if not dot or not module or not tensor:
            raise ConfigError(f"{text!r} is not 'inputs.NAME' or 'MODULE.OUTPUT'", key=key)
        return cls(None if module == "inputs" else module, tensor)

    def __str__(self) -> str:
        return f"{self.module or 'inputs'}.{self.tensor}"


@dataclass(frozen=True, slots=True)
class Module:
    """One DNN of a chain.

    `for_each` runs it once per item on axis 0 of that tensor; `when` only if that one-element
    BOOL is true. `fan_out` is the expected number of executions per chain request. A module with
    `members` is a run (`core.runs`): those modules, executed at once.
    """

    name: str
    model: str
    inputs: Mapping[str, Source]
    for_each: Source | None = None
    when: Source | None = None
    fan_out: float = 1.0
    on_error: str = "fail"
    members: tuple[Module, ...] = ()
    sources: tuple[Source, ...] = field(init=False, repr=False, compare=False)
    """Everything it waits for."""
    parents: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Modules it waits for, by name, each once."""

    def __post_init__(self) -> None:
        extra = tuple(s for s in (self.for_each, self.when) if s is not None)
        sources = (*self.inputs.values(), *extra)
        parents = sorted({s.module for s in sources if s.module is not None})
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "parents", tuple(parents))


@dataclass(frozen=True, slots=True)
class Chain:
    """A validated chain; see `shared/formats` for the file. Times in seconds."""

    name: str
    slo_s: float
    inputs: tuple[TensorSpec, ...]
    modules: tuple[Module, ...]
    outputs: Mapping[str, Source]
    attainment: float = 0.99
    rate_rps: float | None = None
    arrivals: str = "poisson"
    priority: int = 0
    keep_alive_s: float | None = None
    dispatch: Dispatch = "pooled"
    runs: Runs = "off"
    description: str = field(default="", compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where keys stand in the file it came from: `modules.a.model` at `ocr.yaml:12`."""

    def __post_init__(self) -> None:
        _check_scalars(self)
        _check_names(self)
        for key, source in _references(self):
            _check_reference(self, key, source)
        object.__setattr__(self, "modules", _topological(self.modules))

    def where(self, key: str) -> str:
        """The place of a key, or of what it is in; the chain's name where that is unknown."""
        parts = key.split(".")
        for end in range(len(parts), -1, -1):
            if (place := self.places.get(".".join(parts[:end]))) is not None:
                return place
        return f"chain {self.name}"

    def module(self, name: str) -> Module:
        return next(m for m in self.modules if m.name == name)

    @property
    def sinks(self) -> tuple[str, ...]:
        """Modules that no other module waits for."""
        used = {parent for m in self.modules for parent in m.parents}
        return tuple(m.name for m in self.modules if m.name not in used)

    def children(self, name: str) -> tuple[str, ...]:
        return tuple(m.name for m in self.modules if name in m.parents)


def _check_scalars(chain: Chain) -> None:
    if not NAME.fullmatch(chain.name):
        raise ConfigError(
            f"{chain.name!r} is not a name (letters, digits, '_', '-', '.')", key="chain"
        )
    if not (isfinite(chain.slo_s) and chain.slo_s > 0):
        raise ConfigError(f"must be above 0, got {chain.slo_s * 1e3:g}", key="slo_ms")
    if not 0 < chain.attainment < 1:
        raise ConfigError("must be above 0 and below 1", key="attainment")
    if chain.rate_rps is not None and not (isfinite(chain.rate_rps) and chain.rate_rps > 0):
        raise ConfigError(f"must be above 0, got {chain.rate_rps}", key="rate_rps")
    if chain.arrivals not in ARRIVALS:
        raise ConfigError(f"must be one of {', '.join(ARRIVALS)}", key="arrivals")
    if chain.dispatch not in DISPATCHES:
        raise ConfigError(f"must be one of {', '.join(DISPATCHES)}", key="dispatch")
    if chain.runs not in RUNS:
        raise ConfigError(f"must be one of {', '.join(RUNS)}", key="runs")
    if chain.priority < 0:
        raise ConfigError("must be 0 (most urgent) or more", key="priority")
    if not chain.modules:
        raise ConfigError("a chain needs at least one module", key="modules")
    if not chain.outputs:
        raise ConfigError("a chain needs at least one output", key="outputs")


def _check_names(chain: Chain) -> None:
    for module in chain.modules:
        key = f"modules.{module.name}"
        if not module.members and (not NAME.fullmatch(module.name) or "." in module.name):
            raise ConfigError(f"{module.name!r} is not a module name", key=key)
        if module.name == "inputs":
            raise ConfigError(
                "'inputs' means the chain's inputs; call the module otherwise", key=key
            )
        if not (isfinite(module.fan_out) and module.fan_out > 0):
            raise ConfigError("must be above 0", key=f"{key}.fan_out")
        if module.on_error not in ON_ERROR:
            raise ConfigError(f"must be one of {', '.join(ON_ERROR)}", key=f"{key}.on_error")
        if not module.inputs:
            raise ConfigError("a module needs at least one input", key=f"{key}.inputs")
    for what, names in (
        ("modules", [m.name for m in chain.modules]),
        ("inputs", [spec.name for spec in chain.inputs]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{twice[0]!r} is declared twice", key=what)


def _references(chain: Chain) -> list[tuple[str, Source]]:
    found: list[tuple[str, Source]] = []
    for module in chain.modules:
        key = f"modules.{module.name}"
        found += [(f"{key}.inputs.{name}", source) for name, source in module.inputs.items()]
        if module.for_each is not None:
            found.append((f"{key}.for_each", module.for_each))
        if module.when is not None:
            found.append((f"{key}.when", module.when))
    found += [(f"outputs.{name}", source) for name, source in chain.outputs.items()]
    return found


def _check_reference(chain: Chain, key: str, source: Source) -> None:
    if source.module is None:
        known = [spec.name for spec in chain.inputs]
        if source.tensor not in known:
            raise ConfigError(
                f"unknown input {source.tensor!r}; the chain has {', '.join(known) or 'none'}",
                key=key,
            )
        return
    known = [m.name for m in chain.modules]
    if source.module not in known:
        raise ConfigError(f"unknown module {source.module!r}; have {', '.join(known)}", key=key)


def _topological(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    done: dict[str, Module] = {}
    waiting = list(modules)
    while waiting:
        ready = [m for m in waiting if all(parent in done for parent in m.parents)]
        if not ready:
            cycle = _find_cycle({m.name: m.parents for m in waiting})
            raise ConfigError(
                f"modules wait for each other: {' -> '.join(cycle)}", key=f"modules.{cycle[0]}"
            )
        done |= {m.name: m for m in ready}
        waiting = [m for m in waiting if m.name not in done]
    return tuple(done.values())


def _find_cycle(parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A cycle among `parents`, in the direction data would flow."""
    at = next(iter(parents))
    path: list[str] = []
    while at not in path:
        path.append(at)
        at = next(parent for parent in parents[at] if parent in parents)
    return [*path[path.index(at) :], at][::-1]
