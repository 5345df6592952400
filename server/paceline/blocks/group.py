"""Modules of a chain as one model: which can be, how they are wired, what they consist of.

`group_of` is pure: it takes the modules out of their chain as a chain of their own, whose inputs
are what they need from outside and whose outputs are what is used outside. `read_group` finds
their models in a repository: ONNX files, which become blocks, and models of Triton's Python
backend, which are copied beside them and hosted in the same process.

Invariant: a `Group` that exists can be wired - its datatypes and shapes fit, nothing between its
modules is outside, and no module runs more or less often than another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from paceline.blocks.backend.wiring import value_name
from paceline.blocks.repository import (
    CONFIG_FILE,
    ONNX_BACKENDS,
    ExtraFile,
    read_config,
    version_directory,
)
from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.errors import ConfigError
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec

_DATATYPES = {"STRING": "BYTES"}
_SHARED_MODULE = "model.py"  # every model has one; each is imported under a name of its own


@dataclass(frozen=True, slots=True)
class Part:
    """One module's model: its configuration, and the ONNX file or the Python files it runs."""

    module: Module
    config: Any
    spec: ModelSpec
    onnx: Path | None
    version: Path
    files: Mapping[str, Path]
    """Of a Python model, by their path below the version's directory."""


@dataclass(frozen=True)
class Group:
    """A group that can be compiled; `chain` is that of `group_of`."""

    chain: Chain
    parts: tuple[Part, ...]

    @property
    def sources(self) -> dict[str, Path]:
        """ONNX files by module."""
        return {p.module.name: p.onnx for p in self.parts if p.onnx is not None}

    @property
    def own_names(self) -> dict[str, str]:
        """What members are called as models, by module; see `own`."""
        return {part.module.name: part.spec.name for part in self.own}

    @property
    def max_batch(self) -> int:
        """The largest batch that every module takes; 0 if one of them takes none."""
        return min(part.spec.max_batch_size for part in self.parts)

    @property
    def own(self) -> tuple[Part, ...]:
        """Those that can be called by their models' names as well: what batches alone must batch
        here, and what does not must not.
        """
        models = [part.spec.name for part in self.parts]
        return tuple(
            part
            for part in self.parts
            if part.spec.batches == (self.max_batch > 0)
            and models.count(part.spec.name) == 1
            and part.spec.name != self.chain.name
        )

    @cached_property
    def code(self) -> str:
        """The directory of the Python models' files; its name changes with them."""
        digest = hashlib.sha256()
        for name, path in self._hosted().items():
            digest.update(f"{name}\0{file_digest(path)}\n".encode())
        return f"python-{digest.hexdigest()[:16]}"

    def as_json(self) -> dict[str, Any]:
        """`wiring` of the manifest; docs/blocks-format.md."""
        outputs = dict(self._outputs())
        own_inputs = []
        for part in self.own:
            name = part.module.name
            own_inputs += [
                _port(value_name(name, spec.name), spec)
                for spec in part.spec.inputs
                if spec.name in part.module.inputs
            ]
            outputs |= {value_name(name, spec.name): spec for spec in part.spec.outputs}
        return {
            "max_batch": self.max_batch,
            "code": self.code,
            "inputs": [_port(spec.name, spec) for spec in self.chain.inputs],
            "outputs": [_port(name, spec) for name, spec in outputs.items()],
            "own_inputs": own_inputs,
            "steps": [
                {
                    "module": part.module.name,
                    "model": part.module.model,
                    "kind": "python" if part.onnx is None else "blocks",
                    "version": part.version.name,
                    "batched": part.spec.batches,
                    "inputs": {
                        name: value_name(source.module, source.tensor)
                        for name, source in part.module.inputs.items()
                    },
                    "outputs": [_port(spec.name, spec) for spec in part.spec.outputs],
                    "config": config_json(part.config),
                }
                for part in self.parts
            ],
        }

    def extra_files(self) -> list[ExtraFile]:
        """What is copied into the model's directory."""
        files = [
            ExtraFile(f"1/{self.code}/{name}", path, file_digest(path))
            for name, path in self._hosted().items()
        ]
        _, samples = self._samples()
        return files + samples

    def warm_up(self) -> Any:
        """A ModelWarmup of the modules' own samples; None unless they give every input."""
        inputs, _ = self._samples()
        if inputs.keys() != {spec.name for spec in self.chain.inputs}:
            return None
        made = model_config_pb2.ModelWarmup(name="sample", batch_size=1)
        for name, sample in inputs.items():
            made.inputs[name].CopyFrom(sample)
        return made

    def _outputs(self) -> Iterator[tuple[str, TensorSpec]]:
        for name, source in self.chain.outputs.items():
            (part,) = (p for p in self.parts if p.module.name == source.module)
            spec = part.spec.output(source.tensor)
            assert spec is not None, source
            yield name, spec

    def _hosted(self) -> dict[str, Path]:
        return {
            f"{part.module.name}/{part.version.name}/{name}": path
            for part in self.parts
            for name, path in part.files.items()
        }

    def _samples(self) -> tuple[dict[str, Any], list[ExtraFile]]:
        """Warm-up inputs by port, and their files."""
        inputs: dict[str, Any] = {}
        files = []
        for part in self.parts:
            sample = next(iter(part.config.model_warmup), None)
            if sample is None or sample.batch_size != 1:
                continue
            for name, source in part.module.inputs.items():
                port = value_name(source.module, source.tensor)
                if source.module is not None or name not in sample.inputs or port in inputs:
                    continue
                copied = inputs[port] = type(sample.inputs[name])()
                copied.CopyFrom(sample.inputs[name])
                if copied.input_data_file:
                    path = part.version.parent / "warmup" / copied.input_data_file
                    digest = file_digest(path)
                    copied.input_data_file = f"{port.replace('/', '.')}-{digest[:16]}"
                    files.append(ExtraFile(f"warmup/{copied.input_data_file}", path, digest))
        return inputs, files


