"""NVIDIA's perf_analyzer, unmodified, against a model and against chains."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from pathlib import Path

import pytest
from scripts.prepare_models import REPOSITORY
from tests import ocr_images
from tests.integration.paceline_process import Paceline

# The first test also waits for the server, which measures five models.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SCRIPT = REPOSITORY.parent / "scripts" / "perf_analyzer"
FETCH_TIMEOUT_S = 100.0
RUN_TIMEOUT_S = 90.0
THROUGHPUT = re.compile(r"Throughput: ([\d.]+) infer/sec")


@pytest.fixture(scope="module")
def perf_analyzer() -> Path:
    """The script, once the program is there: it is downloaded on first use."""
    try:
        fetched = subprocess.run(
            [SCRIPT, "--version"],
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"perf_analyzer could not be downloaded within {FETCH_TIMEOUT_S:g} s")
    said = f"{fetched.stdout}{fetched.stderr}".strip()
    if fetched.returncode != 0 and "Version" not in said:
        pytest.skip(f"perf_analyzer could not be downloaded: {said[-300:]}")
    return SCRIPT


def throughput_rps(perf_analyzer: Path, server: Paceline, *arguments: str) -> float:
    """What a bounded run reports."""
    ended = subprocess.run(
        [perf_analyzer, "-u", server.address, "-i", "grpc", "-x", "1", *arguments],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    found = THROUGHPUT.search(ended.stdout)
    assert found is not None, ended.stdout
    print(ended.stdout)
    return float(found[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_perf_analyzer_measures_a_chain_of_tiny_models(
    perf_analyzer: Path, front: Paceline, streaming: bool
) -> None:
    arguments = ("-m", "pair", "--concurrency-range", "4", "--request-count", "100")
    mode = ("--streaming",) if streaming else ("--async",)
    assert throughput_rps(perf_analyzer, front, *arguments, *mode) > 0


def test_perf_analyzer_measures_a_model_in_batches(perf_analyzer: Path, front: Paceline) -> None:
    arguments = ("-m", "add", "-b", "4", "--concurrency-range", "2", "--request-count", "50")
    assert throughput_rps(perf_analyzer, front, *arguments) > 0


def test_perf_analyzer_measures_the_ocr_chain_with_an_image(
    perf_analyzer: Path, ocr: Paceline, tmp_path: Path
) -> None:
    image = ocr_images.tiny()
    content = base64.b64encode(image.tobytes()).decode()
    data = {"data": [{"image": {"content": {"b64": content}, "shape": list(image.shape)}}]}
    file = tmp_path / "image.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    shape = ",".join(str(axis) for axis in image.shape)
    arguments = ("-m", "ocr", "--shape", f"image:{shape}", "--input-data", str(file))
    assert throughput_rps(perf_analyzer, ocr, *arguments, "--request-count", "4") > 0
