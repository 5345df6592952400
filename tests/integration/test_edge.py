"""Rounds of edge inference on a running server: decided, granted, uploaded, executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.paceline_process import Paceline, run_cli
from tests.integration.test_serve_inference import TIMEOUT_S
from tritonclient.grpc import service_pb2

from paceline.client import upload
from paceline.v1 import edge_pb2, edge_pb2_grpc

pytestmark = pytest.mark.integration

ROUND = Path(__file__).parents[2] / "examples/edge/round.yaml"


@pytest.fixture
def channel(front: Paceline) -> Iterator[grpc.Channel]:
    with front.channel() as opened:
        yield opened


def infer_request(model: str = "add") -> Any:
    """a = 40 and b = 1."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in (("a", 40), ("b", 1)):
        request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        request.raw_input_contents.append(np.full(16, value, np.int32).tobytes())
    return request


def granted(channel: grpc.Channel, *users: str, **changes: float) -> dict[str, Any]:
    """Grants by user: each wants `add`, 20 s are enough for everybody."""
    request = edge_pb2.ScheduleRequest(
        users=[
            edge_pb2.EdgeUser(
                user=user,
                model="add",
                payload_bits=8 * 4096,
                efficiency_bps_per_hz=4.0,
                deadline_ms=20_000,
            )
            for user in users
        ],
        models=[edge_pb2.EdgeModel(model="add", blocks_bytes={"w": 1000}, batch_ms=10)],
        bandwidth_hz=changes.get("bandwidth_hz", 1e6),
        load_bytes_per_s=1e6,
        grant=True,
    )
    answer = edge_pb2_grpc.EdgeStub(channel).Schedule(request, timeout=TIMEOUT_S)
    assert answer.exact
    return {grant.user: grant for grant in answer.grants}


def failure(channel: grpc.Channel, grant: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as failed:
        upload(channel, grant, request, timeout_s=TIMEOUT_S)
    error: Any = failed.value
    return error.code(), error.details()


def test_who_has_a_grant_uploads_once_and_is_answered(channel: grpc.Channel) -> None:
    grants = granted(channel, "ana", "bo")
    assert sorted(grants) == ["ana", "bo"]
    assert sum(grant.bandwidth_hz for grant in grants.values()) == pytest.approx(1e6)
    response = upload(channel, grants["ana"], infer_request(), timeout_s=TIMEOUT_S)
    total = np.frombuffer(response.raw_output_contents[0], np.int32)
    assert (total == 41).all()
    code, details = failure(channel, grants["ana"], infer_request())
    assert (code, details) == (
        grpc.StatusCode.NOT_FOUND,
        "no such grant: it was used, or has expired",
    )


def test_a_grant_is_for_its_model_and_its_bytes(channel: grpc.Channel) -> None:
    grants = granted(channel, "ana", "bo", "cleo")
    code, details = failure(channel, grants["ana"], infer_request("slow"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "for model 'add', not 'slow'" in details
    large = infer_request()
    large.raw_input_contents.append(bytes(1 << 20))
    code, details = failure(channel, grants["bo"], large)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "more have come" in details
    stub = edge_pb2_grpc.EdgeStub(channel)
    with pytest.raises(grpc.RpcError) as failed:
        parts = [edge_pb2.UploadRequest(grant_id=grants["cleo"].grant_id, payload=b"\xff")]
        stub.Upload(iter(parts), timeout=TIMEOUT_S)
    error: Any = failed.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_round_that_is_wrong_says_so(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        granted(channel, "ana", bandwidth_hz=0.0)
    error: Any = failed.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "bandwidth_hz: must be above 0" in error.details()


def test_the_command_shows_who_is_served_and_who_is_not() -> None:
    text = run_cli("schedule", str(ROUND))
    assert text.returncode == 0, text.stderr
    assert "6 of 7 users are served (nobody can serve more)" in text.stdout
    assert "not served: gus" in text.stdout
    ended = run_cli("schedule", str(ROUND), "--format", "json")
    shown = json.loads(ended.stdout)
    assert [batch["model"] for batch in shown["batches"]] == ["cars", "birds", "plants", "scenes"]
    assert shown["not_served"] == ["gus"]
    wrong = run_cli("schedule", str(ROUND), "--method", "best")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("paceline: --method: 'best' is none of auto, exact")
