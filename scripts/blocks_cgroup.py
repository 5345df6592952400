"""The budget under a memory cgroup, which counts the page cache; `bench_blocks.py cgroup`.

Without --limit-mib the limit is the budget (weights by the ratio, and activations) and what a
process with the model's sessions, but no weights and no run, takes by itself. Cgroups of version 1:
those of version 2 have no controllers where this was written. With --link-mbps the model's pool is
a store behind a link, which serves from outside the cgroup; the cache begins empty, so that the
first run fetches and writes it, and later ones swap in from there. With `--at paceline` the cgroup
holds `paceline serve` with its Triton. With `--together` it holds a process for each model, and
they share one budget, the sum of theirs.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from scripts.blocks_cold import served
from scripts.blocks_measure import (
    WARM_UP_RUNS,
    Bench,
    Budget,
    drop_page_cache,
    entering,
    feed_of,
    in_child,
    open_model,
    plain_feed,
    plain_session,
)
from scripts.blocks_served import (
    ONE_INSTANCE,
    Way,
    config_of,
    repository_of,
    serving,
    stubs,
    write_config,
    write_within,
)

from paceline.blocks.backend.settings import MIB

SLACK_MIB = 6
"""For what the kernel charges ahead."""
SETTLED_S = 2.0
_NEVER_S = 3600.0


def print_cgroup(bench: Bench, arguments: argparse.Namespace) -> None:
    if arguments.together:
        print_together(bench, arguments)
        return
    print(
        "| model | weights / budget | batch | limit MiB | how | median ms | most MiB | limit hits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        for ratio in arguments.ratios:
            budget = bench.budget(model, ratio, arguments.batch)
            if "process" in arguments.at:
                with served(bench.work / "blocks", arguments.link_mbps) as url:
                    print_limited(bench, arguments, model, ratio, budget, url)
            if "paceline" in arguments.at:
                print_through(bench, arguments, model, ratio, budget.weights_mib)


def print_limited(
    bench: Bench,
    arguments: argparse.Namespace,
    model: str,
    ratio: float,
    budget: Budget,
    url: str,
) -> None:
    """Each way's row; `url`: of the store, "" for the local pool."""
    within = {"memory_budget_mib": f"{budget.mib}"}
    job: dict[str, Any] = {
        "directory": str(budget.directory),
        "batch": arguments.batch,
        "repeats": arguments.repeats,
    }
    limit_mib = arguments.limit_mib
    if limit_mib is None:
        with cold_pool(bench, url) as pool, cgroup() as group:
            directory, parameters = job["directory"], {**within, **pool}
            held = in_child(bench, group, do="idle", directory=directory, parameters=parameters)
            beside_mib = most_mib(group) - held["held_mib"]
        limit_mib = math.ceil(budget.mib + beside_mib + SLACK_MIB)
    ways: list[tuple[str, str, dict[str, str]]] = [
        ("blocks, paged by the kernel", "", {}),
        (f"blocks, budget {budget.mib:.0f} MiB", "", within),
    ]
    if not url:
        ways.insert(0, ("plain", str(bench.onnx(model)), {}))
    found: dict[str, list[Seen]] = {how: [] for how, _, _ in ways}
    for _ in range(arguments.runs):
        for how, onnx, limits in ways:
            with cold_pool(bench, url) as pool, cgroup(limit_mib) as group:
                given = {**limits, **pool}
                result = in_child(bench, group, do="limited", **job, onnx=onnx, parameters=given)
                median_s = result.get("median_s", math.nan)
                found[how].append(Seen(median_s, most_mib(group), limit_hits(group)))
    for how, seen in found.items():
        print(
            f"| {model} | {ratio:g} ({budget.weights_mib:.0f} MiB) | {arguments.batch} "
            f"| {limit_mib} | {how} | {cells(seen)} |",
            flush=True,
        )


def cells(seen: Sequence[Seen]) -> str:
    """Of all runs the median of milliseconds, the most that was in use, and each one's hits."""
    median_s = statistics.median(one.median_s for one in seen)
    took = "killed" if math.isnan(median_s) else f"{1e3 * median_s:.0f}"
    hits = ", ".join(f"{one.limit_hits}" for one in seen)
    return f"{took} | {max(one.most_mib for one in seen):.0f} | {hits}"


