"""Time to the first output; `bench_blocks.py cold`.

From a process in which everything is imported: plain ONNX Runtime, PISeL's pipeline, and blocks;
from a cold disk, or a store behind a link. Utilisation: of the time to the first output, the share
in which the busiest of the stages (fetch, construct, compute) was at work. Bound: the time when
bytes come as fast as the disk or link gives them with nothing else to do, and each block computes
as soon as it is there; nothing is hashed, built or waited for. No way to load these blocks takes
less, so that no more can be saved against the in-order pipeline than the bound saves.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from scripts.blocks_in_order import InOrder, Stages
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
from paceline.blocks.backend.objects import ObjectStore
from paceline.blocks.backend.run import Sessions
from paceline.blocks.backend.settings import MIB
from paceline.blocks.backend.source import loaded_objects
from paceline.blocks.backend.store import HttpStore, Part
from paceline.blocks.backend.window import CHUNK_BYTES
from paceline.blocks.repository import compiled_model

COLD_METHODS = ("plain", "in-order", "in-order compiled", "blocks")


def print_cold(bench: Bench, arguments: argparse.Namespace) -> None:
    print(
        f"| model | from | {' ms | '.join(COLD_METHODS)} ms | less than in-order "
        "| bound: fetch, compute, both ms | saves | utilisation % | private MiB |"
    )
    print("|---" * (len(COLD_METHODS) + 7) + "|")
    for model in arguments.models:
        directories = {
            method: bench.uncompiled(model) if method == "in-order" else bench.compiled(model)
            for method in COLD_METHODS
        }
        for mbps in arguments.link_mbps:
            with served(bench.work, mbps) as url:
                times: dict[str, list[dict[str, float]]] = {name: [] for name in COLD_METHODS}
                bounds: list[dict[str, float]] = []
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
                    directory = str(directories["blocks"])
                    bounds.append(in_child(bench, do="bound", directory=directory, mbps=mbps))
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
            fetch_ms, compute_ms, both_ms = (
                1e3 * statistics.median(one[key] for one in bounds)
                for key in ("fetch_s", "compute_s", "both_s")
            )
            print(
                f"| {model} | {f'{mbps:g} MB/s' if mbps else 'disk'} "
                f"| {' | '.join(f'{value:.0f}' for value in ms.values())} "
                f"| {100 * (1 - ms['blocks'] / ms['in-order']):.0f} % "
                f"| {fetch_ms:.0f}, {compute_ms:.0f}, {both_ms:.0f} "
                f"| {100 * (1 - both_ms / ms['in-order']):.0f} % | {used} | {private} |",
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
        found = compiled_model(Path(directory))
        assert found is not None
        manifest, store = found.manifest, ObjectStore(found.pool)
        pipeline = InOrder(store, manifest, url, stages, optimise=method == "in-order")
        pipeline.infer(
            {
                tensor.value: filled(tensor.name, tensor.dtype, item_of(manifest, 1, tensor))
                for tensor in pipeline.member.inputs
            }
        )
        pipeline.join()
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
    return {**result, "utilisation": max(stages.busy_s.values(), default=0.0) / took_s}


def bound(directory: str, mbps: float) -> dict[str, float]:
    """Seconds to fetch alone, to compute alone for the first time, and of both as they overlap.

    Tables are left out: of them a run reads a few rows.
    """
    warm_up()
    model = open_model(Path(directory))
    assert model.loader.wait_complete(60)
    model._skeleton._thread.join()
    timed = _Timed(model._runs)
    model._runs = timed
    feed, names = feed_of(model, 1), [tensor.name for tensor in model.members[0].outputs]
    model.infer("", feed, names, 1)
    objects = model._objects
    needs = [loaded_objects(block) for block in model.members[0].blocks]
    for opened in objects.values():
        opened.drop(page_cache=True)
    fetched_s = computed_s = 0.0
    have: set[str] = set()
    for number, of_block in enumerate(needs):
        for name in [name for name in of_block if name not in have]:
            have.add(name)
            size = objects[name].size_bytes
            began_s = time.perf_counter()
            for offset in range(0, size if not mbps else 0, CHUNK_BYTES):
                objects[name].populate(offset, min(CHUNK_BYTES, size - offset))
            fetched_s += size / (mbps * 1e6) if mbps else time.perf_counter() - began_s
        computed_s = max(computed_s, fetched_s) + timed.took_s.get(number, 0.0)
    compute_s = sum(timed.took_s.values())
    model.close()
    return {"fetch_s": fetched_s, "compute_s": compute_s, "both_s": computed_s}


class _Timed:
    """Sessions, and what each took."""

    def __init__(self, runs: Sessions) -> None:
        self._runs = runs
        self.took_s: dict[int, float] = {}

    def run(self, block: int, values: list[Any]) -> list[Any]:
        began_s = time.perf_counter()
        results = self._runs.run(block, values)
        self.took_s[block] = time.perf_counter() - began_s
        return results


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
