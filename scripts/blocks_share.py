"""A second model with the same backbone; `bench_blocks.py share`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort
from scripts.blocks_measure import (
    Bench,
    cached_mib,
    drop_page_cache,
    feed_of,
    in_child,
    open_model,
    plain_names,
    private_mib,
    warm_up,
)

from paceline.blocks.repository import compiled_model


def print_share(bench: Bench, arguments: argparse.Namespace) -> None:
    print("| model | first: ms, MiB read | second: ms, MiB read | plain second ms | private MiB |")
    print("|---|---|---|---|---|")
    for model in arguments.models:
        directories = [bench.compiled(name) for name in (model, f"{model}@1")]
        onnx = str(bench.onnx(f"{model}@1"))
        results = []
        for _ in range(arguments.repeats):
            drop_page_cache(bench.work)
            results.append(
                in_child(
                    bench, do="share", directories=[str(path) for path in directories], onnx=onnx
                )
            )
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(
            f"| {model} | {1e3 * middle['first_s']:.0f}, {middle['first_mib']:.0f} "
            f"| {1e3 * middle['second_s']:.0f}, {middle['second_mib']:.1f} "
            f"| {1e3 * middle['plain_s']:.0f} | {middle['private_mib']:.0f} |",
            flush=True,
        )


def share(directories: Sequence[str], onnx: str) -> dict[str, float]:
    """Two models with one backbone, one after the other, from a cold disk."""
    warm_up()
    before = private_mib()
    result = {}
    models = []
    for label, directory in zip(("first", "second"), directories, strict=True):
        found = compiled_model(Path(directory))
        assert found is not None
        cached = cached_mib(found.pool)
        began_s = time.perf_counter()
        model = open_model(Path(directory))
        assert model.loader.wait_complete(60)
        model.infer("", feed_of(model, 1), [model.members[0].outputs[0].name], 1)
        result[f"{label}_s"] = time.perf_counter() - began_s
        result[f"{label}_mib"] = cached_mib(found.pool) - cached
        models.append(model)
    result["private_mib"] = private_mib() - before
    began_s = time.perf_counter()
    session = ort.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    session.run(None, plain_names(models[1], feed_of(models[1], 1)))
    result["plain_s"] = time.perf_counter() - began_s
    for model in models:
        model.close()
    return result
