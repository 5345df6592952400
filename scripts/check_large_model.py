#!/usr/bin/env python3
"""Compiles a model larger than an ONNX file can be, runs it within a budget, and checks it.

    .venv/bin/python scripts/check_large_model.py --work DIR    # some minutes, 8 GiB of disk
    .venv/bin/python scripts/check_large_model.py --work DIR --model matrix_2gb --most-mib 2560

The model is `mlp_2gb` of make_models.py: nine layers, each a matrix of 256 MiB, in external data;
or `matrix_2gb`, one layer whose matrix alone is larger than 2 GiB: to compile takes as much memory
as the largest tensor, which ONNX Runtime holds whole when it writes its optimised graph.
`paceline blocks compile` is a process of its own, and so is the backend's model that runs its
blocks within 1/5.81 of the weights; of both the kernel tells the most memory they ever had resident
(VmHWM: pages of mapped files counted). What they compute is held against NumPy, which computes one
layer after the other from the source's file. Exits 1 if that differs by more than 1e-4 of the
largest value, if a batch's bits differ from run to run, or if a process took more than
--most-mib, a quarter of the weights. DIR/models keeps the model; the rest is removed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.make_models import make

MODELS = ("mlp_2gb", "matrix_2gb")
RATIO = 5.81  # weights to budget
BATCHES = (1, 3)
RUNS = 4  # the first ones measure, after which the plan is another
MOST = 1e-4
MIB = 1 << 20

# Each prints the most memory it had resident, in KiB, last.
_PEAK = """
def peak_kib():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
"""
_COMPILE = """
import sys
from paceline import cli
try:
    cli.main()
finally:
    print(peak_kib())
"""
_RUN = """
import sys
from pathlib import Path
import numpy as np
from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.settings import read_settings
from paceline.blocks.repository import compiled_model
directory, budget_mib, feeds, answers, runs = sys.argv[1:]
found = compiled_model(Path(directory))
texts = {"manifest": found.digest, "pool": str(found.pool), "memory_budget_mib": budget_mib}
given = {key: {"string_value": text} for key, text in texts.items()}
model = BlockModel.open(read_settings(given, Path(directory))).start()
(member,) = found.manifest.members
names = [tensor.name for tensor in member.outputs]
before = peak_kib()
for name, x in np.load(feeds).items():
    of_runs = [model.infer("", {"x": x}, names, len(x))[names[0]].copy() for _ in range(int(runs))]
    np.save(Path(answers) / f"{name}.npy", np.stack(of_runs))
model.close()
print(before, peak_kib())
"""


def in_process(code: str, *arguments: object) -> list[int]:
    """The numbers of its last line, in KiB. Raises SystemExit if it fails."""
    command = [sys.executable, "-c", _PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}: {done.stderr.strip()[-2000:]}")
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


def by_layers(source: Path, x: Any) -> Any:
    """The output by NumPy, one weight in memory at a time."""
    graph = onnx.load(source, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    values: dict[str, Any] = {graph.input[0].name: x}
    for node in graph.node:
        operands = [
            _weight(source, weights[name]) if name in weights else values[name]
            for name in node.input
        ]
        if node.op_type == "MatMul":
            result = operands[0] @ operands[1]
        elif node.op_type == "Add":
            result = operands[0] + operands[1]
        else:
            assert node.op_type == "Relu", f"make_models.py made a {node.op_type}"
            result = np.maximum(operands[0], 0)
        values = {node.output[0]: result}
    return values[graph.output[0].name]


def _weight(source: Path, tensor: onnx.TensorProto) -> Any:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = source.parent / place["location"], int(place["offset"])
    return np.memmap(path, np.float32, "r", offset, tuple(tensor.dims))


def checked(source: Path, work: Path, most_mib: int) -> bool:
    """Prints what was found; whether all of it holds."""
    model = source.stem
    size_mib = source.with_suffix(".bin").stat().st_size / MIB
    budget_mib = int(size_mib / RATIO)
    repository, pool = work / "repository", work / "blocks"
    (compiler_kib,) = in_process(
        _COMPILE, "blocks", "compile", f"{model}={source}", "--budget-mib", budget_mib,
        "--out", repository, "--pool", pool,
    )  # fmt: skip
    (config,) = (repository / model).glob("config.pbtxt")
    (manifest,) = (pool / "manifests").iterdir()
    document = json.loads(manifest.read_text(encoding="utf-8"))
    blocks = document["members"][0]["blocks"]
    random = np.random.default_rng(0)
    width = document["members"][0]["inputs"][0]["shape"][1]
    feeds = {f"batch{n}": random.standard_normal((n, width), dtype=np.float32) for n in BATCHES}
    np.savez(work / "feeds.npz", **feeds)
    before_kib, run_kib = in_process(
        _RUN, config.parent, budget_mib, work / "feeds.npz", work, RUNS
    )
    worst, exact = 0.0, True
    for name, x in feeds.items():
        runs, wanted = np.load(work / f"{name}.npy"), by_layers(source, x)
        exact = exact and all(np.array_equal(run, runs[0]) for run in runs)
        worst = max(worst, float(np.abs(runs[0] - wanted).max() / np.abs(wanted).max()))
    compiler_mib, before_mib, run_mib = (kib / 1024 for kib in (compiler_kib, before_kib, run_kib))
    largest_mib = document["largest_block_bytes"] / MIB
    for what, found in (
        ("weights, external data", f"{size_mib:.0f} MiB"),
        ("compile, most resident", f"{compiler_mib:.0f} MiB"),
        ("blocks", f"{len(blocks)}, the largest {largest_mib:.1f} MiB"),
        ("budget", f"{budget_mib} MiB"),
        ("run, most resident", f"{run_mib:.0f} MiB, {before_mib:.0f} when it was loaded"),
        (f"bits of {RUNS} runs", "the same" if exact else "DIFFERENT"),
        ("to NumPy", f"{worst:.1e} at batches of {' and '.join(map(str, BATCHES))}"),
    ):
        print(f"{what:24}{found}")
    return exact and worst <= MOST and max(compiler_mib, run_mib) <= most_mib


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "paceline")
    parser.add_argument("--most-mib", type=int, default=576)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    arguments = parser.parse_args()
    source = make(arguments.model, arguments.work / "models")
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        return 0 if checked(source, Path(work), arguments.most_mib) else 1


if __name__ == "__main__":
    sys.exit(main())
