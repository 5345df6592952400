"""A model's process that pauses while a request waits in Triton behind another: Triton fails the
first and answers the second with what the first asked for. Paceline answers with neither.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from scripts.timed_model import write_timed
from tests.integration.conftest import Start
from tests.integration.paceline_process import Paceline
from tritonclient.utils import InferenceServerException

from paceline.triton.client import TritonClient
from paceline.triton.launcher import LocalTriton, LocalTritonSettings
from paceline.triton.processes import model_processes
from paceline.triton.repository import TritonRepository

pytestmark = pytest.mark.integration

TIMEOUT_S = 30.0
NAMES = ("one", "other")
"""Ensembles of one step each, as members of a fused model are."""


def write_ensemble(repository: Path, name: str, model: str) -> None:
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(
        f'''name: "{name}"
platform: "ensemble"
max_batch_size: 8
input [{{name: "x" data_type: TYPE_FP32 dims: [4]}}]
output [{{name: "y" data_type: TYPE_FP32 dims: [4]}}]
ensemble_scheduling {{ step [{{
  model_name: "{model}" model_version: -1
  input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }}
}}] }}
''',
        encoding="utf-8",
    )


@pytest.fixture
def server(start_paceline: Start, tmp_path: Path) -> Paceline:
    models = tmp_path / "models"
    models.mkdir()
    write_timed(models, {1: 400}, "shared")
    for name in NAMES:
        write_ensemble(models, name, "shared")
    return start_paceline("--model-repository", str(models)).wait_ready()


def ask(client: triton.InferenceServerClient, name: str, value: float) -> float | None:
    """What was answered; None for an error."""
    sent = triton.InferInput("x", [1, 4], "FP32")
    sent.set_data_from_numpy(np.full((1, 4), value, np.float32))
    try:
        answer = client.infer(name, [sent], client_timeout=TIMEOUT_S)
    except InferenceServerException as error:
        assert "UNAVAILABLE" in str(error.status()), error
        return None
    return float(answer.as_numpy("y")[0, 0])


def test_an_answer_that_was_for_another_request_is_given_to_nobody(server: Paceline) -> None:
    triton_pid = server.triton_process().pid
    with server.client() as client, ThreadPoolExecutor() as threads:
        assert [ask(client, name, 1.0) for name in NAMES] == [1.0, 1.0]
        until_s = time.monotonic() + TIMEOUT_S
        while len(processes := model_processes(triton_pid, "shared")) > 1:  # of earlier loads
            assert time.monotonic() < until_s
        (process,) = processes
        first = threads.submit(ask, client, "one", 2.0)
        time.sleep(0.1)  # its process has it
        process.suspend()
        second = threads.submit(ask, client, "other", 3.0)
        server.wait_line("model one on local is broken", TIMEOUT_S)
        with suppress(psutil.NoSuchProcess):
            process.resume()
        assert first.result() is None
        assert second.result() in (None, 3.0)
        until_s = time.monotonic() + TIMEOUT_S
        while [ask(client, name, 4.0) for name in NAMES] != [4.0, 4.0]:
            assert time.monotonic() < until_s
    assert server.stop() == 0


async def test_what_an_ensemble_is_made_of_keeps_its_instances_when_the_ensemble_comes(
    tmp_path: Path,
) -> None:
    """Triton loads it once more then, as its files say; batches would wait for fewer processes."""
    models = tmp_path / "models"
    models.mkdir()
    write_timed(models, {1: 1}, "shared")
    for name in NAMES:
        write_ensemble(models, name, "shared")
    settings = LocalTritonSettings(state_directory=tmp_path, model_repositories=(models,))
    async with LocalTriton(settings) as local:
        client = await TritonClient.connect(local.url, name="t")
        repository = TritonRepository(client, (models,))
        assert repository.members("one") == ("shared",), "before anything is loaded"
        await repository.load("shared", instances=3)
        for count, name in ((3, "one"), (2, "other")):
            await repository.load(name, instances=1)
            assert (await repository.instances())["shared"] == count
            await repository.load("shared", instances=2)
        await repository.repair("shared", instances=2)
        await repository.load("one", instances=1)
        assert await repository.instances() == {"one": 1, "other": 1, "shared": 2}
        await client.close()
