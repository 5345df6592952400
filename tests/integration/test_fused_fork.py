"""A fused chain that forks: members beside each other run at the same time, on a real Triton."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.integration.blocks_models import WIDTH, write_mlp
from tests.integration.blocks_triton import batch, connected, infer, plain, started

from paceline.blocks.compile import compile_model
from paceline.blocks.group import group_of, read_group
from paceline.blocks.member import Options
from paceline.config import parse_chain

pytestmark = pytest.mark.integration

CHAIN = f"""
chain: fork
slo_ms: 5000
inputs:
  x: {{dtype: FP32, shape: [{WIDTH}]}}
modules:
  left:  {{model: left, inputs: {{x: inputs.x}}}}
  right: {{model: right, inputs: {{x: inputs.x}}}}
  net:   {{model: net, inputs: {{x: inputs.x}}}}
  join:  {{model: join, inputs: {{a: left.y, b: right.y, c: net.y}}}}
outputs:
  y: join.y
"""
CONFIG = """
backend: "{backend}" max_batch_size: 4
{inputs}
output {{ name: "y" data_type: TYPE_FP32 dims: [{width}] }}
"""
MEETING = "import threading\nBARRIER = threading.Barrier(2)\n"
MEMBER = """
import threading
import triton_python_backend_utils as pb_utils
from meeting import BARRIER

class TritonPythonModel:
    def initialize(self, args):
        self.thread = threading.get_ident()

    def execute(self, requests):
        assert threading.get_ident() == self.thread, "called by another thread"
        BARRIER.wait(20)
        x = pb_utils.get_input_tensor_by_name(requests[0], "x").as_numpy()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", {result})])]
"""
JOIN = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        a, b, c = (pb_utils.get_input_tensor_by_name(requests[0], n).as_numpy() for n in "abc")
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", a + b + c)])]
"""


def _declare(directory: Path, backend: str, inputs: str = "x") -> Path:
    version = directory / "1"
    version.mkdir(parents=True)
    told = "\n".join(
        f'input {{ name: "{name}" data_type: TYPE_FP32 dims: [{WIDTH}] }}' for name in inputs
    )
    text = CONFIG.format(backend=backend, inputs=told, width=WIDTH)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    return version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`fork`: two Python models that wait for each other, a network beside them, their sum."""
    source = tmp_path / "source"
    for name, result in (("left", "x + 1"), ("right", "x * 2")):
        version = _declare(source / name, "python")
        (version / "model.py").write_text(MEMBER.format(result=result), encoding="utf-8")
        (version / "meeting.py").write_text(MEETING, encoding="utf-8")
    (_declare(source / "join", "python", "abc") / "model.py").write_text(JOIN, encoding="utf-8")
    network = write_mlp(tmp_path / "net.onnx", layers=4)
    (_declare(source / "net", "onnxruntime") / "model.onnx").write_bytes(network.read_bytes())
    chain = parse_chain(CHAIN, name="fork.yaml")
    names = [module.name for module in chain.modules]
    group = read_group(group_of(chain, names, [], "fork"), [source])
    options = Options(max_batch=2, measure=False)
    compile_model(
        group.sources, tmp_path / "models" / "fork", tmp_path / "blocks", options, group=group
    )
    return tmp_path / "models"


async def test_members_beside_each_other_run_at_once_each_in_its_own_thread(
    repository: Path, tmp_path: Path
) -> None:
    async with (
        started(repository, tmp_path / "triton", tmp_path / "ledger") as local,
        connected(local, repository) as models,
    ):
        await models.load("fork", instances=1)
        for seed in range(2):
            x = batch(2, seed)
            (got,) = await infer(models, "fork", {"x": x}, ("join/y",))
            wanted = (x + 1) + x * 2 + plain(repository, "net", {"x": x})
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