def group_of(chain: Chain, names: Sequence[str], asked: Sequence[str], fused: str) -> Chain:
    """The modules `names` of `chain` as a chain called `fused`, without their models' shapes.

    Its outputs are what modules outside or the chain's clients use, and `asked`
    (`MODULE.TENSOR`). Raises ConfigError for modules that cannot be one model.
    """
    members = _members(chain, names)
    inside = set(names)
    _check_closed(chain, inside)
    outside = [m for m in chain.modules if m.name not in inside]
    used = [source for m in outside for source in m.sources] + list(chain.outputs.values())
    for text in asked:
        source = Source.parse(text, key="--output")
        if source.module not in inside:
            raise ConfigError(f"{text!r} is not of {', '.join(names)}", key="--output")
        used.append(source)
    needed = dict.fromkeys(s for m in members for s in m.inputs.values() if s.module not in inside)
    modules = tuple(
        Module(
            m.name,
            m.model,
            {
                name: source
                if source.module in inside
                else Source(None, value_name(source.module, source.tensor))
                for name, source in m.inputs.items()
            },
        )
        for m in members
    )
    outputs = dict.fromkeys(source for source in used if source.module in inside)
    if not outputs:
        raise ConfigError(f"nothing outside uses what {', '.join(names)} compute", key="--output")
    return Chain(
        name=fused,
        slo_s=chain.slo_s,
        # Their datatypes and shapes are those of the models that take them: see `read_group`.
        inputs=tuple(TensorSpec(value_name(s.module, s.tensor), "FP32", ()) for s in needed),
        modules=modules,
        outputs={value_name(s.module, s.tensor): s for s in outputs},
    )


def read_group(chain: Chain, repositories: Sequence[Path]) -> Group:
    """The group of `group_of` with its models. Raises ConfigError for what cannot be hosted."""
    parts = tuple(_part(module, repositories) for module in chain.modules)
    specs = {part.spec.name: part.spec for part in parts}
    inputs = {spec.name: spec for spec in chain.inputs}
    for part in reversed(parts):  # the first that takes a tensor says what it is
        for name, source in part.module.inputs.items():
            taken = part.spec.input(name)
            if source.module is None and taken is not None:
                inputs[source.tensor] = replace(taken, name=source.tensor)
    group = Group(replace(chain, inputs=tuple(inputs.values())), parts)
    bind(group.chain, specs)
    _check_imports(parts)
    return group


def config_json(config: Any) -> dict[str, Any]:
    """A ModelConfig as Triton shows it to a Python model: every field, lengths as numbers."""
    document: dict[str, Any] = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for tensor in (*document["input"], *document["output"]):
        tensor["dims"] = [int(size) for size in tensor["dims"]]
    return document


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _members(chain: Chain, names: Sequence[str]) -> list[Module]:
    """In topological order. Raises ConfigError unless the same requests or items need them all."""
    known = [m.name for m in chain.modules]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown module {name!r}; chain {chain.name} has {', '.join(known)}", key="--fuse"
            )
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError("give two modules or more, each once", key="--fuse")
    members = [m for m in chain.modules if m.name in names]
    for module in members:
        if module.when is not None:
            raise ConfigError(
                f"module {module.name} runs only `when: {module.when}`, the others always: "
                "leave it outside",
                key="--fuse",
            )
        if module.on_error == "skip":
            raise ConfigError(
                f"module {module.name} may fail alone (`on_error: skip`): leave it outside",
                key="--fuse",
            )
        if module.for_each != members[0].for_each:
            told = ", ".join(
                f"{m.name} {f'for each of {m.for_each}' if m.for_each else 'once'}" for m in members
            )
            raise ConfigError(
                f"a fan-out inside a group cannot be: a request runs {told}", key="--fuse"
            )
    return members


