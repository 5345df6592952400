"""`paceline blocks suggest`: which models of a repository to fuse (FusedInf, arXiv 2410.21120).

Models that the same requests always need together are worth being one: loaded and swapped in as
one, in one process, their common parameters once. The chains say which those are: modules that
run for every request, connected by their tensors ("in sequence"), and modules that go over the
same items ("on the same items"). What is observed of traffic adds modules whose condition nearly
always holds ("nearly always together"), ranks groups by the calls that fusing saves, and warns of
models that others use more. A model that is neither ONNX nor Python cannot take part; Python
models do in groups that can be wired (`compile --chain`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from paceline.blocks.group import group_of
from paceline.blocks.observed import Observed
from paceline.blocks.repository import (
    BACKEND,
    CONFIG_FILE,
    ONNX_BACKENDS,
    compiled_model,
    read_config,
    version_directory,
)
from paceline.blocks.source import INLINE_BYTES
from paceline.core.chain import Chain, Module
from paceline.core.errors import ConfigError
from paceline.core.profile import Profiles

MIB = 1 << 20
PROCESS_BYTES = 40 * MIB
"""What a process less saves (PSS), with interpreter and libraries: docs/benchmarks/blocks.md."""
_NEARLY_ALWAYS = 0.9  # of the requests, observed
_SELDOM = 0.5  # of a model's rows that are the group's
_UNLIKE = 4.0  # best batch sizes that differ by more than this do not go together


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters: bytes by the hash of their contents; why it cannot be fused, if so.

    `hosted`: it is Python code, which only a group that is wired can have.
    """

    objects: Mapping[str, int]
    obstacle: str = ""
    hosted: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(self.objects.values())


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Models to fuse, or why a group that belongs together cannot be."""

    chain: str
    modules: tuple[str, ...]
    models: tuple[str, ...]
    relation: str
    weights_bytes: int
    shared_bytes: int
    notes: tuple[str, ...]
    possible: bool
    wired: bool = False
    rate_rps: float | None = None
    """Observed executions of the group; None where nothing was observed."""

    @property
    def saved_bytes(self) -> int:
        """Memory that fusing is expected to save: shared parameters and processes."""
        return self.shared_bytes + (len(self.models) - 1) * PROCESS_BYTES

    @property
    def saved_calls_rps(self) -> float:
        """Calls of Triton a second that a wired group is expected to save."""
        return (len(self.modules) - 1) * (self.rate_rps or 0.0) if self.wired else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "chain": self.chain,
            "modules": list(self.modules),
            "models": list(self.models),
            "relation": self.relation,
            "weights_bytes": self.weights_bytes,
            "shared_bytes": self.shared_bytes,
            "saved_bytes": self.saved_bytes,
            "rate_rps": self.rate_rps,
            "saved_calls_rps": self.saved_calls_rps,
            "wired": self.wired,
            "notes": list(self.notes),
            "possible": self.possible,
        }

    def __str__(self) -> str:
        names = " + ".join(self.models)
        if not self.possible:
            why = "; ".join(self.notes)
            return f"{self.chain}: {names} belong together, {self.relation}, but {why}"
        shared = f", {self.shared_bytes / MIB:.1f} MiB of them once" if self.shared_bytes else ""
        calls = ""
        if self.rate_rps is not None:
            calls = f", observed {self.rate_rps:.3g}/s"
            if self.wired:
                calls += f": {self.saved_calls_rps:.3g} calls/s less"
        chain = f"--chain FILE {' '.join(self.modules)}" if self.wired else "MODEL.onnx..."
        told = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.chain}: fuse {names} ({self.relation}): {len(self.models)} loads and processes "
            f"become one, {self.weights_bytes / MIB:.1f} MiB of weights{shared}, about "
            f"{self.saved_bytes / MIB:.0f} MiB less in all{calls}"
            f"\n  paceline blocks compile {chain} --fuse NAME{told}"
        )


def suggest(
    chains: Sequence[Chain],
    weights: Mapping[str, Weights],
    profiles: Profiles | None = None,
    observed: Observed | None = None,
) -> list[Suggestion]:
    """What to fuse: the possible first, then what saves most calls, then most bytes."""
    found = [
        _suggestion(chain, group, relation, chains, weights, profiles, observed)
        for chain in chains
        for relation, group in groups(chain, observed)
    ]
    return sorted(
        found,
        key=lambda s: (not s.possible, -s.saved_calls_rps, -s.shared_bytes, s.chain, s.models),
    )


def groups(chain: Chain, observed: Observed | None = None) -> list[tuple[str, tuple[Module, ...]]]:
    """Modules of at least two models that the same requests, or the same items, always need.

    With what was observed also those that nearly all requests needed; a chain that had none has no
    groups of that kind.
    """
    found = []
    always = [m for m in chain.modules if m.for_each is None and m.when is None]
    for part in _connected(always):
        found.append(("in sequence", part))
    items: dict[tuple[str, str], list[Module]] = {}
    for module in chain.modules:
        if module.for_each is not None:
            items.setdefault((str(module.for_each), str(module.when)), []).append(module)
    found.extend(("on the same items", tuple(part)) for part in items.values())
    if observed is not None and chain.name in observed.rates_rps:
        mostly = [
            m
            for m in chain.modules
            if m.for_each is None
            and (m.when is None or observed.fan_out(chain, m) >= _NEARLY_ALWAYS)
        ]
        for part in _connected(mostly):
            if any(module.when is not None for module in part):
                found.append(("nearly always together", part))
    return [(relation, part) for relation, part in found if len({m.model for m in part}) > 1]


def weights_of(model: str, repositories: Iterable[Path]) -> Weights:
    """The parameters of a model in a repository. Raises ConfigError if there is no such model."""
    searched = list(repositories)
    directory = next((r / model for r in searched if (r / model).is_dir()), None)
    if directory is None:
        raise ConfigError(f"no model {model!r} in {', '.join(map(str, searched))}")
    config = read_config(directory / CONFIG_FILE)
    backend = "" if config is None else config.backend or config.platform
    if backend == BACKEND:
        compiled = compiled_model(directory)
        assert compiled is not None
        blocks = (b for member in compiled.manifest.members for b in member.blocks)
        objects = compiled.manifest.objects
        return Weights(
            {w.object: objects[w.object].size_bytes for block in blocks for w in block.weights}
        )
    name = (config.default_model_filename if config is not None else "") or "model.onnx"
    version = version_directory(directory)
    if backend not in ONNX_BACKENDS or version is None or not (version / name).is_file():
        return Weights(
            {},
            f"{model} is no ONNX model (its backend is {backend or 'unknown'!r})",
            hosted=backend == "python",
        )
    return Weights(dict(_initializers(version / name)))


def _suggestion(
    chain: Chain,
    group: Sequence[Module],
    relation: str,
    chains: Sequence[Chain],
    weights: Mapping[str, Weights],
    profiles: Profiles | None,
    observed: Observed | None,
) -> Suggestion:
    wanted = tuple(dict.fromkeys(module.model for module in group))
    wired = _can_be_wired(chain, group, weights)
    obstacles = [
        weights[model].obstacle
        for model in wanted
        if weights[model].obstacle and not (wired and weights[model].hosted)
    ]
    able = tuple(model for model in wanted if wired or not weights[model].obstacle)
    possible = len(able) > 1
    models = able if possible else wanted
    once: dict[str, int] = {}
    for model in models:
        once.update(weights[model].objects)
    total = sum(weights[model].total_bytes for model in models)
    others = [*_elsewhere(chain, models, chains), *_batches(models, profiles)]
    rate_rps = None
    if observed is not None:
        rate_rps = max(observed.module_rps(chain, module) for module in group)
        others += _co_use(chain, group, models, chains, observed)
    return Suggestion(
        chain=chain.name,
        modules=tuple(module.name for module in group if module.model in models),
        models=models,
        relation=relation,
        weights_bytes=total,
        shared_bytes=total - sum(once.values()),
        notes=tuple([*obstacles, *others] if possible else obstacles),
        possible=possible,
        wired=wired,
        rate_rps=rate_rps,
    )


def _can_be_wired(chain: Chain, group: Sequence[Module], weights: Mapping[str, Weights]) -> bool:
    """Whether `compile --chain` would take these modules, as far as the chain tells."""
    if any(weights[m.model].obstacle and not weights[m.model].hosted for m in group):
        return False
    try:
        group_of(chain, [module.name for module in group], [], "fused")
    except ConfigError:
        return False
    return True


def _co_use(
    chain: Chain,
    group: Sequence[Module],
    models: Sequence[str],
    chains: Sequence[Chain],
    observed: Observed,
) -> list[str]:
    """Models whose rows are mostly of others, which would load the whole group for one of it."""
    if chain.name not in observed.rates_rps:
        return ["no request of this chain was observed"]
    notes = []
    for model in models:
        mine = sum(observed.module_rps(chain, m) for m in group if m.model == model)
        every = observed.model_rps(model, chains)
        if every and mine < _SELDOM * every:
            notes.append(
                f"{100 * (1 - mine / every):.0f} % of the rows of {model} are of other chains or "
                "of its own name"
            )
    return notes


def _connected(modules: Sequence[Module]) -> list[tuple[Module, ...]]:
    """Parts connected by one taking what the other gives."""
    parts: list[list[Module]] = []
    for module in modules:  # in topological order
        near = [p for p in parts if any(other.name in module.parents for other in p)]
        joined = [other for part in near for other in part]
        parts = [part for part in parts if part not in near] + [[*joined, module]]
    return [tuple(part) for part in parts]


def _elsewhere(chain: Chain, models: Sequence[str], chains: Sequence[Chain]) -> list[str]:
    """Chains that need some of the models only: they would load the others as well."""
    return [
        f"chain {other.name} uses only {', '.join(used)} of them"
        for other in chains
        if other.name != chain.name
        and (used := [model for model in models if any(m.model == model for m in other.modules)])
        and len(used) < len(models)
    ]


def _batches(models: Sequence[str], profiles: Profiles | None) -> list[str]:
    """Fused models are batched alike: bad for those that are at their best at other sizes."""
    best: dict[str, int] = {}
    for model in models:
        for hardware in profiles.hardware_of(model)[:1] if profiles is not None else ():
            durations = profiles.durations(model, hardware) if profiles is not None else None
            if durations is not None:
                best[model] = max(durations.points, key=lambda point: point[0] / point[1])[0]
    if len(best) < 2 or max(best.values()) <= _UNLIKE * min(best.values()):
        return []
    told = ", ".join(f"{model} in batches of {size}" for model, size in best.items())
    return [f"they run best in unlike batches ({told}): measure before and after"]


def _initializers(path: Path) -> Iterable[tuple[str, int]]:
    """Hash and bytes of every weight of an ONNX file, one in memory at a time."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ConfigError(f"not an ONNX file: {error}", where=str(path)) from None
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(path.parent))
        data = tensor.raw_data or tensor.SerializeToString(deterministic=True)
        if len(data) >= INLINE_BYTES:
            yield hashlib.sha256(data).hexdigest(), len(data)
        tensor.ClearField("raw_data")
