"""A cold model on a real Triton: one instance for the request that waits, the others behind it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.integration.blocks_models import WIDTH, compiled, write_mlp
from tests.integration.conftest import Start
from tests.integration.models import write_model
from tests.integration.paceline_process import Paceline
from tests.integration.test_residency import held, status_until
from tests.integration.test_serve_inference import TIMEOUT_S

pytestmark = pytest.mark.integration

TENSORS = f"""\
max_batch_size: 1
input [{{name: "x" data_type: TYPE_FP32 dims: [{WIDTH}]}}]
output [{{name: "y" data_type: TYPE_FP32 dims: [{WIDTH}]}}]
"""
GATED = """
import os
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        until_s = time.monotonic() + 60
        while args["model_instance_name"].endswith("_0_1") and not os.path.exists("{gate}"):
            if time.monotonic() > until_s:
                raise RuntimeError("{gate} never came")
            time.sleep(0.01)

    def execute(self, requests):
        x = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        y = [pb_utils.Tensor("y", 2 * given) for given in x]
        return [pb_utils.InferenceResponse([each]) for each in y]
"""
"""Its second instance is there once the file `gate` is."""
CHAIN = f"""\
chain: {{name}}
slo_ms: 60000
rate_rps: 100000
keep_alive_s: 2
inputs:
  x: {{{{dtype: FP32, shape: [{WIDTH}]}}}}
modules:
  only:
    model: {{name}}_model
    inputs: {{{{x: inputs.x}}}}
outputs:
  y: only.y
"""
"""More than two cores can do: as many instances as there are slots are wanted."""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    made = tmp_path / "gate"
    made.touch()
    return made


@pytest.fixture
def server(start_paceline: Start, tmp_path: Path, gate: Path) -> Paceline:
    """The chains `plain`, `blocks` (one network) and `gated`; two instances of each are wanted."""
    models, chains = tmp_path / "models", tmp_path / "chains"
    chains.mkdir()
    network = write_mlp(tmp_path / "mlp.onnx", layers=24)
    compiled(models, "blocks_model", {"": network}, budget_mib=None)
    plain = models / "plain_model"
    (plain / "1").mkdir(parents=True)
    shutil.copy(network, plain / "1" / "model.onnx")
    text = f'name: "plain_model"\nbackend: "onnxruntime"\n{TENSORS}'
    (plain / "config.pbtxt").write_text(text, encoding="utf-8")
    write_model(models, "gated_model", TENSORS, GATED.format(gate=gate))
    for name in ("plain", "blocks", "gated"):
        (chains / f"{name}.yaml").write_text(CHAIN.format(name=name), encoding="utf-8")
    return start_paceline(
        *("--model-repository", str(models), "--chains", str(chains), "--slots", "2"),
        *("--replan-window-s", "0", "--log-level", "info"),
    ).wait_ready()


def ask(client: triton.InferenceServerClient, name: str) -> Any:
    sent = triton.InferInput("x", [WIDTH], "FP32")
    sent.set_data_from_numpy(np.linspace(-1, 1, WIDTH, dtype=np.float32))
    return client.infer(name, [sent], client_timeout=TIMEOUT_S).as_numpy("y")


def loads_of(server: Paceline, model: str, since: int) -> list[str]:
    """What was said of its loads: how many instances, and that they were there."""
    told = "\n".join(server.lines[since:])
    return re.findall(rf"(?<=loading {model} on local, )instances: \d|loaded(?= {model})", told)


def instances(status: dict[str, Any], model: str) -> int:
    """Those that requests are sent to."""
    (machine,) = status["machines"]
    found: int = machine["instances"].get(model, 0)
    return found


def answered_until_two(
    server: Paceline, client: triton.InferenceServerClient, name: str, answer: Any
) -> None:
    """One request after the other is answered, until a second instance is there."""
    for _ in range(500):
        np.testing.assert_array_equal(ask(client, name), answer)
        if instances(status_until(server, bool), f"{name}_model") == 2:
            return
    raise AssertionError(f"{name} has one instance:\n{server.said}")


def test_a_cold_model_answers_with_one_instance_and_then_gets_the_others(
    server: Paceline, gate: Path
) -> None:
    with server.client() as client:
        for name in ("plain", "blocks"):
            model = f"{name}_model"
            status_until(server, lambda status, model=model: model not in held(status))
            since = len(server.lines)
            answered_until_two(server, client, name, ask(client, name))
            told = loads_of(server, model, since)
            assert told[:4] == ["instances: 1", "loaded", "instances: 2", "loaded"]

        status_until(server, lambda status: "gated_model" not in held(status))
        gate.unlink()
        since = len(server.lines)
        first = ask(client, "gated")
        server.wait_line(r"loading gated_model on local, instances: 2")
        for _ in range(20):
            np.testing.assert_array_equal(ask(client, "gated"), first)
        assert loads_of(server, "gated_model", since) == ["instances: 1", "loaded", "instances: 2"]
        assert instances(status_until(server, bool), "gated_model") == 1
        gate.touch()
        answered_until_two(server, client, "gated", first)
    assert server.stop() == 0
