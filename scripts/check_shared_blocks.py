#!/usr/bin/env python3
"""Holds what the backend answers under load against the whole compiled models, bit for bit.

    .venv/bin/python scripts/check_shared_blocks.py                      # all
    .venv/bin/python scripts/check_shared_blocks.py resnet50 densenet121 # some of them

The models of check_blocks.py, cut as there (weights / 2.32, / 3.5, / 5.81; by latency with
--measure), run by threes in the backend's own `BlockModel`: without a budget, and sharing one of
the sum of theirs. Two threads ask each, from the moment that it begins to load, with batches of 1,
2 and 3; then the load shifts from one model to the next, so that the budget is divided anew. Every
answer is compared. Exits 1 if bits differ, or if a shared budget was never divided anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.blocks_measure import open_model
from scripts.check_blocks import FACTORS, TOO_LARGE, options_of, plain, source_of
from scripts.make_models import ZOO
from scripts.prepare_models import NETWORKS

from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import Member
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.compile import compile_model
from paceline.blocks.measure import BlockRunner, Draw, guess_axes, same, sample
from paceline.core.errors import BudgetError

TOGETHER = 3
BATCHES = (1, 2, 3)
THREADS = 2
"""That ask one model at the same time."""
ASKED = 3
"""Requests of a thread, in each phase; THREADS x as many where its model is the busy one."""


@dataclass
class Checked:
    """A model, what its whole graph gives, and what came of the backend's answers."""

    name: str
    directory: Path
    budget_mib: int | None
    member: Member
    feeds: Sequence[Mapping[str, Any]]
    expected: Sequence[Mapping[str, Any]]
    model: BlockModel | None = None
    asked: int = 0
    wrong: int = 0
    budgets: set[int] = field(default_factory=set)


def prepared(name: str, factor: float, cache: Path, measured: bool) -> Checked | None:
    """None, and a line, where there is no such model or the budget is refused."""
    source = source_of(name, cache)
    if source is None:
        print(f"left out: {name}: its wheel is not installed", flush=True)
        return None
    options = options_of(source, factor, cache, measured)
    directory = cache / "shared" / f"{source.stem}-{factor:g}"
    try:
        found = compile_model({"": source}, directory, cache / "blocks", options).model
    except BudgetError as error:
        print(f"left out: {error}", flush=True)
        return None
    (member,) = found.manifest.members
    guess = guess_axes(partial(plain, source, member), member, {}) or 1
    batches = BATCHES if member.batching else BATCHES[:1]
    feeds = [sample(member, rows, guess, {}, Draw(rows)) for rows in batches]
    runner = BlockRunner(ObjectStore(found.pool), found.manifest.objects)
    expected = [runner.run(member, feed, whole=True, drop=True) for feed in feeds]
    return Checked(source.stem, directory, options.budget_mib, member, feeds, expected)


def ask(one: Checked, times: int) -> None:
    assert one.model is not None
    outputs = [tensor.name for tensor in one.member.outputs]
    for number in range(times):
        turn = number % len(one.feeds)
        rows = BATCHES[turn] if one.member.batching else 1
        got = one.model.infer("", one.feeds[turn], outputs, rows)
        one.asked += 1
        one.wrong += not same(got, one.expected[turn])
        if one.model.budget is not None:
            one.budgets.add(one.model.budget.bytes)


def check(group: Sequence[Checked], factor: float) -> bool:
    """Whether no bit differs and, where a budget is shared, it was divided anew."""
    shared = sum(one.budget_mib or 0 for one in group)
    began_s = time.perf_counter()
    with ExitStack() as stack, ThreadPoolExecutor(THREADS * len(group)) as pool:
        os.environ["PACELINE_BLOCKS_LEDGER"] = stack.enter_context(tempfile.TemporaryDirectory())
        limits = {"shared_budget_mib": str(shared), "budget_group": "check"} if factor else {}
        for one in group:
            one.model = open_model(one.directory, **limits)
            stack.callback(one.model.close)
        for busy in group:
            asking = [
                pool.submit(ask, one, ASKED * (THREADS if one is busy else 1))
                for one in group
                for _ in range(THREADS)
            ]
            for done in asking:
                done.result()
    wrong = sum(one.wrong for one in group)
    divided = not factor or len(group) < 2 or any(len(one.budgets) > 1 for one in group)
    print(
        f"{', '.join(one.name for one in group):44}{f'{shared} MiB' if factor else 'none':>10}"
        f"{max(len(one.budgets) for one in group) if factor else '-':>9}"
        f"{sum(one.asked for one in group):>9}{wrong:>7}{time.perf_counter() - began_s:>7.0f}",
        flush=True,
    )
    return not wrong and divided


def main() -> int:
    # Of a tiny model's share its largest block takes all: there is nothing to divide.
    known = [*(name for name in ZOO if name not in {*TOO_LARGE, "tiny"}), *NETWORKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paceline")
    parser.add_argument("--measure", action="store_true", help="cut by latency")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.models} - {*known}):
        parser.error(f"no model {unknown[0]!r}: use {', '.join(known)}")
    print(f"{'models':44}{'budget':>10}{'budgets':>9}{'answers':>9}{'wrong':>7}{'s':>7}")
    good = []
    for factor in FACTORS:
        names = arguments.models or known
        waiting: list[Checked] = []
        for name in names:
            made = prepared(name, factor, arguments.cache, arguments.measure)
            waiting += [] if made is None else [made]
            if len(waiting) == TOGETHER or (waiting and name == names[-1]):
                good.append(check(waiting, factor))
                waiting = []
    print(f"{good.count(True)} of {len(good)} groups hold")
    return 1 if False in good else 0


if __name__ == "__main__":
    sys.exit(main())
