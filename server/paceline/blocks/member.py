"""One network on its way into a pool: divided into blocks, its weights written as objects.

What cannot be divided is one block, and a note says why: control flow (its subgraphs read values
of the graph around them by name), an output that no node makes. Sequences, maps and optionals
pass no cut, and an input or output of such a type is an error, because Triton has only tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import onnx
from blake3 import blake3

from paceline.blocks import cut, graph
from paceline.blocks.backend.manifest import (
    Block,
    Member,
    PoolObject,
    Tensor,
    Weight,
    weights_bytes,
)
from paceline.blocks.panels import panel
from paceline.blocks.pool import MIB, PoolWriter
from paceline.blocks.rewrite import tile
from paceline.blocks.source import (
    CHUNK_BYTES,
    DATATYPES,
    Optimised,
    Source,
    Stored,
    Value,
    item_bytes,
    values_of,
)
from paceline.blocks.subgraphs import has_subgraphs, read_within
from paceline.core.errors import ConfigError

OWN_OBJECT_BYTES = 64 << 10
_TABLE_BYTES = 1 * MIB  # smaller ones are not worth leaving to demand paging
_ALIGNMENT = 64
_BLOCK_BYTES = 16 * MIB
_PIECE_BYTES = 32 * MIB
_LEAST_BYTES = 1 * MIB
_LEAST_CUT_BYTES = 256 << 10  # what less holds is not cut off by itself
_MOST_CUTS = 256
_CHUNK_BYTES = 64 << 10  # of a table: what one row of it costs over a link
# (operator, input): of this input only some rows are read.
_ROWS = {("Gather", 0), ("EmbedLayerNormalization", 2)}


@dataclass(frozen=True, slots=True)
class Options:
    """What the result depends on besides the sources. `shapes`: for measuring, by input;
    `panels`: matrices as the CPU's kernels read them; `activations_bytes`: of the budget, what is
    not for weights, if the pieces are to be sized without it."""

    budget_mib: int | None = None
    max_batch: int = 32
    measure: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    panels: bool = True
    device: str = "cpu"
    activations_bytes: int = 0

    @property
    def piece_bytes(self) -> int:
        """What has to fit twice: the block that runs and the one that is fetched.

        A power of two, so that models with similar budgets are divided alike and share blocks.

        >>> Options().piece_bytes >> 20, Options(budget_mib=24).piece_bytes >> 20
        (32, 8)
        >>> Options(budget_mib=24, activations_bytes=10 << 20).piece_bytes >> 20
        4
        """
        if self.budget_mib is None:
            return _PIECE_BYTES
        half = max(_LEAST_BYTES, (self.budget_mib * MIB - self.activations_bytes) // 2)
        return min(_PIECE_BYTES, 1 << (half.bit_length() - 1))

    @property
    def block_bytes(self) -> int:
        return min(_BLOCK_BYTES, self.piece_bytes)

    def as_json(self) -> dict[str, Any]:
        return {
            "budget_mib": self.budget_mib,
            "max_batch": self.max_batch,
            "measure": self.measure,
            "shapes": {name: list(shape) for name, shape in sorted(self.shapes.items())},
            "piece_mib": self.piece_bytes // MIB,
            "block_mib": self.block_bytes // MIB,
            "panels": self.panels,
            **({"device": self.device} if self.device != "cpu" else {}),
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rewritten graph, its weights and how it is divided; one block under its own names if not
    `cuttable`; `panels`: some products are computed in another order than the optimised graph's.

    Small weights are objects by `pieces`; `blocks` are divided by size, and could be of `finest`.
    """

    model: onnx.ModelProto
    stored: Mapping[str, Stored]
    values: Mapping[str, Value]
    tables: frozenset[str]
    pieces: Sequence[cut.Piece]
    blocks: Sequence[cut.Piece]
    finest: Sequence[cut.Piece]
    cuttable: bool
    panels: bool
    notes: tuple[str, ...]


