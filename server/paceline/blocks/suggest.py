"""`paceline blocks suggest`: which models of a repository to fuse (FusedInf, arXiv 2410.21120).

Models that the same requests always need together are worth being one: loaded and swapped in as
one, in one process, their common parameters once. The chains say which those are: modules that
run for every request, connected by their tensors ("in sequence"), and modules that go over the
same items ("on the same items"). A model that is not ONNX cannot take part.
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

from paceline.blocks.repository import BACKEND, CONFIG_FILE, compiled_model, read_config
from paceline.blocks.source import INLINE_BYTES
from paceline.core.chain import Chain, Module
from paceline.core.errors import ConfigError
from paceline.core.profile import Profiles

MIB = 1 << 20
_ONNX_BACKENDS = ("onnxruntime", "onnxruntime_onnx")
_UNLIKE = 4.0  # best batch sizes that differ by more than this do not go together


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's parameters: bytes by the hash of their contents; why it cannot be fused, if so."""

    objects: Mapping[str, int]
    obstacle: str = ""

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

    def as_json(self) -> dict[str, Any]:
        return {
            "chain": self.chain,
            "modules": list(self.modules),
            "models": list(self.models),
            "relation": self.relation,
            "weights_bytes": self.weights_bytes,
            "shared_bytes": self.shared_bytes,
            "notes": list(self.notes),
            "possible": self.possible,
        }

    def __str__(self) -> str:
        names = " + ".join(self.models)
        if not self.possible:
            why = "; ".join(self.notes)
            return f"{self.chain}: {names} belong together, {self.relation}, but {why}"
        shared = f", {self.shared_bytes / MIB:.1f} MiB of them once" if self.shared_bytes else ""
        told = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.chain}: fuse {names} ({self.relation}): {len(self.models)} loads and processes "
            f"become one, {self.weights_bytes / MIB:.1f} MiB of weights{shared}{told}"
        )


def suggest(
    chains: Sequence[Chain], weights: Mapping[str, Weights], profiles: Profiles | None = None
) -> list[Suggestion]:
    """What to fuse, the possible first, those that save most bytes before others."""
    found = [
        _suggestion(chain, group, relation, chains, weights, profiles)
        for chain in chains
        for relation, group in groups(chain)
    ]
    return sorted(found, key=lambda s: (not s.possible, -s.shared_bytes, s.chain, s.models))


def groups(chain: Chain) -> list[tuple[str, tuple[Module, ...]]]:
    """Modules of at least two models that the same requests, or the same items, always need."""
    found = []
    always = [m for m in chain.modules if m.for_each is None and m.when is None]
    for part in _connected(always):
        found.append(("in sequence", part))
    items: dict[tuple[str, str], list[Module]] = {}
    for module in chain.modules:
        if module.for_each is not None:
            items.setdefault((str(module.for_each), str(module.when)), []).append(module)
    found.extend(("on the same items", tuple(part)) for part in items.values())
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
        return Weights({w.object: objects[w.object] for block in blocks for w in block.weights})
    name = (config.default_model_filename if config is not None else "") or "model.onnx"
    files = sorted(directory.glob(f"[0-9]*/{name}"))
    if backend not in _ONNX_BACKENDS or not files:
        return Weights({}, f"{model} is no ONNX model (its backend is {backend or 'unknown'!r})")
    return Weights(dict(_initializers(files[-1])))


def _suggestion(
    chain: Chain,
    group: Sequence[Module],
    relation: str,
    chains: Sequence[Chain],
    weights: Mapping[str, Weights],
    profiles: Profiles | None,
) -> Suggestion:
    wanted = tuple(dict.fromkeys(module.model for module in group))
    obstacles = [weights[model].obstacle for model in wanted if weights[model].obstacle]
    able = tuple(model for model in wanted if not weights[model].obstacle)
    possible = len(able) > 1
    models = able if possible else wanted
    once: dict[str, int] = {}
    for model in models:
        once.update(weights[model].objects)
    total = sum(weights[model].total_bytes for model in models)
    others = [*_elsewhere(chain, models, chains), *_batches(models, profiles)]
    return Suggestion(
        chain=chain.name,
        modules=tuple(module.name for module in group if module.model in models),
        models=models,
        relation=relation,
        weights_bytes=total,
        shared_bytes=total - sum(once.values()),
        notes=tuple([*obstacles, *others] if possible else obstacles),
        possible=possible,
    )


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
