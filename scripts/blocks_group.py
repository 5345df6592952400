"""A group of models as one, on a real Triton; `bench_blocks.py fuse`. `ocr` is the example's."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path

import numpy as np
import psutil
from scripts.blocks_cgroup import SLACK_MIB, cgroup, limit_hits, most_mib
from scripts.blocks_measure import (
    WARM_UP_RUNS,
    Bench,
    drop_page_cache,
    filled,
    in_child,
    item_of,
    open_model,
)
from scripts.blocks_served import print_group, write_plain

from paceline.blocks.backend.settings import MIB
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

ROUNDS = 5
"""Of one request to each model, all at once."""


def print_fuse(bench: Bench, arguments: argparse.Namespace) -> None:
    """Models of one group: as plain ONNX models, as blocks, and fused."""
    models = arguments.models
    if models == ["ocr"]:
        from scripts.blocks_chain import print_ocr

        print_ocr(bench.work, arguments.repeats, arguments.at)
        return
    if "process" in arguments.at:
        print_in_process(bench, models, arguments)
    if "triton" in arguments.at:
        print_on_triton(bench, models, arguments.repeats, arguments.ratios)
    if "paceline" in arguments.at:
        print_group(bench, models, arguments.repeats)


def within(bench: Bench, models: Sequence[str], ratio: float) -> tuple[Path, int]:
    """The fused group compiled for a budget in MiB: its weights / ratio, and the activations of two
    members.
    """
    directory, pool = bench.work / "fuse", bench.work / "fuse" / "blocks"
    sources = {f"m_{model}": bench.onnx(model) for model in models}
    whole = compile_model(sources, directory / "measured", pool, Options()).model.manifest
    budget_mib = ceil((whole.weights_bytes / ratio + 2 * whole.activation_bytes(1)) / MIB)
    made = directory / "models" / f"group_{budget_mib}"
    compile_model(sources, made, pool, Options(budget_mib=budget_mib))
    return made, budget_mib


def print_in_process(bench: Bench, models: Sequence[str], arguments: argparse.Namespace) -> None:
    """A row a budget: in a cgroup of the budget, what a process takes beside it and no more."""
    print(
        "| weights / budget | limit MiB | most MiB | limit hits "
        "| members one after the other ms | at the same time ms |"
    )
    print("|---|---|---|---|---|---|")
    for ratio in arguments.ratios:
        directory, budget_mib = within(bench, models, ratio)
        parameters = {"memory_budget_mib": str(budget_mib)}
        drop_page_cache(bench.work)
        with cgroup() as group:
            idle = in_child(
                bench, group, do="idle", directory=str(directory), parameters=parameters
            )
            beside_mib = most_mib(group) - idle["held_mib"]
        limit_mib = ceil(budget_mib + beside_mib + SLACK_MIB)
        took: list[dict[str, float]] = []
        most: list[float] = []
        hits: list[int] = []
        for _ in range(arguments.runs):
            drop_page_cache(bench.work)
            with cgroup(limit_mib) as group:
                job = {"directory": str(directory), "parameters": parameters}
                took.append(in_child(bench, group, do="fused", **job, repeats=arguments.repeats))
                most.append(most_mib(group))
                hits.append(limit_hits(group))
        in_turn_ms, at_once_ms = (
            1e3 * statistics.median(one[key] for one in took) for key in ("in_turn_s", "at_once_s")
        )
        print(
            f"| {ratio:g} ({budget_mib} MiB) | {limit_mib} | {max(most):.0f} "
            f"| {', '.join(map(str, hits))} | {in_turn_ms:.0f} | {at_once_ms:.0f} |",
            flush=True,
        )


def fused(directory: str, parameters: dict[str, str], repeats: int) -> dict[str, float]:
    """Medians of a run of each member, one after the other and all at once, in turn."""
    model = open_model(Path(directory), **parameters)
    members = model.members
    feeds = {
        member.name: {
            tensor.name: filled(tensor.name, tensor.dtype, item_of(model.manifest, 1, tensor))
            for tensor in member.inputs
        }
        for member in members
    }

    def run(number: int) -> None:
        member = members[number]
        outputs = [tensor.name for tensor in member.outputs]
        model.infer(member.name, feeds[member.name], outputs, 1)

    took_s: dict[str, list[float]] = {"in_turn_s": [], "at_once_s": []}
    with ThreadPoolExecutor(len(members)) as threads, ThreadPoolExecutor(1) as one:
        for _ in range(WARM_UP_RUNS + repeats):
            for key, pool in (("in_turn_s", one), ("at_once_s", threads)):
                began_s = time.perf_counter()
                list(pool.map(run, range(len(members))))
                took_s[key].append(time.perf_counter() - began_s)
    model.close()
    return {key: statistics.median(all_s[WARM_UP_RUNS:]) for key, all_s in took_s.items()}


def print_on_triton(
    bench: Bench, models: Sequence[str], repeats: int, ratios: Sequence[float]
) -> None:
    """`ratios`: the fused group within budgets as well; see `within`."""
    repository = bench.work / "fuse" / "models"
    options = Options(measure=False)
    pool = bench.work / "fuse" / "blocks"
    for model in models:
        compile_model({"": bench.onnx(model)}, repository / model, pool, options)
        write_plain(repository / f"plain_{model}", repository / model, bench.onnx(model))
    sources = {f"m_{model}": bench.onnx(model) for model in models}
    compile_model(sources, repository / "group", pool, options)
    ways = {
        "plain, one each": [f"plain_{model}" for model in models],
        "blocks, one each": list(models),
        "blocks, fused": ["group"],
    }
    for ratio in ratios:
        directory, budget_mib = within(bench, models, ratio)
        ways[f"blocks, fused, budget {budget_mib} MiB ({ratio:g})"] = [directory.name]
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, names in ways.items():
            drop_page_cache(bench.work)
            results[way].append(asyncio.run(group_on_triton(bench.work, repository, names)))
    print(
        "| group | loaded and answered ms | PSS MiB | private MiB "
        "| one request each ms | the first time |"
    )
    print("|---|---|---|---|---|---|")
    for way, measured in results.items():
        middle = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        print(
            f"| {way} | {1e3 * middle['ready_s']:.0f} | {middle['pss_mib']:.0f} "
            f"| {middle['private_mib']:.0f} | {1e3 * middle['all_s']:.0f} "
            f"| {1e3 * middle['first_s']:.0f} |"
        )


async def group_on_triton(work: Path, repository: Path, names: Sequence[str]) -> dict[str, float]:
    """Loads them all at once, asks each once, then all again until that takes what it always does.

    The first time that all members of a process compute together their arena grows.
    """
    settings = LocalTritonSettings(
        state_directory=work / "triton", model_repositories=(repository,), stop_timeout_s=0.5
    )
    async with LocalTriton(settings) as triton:
        client = await TritonClient.connect(triton.url, name="bench")
        models = TritonRepository(client, (repository,))

        async def ask(name: str) -> None:
            declared = models.declaration(name)
            inputs = []
            for tensor in declared.inputs:
                array = filled(tensor.name, tensor.datatype, [1, *tensor.shape])
                data = array.astype(np.float32).tobytes()
                inputs.append(BatchTensor(tensor.name, "FP32", array.shape, (data,)))
            outputs = tuple(tensor.name for tensor in declared.outputs)
            await client.execute(ModelCall(name, tuple(inputs), outputs), timeout_s=60)

        async def serve(name: str) -> None:
            await models.load(name, instances=1)
            await ask(name)

        began_s = time.perf_counter()
        await asyncio.gather(*map(serve, names))
        ready_s = time.perf_counter() - began_s
        rounds_s = []
        for _ in range(WARM_UP_RUNS + ROUNDS):
            again_s = time.perf_counter()
            await asyncio.gather(*map(ask, names))
            rounds_s.append(time.perf_counter() - again_s)
        stubs = psutil.Process(triton.pid).children(recursive=True)
        memory = [stub.memory_full_info() for stub in stubs]
        await client.close()
    return {
        "ready_s": ready_s,
        "first_s": rounds_s[0],
        "all_s": statistics.median(rounds_s[WARM_UP_RUNS:]),
        "pss_mib": sum(one.pss for one in memory) / MIB,
        "private_mib": sum(one.uss for one in memory) / MIB,
    }
