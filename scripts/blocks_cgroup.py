"""The budget under a memory cgroup, which counts the page cache; `bench_blocks.py cgroup`.

Cgroups of version 1: those of version 2 have no controllers where this was written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
from scripts.blocks_measure import (
    RATIOS,
    WARM_UP_RUNS,
    Bench,
    drop_page_cache,
    feed_of,
    filled,
    in_child,
    open_model,
)

from paceline.blocks.backend.settings import MIB


def print_cgroup(bench: Bench, arguments: argparse.Namespace) -> None:
    print("| model | limit MiB | how | median ms | most memory MiB | limit hits |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        budget_mib = bench.weights_bytes(model) / MIB / max(RATIOS)
        directory = bench.compiled(model, int(budget_mib))
        for how, extra in (
            ("plain", {}),
            ("blocks, paged by the kernel", {}),
            (f"blocks, budget {budget_mib:.0f} MiB", {"memory_budget_mib": f"{budget_mib}"}),
        ):
            drop_page_cache(bench.work)
            with cgroup(arguments.limit_mib) as group:
                result = in_child(
                    bench,
                    group,
                    do="limited",
                    onnx=str(bench.onnx(model)) if how == "plain" else "",
                    directory=str(directory),
                    parameters=extra,
                    repeats=arguments.repeats,
                )
                peak = int((group / "memory.max_usage_in_bytes").read_text()) / MIB
                hits = int((group / "memory.failcnt").read_text())
            took = f"{1e3 * result['median_s']:.0f}" if "median_s" in result else "killed"
            print(
                f"| {model} | {arguments.limit_mib} | {how} | {took} | {peak:.0f} | {hits} |",
                flush=True,
            )


def limited(
    onnx: str, directory: str, parameters: dict[str, str], repeats: int
) -> dict[str, float]:
    """Median of a run in a process whose memory is limited."""
    if onnx:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(onnx, options, ["CPUExecutionProvider"])
        feed = {
            node.name: filled(node.name, node.type, [1, *node.shape[1:]])
            for node in session.get_inputs()
        }
        run: Callable[[], Any] = partial(session.run, None, feed)
        model = None
    else:
        model = open_model(Path(directory), **parameters)
        names = [tensor.name for tensor in model.members[0].outputs]
        run = partial(model.infer, "", feed_of(model, 1), names, 1)
    times = []
    for number in range(WARM_UP_RUNS + repeats):
        began_s = time.perf_counter()
        run()
        if number >= WARM_UP_RUNS:
            times.append(time.perf_counter() - began_s)
    if model is not None:
        model.close()
    return {"median_s": statistics.median(times)}


@contextmanager
def cgroup(limit_mib: int) -> Iterator[Path]:
    """A child of this process's memory cgroup, removed in the end."""
    own = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    (place,) = (line.split(":")[2] for line in own if line.split(":")[1] == "memory")
    group = Path(f"/sys/fs/cgroup/memory{place}", f"blocks-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_mib * MIB))
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()
