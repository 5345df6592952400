"""Whether what was compiled runs within the budget it was compiled for, and what to try if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from paceline.blocks.backend.budget import budget_for
from paceline.blocks.backend.manifest import Manifest, Member
from paceline.blocks.backend.source import tables_of
from paceline.blocks.member import Options
from paceline.blocks.pool import MIB
from paceline.blocks.source import Source
from paceline.core.errors import BudgetError

Made = TypeVar("Made")
Check = Callable[[Manifest, Options], int]
"""The largest batch of what was made; raises BudgetError if it is not made well enough."""


class _CrowdedError(BudgetError):
    """It runs, but nothing is fetched while a block computes."""


def within_budget(make: Callable[[Options, Check], Made], options: Options) -> Made:
    """Made of pieces of half the budget; where activations take too much of it, of half the rest.

    Not of those at once: activations are known only when a model has run in its blocks, and
    smaller blocks than need be are slower ones. Too much: the model is refused, or, beside the
    largest batch that was asked for, a block has no room to come while another one computes.
    Raises BudgetError if neither fits.
    """
    try:
        return make(options, _roomy_batch)
    except _CrowdedError as error:
        crowded = error
    except BudgetError as error:
        return _within_the_rest(make, options, error)
    finer = _finer(options, crowded.activations_bytes)
    assert finer is not None, "else it is not crowded"
    try:
        return make(finer, _whole_batch)
    except BudgetError:
        return make(options, largest_batch)


def _within_the_rest(
    make: Callable[[Options, Check], Made], options: Options, refused: BudgetError
) -> Made:
    """Made finer than what was refused. Raises the error that asks for less if that is, too."""
    finer = _finer(options, refused.activations_bytes)
    if finer is None:
        raise refused
    try:
        return make(finer, largest_batch)
    except BudgetError as error:
        raise min(refused, error, key=lambda each: each.least_mib) from None


def check_blocks(told: str, source: Source, member: Member, options: Options) -> None:
    """Raises BudgetError if a block is larger than the budget: no smaller pieces would help."""
    budget_mib = options.budget_mib
    largest = max(block.swapped_bytes for block in member.blocks)
    if budget_mib is not None and largest > budget_mib * MIB:
        why = f" ({member.notes[0]})" if member.notes else ""
        least_mib = -(-largest // MIB)
        raise BudgetError(
            f"{told}: its largest block is {least_mib} MiB and nothing cuts it "
            f"smaller{why}; give at least --budget-mib {least_mib}",
            least_mib=least_mib,
            where=str(source.path),
        )


def _roomy_batch(manifest: Manifest, options: Options) -> int:
    """`largest_batch`; raises _CrowdedError where that is all, but its blocks come one by one."""
    rows = largest_batch(manifest, options)
    budget_mib = options.budget_mib
    if budget_mib is None or rows < options.max_batch:
        return rows  # of fewer rows and less room nobody said which
    both_bytes = _floor_of(manifest)(2, rows)
    activations_bytes = manifest.activation_bytes(rows)
    if both_bytes > budget_mib * MIB and _finer(options, activations_bytes) is not None:
        raise _CrowdedError(
            f"{manifest.model}: two blocks do not fit beside a batch of {rows}",
            least_mib=-(-both_bytes // MIB),
            activations_bytes=activations_bytes,
        )
    return rows


def _finer(options: Options, activations_bytes: int) -> Options | None:
    """Options for smaller pieces, as those activations leave room for; None if they are not."""
    finer = replace(options, activations_bytes=activations_bytes)
    return finer if finer.piece_bytes < options.piece_bytes else None


def _whole_batch(manifest: Manifest, options: Options) -> int:
    """The batch that was asked for. Raises BudgetError if it does not run within the budget."""
    rows = largest_batch(manifest, options)
    if rows < options.max_batch:
        least_mib = -(-_floor_of(manifest)(1, options.max_batch) // MIB)
        raise BudgetError(f"{manifest.model}: only {rows} rows fit", least_mib=least_mib)
    return rows


def largest_batch(manifest: Manifest, options: Options) -> int:
    """The largest batch that runs within the budget, as a load sees it. Raises BudgetError if none
    does.
    """
    if options.budget_mib is None:
        return options.max_batch
    floor_bytes = _floor_of(manifest)
    budget_bytes = options.budget_mib * MIB
    sizes = range(1, max(options.max_batch, 1) + 1)  # without batches a run is of one row
    fitting = [rows for rows in sizes if floor_bytes(1, rows) <= budget_bytes]
    if not fitting:
        least_mib = -(-floor_bytes(1, 1) // MIB)
        raise BudgetError(
            f"{manifest.model}: its largest block and its activations need {least_mib} MiB; "
            f"give at least --budget-mib {least_mib}",
            least_mib=least_mib,
            activations_bytes=manifest.activation_bytes(1),
        )
    return min(fitting[-1], options.max_batch)


def _floor_of(manifest: Manifest) -> Callable[[int, int], int]:
    """The least budget for so many of the largest blocks and a batch of so many rows."""
    tables = bool(tables_of(manifest))

    def floor_bytes(blocks: int, rows: int) -> int:
        blocks_bytes = blocks * manifest.largest_block_bytes
        return budget_for(blocks_bytes, manifest.activation_bytes(rows), tables=tables)

    return floor_bytes
