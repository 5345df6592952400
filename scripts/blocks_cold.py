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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from paceline.blocks.backend.settings import MIB
from paceline.blocks.backend.store import HttpStore, Part
from paceline.blocks.repository import compiled_model

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
