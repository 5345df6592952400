"""Ten models with one backbone, which differ in their heads; `bench_blocks.py share`.

In one process, and through Paceline: there each has a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from scripts.bench_residency import until_cold
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
from scripts.blocks_served import Way, serving, stubs, write_blocks, write_plain

from paceline.blocks.backend.settings import MIB
from paceline.blocks.repository import compiled_model

MODELS = 10
_KEEP_ALIVE_S = 40.0
"""Longer than it takes to ask all of them once."""


def print_share(bench: Bench, arguments: argparse.Namespace) -> None:
    if "process" in arguments.at:
        print_in_process(bench, arguments)
    if "paceline" in arguments.at:
        print_through_paceline(bench, arguments)


def print_through_paceline(bench: Bench, arguments: argparse.Namespace) -> None:
    """Each model a chain of its own, asked one after the other, all cold before."""
    print(
        "| model through Paceline | way | first: cold ms, MiB read | second | third to tenth, each "
        "| PSS MiB of all ten |\n|---|---|---|---|---|---|"
    )
    for model in arguments.models:
        names = _family(model)
        # Apart: a model of a repository that is in no chain is always in memory.
        home = bench.work / "served" / f"{model}-shared"
        models = [name.replace("@", "_") for name in names]
        for name, own in zip(names, models, strict=True):
            compiled = home / "blocks" / own
            write_blocks(bench, {"": name}, compiled, None)
            write_plain(home / "plain" / own, compiled, bench.onnx(name))
        for kind in ("plain", "blocks"):
            ways = [Way(own, [own]) for own in models]
            results = _asked_in_turn(bench, home / kind, ways, arguments.repeats)
            pss_mib = statistics.median(result["pss_mib"] for result in results)
            print(f"| {model} | {kind} | {_cells(results)} | {pss_mib:.0f} |", flush=True)


def _asked_in_turn(
    bench: Bench, repository: Path, ways: Sequence[Way], repeats: int
) -> list[dict[str, Any]]:
    results = []
    read = (bench.work / "blocks" / "objects", bench.work / "onnx")
    with serving(bench, repository, ways, keep_alive_s=_KEEP_ALIVE_S) as (channel, asks):
        for _ in range(repeats):
            until_cold(channel)
            drop_page_cache(bench.work)
            took_s, read_mib = [], []
            for ask in asks:
                cached = cached_mib(*read)
                began_s = time.perf_counter()
                ask()
                took_s.append(time.perf_counter() - began_s)
                read_mib.append(cached_mib(*read) - cached)
            models = [name for way in ways for name in way.models]
            pss = [stub.memory_full_info().pss for stub in stubs(models)]
            assert len(pss) == MODELS, f"{len(pss)} of {MODELS} models are still there"
            results.append({"took_s": took_s, "read_mib": read_mib, "pss_mib": sum(pss) / MIB})
    return results


def print_in_process(bench: Bench, arguments: argparse.Namespace) -> None:
    print(
        "| model | first: ms, MiB read | second | third to tenth, each | plain, each "
        "| private MiB of all ten | plain, each |\n|---|---|---|---|---|---|---|"
    )
    for model in arguments.models:
        names = _family(model)
        directories = [str(bench.compiled(name)) for name in names]
        results: list[dict[str, Any]] = []
        for _ in range(arguments.repeats):
            drop_page_cache(bench.work)
            onnx = str(bench.onnx(names[1]))
            results.append(in_child(bench, do="share", directories=directories, onnx=onnx))
        plain_ms = 1e3 * statistics.median(result["plain_s"] for result in results)
        private, plain = (
            statistics.median(result[key] for result in results)
            for key in ("private_mib", "plain_mib")
        )
        print(
            f"| {model} | {_cells(results)} | {plain_ms:.0f} | {private:.0f} | {plain:.0f} |",
            flush=True,
        )


def _family(model: str) -> list[str]:
    """Models that differ from it in their heads, itself the first."""
    return [model, *(f"{model}@{head}" for head in range(1, MODELS))]


def _cells(results: Sequence[Mapping[str, Any]]) -> str:
    """Of the first model, the second, and each of the others."""
    return " | ".join(_middle(results, *part) for part in ((0, 1), (1, 2), (2, MODELS)))


def _middle(results: Sequence[Mapping[str, Any]], first: int, end: int) -> str:
    """Milliseconds and MiB read of a model: medians over these models and all repeats."""
    took_s, read_mib = (
        statistics.median(value for result in results for value in result[key][first:end])
        for key in ("took_s", "read_mib")
    )
    return f"{1e3 * took_s:.0f}, {read_mib:.1f}"


def share(directories: Sequence[str], onnx: str) -> dict[str, Any]:
    """Models with one backbone, one after the other, from a cold disk, each with a run."""
    warm_up()
    before = private_mib()
    took_s, read_mib, models = [], [], []
    for directory in map(Path, directories):
        found = compiled_model(directory)
        assert found is not None
        cached = cached_mib(found.pool / "objects")
        began_s = time.perf_counter()
        model = open_model(directory)
        assert model.loader.wait_complete(60)
        model.infer("", feed_of(model, 1), [model.members[0].outputs[0].name], 1)
        took_s.append(time.perf_counter() - began_s)
        read_mib.append(cached_mib(found.pool / "objects") - cached)
        models.append(model)
    shared = private_mib()
    began_s = time.perf_counter()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(onnx, options, ["CPUExecutionProvider"])
    session.run(None, plain_names(models[1], feed_of(models[1], 1)))
    plain_s = time.perf_counter() - began_s
    plain_mib = private_mib() - shared
    for model in models:
        model.close()
    return {
        "took_s": took_s,
        "read_mib": read_mib,
        "private_mib": shared - before,
        "plain_s": plain_s,
        "plain_mib": plain_mib,
    }
