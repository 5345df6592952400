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


def within_budget(make: Callable[[Options], Made], options: Options) -> Made:
    """Made of pieces of half the budget; if that is refused, of half of what activations leave.

    Not of those at once: activations are known only when a model has run in its blocks, and
    smaller blocks than need be are slower ones. Raises BudgetError if neither fits.
    """
    try:
        return make(options)
    except BudgetError as error:
        refused = error
    finer = replace(options, activations_bytes=refused.activations_bytes)
    if finer.piece_bytes >= options.piece_bytes:
        raise refused
    try:
        return make(finer)
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


def largest_batch(manifest: Manifest, options: Options) -> int:
    """The largest batch that runs within the budget, as a load sees it. Raises BudgetError if none
    does.
    """
    if options.budget_mib is None:
        return options.max_batch
    tables = bool(tables_of(manifest))

    def floor(rows: int) -> int:
        activations_bytes = manifest.activation_bytes(rows)
        return budget_for(manifest.largest_block_bytes, activations_bytes, tables=tables)

    fitting = [
        rows for rows in range(1, options.max_batch + 1) if floor(rows) <= options.budget_mib * MIB
    ]
    if not fitting:
        least_mib = -(-floor(1) // MIB)
        raise BudgetError(
            f"{manifest.model}: its largest block and its activations need {least_mib} MiB; "
            f"give at least --budget-mib {least_mib}",
            least_mib=least_mib,
            activations_bytes=manifest.activation_bytes(1),
        )
    return fitting[-1]
