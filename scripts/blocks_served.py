"""Cold starts and swapping as clients of Paceline see them; `bench_blocks.py served`, `fuse`.

Every way to serve the same networks is a chain of its own on one `paceline serve`, which unloads
what has been idle for half a second. In turn, `repeats` times: everything is unloaded, the page
cache dropped, and a request finds its models cold; then come requests one after another. Behind a
link nothing of the model is on this machine: plain's file is copied before it is loaded, on the
clock, as whoever keeps models in a store does; blocks fetch their pool themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import tritonclient.grpc as triton
from google.protobuf import text_format
from scripts.bench_residency import served, until_cold
from scripts.blocks_chain import CLIENTS
from scripts.blocks_cold import download
from scripts.blocks_cold import served as served_link
from scripts.blocks_measure import (
    ITEMS,
    SCRIPTS,
    WARM_UP_RUNS,
    Bench,
    drop_page_cache,
    filled,
)

from paceline.blocks.backend.settings import MIB
from paceline.blocks.compile import compile_model
from paceline.blocks.member import Options
from paceline.blocks.repository import compiled_model, read_config
from paceline.core.errors import BudgetError
from paceline.core.model import ModelSpec
from paceline.core.tensor import TensorSpec
from paceline.triton.client import TritonClient
from paceline.triton.repository import TritonRepository

_KEEP_ALIVE_S = 0.5
_WARM = 5
_GIVE_UP_S = 60.0
_LOADED_S = 8.0
ONE_INSTANCE = ("--slots", "1", "--replan-window-s", "0")
"""However busy it is: else there are as many as Paceline plans for what it sees."""


def _nothing() -> None: ...


@dataclass(frozen=True)
class Way:
    """`models` of a repository that answer a request together.

    Cold: `forget` what is still here, then on the clock `fetch` what has to be here before.
    """

    name: str
    models: Sequence[str]
    forget: Callable[[], None] = _nothing
    fetch: Callable[[], None] = _nothing


def print_served(bench: Bench, arguments: argparse.Namespace) -> None:
    """A model at a time, from the disk or from a store behind a link."""
    print("| model | from | batch | way | cold ms | then ms | PSS MiB |")
    print("|---|---|---|---|---|---|---|")
    rows = arguments.batch
    for model in arguments.models:
        for mbps in arguments.link_mbps:
            with served_link(bench.work, mbps) as url:
                if url:
                    repository, ways = _behind(bench, model, url, rows)
                else:
                    repository, ways = _on_disk(bench, model, arguments, rows)
                found = measured(
                    bench,
                    repository,
                    ways,
                    arguments.repeats,
                    rows=rows,
                    dropped=not url,
                    given=() if arguments.as_planned else ONE_INSTANCE,
                )
            came_from = f"{mbps:g} MB/s" if url else "disk"
            for name, row in found.items():
                print(f"| {model} | {came_from} | {rows} | {name} | {_cells(row)} |", flush=True)


def repository_of(bench: Bench, model: str, rows: int) -> Path:
    """Where the model's ways on the disk are."""
    return bench.work / "served" / f"{model}-{rows}" / "models"


def _on_disk(
    bench: Bench, model: str, arguments: argparse.Namespace, rows: int
) -> tuple[Path, list[Way]]:
    """Without a budget, and as blocks within budgets: weights by the ratio, and activations."""
    repository = repository_of(bench, model, rows)
    ways = _unlimited(bench, model, repository, rows)
    for ratio in arguments.ratios:
        name = f"{model}_{ratio:g}_{arguments.page_cache}"
        try:
            budget_mib = write_within(bench, model, repository / name, ratio, rows)
        except BudgetError as error:  # no block of it is so small
            print(f"left out: {model} at {ratio:g}: {error}", file=sys.stderr)
            continue
        config = config_of(repository / name)
        config.parameters["page_cache"].string_value = arguments.page_cache
        write_config(repository / name, config)
        ways.append(Way(f"blocks, budget {budget_mib} MiB ({ratio:g})", [name]))
    return repository, ways


