"""A model tried in blocks, in a process of its own: what they take, in time and in memory.

That process does what the backend does: blocks run in turn, with its sessions and its arena, which
is empty whenever shapes change. Then all weights are swapped in and out once, in the order of need
from a cold page cache, beside a computation, which slows it as it will. What the process's
anonymous memory has grown by, at most, is what a budget has to leave room for: the second run of a
batch may find no room between what the first one left and take more (VGG19 at 8: 230 MiB, then
260); later ones do not. Of times the least counts, which others disturbed least.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paceline.blocks.backend.loader import Loader
from paceline.blocks.backend.malloc import keep_little
from paceline.blocks.backend.manifest import Block, Manifest, Member, PoolError, Tensor, parse
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.reader import Reader
from paceline.blocks.backend.run import compute
from paceline.blocks.backend.skeleton import DTYPES, NOTHING, Session, empty_arena, to_value
from paceline.blocks.backend.source import LocalSource, loaded_objects, objects_of
from paceline.blocks.backend.window import CHUNK_BYTES, Span, Window
from paceline.blocks.pool import StagedStore
from paceline.core.errors import ConfigError

TIMEOUT_S = 600.0
_RUNS = 3
_SPARE = 0.05
"""Of what was measured, on top: what a batch between two sizes needs lies up to 4 % above the line
between them (VGG19, ViT-B/16 at 1, 2, ... 8).
"""
_IDLE_BLOCKS = 32
_IDLE_RUNS = 9

Shapes = Mapping[str, Sequence[int]]
"""Of every input, by name."""


@dataclass(frozen=True, slots=True)
class Took:
    """Of a block: seconds by batch size, seconds to swap it in from the disk, and bytes of what
    lives after it at the least batch."""

    execute_s: Mapping[int, float]
    swap_in_s: float
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Trial:
    """`activations`: bytes beside weights, by batch size; `of_members`: the same of each, {} of one
    that was not run; `blocks` of all members, in turn.

    `block_s`: what any block takes from its run, to be looked for, waited for and called;
    `call_s` of it is in its `execute_s`, too.
    """

    activations: Mapping[int, int]
    of_members: Sequence[Mapping[int, int]]
    blocks: Sequence[Took]
    block_s: float
    call_s: float

    def told(self, members: Sequence[Member]) -> tuple[Member, ...]:
        """The members that were tried, with what was found."""
        took = iter(self.blocks)
        return tuple(
            replace(
                member,
                blocks=tuple(_told(block, next(took)) for block in member.blocks),
                activations=activations,
            )
            for member, activations in zip(members, self.of_members, strict=True)
        )


def _told(block: Block, took: Took) -> Block:
    if not took.execute_s:
        return block  # of a member whose inputs' lengths nobody knows
    return replace(
        block, execute_s=took.execute_s, swap_in_s=took.swap_in_s, live_bytes=took.live_bytes
    )


def tried(manifest: Path, pool: Path, stage: Path, shapes: Mapping[int, Shapes]) -> Trial:
    """Runs a few batches; `shapes` by their size, rising.

    Objects are in the pool or a `PoolWriter`'s stage. Raises ConfigError if the model cannot be
    run.
    """
    asked = json.dumps(
        {"manifest": str(manifest), "pool": str(pool), "stage": str(stage), "shapes": shapes}
    )
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{manifest}: took more than {TIMEOUT_S:.0f} s to run a few times"
        ) from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        raise ConfigError(f"{manifest}: does not run in blocks: {why[-1]}") from None
    found = json.loads(done.stdout)
    return Trial(
        activations=_by_rows(found["activations"]),
        of_members=[_by_rows(each) for each in found["of_members"]],
        blocks=[
            Took(_by_rows(each["execute_s"]), each["swap_in_s"], each["live_bytes"])
            for each in found["blocks"]
        ],
        block_s=found["block_s"],
        call_s=found["call_s"],
    )


def _by_rows(found: Mapping[str, Any]) -> dict[int, Any]:
    return {int(rows): value for rows, value in found.items()}


class _Everything:
    """All weights at hand, swapped in for their block and out behind it; see `run.Weights`."""

    def __init__(self, blocks: Sequence[Block], objects: Mapping[str, MappedObject]) -> None:
        self.blocks = blocks
        self.objects = objects

    def begin(self, order: Sequence[int]) -> int:
        return 0

    def take(self, run: int, candidates: Sequence[int]) -> int:
        for name in loaded_objects(self.blocks[candidates[0]]):
            self.objects[name].populate(0, self.objects[name].size_bytes)
        return candidates[0]

    def finish(self, run: int, block: int) -> None:
        for weight in self.blocks[block].weights:
            self.objects[weight.object].drop(page_cache=False)

    def end(self, run: int) -> None: ...


def _swapped_in_beside(
    manifest: Manifest,
    shapes: Mapping[str, Shapes],
    weights: _Everything,
    built: Sequence[Session],
    execute_s: Sequence[Mapping[int, float]],
) -> list[float]:
    """Seconds to swap each block in while the one that takes longest computes."""
    blocks, objects = weights.blocks, weights.objects
    least = next(iter(shapes), "")
    first = 0
    for member in manifest.members:
        stop = first + len(member.blocks)
        if stop - first > 1 and all(execute_s[first:stop]):
            longest = max(range(first, stop), key=lambda number: min(execute_s[number].values()))
            sessions = _Built(blocks, built, kept=longest)
            _run(member, first, shapes[least], weights, sessions, runs=1)
            weights.take(0, [longest])
            with _computing(built[longest], sessions.given):
                return _swapped_in_s(blocks, objects, longest)
        first = stop
    return _swapped_in_s(blocks, objects, None)


def _swapped_in_s(
    blocks: Sequence[Block], objects: Mapping[str, MappedObject], held: int | None
) -> list[float]:
    """Seconds to swap each block in, one after the other from the disk, as within a budget.

    Block `held` is in memory, and gets what its bytes would take at the others' rate.
    """
    needs = [loaded_objects(block) for block in blocks]
    kept = set(needs[held]) if held is not None else set()
    spans = [
        [
            Span(name, offset, min(CHUNK_BYTES, objects[name].size_bytes - offset), last=True)
            for name in names
            if name not in kept
            for offset in range(0, objects[name].size_bytes, CHUNK_BYTES)
        ]
        for names in needs
    ]
    for name in objects.keys() - kept:
        objects[name].drop(page_cache=True)
    reader = Reader(counted=True)
    following = [span for of_block in spans for span in of_block]
    took_s = []
    for of_block in spans:
        began_s = time.perf_counter()
        for span in of_block:
            following.pop(0)
            reader.expect(following)
            reader.bring(objects, span)
        took_s.append(time.perf_counter() - began_s)
        for span in of_block:
            objects[span.name].drop(page_cache=True)
    moved = sum(span.size_bytes for of_block in spans for span in of_block)
    if held is not None and moved:
        took_s[held] = blocks[held].swapped_bytes * sum(took_s) / moved
    return took_s


@contextmanager
def _computing(session: Session, values: list[Any]) -> Iterator[None]:
    """A block runs again and again meanwhile."""
    over = threading.Event()

    def keep_running() -> None:
        while not over.is_set():
            session.run(values)

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Built:
    """Sessions that are there; see `run.Sessions`. Remembers what they took and made."""

    def __init__(
        self, blocks: Sequence[Block], sessions: Sequence[Session], kept: int | None = None
    ) -> None:
        self._blocks = blocks
        self._sessions = sessions
        self._kept = kept
        self.given: list[Any] = []
        """What the block `kept` was given last."""
        self.took_s: dict[int, list[float]] = {}
        self.bytes: dict[str, int] = {}
        """Of values, as they came last."""

    def run(self, block: int, values: list[Any]) -> list[Any]:
        if block == self._kept:
            self.given = values
        began_s = time.perf_counter()
        results = self._sessions[block].run(values)
        self.took_s.setdefault(block, []).append(time.perf_counter() - began_s)
        for name, result in zip(self._blocks[block].outputs, results, strict=True):
            self.bytes[name] = _bytes(result)
        return results


def _tried(manifest: Manifest, store: StagedStore, shapes: Mapping[str, Shapes]) -> Trial:
    objects = {
        digest: MappedObject(store.path(digest), stated.size_bytes)
        for digest, stated in objects_of(manifest).items()
    }
    blocks = [block for member in manifest.members for block in member.blocks]
    folder = store.root / "objects"
    made = {
        block.key: Session(
            store.read(block.graph, manifest.objects[block.graph]),
            block,
            folder,
            objects,
            threads=1,
        )
        for block in blocks
    }
    weights = _Everything(blocks, objects)
    built = [made[block.key] for block in blocks]
    before = _anonymous_bytes()
    grown: list[dict[int, int]] = [{} for _ in manifest.members]
    execute_s: list[dict[int, float]] = [{} for _ in blocks]
    live_bytes = [0 for _ in blocks]
    for rows, of_inputs in shapes.items():
        first = 0
        for member, of_member in zip(manifest.members, grown, strict=True):
            if all(tensor.name in of_inputs for tensor in member.inputs):
                sessions = _Built(blocks, built)
                most = _run(member, first, of_inputs, weights, sessions) - before
                of_member[int(rows)] = int(most * (1 + _SPARE))
                for number, took_s in sessions.took_s.items():
                    # The first run apart: it allocates.
                    execute_s[number][int(rows)] = min(took_s[1:])
                    live = blocks[number].live
                    size = sum(sessions.bytes.get(name, 0) for name in live)
                    live_bytes[number] = live_bytes[number] or size
            first += len(member.blocks)
    swap_in_s = _swapped_in_beside(manifest, shapes, weights, built, execute_s)
    took = [Took(*of_block) for of_block in zip(execute_s, swap_in_s, live_bytes, strict=True)]
    of_any = {
        int(rows): max((of_member.get(int(rows), 0) for of_member in grown), default=0)
        for rows in shapes
    }
    return Trial(of_any, grown, took, *_idle(store, folder))


def _run(
    member: Member,
    first: int,
    shapes: Shapes,
    weights: _Everything,
    sessions: _Built,
    runs: int = _RUNS,
) -> int:
    """Batches of these shapes, one after the other; the most anonymous memory there was after one.

    The member's first block is number `first`.
    """
    feed = {
        tensor.value: to_value(_ones(tensor.dtype, shapes[tensor.name])) for tensor in member.inputs
    }
    sessions.bytes.update((name, _bytes(value)) for name, value in feed.items())
    outputs = tuple(dict.fromkeys(tensor.value for tensor in member.outputs))
    rows = next(iter(shapes.values()), (1,))[0]
    most = 0
    empty_arena()
    for _ in range(runs):
        compute(member, first, feed, outputs, rows=rows, weights=weights, sessions=sessions)
        most = max(most, _anonymous_bytes())
    return most


def _idle(store: StagedStore, folder: Path) -> tuple[float, float]:
    """Seconds of a block that computes nothing: in a run, and of its session's part of that."""
    blocks = [_nothing(number) for number in range(_IDLE_BLOCKS)]
    tensors = [Tensor("", f"v{number}", "FP32", (1,)) for number in (0, _IDLE_BLOCKS)]
    member = Member("", (tensors[0],), (tensors[1],), True, (), blocks[0], tuple(blocks))
    session = Session(NOTHING, blocks[0], folder, {}, threads=1)
    sessions = _Built(blocks, [session] * _IDLE_BLOCKS)
    needs: list[tuple[str, ...]] = [()] * _IDLE_BLOCKS
    loader = Loader(Window(needs, {}, limit_bytes=0), {}, LocalSource(store.root))
    loader.start()
    feed = {"v0": to_value(np.ones(1, np.float32))}
    took_s = []
    for _ in range(_IDLE_RUNS):
        began_s = time.perf_counter()
        outputs = (tensors[1].value,)
        compute(member, 0, feed, outputs, rows=1, weights=loader, sessions=sessions)
        took_s.append(time.perf_counter() - began_s)
    loader.close()
    call_s = sum(map(min, sessions.took_s.values())) / _IDLE_BLOCKS
    return min(took_s) / _IDLE_BLOCKS, call_s


def _nothing(number: int) -> Block:
    made = (f"v{number + 1}",)
    return Block("", "", 1, (f"v{number}",), made, (), 0, 0, made, 4, {}, None)


def _bytes(value: Any) -> int:
    return 0 if value.data_type() == "tensor(string)" else int(value.tensor_size_in_bytes())


def _ones(dtype: str, shape: Sequence[int]) -> Any:
    return np.full(shape, "a", np.object_) if dtype == "BYTES" else np.ones(shape, DTYPES[dtype])


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise PoolError("this kernel does not tell a process's anonymous memory")


def _main() -> None:
    keep_little()  # as the backend does within a budget
    asked = json.load(sys.stdin)
    path = Path(asked["manifest"])
    manifest = parse(path.read_bytes(), str(path))
    store = StagedStore(Path(asked["pool"]), Path(asked["stage"]))
    print(json.dumps(asdict(_tried(manifest, store, asked["shapes"]))))


if __name__ == "__main__":
    _main()
