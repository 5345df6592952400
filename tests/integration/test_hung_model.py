"""A batch that does not end: its request is answered by another machine within its deadline.

(Of a model's process that is stopped from outside Triton says itself that it is not healthy.)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from scripts.residency_models import chain_file
from tests.integration.conftest import Start
from tests.integration.models import write_model
from tests.integration.test_machines import somebody_elses_triton, up
from tests.integration.test_serve_inference import TIMEOUT_S
from tests.integration.test_serve_lifecycle import wait_status

from paceline.v1 import control_pb2

pytestmark = pytest.mark.integration

SLO_MS = 4000
CONFIG = """
max_batch_size: 1
input [{name: "x" data_type: TYPE_FP32 dims: [4]}]
output [{name: "y" data_type: TYPE_FP32 dims: [4]}]
"""
CODE = """
import os
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        try:
            os.rename("HANG", "HUNG")  # one process alone can
        except FileNotFoundError:
            time.sleep(0.4)
        else:
            while os.path.exists("HUNG"):
                time.sleep(0.01)
        given = [pb_utils.get_input_tensor_by_name(r, "x") for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x.as_numpy())]) for x in given]
"""


def test_a_request_whose_batch_hangs_is_answered_by_another_machine_in_time(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, chain = tmp_path / "models", tmp_path / "c.yaml"
    hang, hung = tmp_path / "hang", tmp_path / "hung"
    models.mkdir()
    write_model(models, "m", CONFIG, CODE.replace("HANG", str(hang)).replace("HUNG", str(hung)))
    # More than one machine can do.
    chain.write_text(chain_file("c", ["m"], slo_ms=SLO_MS, rate_rps=4), encoding="utf-8")
    given = np.arange(4, dtype=np.float32)
    sent = triton.InferInput("x", [4], "FP32")
    sent.set_data_from_numpy(given)

    def quarantined(status: object) -> list[str]:
        machines = json.loads(status.json)["machines"]  # type: ignore[attr-defined]
        return [m["machine"] for m in machines for lane in m["lanes"] if lane["quarantined"]]

    with (
        somebody_elses_triton(tmp_path / "a", models) as (_, one),
        somebody_elses_triton(tmp_path / "b", models) as (_, two),
    ):
        server = start_paceline(
            *("--triton", one, "--triton", two, "--chains", str(chain)),
            *("--model-repository", str(models), "--replan-window-s", "0"),
            *("--hang-least-s", "60"),
        ).wait_ready()
        wait_status(server, lambda s: len(up(s)) == 2)
        with server.client() as client, server.channel() as channel:
            control = server.control(channel)

            def ask(name: str) -> list[str]:
                """The machines that answered for it."""
                answer = client.infer("c", [sent], request_id=name, client_timeout=TIMEOUT_S)
                assert (answer.as_numpy("y") == given).all()
                told = control.Explain(control_pb2.ExplainRequest(request_id=name))
                assert told.met, told
                return [span.machine for span in told.spans]

            assert ask("before") == ["triton-0"]
            hang.touch()
            assert ask("hung") == ["triton-1"]
            assert hung.exists() and quarantined(wait_status(server, lambda s: bool(up(s)))) == [
                "triton-0"
            ]
            assert ask("after it") == ["triton-1"], "nothing is sent to what does not answer"
            hung.unlink()
            wait_status(server, lambda s: not quarantined(s))
            assert ask("again") == ["triton-0"], "it did answer"
        assert "loading it afresh" not in server.said
        assert server.stop() == 0