def _behind(bench: Bench, model: str, url: str, rows: int) -> tuple[Path, list[Way]]:
    """The same without a budget from a store that keeps the bench's directory."""
    home = bench.work / "served" / f"{model}-{rows}-remote"
    repository, cache = home / "models", home / "cache"

    def forget() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    def fetch() -> None:
        fetched = home / "fetched"
        fetched.mkdir(exist_ok=True)
        first = download(url, bench.onnx(model), fetched)
        first.rename(first.with_name("model.onnx"))
        for path in fetched.iterdir():
            path.replace(repository / f"{model}_plain" / "1" / path.name)

    ways = _unlimited(bench, model, repository, rows, url=url, forget=forget, fetch=fetch)
    blocks = repository / f"{model}_blocks"
    config = config_of(blocks)
    config.parameters["pool"].string_value = f"{url}/blocks"
    config.parameters["cache"].string_value = str(cache)
    write_config(blocks, config)
    return repository, ways


def _unlimited(
    bench: Bench,
    model: str,
    repository: Path,
    rows: int,
    *,
    url: str = "",
    forget: Callable[[], None] = _nothing,
    fetch: Callable[[], None] = _nothing,
) -> list[Way]:
    """Plain (`fetch` its file before), by PISeL's pipeline, as blocks (`forget` theirs)."""
    plain, in_order, blocks = (f"{model}_{kind}" for kind in ("plain", "inorder", "blocks"))
    write_blocks(bench, {"": model}, repository / blocks, None, rows)
    write_plain(repository / plain, repository / blocks, bench.onnx(model))
    ways = [Way("plain", [plain], fetch=fetch)]
    if rows == 1:
        write_in_order(bench, model, repository / in_order, repository / blocks, url)
        ways.append(Way("in-order", [in_order]))
    return [*ways, Way("blocks", [blocks], forget)]


def print_group(bench: Bench, models: Sequence[str], repeats: int) -> None:
    """Models that every request needs, side by side: plain, as blocks, fused."""
    repository = bench.work / "served" / "group" / "models"
    for model in models:
        write_blocks(bench, {"": model}, repository / f"{model}_blocks", None)
        blocks, plain = (repository / f"{model}_{kind}" for kind in ("blocks", "plain"))
        write_plain(plain, blocks, bench.onnx(model))
    write_blocks(bench, {f"m_{model}": model for model in models}, repository / "fused", None)
    ways = [
        Way("plain, one each", [f"{model}_plain" for model in models]),
        Way("blocks, one each", [f"{model}_blocks" for model in models]),
        Way("blocks, fused", ["fused"]),
    ]
    loaded = f"{CLIENTS} clients, requests/s | CPU ms each"
    print(f"| group through Paceline | cold ms | then ms | PSS MiB | {loaded} |")
    print("|---|---|---|---|---|---|")
    for name, row in measured(bench, repository, ways, repeats, clients=CLIENTS).items():
        print(f"| {name} | {_cells(row)} |", flush=True)


def write_blocks(
    bench: Bench,
    members: Mapping[str, str],
    directory: Path,
    budget_mib: int | None,
    most_rows: int = 1,
) -> int:
    """The rows of a batch that the model takes in the end."""
    # What is not measured has no activations to leave room for.
    options = Options(budget_mib=budget_mib, max_batch=most_rows, measure=budget_mib is not None)
    sources = {name: bench.onnx(model) for name, model in members.items()}
    compile_model(sources, directory, bench.work / "blocks", options)
    for name in filter(None, members):  # its own name, which nobody asks for here
        shutil.rmtree(directory.parent / name, ignore_errors=True)
    config = config_of(directory)
    for model in members.values():
        if model in ITEMS:
            (given,) = config.input
            given.dims[:] = ITEMS[model][-len(given.dims) :]
            write_config(directory, config)
    return int(config.max_batch_size)


def write_within(bench: Bench, model: str, directory: Path, ratio: float, rows: int) -> int:
    """The budget of the model it writes: weights by the ratio, and the rows' activations."""
    manifest = bench.manifest(model)
    budget_mib = ceil((manifest.weights_bytes / ratio + manifest.activation_bytes(rows)) / MIB)
    # Where its largest block leaves room for fewer rows, as much more as all of them take.
    while write_blocks(bench, {"": model}, directory, budget_mib, rows) < rows:
        budget_mib += 1
    return budget_mib