def prepare(
    optimised: Optimised,
    options: Options,
    *,
    panels: bool = True,
    tiled: bool = True,
    divided: bool = True,
) -> Prepared:
    """Rewrites and divides a copy of the optimised graph."""
    model = onnx.ModelProto()
    model.CopyFrom(optimised.model)
    values = values_of(optimised)
    why = _uncuttable(model)
    stored: Mapping[str, Stored] = optimised.stored
    parts: dict[str, str] = {}
    if tiled and not why:
        stored, parts = tile(model, stored, options.piece_bytes)
        values = {**values, **_tile_values(model, values, parts, stored)}
    within: Mapping[str, Value] = {}
    if panels and options.panels and options.device == "cpu" and not why:
        stored, within = panel(model, stored, values)
        values = {**values, **within}
    steps = [
        cut.Step(
            tuple(name for name in dict.fromkeys(node.input) if name in values),
            tuple(name for name in node.output if name),
            tuple(name for name in dict.fromkeys(node.input) if name in stored),
        )
        for node in model.graph.node
    ]
    tables = _tables(model.graph.node, stored)
    inputs = {value.name for value in model.graph.input}
    steps = [replace(s, reads=tuple(n for n in s.reads if n not in inputs)) for s in steps]
    sizes = {name: 0 if name in tables else one.size_bytes for name, one in stored.items()}
    uncut = within.keys() | {name for name, value in values.items() if value.dtype == 0}
    pieces = cut.pieces(steps, sizes, limit_bytes=options.piece_bytes, uncut=uncut, parts=parts)
    whole = cut.Piece(0, len(steps), sum(piece.bytes for piece in pieces))
    if why or not divided:
        pieces = [whole]
    blocks = cut.blocks(pieces, options.block_bytes)
    finest = blocks
    if len(pieces) > 1 and options.budget_mib is not None:
        finest = cut.finest(
            steps,
            sizes,
            least_bytes=max(_LEAST_CUT_BYTES, whole.bytes // _MOST_CUTS),
            kept={block.start for block in blocks},
            values={name: _least_bytes(value) for name, value in values.items()},
            uncut=uncut,
            parts=parts,
        )
    notes = (why,) if why else () if divided else ("divided, it would not give the same results",)
    return Prepared(
        model, stored, values, tables, pieces, blocks, finest, not why, bool(within), notes
    )


class ObjectWriter:
    """Writes the objects of one model's members and remembers what they are."""

    def __init__(self, pool: PoolWriter, wrote: Callable[[int], None] = lambda count: None) -> None:
        """`wrote` is told how many bytes of weights are in the pool after each object."""
        self._pool = pool
        self._wrote = wrote
        self.objects: dict[str, PoolObject] = {}
        self.chunks: dict[str, dict[str, Any]] = {}
        """Hashes of the tables' chunks, as the manifest has them."""
        self._placed: dict[str, Weight] = {}

    def write(self, name: str, source: Source, prepared: Prepared) -> Member:
        """The member with its objects in the pool; not measured."""
        tensors = _tensors(name, source, prepared)
        placed = self._placed = self._weights(prepared)
        outputs = [value.name for value in prepared.model.graph.output]
        nodes = prepared.model.graph.node
        if prepared.cuttable:
            made = graph.build(prepared.model, nodes, outputs, prepared.stored, prepared.values)
        else:
            made = graph.keep(prepared.model, prepared.stored)
        whole = self._block(made, nodes, outputs, prepared, placed)
        batching = all(_dynamic(prepared, t.value) for t in (*tensors[0], *tensors[1]))
        member = Member(
            name, *tensors, batching and bool(tensors[0]), prepared.notes, whole, (whole,)
        )
        return self.divided(member, prepared, prepared.blocks)

    def divided(self, member: Member, prepared: Prepared, pieces: Sequence[cut.Piece]) -> Member:
        """The member that was written, in other blocks."""
        if len(pieces) == 1:
            return replace(member, blocks=(member.whole,))
        return replace(member, blocks=tuple(self._blocks(prepared, self._placed, pieces)))

    def _blocks(
        self, prepared: Prepared, placed: Mapping[str, Weight], pieces: Sequence[cut.Piece]
    ) -> Iterator[Block]:
        nodes = prepared.model.graph.node
        steps = [cut.Step(tuple(n.input), tuple(n.output), ()) for n in nodes]
        live = cut.live_after(steps, [value.name for value in prepared.model.graph.output])
        for piece in pieces:
            mine = nodes[piece.start : piece.stop]
            makes = {name for node in mine for name in node.output if name}
            needed = live[piece.stop - 1]
            gives = [name for node in mine for name in node.output if name in makes & set(needed)]
            made = graph.build(prepared.model, mine, gives, prepared.stored, prepared.values)
            yield self._block(made, mine, needed, prepared, placed)

    def _block(
        self,
        made: graph.BlockGraph,
        nodes: Sequence[onnx.NodeProto],
        live: Iterable[str],
        prepared: Prepared,
        placed: Mapping[str, Weight],
    ) -> Block:
        digest, stated = self._pool.add_bytes(made.data)
        self.objects[digest] = stated
        whole_tables = _tables(nodes, prepared.stored)
        weights = tuple(
            replace(
                placed[name],
                name=own,
                access="rows" if name in whole_tables else "all",
                index=_index(nodes, name, made.inputs) if name in whole_tables else "",
            )
            for own, name in made.weights
        )
        paged = {weight.object for weight in weights if weight.access == "rows"}
        identity = [digest, [[w.name, w.object, w.offset] for w in weights]]
        return Block(
            key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            graph=digest,
            nodes=len(nodes),
            inputs=made.inputs,
            outputs=made.outputs,
            weights=weights,
            weights_bytes=weights_bytes(weights, self.objects),
            paged_bytes=weights_bytes((w for w in weights if w.object in paged), self.objects),
            live=tuple(live),
            live_bytes=sum(_least_bytes(prepared.values[name]) for name in live),
            execute_s={},
            swap_in_s=None,
        )

    def _weights(self, prepared: Prepared) -> dict[str, Weight]:
        """Writes every weight; where each one is, by its name in the model."""
        placed: dict[str, Weight] = {}
        nodes = prepared.model.graph.node
        for piece in prepared.pieces:
            reads = (name for node in nodes[piece.start : piece.stop] for name in node.input)
            self._place(prepared, [name for name in reads if name in prepared.stored], placed)
        if not prepared.cuttable:  # what only subgraphs read
            self._place(prepared, list(prepared.stored), placed)
        return placed

    def _place(self, prepared: Prepared, names: Sequence[str], placed: dict[str, Weight]) -> None:
        packed: list[str] = []
        for name in dict.fromkeys(names):
            if name in placed:
                continue
            tensor = prepared.stored[name]
            if tensor.size_bytes < OWN_OBJECT_BYTES:
                packed.append(name)
                continue
            placed[name] = _weight(self._add(tensor.chunks, tensor.size_bytes), 0, tensor)
            if name in prepared.tables:
                self.chunks[placed[name].object] = {
                    "bytes": _CHUNK_BYTES,
                    "blake3": _chunk_hashes(tensor).hex(),
                }
        if packed:
            tensors = [prepared.stored[name] for name in packed]
            offsets, size = [], 0
            for tensor in tensors:
                offsets.append(size)
                size += -(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT
            digest = self._add(lambda: _packed(tensors), size)
            for name, offset, tensor in zip(packed, offsets, tensors, strict=True):
                placed[name] = _weight(digest, offset, tensor)

    def _add(self, chunks: Callable[[], Iterable[bytes]], size_bytes: int) -> str:
        digest, stated = self._pool.add(chunks, size_bytes)
        self.objects[digest] = stated
        self._wrote(size_bytes)
        return digest


def _packed(tensors: Iterable[Stored]) -> Iterator[bytes]:
    for tensor in tensors:
        yield from tensor.chunks()
        yield b"\0" * (-tensor.size_bytes % _ALIGNMENT)


def _weight(digest: str, offset: int, tensor: Stored) -> Weight:
    return Weight(
        "", digest, offset, tensor.size_bytes, DATATYPES[tensor.dtype], tensor.shape, "all"
    )


def _uncuttable(model: onnx.ModelProto) -> str:
    """Why the graph has to stay one block; empty if it need not."""
    if has_subgraphs(model.graph.node):
        return "one block: control flow (If, Loop or Scan)"
    made = {name for node in model.graph.node for name in node.output}
    if unmade := [value.name for value in model.graph.output if value.name not in made]:
        return f"one block: no node gives the output {unmade[0]!r}"
    return ""


def _tile_values(
    model: onnx.ModelProto,
    values: Mapping[str, Value],
    parts: Mapping[str, str],
    stored: Mapping[str, Stored],
) -> dict[str, Value]:
    """Types of the tiles' outputs: the whole's, with their own number of columns."""
    made = {}
    for node in model.graph.node:
        if node.output[0] in parts:
            whole = values[parts[node.output[0]]]
            axis = 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
            columns = stored[node.input[1]].shape[axis]
            shape = (*whole.shape[:-1], columns) if whole.shape else ()
            made[node.output[0]] = Value(whole.dtype, shape)
    return made


def _tables(nodes: Iterable[onnx.NodeProto], stored: Mapping[str, Stored]) -> frozenset[str]:
    """The large weights of which these nodes read only the rows they are asked for."""
    rows: set[str] = set()
    whole: set[str] = set()
    for node in nodes:
        first_axis = not any(a.name == "axis" and a.i for a in node.attribute)
        for position, name in enumerate(node.input):
            by_row = (node.op_type, position) in _ROWS and first_axis
            (rows if by_row else whole).add(name)
        whole.update(read_within(node))
    large = {name for name in rows - whole if name in stored}
    return frozenset(name for name in large if stored[name].size_bytes >= _TABLE_BYTES)


def _index(nodes: Iterable[onnx.NodeProto], table: str, inputs: Sequence[str]) -> str:
    """The input of the block by which its nodes, if it is one Gather, read rows of the table."""
    readers = [node for node in nodes if table in node.input]
    if len(readers) == 1 and readers[0].op_type == "Gather" and readers[0].input[1] in inputs:
        return str(readers[0].input[1])
    return ""


def _chunk_hashes(tensor: Stored) -> bytes:
    assert CHUNK_BYTES % _CHUNK_BYTES == 0
    return b"".join(
        blake3(data[start : start + _CHUNK_BYTES]).digest()
        for data in tensor.chunks()
        for start in range(0, len(data), _CHUNK_BYTES)
    )


def _tensors(
    member: str, source: Source, prepared: Prepared
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs. Raises ConfigError for a type that Triton cannot carry."""
    weights = {tensor.name for tensor in prepared.model.graph.initializer}

    def tensor(name: str, kind: str) -> Tensor:
        value = prepared.values[name]
        if value.dtype not in DATATYPES:
            raise ConfigError(
                f"{kind} {name!r} is no tensor of a type that Triton has; "
                "export the model without sequences, maps, optionals and bfloat16 at its ends",
                where=str(source.path),
            )
        shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
        told = f"{member}/{name}" if member else name
        return Tensor(told, name, DATATYPES[value.dtype], shape)

    model = prepared.model.graph
    return (
        tuple(tensor(v.name, "input") for v in model.input if v.name not in weights),
        tuple(tensor(v.name, "output") for v in model.output),
    )


def _dynamic(prepared: Prepared, value: str) -> bool:
    """May its first axis be a batch?"""
    shape = prepared.values[value].shape
    return bool(shape) and not isinstance(shape[0], int)


def _least_bytes(value: Value) -> int:
    """With axes of unknown length 1; text counted as nothing."""
    item = 0 if DATATYPES.get(value.dtype, "BYTES") == "BYTES" else item_bytes(value.dtype)
    return prod(axis if isinstance(axis, int) else 1 for axis in value.shape) * item
