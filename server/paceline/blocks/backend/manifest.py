"""Manifests of a block pool: what they say, and that it is sound; docs/blocks-format.md, format 2.

Standard library only: the compiler imports it, and it is copied beside the backend's model.py into
Triton's interpreter. Invariant: a Manifest that exists is sound - every value a block reads was
produced before, every weight lies inside an object the manifest lists, every name of a file is 64
hex digits.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .wiring import Wiring, parse_wiring

FORMAT = "paceline-blocks/2"
PAGE_BYTES = 4096
EXTERNAL = "external"
MAX_MANIFEST_BYTES = 64 << 20
_HASH = re.compile(r"[0-9a-f]{64}\Z")

# KServe's data type -> bytes of an element; the types that weights may have.
WEIGHT_TYPES: Mapping[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "FP32": 4,
    "FP64": 8,
}
_ACCESS = ("all", "rows")

# CPU features that ONNX Runtime's kernels and layouts depend on, as /proc/cpuinfo spells them.
_FEATURES = (
    "sse4_1 sse4_2 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512cd avx512dq avx512vl "
    "avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "asimd asimdhp asimddp i8mm bf16 sve sve2"
)


class PoolError(ValueError):
    """A manifest or an object is missing or not what it should be; `str()` is one line."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What graphs were optimised for; they may compute nonsense anywhere else."""

    onnxruntime: str
    machine: str
    cpu_features: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "onnxruntime": self.onnxruntime,
            "machine": self.machine,
            "cpu_features": list(self.cpu_features),
        }

    def difference(self, here: Runtime) -> str:
        """What is different `here`, for people; empty if the graphs may run."""
        if self.onnxruntime != here.onnxruntime:
            return f"ONNX Runtime {self.onnxruntime}, here is {here.onnxruntime}"
        if self.machine != here.machine:
            return f"{self.machine}, here is {here.machine}"
        changed = set(self.cpu_features) ^ set(here.cpu_features)
        return f"a CPU that differs in {', '.join(sorted(changed))}" if changed else ""


@dataclass(frozen=True, slots=True)
class PoolObject:
    """What a manifest says of an object beside its name, the SHA-256.

    Its bytes are checked by their BLAKE3, which takes a seventh of the time.
    """

    size_bytes: int
    blake3: str

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.size_bytes, "blake3": self.blake3}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a member: its name in Triton, its value in the graph."""

    name: str
    value: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer of a block's graph and where its bytes are."""

    name: str
    object: str
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    access: str
    index: str = ""
    """Of a table: the block's input that says which rows; empty if that is not known."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """BLAKE3 of an object's parts of `size_bytes` each (the last may be shorter)."""

    size_bytes: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A run of nodes with its weights; `inputs` and `outputs` are values, by position."""

    key: str
    graph: str
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[Weight, ...]
    weights_bytes: int
    paged_bytes: int
    live: tuple[str, ...]
    live_bytes: int
    execute_s: Mapping[int, float]
    swap_in_s: float | None

    @property
    def swapped_bytes(self) -> int:
        """What must be in memory for the block to run without a page fault, tables aside."""
        return self.weights_bytes - self.paged_bytes


@dataclass(frozen=True, slots=True)
class Member:
    """A network; a model has one of them, called "", unless it is fused."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batching: bool
    notes: tuple[str, ...]
    whole: Block
    blocks: tuple[Block, ...]
    activations: Mapping[int, int] = field(default_factory=dict)
    """Bytes beside weights that its runs take, by batch size; {} if that was not measured."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One compiled model."""

    model: str
    cache_key: str
    runtime: Runtime
    objects: Mapping[str, PoolObject]
    weights_bytes: int
    largest_block_bytes: int
    members: tuple[Member, ...]
    chunks: Mapping[str, Chunks]
    """Of tables: a part can be used once its own hash was found right."""
    activations: Mapping[int, int]
    """Bytes beside weights that a process needs, by batch size; {} if that was not measured."""
    wiring: Wiring | None
    """How they, and Python models beside them, are one: of a fused chain."""
    document: Mapping[str, Any]
    """All of it as read, for what has no attribute here."""

    def activation_bytes(self, rows: int) -> int:
        """For batches of up to `rows`, of any member."""
        return _on_line(self.activations, rows)

    def member_activation_bytes(self, member: Member, rows: int) -> int:
        """The same of one member; where nobody measured it alone, what any takes."""
        return _on_line(member.activations or self.activations, rows)


