"""`paceline blocks compile`: ONNX files into a pool and a model directory.

Per member: optimise, tile, cut, write the objects, compare. For a budget its finest blocks are
timed first, and joined as the latency model says. Then all blocks are timed, and the manifest is
written, and last config.pbtxt, which commits. What is written on the way is in the pool only if all
of that succeeds. A model whose cache key is the same and whose objects are all right is left alone.
docs/blocks-format.md says what is written; SwapNet (arXiv 2401.16757) why it is cut.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort

from paceline.blocks import cut, measure
from paceline.blocks.aliases import publish_members
from paceline.blocks.backend.manifest import (
    FORMAT,
    Manifest,
    Member,
    PoolError,
    PoolObject,
    Runtime,
    pages,
    parse,
    runtime_here,
)
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.dividing import best_division
from paceline.blocks.fitting import Check, check_blocks, within_budget
from paceline.blocks.group import Group
from paceline.blocks.member import ObjectWriter, Options, Prepared, prepare
from paceline.blocks.pool import MIB, PoolWriter
from paceline.blocks.repository import CompiledModel, compiled_model, is_ours, publish
from paceline.blocks.rows import why_not_batched
from paceline.blocks.source import Optimised, Source, examine, optimise
from paceline.blocks.trial import Shapes, Trial, tried
from paceline.core.errors import ConfigError

COMPILER = 11
"""Raised whenever the same input would give another result."""

_MEASURED_BATCHES = (1, 8)
# Matrices in panels, tiled, divided: what gives wrong results in one way is compiled in the next.
_WAYS = (
    (True, True, True),
    (False, True, True),
    (False, False, True),
    (False, False, False),
)
# Comparing runs the model as one block, all of it mapped; above this that would fill the memory.
_COMPARED_BYTES = 1 << 30


class Progress(Protocol):
    """Told what is being done now, and how many bytes of the step's total are done."""

    def __call__(self, what: str, done_bytes: int = 0, total_bytes: int = 0) -> None: ...