def _check_closed(chain: Chain, inside: set[str]) -> None:
    """Raises ConfigError if a module outside needs the group and the group needs it."""
    behind: dict[str, str] = {}  # outside module -> whom it has the group's data from
    for module in chain.modules:  # in topological order
        for parent in module.parents:
            if module.name not in inside and (parent in inside or parent in behind):
                behind.setdefault(module.name, parent)
            if module.name in inside and parent in behind:
                path = [module.name, parent]
                while path[-1] not in inside:
                    path.append(behind[path[-1]])
                raise ConfigError(
                    f"{parent} is between modules of the group ({' -> '.join(reversed(path))}): "
                    "take it in, or leave one of them outside",
                    key="--fuse",
                )


def _part(module: Module, repositories: Sequence[Path]) -> Part:
    directory = next((r / module.model for r in repositories if (r / module.model).is_dir()), None)
    if directory is None:
        raise ConfigError(
            f"no model {module.model!r} (of module {module.name}) in "
            f"{', '.join(map(str, repositories))}"
        )
    where = str(directory / CONFIG_FILE)
    config = read_config(directory / CONFIG_FILE)
    version = version_directory(directory)
    if config is None or version is None:
        raise ConfigError("needs a config.pbtxt and a numeric version", where=str(directory))
    backend = config.backend or config.platform
    if backend not in (*ONNX_BACKENDS, "python"):
        raise ConfigError(
            f"backend {backend!r} cannot be in a group: onnxruntime and python can", where=where
        )
    _check_config(config, where)
    file, files = version / (config.default_model_filename or "model.onnx"), dict[str, Path]()
    if backend == "python":
        files = _files(version)
        file = version / _SHARED_MODULE
    if not file.is_file():
        raise ConfigError("no such file", where=str(file))
    spec = ModelSpec(
        name=module.model,
        max_batch_size=config.max_batch_size,
        inputs=tuple(_spec(tensor, optional=tensor.optional) for tensor in config.input),
        outputs=tuple(_spec(tensor) for tensor in config.output),
    )
    return Part(module, config, spec, None if backend == "python" else file, version, files)


def _check_config(config: Any, where: str) -> None:
    """Raises ConfigError for what Triton does for a model that nobody would do in a group."""
    tensors = (*config.input, *config.output)
    if not config.input or not config.output:
        raise ConfigError("declares no inputs or no outputs", where=where)
    for wrong, found in (
        ("reshape", any(tensor.HasField("reshape") for tensor in tensors)),
        ("a decoupled transaction policy", config.model_transaction_policy.decoupled),
        ("sequence batching", config.HasField("sequence_batching")),
        ("EXECUTION_ENV_PATH", "EXECUTION_ENV_PATH" in config.parameters),
        (
            "another default_model_filename",
            config.backend == "python"
            and config.default_model_filename not in ("", _SHARED_MODULE),
        ),
    ):
        if found:
            raise ConfigError(f"uses {wrong}, which a group cannot have", where=where)


def _files(version: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(version)): path
        for path in sorted(version.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _check_imports(parts: Iterable[Part]) -> None:
    """Members of a process see each other's modules: none may have two contents."""
    seen: dict[str, tuple[str, dict[str, str]]] = {}
    for part in parts:
        contents: dict[str, dict[str, str]] = {}
        for name, path in part.files.items():
            top = name.partition("/")[0]
            if name != _SHARED_MODULE and name.endswith(".py"):
                contents.setdefault(top.removesuffix(".py"), {})[name] = file_digest(path)
        for top, content in contents.items():
            other, before = seen.setdefault(top, (part.module.name, content))
            if before != content:
                raise ConfigError(
                    f"modules {other} and {part.module.name} both import a {top!r} of their own: "
                    "in one process there can be one, rename one of them",
                    key="--fuse",
                )


def _spec(tensor: Any, *, optional: bool = False) -> TensorSpec:
    name = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return TensorSpec(tensor.name, _DATATYPES.get(name, name), tuple(tensor.dims), optional)


def _port(name: str, spec: TensorSpec) -> dict[str, Any]:
    return {"name": name, "dtype": spec.datatype, "dims": list(spec.shape)}
