"""Latency within a budget against resident; `bench_blocks.py swap`.

The budget is the weights' bytes by the ratio, and what a batch's activations take beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from scripts.blocks_measure import (
    WARM_UP_RUNS,
    Bench,
    feed_of,
    in_child,
    open_model,
    plain_names,
    plain_session,
)


def print_swap(bench: Bench, arguments: argparse.Namespace) -> None:
    print(
        "| model | weights / budget | batch | activations MiB | cut by "
        "| resident ms | warm | cold | pinned of |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        for ratio in arguments.ratios:
            for batch in arguments.batches:
                print_row(bench, arguments, model, ratio, batch)


def print_row(
    bench: Bench, arguments: argparse.Namespace, model: str, ratio: float, batch: int
) -> None:
    """A row for each way to cut, their runs in turn."""
    budgets = {cuts: bench.budget(model, ratio, batch, cuts) for cuts in arguments.cuts}
    found: dict[str, list[dict[str, Any]]] = {cuts: [] for cuts in budgets}
    for _ in range(arguments.runs):
        for cuts, budget in budgets.items():
            job: dict[str, Any] = {
                "onnx": str(bench.onnx(model)),
                "directory": str(budget.directory),
                "budget_mib": budget.mib,
                "batch": batch,
                "repeats": arguments.repeats,
            }
            found[cuts].append(in_child(bench, do="swap", **job))
    for cuts, results in found.items():
        plain_ms = 1e3 * statistics.median(result["plain"] for result in results)
        warm, cold = (
            ", ".join(f"{result[key] / result['plain']:.2f}" for result in results)
            for key in ("keep", "drop")
        )
        print(
            f"| {model} | {ratio:g} ({budgets[cuts].weights_mib:.0f} MiB) | {batch} "
            f"| {budgets[cuts].activations_mib:.0f} | {cuts} | {plain_ms:.0f} | {warm} | {cold} "
            f"| {results[-1]['pinned']} of {results[-1]['blocks']} |",
            flush=True,
        )


def swap(onnx: str, directory: str, budget_mib: float, batch: int, repeats: int) -> dict[str, Any]:
    """Medians of plain ONNX Runtime and of the budgeted model, warm and cold, in turn.

    Of the budgeted model, a run right after another one: nothing is fetched between them.
    """
    plain = plain_session(Path(onnx))
    times: dict[str, list[float]] = {"plain": [], "keep": [], "drop": []}
    pinned = blocks = 0
    # One budgeted model at a time: they map the same pages, and neither may drop for the other.
    for cache in ("keep", "drop"):
        model = open_model(Path(directory), memory_budget_mib=f"{budget_mib}", page_cache=cache)
        names = [tensor.name for tensor in model.members[0].outputs]
        feed = feed_of(model, batch)
        plain_feed = plain_names(model, feed)
        expected = plain.run(None, plain_feed)
        for _ in range(WARM_UP_RUNS):
            got = model.infer("", feed, names, batch)
        for name, want in zip(names, expected, strict=True):
            np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-3)
        for _ in range(repeats):
            began_s = time.perf_counter()
            plain.run(None, plain_feed)
            times["plain"].append(time.perf_counter() - began_s)
            model.infer("", feed, names, batch)  # while plain ran, the window was filled for it
            began_s = time.perf_counter()
            model.infer("", feed, names, batch)
            times[cache].append(time.perf_counter() - began_s)
        assert model.budget is not None and model.budget.plan is not None
        pinned, blocks = len(model.budget.plan.pinned), len(model.members[0].blocks)
        model.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {**middle, "pinned": pinned, "blocks": blocks}
