"""Which of the ways to cut a network for a budget: by what was measured of its finest pieces.

By size as without a budget, and as the latency model finds best for each size of batch that was
tried (`partition`). Where values are cut they are held by both sides, so that each way has
activations of its own, which are not foreseen: each is tried. Chosen is the one in which a row
takes least, as the backend would run it within what its activations leave of the budget: of all
sizes of batch together, but never one that makes single rows slower than cutting by size does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from typing import Any

from paceline.blocks import cut
from paceline.blocks.backend.budget import blocks_within
from paceline.blocks.backend.manifest import Member, swap_rate_bytes_s
from paceline.blocks.backend.plan import choose
from paceline.blocks.partition import partition
from paceline.blocks.trial import Trial

Stops = tuple[int, ...]
"""Of blocks, in pieces."""
_SAME = 0.02
"""Latencies closer than this are one to the model: then blocks are cut by size."""
Try = Callable[[Sequence[cut.Piece]], tuple[Member, Trial]]
"""The member in such blocks, and what they took."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What is known of the finest blocks."""

    sizes: Sequence[int]
    execute_s: Mapping[int, Sequence[float]]
    """Of their nodes alone, by size of the batch."""
    rate_bytes_s: float
    block_s: float
    """Of a block beside its nodes."""

    def latency_s(self, stops: Stops, rows: int, limit_bytes: int) -> float | None:
        """Of a run in blocks that end so; None if one does not fit."""
        sizes = _joint(self.sizes, stops)
        if limit_bytes < max(sizes):
            return None
        execute_s = [self.block_s + took_s for took_s in _joint(self.execute_s[rows], stops)]
        plan = choose(sizes, execute_s, limit_bytes=limit_bytes, rate_bytes_s=self.rate_bytes_s)
        return plan.latency_s


def best_division(
    finest: Sequence[cut.Piece],
    by_size: Sequence[cut.Piece],
    attempt: Try,
    *,
    budget_bytes: int,
    most_bytes: int,
    most_rows: int,
    tables: bool,
) -> tuple[Member, dict[str, Any]]:
    """The member in the blocks that are best, and what the manifest says of that.

    `finest` have all cuts that `by_size` has; `most_bytes` of a block that is more than one piece;
    `most_rows` of a batch: larger sizes that were tried do not count, the least always does;
    `tables`: some of the budget is for rows of tables. No block is larger than the largest by size,
    so that no batch is refused for it. Raises ConfigError if a way cannot be run.
    """
    most_bytes = min(most_bytes, max(block.bytes for block in by_size))
    ends = [piece.stop for piece in finest]
    before = tuple(ends.index(block.stop) + 1 for block in by_size)
    member, trial = attempt(finest)
    pieces = _of(trial, member)
    if pieces is None:
        return attempt(by_size)[0], {}

    def limits(trial: Trial) -> dict[int, int]:
        """What is left for blocks, by size of the batch."""
        return {
            rows: blocks_within(budget_bytes, activations_bytes, tables=tables)
            for rows, activations_bytes in trial.activations.items()
            if rows <= max(most_rows, min(trial.activations))
        }

    ways = {before: None}
    for rows, limit_bytes in limits(trial).items():
        if limit_bytes >= max(pieces.sizes):
            found = partition(
                pieces.sizes,
                pieces.execute_s[rows],
                limit_bytes=limit_bytes,
                most_bytes=most_bytes,
                rate_bytes_s=pieces.rate_bytes_s,
                block_s=pieces.block_s,
            )
            ways[found.stops] = None
    members: dict[Stops, Member] = {}
    latency_s: dict[Stops, dict[int, float]] = {}
    for stops in ways:
        members[stops], trial = attempt(cut.joined(finest, stops))
        taken = {
            rows: pieces.latency_s(stops, rows, limit_bytes)
            for rows, limit_bytes in limits(trial).items()
        }
        latency_s[stops] = {rows: took_s for rows, took_s in taken.items() if took_s is not None}
    best = min(ways, key=partial(badness, latency_s, before=before))
    return members[best], {
        "rate_bytes_s": pieces.rate_bytes_s,
        "block_s": pieces.block_s,
        "latency_s": latency_s[best],
        "by_size_s": latency_s[before],
    }


def _of(trial: Trial, member: Member) -> Pieces | None:
    """None if it has no weights."""
    (told,) = trial.told([member])
    rate_bytes_s = swap_rate_bytes_s(told.blocks)
    if not rate_bytes_s:
        return None
    return Pieces(
        [block.swapped_bytes for block in told.blocks],
        {
            rows: [max(block.execute_s[rows] - trial.call_s, 0.0) for block in told.blocks]
            for rows in trial.activations
        },
        rate_bytes_s,
        trial.block_s,
    )


def badness(
    latency_s: Mapping[Stops, Mapping[int, float]], stops: Stops, *, before: Stops
) -> tuple[bool, float]:
    """Of one of the ways, by the latency of runs in each, by size of the batch if that fits: the
    least is best. Whether it loses what the way `before` has, a size of batch or the latency of the
    least one; then the geometric mean, over all sizes that fit some way, of what a row takes.

    Rows of a batch that does not fit come in the largest batches that do. So to take larger ones is
    worth what it gains, no more: here single rows would take a half longer for a tenth off eight.

    >>> ways = {(4,): {1: 1.0}, (2, 4): {1: 1.5, 8: 7.2}, (1, 2, 4): {1: 1.01, 8: 7.2}}
    >>> min(ways, key=partial(badness, ways, before=(4,)))
    (1, 2, 4)
    """
    own_s, before_s = latency_s[stops], latency_s[before]
    least = min(before_s, default=0)
    loses = not before_s.keys() <= own_s.keys() or (
        bool(before_s) and own_s[least] > before_s[least] * (1 + _SAME)
    )
    sizes = sorted({rows for way in latency_s.values() for rows in way})
    of_rows = (
        min((took_s / n for n, took_s in own_s.items() if n <= rows), default=float("inf"))
        for rows in sizes
    )
    mean = sum(map(log, of_rows)) / max(len(sizes), 1)
    return loses, mean - log(1 + _SAME) * (stops == before)


def _joint(amounts: Sequence[Any], stops: Sequence[int]) -> list[Any]:
    """Sums by block."""
    return [sum(amounts[start:stop]) for start, stop in pairwise((0, *stops))]