def _on_line(measured: Mapping[int, int], rows: int) -> int:
    """At `rows`, on the line through the two nearest sizes measured; 0 if none was."""
    sizes = sorted(measured)
    if not sizes:
        return 0
    if len(sizes) == 1:
        return measured[sizes[0]]
    upper = next((size for size in sizes[1:] if size >= rows), sizes[-1])
    lower = sizes[sizes.index(upper) - 1]
    first, last = measured[lower], measured[upper]
    return max(first, first + (last - first) * (rows - lower) // (upper - lower))


def cpu_features(cpuinfo: str | None = None) -> tuple[str, ...]:
    """The features of this machine's first CPU that count, sorted."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(sorted(set(_FEATURES.split()) & set(value.split())))
    return ()


def runtime_here(onnxruntime_version: str) -> Runtime:
    return Runtime(onnxruntime_version, platform.machine(), cpu_features())


def is_digest(name: str) -> bool:
    """May this be a file's name in a pool?"""
    return _HASH.match(name) is not None


def checked(name: str) -> str:
    """The name, of an object. Raises PoolError for one that no file of a pool has."""
    if not is_digest(name):
        raise PoolError(f"{name!r} is no name of an object: 64 lower-case hex digits are")
    return name


def pages(count_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-count_bytes // PAGE_BYTES) * PAGE_BYTES


def weights_bytes(weights: Iterable[Weight], objects: Mapping[str, PoolObject]) -> int:
    """Bytes of the distinct objects these weights lie in, in whole pages."""
    return sum(pages(objects[name].size_bytes) for name in {weight.object for weight in weights})


def swap_rate_bytes_s(blocks: Iterable[Block]) -> float | None:
    """Bytes a second at which these blocks were swapped in where they were compiled."""
    measured = [(block.swapped_bytes, block.swap_in_s) for block in blocks if block.swap_in_s]
    took_s = sum(block_s for _, block_s in measured)
    return sum(size for size, _ in measured) / took_s if took_s else None


def parse(text: bytes, where: str) -> Manifest:
    """The manifest in `text`. Raises PoolError that names `where` and the key at fault."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise PoolError(f"{where}: not JSON: {error}") from None
    try:
        return _manifest(document)
    except PoolError as error:
        raise PoolError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise PoolError(f"{where}: not a manifest of format {FORMAT}: {what}") from None


def _manifest(document: Any) -> Manifest:
    if document["format"] != FORMAT:
        raise PoolError(
            f"format is {document['format']!r}, this reads {FORMAT}: compile the model again"
        )
    objects = {checked(name): _object(name, entry) for name, entry in document["objects"].items()}
    runtime = document["runtime"]
    members = tuple(_member(entry, objects) for entry in document["members"])
    names = {member.name for member in members}
    wiring = parse_wiring(document["wiring"], names) if document.get("wiring") else None
    if (not members and wiring is None) or len(names) != len(members):
        raise PoolError("members: none, or two of one name")
    return Manifest(
        model=str(document["model"]),
        cache_key=str(document["cache_key"]),
        runtime=Runtime(
            str(runtime["onnxruntime"]),
            str(runtime["machine"]),
            tuple(map(str, runtime["cpu_features"])),
        ),
        objects=objects,
        weights_bytes=_count(document["weights_bytes"], "weights_bytes"),
        largest_block_bytes=_count(document["largest_block_bytes"], "largest_block_bytes"),
        members=members,
        chunks={
            name: _chunks(entry, objects[checked(name)].size_bytes)
            for name, entry in document.get("chunks", {}).items()
        },
        activations=_activations(document),
        wiring=wiring,
        document=document,
    )


def _object(name: str, entry: Any) -> PoolObject:
    stated = str(entry["blake3"])
    if not is_digest(stated):
        raise PoolError(f"object {name}: blake3 is {stated!r}: 64 lower-case hex digits are")
    return PoolObject(_count(entry["bytes"], name), stated)


def _member(entry: Any, objects: Mapping[str, PoolObject]) -> Member:
    member = Member(
        name=str(entry["name"]),
        inputs=tuple(map(_tensor, entry["inputs"])),
        outputs=tuple(map(_tensor, entry["outputs"])),
        batching=bool(entry["batching"]),
        notes=tuple(map(str, entry["notes"])),
        whole=_block(entry["whole"], objects),
        blocks=tuple(_block(block, objects) for block in entry["blocks"]),
        activations=_activations(entry),
    )
    for blocks in ((member.whole,), member.blocks):
        _check_flow(member, blocks)
    return member


def _activations(entry: Any) -> dict[int, int]:
    measured = entry.get("activations", {})
    return {int(rows): _count(size, "activations") for rows, size in measured.items()}


def _check_flow(member: Member, blocks: Sequence[Block]) -> None:
    known = {tensor.value for tensor in member.inputs}
    for position, block in enumerate(blocks):
        for value in block.inputs:
            if value not in known:
                raise PoolError(f"member {member.name!r} block {position}: nothing gives {value!r}")
        known.update(block.outputs)
    for tensor in member.outputs:
        if tensor.value not in known:
            raise PoolError(f"member {member.name!r}: no block gives the output {tensor.value!r}")


def _tensor(entry: Any) -> Tensor:
    return Tensor(
        str(entry["name"]),
        str(entry["value"]),
        str(entry["dtype"]),
        tuple(map(int, entry["shape"])),
    )


def _block(entry: Any, objects: Mapping[str, PoolObject]) -> Block:
    if checked(entry["graph"]) not in objects:
        raise PoolError(f"graph {entry['graph']} is not among the objects")
    swap_in_s = entry["swap_in_s"]
    return Block(
        key=checked(entry["key"]),
        graph=entry["graph"],
        nodes=_count(entry["nodes"], "nodes"),
        inputs=tuple(map(str, entry["inputs"])),
        outputs=tuple(map(str, entry["outputs"])),
        weights=tuple(_weight(weight, objects) for weight in entry["weights"]),
        weights_bytes=_count(entry["weights_bytes"], "weights_bytes"),
        paged_bytes=_count(entry["paged_bytes"], "paged_bytes"),
        live=tuple(map(str, entry["live"])),
        live_bytes=_count(entry["live_bytes"], "live_bytes"),
        execute_s={int(size): float(took) for size, took in entry["execute_s"].items()},
        swap_in_s=None if swap_in_s is None else float(swap_in_s),
    )


def _chunks(entry: Any, object_bytes: int) -> Chunks:
    size, text = _count(entry["bytes"], "bytes"), bytes.fromhex(entry["blake3"])
    digests = tuple(text[start : start + 32] for start in range(0, len(text), 32))
    if not size or len(text) % 32 or len(digests) != -(-object_bytes // size):
        raise PoolError(f"chunks: not one hash for every {size} of {object_bytes} bytes")
    return Chunks(size, digests)


def _weight(entry: Any, objects: Mapping[str, PoolObject]) -> Weight:
    weight = Weight(
        name=str(entry["name"]),
        object=checked(entry["object"]),
        offset=_count(entry["offset"], "offset"),
        bytes=_count(entry["bytes"], "bytes"),
        dtype=str(entry["dtype"]),
        shape=tuple(_count(size, "shape") for size in entry["shape"]),
        access=str(entry["access"]),
        index=str(entry.get("index", "")),
    )
    expected = WEIGHT_TYPES.get(weight.dtype, 0)
    for size in weight.shape:
        expected *= size
    if weight.bytes != expected or weight.access not in _ACCESS:
        raise PoolError(
            f"weight {weight.name}: {weight.bytes} bytes, access {weight.access!r} "
            f"do not go with {weight.dtype} {list(weight.shape)}"
        )
    if weight.offset % WEIGHT_TYPES[weight.dtype]:
        raise PoolError(f"weight {weight.name}: offset {weight.offset} is not aligned")
    holder = objects.get(weight.object)
    if holder is None or weight.offset + weight.bytes > holder.size_bytes:
        raise PoolError(f"weight {weight.name}: ends outside its object {weight.object}")
    return weight


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PoolError(f"{key}: {value!r} is no whole number")
    return value
