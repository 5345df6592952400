"""Live replanning on a real Triton: traffic quadruples and falls, and no request notices."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from scripts.timed_model import write_timed
from tests.integration.conftest import Start
from tests.integration.test_serve_lifecycle import wait_status
from tritonclient.grpc import service_pb2, service_pb2_grpc

pytestmark = pytest.mark.integration

CHAIN = """\
chain: two
slo_ms: 5000
rate_rps: 10
inputs:
  x: {dtype: FP32, shape: [4]}
modules:
  first:
    model: first
    inputs: {x: inputs.x}
  second:
    model: second
    inputs: {x: first.y}
outputs:
  y: second.y
"""


async def drive(address: str, phases: list[tuple[float, float]]) -> list[BaseException | bytes]:
    """Requests at (rate, seconds) after (rate, seconds); every one's answer or failure."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        request = service_pb2.ModelInferRequest(model_name="two")
        request.inputs.add(name="x", datatype="FP32", shape=[4])
        request.raw_input_contents.append(bytes(16))

        async def one() -> bytes:
            answer = await stub.ModelInfer(request, timeout=30)
            return bytes(answer.raw_output_contents[0])

        loop = asyncio.get_running_loop()
        tasks, at_s = [], loop.time()
        for rate_rps, seconds in phases:
            until_s = at_s + seconds
            while at_s < until_s:
                await asyncio.sleep(max(0.0, at_s - loop.time()))
                tasks.append(asyncio.create_task(one()))
                at_s += 1 / rate_rps
        return list(await asyncio.gather(*tasks, return_exceptions=True))


def test_from_1x_to_4x_to_half_the_rate_no_request_fails(
    start_paceline: Start, tmp_path: Path
) -> None:
    models, chains = tmp_path / "models", tmp_path / "chains"
    models.mkdir()
    chains.mkdir()
    for name in ("first", "second"):
        write_timed(models, {1: 60, 8: 100}, name)
    (chains / "two.yaml").write_text(CHAIN, encoding="utf-8")
    server = start_paceline(
        *("--model-repository", str(models), "--chains", str(chains)),
        *("--slots", "8", "--replan-window-s", "6"),
    ).wait_ready()

    def replanning(status: object) -> dict[str, list[dict[str, float | str]]]:
        found: dict[str, list[dict[str, float | str]]] = json.loads(status.json)["replanning"]  # type: ignore[attr-defined]
        return found

    answers = asyncio.run(drive(server.address, [(10, 5), (40, 10), (5, 16)]))
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failures == []
    assert set(answers) == {bytes(16)}

    status = wait_status(server, lambda s: len(replanning(s)["changes"]) >= 2)
    changes = replanning(status)["changes"]
    costs = [(float(c["cost_before_per_hour"]), float(c["cost_after_per_hour"])) for c in changes]
    assert any(after > 1.5 * before for before, after in costs), changes
    assert any(after < before for before, after in costs), changes
    (two,) = [c for c in json.loads(status.json)["chains"] if c["chain"] == "two"]
    assert (two["failed"], two["rejected"]) == (0, 0)
    assert two["rate_rps"] < 40
    assert server.stop() == 0
