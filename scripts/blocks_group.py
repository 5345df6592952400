"""A group of models as one, on a real Triton; `bench_blocks.py fuse`. `ocr` is the example's."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import psutil
from scripts.blocks_measure import WARM_UP_RUNS, Bench, drop_page_cache, filled
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
    if "triton" in arguments.at:
        print_on_triton(bench, models, arguments.repeats, arguments.ratios)
    if "paceline" in arguments.at:
        print_group(bench, models, arguments.repeats)


def print_on_triton(
    bench: Bench, models: Sequence[str], repeats: int, ratios: Sequence[float]
) -> None:
    """`ratios`: the fused group within budgets as well, its weights / ratio and two members'
    activations.
    """
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
        made = compile_model(sources, bench.work / "fuse" / "measured", pool, Options())
        whole = made.model.manifest
        budget_mib = ceil((whole.weights_bytes / ratio + 2 * whole.activation_bytes(1)) / MIB)
        name = f"group_{budget_mib}"
        compile_model(sources, repository / name, pool, Options(budget_mib=budget_mib))
        ways[f"blocks, fused, budget {budget_mib} MiB ({ratio:g})"] = [name]
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