def silent(what: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
    """Progress that nobody is told of."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A compiled model; `written_bytes` of objects the pool did not have; `fresh`: compiled now.

    `taken` are members (and their names) that cannot be called by name: other models have it.
    """

    model: CompiledModel
    written_bytes: int
    fresh: bool
    taken: Mapping[str, str] = field(default_factory=dict)


def compile_model(
    sources: Mapping[str, Path],
    directory: Path,
    pool: Path,
    options: Options,
    progress: Progress = silent,
    *,
    runtime: Runtime | None = None,
    group: Group | None = None,
) -> Outcome:
    """Compiles `sources` (by member; "" for a model that is not fused) into `directory`.

    `group` wires them, and Python models, into one; `sources` are then its own. `runtime` is what
    it is compiled for: by default, and in truth always, this machine's.
    Raises ConfigError for what the user can correct (BudgetError: a budget), ResidencyError for
    what the machine refuses.
    """
    pool = pool.resolve()
    if directory.exists() and not is_ours(directory):
        raise ConfigError(
            "holds a model of another backend; choose another name (NAME=MODEL.onnx) or --out",
            where=str(directory),
        )
    examined = {}
    for member, path in sources.items():
        progress(f"{directory.name}: reading {path.name}")
        examined[member] = examine(path)
    runtime = runtime or runtime_here(ort.__version__)
    wiring = group.as_json() if group is not None else None
    key = _cache_key(examined, options, runtime, wiring)
    before = _current(directory, pool, key)
    if before is not None:
        return Outcome(before, 0, fresh=False)
    make = partial(_make, pool, directory.name, examined, key, wiring, runtime, progress)
    made = within_budget(make, options)
    publish(
        directory,
        made.manifest,
        made.digest,
        pool,
        max_batch=made.max_batch,
        budget_mib=options.budget_mib,
        warm_up=group.warm_up() if group is not None else None,
        files=group.extra_files() if group is not None else (),
    )
    model = CompiledModel(directory, pool, made.digest, made.manifest)
    names = {name: name for name in examined if name} if group is None else group.own_names
    taken = publish_members(model, names)
    return Outcome(model, made.written_bytes, fresh=True, taken=taken)


@dataclass(frozen=True, slots=True)
class _Made:
    """What is in the pool now: a manifest and its objects, some of them new."""

    manifest: Manifest
    digest: str
    max_batch: int
    written_bytes: int


def _make(
    pool: Path,
    model: str,
    sources: Mapping[str, Source],
    key: str,
    wiring: object,
    runtime: Runtime,
    progress: Progress,
    options: Options,
    check: Check,
) -> _Made:
    """Compiles into the pool; nothing is there unless it returns. Raises what `check` does."""
    with PoolWriter(pool) as writer:
        compiler = _Compiler(writer, model, options, runtime, progress)
        members = [compiler.member(name, source) for name, source in sources.items()]
        document = compiler.measured_document(members, sources, key)
        if wiring is not None:
            document["wiring"] = wiring
        text = json.dumps(document, indent=1).encode()
        manifest = parse(text, "the manifest that was just made")
        max_batch = check(manifest, options)
        digest = writer.add_manifest(text, manifest.objects.keys())
    return _Made(manifest, digest, max_batch, writer.written_bytes)


class _Compiler:
    """One model's compile."""

    def __init__(
        self,
        pool: PoolWriter,
        model: str,
        options: Options,
        runtime: Runtime,
        progress: Progress,
    ) -> None:
        self._pool = pool
        self._model = model
        self._options = options
        self._runtime = runtime
        self._progress = progress
        self._objects: dict[str, PoolObject] = {}
        self._chunks: dict[str, Any] = {}
        self._measured: dict[str, Any] = {}
        self._shapes: dict[int, dict[str, Sequence[int]]] = {}
        self._trials: dict[str, Trial] = {}

    def member(self, name: str, source: Source) -> Member:
        """Compiles one ONNX file."""
        told = f"{self._model}/{name}" if name else self._model
        stage = self._pool.stage / f"member-{len(self._measured)}-{name}"
        stage.mkdir()
        try:
            self._progress(f"{told}: optimising {source.bytes / MIB:.1f} MiB")
            optimised = optimise(source, stage, portable=self._options.device != "cpu")
            member = self._faithful(told, name, source, optimised)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        check_blocks(told, source, member, self._options)
        return member

    def measured_document(
        self, members: Sequence[Member], sources: Mapping[str, Source], key: str
    ) -> dict[str, Any]:
        """The manifest, docs/blocks-format.md, with what could be measured."""
        document = self._document(members, sources, key)
        if not self._shapes:
            return document
        blocks = sum(len(member.blocks) for member in members)
        self._progress(f"{self._model}: timing {blocks} blocks")
        trial = self._try(document, members, self._shapes)
        document["members"] = [asdict(member) for member in trial.told(members)]
        document["activations"] = {str(rows): size for rows, size in trial.activations.items()}
        return document

    def _document(
        self, members: Sequence[Member], sources: Mapping[str, Source], key: str
    ) -> dict[str, Any]:
        blocks = [block for member in members for block in (member.whole, *member.blocks)]
        weights = {weight.object for block in blocks for weight in block.weights}
        used = weights | {block.graph for block in blocks}
        return {
            "format": FORMAT,
            "model": self._model,
            "cache_key": key,
            "runtime": self._runtime.as_json(),
            "sources": [
                {"member": m, "file": s.path.name, "digest": s.digest, "bytes": s.bytes}
                for m, s in sources.items()
            ],
            "options": self._options.as_json(),
            "objects": {name: self._objects[name].as_json() for name in sorted(used)},
            "weights_bytes": sum(pages(self._objects[name].size_bytes) for name in weights),
            "members": [asdict(member) for member in members],
            "chunks": {name: self._chunks[name] for name in sorted(used & self._chunks.keys())},
            "largest_block_bytes": max(
                (b.swapped_bytes for m in members for b in m.blocks), default=0
            ),
            "measured": self._measured or None,
            "activations": {},
        }

    def _try(
        self,
        document: Mapping[str, Any],
        members: Sequence[Member],
        shapes: Mapping[int, Shapes],
    ) -> Trial:
        """How the members of the document run; once for the same blocks."""
        keys = [block.key for member in members for block in member.blocks]
        of = json.dumps([keys, shapes])
        if of not in self._trials:
            path = self._pool.stage / "tried.json"
            path.write_text(json.dumps(document), encoding="utf-8")
            self._trials[of] = tried(path, self._pool.root, self._pool.stage, shapes)
        return self._trials[of]

    def _faithful(self, told: str, name: str, source: Source, optimised: Optimised) -> Member:
        """The member as finely divided as gives what ONNX Runtime gives for the whole graph."""
        for panels, tiled, divided in _WAYS:
            prepared = prepare(
                optimised, self._options, panels=panels, tiled=tiled, divided=divided
            )
            if panels and not prepared.panels:
                continue  # nothing to store in panels: the next way is the same without
            writer, member = self._write(told, name, source, prepared)
            if not self._options.measure:
                break
            divide = partial(self._divide, told, writer, prepared)
            measured = self._measure(told, member, divide, optimised, exact=not panels)
            if measured is not None:
                return measured
        return replace(member, batching=member.batching and _one_symbol(prepared, member))

    def _write(
        self, told: str, name: str, source: Source, prepared: Prepared
    ) -> tuple[ObjectWriter, Member]:
        total = sum(tensor.size_bytes for tensor in prepared.stored.values())
        done = 0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            self._progress(f"{told}: writing {len(prepared.blocks)} blocks", done, total)

        writer = ObjectWriter(self._pool, wrote)
        member = writer.write(name, source, prepared)
        self._objects.update(writer.objects)
        self._chunks.update(writer.chunks)
        return writer, member

    def _divide(
        self,
        told: str,
        writer: ObjectWriter,
        prepared: Prepared,
        member: Member,
        shapes: Mapping[int, Shapes],
    ) -> Member:
        """The member in the blocks that the latency model makes of how the finest ones run."""
        options, pieces = self._options, prepared.finest
        if options.budget_mib is None or len(pieces) == len(prepared.blocks):
            return member

        def attempt(pieces: Sequence[cut.Piece]) -> tuple[Member, Trial]:
            self._progress(f"{told}: trying {len(pieces)} blocks")
            made = writer.divided(member, prepared, pieces)
            self._objects.update(writer.objects)  # graphs
            return made, self._try(self._document([made], {}, ""), [made], shapes)

        found, why = best_division(
            pieces,
            prepared.blocks,
            attempt,
            budget_bytes=options.budget_mib * MIB,
            most_bytes=options.block_bytes,
            most_rows=options.max_batch,
            tables=bool(prepared.tables),
        )
        self._measured.setdefault("cuts", {})[member.name] = why or None
        return found

    def _measure(
        self,
        told: str,
        member: Member,
        divide: Callable[[Member, Mapping[int, Shapes]], Member],
        optimised: Optimised,
        *,
        exact: bool,
    ) -> Member | None:
        """The member with what running it showed, in the blocks that `divide` makes of it for the
        shapes of some batches; None if it does not compute the same in blocks.

        The same is bit for bit, in turn as in one block; but for rounding (`exact` false) what the
        optimised graph computes, whose products may add in another order.
        A member that cannot be run, because the lengths of its axes could not be guessed, stays as
        it is but does not batch.
        """
        runner = measure.BlockRunner(self._pool.store, self._objects)
        shapes = self._options.shapes
        plain = partial(measure.run_file, optimised.path, member)
        in_blocks = partial(runner.run, member, drop=True)
        compared = sum(weight.bytes for weight in member.whole.weights) <= _COMPARED_BYTES
        self._progress(f"{told}: comparing")
        guess = measure.guess_axes(plain if compared else in_blocks, member, shapes)
        if guess is None:
            note = "not measured and no batching: lengths of its inputs could not be guessed"
            return replace(member, batching=False, notes=(*member.notes, f"{note}; give --shape"))

        def equal(divided: Member, batch: int) -> bool:
            feed = measure.sample(member, batch, guess, shapes, measure.Draw(batch))
            wanted = plain(feed)
            try:
                got = [runner.run(divided, feed, whole=which, drop=True) for which in (True, False)]
            except Exception as error:  # ONNX Runtime's own exceptions share no useful base class
                if len(divided.blocks) > 1:
                    return False
                raise ConfigError(f"{told}: does not run as a block: {error}") from None
            if exact:
                return all(measure.same(wanted, answer) for answer in got)
            return measure.same(*got) and measure.close(wanted, got[0])

        if compared and not equal(member, 1):
            return None
        if member.batching and (why := why_not_batched(runner, member, guess, shapes)):
            notes = (*member.notes, f"no batching: {why}")
            member = replace(member, batching=False, notes=notes)
        tried_with = {
            size: {
                name: list(array.shape)
                for name, array in measure.sample(member, size, guess, shapes).items()
            }
            for size in (_MEASURED_BATCHES if member.batching else _MEASURED_BATCHES[:1])
        }
        batches = [1, 2] if member.batching else [1]
        found = divide(member, tried_with)
        if compared:
            self._progress(f"{told}: comparing {len(found.blocks)} blocks")
            if found.blocks != member.blocks and not all(equal(found, rows) for rows in batches):
                self._measured["cuts"].pop(member.name)
                found = member
            if found.blocks == member.blocks and member.batching and not equal(member, 2):
                return None
            self._measured.setdefault("verified_batches", {})[member.name] = batches
        self._measured.setdefault("shapes", {}).update(tried_with[1])
        for size, shapes_of in tried_with.items():
            self._shapes.setdefault(size, {}).update(shapes_of)
        return found


def _cache_key(
    sources: Mapping[str, Source], options: Options, runtime: Runtime, wiring: object
) -> str:
    parts = [
        FORMAT,
        COMPILER,
        [[member, source.digest] for member, source in sources.items()],
        options.as_json(),
        runtime.as_json(),
        *([wiring] if wiring is not None else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _current(directory: Path, pool: Path, key: str) -> CompiledModel | None:
    """What `directory` holds, if it is what would be compiled and nothing of it is damaged."""
    try:
        model = compiled_model(directory)
        if model is None or model.manifest.cache_key != key or model.pool.resolve() != pool:
            return None
        if model.missing_files():
            return None
        store = ObjectStore(model.pool)
        for name, stated in model.manifest.objects.items():
            store.verified(name, stated)
    except (ConfigError, PoolError):
        return None
    return model


def _one_symbol(prepared: Prepared, member: Member) -> bool:
    """Do all inputs and outputs call their first axis the same? All one can say unmeasured."""
    tensors = (*member.inputs, *member.outputs)
    return len({prepared.values[tensor.value].shape[0] for tensor in tensors}) == 1