def print_together(bench: Bench, arguments: argparse.Namespace) -> None:
    """Each way's row: all models at the same time, in processes of their own."""
    print(
        "| models | weights / budget | batch | limit MiB | how | ms each | most MiB | limit hits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = arguments.batch
    for ratio in arguments.ratios:
        budgets = [bench.budget(model, ratio, rows) for model in arguments.models]
        total_mib = sum(budget.mib for budget in budgets)
        jobs = [{"directory": str(budget.directory)} for budget in budgets]
        limit_mib = arguments.limit_mib
        if limit_mib is None:
            own = [{"memory_budget_mib": f"{budget.mib}"} for budget in budgets]
            drop_page_cache(bench.work)
            with cgroup() as group:
                held = in_children(bench, group, jobs, own, do="idle")
                beside_mib = most_mib(group) - sum(one["held_mib"] for one in held)
            limit_mib = math.ceil(total_mib + beside_mib + SLACK_MIB * len(budgets))
        together = {"shared_budget_mib": f"{total_mib}", "budget_group": f"bench-{os.getpid()}"}
        for how, parameters in (
            ("paged by the kernel", {}),
            (f"one budget of {total_mib:.0f} MiB", together),
        ):
            given = [parameters] * len(jobs)
            drop_page_cache(bench.work)
            with cgroup(limit_mib) as group:
                job = {"batch": rows, "repeats": arguments.repeats, "onnx": ""}
                results = in_children(bench, group, jobs, given, do="limited", **job)
                peak_mib, hits = most_mib(group), limit_hits(group)
            took = ", ".join(f"{1e3 * one['median_s']:.0f}" if one else "killed" for one in results)
            print(
                f"| {', '.join(arguments.models)} | {ratio:g} | {rows} | {limit_mib} | {how} "
                f"| {took} | {peak_mib:.0f} | {hits} |",
                flush=True,
            )


def in_children(
    bench: Bench,
    group: Path,
    jobs: Sequence[Mapping[str, Any]],
    parameters: Sequence[Mapping[str, str]],
    **job: Any,
) -> list[dict[str, Any]]:
    """What each job returns, all at the same time in one cgroup."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [
            pool.submit(in_child, bench, group, **job, **own, parameters=given)
            for own, given in zip(jobs, parameters, strict=True)
        ]
        return [one.result() for one in running]


def print_through(
    bench: Bench, arguments: argparse.Namespace, model: str, ratio: float, weights_mib: float
) -> None:
    """Each way's row; the cgroup holds `paceline serve`, its Triton and the model's process.

    What they take by themselves is measured with the model loaded and nothing asked, and what
    requests on their way take, without a limit. Every way is served once before, so that its
    profile is there.
    """
    rows = arguments.batch
    written = repository_of(bench, model, rows) / f"{model}_{ratio:g}"
    budget_mib = write_within(bench, model, written, ratio, rows)
    limited = bench.work / "served" / "limited"
    shutil.rmtree(limited, ignore_errors=True)
    within, paged = limited / "within", limited / "paged"
    for repository in (within, paged):
        shutil.copytree(written, repository / written.name)
    config = config_of(paged / written.name)
    del config.parameters["memory_budget_mib"]
    write_config(paged / written.name, config)
    with tempfile.TemporaryDirectory(dir=bench.work) as made:
        through = partial(_through, bench, Path(made), rows)
        for repository in (within, paged):
            through(repository, None, None)
        limit_mib = arguments.limit_mib
        if limit_mib is None:
            drop_page_cache(bench.work)
            parameters = {"memory_budget_mib": f"{budget_mib}"}
            held = in_child(bench, do="idle", directory=str(written), parameters=parameters)
            beside_mib = through(within, None, None).most_mib - held["held_mib"]
            beside_mib += through(within, None, arguments.repeats).carried_mib
            limit_mib = math.ceil(budget_mib + beside_mib + SLACK_MIB)
        ways = {"budget": within, "paged by the kernel": paged}
        found: dict[str, list[Seen]] = {how: [] for how in ways}
        for _ in range(arguments.runs):
            for how, repository in ways.items():
                found[how].append(through(repository, limit_mib, arguments.repeats))
        for how, seen in found.items():
            print(
                f"| {model} | {ratio:g} ({weights_mib:.0f} MiB) | {rows} "
                f"| {limit_mib} | through Paceline, {how} | {cells(seen)} |",
                flush=True,
            )


@dataclass(frozen=True)
class Seen:
    """Of a cgroup: a request's median (none asked, or killed: NaN), the most that was in use, how
    often the limit was hit, and, with a server in it, what the requests on their way took: memory
    shared among the processes, and all but the model's own.
    """

    median_s: float
    most_mib: float
    limit_hits: int
    carried_mib: float = 0.0


def _through(
    bench: Bench,
    work: Path,
    rows: int,
    repository: Path,
    limit_mib: int | None,
    repeats: int | None,
) -> Seen:
    """A server in a cgroup of its own. `repeats` None: nothing is asked."""
    way = Way("", [model.name for model in repository.iterdir()])
    state = work / repository.name
    state.mkdir(exist_ok=True)
    drop_page_cache(bench.work)
    with cgroup(limit_mib) as group:
        with serving(
            bench,
            repository,
            [way],
            rows,
            keep_alive_s=_NEVER_S,
            given=ONE_INSTANCE,
            within=entering(group),
            kept=state,
        ) as (_, (ask,)):
            time.sleep(SETTLED_S)
            before_mib = _carried_mib(group, way)
            median_s = math.nan if repeats is None else _median_s(ask, repeats)
            carried_mib = _carried_mib(group, way) - before_mib
        return Seen(median_s, most_mib(group), limit_hits(group), carried_mib)


def _carried_mib(group: Path, way: Way) -> float:
    """Memory shared among a cgroup's processes, and the own memory of all but the model's."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    own = {stub.pid for stub in stubs(way.models)}
    others = {int(pid) for pid in (group / "cgroup.procs").read_text().split()} - own
    rss = (psutil.Process(pid).memory_info() for pid in others)
    return (int(stat["shmem"]) + sum(one.rss - one.shared for one in rss)) / MIB


@contextmanager
def cold_pool(bench: Bench, url: str) -> Iterator[dict[str, str]]:
    """Parameters of a model that begins cold: a store and an empty cache, or the local pool."""
    if not url:
        drop_page_cache(bench.work)
        yield {}
        return
    with tempfile.TemporaryDirectory(dir=bench.work) as cache:
        yield {"pool": url, "cache": cache}


def most_mib(group: Path) -> float:
    return int((group / "memory.max_usage_in_bytes").read_text()) / MIB


def limit_hits(group: Path) -> int:
    return int((group / "memory.failcnt").read_text())


def idle(directory: str, parameters: dict[str, str]) -> dict[str, float]:
    """What is held of the weights in a process that runs nothing, its sessions made."""
    model = open_model(Path(directory), **parameters)
    model._skeleton._thread.join()  # sessions take memory, and on a busy machine their time
    time.sleep(SETTLED_S)
    held_mib = model.loader.held_bytes / MIB
    model.close()
    return {"held_mib": held_mib}


def limited(
    onnx: str, directory: str, parameters: dict[str, str], batch: int, repeats: int
) -> dict[str, float]:
    """Median of a run in a process whose memory is limited."""
    if onnx:
        session = plain_session(Path(onnx))
        given = plain_feed(session, Path(onnx).stem, batch)
        run: Callable[[], Any] = partial(session.run, None, given)
        model = None
    else:
        model = open_model(Path(directory), **parameters)
        names = [tensor.name for tensor in model.members[0].outputs]
        run = partial(model.infer, "", feed_of(model, batch), names, batch)
    median_s = _median_s(run, repeats)
    if model is not None:
        model.close()
    return {"median_s": median_s}


def _median_s(run: Callable[[], Any], repeats: int) -> float:
    """Of runs one after another, warmed up."""
    times = []
    for number in range(WARM_UP_RUNS + repeats):
        began_s = time.perf_counter()
        run()
        if number >= WARM_UP_RUNS:
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)


@contextmanager
def cgroup(limit_mib: int | None = None) -> Iterator[Path]:
    """A child of this process's memory cgroup, removed in the end."""
    own = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    (place,) = (line.split(":")[2] for line in own if line.split(":")[1] == "memory")
    group = Path(f"/sys/fs/cgroup/memory{place}", f"blocks-{os.getpid()}")
    group.mkdir()
    try:
        if limit_mib is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit_mib * MIB))
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()