def write_plain(directory: Path, compiled: Path, onnx: Path) -> None:
    """The same tensors for the backend `onnxruntime`, which reads the ONNX file itself."""
    config = config_of(compiled)
    config.name, config.backend = directory.name, "onnxruntime"
    config.parameters.clear()
    (directory / "1").mkdir(parents=True, exist_ok=True)
    for source in (onnx, onnx.with_suffix(".bin")):
        link = directory / "1" / ("model.onnx" if source == onnx else source.name)
        if source.exists() and not link.exists():
            os.link(source, link)
    write_config(directory, config)


def write_in_order(bench: Bench, model: str, directory: Path, compiled: Path, url: str) -> None:
    """The same tensors for PISeL's pipeline, on Triton's Python backend; `url`: of a store."""
    found = compiled_model(bench.uncompiled(model))
    assert found is not None
    config = config_of(compiled)
    config.name, config.backend = directory.name, "python"
    config.parameters.clear()
    for name, text in (
        ("python", os.pathsep.join(map(str, (SCRIPTS.parent, SCRIPTS.parent / "server")))),
        ("pool", str(found.pool)),
        ("manifest", found.digest),
        ("url", url and f"{url}/raw/blocks"),
    ):
        config.parameters[name].string_value = text
    (directory / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SCRIPTS / "blocks_in_order_model.py", directory / "1" / "model.py")
    write_config(directory, config)


def config_of(directory: Path) -> Any:
    """Of a compiled model."""
    config = read_config(directory / "config.pbtxt")
    assert config is not None
    return config


def write_config(directory: Path, config: Any) -> None:
    text = text_format.MessageToString(config)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")


def measured(
    bench: Bench,
    repository: Path,
    ways: Sequence[Way],
    repeats: int,
    *,
    rows: int = 1,
    dropped: bool = True,
    given: Sequence[str] = (),
    clients: int = 0,
) -> dict[str, dict[str, float]]:
    """Medians by way: milliseconds to the first answer, then of an answer; memory after it; with
    `clients` the requests/s that so many get, and their CPU.

    `dropped`: the page cache is, before. `given`: more arguments of `paceline serve`.
    """
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    with serving(bench, repository, ways, rows, given=given) as (channel, asks):
        for _ in range(repeats):
            for way, ask in zip(ways, asks, strict=True):
                until_cold(channel)
                if dropped:
                    drop_page_cache(bench.work)
                way.forget()
                found[way.name].append(_asked(ask, way))
                if clients:
                    found[way.name][-1] |= _loaded(ask, clients)
    return {
        name: {key: statistics.median(one[key] for one in found[name]) for key in found[name][0]}
        for name in found
    }


@contextmanager
def serving(
    bench: Bench,
    repository: Path,
    ways: Sequence[Way],
    rows: int = 1,
    keep_alive_s: float = _KEEP_ALIVE_S,
    *,
    given: Sequence[str] = (),
    within: Sequence[str] = (),
    kept: Path | None = None,
) -> Iterator[tuple[Any, list[Callable[[], None]]]]:
    """A `paceline serve` with a chain for each way: a channel to it, and what asks each way once.

    A chain's requests have no batch axis: with `rows` its only model is asked by its own name.
    `given`: more arguments; `within`: what runs the command; `kept`: where its state is kept.
    """
    names = [name for way in ways for name in way.models]
    # What an earlier run left is in no chain, and would stay loaded.
    for left in repository.iterdir():
        if left.name not in names:
            shutil.rmtree(left)
    specs = asyncio.run(_declared(repository, names))
    made = tempfile.TemporaryDirectory(dir=bench.work) if kept is None else nullcontext(kept)
    with made as place:
        work = Path(place)
        arguments = [*given, "--model-repository", str(repository)]
        for number, way in enumerate(ways):
            file = work / f"way{number}.yaml"
            of_way = [specs[name] for name in way.models]
            file.write_text(_chain(f"way{number}", of_way, keep_alive_s), "utf-8")
            arguments += ["--chains", str(file)]
        with (
            served(work, arguments, within) as (target, _),
            grpc.insecure_channel(target) as channel,
            triton.InferenceServerClient(target) as client,
        ):
            asks: list[Callable[[], None]] = []
            for number, way in enumerate(ways):
                of_way = [specs[name] for name in way.models]
                name, inputs = (
                    (f"way{number}", _inputs(of_way)) if rows == 1 else _batch(*of_way, rows=rows)
                )
                asks.append(partial(client.infer, name, inputs, client_timeout=_GIVE_UP_S))
            yield channel, asks


