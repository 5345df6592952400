"""One inference of one member: its blocks, in dataflow order.

Only blocks that the requested outputs need are computed. A block computes as soon as its inputs
and its weights are there: the first in the manifest's order, or another one of a parallel branch
whose weights came earlier. Values are let go after their last use.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .manifest import Block, Member


class Weights(Protocol):
    """What a run needs of a `Loader`; blocks are numbers over all members."""

    def begin(self, order: Sequence[int]) -> int: ...

    def take(self, run: int, candidates: Sequence[int]) -> int: ...

    def finish(self, run: int, block: int) -> None: ...

    def end(self, run: int) -> None: ...


class Sessions(Protocol):
    """Sessions of the blocks, which may still be under construction."""

    def run(self, block: int, values: list[Any]) -> list[Any]:
        """Waits for the session if need be."""


class Durations:
    """How long each block computes, learned while serving: the latest of each batch size.

    The manifest's measurements are of an undisturbed machine; ours decide where they differ.
    """

    _WEIGHT = 0.2

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._known: list[dict[int, float]] = [dict(block.execute_s) for block in blocks]
        self._lock = threading.Lock()

    def observe(self, block: int, rows: int, took_s: float) -> None:
        with self._lock:
            before = self._known[block].get(rows)
            weight = self._WEIGHT
            self._known[block][rows] = (
                took_s if before is None else (1 - weight) * before + weight * took_s
            )

    def at(self, rows: int) -> list[float]:
        """Seconds of each block for a batch of `rows`; of the nearest known size, else 0."""
        with self._lock:
            return [
                known[min(known, key=lambda size: (abs(size - rows), size))] if known else 0.0
                for known in self._known
            ]


def needed_blocks(blocks: Sequence[Block], values: Sequence[str]) -> tuple[int, ...]:
    """Positions of the blocks that contribute to these values, in order."""
    wanted = set(values)
    chosen = []
    for position in reversed(range(len(blocks))):
        if wanted.intersection(blocks[position].outputs):
            chosen.append(position)
            wanted.update(blocks[position].inputs)
    return tuple(reversed(chosen))


def compute(
    member: Member,
    first_block: int,
    feed: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    rows: int,
    weights: Weights,
    sessions: Sessions,
    durations: Durations | None = None,
) -> dict[str, Any]:
    """OrtValues of the `outputs` (values of the member), from those of its inputs.

    The member's block `i` is number `first_block + i`. Raises PoolError when weights cannot be
    had, and whatever ONNX Runtime raises.
    """
    order = list(needed_blocks(member.blocks, outputs))
    uses = Counter(value for position in order for value in member.blocks[position].inputs)
    uses.update(outputs)
    values = {name: value for name, value in feed.items() if uses[name]}
    run = weights.begin([first_block + position for position in order])
    try:
        while order:
            runnable = [
                first_block + position
                for position in order
                if all(value in values for value in member.blocks[position].inputs)
            ]
            assert runnable, (member.name, order, sorted(values))
            number = weights.take(run, runnable)
            position = number - first_block
            block = member.blocks[position]
            given = [values[name] for name in block.inputs]
            for name in block.inputs:
                uses[name] -= 1
                if not uses[name]:
                    del values[name]
            began_s = time.perf_counter()
            results = sessions.run(number, given)
            if durations is not None:
                durations.observe(number, rows, time.perf_counter() - began_s)
            values.update(
                (name, result)
                for name, result in zip(block.outputs, results, strict=True)
                if uses[name]
            )
            weights.finish(run, number)
            order.remove(position)
    finally:
        weights.end(run)
    return {name: values[name] for name in outputs}
