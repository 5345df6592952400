"""The OCR chain fused against separate Triton models; `bench_blocks.py fuse ocr`.

On Triton alone: from the start of all loads, from a cold disk, to the first text; memory of the
model processes then; one text after the other. Through Paceline: latency of one client, texts a
second of several. Every way runs in turn, `repeats` times, each on a Triton of its own; models have
no `model_warmup` here, which would run everything twice before the first answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc.aio as triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.prepare_models import REPOSITORY, prepare_models
from tests import ocr_images

from paceline.blocks.compile import compile_model
from paceline.blocks.group import group_of, read_group
from paceline.blocks.member import Options
from paceline.config import read_chain
from paceline.core.chain import Chain, Source
from paceline.core.model import ModelSpec
from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.repository import TritonRepository

ROOT = Path(__file__).resolve().parent.parent
CHAIN, FUSED = ROOT / "examples/chains/ocr.yaml", ROOT / "examples/fused/ocr.yaml"
GROUPS = {"ocr_front": ("prepare", "detect", "extract"), "ocr_lines": ("classify", "recognize")}
CALLS = 8
CLIENTS = 4
"""At once: each asks again when it is answered."""
LOADED_S = 15.0
MIB = 1 << 20


@dataclass(frozen=True)
class Way:
    """A repository and the chain that is served from it."""

    name: str
    repository: Path
    chain: Path


def print_ocr(work: Path, repeats: int, places: Sequence[str]) -> None:
    ways = prepared(work / "ocr")
    for place in places:
        part, measure = PLACES[place]
        measured: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
        for _ in range(repeats):
            for way in ways:
                measured[way.name].append(measure(work / "ocr", way))
        titles = list(measured[ways[0].name][0])
        print(f"| OCR {part} | {' | '.join(titles)} |")
        print("|---" * (len(titles) + 1) + "|")
        for name, results in measured.items():
            middle = [statistics.median(result[title] for result in results) for title in titles]
            cells = (f"{v:.0f}" if v >= 10 else f"{v:.2f}" for v in middle)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def prepared(work: Path) -> list[Way]:
    """Separate models, and the same fused; samples are left out of their configurations."""
    source, plain, fused = work / "source", work / "plain", work / "fused"
    if not (fused / "ocr_lines").exists():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns("__pycache__"))
        prepare_models(source)
        shutil.copytree(source, plain)
        chain = read_chain(CHAIN)
        for name, modules in GROUPS.items():
            group = read_group(group_of(chain, modules, [], name), [source])
            compile_model(group.sources, fused / name, work / "blocks", Options(), group=group)
    return [Way("separate", plain, CHAIN), Way("fused", fused, FUSED)]


def alone(work: Path, way: Way) -> dict[str, float]:
    """The chain on a Triton without Paceline before it: what loading and processes cost."""
    bare = _without_samples(work, way)
    _drop_page_cache(work)
    return asyncio.run(_loaded(work, way, bare))


async def _loaded(work: Path, way: Way, bare: Path) -> dict[str, float]:
    settings = LocalTritonSettings(
        state_directory=work / "triton", model_repositories=(bare,), stop_timeout_s=0.5
    )
    chain = read_chain(way.chain)
    names = [module.model for module in chain.modules]
    image = ocr_images.lines()
    async with LocalTriton(settings) as local, triton.InferenceServerClient(local.url) as client:
        own = await TritonClient.connect(local.url, name="bench")
        models = TritonRepository(own, (bare,))
        specs = {name: models.declaration(name) for name in names}
        began_s = time.perf_counter()
        await asyncio.gather(*(models.load(name, instances=1) for name in names))
        loaded_s = time.perf_counter()
        await run_chain(client, chain, specs, {"image": image})
        ready_s = time.perf_counter()
        assert local.pid is not None
        stubs = psutil.Process(local.pid).children(recursive=True)
        memory = [stub.memory_full_info() for stub in stubs]
        took_s = []
        for _ in range(CALLS):
            start_s = time.perf_counter()
            await run_chain(client, chain, specs, {"image": image})
            took_s.append(time.perf_counter() - start_s)
        await own.close()
    return {
        "loaded ms": 1e3 * (loaded_s - began_s),
        "loaded and answered ms": 1e3 * (ready_s - began_s),
        "PSS MiB": sum(one.pss for one in memory) / MIB,
        "private MiB": sum(one.uss for one in memory) / MIB,
        "one text ms": 1e3 * statistics.median(took_s),
    }


def through(work: Path, way: Way) -> dict[str, float]:
    """The chain as clients of Paceline see it; profiles are measured once and kept."""
    chain = work / f"{way.name}.yaml"
    text = re.sub(r"(?m)^slo_ms: \d+", "slo_ms: 60000", way.chain.read_text(encoding="utf-8"))
    chain.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "paceline", "serve", "--grpc-port", "0", "--http-port", "0"]
    command += ["--state-dir", str(work / f"state-{way.name}"), "--chains", str(chain)]
    command += ["--model-repository", str(way.repository)]
    log = work / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stderr=file)
    try:
        while not (found := re.search(r"gRPC on (127\.0\.0\.1:\d+)", log.read_text("utf-8"))):
            if server.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        return asyncio.run(_asked(found[1], server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


async def _asked(address: str, pid: int) -> dict[str, float]:
    image = ocr_images.lines()
    client = triton.InferenceServerClient(address)

    async def ask() -> float:
        began_s = time.perf_counter()
        await client.infer("ocr", [_input("image", image, "UINT8")], client_timeout=60)
        return time.perf_counter() - began_s

    await ask()
    took_s = [await ask() for _ in range(CALLS)]
    until_s = time.perf_counter() + LOADED_S

    async def keep_asking() -> int:
        done = 0
        while time.perf_counter() < until_s:
            await ask()
            done += 1
        return done

    began_s = time.perf_counter()
    done = sum(await asyncio.gather(*(keep_asking() for _ in range(CLIENTS))))
    spent_s = time.perf_counter() - began_s
    await client.close()
    children = psutil.Process(pid).children(recursive=True)
    stubs = [child for child in children if "python_backend_stub" in child.name()]
    return {
        "one client ms": 1e3 * statistics.median(took_s),
        f"{CLIENTS} clients, texts a minute": 60 * done / spent_s,
        "processes": len(stubs),
        "PSS MiB": sum(stub.memory_full_info().pss for stub in stubs) / MIB,
    }


PLACES: Mapping[str, tuple[str, Callable[[Path, Way], dict[str, float]]]] = {
    "triton": ("on Triton alone", alone),
    "paceline": ("through Paceline", through),
}


async def run_chain(
    client: Any, chain: Chain, specs: Mapping[str, ModelSpec], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """One request through a chain, module by module: what a client without Paceline does."""
    values: dict[Source, Any] = {Source(None, name): array for name, array in inputs.items()}
    used = {s for m in chain.modules for s in m.sources} | set(chain.outputs.values())
    for module in chain.modules:
        spec = specs[module.model]
        widened = spec.batches and module.for_each is None
        given = []
        for name, source in module.inputs.items():
            declared = spec.input(name)
            assert declared is not None
            array = values[source][np.newaxis] if widened else values[source]
            given.append(_input(name, array, declared.datatype))
        names = [s.tensor for s in used if s.module == module.name]
        asked = [triton.InferRequestedOutput(name) for name in names]
        answer = await client.infer(module.model, given, outputs=asked, client_timeout=60)
        for name in names:
            array = answer.as_numpy(name)
            values[Source(module.name, name)] = array[0] if widened else array
    return {name: values[source] for name, source in chain.outputs.items()}


def _input(name: str, array: Any, datatype: str) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def _without_samples(work: Path, way: Way) -> Path:
    """The way's repository with links to all but the samples' declarations."""
    bare = work / f"bare-{way.name}"
    shutil.rmtree(bare, ignore_errors=True)
    for model in filter(Path.is_dir, way.repository.iterdir()):
        shutil.copytree(model, bare / model.name, copy_function=os.link)
        config = bare / model.name / "config.pbtxt"
        text = config.read_text(encoding="utf-8")
        config.unlink()  # the link, not the file
        config.write_text(text[: (text + "model_warmup").index("model_warmup")], encoding="utf-8")
    return bare


def _drop_page_cache(work: Path) -> None:
    for path in work.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 65536:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
