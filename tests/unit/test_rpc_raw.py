"""The raw-bytes path over a real connection: bytes that are no message, and the protobuf path."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.fakes import FakeControl, FakeInference
from tritonclient.grpc import service_pb2

from paceline.core.chain import Chain
from paceline.rpc.server import start_grpc

SERVICE = "inference.GRPCInferenceService"
NOT_A_MESSAGE = b"\x0a\xff"


def no_chains(text: str, *, name: str) -> Chain:
    raise AssertionError("inference reads no chain files")


@pytest_asyncio.fixture(params=[True, False], ids=["raw", "protobuf"])
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[grpc.aio.Channel]:
    control = FakeControl()
    inference = FakeInference(control)
    server = await start_grpc(
        inference, control, parse_chain=no_chains, port=0, raw=bool(request.param)
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as made:
        yield made
    await server.stop(None)


def echo(**fields: Any) -> bytes:
    message = service_pb2.ModelInferRequest(model_name="echo_int32", **fields)
    message.inputs.add(name="in", datatype="INT32", shape=[2])
    message.raw_input_contents.append(bytes(range(8)))
    data: bytes = message.SerializeToString()
    return data


async def unary(channel: grpc.aio.Channel, data: bytes) -> bytes:
    method: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)
    answer: bytes = await method(data)
    return answer


async def test_both_paths_answer_with_the_same_bytes(channel: grpc.aio.Channel) -> None:
    expected = service_pb2.ModelInferResponse(model_name="echo_int32", model_version="1", id="7")
    expected.outputs.add(name="out", datatype="INT32", shape=[2])
    expected.raw_output_contents.append(bytes(range(8)))
    assert await unary(channel, echo(id="7")) == expected.SerializeToString()


async def test_requests_leave_nothing_to_the_garbage_collector(channel: grpc.aio.Channel) -> None:
    """What is in a cycle keeps a request's tensors until somebody looks; tensors can be large."""
    method: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)
    stream = method()

    async def ask() -> None:
        await unary(channel, echo(id="7"))
        await unary(channel, echo())
        for data in (echo(), service_pb2.ModelInferRequest(model_name="x").SerializeToString()):
            await stream.write(data)
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError):
            await unary(channel, NOT_A_MESSAGE)

    await ask()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(20):
            await ask()
        gc.collect()
        # The client's are not ours.
        ours = [type(one) for one in gc.garbage if type(one).__module__.startswith("paceline")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert len(ours) < 20, Counter(ours)


async def test_a_field_from_the_future_is_ignored(channel: grpc.aio.Channel) -> None:
    answer = service_pb2.ModelInferResponse.FromString(
        await unary(channel, echo() + b"\xfa\x7f\x03abc")
    )
    assert answer.raw_output_contents == [bytes(range(8))]


async def test_bytes_that_are_no_request_are_refused() -> None:
    control = FakeControl()
    server = await start_grpc(FakeInference(control), control, parse_chain=no_chains, port=0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel, NOT_A_MESSAGE)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "Exception deserializing request!"
        start: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)
        stream = start()
        await stream.write(NOT_A_MESSAGE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    await server.stop(None)
