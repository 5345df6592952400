#!/usr/bin/env python3
"""Compiles models into blocks and holds what they compute against plain ONNX Runtime.

    .venv/bin/python scripts/check_blocks.py                      # all; about ten minutes
    .venv/bin/python scripts/check_blocks.py resnet50 ocr_detect  # some of them
    .venv/bin/python scripts/check_blocks.py a/model.onnx         # any other

Per model and budget (none; weights / 2.32, / 3.5, / 5.81): blocks in turn against the whole
compiled graph, bit for bit, at batch 1 and 3; and both against the source in a plain session, as
the largest difference relative to the largest value. Exits 1 if bits differ or that is above 1e-4;
a budget that a model cannot be cut for is refused, and said so.
Models are those of make_models.py and the OCR example's; they and the pool are kept in --cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.make_models import ZOO, make
from scripts.prepare_models import NETWORKS

from paceline.blocks.backend.manifest import Member
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.compile import compile_model
from paceline.blocks.measure import BlockRunner, Draw, guess_axes, same, sample
from paceline.blocks.member import Options
from paceline.core.errors import BudgetError, ConfigError

FACTORS = (0.0, 2.32, 3.5, 5.81)
BATCHES = (1, 3)
MOST = 1e-4
MIB = 1 << 20
TOO_LARGE = ("mlp_2gb",)  # a plain session of it needs 2.3 GiB more


def source_of(name: str, cache: Path) -> Path:
    """The model's file; made, or from the wheel that has it."""
    if name.endswith(".onnx"):
        return Path(name)
    if name not in NETWORKS:
        return make(name, cache / "models")
    wheel = importlib.util.find_spec("rapidocr_onnxruntime")
    if wheel is None or wheel.origin is None:
        raise SystemExit("rapidocr-onnxruntime is not installed: run scripts/setup")
    return Path(wheel.origin).parent / "models" / NETWORKS[name]


def plain(source: Path, member: Member, feed: Mapping[str, Any]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [tensor.value for tensor in member.outputs]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest, relative to the largest value of the output."""
    return max(
        float(np.abs(one[name] - array).max() / max(np.abs(array).max(), 1e-30))
        for name, array in other.items()
    )


def check(name: str, factor: float, cache: Path) -> bool | None:
    """Whether it holds; None if the budget is refused."""
    source = source_of(name, cache)
    external = source.with_suffix(".bin")
    size = (external if external.is_file() else source).stat().st_size
    budget_mib = max(1, int(size / factor / MIB)) if factor else None
    label = Path(name).stem
    told = f"{label:14}{f'{budget_mib} MiB' if budget_mib else 'none':>10}"
    try:
        options = Options(budget_mib=budget_mib, measure=False)
        directory = cache / "repository" / label
        model = compile_model({"": source}, directory, cache / "blocks", options).model
    except ConfigError as error:
        print(f"{told}  refused: {error}", flush=True)
        return None if isinstance(error, BudgetError) else False
    (member,) = model.manifest.members
    runner = BlockRunner(ObjectStore(model.pool), model.manifest.objects)
    guess = guess_axes(partial(plain, source, member), member, {})
    if guess is None:
        print(f"{told}  cannot be run: unknown shapes")
        return False
    worst, exact = 0.0, True
    for batch in BATCHES if member.batching else BATCHES[:1]:
        feed = sample(member, batch, guess, {}, Draw(batch))
        blocks, whole = (runner.run(member, feed, whole=w, drop=True) for w in (False, True))
        exact = exact and same(blocks, whole)
        worst = max(worst, difference(blocks, plain(source, member, feed)))
    largest = model.manifest.largest_block_bytes / MIB
    print(
        f"{told}{len(member.blocks):>8}{largest:>13.1f}"
        f"{'yes' if exact else 'NO':>8}{worst:>10.1e}  {'; '.join(member.notes)}",
        flush=True,
    )
    return exact and worst <= MOST


def main() -> int:
    known = [*(name for name in ZOO if name not in TOO_LARGE), *NETWORKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paceline")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in known and not (name.endswith(".onnx") and Path(name).is_file()):
            parser.error(f"no model {name!r}: use a file or {', '.join(known)}")
    print("model             budget  blocks  largest MiB   exact  to plain")
    good = [
        check(name, factor, arguments.cache)
        for name in arguments.models or known
        for factor in FACTORS
    ]
    refused = good.count(None)
    print(f"{good.count(True)} of {len(good)} hold, {refused} are refused for too small a budget")
    return 1 if False in good else 0


if __name__ == "__main__":
    sys.exit(main())
