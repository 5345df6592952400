"""How much memory batches need beside weights: measured in a process of its own.

That process does what the backend does: its sessions, its arena, blocks in turn, and an empty arena
whenever shapes change. What its anonymous memory has grown by, at most, is what a budget has to
leave room for. The second run of a batch may find no room between what the first one left and take
more (VGG19 at 8: 230 MiB, then 260); later ones do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.blocks.backend.manifest import Block, Manifest, PoolError, parse
from paceline.blocks.backend.mapping import MappedObject
from paceline.blocks.backend.run import compute
from paceline.blocks.backend.skeleton import DTYPES, Session, empty_arena, to_value
from paceline.blocks.backend.source import objects_of
from paceline.blocks.pool import StagedStore
from paceline.core.errors import ConfigError

TIMEOUT_S = 600.0
_RUNS = 3
_SPARE = 0.05
"""Of what was measured, on top: what a batch between two sizes needs lies up to 4 % above the line
between them (VGG19, ViT-B/16 at 1, 2, ... 8).
"""

Shapes = Mapping[str, Sequence[int]]
"""Of every input, by name."""


def measured(
    manifest: Path, pool: Path, stage: Path, shapes: Mapping[int, Shapes]
) -> dict[int, int]:
    """Bytes by size of the batch; `shapes` by that size, rising.

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
    return {int(rows): size for rows, size in json.loads(done.stdout).items()}


class _Everything:
    """All weights at hand, and given back after use; see `run.Weights`."""

    def __init__(self, blocks: Sequence[Block], objects: Mapping[str, MappedObject]) -> None:
        self._blocks = blocks
        self._objects = objects

    def begin(self, order: Sequence[int]) -> int:
        return 0

    def take(self, run: int, candidates: Sequence[int]) -> int:
        return candidates[0]

    def finish(self, run: int, block: int) -> None:
        for weight in self._blocks[block].weights:
            self._objects[weight.object].drop(page_cache=False)

    def end(self, run: int) -> None: ...


class _Built:
    """Sessions that are there; see `run.Sessions`."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions

    def run(self, block: int, values: list[Any]) -> list[Any]:
        return self._sessions[block].run(values)


def _grown(manifest: Manifest, store: StagedStore, shapes: Mapping[str, Shapes]) -> dict[str, int]:
    objects = {
        digest: MappedObject(store.path(digest), stated.size_bytes)
        for digest, stated in objects_of(manifest).items()
    }
    blocks = [block for member in manifest.members for block in member.blocks]
    made = {
        block.key: Session(
            store.read(block.graph, manifest.objects[block.graph]),
            block,
            store.root / "objects",
            objects,
            threads=1,
        )
        for block in blocks
    }
    weights = _Everything(blocks, objects)
    sessions = _Built([made[block.key] for block in blocks])
    before = _anonymous_bytes()
    grown = {}
    for rows, of_inputs in shapes.items():
        most = 0
        first = 0
        for member in manifest.members:
            if all(tensor.name in of_inputs for tensor in member.inputs):
                feed = {
                    tensor.value: to_value(_ones(tensor.dtype, of_inputs[tensor.name]))
                    for tensor in member.inputs
                }
                outputs = tuple(dict.fromkeys(tensor.value for tensor in member.outputs))
                empty_arena()
                for _ in range(_RUNS):
                    compute(
                        member,
                        first,
                        feed,
                        outputs,
                        rows=int(rows),
                        weights=weights,
                        sessions=sessions,
                    )
                    most = max(most, _anonymous_bytes() - before)
            first += len(member.blocks)
        grown[rows] = int(most * (1 + _SPARE))
    return grown


def _ones(dtype: str, shape: Sequence[int]) -> Any:
    return np.full(shape, "a", np.object_) if dtype == "BYTES" else np.ones(shape, DTYPES[dtype])


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise PoolError("this kernel does not tell a process's anonymous memory")


def _main() -> None:
    asked = json.load(sys.stdin)
    path = Path(asked["manifest"])
    manifest = parse(path.read_bytes(), str(path))
    store = StagedStore(Path(asked["pool"]), Path(asked["stage"]))
    print(json.dumps(_grown(manifest, store, asked["shapes"])))


if __name__ == "__main__":
    _main()
