"""Items of a fan-out are streamed as they come, on a real Triton."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.integration.paceline_process import Paceline
from tritonclient.grpc import service_pb2, service_pb2_grpc

pytestmark = pytest.mark.integration

TIMEOUT_S = 60.0


def request(*, stream_items: bool) -> Any:
    """Seven items for the chain `items`, whose model takes four at a time."""
    x = np.arange(28, dtype=np.float32).reshape(7, 4)
    built = service_pb2.ModelInferRequest(model_name="items", id="streamed")
    built.inputs.add(name="x", datatype="FP32", shape=x.shape)
    built.raw_input_contents.append(x.tobytes())
    if stream_items:
        built.parameters["stream_items"].bool_param = True
    return built


async def responses(server: Paceline, message: Any) -> list[Any]:
    """Everything one streamed request is answered with."""

    async def requests() -> Any:
        yield message

    async with grpc.aio.insecure_channel(server.address) as channel, asyncio.timeout(TIMEOUT_S):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return [response async for response in stub.ModelStreamInfer(requests())]


async def test_streamed_items_come_before_the_full_answer_and_together_are_it(
    front: Paceline,
) -> None:
    answers = await responses(front, request(stream_items=True))
    assert [answer.error_message for answer in answers] == [""] * len(answers)
    *parts, final = [triton.InferResult(answer.infer_response) for answer in answers]
    assert final.get_response().parameters["triton_final_response"].bool_param
    expected = final.as_numpy("y")
    assert expected.tolist() == np.arange(28).reshape(7, 4).tolist()
    streamed: dict[int, list[float]] = {}
    for part in parts:
        response = part.get_response()
        assert response.id == "streamed"
        assert not response.parameters["triton_final_response"].bool_param
        first = response.parameters["paceline_first_item"].int64_param
        for offset, row in enumerate(part.as_numpy("y")):
            assert first + offset not in streamed, "each item once"
            streamed[first + offset] = row.tolist()
    assert len(parts) > 1
    assert [streamed[index] for index in range(len(streamed))] == expected.tolist()


async def test_without_stream_items_a_stream_gives_one_response_a_request(front: Paceline) -> None:
    (answer,) = await responses(front, request(stream_items=False))
    assert not answer.error_message
    assert "triton_final_response" not in answer.infer_response.parameters
