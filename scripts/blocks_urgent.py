"""An urgent load beside others that load; `bench_blocks.py urgent`.

The models begin to load together, each in a process of its own in which everything is imported, and
the first of them comes when the others are at it. Time to the first output of each: the first model
alone; beside the others when nobody takes turns, as loads that know nothing of each other do; when
all take turns and count the same; and when the first is more urgent, because requests wait for it
alone, or because the others have a lower `priority`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.blocks_cold import served
from scripts.blocks_measure import (
    SCRIPTS,
    Bench,
    drop_page_cache,
    feed_of,
    open_model,
    warm_up,
)

LATER_S = 0.2
"""How much later the first model comes."""
START_S = 0.2
"""From the word that all are ready to the start."""
READY = "ready\n"
LOWER = "4"
WAYS: Mapping[str, str] = {
    "alone": "the others do not load",
    "no turns": "nobody takes turns",
    "equal": "requests wait for all",
    "others not waited for": "requests wait for it alone",
    "others of priority 4": "requests wait for all",
}


def print_urgent(bench: Bench, arguments: argparse.Namespace) -> None:
    """A row for each way, all in turn, from the disk or from a store behind a link."""
    first, *others = arguments.models
    print(f"| from | way | {first}: first output ms | the last of the others ms |")
    print("|---|---|---|---|")
    for mbps in arguments.link_mbps:
        with served(bench.work, mbps) as url:
            found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for _ in range(arguments.repeats):
                for way in WAYS:
                    found[way].append(loaded(bench, way, first, others, url))
        for way, runs in found.items():
            urgent_s = statistics.median(run[0] for run in runs)
            last_s = statistics.median(max(run[1:], default=0.0) for run in runs)
            print(
                f"| {f'{mbps:g} MB/s' if mbps else 'disk'} | {way} ({WAYS[way]}) "
                f"| {1e3 * urgent_s:.0f} | {f'{1e3 * last_s:.0f}' if last_s else '-'} |",
                flush=True,
            )


def loaded(bench: Bench, way: str, first: str, others: Sequence[str], url: str) -> list[float]:
    """Seconds to the first output of each model, all cold; to load it, if it is not asked."""
    names = [first, *(others if way != "alone" else ())]
    directories = [str(bench.compiled(name)) for name in names]
    with tempfile.TemporaryDirectory(dir=bench.work) as fresh:
        running = []
        for number, name in enumerate(names):
            parameters: dict[str, str] = {}
            if url:
                parameters |= {"pool": f"{url}/blocks", "cache": str(Path(fresh, name))}
            if number and way == "others of priority 4":
                parameters["priority"] = LOWER
            job: dict[str, Any] = {
                "do": "urgent",
                "directory": directories[number],
                "parameters": parameters,
                "ask": number == 0 or way != "others not waited for",
            }
            apart = number if way == "no turns" else 0
            command = [sys.executable, str(SCRIPTS / "bench_blocks.py"), "--work", str(bench.work)]
            environment = {**os.environ, "PACELINE_BLOCKS_LEDGER": str(Path(fresh, f"t{apart}"))}
            running.append(
                subprocess.Popen(
                    [*command, "child", json.dumps(job)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == READY
        if not url:
            drop_page_cache(bench.work)
        start_s = time.time() + START_S
        for number, one in enumerate(running):
            assert one.stdin is not None
            one.stdin.write(f"{start_s + (0.0 if number else LATER_S)}\n")
            one.stdin.flush()
        told = [one.communicate()[0] for one in running]
    assert not any(one.returncode for one in running), way
    return [float(json.loads(text)["took_s"]) for text in told]


def urgent(directory: str, parameters: dict[str, str], ask: bool) -> dict[str, float]:
    """Seconds to the first output from the instant that it is told; not asked, to all weights."""
    warm_up()
    gc.freeze()
    print(READY, end="", flush=True)
    at_s = float(sys.stdin.readline())
    time.sleep(max(0.0, at_s - time.time()))
    began_s = time.perf_counter()
    model = open_model(Path(directory), **parameters)
    if ask:
        names = [tensor.name for tensor in model.members[0].outputs]
        model.infer("", feed_of(model, 1), names, 1)
    else:
        assert model.loader.wait_complete(120.0)
    took_s = time.perf_counter() - began_s
    model.close()
    return {"took_s": took_s}
