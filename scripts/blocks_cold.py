"""Time to the first output; `bench_blocks.py cold`.

From a process in which everything is imported: plain ONNX Runtime, PISeL's pipeline, and blocks;
from a cold disk, or a store behind a link. Utilisation: of the time to the first output, the share
in which the busiest of the stages (fetch, construct, compute) was at work.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from scripts.blocks_measure import (
    SCRIPTS,
    Bench,
    drop_page_cache,
    feed_of,
    files_under,
    filled,
    in_child,
    item_of,
    open_model,
    plain_feed,
    plain_session,
    private_mib,
    warm_up,
)

from paceline.blocks.backend import skeleton
from paceline.blocks.backend.manifest import Block
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.settings import MIB
from paceline.blocks.backend.skeleton import DTYPES
from paceline.blocks.backend.store import HttpStore, Part
from paceline.blocks.repository import compiled_model

Bytes = bytes | memoryview
COLD_METHODS = ("plain", "in-order", "in-order compiled", "blocks")


def print_cold(bench: Bench, arguments: argparse.Namespace) -> None:
    print(
        f"| model | from | {' ms | '.join(COLD_METHODS)} ms | less than in-order "
        "| utilisation % | private MiB |"
    )
    print("|---" * (len(COLD_METHODS) + 5) + "|")
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
            private, used = (
                " / ".join(
                    f"{scale * statistics.median(result[what] for result in times[name]):.0f}"
                    for name in names
                )
                for what, scale, names in (
                    ("private_mib", 1, COLD_METHODS),
                    ("utilisation", 100, COLD_METHODS[1:]),
                )
            )
            print(
                f"| {model} | {f'{mbps:g} MB/s' if mbps else 'disk'} "
                f"| {' | '.join(f'{value:.0f}' for value in ms.values())} "
                f"| {100 * (1 - ms['blocks'] / ms['in-order']):.0f} % | {used} | {private} |",
                flush=True,
            )


def cold(method: str, onnx: str, directory: str, url: str, fresh: str) -> dict[str, float]:
    """Seconds from a process with everything imported to the first output."""
    warm_up()
    gc.freeze()  # as the backend does: what is imported here is more than what is imported there
    stages = Stages()
    before = private_mib()
    began_s = time.perf_counter()
    if method == "plain":
        path = Path(onnx)
        if url:
            path = download(url, path, Path(fresh))
        session = plain_session(path)
        session.run(None, plain_feed(session, Path(onnx).stem))
    elif method.startswith("in-order"):
        pool = "raw/blocks" if method == "in-order" else "blocks"
        url = f"{url}/{pool}" if url else ""
        kept = in_order(Path(directory), url, stages, optimise=method == "in-order")
    else:
        made, run = skeleton.Session.__init__, skeleton.Session.run
        mock.patch.object(skeleton.Session, "__init__", stages.timed("construct", made)).start()
        mock.patch.object(skeleton.Session, "run", stages.timed("compute", run)).start()
        extra = {"pool": f"{url}/blocks", "cache": fresh} if url else {}
        model = open_model(Path(directory), **extra)
        names = [tensor.name for tensor in model.members[0].outputs]
        model.infer("", feed_of(model, 1), names, 1)
    took_s = time.perf_counter() - began_s
    result = {"took_s": took_s, "private_mib": private_mib() - before}
    if method == "blocks":
        loader = model.loader
        stages.busy_s["fetch"] = loader.moved_bytes / (loader.rate() or math.inf)
        model.close()
    elif method.startswith("in-order"):
        kept.clear()  # what it holds was measured with the rest
    return {**result, "utilisation": max(stages.busy_s.values(), default=0.0) / took_s}


class Stages:
    """How long each stage of a pipeline was at work."""

    def __init__(self) -> None:
        self.busy_s: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                took_s = time.perf_counter() - began_s
                self.busy_s[stage] = self.busy_s.get(stage, 0.0) + took_s

        return timed


def in_order(directory: Path, url: str, stages: Stages, *, optimise: bool) -> list[Any]:
    """PISeL's pipeline: fetch, construct and compute, each in layer order on a thread of its own.

    Over a link its requests are out as far ahead as ours.
    Blocks are constructed as ONNX Runtime does by default: optimised, weights copied and packed.
    Of compiled blocks nothing is left to optimise: what then is left is the pipeline alone.
    """
    found = compiled_model(directory)
    assert found is not None
    store = ObjectStore(found.pool)
    member = found.manifest.members[0]
    remote = HttpStore(url) if url else None
    fetched: queue.Queue[tuple[Block, Bytes, dict[str, Bytes]]] = queue.Queue()
    built: queue.Queue[tuple[Block, ort.InferenceSession]] = queue.Queue()

    parts = {
        digest: Part(f"objects/{digest}", 0, found.manifest.objects[digest].size_bytes)
        for block in member.blocks
        for digest in (*(weight.object for weight in block.weights), block.graph)
    }

    def read(digest: str) -> Bytes:
        if remote is None:
            return store.path(digest).read_bytes()
        part = parts.pop(digest)
        remote.expect(tuple(parts.values()))
        return remote.read(part)

    timed_read = stages.timed("fetch", read)

    def fetch() -> None:
        have: dict[str, Bytes] = {}
        for block in member.blocks:
            for digest in (*(weight.object for weight in block.weights), block.graph):
                if digest not in have:
                    have[digest] = timed_read(digest)
            needed = {weight.object: have[weight.object] for weight in block.weights}
            fetched.put((block, have[block.graph], needed))

    build = stages.timed("construct", partial(session_of, store, remote, optimise=optimise))

    def construct() -> None:
        for _ in member.blocks:
            block, graph, objects = fetched.get()
            built.put((block, build(block, graph, objects, kept)))

    kept: list[Any] = []
    threads = [threading.Thread(target=work) for work in (fetch, construct)]
    for thread in threads:
        thread.start()
    values: dict[str, Any] = {
        tensor.value: filled(tensor.name, tensor.dtype, item_of(found.manifest, 1, tensor))
        for tensor in member.inputs
    }
    compute = stages.timed("compute", ort.InferenceSession.run)
    for _ in member.blocks:
        block, session = built.get()
        feed = {
            node.name: values[value]
            for node, value in zip(session.get_inputs(), block.inputs, strict=True)
        }
        values.update(zip(block.outputs, compute(session, None, feed), strict=True))
        kept.append(session)
    for thread in threads:
        thread.join()
    return kept


def session_of(
    store: ObjectStore,
    remote: HttpStore | None,
    block: Block,
    graph: Bytes,
    objects: Mapping[str, Bytes],
    kept: list[Any],
    *,
    optimise: bool,
) -> ort.InferenceSession:
    """As ONNX Runtime makes them; what must live as long as it is `kept`."""
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
    if remote is not None:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(store.root / "objects"))
    model = str(store.path(block.graph)) if remote is None else bytes(graph)
    return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


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
    """The model's files, as a server that loads from a store does first."""
    store = HttpStore(f"{url}/onnx")
    for path in filter(Path.is_file, (onnx, onnx.with_suffix(".bin"))):
        size = path.stat().st_size
        with (target / path.name).open("wb") as file:
            for offset in range(0, size, 8 * MIB):
                file.write(store.read(Part(path.name, offset, min(8 * MIB, size - offset))))
    store.close()
    return target / onnx.name
