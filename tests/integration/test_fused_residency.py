"""A fused model where memory is bounded: its members are called by their own names, and it comes
and goes as one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from scripts.faults_models import ROW, compile_blocks
from scripts.residency_models import write_ballast
from tests.integration.conftest import Start

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

TIMEOUT_S = 60.0
MEMORY_MIB = 130
BALLAST_MIB = 80
"""Room for the fused model or for the other one."""


def test_members_of_a_fused_model_that_comes_and_goes_are_answered(
    start_paceline: Start, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    compile_blocks(models, {"first": 1, "second": 2}, ("--fuse", "both"))
    write_ballast(models, "other", BALLAST_MIB)
    server = start_paceline(
        *("--model-repository", str(models), "--memory-mib", str(MEMORY_MIB))
    ).wait_ready()

    def residency() -> dict[str, int]:
        with server.channel() as channel:
            status = server.control(channel).Status(control_pb2.StatusRequest(), timeout=TIMEOUT_S)
        found: dict[str, int] = json.loads(status.json)["residency"]
        return found

    before = residency()
    with server.client() as client:
        for number in range(1, 4):
            for model in ("first", "second", "other"):
                given = np.array([[number, -number, 0.5, 2.0**number]], np.float32)
                sent = triton.InferInput("x", [1, ROW], "FP32")
                sent.set_data_from_numpy(given)
                answer = client.infer(model, [sent], client_timeout=TIMEOUT_S)
                assert np.array_equal(answer.as_numpy("y"), given), model
    after = residency()
    assert after["misses"] - before["misses"] >= 4, (before, after)
    assert server.stop() == 0
    server.assert_nothing_left()
