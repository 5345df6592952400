#!/usr/bin/env python3
"""Models as blocks against plain ONNX Runtime: swapping, cold starts, sharing.

    .venv/bin/python scripts/bench_blocks.py --work DIR swap vit_b16 bert_base
    .venv/bin/python scripts/bench_blocks.py --work DIR cold resnet50 --link-mbps 0 1000 200
    .venv/bin/python scripts/bench_blocks.py --work DIR share vit_b16
    .venv/bin/python scripts/bench_blocks.py --work DIR cgroup vit_b16 --limit-mib 170
    .venv/bin/python scripts/bench_blocks.py --work DIR fuse resnet50 squeezenet densenet121
    .venv/bin/python scripts/bench_blocks.py --work DIR fuse ocr    # the example's chain

Models are made by scripts/make_models.py and compiled into DIR on first use (some GB of disk). Each
prints a table for docs/benchmarks/blocks.md. Everything in one row ran interleaved in one process
(`swap`) or in a fresh process each (`cold`, `share`); figures are medians. Cold means that the
page cache holds nothing of the model: it is dropped before, and with a budget after every use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from google.protobuf import text_format

from paceline.blocks.backend.blockmodel import BlockModel
from paceline.blocks.backend.manifest import Block, ObjectStore
from paceline.blocks.backend.settings import MIB, read_settings
from paceline.blocks.backend.skeleton import DTYPES
from paceline.blocks.backend.store import HttpStore
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.repository import compiled_model, read_config
from paceline.core.ports import ModelCall
from paceline.core.tensor import BatchTensor
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

SCRIPTS = Path(__file__).parent
RATIOS = (2.32, 3.5, 5.81)
COLD_METHODS = ("plain", "in-order", "in-order compiled", "blocks")
_WARM_UP_RUNS = 4
"""Until the plan rests on what was measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="models and pools; kept")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("swap", "latency within a budget against resident"),
        ("cold", "time to first output"),
        ("share", "a second model with the same backbone"),
        ("fuse", "a group of models as one, on a real Triton"),
        ("cgroup", "the budget under a memory cgroup, which counts the page cache (version 1)"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("models", nargs="+")
        command.add_argument("--repeats", type=int, default=5)
        if name == "swap":
            command.add_argument("--batches", type=int, nargs="+", default=[1, 8])
            command.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
        if name == "cold":
            command.add_argument(
                "--link-mbps", type=float, nargs="+", default=[0, 1000, 200], help="0: local disk"
            )
        if name == "cgroup":
            command.add_argument("--limit-mib", type=int, required=True, help="of the cgroup")
    child = commands.add_parser("child")  # one measurement in a process of its own
    child.add_argument("job", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "child":
        print(json.dumps(CHILDREN[arguments.job.pop("do")](**arguments.job)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    globals()[f"print_{arguments.command}"](Bench(arguments.work.resolve()), arguments)


class Bench:
    """Models and pools under one directory."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def onnx(self, model: str) -> Path:
        path = self.work / "onnx" / f"{model.replace('@', '_')}.onnx"
        if not path.is_file():
            command = [sys.executable, str(SCRIPTS / "make_models.py"), "--out", str(path.parent)]
            subprocess.run([*command, model], check=True, stdout=sys.stderr)
        return path

    def compiled(self, model: str, budget_mib: int | None = None) -> Path:
        """Its directory; compiled for a budget the blocks are smaller."""
        name = model.replace("@", "_") + (f"_{budget_mib}" if budget_mib else "")
        directory = self.work / "models" / name
        if not (directory / "config.pbtxt").is_file():
            options = Options(budget_mib=budget_mib, measure=False)
            compile_model({"": self.onnx(model)}, directory, self.work / "blocks", options)
        return directory

    def uncompiled(self, model: str) -> Path:
        """Blocks of the graph as it came, in a pool of their own: what PISeL has to start from."""
        directory = self.work / "raw" / "models" / model
        if not (directory / "config.pbtxt").is_file():
            level = ort.GraphOptimizationLevel
            best, level.ORT_ENABLE_ALL = level.ORT_ENABLE_ALL, level.ORT_DISABLE_ALL
            try:
                options = Options(measure=False, panels=False)
                compile_model({"": self.onnx(model)}, directory, self.work / "raw/blocks", options)
            finally:
                level.ORT_ENABLE_ALL = best
        return directory

    def weights_bytes(self, model: str) -> int:
        found = compiled_model(self.compiled(model))
        assert found is not None
        return found.manifest.weights_bytes


def print_swap(bench: Bench, arguments: argparse.Namespace) -> None:
    print("| model | weights / budget | batch | resident ms | warm | cold | peak MiB | pinned |")
    print("|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        weights = bench.weights_bytes(model)
        for ratio in arguments.ratios:
            budget_mib = weights / MIB / ratio
            directory = bench.compiled(model, int(budget_mib))
            for batch in arguments.batches:
                result = in_child(
                    bench,
                    do="swap",
                    onnx=str(bench.onnx(model)),
                    directory=str(directory),
                    budget_mib=budget_mib,
                    batch=batch,
                    repeats=arguments.repeats,
                )
                print(
                    f"| {model} | {ratio:g} ({budget_mib:.0f} MiB) | {batch} "
                    f"| {1e3 * result['plain']:.0f} | {result['keep'] / result['plain']:.2f} "
                    f"| {result['drop'] / result['plain']:.2f} | {result['peak_bytes'] / MIB:.0f} "
                    f"| {result['pinned']} |",
                    flush=True,
                )


def swap(onnx: str, directory: str, budget_mib: float, batch: int, repeats: int) -> dict[str, Any]:
    """Medians of plain ONNX Runtime and of the budgeted model, warm and cold, in turn."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(onnx, options, ["CPUExecutionProvider"])
    times: dict[str, list[float]] = {"plain": [], "keep": [], "drop": []}
    peak_bytes = pinned = 0
    # One budgeted model at a time: they map the same pages, and neither may drop for the other.
    for cache in ("keep", "drop"):
        model = open_model(Path(directory), memory_budget_mib=f"{budget_mib}", page_cache=cache)
        names = [tensor.name for tensor in model.members[0].outputs]
        feed = feed_of(model, batch)
        plain_feed = plain_names(model, feed)
        expected = plain.run(None, plain_feed)
        for _ in range(_WARM_UP_RUNS):
            got = model.infer("", feed, names, batch)
        for name, want in zip(names, expected, strict=True):
            np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-3)
        for _ in range(repeats):
            began_s = time.perf_counter()
            plain.run(None, plain_feed)
            middle_s = time.perf_counter()
            model.infer("", feed, names, batch)
            times["plain"].append(middle_s - began_s)
            times[cache].append(time.perf_counter() - middle_s)
        peak_bytes = max(peak_bytes, model.loader.peak_bytes)
        assert model.budget is not None and model.budget.plan is not None
        pinned = len(model.budget.plan.pinned)
        model.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {**middle, "peak_bytes": peak_bytes, "pinned": pinned}


def print_cold(bench: Bench, arguments: argparse.Namespace) -> None:
    print(f"| model | from | {' ms | '.join(COLD_METHODS)} ms | less than in-order | private MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        directories = {
            method: bench.uncompiled(model) if method == "in-order" else bench.compiled(model)
            for method in COLD_METHODS
        }
        for mbps in arguments.link_mbps:
            with served(bench.work, mbps) as url:
                times: dict[str, list[dict[str, float]]] = {name: [] for name in COLD_METHODS}
                for _ in range(arguments.repeats):
                    for method in COLD_METHODS:
                        drop_page_cache(bench.work) if not mbps else None
                        with tempfile.TemporaryDirectory(dir=bench.work) as fresh:
                            result = in_child(
                                bench,
                                do="cold",
                                method=method,
                                onnx=str(bench.onnx(model)),
                                directory=str(directories[method]),
                                url=url,
                                fresh=fresh,
                            )
                        times[method].append(result)
            ms = {
                name: 1e3 * statistics.median(result["took_s"] for result in results)
                for name, results in times.items()
            }
            private = " / ".join(
                f"{statistics.median(result['private_mib'] for result in times[name]):.0f}"
                for name in COLD_METHODS
            )
            print(
                f"| {model} | {f'{mbps:g} MB/s' if mbps else 'disk'} "
                f"| {' | '.join(f'{value:.0f}' for value in ms.values())} "
                f"| {100 * (1 - ms['blocks'] / ms['in-order']):.0f} % | {private} |",
                flush=True,
            )


def cold(method: str, onnx: str, directory: str, url: str, fresh: str) -> dict[str, float]:
    """Seconds from a process with everything imported to the first output."""
    warm_up()
    before = private_mib()
    began_s = time.perf_counter()
    if method == "plain":
        path = Path(onnx)
        if url:
            path = download(url, path, Path(fresh))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        feed = {
            node.name: filled(node.name, node.type, [1, *node.shape[1:]])
            for node in session.get_inputs()
        }
        session.run(None, feed)
    elif method.startswith("in-order"):
        pool = "raw/blocks" if method == "in-order" else "blocks"
        url = f"{url}/{pool}" if url else ""
        kept = in_order(Path(directory), url, optimise=method == "in-order")
    else:
        extra = {"pool": f"{url}/blocks", "cache": fresh} if url else {}
        model = open_model(Path(directory), **extra)
        names = [tensor.name for tensor in model.members[0].outputs]
        model.infer("", feed_of(model, 1), names, 1)
    took_s = time.perf_counter() - began_s
    result = {"took_s": took_s, "private_mib": private_mib() - before}
    if method == "blocks":
        model.close()
    elif method.startswith("in-order"):
        kept.clear()  # what it holds was measured with the rest
    return result


def in_order(directory: Path, url: str, *, optimise: bool) -> list[Any]:
    """PISeL's pipeline: fetch, construct and compute, each in layer order on a thread of its own.

    Blocks are constructed as ONNX Runtime does by default: optimised, weights copied and packed.
    Of compiled blocks nothing is left to optimise: what then is left is the pipeline alone.
    """
    found = compiled_model(directory)
    assert found is not None
    store = ObjectStore(found.pool)
    member = found.manifest.members[0]
    remote = HttpStore(url) if url else None
    fetched: queue.Queue[tuple[Block, bytes, dict[str, bytes]]] = queue.Queue()
    built: queue.Queue[tuple[Block, ort.InferenceSession]] = queue.Queue()

    def read(digest: str) -> bytes:
        if remote is not None:
            return remote.read(f"objects/{digest}", 0, found.manifest.objects[digest])
        return store.path(digest).read_bytes()

    def fetch() -> None:
        have: dict[str, bytes] = {}
        for block in member.blocks:
            for weight in block.weights:
                if weight.object not in have:
                    have[weight.object] = read(weight.object)
            needed = {weight.object: have[weight.object] for weight in block.weights}
            fetched.put((block, read(block.graph), needed))

    def construct() -> None:
        for _ in member.blocks:
            block, graph, objects = fetched.get()
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            values = []
            for weight in block.weights:
                text = objects[weight.object][weight.offset : weight.offset + weight.bytes]
                array = np.frombuffer(text, DTYPES[weight.dtype]).reshape(weight.shape)
                values.append(ort.OrtValue.ortvalue_from_numpy(array))
            names = [weight.name for weight in block.weights]
            if optimise:  # the optimiser cannot see through `add_initializer`; this copies
                options.add_external_initializers(names, values)
                values.clear()
            for name, value in zip(names, values, strict=False):
                options.add_initializer(name, value)
                kept.append((objects, value))
            path = str(store.path(block.graph)) if remote is None else graph
            if remote is not None:
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path",
                    str(store.root / "objects"),
                )
            built.put((block, ort.InferenceSession(path, options, ["CPUExecutionProvider"])))

    kept: list[Any] = []
    threads = [threading.Thread(target=work) for work in (fetch, construct)]
    for thread in threads:
        thread.start()
    values: dict[str, Any] = {
        tensor.value: filled(tensor.name, tensor.dtype, [1, *tensor.shape[1:]])
        for tensor in member.inputs
    }
    for _ in member.blocks:
        block, session = built.get()
        feed = {
            node.name: values[value]
            for node, value in zip(session.get_inputs(), block.inputs, strict=True)
        }
        values.update(zip(block.outputs, session.run(None, feed), strict=True))
        kept.append(session)
    for thread in threads:
        thread.join()
    return kept


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


def print_fuse(bench: Bench, arguments: argparse.Namespace) -> None:
    """Models of one group: as plain ONNX models, as blocks, and fused."""
    models = arguments.models
    if models == ["ocr"]:
        sys.path.insert(0, str(SCRIPTS.parent))
        from scripts.blocks_chain import print_ocr

        print_ocr(bench.work, arguments.repeats)
        return
    repository = bench.work / "fuse" / "models"
    options = Options(measure=False)
    pool = bench.work / "fuse" / "blocks"
    for model in models:
        compile_model({"": bench.onnx(model)}, repository / model, pool, options)
        write_plain(repository / f"plain_{model}", repository / model, bench.onnx(model))
    compile_model(
        {f"m_{model}": bench.onnx(model) for model in models}, repository / "group", pool, options
    )
    ways = {
        "plain, one each": [f"plain_{model}" for model in models],
        "blocks, one each": list(models),
        "blocks, fused": ["group"],
    }
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, names in ways.items():
            drop_page_cache(bench.work)
            results[way].append(asyncio.run(group_on_triton(bench.work, repository, names)))
    print("| group | loaded and answered ms | PSS MiB | private MiB | one request each ms |")
    print("|---|---|---|---|---|")
    for way, measured in results.items():
        middle = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        print(
            f"| {way} | {1e3 * middle['ready_s']:.0f} | {middle['pss_mib']:.0f} "
            f"| {middle['private_mib']:.0f} | {1e3 * middle['all_s']:.0f} |"
        )


def write_plain(directory: Path, compiled: Path, onnx: Path) -> None:
    """The same tensors for the backend `onnxruntime`, which reads the ONNX file itself."""
    config = read_config(compiled / "config.pbtxt")
    config.name, config.backend = directory.name, "onnxruntime"
    config.parameters.clear()
    (directory / "1").mkdir(parents=True, exist_ok=True)
    for source in (onnx, onnx.with_suffix(".bin")):
        link = directory / "1" / ("model.onnx" if source == onnx else source.name)
        if source.exists() and not link.exists():
            os.link(source, link)
    text = text_format.MessageToString(config)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")


async def group_on_triton(work: Path, repository: Path, names: Sequence[str]) -> dict[str, float]:
    """Loads them all at once, asks each once, then all again."""
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
        again_s = time.perf_counter()
        await asyncio.gather(*map(ask, names))
        all_s = time.perf_counter() - again_s
        stubs = psutil.Process(triton.pid).children(recursive=True)
        memory = [stub.memory_full_info() for stub in stubs]
        await client.close()
    return {
        "ready_s": ready_s,
        "all_s": all_s,
        "pss_mib": sum(one.pss for one in memory) / MIB,
        "private_mib": sum(one.uss for one in memory) / MIB,
    }


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
    for number in range(_WARM_UP_RUNS + repeats):
        began_s = time.perf_counter()
        run()
        if number >= _WARM_UP_RUNS:
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


CHILDREN: Mapping[str, Callable[..., dict[str, Any]]] = {
    "swap": swap,
    "cold": cold,
    "share": share,
    "limited": limited,
}


def in_child(bench: Bench, group: Path | None = None, **job: Any) -> dict[str, Any]:
    """What the job returns; {} if it was killed in its cgroup."""
    command = [sys.executable, __file__, "--work", str(bench.work), "child", json.dumps(job)]
    if group is not None:
        enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, str(group), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if group is not None and done.returncode in (-9, 137):
        return {}
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def open_model(directory: Path, **parameters: str) -> BlockModel:
    found = compiled_model(directory)
    assert found is not None
    texts = {"manifest": found.digest, "pool": str(found.pool), **parameters}
    given = {key: {"string_value": text} for key, text in texts.items()}
    return BlockModel.open(read_settings(given, directory)).start()


def feed_of(model: BlockModel, batch: int) -> dict[str, Any]:
    return {
        tensor.name: filled(tensor.name, tensor.dtype, [batch, *tensor.shape[1:]])
        for tensor in model.members[0].inputs
    }


def plain_names(model: BlockModel, feed: Mapping[str, Any]) -> dict[str, Any]:
    """By the ONNX file's names."""
    return {tensor.value: feed[tensor.name] for tensor in model.members[0].inputs}


def filled(name: str, kind: str, shape: Sequence[Any]) -> Any:
    random = np.random.default_rng(0)
    if "mask" in name:
        return np.ones(shape, np.int64)
    if "int64" in kind.lower():
        return random.integers(0, 30000, shape)
    return random.standard_normal(shape, dtype=np.float32)


def warm_up() -> None:
    """ONNX Runtime's own first use, which is not the model's."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.zeros(1, np.float32)})


def private_mib() -> float:
    """Memory that belongs to this process alone and cannot be dropped."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no such line")


def files_under(root: Path) -> Iterator[Path]:
    for part in ("onnx", "blocks/objects", "raw/blocks/objects", "fuse/blocks/objects"):
        yield from (path for path in (root / part).glob("*") if path.is_file())


def drop_page_cache(root: Path) -> None:
    for path in files_under(root):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_mib(pool: Path) -> float:
    """Of all weights in the pool."""
    from paceline.blocks.backend.mapping import MappedObject

    total = 0
    for path in (pool / "objects").iterdir():
        if path.stat().st_size:
            mapped = MappedObject(path, path.stat().st_size)
            total += mapped.cached_bytes()
            mapped.close()
    return total / MIB


@contextmanager
def served(root: Path, mbps: float) -> Iterator[str]:
    """The directory behind HTTP at so many MB/s in all; "" if 0."""
    if not mbps:
        yield ""
        return
    for path in files_under(root):
        with path.open("rb") as file, Path(os.devnull).open("wb") as nowhere:
            shutil.copyfileobj(file, nowhere)  # the link is the limit, not the disk
    script = str(SCRIPTS / "blocks_link.py")
    command = [sys.executable, script, str(root), str(mbps)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def download(url: str, onnx: Path, target: Path) -> Path:
    """The model's two files, as a server that loads from a store does first."""
    store = HttpStore(f"{url}/onnx")
    for path in (onnx, onnx.with_suffix(".bin")):
        size = path.stat().st_size
        with (target / path.name).open("wb") as file:
            for offset in range(0, size, 8 * MIB):
                file.write(store.read(path.name, offset, min(8 * MIB, size - offset)))
    store.close()
    return target / onnx.name


if __name__ == "__main__":
    main()