def _asked(ask: Callable[[], None], way: Way) -> dict[str, float]:
    took_s = []
    for number in range(1 + WARM_UP_RUNS + _WARM):
        began_s = time.perf_counter()
        if not number:
            way.fetch()
        ask()
        took_s.append(time.perf_counter() - began_s)
    pss = sum(stub.memory_full_info().pss for stub in stubs(way.models))
    return {
        "cold": 1e3 * took_s[0],
        "then": 1e3 * statistics.median(took_s[-_WARM:]),
        "pss": pss / MIB,
    }


def _loaded(ask: Callable[[], None], clients: int) -> dict[str, float]:
    """Answers per second, to so many who ask one after the other, a second left out to warm up;
    CPU milliseconds an answer of whatever serves them, with that second.
    """
    answers: list[float] = []
    before_s = _cpu_s()

    def keep_asking(until_s: float) -> None:
        while time.perf_counter() < until_s:
            ask()
            answers.append(time.perf_counter())

    began_s = time.perf_counter() + 1.0
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(keep_asking, began_s + _LOADED_S) for _ in range(clients)]:
            done.result()
    counted = [at_s for at_s in answers if at_s >= began_s]
    return {
        "rps": len(counted) / (max(counted) - began_s),
        "cpu": 1e3 * (_cpu_s() - before_s) / len(answers),
    }


def _cpu_s() -> float:
    """Of all processes that this one has started and that are there."""
    spent_s = 0.0
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # other models come and go
            times = one.cpu_times()
            spent_s += times.user + times.system
    return spent_s


def stubs(models: Sequence[str]) -> Iterator[psutil.Process]:
    """The processes of these models' instances, whatever else is loaded: `NAME_0_0`, and so on."""
    instance = re.compile(rf"({'|'.join(map(re.escape, models))})_\d+_\d+")
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # other models come and go
            if "backend_stub" in one.name() and any(map(instance.fullmatch, one.cmdline())):
                yield one


async def _declared(repository: Path, names: Sequence[str]) -> dict[str, ModelSpec]:
    models = TritonRepository(TritonClient("127.0.0.1:1"), (repository,))
    return {name: models.declaration(name) for name in names}


def _chain(name: str, specs: Sequence[ModelSpec], keep_alive_s: float) -> str:
    """A chain of models side by side: all their inputs and outputs are its own."""
    lines = [f"chain: {name}", "slo_ms: 60000", "rate_rps: 0.01"]
    lines += [f"keep_alive_s: {keep_alive_s}"]
    numbered = [(i, j, t) for i, spec in enumerate(specs) for j, t in enumerate(spec.inputs)]
    lines += ["inputs:"]
    for i, j, tensor in numbered:
        lines += [f"  x{i}_{j}: {{dtype: {tensor.datatype}, shape: {list(tensor.shape)}}}"]
    lines += ["modules:"]
    for i, spec in enumerate(specs):
        lines += [f"  m{i}:", f"    model: {spec.name}", "    inputs:"]
        lines += [f'      "{t.name}": inputs.x{i}_{j}' for k, j, t in numbered if k == i]
    lines += ["outputs:"]
    for i, spec in enumerate(specs):
        lines += [f'  y{i}_{j}: "m{i}.{tensor.name}"' for j, tensor in enumerate(spec.outputs)]
    return "\n".join(lines) + "\n"


def _inputs(specs: Sequence[ModelSpec]) -> list[Any]:
    """Of the chain in which these models are side by side."""
    return [
        _given(f"x{i}_{j}", tensor, tensor.shape)
        for i, spec in enumerate(specs)
        for j, tensor in enumerate(spec.inputs)
    ]


def _batch(spec: ModelSpec, *, rows: int) -> tuple[str, list[Any]]:
    """A model's own name and its inputs."""
    return spec.name, [_given(t.name, t, (rows, *t.shape)) for t in spec.inputs]


def _given(name: str, tensor: TensorSpec, shape: Sequence[int]) -> Any:
    sent = triton.InferInput(name, list(shape), tensor.datatype)
    sent.set_data_from_numpy(np.ascontiguousarray(filled(tensor.name, tensor.datatype, shape)))
    return sent


def _cells(row: Mapping[str, float]) -> str:
    return " | ".join(f"{value:.0f}" if value >= 20 else f"{value:.1f}" for value in row.values())
