"""Servers under test, one process each a session: `front` has tiny models, `ocr` the OCR example.

`start_paceline` starts servers that a test may kill; whatever it started is stopped, and it is an
error when anything of it is left.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from scripts.prepare_models import REPOSITORY, prepare_models
from scripts.timed_model import write_timed
from tests.integration.models import (
    write_add,
    write_broken,
    write_failing,
    write_identity,
    write_picky,
    write_transpose,
)
from tests.integration.paceline_process import Paceline

OCR_START_TIMEOUT_S = 240.0
EXAMPLE_CHAIN = REPOSITORY.parent / "examples" / "chains" / "ocr.yaml"
GENEROUS_SLO_MS = 60_000

Start = Callable[..., Paceline]

PAIR_CHAIN = f"""\
chain: pair
slo_ms: {GENEROUS_SLO_MS}
rate_rps: 10
inputs:
  a: {{dtype: INT32, shape: [16]}}
  b: {{dtype: INT32, shape: [16]}}
modules:
  first:
    model: add
    inputs: {{a: inputs.a, b: inputs.b}}
  second:
    model: add
    inputs: {{a: first.sum, b: inputs.b}}
outputs:
  total: second.sum
  part: first.sum
"""
"""total = a + 2 b."""

ITEMS_CHAIN = f"""\
chain: items
slo_ms: {GENEROUS_SLO_MS}
rate_rps: 20
inputs:
  x: {{dtype: FP32, shape: [-1, 4]}}
modules:
  each:
    model: slow
    for_each: inputs.x
    fan_out: 2
    inputs: {{x: inputs.x}}
outputs:
  y: each.y
"""
"""y = x, one sub-request for each row."""


@pytest.fixture(scope="session")
def front_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slow` takes 80 ms whatever the batch, one batch at a time."""
    repository = tmp_path_factory.mktemp("front-models")
    write_identity(repository)
    write_add(repository)
    write_timed(repository, {1: 80}, "slow", max_batch_size=4)
    write_transpose(repository)
    write_failing(repository)
    write_picky(repository)
    write_broken(repository)
    return repository


@pytest.fixture(scope="session")
def front(front_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """A server of tiny models and the chains `pair` and `items`; tests leave it as it was."""
    chains = tmp_path_factory.mktemp("front-chains")
    (chains / "pair.yaml").write_text(PAIR_CHAIN, encoding="utf-8")
    (chains / "items.yaml").write_text(ITEMS_CHAIN, encoding="utf-8")
    server = Paceline(
        tmp_path_factory.mktemp("front-state"),
        ["--model-repository", str(front_models), "--chains", str(chains)],
    )
    try:
        yield server.wait_ready()
    finally:
        code = server.stop()
    assert code == 0


@pytest.fixture
def client(front: Paceline) -> Iterator[triton.InferenceServerClient]:
    """An unmodified Triton client of `front`."""
    with front.client() as made:
        yield made


@pytest.fixture(scope="session")
def ocr_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's repository, complete.

    Only the largest batches are smaller: measuring the detector on eight pages at once takes a
    minute on two slow cores.
    """
    repository = tmp_path_factory.mktemp("ocr") / "models"
    shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    prepare_models(repository)
    for model, rows in (("ocr_prepare", 2), ("ocr_detect", 2), ("ocr_classify", 8)):
        config = repository / model / "config.pbtxt"
        text, changes = re.subn(
            r"^max_batch_size: \d+",
            f"max_batch_size: {rows}",
            config.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        assert changes == 1, f"{model} declares no max_batch_size"
        config.write_text(text, encoding="utf-8")
    return repository


@pytest.fixture(scope="session")
def ocr(ocr_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paceline]:
    """A server of the OCR example with an objective that a busy machine keeps."""
    chain = tmp_path_factory.mktemp("ocr-chain") / "ocr.yaml"
    text, changes = re.subn(
        r"^slo_ms: \d+",
        f"slo_ms: {GENEROUS_SLO_MS}",
        EXAMPLE_CHAIN.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert changes == 1, "the example's objective is not as it was"
    chain.write_text(text, encoding="utf-8")
    server = Paceline(
        tmp_path_factory.mktemp("ocr-state"),
        ["--model-repository", str(ocr_models), "--chains", str(chain)],
    )
    try:
        yield server.wait_ready(OCR_START_TIMEOUT_S)
    finally:
        code = server.stop()
    assert code == 0


@pytest.fixture
def start_paceline(tmp_path: Path) -> Iterator[Start]:
    """`start_paceline(*arguments, state=...)`: a server that is not awaited yet."""
    started: list[Paceline] = []

    def start(*arguments: str, state: Path | None = None) -> Paceline:
        server = Paceline(state or tmp_path / f"state{len(started)}", arguments)
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.end()
        server.assert_nothing_left()
